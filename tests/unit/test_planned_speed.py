"""The expected speed of a job: its traffic against what was recorded, its time against arithmetic by hand."""

import math
from typing import Any

import pytest

from pipeline.flops import forward_flops, logits_flops
from pipeline.planning.hardware import Hardware, hardware_of
from pipeline.planning.plan import plan_memory
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.speed import plan_speed
from pipeline.planning.speed_advice import gains
from pipeline.planning.traffic import Traffic, step_traffic
from tests.unit.test_planning import case

FAST_MEMORY = Hardware("a card", 2e12, 1e12, 1e30)
"""Products take all of the time."""
LARGE = {"dim": 4096, "num_layers": 32, "num_attention_heads": 32, "ffn_dim": 11008, "vocab_size": 32_000}


def large(num_ranks: int = 64, zero: dict[str, Any] | None = None, **sections: Any) -> PlannedJob:
    data = {"sequence_length": 4096, "global_batch": 1024, "micro_batch": 2, "lanes": 1024} | sections.pop("data", {})
    return case(num_ranks, True, True, {"overlap_comm": True} | (zero or {}), data=data, model=LARGE, **sections)


def test_products_take_the_flops_that_the_step_executes() -> None:
    planned = case(num_ranks=1)
    # On a CPU, without attention, what is useful is what is executed.
    tokens = planned.settings.data.global_batch * planned.settings.data.sequence_length
    speed = plan_speed(planned, FAST_MEMORY, keys_a_query=1e-9)
    assert speed.parts["products"] == pytest.approx(tokens * speed.useful_flops / 1e12)
    assert speed.mfu == pytest.approx(0.5, rel=1e-6)
    # A full document's attention runs at half the speed of products.
    full = plan_speed(planned, FAST_MEMORY)
    attention = tokens * (full.useful_flops - speed.useful_flops) / 1e12
    assert full.parts["products"] - speed.parts["products"] == pytest.approx(2 * attention)


def test_a_second_pass_over_selected_rows_and_a_block_that_is_computed_again_take_time_but_are_not_useful() -> None:
    def found(**training: Any) -> tuple[float, float]:
        speed = plan_speed(case(num_ranks=1, training=training), FAST_MEMORY, keys_a_query=1e-9)
        return speed.parts["products"], speed.useful_flops

    planned = case(num_ranks=1)
    tokens = planned.settings.data.global_batch * planned.settings.data.sequence_length
    (once, useful), (twice, as_useful), (again, still) = (
        found(),
        found(loss_phase="two_pass"),
        found(activation_checkpointing="full"),
    )
    assert useful == as_useful == still
    assert found(k_percent=[[0, 1.0], [100, 0.6]]) == (once, useful)
    assert twice - once == pytest.approx(tokens * 3 * 0.6 * logits_flops(planned.settings.model) / 1e12)
    assert once < again < 4 / 3 * once


def test_a_cached_reference_saves_its_forward() -> None:
    live = case(num_ranks=1)
    cached, tokens = live.changed(reference=None), 64 * 64
    products = [plan_speed(planned, FAST_MEMORY, keys_a_query=1e-9).parts["products"] for planned in (live, cached)]
    assert live.reference is not None
    assert products[0] - products[1] == pytest.approx(tokens * forward_flops(live.reference, 0) / 1e12)


# As launch/benchmark.py traffic recorded them with 9 layers, D 64, F 192, V 512, 2 ranks, in float32: live blocks, all-gathers
# but for the 25 of vectors, which come once a step, MB of all-gathers.
RECORDED = [(3, 34, 3.460), (5, 32, 3.247), (7, 30, 3.034), (9, 28, 2.821)]


@pytest.mark.parametrize(("live", "calls", "megabytes"), RECORDED)
def test_gathers_are_those_that_were_recorded_on_two_ranks(live: int, calls: int, megabytes: float) -> None:
    block = 4 * 64**2 + 3 * 64 * 192
    limits = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), live * block)
    zero = {"stage3_param_persistence_threshold": 640, "reduce_bucket_size": 2**22} | limits
    shape = {"dim": 64, "num_layers": 9, "num_attention_heads": 2, "ffn_dim": 192, "vocab_size": 512}
    traffic = step_traffic(case(2, zero=zero, model=shape, reference={"sharding": "zero3"}))
    gathers = (traffic.reference, traffic.forward, traffic.backward)
    assert sum(each.calls for each in gathers) == calls
    assert sum(each.sent for each in (*gathers, traffic.updated)) / 1e6 == pytest.approx(megabytes, abs=0.001)
    assert traffic.updated.calls == 25
    assert (traffic.reduced.calls, traffic.reduced.sent / 1e6) == (1, pytest.approx(1.412, abs=0.001))


def test_a_model_that_stays_gathered_whole_is_not_gathered() -> None:
    traffic = step_traffic(case(zero={"stage3_param_persistence_threshold": 10**9}, reference={"sharding": "zero3"}))
    assert (traffic.reference.calls, traffic.forward, traffic.backward) == (0, Traffic(0, 0, 4), Traffic(0, 0, 4))


def test_hpz_gathers_within_a_node_but_for_a_steps_first_forward() -> None:
    """tests/integration/test_hpz.py records it."""
    sharded = {"reference": {"sharding": "zero3"}}
    plain, hpz = (step_traffic(large(zero={"zero_hpz_partition_size": size}, **sharded)) for size in (1, 8))
    within = {"reference", "later_forward", "backward"}
    for kind, of_all, of_node in zip(plain._fields, plain, hpz, strict=True):
        assert of_node == of_all._replace(ranks=8 if kind in within else 64), kind
        assert of_all.whole > 0 or kind not in within


def test_only_traffic_that_outlasts_its_computation_counts() -> None:
    quick, slow = (Hardware("a card", None, 8e14, 3e12, network_bandwidth=each) for each in (50e9, 0.5e9))
    near, far = plan_speed(large(), quick), plan_speed(large(), slow)
    assert near.parts["exposed traffic"] < 0.01 * near.seconds < near.hidden
    assert far.parts["exposed traffic"] > 0.5 * far.seconds
    # Nothing runs beside computation without overlap.
    waited = plan_speed(large(zero={"overlap_comm": False}), quick)
    assert waited.hidden == 0
    assert waited.parts["exposed traffic"] == pytest.approx(near.parts["exposed traffic"] + near.hidden)
    assert "exposed traffic" not in plan_speed(large(num_ranks=1), quick).parts


def test_a_ring_between_nodes_uses_all_adapters_of_a_node() -> None:
    card = Hardware("a card", None, 1.0, 1.0, node_ranks=8, node_bandwidth=450e9, network_bandwidth=50e9)
    assert [card.bandwidth(ranks) for ranks in (2, 8, 16, 1024)] == [450e9, 450e9, 400e9, 400e9]
    assert Traffic(1, 8.0, 4).sent == 6.0


def test_the_lower_a_stage_the_less_is_sent() -> None:
    sent = {}
    for stage in (1, 2, 3):
        traffic = step_traffic(large(zero={"stage": stage}))
        in_each_micro_step = (traffic.reference, traffic.later_forward, traffic.backward, traffic.reduced)
        of_a_step = sum(each.sent for each in in_each_micro_step) * large().micro_steps
        sent[stage] = of_a_step + traffic.summed.sent + traffic.updated.sent
    assert sent[1] < sent[2] < sent[3]


def test_a_card_is_known_by_its_name_and_what_is_stated_replaces_its_data_sheet() -> None:
    card = hardware_of("NVIDIA H100 80GB HBM3", matrix_flops=None, network_bandwidth=25e9)
    assert card is not None
    assert (card.peak_flops, card.matrix_flops) == (989e12, 0.8 * 989e12)
    assert (card.node_ranks, card.network_bandwidth) == (8, 25e9)
    pcie = hardware_of("NVIDIA H100 PCIe", matrix_flops=5e14)
    assert pcie is not None
    assert (pcie.matrix_flops, pcie.node_bandwidth) == (5e14, 64e9)
    assert hardware_of("a card of next year", matrix_flops=5e14) is None
    assert hardware_of("a card of next year", matrix_flops=5e14, memory_bandwidth=1e12) is not None


# Tokens a second and GPU of plain next-token training, T 2048, in bf16 without checkpointing, from llm-foundry's tables
# (scripts/train/benchmarking/README.md): card, GPUs, layers, D, rows of a micro-step. F is 8/3 D: as many weights as with 4 D
# and no gate.
PUBLISHED = [
    ("H100", 8, 24, 2048, 14, 45_455),
    ("H100", 64, 24, 2048, 20, 44_402),
    ("H100", 16, 32, 2560, 10, 24_142),
    ("H100", 8, 32, 4096, 6, 10_643),
    ("H100", 64, 40, 5120, 2, 4_800),
    ("A100", 8, 24, 2048, 14, 20_513),
    ("A100", 8, 32, 4096, 6, 4_641),
    ("A100", 8, 40, 5120, 2, 2_262),
]


@pytest.mark.parametrize(("name", "gpus", "layers", "dim", "rows", "published"), PUBLISHED)
def test_plain_steps_are_expected_to_be_as_fast_as_published_ones(
    name: str, gpus: int, layers: int, dim: int, rows: int, published: float
) -> None:
    card = hardware_of(name)
    assert card is not None
    shape = {"dim": dim, "num_layers": layers, "num_attention_heads": dim // 128, "ffn_dim": 8 * dim // 3}
    planned = case(
        gpus, True, True, {"overlap_comm": True},
        data={"sequence_length": 2048, "global_batch": rows * gpus, "micro_batch": rows, "lanes": rows * gpus},
        model=shape | {"vocab_size": 50_368, "num_prediction_heads": 1},
    )  # fmt: skip
    assert plan_speed(planned, card).tokens_per_second / gpus == pytest.approx(published, rel=0.16)


CHANGES: dict[str, dict[str, Any]] = {
    "training.activation_checkpointing=none": {"sections": {"training": {"activation_checkpointing": "none"}}},
    "reference.cached=DIR": {"reference": None},
    "data.micro_batch=4": {"sections": {"data": {"micro_batch": 4}}},
    '"zero_hpz_partition_size":': {"zero": {"zero_hpz_partition_size": 8}},
}


@pytest.mark.parametrize("network_bandwidth", [50e9, 0.5e9])
def test_what_would_be_faster_is_what_a_plan_of_it_says(network_bandwidth: float) -> None:
    card = hardware_of("H100", network_bandwidth=network_bandwidth)
    assert card is not None
    planned = large(training={"activation_checkpointing": "full"}, reference={"sharding": "zero3"})
    now, found = plan_speed(planned, card).tokens_per_second, gains(planned, card)
    by_name = {gain.setting.partition(" ")[0]: gain for gain in found}
    # A fast network leaves the arithmetic to be saved, a slow one the traffic.
    first, second, *slow = CHANGES
    for setting in (first, second) if network_bandwidth == 50e9 else slow:
        changed = planned.changed(**CHANGES[setting])
        assert by_name[setting][1:] == (plan_speed(changed, card).tokens_per_second, plan_memory(changed).total)
    assert all(gain.tokens_per_second >= 1.01 * now for gain in found)
    assert found == sorted(found, key=lambda gain: -gain.tokens_per_second)
    assert (slow[1] in by_name) == (network_bandwidth == 0.5e9)


def test_an_optimizer_on_the_host_takes_longer() -> None:
    card = hardware_of("H100")
    assert card is not None
    device, host = (plan_speed(large(zero=each), card) for each in ({}, {"offload_optimizer": {"device": "cpu"}}))
    assert host.parts["optimizer"] > 10 * device.parts["optimizer"]
    assert all(math.isfinite(part) and part > 0 for part in host.parts.values())

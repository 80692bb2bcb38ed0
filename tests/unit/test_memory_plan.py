"""The memory plan's parts: what a block saves against what autograd saves, and which way every setting moves them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ConfigError, ModelSettings, Settings
from pipeline.model.recompute import block_runner
from pipeline.model.transformer import Block, document_mask, rotary_angles
from pipeline.planning import activations, states
from pipeline.planning.advice import changes, verdict
from pipeline.planning.case import Case
from pipeline.planning.plan import Plan, plan_memory
from pipeline.planning.reading import case_of
from pipeline.runtime.engine import num_parameters

CONTENT: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
MODEL = {"dim": 96, "num_layers": 3, "num_attention_heads": 6, "ffn_dim": 200, "vocab_size": 512}


def settings_of(**sections: dict[str, Any]) -> Settings:
    given: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "training": {}, "reference": {}} | sections
    data = {"path": Path("data"), "sequence_length": 64, "global_batch": 64, "micro_batch": 4} | given["data"]
    reference = {"training_steps": 1, "training_data": Path("data"), "sharding": "replicate"} | given["reference"]
    return Settings.model_validate(
        {"data": data, "model": MODEL | given["model"], "training": given["training"], "reference": reference}
    )


def case(
    num_ranks: int = 4, on_gpu: bool = False, bf16: bool = False, zero: dict[str, Any] | None = None, **sections: Any
) -> Case:
    content = CONTENT | {"bf16": {"enabled": bf16}, "zero_optimization": CONTENT["zero_optimization"] | (zero or {})}
    return case_of(settings_of(**sections), content, num_ranks, on_gpu, None)[0]


def saved_by_autograd(settings: Settings, dtype: torch.dtype) -> int:
    """Bytes that a block's forward leaves for backward, its input, weights, mask and angles left out."""
    model, data = settings.model, settings.data
    block = Block(model).to(dtype)
    mask = document_mask(torch.zeros(data.micro_batch, data.sequence_length, dtype=torch.int32))
    angles = rotary_angles(data.sequence_length, model, mask.device)
    x_BTD = torch.randn(data.micro_batch, data.sequence_length, model.dim, dtype=dtype, requires_grad=True)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), mask, *angles, x_BTD)}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x_BTD, angles, mask)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in given)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}, {"qk_norm": True}, {"head_dim": 32, "attention_bias": True}])
def test_a_block_saves_what_autograd_saves(more: dict[str, Any], bf16: bool) -> None:
    planned = case(bf16=bf16, model=more)
    found = saved_by_autograd(planned.settings, torch.bfloat16 if bf16 else torch.float32)
    assert activations.saved_by_block(planned) == found


def kept_by_storage(settings: Settings, kind: str) -> int:
    """Bytes of all storages that a block's result holds on to, its input, weights, mask and angles left out."""
    from torch.profiler import ProfilerActivity, profile

    model, data = settings.model, settings.data
    block = Block(model)
    mask = document_mask(torch.zeros(data.micro_batch, data.sequence_length, dtype=torch.int32))
    angles = rotary_angles(data.sequence_length, model, mask.device)
    x_BTD = torch.randn(data.micro_batch, data.sequence_length, model.dim, requires_grad=True)
    run = block_runner(kind)
    run(block, x_BTD, angles, mask)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        output = run(block, x_BTD, angles, mask)
    events = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    return held - output.untyped_storage().nbytes()


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_what_waits_for_backward_is_what_stays_allocated(kind: str) -> None:
    planned = case(training={"activation_checkpointing": kind}, data={"sequence_length": 256})
    few = 64 * 1024  # Random states, and the like.
    assert kept_by_storage(planned.settings, kind) == pytest.approx(activations.kept_by_block(planned), abs=few)


def test_activations_halve_with_the_rows() -> None:
    for kind in ("none", "selective", "full"):
        four, two = (case(data={"micro_batch": rows}, training={"activation_checkpointing": kind}) for rows in (4, 2))
        assert activations.waiting(four) - 2 * activations.waiting(two) < 0.01 * activations.waiting(four)
        assert activations.kept_by_block(four) == 2 * activations.kept_by_block(two)
        assert activations.stacked(four) == 2 * activations.stacked(two)


def test_the_mask_of_a_cpu_grows_with_the_square_of_the_length_and_a_gpu_has_none() -> None:
    def values(on_gpu: bool) -> int:
        short, long = (case(on_gpu=on_gpu, data={"sequence_length": tokens}) for tokens in (64, 128))
        return activations.saved_by_block(long) - 2 * activations.saved_by_block(short)

    assert values(on_gpu=True) == 0
    assert values(on_gpu=False) == 4 * 4 * (128**2 - 2 * 64**2)  # Rows, bytes.


def test_checkpointing_keeps_less_and_makes_more_again() -> None:
    none, selective, full = (case(training={"activation_checkpointing": kind}) for kind in ("none", "selective", "full"))
    assert activations.waiting(none) > activations.waiting(selective) > activations.waiting(full) > 0
    assert 0 == activations.made_again(none) < activations.made_again(selective) < activations.made_again(full)
    assert activations.made_again(full) == activations.saved_by_block(none)


def test_every_head_adds_a_block_and_its_hidden_states() -> None:
    one, two, three = (case(model={"num_prediction_heads": heads}) for heads in (1, 2, 3))
    assert two.whole - one.whole == three.whole - two.whole == num_parameters(three.settings.model) - two.whole
    assert activations.stacked(three) == 3 * activations.stacked(one)
    grown = [activations.waiting(each) - activations.block_input(each) for each in (one, two, three)]
    assert grown[2] - grown[1] == grown[1] - grown[0] > activations.saved_by_block(one)


def test_states_are_cut_by_the_ranks_and_weights_by_stage_3_alone() -> None:
    for stage in (1, 2, 3):
        two, four = (case(num_ranks=ranks, zero={"stage": stage}) for ranks in (2, 4))
        assert two.whole == four.whole == num_parameters(two.settings.model)
        for of in (states.master_weights, states.optimizer):
            assert of(two) == 2 * of(four)
        assert states.master_weights(two) == 4 * two.whole // 2
        assert states.optimizer(two) == 8 * two.whole // 2
        assert states.weights(two) == (2 * states.weights(four) if stage == 3 else states.weights(four))
        assert (states.gradients_at_rest(two) > 0) == (stage == 3)
        assert (states.gathered(two) > 0) == (stage == 3)


def test_bf16_halves_weights_and_hidden_states_and_leaves_the_optimisers_states() -> None:
    single, half = (case(on_gpu=True, bf16=bf16) for bf16 in (False, True))
    for of in (states.weights, states.reference, activations.stacked, activations.block_input):
        assert of(single) == 2 * of(half)
    for of in (states.master_weights, states.optimizer, states.gradients_at_rest):
        assert of(single) == of(half)


def test_bf16_in_stage_1_has_whole_gradients_on_every_rank() -> None:
    planned = case(bf16=True, zero={"stage": 1})
    assert states.gradients_at_rest(planned) == 4 * planned.whole
    assert states.gradients_at_rest(case(bf16=True, zero={"stage": 2})) == 0


def test_accumulated_gradients_are_whole_in_stage_1_and_a_part_in_stage_2() -> None:
    def accumulated(stage: int, rows: int) -> int:
        return states.gradients_accumulated(case(zero={"stage": stage}, data={"micro_batch": rows}))

    whole = case().whole
    assert [accumulated(stage, 16) for stage in (1, 2, 3)] == [0, 0, 0]
    assert [accumulated(stage, 8) for stage in (1, 2, 3)] == [4 * whole, whole, 0]


def test_gathered_weights_follow_the_window_and_never_exceed_the_model() -> None:
    def gathered(num_ranks: int = 4, kind: str = "none", **zero: int) -> int:
        zero = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0} | zero
        return states.gathered(case(num_ranks=num_ranks, zero=zero, training={"activation_checkpointing": kind}))

    largest = 512 * 96
    assert gathered() == 4 * largest
    assert gathered(kind="full") == 2 * 4 * largest
    assert gathered(stage3_max_live_parameters=10_000) == 4 * (largest + 10_000)
    assert gathered(stage3_max_live_parameters=10_000, stage3_prefetch_bucket_size=0) == 4 * largest
    assert gathered(stage3_max_reuse_distance=30_000) == 4 * (largest + 15_000)
    assert gathered(stage3_max_live_parameters=10**9) == 4 * case().whole
    assert gathered(num_ranks=1, stage3_max_live_parameters=10**9) == 0
    assert gathered(stage3_param_persistence_threshold=10**9) == 4 * case().whole


def test_a_reference_is_whole_or_a_part_or_nothing_at_all() -> None:
    def reference(**settings: Any) -> int:
        return states.reference(case(reference=settings))

    next_token = num_parameters(ModelSettings.model_validate(MODEL | {"num_prediction_heads": 1}))
    assert reference(sharding="replicate") == 4 * next_token
    assert reference(sharding="zero3") == next_token
    assert reference(cached=Path("losses"), training_steps=None, training_data=None) == 0


def test_auto_keeps_a_reference_whole_where_it_takes_a_quarter_of_what_is_free() -> None:
    settings = settings_of(reference={"sharding": "auto"})
    built = case().whole * (4 + 4 + 4) // 4 + 4 * case().whole  # A part of everything, and the bucket as far as it is used.
    needed = states.reference(case())
    for spare, expected in ((1, "replicate"), (-1, "zero3")):
        planned, notes = case_of(settings, CONTENT, 4, False, built + 4 * (needed + spare))
        assert (planned.sharding, notes) == (expected, [])
    planned, (note,) = case_of(settings, CONTENT, 4, False, None)
    assert planned.sharding == "replicate"
    assert "memory is not known" in note


def test_a_reference_that_is_elsewhere_is_assumed_to_have_the_policys_shape() -> None:
    settings = settings_of(reference={"path": Path("nowhere"), "training_steps": None, "training_data": None})
    planned, (note,) = case_of(settings, CONTENT, 4, False, None)
    assert planned.reference == planned.settings.model.model_copy(update={"num_prediction_heads": 1})
    assert "nowhere" in note


def test_bf16_auto_is_what_the_device_has_not_what_this_machine_has() -> None:
    content = CONTENT | {"bf16": {"enabled": "auto"}}
    assert [case_of(settings_of(), content, 4, on_gpu, None)[0].width for on_gpu in (False, True)] == [4, 2]


def test_the_loss_phase_holds_a_chunk_and_dense_every_heads_logits() -> None:
    predicted, two_pass, dense = (case(training={"loss_phase": phase}) for phase in ("predicted", "two_pass", "dense"))
    tokens, vocab, dim = 4 * 64, 512, 96
    assert activations.in_loss(predicted) == activations.in_loss(two_pass)
    # Hidden gradient, weight gradient, a quarter of a head's logits, and twice their rows.
    assert activations.in_loss(predicted) == 4 * (tokens * 4 * dim + vocab * dim + tokens // 4 * (vocab + 2 * dim))
    # The log-probabilities of four heads, and the logits of the last one.
    assert activations.in_loss(dense) == 4 * tokens * vocab * (4 + 1)


def test_offloading_moves_to_the_host_what_it_takes_from_the_device() -> None:
    def plan(**zero: Any) -> Plan:
        return plan_memory(case(on_gpu=True, zero=zero))

    on_host = {"device": "cpu"}
    nothing, optimizer = plan(), plan(offload_optimizer=on_host)
    both = plan(offload_optimizer=on_host, offload_param=on_host)
    moved = ("master weights", "optimiser", "gradients")
    assert nothing.host == {}
    assert set(optimizer.host) == set(moved)
    assert set(both.host) == {*moved, "parameters"}
    assert optimizer.total < nothing.total
    assert both.peak.get("parameters", 0) == 0 < optimizer.peak["parameters"]
    assert optimizer.host["optimiser"] == nothing.peak["optimiser"]


def test_the_total_is_the_highest_moments_sum() -> None:
    plan = plan_memory(case())
    totals = {moment: sum(parts.values()) for moment, parts in plan.moments.items()}
    assert plan.total == max(totals.values()) == totals[plan.highest]
    assert plan.total > sum(plan.at_rest.values())


def test_advice_is_what_the_changed_settings_would_be_planned_to_take() -> None:
    def planned(rows: int = 4, **training: Any) -> Case:
        zero = {"stage": 2, "reduce_bucket_size": 10**5}
        return case(bf16=True, zero=zero, data={"micro_batch": rows, "sequence_length": 512}, training=training)

    advised = {change.setting.partition(" (")[0]: change.total for change in changes(planned())}
    total = plan_memory(planned()).total
    assert list(advised.values()) == sorted(advised.values())
    assert all(size < 0.99 * total for size in advised.values())
    full, half = planned(activation_checkpointing="full"), planned(rows=2)
    assert advised["training.activation_checkpointing=full"] == plan_memory(full).total
    assert advised["data.micro_batch=2"] == plan_memory(half).total
    assert not any("loss_phase" in setting for setting in advised)


def test_only_what_fits_with_15_percent_to_spare_is_said_to_fit() -> None:
    plan = Plan({}, {"a moment": {"parameters": 100}}, {})
    assert [verdict(plan, size) for size in (116, 114, 100, 99)] == ["fits", "close", "close", "does not fit"]


def test_a_vocabulary_that_nothing_tells_is_an_error_and_one_that_is_set_needs_no_data(tmp_path: Path) -> None:
    from pipeline.checks import check_before_planning

    json_file = tmp_path / "zero.json"
    json_file.write_text('{"zero_optimization": {"stage": 3}}')
    settings = settings_of(data={"path": tmp_path / "nothing"}, model={"vocab_size": None})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: not set, and the data does not tell"):
        check_before_planning(settings, json_file, 4)
    known, _ = check_before_planning(settings.with_values(model={"vocab_size": 512}), json_file, 4)
    assert known.model.vocab_size == 512
    with pytest.raises(ConfigError, match="numbers of ranks that fit"):
        check_before_planning(settings.with_values(model={"vocab_size": 512}), json_file, 3)


def test_a_vocabulary_that_is_not_set_is_the_datas(tiny_data: Path, tmp_path: Path) -> None:
    from pipeline.checks import check_before_planning
    from pipeline.data.manifest import read_manifest

    json_file = tmp_path / "zero.json"
    json_file.write_text('{"zero_optimization": {"stage": 3}}')
    settings = settings_of(data={"path": tiny_data / "train"}, model={"vocab_size": None})
    known, _ = check_before_planning(settings, json_file, 4)
    assert known.model.vocab_size == read_manifest(tiny_data / "train").vocab_size

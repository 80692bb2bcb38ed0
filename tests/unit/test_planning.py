"""The memory plan's parts: what a block saves against what autograd saves, and which way every setting moves them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checks import size_problems
from pipeline.config import ConfigError, ModelSettings, Settings
from pipeline.model import transformer
from pipeline.model.mtp import MTPModel
from pipeline.model.recompute import block_runner
from pipeline.model.transformer import Block, document_mask, rotary_angles
from pipeline.planning import activations, states
from pipeline.planning.advice import savings, usable_bytes, verdict
from pipeline.planning.plan import Plan, plan_memory
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.report import document
from pipeline.planning.resolve import resolve_planned_job
from pipeline.runtime.parameters import num_parameters

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
) -> PlannedJob:
    content = CONTENT | {"bf16": {"enabled": bf16}, "zero_optimization": CONTENT["zero_optimization"] | (zero or {})}
    return resolve_planned_job(settings_of(**sections), content, num_ranks, on_gpu, None)[0]


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
    assert kept_by_storage(planned.settings, kind) == pytest.approx(activations.saved_by_checkpointed_block(planned), abs=few)


def test_activations_halve_with_the_rows() -> None:
    for kind in ("none", "selective", "full"):
        four, two = (case(data={"micro_batch": rows}, training={"activation_checkpointing": kind}) for rows in (4, 2))
        saved = activations.saved_for_backward(four)
        assert saved - 2 * activations.saved_for_backward(two) < 0.01 * saved
        assert activations.saved_by_checkpointed_block(four) == 2 * activations.saved_by_checkpointed_block(two)
        assert activations.head_outputs(four) == 2 * activations.head_outputs(two)


def test_the_mask_of_a_cpu_grows_with_the_square_of_the_length_and_a_gpu_has_none() -> None:
    def values(on_gpu: bool) -> int:
        short, long = (case(on_gpu=on_gpu, data={"sequence_length": tokens}) for tokens in (64, 128))
        return activations.saved_by_block(long) - 2 * activations.saved_by_block(short)

    assert values(on_gpu=True) == 0
    assert values(on_gpu=False) == 4 * 4 * (128**2 - 2 * 64**2)  # Rows, bytes.


def test_checkpointing_keeps_less_and_makes_more_again() -> None:
    none, selective, full = (case(training={"activation_checkpointing": kind}) for kind in ("none", "selective", "full"))
    most, less, least = map(activations.saved_for_backward, (none, selective, full))
    assert most > less > least > 0
    assert 0 == activations.recomputed(none) < activations.recomputed(selective) < activations.recomputed(full)
    assert activations.recomputed(full) == activations.saved_by_block(none)


def test_every_head_adds_a_block_and_its_hidden_states() -> None:
    one, two, three = (case(model={"num_prediction_heads": heads}) for heads in (1, 2, 3))
    assert (
        two.num_parameters - one.num_parameters
        == three.num_parameters - two.num_parameters
        == num_parameters(three.settings.model) - two.num_parameters
    )
    assert activations.head_outputs(three) == 3 * activations.head_outputs(one)
    grown = [activations.saved_for_backward(each) - activations.block_input(each) for each in (one, two, three)]
    assert grown[2] - grown[1] == grown[1] - grown[0] > activations.saved_by_block(one)


def test_states_are_cut_by_the_ranks_and_weights_by_stage_3_alone() -> None:
    for stage in (1, 2, 3):
        two, four = (case(num_ranks=ranks, zero={"stage": stage}) for ranks in (2, 4))
        assert two.num_parameters == four.num_parameters == num_parameters(two.settings.model)
        for of in (states.master_weights, states.optimizer):
            assert of(two) == 2 * of(four)
        assert states.master_weights(two) == 4 * two.num_parameters // 2
        assert states.optimizer(two) == 8 * two.num_parameters // 2
        assert states.weights(two) == (2 * states.weights(four) if stage == 3 else states.weights(four))
        assert (states.gradients_at_rest(two) > 0) == (stage == 3)
        assert (states.gathered_parameters(two) > 0) == (stage == 3)


def test_bf16_halves_weights_and_hidden_states_and_leaves_the_optimisers_states() -> None:
    single, half = (case(on_gpu=True, bf16=bf16) for bf16 in (False, True))
    for of in (states.weights, states.reference, activations.head_outputs, activations.block_input):
        assert of(single) == 2 * of(half)
    for of in (states.master_weights, states.optimizer, states.gradients_at_rest):
        assert of(single) == of(half)


def test_bf16_in_stage_1_has_whole_gradients_on_every_rank() -> None:
    planned = case(bf16=True, zero={"stage": 1})
    assert states.gradients_at_rest(planned) == 4 * planned.num_parameters
    assert states.gradients_at_rest(case(bf16=True, zero={"stage": 2})) == 0


def test_accumulated_gradients_are_whole_in_stage_1_and_a_part_in_stage_2() -> None:
    def accumulated(stage: int, rows: int) -> int:
        return states.gradients_accumulated(case(zero={"stage": stage}, data={"micro_batch": rows}))

    whole = case().num_parameters
    assert [accumulated(stage, 16) for stage in (1, 2, 3)] == [0, 0, 0]
    assert [accumulated(stage, 8) for stage in (1, 2, 3)] == [4 * whole, whole, 0]


def test_gathered_weights_follow_the_window_and_never_exceed_the_model() -> None:
    def gathered(num_ranks: int = 4, kind: str = "none", **zero: int) -> int:
        zero = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0} | zero
        return states.gathered_parameters(case(num_ranks=num_ranks, zero=zero, training={"activation_checkpointing": kind}))

    with torch.device("meta"):
        largest = sum(parameter.numel() for parameter in MTPModel(case().settings.model).heads[0].parameters())
    assert gathered() == 4 * largest
    assert gathered(kind="full") == 2 * 4 * largest
    assert gathered(stage3_max_live_parameters=10_000) == 4 * (largest + 10_000)
    assert gathered(stage3_max_live_parameters=10_000, stage3_prefetch_bucket_size=0) == 4 * largest
    assert gathered(stage3_max_reuse_distance=30_000) == 4 * (largest + 15_000)
    assert gathered(stage3_max_live_parameters=10**9) == 4 * case().num_parameters
    assert gathered(num_ranks=1, stage3_max_live_parameters=10**9) == 0
    assert gathered(stage3_param_persistence_threshold=10**9) == 4 * case().num_parameters


def test_a_reference_is_whole_or_a_part_or_nothing_at_all() -> None:
    def reference(**settings: Any) -> int:
        return states.reference(case(reference=settings))

    next_token = num_parameters(ModelSettings.model_validate(MODEL | {"num_prediction_heads": 1}))
    assert reference(sharding="replicate") == 4 * next_token
    assert reference(sharding="zero3") == next_token
    assert reference(cached=Path("losses"), training_steps=None, training_data=None) == 0


def test_auto_keeps_a_reference_whole_where_it_takes_a_quarter_of_what_is_free() -> None:
    settings = settings_of(reference={"sharding": "auto"})
    built = (
        case().num_parameters * (4 + 4 + 4) // 4 + 4 * case().num_parameters
    )  # A part of everything, and the bucket as far as it is used.
    needed = states.reference(case())
    for spare, expected in ((1, "replicate"), (-1, "zero3")):
        planned, notes = resolve_planned_job(settings, CONTENT, 4, False, built + 4 * (needed + spare))
        assert (planned.sharding, notes) == (expected, [])
    planned, (note,) = resolve_planned_job(settings, CONTENT, 4, False, None)
    assert planned.sharding == "replicate"
    assert "memory is not known" in note


def test_a_reference_that_is_elsewhere_is_assumed_to_have_the_policys_shape() -> None:
    settings = settings_of(reference={"path": Path("nowhere"), "training_steps": None, "training_data": None})
    planned, (note,) = resolve_planned_job(settings, CONTENT, 4, False, None)
    assert planned.reference == planned.settings.model.model_copy(update={"num_prediction_heads": 1})
    assert "nowhere" in note


def test_bf16_auto_is_what_the_device_has_not_what_this_machine_has() -> None:
    content = CONTENT | {"bf16": {"enabled": "auto"}}
    assert [resolve_planned_job(settings_of(), content, 4, on_gpu, None)[0].dtype_bytes for on_gpu in (False, True)] == [4, 2]


def test_the_loss_phase_holds_a_chunk_and_dense_every_heads_logits() -> None:
    predicted, two_pass, dense = (case(training={"loss_phase": phase}) for phase in ("predicted", "two_pass", "dense"))
    tokens, vocab, dim = 4 * 64, 512, 96
    assert activations.loss_phase(predicted) == activations.loss_phase(two_pass)
    # Hidden gradient, weight gradient, a quarter of a head's logits and a part of those, and twice their rows.
    chunk = tokens // 4 * vocab
    assert activations.loss_phase(predicted) == 4 * (
        tokens * 4 * dim + vocab * dim + chunk + chunk // 64 + tokens // 4 * 2 * dim
    )
    # The log-probabilities of four heads, and the logits of the last one.
    assert activations.loss_phase(dense) == 4 * tokens * vocab * (4 + 1)


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


def test_the_copies_for_saves_in_the_background_are_three_numbers_a_value_that_a_rank_owns() -> None:
    job = case(on_gpu=True, num_ranks=1)
    assert plan_memory(job).checkpoint_copies == 3 * 4 * job.num_parameters


def test_the_total_is_the_highest_moments_sum() -> None:
    plan = plan_memory(case())
    totals = {moment: sum(parts.values()) for moment, parts in plan.moments.items()}
    assert plan.total == max(totals.values()) == totals[plan.peak_moment]
    assert plan.total > sum(plan.at_rest.values())


def test_advice_is_what_the_changed_settings_would_be_planned_to_take() -> None:
    def planned(rows: int = 4, **training: Any) -> PlannedJob:
        zero = {"stage": 2, "reduce_bucket_size": 10**5}
        return case(bf16=True, zero=zero, data={"micro_batch": rows, "sequence_length": 512}, training=training)

    advised = {saving.setting.partition(" (")[0]: saving.total for saving in savings(planned())}
    total = plan_memory(planned()).total
    assert list(advised.values()) == sorted(advised.values())
    assert all(size < 0.99 * total for size in advised.values())
    full, half = planned(activation_checkpointing="full"), planned(rows=2)
    assert advised["training.activation_checkpointing=full"] == plan_memory(full).total
    assert advised["data.micro_batch=2"] == plan_memory(half).total
    assert not any("loss_phase" in setting for setting in advised)


def test_only_what_fits_with_15_percent_to_spare_is_said_to_fit() -> None:
    plan = Plan({}, {"a moment": {"parameters": 100}}, {}, 0)
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
    from pipeline.data.shards.manifest import read_manifest

    json_file = tmp_path / "zero.json"
    json_file.write_text('{"zero_optimization": {"stage": 3}}')
    settings = settings_of(data={"path": tiny_data / "train"}, model={"vocab_size": None})
    known, _ = check_before_planning(settings, json_file, 4)
    assert known.model.vocab_size == read_manifest(tiny_data / "train").vocab_size


# What follows is counted by hand: 4 ranks, 4 rows of 64 tokens, 4 heads, width 96, feed-forward width 200, 512 ids.
TOKENS, HEADS, DIM, FFN, VOCAB = 4 * 64, 4, 96, 200, 512
EMBEDDING = VOCAB * DIM
BLOCK = 4 * DIM * DIM + 3 * DIM * FFN + 2 * DIM
# One trunk block less than layers, a block a head, two embeddings, the final norm.
WHOLE = (2 + HEADS) * BLOCK + 2 * EMBEDDING + DIM
VECTORS = (2 + HEADS) * 2 * DIM + DIM
PART = WHOLE // 4


def staged(stage: int, bf16: bool = False, rows: int = 16, **zero: Any) -> PlannedJob:
    """With 16 rows a micro-batch is a whole step's, with 8 rows half of it."""
    return case(bf16=bf16, zero={"stage": stage} | zero, data={"micro_batch": rows})


def test_the_hand_counts_are_the_models() -> None:
    assert case().num_parameters == WHOLE == num_parameters(case().settings.model)
    assert case().num_local_parameters == PART
    assert case().num_matrix_parameters == WHOLE - VECTORS


@pytest.mark.parametrize(
    ("stage", "bf16", "bucket", "expected"),
    [
        (3, False, 10_000, 4 * 10_000),
        (3, True, 10_000, 4 * 10_000),
        (3, True, 10**9, 4 * WHOLE),
        # One slice a rank's part, unless the bucket is larger than it.
        (2, False, 10_000, 0),
        (2, False, 10**9, 4 * WHOLE),
        (1, False, PART + 1, 4 * (PART + 1)),
        # Flattened in bf16, and sent in float32.
        (2, True, 10_000, (2 + 4) * 10_000),
        (2, True, 10**9, (2 + 4) * WHOLE),
        (1, True, 10_000, 0),
    ],
)
def test_reducing_a_bucket_makes_what_is_sent(stage: int, bf16: bool, bucket: int, expected: int) -> None:
    assert states.reduction_buffers(staged(stage, bf16, reduce_bucket_size=bucket)) == expected


def test_a_gradient_that_fits_no_bucket_waits_and_is_copied_in_bf16_alone() -> None:
    for bf16, copied in ((False, 0), (True, 4 * EMBEDDING)):
        for stage in (2, 3):
            plan = plan_memory(staged(stage, bf16, reduce_bucket_size=EMBEDDING - 1))
            moment, resident = plan.moments["the unembedding's reduction"], plan.at_rest
            assert moment.get("reduce buckets", 0) - resident["reduce buckets"] == copied
            averaged = 4 * PART if bf16 and stage == 2 else 0
            assert moment["gradients"] - resident["gradients"] == (2 if bf16 else 4) * EMBEDDING + averaged
    fitting = plan_memory(staged(3, reduce_bucket_size=EMBEDDING))
    assert sum(fitting.moments["the unembedding's reduction"].values()) == sum(fitting.at_rest.values())


def test_bf16_in_stage_1_reduces_all_gradients_at_once_unless_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = staged(1, bf16=True)
    reduction = plan_memory(planned).moments["the gradient's reduction"]
    assert reduction["gradients"] == (4 + 2) * WHOLE
    assert reduction["reduce buckets"] == 4 * WHOLE
    monkeypatch.setattr(states, "_LARGEST_FLATTENED", WHOLE - VECTORS - 1)
    assert states.bf16_optimizer_reduction(planned) == 0
    monkeypatch.setattr(states, "_LARGEST_FLATTENED", WHOLE - VECTORS)
    assert states.bf16_optimizer_reduction(planned) == 4 * WHOLE
    assert [states.bf16_optimizer_reduction(staged(stage, bf16)) for stage, bf16 in ((1, False), (2, True), (3, True))] == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("stage", "bf16", "accumulated", "in_backward", "after", "in_step"),
    [
        (1, False, 4 * WHOLE, 0, 4 * PART, 2 * 4 * PART),
        (2, False, 4 * PART, 0, 4 * PART, 2 * 4 * PART),
        (3, False, 0, 0, 0, 4 * PART),
        (1, True, 2 * WHOLE, 0, 2 * WHOLE, 2 * WHOLE),
        (2, True, 4 * PART, 4 * PART, 4 * PART, 4 * PART + 8 * EMBEDDING),
        (3, True, 0, 0, 0, 4 * PART),
    ],
)
def test_gradients_of_a_step(stage: int, bf16: bool, accumulated: int, in_backward: int, after: int, in_step: int) -> None:
    once, twice = staged(stage, bf16), staged(stage, bf16, rows=8)
    assert (once.micro_steps, twice.micro_steps) == (1, 2)
    assert states.gradients_accumulated(once) == 0
    assert states.gradients_accumulated(twice) == accumulated
    assert states.gradients_in_backward(once) == in_backward
    assert states.gradients_in_backward(twice) == max(accumulated, in_backward)
    assert states.gradients_after_backward(once) == after
    assert states.gradients_after_backward(twice) == max(accumulated, after)
    assert states.gradients_in_step(once) == states.gradients_in_step(twice) == in_step


def test_the_norm_in_float64_is_of_one_gradient_or_of_as_much_of_it_as_is_this_ranks() -> None:
    few, many = (case(bf16=True, num_ranks=ranks, zero={"stage": 2}) for ranks in (4, 16))
    assert states.gradients_in_step(few) == 4 * PART + 8 * EMBEDDING
    assert many.num_local_parameters < EMBEDDING
    assert states.gradients_in_step(many) == 4 * many.num_local_parameters + 8 * many.num_local_parameters


def test_stage_3_flattens_no_more_gradients_than_a_sub_group_has() -> None:
    assert states.gradients_in_step(staged(3, sub_group_size=1000)) == 4 * 1000


def test_nothing_is_flattened_on_the_device_for_an_optimiser_on_the_host() -> None:
    assert [states.gradients_in_step(staged(stage, offload_optimizer={"device": "cpu"})) for stage in (2, 3)] == [0, 0]


def test_buckets_are_one_for_good_or_two_in_turn() -> None:
    size = 10_000
    for bf16, width in ((False, 4), (True, 2)):
        assert states.buckets_at_rest(staged(3, bf16, reduce_bucket_size=size)) == 4 * size
        assert states.buckets_in_backward(staged(3, bf16, reduce_bucket_size=size), 0) == 4 * size
        two = staged(2, bf16, reduce_bucket_size=size, overlap_comm=True)
        one = staged(2, bf16, reduce_bucket_size=size, overlap_comm=False)
        assert states.buckets_at_rest(two) == 0
        # On a CPU only what was written is memory: the first bucket full, then the second.
        assert [states.buckets_in_backward(two, written) for written in (0, 6_000, 14_000, 10**6)] == [
            width * values for values in (0, 6_000, 14_000, 20_000)
        ]
        assert [states.buckets_in_backward(one, written) for written in (6_000, 10**6)] == [width * 6_000, width * size]
    on_gpu = case(on_gpu=True, zero={"stage": 2, "reduce_bucket_size": size, "overlap_comm": True})
    assert states.buckets_in_backward(on_gpu, 0) == 4 * 2 * size
    assert states.buckets_in_backward(staged(1, bf16=True, reduce_bucket_size=size), 10**6) == 0
    assert states.buckets_at_rest(staged(3, contiguous_gradients=False)) == 0


def test_what_backward_adds_is_counted_by_its_steps() -> None:
    hidden, logits = HEADS * TOKENS * DIM, TOKENS * VOCAB
    single, half = case(), case(bf16=True)
    on_gpu = case(on_gpu=True, bf16=True)
    # The norm: gradients of what it gave and took, on a CPU four float32 tensors.
    assert activations.norm_backward(single) == activations.norm_backward(half) == 4 * 4 * hidden
    assert activations.norm_backward(on_gpu) == 2 * 2 * hidden
    # The oracle: four heads' log-probabilities and one gradient of logits in float32, the unembedding's gradient twice, the
    # hidden states'; in bf16 both factors in float32 as well.
    assert activations.dense_loss_backward(single) == 4 * (5 * logits + 2 * EMBEDDING + hidden)
    assert activations.dense_loss_backward(half) == 4 * (5 * logits + 2 * EMBEDDING) + 2 * hidden + 4 * (hidden + EMBEDDING)
    # A block: the heads' gradients, two of the stream, two of the feed-forward layer, and what is made again.
    assert activations.block_backward(single) == 4 * (hidden + 2 * TOKENS * DIM + 2 * TOKENS * FFN)
    again = case(training={"activation_checkpointing": "full"})
    added = activations.block_backward(again) - activations.block_backward(single)
    assert added == activations.saved_by_block(again) > 0
    # Heads that are cut off: the gradient at their copy of the trunk's output.
    cut = case(training={"detach_heads": True})
    assert activations.block_backward(cut) - activations.block_backward(single) == 4 * TOKENS * DIM


def test_adding_in_two_precisions_takes_a_copy_on_a_cpu_alone() -> None:
    rows = TOKENS // 4
    chunk = rows * (4 * VOCAB + 4 * VOCAB // 64 + 2 * VOCAB + 2 * 2 * DIM)
    needed = 2 * HEADS * TOKENS * DIM + 4 * EMBEDDING + chunk + 2 * EMBEDDING
    assert activations.loss_phase(case(bf16=True)) == needed + 4 * EMBEDDING


def test_a_model_that_is_whole_on_each_rank_is_there_twice_while_it_is_built() -> None:
    assert plan_memory(staged(1)).moments["building"] == {"parameters": 2 * 4 * WHOLE}
    assert plan_memory(staged(2, bf16=True)).moments["building"] == {"parameters": 2 * 2 * WHOLE}
    assert "building" not in plan_memory(staged(3)).moments


def test_torch_2_11_saves_keys_and_values_for_every_head_that_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = {"num_key_value_heads": 2}
    each = TOKENS * 2 * (DIM - 2 * 16)  # In bf16, of one of the two, what six heads need beyond two.

    def counts(**more: Any) -> tuple[int, int, int]:
        selective = case(model=grouped, training={"activation_checkpointing": "selective"}, **more)
        return (
            activations.saved_by_block(case(model=grouped, **more)),
            activations.saved_by_checkpointed_block(selective),
            activations.recomputed(selective),
        )

    found = {}
    for groups in (True, False):
        monkeypatch.setattr(transformer, "flash_kernel", lambda groups=groups: (None, groups))
        found[groups] = counts(on_gpu=True, bf16=True)
        # Under a mask attention takes them as they are.
        assert counts(bf16=True) == counts(bf16=True, on_gpu=False)
        on_cpu = activations.saved_by_block(case(model=grouped, bf16=True))
        assert on_cpu == found.setdefault("cpu", on_cpu)  # type: ignore[call-overload]
    saved, kept, again = (without - with_them for with_them, without in zip(found[True], found[False], strict=True))
    assert (saved, kept) == (2 * each, 0)
    # The value that was kept is not the one that is saved.
    assert again == 2 * each + TOKENS * 2 * 2 * 16


ADVISED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    '"stage": 2 in the DeepSpeed JSON': ({"zero": {"stage": 1}}, {"zero": {"stage": 2}}),
    '"offload_optimizer": {"device": "cpu"} in the DeepSpeed JSON': ({}, {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    '"stage3_max_live_parameters" and "stage3_max_reuse_distance": 100000000 in the DeepSpeed JSON': (
        {"model": {"vocab_size": 2_000_000}},
        {"zero": {"stage3_max_live_parameters": 10**8, "stage3_max_reuse_distance": 10**8}},
    ),
    "reference.sharding=zero3": ({}, {"sharding": "zero3"}),
    "reference.cached=DIR": ({}, {"reference": None}),
    "data.micro_batch=2": ({"data": {"sequence_length": 512}}, {"sections": {"data": {"micro_batch": 2}}}),
    "training.loss_phase=predicted": (
        {"training": {"loss_phase": "dense"}},
        {"sections": {"training": {"loss_phase": "predicted"}}},
    ),
    "--gpus 8": ({}, {"num_ranks": 8}),
}


@pytest.mark.parametrize("setting", ADVISED)
def test_each_kind_of_advice_is_accepted_and_brings_what_it_says(setting: str) -> None:
    given, change = ADVISED[setting]
    given = given | {"zero": {"reduce_bucket_size": 10**5} | given.get("zero", {})}
    planned = case(on_gpu=True, bf16=True, **given)
    advised = {each.setting.partition(" (")[0]: each.total for each in savings(planned)}
    changed = planned.changed(**change)
    assert advised[setting] == plan_memory(changed).total < plan_memory(planned).total
    assert size_problems(changed.settings, changed.num_ranks) == []
    # What is there already is not advised again.
    assert setting not in {each.setting.partition(" (")[0] for each in savings(changed)}


def test_no_more_gpus_are_advised_than_the_lanes_can_feed() -> None:
    def advised(lanes: int) -> bool:
        sizes, few = {"global_batch": 64, "lanes": lanes, "micro_batch": 4}, {"reduce_bucket_size": 10**5}
        return any(each.setting.startswith("--gpus") for each in savings(case(data=sizes, zero=few)))

    # Four ranks of four rows: 16 lanes are all in use, whatever the number of micro-steps.
    assert [advised(lanes) for lanes in (16, 32)] == [False, True]


def test_a_gpu_has_two_gib_that_are_not_the_plans() -> None:
    assert usable_bytes(case(on_gpu=True), 24 * 2**30) == 22 * 2**30
    assert usable_bytes(case(on_gpu=False), 24 * 2**30) == 24 * 2**30


def test_every_moment_has_the_gradients_that_are_there_by_then() -> None:
    moments = ("the start of backward", "a head's backward", "the end of backward", "the optimiser's step")
    bucket = {"reduce_bucket_size": 10_000, "overlap_comm": False}

    def found(part: str, planned: PlannedJob) -> list[int]:
        return [plan_memory(planned).moments[moment].get(part, 0) for moment in moments]

    # The unembedding's gradient, which fits no bucket; the part of the average; the embedding's gradient; the norm in float64.
    second = staged(2, bf16=True, **bucket)
    norm = 8 * EMBEDDING
    assert found("gradients", second) == [2 * EMBEDDING, 4 * PART, 4 * PART + 2 * EMBEDDING, 4 * PART + norm]
    assert found("reduce buckets", second) == [0, 20_000 + 60_000, 20_000 + 60_000, 0]
    # Beside the float32 accumulator of BF16_Optimizer what there is in bf16: one, one, all; with an earlier micro-step always
    # all, and the one that is being added.
    first, again = staged(1, bf16=True), staged(1, bf16=True, rows=8)
    assert found("gradients", first) == [4 * WHOLE + more for more in (2 * EMBEDDING, 2 * EMBEDDING, 2 * WHOLE, 2 * WHOLE)]
    assert found("gradients", again) == [4 * WHOLE + 2 * WHOLE + more for more in (2 * EMBEDDING, 0, 2 * EMBEDDING, 0)]
    assert found("reduce buckets", first) == [0] * 4
    # Beside the accumulator of stage 3 the one gradient; in the step all of this rank's once more.
    third = staged(3, **bucket)
    assert found("gradients", third) == [4 * PART + more for more in (4 * EMBEDDING, 0, 4 * EMBEDDING, 4 * PART)]
    assert found("reduce buckets", third) == [40_000 + more for more in (0, 40_000, 40_000, 0)]


def test_on_a_gpu_the_averaged_part_is_whole_from_its_first_gradient_on() -> None:
    assert states.gradients_in_backward(case(on_gpu=True, zero={"stage": 2}, data={"micro_batch": 16})) == 4 * PART
    assert states.gradients_in_backward(staged(2)) == 0


def test_the_verdict_is_of_what_is_left_of_a_gpu() -> None:
    planned = case(on_gpu=True, zero={"reduce_bucket_size": 10**5})
    need = 1.15 * plan_memory(planned).total
    found = [document(planned, need + aside, [])["verdict"] for aside in (2.001 * 2**30, 1.9 * 2**30)]
    assert found == ["fits", "does not fit"]

"""The engine on two ranks under ZeRO-3: initial weights, decay groups, files, and steps that must not be applied."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from pipeline.model.mtp import MTPModel
from pipeline.schedule import learning_rate
from tests.dense import dense_model, settings_for, whole_batch
from tests.ranks import run_ranks
from tests.rows import part_of
from tests.stepping import run_of

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
CONTENT = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
}


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    from pipeline.runtime.engine import gathered

    weights = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            weights[name] = parameter.detach().clone()
    return weights


def build_and_inspect(directory: Path) -> dict[str, Any]:
    from pipeline.model.export import save_model
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy, gathered, initialize_distributed
    from pipeline.runtime.parameters import parameter_groups

    initialize_distributed(torch.device("cpu"), "error")
    settings = settings_for(2, 1)
    engine = build_policy(settings, resolve_deepspeed_json(CONTENT, settings, 2))
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = parameter_groups(engine.module, settings.training)
    save_model(engine.module, directory, gathered, writes=dist.get_rank() == 0)
    dist.barrier()
    return {
        "weights": whole_weights(engine.module),
        "local_sizes": {name: parameter.ds_tensor.numel() for name, parameter in engine.module.named_parameters()},
        "groups": [(group["weight_decay"], sorted(names[id(p)] for p in group["params"])) for group in groups],
    }


def load_from_files(directory: Path) -> dict[str, torch.Tensor]:
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy, initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    settings = settings_for(2, 1, model={"pretrained": directory, "seed": 9})
    return whole_weights(build_policy(settings, resolve_deepspeed_json(CONTENT, settings, 2)).module)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def built(files: Path) -> list[dict[str, Any]]:
    return run_ranks(build_and_inspect, 2, files)


def test_partitioned_weights_are_those_of_one_process_and_survive_the_way_through_files(built, files) -> None:
    expected = dict(dense_model(settings_for(2, 1)).named_parameters())
    loaded = run_ranks(load_from_files, 2, files)
    for rank in range(2):
        for name, parameter in expected.items():
            assert torch.equal(built[rank]["weights"][name], parameter), name
            assert torch.equal(loaded[rank][name], parameter), name
            assert built[rank]["local_sizes"][name] == math.ceil(parameter.numel() / 2)


def test_matrices_decay_and_vectors_do_not_though_both_look_empty_when_partitioned(built) -> None:
    (decay, matrices), (no_decay, vectors) = built[0]["groups"]
    expected = dict(MTPModel(settings_for(2, 1).model).named_parameters())
    assert (decay, no_decay) == (0.1, 0.0)
    assert matrices == sorted(name for name, parameter in expected.items() if parameter.ndim == 2)
    assert vectors == sorted(name for name, parameter in expected.items() if parameter.ndim == 1)


class Bad(NamedTuple):
    """What rank 1 alone meets in one of a step's micro-steps."""

    where: str
    value: float
    micro_step: int


PLACES = ("reference loss", "head 0's loss", "head 2's loss", "gradient")
BAD = [Bad(*bad) for bad in itertools.product(PLACES, (math.nan, math.inf, -math.inf), (0, 1))]


def some_steps(content: dict[str, Any], bads: list[Bad], with_bad_ones: bool) -> list[dict[str, Any]]:
    """Steps of two micro-steps each, always on the same rows; with bad ones, in every second step rank 1 alone meets a
    number that is not finite."""
    from pipeline.progress import Progress
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy, build_reference, initialize_distributed
    from pipeline.train import advance, fetch_step, train_step

    initialize_distributed(torch.device("cpu"), "error")
    rank = dist.get_rank()
    settings = settings_for(2, 2)
    config = resolve_deepspeed_json(content, settings, 2)
    engine = build_policy(settings, config)
    reference = build_reference(settings.model.model_copy(update={"num_prediction_heads": 1, "seed": 1}), None, "zero3", config)
    bad: Bad | None = None
    micro_step = -1  # The reference is what runs first in each.

    def is_here(where: str) -> bool:
        return rank == 1 and bad is not None and (where, micro_step % 2) == (bad.where, bad.micro_step)

    def poisoned(values: torch.Tensor) -> torch.Tensor:
        assert bad is not None
        return torch.full_like(values, bad.value)

    def maybe_poisoned_reference(*inputs: torch.Tensor, **known: Any) -> torch.Tensor:
        nonlocal micro_step
        micro_step += 1
        losses = reference(*inputs, **known)
        return poisoned(losses) if is_here("reference loss") else losses

    def maybe_poisoned_policy(*inputs: torch.Tensor, selector: Any, **others: Any) -> Any:
        class Poisoned:
            share, predicts, predicted_margin = selector.share, selector.predicts, selector.predicted_margin

            def after_first_head(self, first_loss_BT: torch.Tensor) -> Any:
                return self

            def select(self, policy_loss_BTK: torch.Tensor) -> Any:
                if is_here("head 2's loss"):
                    policy_loss_BTK[..., 1][inputs[3][..., 2]] = bad.value  # type: ignore[union-attr]
                return selector.select(policy_loss_BTK)

        return engine(*inputs, selector=Poisoned(), **others)

    def poison_head_0(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * bad.value if bad and is_here("head 0's loss") else output

    def poison_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return poisoned(gradient) if is_here("gradient") else gradient

    engine.module.heads[0].register_forward_hook(poison_head_0)
    engine.module.trunk[0].register_forward_hook(
        lambda module, args, output: output.register_hook(poison_gradient) and None if output.requires_grad else None
    )
    run = run_of(settings, engine, maybe_poisoned_reference, 2, policy=maybe_poisoned_policy)
    first = part_of(whole_batch(), slice(4 + 2 * rank, 6 + 2 * rank))
    batches = [first, replace(first, keys=tuple(f"1{key}" for key in first.keys))]
    progress, seen = Progress(), []
    steps = [bad for one in bads for bad in (None, one)] if with_bad_ones else [None] * len(bads)
    for step, bad in enumerate([*steps, None]):  # noqa: B007 (the hooks read it)
        before = whole_weights(engine.module)
        result = train_step(run, fetch_step(run, iter(batches), progress.step, progress.samples), progress)
        advance(progress, result, settings)
        after = whole_weights(engine.module)
        seen.append(
            {
                "applied": result.applied,
                "changed": any(not torch.equal(before[name], after[name]) for name in before),
                "finite": all(bool(weight.isfinite().all()) for weight in after.values()),
                "learning_rate": result.learning_rate,
                "bad": result.bad,
                "weights": hashlib.sha256(b"".join(weight.float().numpy().tobytes() for weight in after.values())).hexdigest(),
                "progress": (progress.step, progress.samples, progress.applied_steps, progress.skipped_in_a_row),
            }
        )
    seen[-1]["disagreements"] = disagreements(run, progress, result)
    return seen


def some_steps_with_bad_ones_and_without(
    content: dict[str, Any], bads: list[Bad]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return some_steps(content, bads, True), some_steps(content, bads, False)


def disagreements(run: Any, progress: Any, result: Any) -> list[str]:
    """What the ranks say when they agree, then when rank 1 differs in one thing after another."""
    from pipeline.rank_checks import checksums_of, common_values
    from pipeline.runtime.agreement import RanksDisagreeError, check_ranks_agree

    def said(pool: str, progress: Any, result: Any) -> str:
        changed = replace(run, settings=run.settings.with_values(training={"selection_pool": pool}))
        try:
            check_ranks_agree(common_values(changed, progress, result), run.device)
        except RanksDisagreeError as error:
            return str(error).partition(". Continue")[0]
        return "agreed"

    other = run.world.rank == 1
    thresholds = [threshold_K + 1e-6 * other for threshold_K in result.sums.thresholds]
    moved = replace(result, learning_rate=math.nextafter(result.learning_rate, 1 if other else result.learning_rate))
    found = [said("global", progress, result), said("global", replace(progress, samples=progress.samples + other), result)]
    found.append(said("global", progress, moved))
    result.sums.thresholds = thresholds
    found += [said("global", progress, result), said("step", progress, result), said("rank", progress, result)]
    # Of a partitioned weight there is only one; of a whole one each rank has its own, which may go astray.
    for parameter in run.engine.module.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data += other
    return [*found, said("rank", progress, replace(result, checksums=checksums_of(run)))]


SHIPPED = {path.stem: json.loads(path.read_text()) for path in DS_CONFIGS.glob("*.json")}
IN_BF16 = {"bf16": {"enabled": True}}
ALL_OFFLOADED = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}


FEW = [Bad(where, math.nan, number % 2) for number, where in enumerate(PLACES)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "bads"),
    [
        pytest.param(CONTENT, BAD, id="every place, value and micro-step"),
        *(pytest.param(content, FEW, id=name) for name, content in SHIPPED.items()),
        pytest.param(CONTENT | {"zero_optimization": ALL_OFFLOADED}, FEW, id="zero3, all offloaded"),
        *(
            pytest.param(CONTENT | IN_BF16 | {"zero_optimization": {"stage": stage}}, FEW, id=f"bf16, {stage}")
            for stage in (1, 2, 3)
        ),
    ],
)
def test_a_number_that_is_not_finite_on_one_rank_discards_the_step_on_all_and_nothing_else(
    content: dict[str, Any], bads: list[Bad]
) -> None:
    applied = [True, *([False, True] * len(bads))]
    for seen, without in run_ranks(some_steps_with_bad_ones_and_without, 2, content, bads):
        # As if the bad steps had never been, but for the data they used up.
        assert [step["weights"] for step in seen if step["applied"]] == [step["weights"] for step in without]
        assert [step["applied"] for step in seen] == applied
        assert [step["changed"] for step in seen] == applied
        assert all(step["finite"] for step in seen)
        assert [step["progress"] for step in seen] == [
            (step + 1, 8 * (step + 1), sum(applied[: step + 1]), int(not applied[step])) for step in range(len(applied))
        ]
        expected = [learning_rate(settings_for(2, 2).training, sum(applied[:step])) for step in range(len(applied))]
        assert [step["learning_rate"] for step in seen] == expected
        assert len(set(expected)) == sum(applied)
        assert [step["bad"] for step in seen[::2]] == [None] * (len(bads) + 1)
        differs = "ranks that must hold the same values do not: {}: rank(s) 1 differ from rank(s) 0"
        names = [f"parameter {name}" for name, _ in MTPModel(settings_for(2, 2).model).named_parameters()]
        astray = differs.format(": rank(s) 1 differ from rank(s) 0; ".join(names))
        assert (
            seen[-1]["disagreements"]
            == without[-1]["disagreements"]
            == [
                "agreed",
                differs.format("progress"),
                differs.format("learning rate"),
                differs.format("thresholds"),
                differs.format("thresholds"),
                "agreed",  # A rank's own pool has a threshold of its own.
                *([astray] if content["zero_optimization"]["stage"] < 3 else ["agreed"]),
            ]
        )
        # The reference's loss concerns all that is compared with it. Rank 1 has rows 6 and 7 in both micro-steps.
        met = {
            "reference loss": [f"reference loss of head {head}" for head in (1, 2, 3)],
            "head 0's loss": ["policy loss of head 0"],
            "head 2's loss": ["policy loss of head 2"],
            "gradient": ["policy gradient"],
        }
        for bad, step in zip(bads, seen[1::2], strict=True):
            rows = ("shard/6, shard/7", "1shard/6, 1shard/7")[bad.micro_step]
            assert step["bad"] == "; ".join(f"rank 1, {what}: {rows}" for what in met[bad.where]), bad

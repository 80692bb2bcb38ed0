"""A whole training step, beside plain next-token training of the same trunk and beside the way it was done first.

    next_token  trunk and one head, no reference
    mtp         four heads, each on every pair, no reference
    selective   four heads, selection, live reference: the pipeline as it is
    origin      the first way: the policy runs twice, once to score and once to train, policy and reference make full logits,
                and `torch.quantile` over the rank's own excess losses is the threshold

One rank each, in a process of its own, on the same rows, round by round in turn (on CUDA one after the other, because the
device's memory holds only one). A variant that fails is named and leaves the others, but for next_token. What a step should
cost is computed from its matrix products and attention: on a CPU, whose attention goes through a mask, every query meets
every key; on CUDA those of its document up to itself.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.assembly import Job, build_run
from pipeline.benchmark.attempts import describe_failures
from pipeline.benchmark.stepping import TrainingSteps
from pipeline.benchmark.streaming import NUM_DOCUMENTS, random_rows
from pipeline.benchmark.timing import Round, measured_in_processes, medians, timed
from pipeline.config import ModelSettings, Settings
from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.prefetch import prefetched
from pipeline.derived import next_token_model
from pipeline.flops import forward_flops, peak_flops, selective_flops
from pipeline.micro_step import load_micro_batches
from pipeline.model.model_config import impossible_heads
from pipeline.model.reference import losses_by_head
from pipeline.run import Run
from pipeline.runtime.distributed import device_of, find_world
from pipeline.runtime.engine import backward, end_micro_step, initialize_distributed
from pipeline.weighting.selectors import EveryPair

ZERO3 = Path(__file__).parents[2] / "ds_configs" / "zero3.json"
"""The JSON that is measured, as it is shipped."""
K_PERCENT, HEADS = 0.6, 4
WARM_UP_ROUNDS = 2


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, tokens a second and peak memory of each variant's step, and what they are of next_token's.

    Raises:
        DataError: no such model can be built.
    """
    check_shape(options)
    with tempfile.TemporaryDirectory() as scratch:
        rounds = WARM_UP_ROUNDS + options.rounds
        directory = random_rows(Path(scratch), options.rows * (rounds + 1), options.sequence_length, options.vocabulary)
        variants = [(name, directory, vars(options)) for name in dict.fromkeys(("next_token", *options.variants))]
        measured, failed = measured_in_processes(_prepare, variants, rounds)

    figures: dict[str, dict[str, float]] = {
        name: medians(answers[WARM_UP_ROUNDS:], ("seconds", "peak_bytes")) for name, answers in measured.items()
    }

    shape = shape_of(vars(options))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = peak_flops(device)
    keys = options.sequence_length / (2 * NUM_DOCUMENTS) if torch.cuda.is_available() else options.sequence_length
    tokens, plain = options.rows * options.sequence_length, figures["next_token"]
    for name, own in figures.items():
        flops = tokens * flops_a_token(name, shape, keys)
        own["tokens_per_second"] = tokens / own["seconds"]
        own["time_ratio"] = own["seconds"] / plain["seconds"]
        own["peak_ratio"] = own["peak_bytes"] / plain["peak_bytes"]
        own["flop_ratio"] = flops / (tokens * flops_a_token("next_token", shape, keys))
        own["time_over_flops"] = own["time_ratio"] / own["flop_ratio"]
        if peak is not None:
            own["mfu"] = flops / own["seconds"] / peak

    return {
        "variants": figures,
        "failed": failed,
        "device": device,
        "torch": torch.__version__,
        "shape": shape.model_dump(mode="json"),
    }


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'':12}{'seconds':>10}{'tokens/s':>10}{'peak MiB':>10}{'time':>8}{'FLOPs':>8}{'time/FLOPs':>12}{'MFU':>8}"]
    for name, own in figures["variants"].items():
        mfu = f"{own['mfu']:.1%}" if "mfu" in own else "-"
        lines.append(
            f"{name:12}{own['seconds']:>10.3f}{own['tokens_per_second']:>10,.0f}{own['peak_bytes'] / 2**20:>10,.0f}"
            f"{own['time_ratio']:>8.3f}{own['flop_ratio']:>8.3f}{own['time_over_flops']:>12.3f}{mfu:>8}"
        )
    lines += describe_failures(figures["failed"])
    lines.append(f"(time and FLOPs as multiples of next_token's; peak above what was in use before; {figures['device']})")
    return "\n".join(lines)


def flops_a_token(variant: str, shape: ModelSettings, keys_a_query: float) -> float:
    """Count the FLOPs of a whole step, forward and backward (`pipeline.flops`)."""
    one_head, all_heads = (forward_flops(shape, keys_a_query, heads) for heads in (1, HEADS))
    return {
        "next_token": 3 * one_head,
        "mtp": 3 * all_heads,
        "selective": selective_flops(shape, keys_a_query, HEADS, K_PERCENT, next_token_model(shape)),
        "origin": 4 * all_heads + one_head,
    }[variant]


def check_shape(options: argparse.Namespace) -> None:
    """Refuse sizes of which no model can be made."""
    problem = impossible_heads(shape_of(vars(options)))
    if problem is not None:
        raise DataError(f"--dim {options.dim}, --attention-heads {options.attention_heads}: {problem}")


def shape_of(options: dict[str, Any]) -> ModelSettings:
    return ModelSettings(
        dim=options["dim"],
        num_layers=options["layers"],
        num_attention_heads=options["attention_heads"],
        vocab_size=options["vocabulary"],
        num_prediction_heads=HEADS,
    )


def settings_of(variant: str, directory: Path, options: dict[str, Any]) -> Settings:
    compared = variant in ("selective", "origin")
    shape = shape_of(options).model_copy(update={"num_prediction_heads": 1 if variant == "next_token" else HEADS})
    return Settings.model_validate(
        {
            "data": {
                "path": directory,
                "sequence_length": options["sequence_length"],
                "global_batch": options["rows"],
                "micro_batch": options["rows"],
                "num_workers": 0,
            },
            "model": shape.model_dump(),
            "reference": {"training_steps": 1, "training_data": directory} if compared else {},
            "training": {"k_percent": K_PERCENT if compared else 1.0, "warmup_steps": 0},
        }
    )


def _prepare(variant: str, directory: Path, options: dict[str, Any]) -> Round:
    run = build(variant, directory, options)
    take_step = TrainingSteps(run) if variant != "origin" else _origin_steps(run)

    def measured(number: int) -> dict[str, float]:
        _, seconds, peak_bytes = timed(take_step, run.device)
        return {"seconds": seconds, "peak_bytes": peak_bytes}

    return measured


def build(variant: str, directory: Path, options: dict[str, Any]) -> Run:
    """Build a variant's run in this process, with its process group."""
    world = find_world()
    device = device_of(world)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    initialize_distributed(device, "error")
    settings = settings_of(variant, directory, options)
    job = Job(settings, json_content(), directory / "run", world, device)
    return build_run(job, settings, directory / "run", dry=True)


def json_content(path: Path = ZERO3) -> dict[str, Any]:
    """Read a DeepSpeed JSON as it is given."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _origin_steps(run: Run) -> Callable[[], None]:
    batches = prefetched(run.stream.iterate(0), run.device, depth=2)
    return lambda: step_of_the_origin(run, next(batches))


def step_of_the_origin(run: Run, batch: Batch) -> None:
    """Score, compare, take what lies above the quantile, run again and train."""
    (micro,) = load_micro_batches([batch], 0, HEADS, 1, 0, run.device)
    valid_BTK = micro.valid_BTH[..., 1:]
    ones_H = torch.ones(HEADS, device=run.device)
    spans = micro.batch.spans
    forms = {"scale_H": ones_H, "loss_phase": "dense", "spans": spans}

    # Both models' losses of every pair.
    with torch.no_grad():
        policy_loss_BTH = run.engine(*micro.inputs, selector=EveryPair(valid_BTK), **forms).policy_loss_BTH
        reference: Any = run.models.reference
        assert reference is not None
        next_token_inputs = (*micro.inputs[:2], micro.targets_BTH[..., :1], micro.valid_BTH[..., :1])
        scored = reference(*next_token_inputs, selector=EveryPair(valid_BTK[..., :0]), **forms | {"scale_H": ones_H[:1]})
        columns_BTC = torch.nn.functional.pad(scored.policy_loss_BTH[:, :-1], (0, 0, 1, 0))
        excess_BTH = policy_loss_BTH - losses_by_head(columns_BTC, "shifted", HEADS)

    # What lies above the quantile trains, in a second forward.
    selected_BTK = torch.stack(list(_above_quantile(excess_BTH[..., 1:], valid_BTK)), dim=-1)
    scale_H = ones_H / HEADS / torch.stack([micro.valid_BTH[..., 0].sum(), *selected_BTK.sum((0, 1))])
    losses = run.engine(*micro.inputs, selector=EveryPair(selected_BTK), **forms | {"scale_H": scale_H})

    backward(run.engine, losses.loss)
    end_micro_step(run.engine)


def _above_quantile(excess_BTK: Tensor, valid_BTK: Tensor) -> Iterator[Tensor]:
    for excess_BT, valid_BT in zip(excess_BTK.unbind(-1), valid_BTK.unbind(-1), strict=True):
        yield valid_BT & (excess_BT >= torch.quantile(excess_BT[valid_BT], 1 - K_PERCENT))

"""The collectives of a micro-step under ZeRO-3, counted by kind, with their bytes.

A policy of `--layers` + 3 blocks and a sharded reference of `--layers` train on `--ranks` gloo processes of this machine, under
`ds_configs/zero3.json` with at most `--live-blocks` blocks of gathered weights, which is a 7B model's ratio to DeepSpeed's
default limit. What is counted does not depend on the network: the collectives that one rank calls in one optimizer step of one
micro-step, once ZeRO-3 has learnt the order of modules. The selection exchanges histograms (`radix`), so that every all-gather
is of weights.

Of the all-gathers one for each small vector (norms), which ZeRO-3 keeps whole, comes with the optimizer's step, the others in
every micro-step. Bytes are those that each rank sends by the least that any algorithm sends (`Collective.wire_bytes`), in
float32: half of it in bf16. A gather of a block is a block's values, those small vectors left out.

With `--gpus-per-node` the ranks are those of several nodes, and what `ds_configs/zero3_hpz.json` gathers among the ranks of
a node is counted by itself.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.assembly import Job, build_run
from pipeline.benchmark.collectives import Collective, CollectiveRecorder
from pipeline.benchmark.ranks import run_ranks
from pipeline.benchmark.step import HEADS, ZERO3, check_shape, json_content
from pipeline.benchmark.stepping import TrainingSteps
from pipeline.benchmark.streaming import random_rows
from pipeline.config import Settings
from pipeline.data.errors import DataError
from pipeline.runtime.deepspeed_json import with_nodes_of
from pipeline.runtime.distributed import World
from pipeline.runtime.engine import Engine, initialize_distributed
from pipeline.runtime.parameters import gathered_block_size
from pipeline.runtime.table import aligned

WARM_UP_STEPS = 3
"""Steps before the one that is counted: ZeRO-3 records the order of modules in two."""
FLOAT32 = 4
KEPT_WHOLE = 10
"""Times D: the values of the largest vectors that ZeRO-3 keeps whole under `stage3_param_persistence_threshold: auto`."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Count the collectives of a micro-step.

    Raises:
        DataError: no such model can be built, or the nodes would differ.
    """
    check_shape(options)
    if options.gpus_per_node is not None and options.ranks % options.gpus_per_node:
        raise DataError(f"--gpus-per-node: got {options.gpus_per_node}; expected a divisor of --ranks = {options.ranks}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # What is counted is the same on a CPU, on any number of ranks.
    with tempfile.TemporaryDirectory() as scratch:
        rows = options.ranks * (WARM_UP_STEPS + 3)
        directory = random_rows(Path(scratch), rows, options.sequence_length, options.vocabulary)
        content = json_content(options.deepspeed or ZERO3)
        found = run_ranks(_count_on_this_rank, options.ranks, directory, vars(options), content, timeout=3600)
    assert all(each["called"] == found[0]["called"] for each in found), "all ranks call the same collectives"
    return figures_of(options, found)


class Called(NamedTuple):
    """A collective, and the number of ranks of the group that called it."""

    collective: Collective
    ranks: int

    @property
    def kind(self) -> str:
        return self.collective.kind

    @property
    def sent(self) -> float:
        """Bytes that each rank sends."""
        return self.collective.wire_bytes(self.ranks)

    @property
    def gathered(self) -> int:
        """Bytes that each rank holds after an all-gather."""
        return self.collective.payload * self.ranks


def figures_of(options: argparse.Namespace, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what the ranks have found."""
    block = found[0]["block"]
    called: list[Called] = found[0]["called"]
    gathers = [each for each in called if each.kind == "all_gather"]
    return {
        "all_gathers": len(gathers),
        "once_a_step": sum(each.gathered <= KEPT_WHOLE * options.dim * FLOAT32 for each in gathers),
        "reduce_scatters": sum(each.kind == "reduce_scatter" for each in called),
        "bytes": sum(each.sent for each in called),
        "blocks": 2 * options.layers + HEADS - 1,
        "largest_gather_blocks": max(each.gathered for each in gathers) / (FLOAT32 * block),
        "embedding_blocks": options.vocabulary * options.dim / block,
        "most_gathered_blocks": max(each["most_gathered"] for each in found) / block,
        "by_kind": _by_kind(called),
        "in_a_node": _by_kind([each for each in called if each.ranks < options.ranks]),
        "ranks": options.ranks,
        "gpus_per_node": options.gpus_per_node or options.ranks,
        "live_blocks": options.live_blocks,
    }


def _by_kind(called: Sequence[Called]) -> dict[str, dict[str, float]]:
    """Count collectives, and the bytes that each rank sends in them, by kind."""
    by_kind: dict[str, dict[str, float]] = {}
    for each in sorted(called, key=lambda each: each.kind):
        counts = by_kind.setdefault(each.kind, {"calls": 0, "bytes": 0.0})
        counts["calls"] += 1
        counts["bytes"] += each.sent
    return by_kind


def table(figures: dict[str, Any]) -> str:
    """Return the counts as a table."""
    rows = [["", "calls a micro-step", "MB sent by a rank"]]
    rows += [[kind, f"{each['calls']:,}", f"{each['bytes'] / 1e6:,.3f}"] for kind, each in figures["by_kind"].items()]
    rows += [
        [f"  of it {kind} in a node", f"{each['calls']:,}", f"{each['bytes'] / 1e6:,.3f}"]
        for kind, each in figures["in_a_node"].items()
    ]
    return "\n".join(
        [
            aligned(rows),
            f"{figures['all_gathers']} all-gathers for {figures['blocks']} blocks of policy and sharded reference on "
            f"{figures['ranks']} ranks, {figures['once_a_step']} of them of small vectors and once a step; "
            f"the largest is {figures['largest_gather_blocks']:.2f} blocks (the embedding "
            f"{figures['embedding_blocks']:.2f}), and at most {figures['most_gathered_blocks']:.1f} blocks of the policy were "
            f"gathered at a time (live limit {figures['live_blocks']:g}, which binds what is fetched ahead; the "
            "block at work comes on top)",
        ]
    )


def _count_on_this_rank(directory: Path, options: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    initialize_distributed(torch.device("cpu"), "error")
    settings = _settings(directory, options, ranks)
    block = gathered_block_size(settings.model, KEPT_WHOLE * settings.model.dim)
    # DeepSpeed has the same default for both.
    limits = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), int(options["live_blocks"] * block))
    content = with_nodes_of(content, options["gpus_per_node"] or ranks, ranks)
    zero = content["zero_optimization"] | limits
    world = World(rank, ranks, rank, ranks)
    job = Job(settings, content | {"zero_optimization": zero}, directory / "run", world, torch.device("cpu"))
    run = build_run(job, settings, directory / "run", dry=True)

    take_step, gathered = TrainingSteps(run), GatheredValues(run.engine)
    for _ in range(WARM_UP_STEPS):
        take_step()
    gathered.most = 0
    with CollectiveRecorder() as recorder:
        take_step()
    return {
        "called": list(map(Called, recorder.collectives, recorder.ranks)),
        "block": block,
        "most_gathered": gathered.most,
    }


class GatheredValues:
    """The most values of an engine's parameters that ZeRO-3 holds gathered at a time, those aside that it always does.

    Looked at whenever something was fetched, the only thing that can make it more. most: since it was last set to 0.
    """

    def __init__(self, engine: Engine):
        optimizer: Any = engine.optimizer
        self.parameters: list[Any] = list(engine.module.parameters())
        self.coordinator = optimizer.parameter_offload.get_param_coordinator()
        self.fetch, self.coordinator.fetch_sub_module = self.coordinator.fetch_sub_module, self._fetch_and_look
        self.most = 0

    def _fetch_and_look(self, *arguments: Any, **more: Any) -> None:
        self.fetch(*arguments, **more)
        self.most = max(self.most, self.now())

    def now(self) -> int:
        """Values that are gathered, or being gathered, now."""
        return sum(each.ds_numel for each in self.parameters if each.ds_status.name != "NOT_AVAILABLE" and not each.ds_persist)


def _settings(directory: Path, options: dict[str, Any], ranks: int) -> Settings:
    return Settings.model_validate(
        {
            "data": {
                "path": directory,
                "sequence_length": options["sequence_length"],
                "global_batch": ranks,
                "micro_batch": 1,
                "num_workers": 0,
            },
            "model": {
                "dim": options["dim"],
                "num_layers": options["layers"],
                "num_attention_heads": options["attention_heads"],
                "vocab_size": options["vocabulary"],
                "num_prediction_heads": HEADS,
            },
            "reference": {"training_steps": 1, "training_data": directory, "sharding": "zero3"},
            "training": {"warmup_steps": 0, "selection_exchange": "radix", "check_ranks_every": None},
        }
    )

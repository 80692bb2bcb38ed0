"""Time and traffic of the selection, by itself and over ranks: measured, then extrapolated by a model.

Measured, on gloo processes of this machine: the pool `rank` (no exchange), the two exchanges, and what one would write
first, `torch.quantile` on the gathered tensor. Every collective that is called is recorded; its payload becomes bytes on
the wire (sent by each rank) by `Collective.wire_bytes`, beside which stands what the kernel counted on the sockets.

The model: `predicted` lists the collectives of a way from the shapes alone, and must equal what was recorded. A message
costs `--latency-us`, of which an all-reduce over R ranks needs 2 log2 R one after another and a gather log2 R (Chan et
al. 2007, doi 10.1002/cpe.1206; a ring, which NCCL uses for a gather, would need R-1), and bytes leave a GPU at
`--bandwidth`. Defaults: 5 us, NCCL's own constant for a step of a tree over the network (`hwLat` in its
src/graph/tuning.cc); 50 GB/s, one 400 Gb/s adapter a GPU (NVIDIA's DGX H100 user guide). The work on the device is not
modelled. A micro-step's compute is 6 FLOPs a parameter and token times `STEP_COST`.

Shapes: N tokens of a rank, K heads that select.
"""

import argparse
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.benchmark.collectives import Collective, CollectiveRecorder, bytes_sent
from pipeline.benchmark.ranks import run_ranks
from pipeline.benchmark.timing import in_turn, median_ratio, slowest, stopwatch
from pipeline.runtime.table import aligned
from pipeline.weighting.exchange import DIGITS, all_gather, histogram_dtype, suited_exchange
from pipeline.weighting.pools import select_local, select_shared
from pipeline.weighting.selection import num_selected

K_PERCENT = 0.6
SHARE_VALID = 0.95
STEP_COST = 1.61
"""FLOPs of a step of selective multi-token prediction over those of plain next-token training, 1.1B parameters, V = 32k."""
QUANTILE_LIMIT = 2**24
"""Values that `torch.quantile` takes at most."""
WAYS = ("local", "all_gather", "radix", "quantile")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, a row for each number of ranks, tokens and way, and what the model says."""
    if max(options.ranks) * max(options.tokens) > QUANTILE_LIMIT:
        sys.exit(f"benchmark.py: error: --ranks times --tokens is more than {QUANTILE_LIMIT:,}, which torch.quantile refuses")
    measured = [row for ranks in options.ranks for row in _measured_on(ranks, options)]
    return {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, gloo",
        "options": {
            name: getattr(options, name)
            for name in ("heads", "runs", "gpu_tokens", "latency_us", "bandwidth", "parameters", "flops")
        },
        "quantile_refuses": _quantile_refuses(),
        "measured": measured,
        "model": [_at_scale(gpus, options) for gpus in options.gpus],
    }


def predicted(way: str, ranks: int, tokens: int, heads: int) -> list[Collective]:
    """Return the collectives of one selection, from its shapes."""
    if way == "radix":
        count = histogram_dtype(tokens * ranks).itemsize
        return [Collective("all_reduce", count * heads * size) for size in (*(values for _, values in DIGITS), ranks)]
    return [] if way == "local" else [Collective("all_gather", 4 * heads * tokens)]


def modelled_seconds(collectives: Sequence[Collective], ranks: int, latency_us: float, bandwidth: float) -> float:
    """Return the seconds of one collective after another; `bandwidth` in GB/s."""
    messages = math.ceil(math.log2(ranks)) * sum(2 if kind == "all_reduce" else 1 for kind, _ in collectives)
    return messages * latency_us * 1e-6 + wire_bytes(collectives, ranks) / (bandwidth * 1e9)


def wire_bytes(collectives: Sequence[Collective], ranks: int) -> float:
    """Return the bytes that each rank sends."""
    return sum(collective.wire_bytes(ranks) for collective in collectives)


def select_by_quantile(excess_NK: Tensor, valid_NK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Select as one would write it first: gather, `torch.quantile`, compare. It interpolates, and takes all ties."""
    gathered_RNK = all_gather(excess_NK.where(valid_NK, math.nan), group)
    selected = []
    for head, excess_P in enumerate(gathered_RNK.flatten(0, 1).unbind(-1)):
        threshold = torch.quantile(excess_P[~excess_P.isnan()], 1 - K_PERCENT)
        selected.append((excess_NK[:, head] >= threshold) & valid_NK[:, head])
    return torch.stack(selected, dim=-1)


def _quantile_refuses() -> str:
    try:
        torch.quantile(torch.zeros(QUANTILE_LIMIT + 1), K_PERCENT)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def _measured_on(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    of_ranks = run_ranks(_measure_on_this_rank, ranks, options.tokens, options.heads, options.runs, timeout=3600)

    rows = []
    for tokens, *same_size in zip(options.tokens, *of_ranks, strict=True):
        seconds = {way: slowest([of_rank[way]["seconds"] for of_rank in same_size]) for way in WAYS}
        for way in WAYS:
            collectives = same_size[0][way]["collectives"]
            assert all(of_rank[way]["collectives"] == collectives for of_rank in same_size)
            sent = [of_rank[way]["sent"] for of_rank in same_size]

            rows.append(
                {
                    "ranks": ranks,
                    "tokens": tokens,
                    "way": way,
                    "seconds": statistics.median(seconds[way]),
                    "all_seconds": seconds[way],
                    "times_all_gather": median_ratio(seconds[way], seconds["all_gather"]),
                    "collectives": [list(collective) for collective in collectives],
                    "wire_bytes": wire_bytes(collectives, ranks),
                    "predicted_wire_bytes": wire_bytes(predicted(way, ranks, tokens, options.heads), ranks),
                    "sockets_bytes": None if None in sent else statistics.mean(sent),
                    "wrong_pairs": sum(of_rank[way]["wrong_pairs"] for of_rank in same_size),
                }
            )
    return rows


def _measure_on_this_rank(sizes: Sequence[int], heads: int, runs: int) -> list[dict[str, dict[str, Any]]]:
    return [_measure_size(tokens, heads, runs) for tokens in sizes]


def _measure_size(tokens: int, heads: int, runs: int) -> dict[str, dict[str, Any]]:
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(dist.get_rank())
    valid_BTK = torch.rand(1, tokens, heads, generator=generator) < SHARE_VALID
    counts_K = valid_BTK.sum((0, 1))
    dist.all_reduce(counts_K)
    num_valid_K = counts_K.tolist()
    num_selected_K = [num_selected(K_PERCENT, count) for count in num_valid_K]
    excess_BTK = torch.empty(valid_BTK.shape)

    def with_fresh_numbers() -> None:
        excess_BTK.normal_(generator=generator)
        dist.barrier()

    def exchanged(name: str) -> Tensor:
        pool = (excess_BTK[None], valid_BTK[None], [num_valid_K], num_selected_K, name, group)
        return select_shared(*pool)[0].selected_BTK

    ways: dict[str, Callable[[], Tensor]] = {
        "local": lambda: select_local(excess_BTK, valid_BTK, K_PERCENT, "rank").selected_BTK,
        "all_gather": lambda: exchanged("all_gather"),
        "radix": lambda: exchanged("radix"),
        "quantile": lambda: select_by_quantile(excess_BTK[0], valid_BTK[0], group)[None],
    }
    rounds = {way: stopwatch(select, before=with_fresh_numbers) for way, select in ways.items()}
    seconds = {way: measured[1:] for way, measured in in_turn(rounds, 1 + runs).items()}
    exact_BTK = exchanged("all_gather")
    found = {}
    for way, select in ways.items():
        dist.barrier()
        sent_before = bytes_sent()
        with CollectiveRecorder() as recorder:
            selected_BTK = select()
        sent = bytes_sent()
        found[way] = {
            "seconds": seconds[way],
            "collectives": recorder.collectives,
            "sent": None if sent is None or sent_before is None else sent - sent_before,
            "wrong_pairs": 0 if way == "local" else int((selected_BTK != exact_BTK).sum()),
        }
    return found


def _at_scale(gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    tokens, heads = options.gpu_tokens, options.heads
    step_seconds = STEP_COST * 6 * options.parameters * tokens / options.flops
    row: dict[str, Any] = {"gpus": gpus, "pairs": gpus * tokens, "auto": suited_exchange(tokens * heads, gpus)}
    for way in ("all_gather", "radix"):
        collectives = predicted(way, gpus, tokens, heads)
        seconds = modelled_seconds(collectives, gpus, options.latency_us, options.bandwidth)
        row[way] = {"wire_bytes": wire_bytes(collectives, gpus), "seconds": seconds, "share_of_step": seconds / step_seconds}
    return row | {"quantile_refuses": gpus * tokens > QUANTILE_LIMIT}


def table(figures: dict[str, Any]) -> str:
    """Return the tables of what was measured and of what the model says."""
    options, refusal = figures["options"], figures["quantile_refuses"]
    measured = [["ranks × tokens", "way", "median ms", "× all_gather", "bytes sent by a rank", "sockets", "predicted", "wrong"]]
    for row in figures["measured"]:
        measured.append(
            [
                f"{row['ranks']} × {row['tokens']:,}",
                row["way"],
                f"{1e3 * row['seconds']:.2f}",
                f"{row['times_all_gather']:.2f}",
                f"{row['wire_bytes']:,.0f}",
                "unknown" if row["sockets_bytes"] is None else f"{row['sockets_bytes']:,.0f}",
                "exact" if row["predicted_wire_bytes"] == row["wire_bytes"] else f"{row['predicted_wire_bytes']:,.0f}",
                f"{row['wrong_pairs']:,}" if row["way"] == "quantile" else "",
            ]
        )

    model = [["GPUs", "pairs a head", "all_gather", "ms", "of a step", "radix", "ms", "of a step", "auto", "torch.quantile"]]
    for row in figures["model"]:
        cells = [f"{row['gpus']:,}", f"{row['pairs']:,}"]
        for way in ("all_gather", "radix"):
            cells += [f"{row[way]['wire_bytes'] / 1e6:,.3f} MB", f"{1e3 * row[way]['seconds']:.3f}"]
            cells.append(f"{100 * row[way]['share_of_step']:.3f} %")
        model.append([*cells, row["auto"], "refuses" if row["quantile_refuses"] else "as all_gather"])

    return "\n".join(
        [
            f"{options['heads']} selecting heads, median of {options['runs']} runs in turn, slowest rank; {figures['machine']}",
            aligned(measured),
            f"wrong: pairs that differ from the exact selection; torch.quantile of 2**24 + 1 values: {refusal}",
            "",
            f"model: {options['latency_us']:g} us a message, {options['bandwidth']:g} GB/s a GPU; {options['gpu_tokens']:,} "
            f"tokens a GPU and micro-step of {options['parameters']:g} parameters at {options['flops']:g} FLOP/s",
            aligned(model),
        ]
    )

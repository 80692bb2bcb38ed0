"""The speed that `launch/plan.py` expects, beside steps that are measured, at five shapes on which nothing was calibrated.

The card's matrix speed and the speed of a copy are measured first, as `gpu` does; the plan is made from these two. Then whole
selective steps, without a launcher or other ranks, under `ds_configs/zero3.json`; a shape that fails, as for want of memory,
is said and leaves the others. On a CPU time is the process's own CPU time, with one thread, which a busy machine lengthens
less than the clock's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmark import gpu, step
from pipeline.benchmark.attempts import attempted, describe_failures, say
from pipeline.benchmark.options import PLAN_SIZES
from pipeline.benchmark.stepping import TrainingSteps
from pipeline.benchmark.streaming import NUM_DOCUMENTS, random_rows
from pipeline.planning.hardware import Hardware, step_share_of
from pipeline.planning.resolve import resolve_planned_job
from pipeline.planning.speed import plan_speed
from pipeline.runtime.table import aligned

SHAPES = {
    "cuda": [
        (22, 2048, 32, 32_000, 2048, 8),
        (4, 4096, 32, 32_000, 2048, 8),
        (4, 2048, 16, 128_000, 2048, 8),
        (12, 1024, 16, 32_000, 4096, 4),
        (8, 3072, 24, 50_000, 1024, 8),
    ],
    "cpu": [
        (8, 512, 8, 8192, 512, 2),
        (4, 768, 12, 4096, 256, 4),
        (3, 512, 8, 32_000, 256, 4),
        (12, 384, 6, 2048, 512, 2),
        (2, 1024, 16, 8192, 128, 8),
    ],
}
"""By kind of device: `PLAN_SIZES` of each shape."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the two speeds and the steps."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    hardware = Hardware(
        name=name,
        peak_flops=None,
        matrix_flops=gpu.matrix_flops(device, _clock(device)),
        memory_bandwidth=copy_bandwidth(device),
        step_share=step_share_of(name),
    )
    shapes = [dict(zip(PLAN_SIZES, each, strict=True)) for each in options.shapes or SHAPES[device.type]]
    for shape in shapes:
        step.check_shape(argparse.Namespace(**shape))
    failed: dict[str, str] = {}
    compared = [attempted(_sizes(shape), failed, _compared, shape, hardware, options.rounds, failed) for shape in shapes]
    return {
        "device": hardware.name,
        "torch": torch.__version__,
        "matrix_flops": hardware.matrix_flops,
        "memory_bandwidth": hardware.memory_bandwidth,
        "shapes": [shape | found for shape, found in zip(shapes, compared, strict=True) if found is not None],
        "failed": failed,
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes: the median of ten."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    taken = [gpu.seconds(lambda: target.copy_(source), device, _clock(device)) for _ in range(13)][3:]
    return 2 * source.nbytes / statistics.median(taken)


def _clock(device: torch.device) -> Callable[[], float]:
    """The clock on a device; on a CPU this process's own."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def _compared(shape: dict[str, int], hardware: Hardware, rounds: int, failed: dict[str, str]) -> dict[str, Any]:
    """Seconds of a step: expected, by part, and measured."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = shape["rows"] * (gpu.WARM_UP_STEPS + rounds + 2)
        data = random_rows(Path(scratch), rows, shape["sequence_length"], shape["vocabulary"])
        run = step.build("selective", data, shape | {"threads": 0 if torch.cuda.is_available() else 1})
        try:
            take_step = TrainingSteps(run)
            for _ in range(gpu.WARM_UP_STEPS):
                take_step()
            measured = statistics.median(gpu.seconds(take_step, run.device, _clock(run.device)) for _ in range(rounds))
        finally:
            gpu.release_engines(_sizes(shape), run, failed)
        say(f"{_sizes(shape)}: {measured:.3f} s a step")

    # On a CPU, whose attention goes through a mask, every query meets every key.
    on_gpu, length = run.device.type == "cuda", shape["sequence_length"]
    job, _ = resolve_planned_job(run.settings, step.json_content(), 1, on_gpu, None)
    planned = plan_speed(job, hardware, length / (2 * NUM_DOCUMENTS) if on_gpu else length)
    return {
        "planned": planned.seconds,
        "parts": planned.parts,
        "measured": measured,
        "ratio": planned.seconds / measured,
    }


def table(figures: dict[str, Any]) -> str:
    """Return the expected and the measured seconds of a step by shape."""
    rows = [["layers, D, V, T, rows", "planned s", "measured s", "ratio", "parts of the plan"]]
    for each in figures["shapes"]:
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in each["parts"].items())
        rows.append([_sizes(each), f"{each['planned']:.3f}", f"{each['measured']:.3f}", f"{each['ratio']:.2f}", parts])
    return "\n".join(
        [
            f"{figures['device']}, torch {figures['torch']}: {figures['matrix_flops'] / 1e12:,.3f} TFLOP/s of products, "
            f"{figures['memory_bandwidth'] / 1e9:,.1f} GB/s of copies",
            *describe_failures(figures["failed"]),
            aligned(rows),
        ]
    )


def _sizes(shape: dict[str, Any]) -> str:
    return ", ".join(f"{shape[name]:,}" for name in PLAN_SIZES if name != "attention_heads")

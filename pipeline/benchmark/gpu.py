"""Measure what one GPU shows, in one process of a few minutes: the card's matrix speed, whole steps, and where their time goes.

    matrix speed  a square product in the dtype that training has; what MFU is also compared with
    step          selective beside next_token, at `--shapes`: tokens a second, MFU in useful FLOPs, time over FLOPs, peak
                  memory beside the memory plan
    phases        one step with the device waited for between its phases (`phase_clock` names them)
    profile       one step under torch's profiler: how often the host waited, and for how long the device was busy, of which
                  the idle share of an undisturbed step follows
    loss phase    `heads`' variants without processes of their own, in float32 without TF32 and on a GPU in bfloat16 too, in
                  which training has them

Steps run under `ds_configs/zero3.json`. Each figure is said as soon as it is known, and what fails, as for want of memory, is
said and leaves the rest. On a machine without a GPU `--shapes tiny` tries the command on its CPU, and leaves out what only a
device has.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.benchmark import heads, step
from pipeline.benchmark.attempts import attempted, describe_failures, say
from pipeline.benchmark.options import GPU_SHAPES
from pipeline.benchmark.phase_clock import PHASES, seconds_by_phase
from pipeline.benchmark.stepping import TrainingSteps
from pipeline.benchmark.streaming import NUM_DOCUMENTS, random_rows
from pipeline.benchmark.timing import medians
from pipeline.data.errors import DataError
from pipeline.flops import peak_flops
from pipeline.planning.plan import plan_memory
from pipeline.planning.resolve import resolve_planned_job
from pipeline.run import Run
from pipeline.runtime.engine import release
from pipeline.runtime.memory import current_bytes, peak_bytes, reset_peak
from pipeline.runtime.table import aligned

WARM_UP_STEPS = 4
"""Steps before any is measured: kernels are compiled and ZeRO-3 learns the order of modules."""
NO_PROFILE = {"idle_share": None, "waits": None}
LOSS_PHASES = ("plain", "two_pass", "predicted")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
MEASURED = "measured step"
"""The name in the profile of the step itself; what comes after it is the measurement's own."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, one after the other.

    Raises:
        DataError: there is no GPU for shapes that need one.
    """
    if not torch.cuda.is_available() and options.shapes != ["tiny"]:
        raise DataError(
            f"gpu measures a GPU, and torch {torch.__version__} sees none on this machine; run it where there is one, or add "
            "--shapes tiny to try the command on the CPU"
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shapes": {},
        "failed": {},
    }
    peak, failed = peak_flops(figures["device"]), figures["failed"]
    figures["matrix_flops"] = attempted("matrix speed", failed, matrix_flops, device)
    say(_describe_card(figures))
    for name in options.shapes:
        figures["shapes"][name] = attempted(name, failed, _measure_shape, name, options.rounds, peak, failed) or {}
    figures["loss_phase"] = _measure_loss_phases(device, options.rounds, failed)
    return figures


def matrix_flops(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a square product: the median of ten."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = [seconds(lambda: left @ right, device, clock) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(taken)


def _measure_shape(name: str, rounds: int, peak_flops: float | None, failed: dict[str, str]) -> dict[str, Any]:
    """Both variants at one shape, or the one that can be measured; the model of the one is freed before the other is built."""
    shape = GPU_SHAPES[name]
    options = shape | {"threads": 0}
    with tempfile.TemporaryDirectory() as scratch:
        rows = shape["rows"] * (WARM_UP_STEPS + rounds + 5)
        data = random_rows(Path(scratch), rows, shape["sequence_length"], shape["vocabulary"])
        found: dict[str, Any] = {}
        for variant in ("next_token", "selective"):
            title = f"{name} {variant}"
            own = attempted(title, failed, _measure_variant, title, variant, data, options, rounds, failed)
            if own is not None:
                found[variant] = own

    # Useful FLOPs: on CUDA a query meets the keys of its document up to itself, on a CPU all of the row.
    length = shape["sequence_length"]
    keys = length / (2 * NUM_DOCUMENTS) if torch.cuda.is_available() else length
    tokens = shape["rows"] * length
    flops = {variant: tokens * step.flops_a_token(variant, step.shape_of(options), keys) for variant in found}
    for variant, own in found.items():
        own["tokens_per_second"] = tokens / own["seconds"]
        own["flops_per_second"] = flops[variant] / own["seconds"]
        own["mfu"] = None if peak_flops is None else own["flops_per_second"] / peak_flops
    if len(found) < 2:
        return found
    selective, plain = found["selective"], found["next_token"]
    time_ratio, flop_ratio = selective["seconds"] / plain["seconds"], flops["selective"] / flops["next_token"]
    return found | {"time_ratio": time_ratio, "flop_ratio": flop_ratio, "time_over_flops": time_ratio / flop_ratio}


def _measure_variant(
    title: str, variant: str, data: Path, options: dict[str, int], rounds: int, failed: dict[str, str]
) -> dict[str, Any]:
    """One variant's step, and what else it shows; None in the place of what fails once the step is measured."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    before = current_bytes(device)
    run = step.build(variant, data, options)
    try:
        take_step = TrainingSteps(run)
        for _ in range(WARM_UP_STEPS):
            take_step()
        reset_peak(run.device)
        taken = [seconds(take_step, run.device) for _ in range(rounds)]
        own: dict[str, Any] = {
            "seconds": statistics.median(taken),
            "all_seconds": taken,
            "peak_bytes": peak_bytes(run.device) - before,
        }
        say(f"{title}: {own['seconds']:.3f} s a step")

        own["planned_bytes"] = attempted(f"{title} plan", failed, _planned_bytes, run)
        own |= attempted(f"{title} profile", failed, _profiled, take_step, run.device, own["seconds"]) or NO_PROFILE
        own["phases"] = attempted(f"{title} phases", failed, seconds_by_phase, take_step)
        return own
    finally:
        release_engines(title, run, failed)


def release_engines(title: str, run: Run, failed: dict[str, str]) -> None:
    """Free a run's engines. After an error that ends the device's context that fails too, and leaves what was measured."""
    for engine in filter(None, (run.engine, run.models.reference)):
        attempted(f"{title} release", failed, release, engine)


def _planned_bytes(run: Run) -> int:
    job, _ = resolve_planned_job(run.settings, step.json_content(), run.world.size, run.device.type == "cuda", None)
    return plan_memory(job).total


def _profiled(take_step: Callable[[], None], device: torch.device, undisturbed: float) -> dict[str, Any]:
    """The device's idle share of a step that takes `undisturbed` seconds, and the host's waits; None without a device, or where
    the profiler sees none (it may not be allowed to).

    The profiler slows the host, so the time is not taken from it.
    """
    if device.type != "cuda":
        return NO_PROFILE
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(MEASURED):
            take_step()
        torch.cuda.synchronize(device)
    events = profiler.events()
    busy = busy_seconds(events)
    idle_share = max(0.0, 1 - busy / undisturbed) if busy else None
    return {"idle_share": idle_share, "waits": waits_in_step(events)}


def busy_seconds(events: Iterable[Any]) -> float:
    """Seconds in which the device did anything, from a profile's events; streams that run beside each other count once.

    A `record_function` has a range on the device as well, which spans kernels and the gaps between them.
    """
    ranges = [each.time_range for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    busy, until = 0.0, -math.inf
    for each in sorted(ranges, key=lambda each: each.start):
        busy += max(0.0, each.end - max(each.start, until))
        until = max(until, each.end)
    return busy / 1e6


def waits_in_step(events: Sequence[Any]) -> int:
    """Count how often the host waited for the device within the step that is named `MEASURED`."""
    (step_range,) = (each.time_range for each in events if each.name == MEASURED and each.device_type == DeviceType.CPU)
    return sum(each.name in WAITS and step_range.start <= each.time_range.start <= step_range.end for each in events)


def _measure_loss_phases(device: torch.device, rounds: int, failed: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of each form of the loss phase, by dtype; on a CPU bfloat16 may be 80 times slower."""
    dtypes = [torch.float32] + [torch.bfloat16] * (device.type == "cuda")
    found: dict[str, dict[str, Any]] = {}
    for dtype, name in itertools.product(dtypes, LOSS_PHASES):
        dtype_name = str(dtype).removeprefix("torch.")
        title = f"loss phase {dtype_name} {name}"
        own = attempted(title, failed, _measure_loss_phase, name, dtype, device, rounds)
        if own is not None:
            found.setdefault(dtype_name, {})[name] = own
            say(f"{title}: {1e3 * own['seconds']:.1f} ms")
    return found


def _measure_loss_phase(name: str, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    tokens, dim, vocabulary = (4096, 2048, 32_000) if device.type == "cuda" else (256, 32, 512)
    one_round = heads.prepare(name, tokens, dim, vocabulary, step.HEADS, torch.get_num_threads(), dtype)
    answers = [one_round(number) for number in range(heads.WARM_UP_ROUNDS + rounds)]
    return medians(answers[heads.WARM_UP_ROUNDS :], ("seconds", "peak_bytes"))


def seconds(work: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of some work by a clock, the device's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def table(figures: dict[str, Any]) -> str:
    """Return all figures as tables."""
    lines = [_describe_card(figures), *describe_failures(figures["failed"])]
    rows = [["", "s a step", "tokens/s", "MFU", "of matrix speed", "idle", "waits", "peak GiB", "planned"]]
    times = [["seconds by phase", *PHASES]]
    for shape, found in figures["shapes"].items():
        for name in filter(found.__contains__, ("next_token", "selective")):
            own, title = found[name], f"{shape} {name}"
            rows.append([title, *_step_cells(own, figures["matrix_flops"])])
            if own["phases"] is not None:
                times.append([title, *(f"{own['phases'].get(phase, 0):.3f}" for phase in PHASES)])
        if "time_ratio" in found:
            lines.append(
                f"{shape}: selective takes {found['time_ratio']:.2f} of next_token's time, {found['flop_ratio']:.2f} of its "
                f"FLOPs: {found['time_over_flops']:.3f}"
            )
    losses = [["loss phase", "ms", "peak MiB"]]
    losses += [
        [f"{dtype} {name}", f"{1e3 * own['seconds']:.1f}", f"{own['peak_bytes'] / 2**20:,.0f}"]
        for dtype, of_dtype in figures["loss_phase"].items()
        for name, own in of_dtype.items()
    ]
    return "\n".join([*lines, aligned(rows), "", aligned(times), "", aligned(losses)])


def _describe_card(figures: dict[str, Any]) -> str:
    flops = figures["matrix_flops"]
    speed = "not measured" if flops is None else f"{flops / 1e12:,.2f} TFLOP/s"
    return f"{figures['device']}, torch {figures['torch']}: matrix product {speed}"


def _step_cells(own: dict[str, Any], matrix_flops: float | None) -> list[str]:
    """A step's figures as the cells of a row, `-` for what was not measured."""
    planned = own["planned_bytes"]
    return [
        f"{own['seconds']:.3f}",
        f"{own['tokens_per_second']:,.0f}",
        _percent(own["mfu"]),
        _percent(None if matrix_flops is None else own["flops_per_second"] / matrix_flops),
        _percent(own["idle_share"]),
        "-" if own["waits"] is None else str(own["waits"]),
        f"{own['peak_bytes'] / 2**30:.2f}",
        "-" if planned is None else f"{planned / 2**30:.2f}",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

"""Measure what one GPU shows, in one process of a few minutes: the card's matrix speed, whole steps, and where their time goes.

    matrix speed  a square product in the dtype that training has; what MFU is also compared with
    step          selective beside next_token, at `--shapes`: tokens a second, MFU in useful FLOPs, time over FLOPs, peak
                  memory beside the memory plan
    phases        one step with the device waited for between its phases: reference, blocks, loss and selection, backward,
                  optimizer, and the rest, data among it
    profile       one step under torch's profiler: how often the host waited, and for how long the device was busy, of which
                  the idle share of an undisturbed step follows
    loss phase    `heads`' variants in float32 without TF32, without processes of their own

Each figure is said as soon as it is known, and what fails, as for want of memory, is said and leaves the rest. On a machine
without a GPU `--shapes tiny` tries the command on its CPU, and leaves out what only a device has.
"""

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.benchmark import heads, step
from pipeline.benchmark.options import GPU_SHAPES
from pipeline.benchmark.phase_clock import PhaseClock
from pipeline.benchmark.streaming import NUM_DOCUMENTS, random_rows
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
LOSS_PHASES = ("plain", "two_pass", "predicted")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
MEASURED = "measured step"
"""The name in the profile of the step itself; what comes after it is the measurement's own."""
CONTENT = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}


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
        "matrix_flops": matrix_flops(device),
        "shapes": {},
        "failed": {},
    }
    peak, failed = peak_flops(figures["device"]), figures["failed"]
    for name in options.shapes:
        figures["shapes"][name] = attempted(name, failed, _measure_shape, name, options.rounds, peak, failed) or {}
    figures["loss_phase"] = attempted("loss phase", failed, _measure_loss_phase, device, options) or {}
    return figures


def attempted(name: str, failed: dict[str, str], work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | None:
    """Return what `work` returns; None, with the reason in `failed` and the traceback said, where it fails."""
    try:
        return work(*arguments)
    except Exception as error:
        traceback.print_exc()
        failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # Once the exception is gone, what it held can go.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


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
            own = attempted(f"{name} {variant}", failed, _measure_variant, variant, data, options, rounds)
            if own is not None:
                found[variant] = own
                print(f"{name} {variant}: {own['seconds']:.3f} s a step", file=sys.stderr, flush=True)

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


def _measure_variant(variant: str, data: Path, options: dict[str, int], rounds: int) -> dict[str, Any]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    before = current_bytes(device)
    run = step.build(variant, data, options)
    try:
        take_step = step.training_steps(run)
        for _ in range(WARM_UP_STEPS):
            take_step()
        reset_peak(run.device)
        taken = [seconds(take_step, run.device) for _ in range(rounds)]
        return {
            "seconds": statistics.median(taken),
            "all_seconds": taken,
            "peak_bytes": peak_bytes(run.device) - before,
            "planned_bytes": _planned_bytes(run),
            **_profiled(take_step, run.device, statistics.median(taken)),
            "phases": _phases(run, take_step),
        }
    finally:
        for engine in filter(None, (run.engine, run.models.reference)):
            release(engine)


def _planned_bytes(run: Run) -> int:
    job, _ = resolve_planned_job(run.settings, CONTENT, run.world.size, run.device.type == "cuda", None)
    return plan_memory(job).total


def _profiled(take_step: Callable[[], None], device: torch.device, undisturbed: float) -> dict[str, Any]:
    """The device's idle share of a step that takes `undisturbed` seconds, and the host's waits; None without a device, or where
    the profiler sees none (it may not be allowed to).

    The profiler slows the host, so the time is not taken from it.
    """
    if device.type != "cuda":
        return {"idle_share": None, "waits": None}
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


def _phases(run: Run, take_step: Callable[[], None]) -> dict[str, float]:
    """Seconds of a step by phase. What belongs to no phase, data among it, is `other`."""
    clock = PhaseClock(run.device)
    policy, reference = run.engine, run.models.reference
    hooked: list[tuple[str, Any]] = [("blocks", policy), ("loss", policy.module.unembed)]
    hooked += [] if reference is None else [("reference", reference)]
    handles = []
    for name, module in hooked:
        handles.append(module.register_forward_pre_hook(clock.entering(name)))
        handles.append(module.register_forward_hook(clock.leaving))
    calls = {"backward": policy.backward, "step": policy.step}
    policy.backward, policy.step = clock.around("backward", policy.backward), clock.around("optimizer", policy.step)
    clock.enter("other")
    take_step()
    clock.leave()
    for handle in handles:
        handle.remove()
    policy.backward, policy.step = calls["backward"], calls["step"]
    return dict(clock.seconds)


def _measure_loss_phase(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each form of the loss phase, in turn."""
    tokens, dim, vocabulary = (4096, 2048, 32_000) if device.type == "cuda" else (256, 32, 512)
    threads = torch.get_num_threads()
    rounds_of = {name: heads.prepare(name, tokens, dim, vocabulary, step.HEADS, threads) for name in LOSS_PHASES}
    found: dict[str, Any] = {}
    for name, one_round in rounds_of.items():
        answers = [one_round(number) for number in range(heads.WARM_UP_ROUNDS + options.rounds)][heads.WARM_UP_ROUNDS :]
        found[name] = {key: statistics.median(each[key] for each in answers) for key in ("seconds", "peak_bytes")}
    return found


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
    lines = [f"{figures['device']}, torch {figures['torch']}: matrix product {figures['matrix_flops'] / 1e12:,.2f} TFLOP/s"]
    rows = [["", "s a step", "tokens/s", "MFU", "of matrix speed", "idle", "waits", "peak GiB", "planned"]]
    phases = ["reference", "blocks", "loss", "backward", "optimizer", "other"]
    times = [["seconds by phase", *phases]]
    lines += [f"{name} was not measured: {reason}" for name, reason in figures["failed"].items()]
    for shape, found in figures["shapes"].items():
        for name in filter(found.__contains__, ("next_token", "selective")):
            own = found[name]
            rows.append(
                [
                    f"{shape} {name}",
                    f"{own['seconds']:.3f}",
                    f"{own['tokens_per_second']:,.0f}",
                    _percent(own["mfu"]),
                    _percent(own["flops_per_second"] / figures["matrix_flops"]),
                    _percent(own["idle_share"]),
                    "-" if own["waits"] is None else str(own["waits"]),
                    f"{own['peak_bytes'] / 2**30:.2f}",
                    f"{own['planned_bytes'] / 2**30:.2f}",
                ]
            )
            times.append([f"{shape} {name}", *(f"{own['phases'].get(phase, 0):.3f}" for phase in phases)])
        if "time_ratio" not in found:
            continue
        lines.append(
            f"{shape}: selective takes {found['time_ratio']:.2f} of next_token's time, {found['flop_ratio']:.2f} of its FLOPs: "
            f"{found['time_over_flops']:.3f}"
        )
    losses = [["loss phase, float32", "ms", "peak MiB"]]
    losses += [
        [name, f"{1e3 * own['seconds']:.1f}", f"{own['peak_bytes'] / 2**20:,.0f}"]
        for name, own in figures["loss_phase"].items()
    ]
    return "\n".join([*lines, aligned(rows), "", aligned(times), "", aligned(losses)])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"

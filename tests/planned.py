"""What a job needs of a device's memory, beside what was planned: real engines and steps of `train`, on random rows.

A first job of a few values has a process load what libraries load at first use; what is measured comes after it, above what was
in use by then.
"""

import ctypes
import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.config import Settings

SHAPE = {"dim": 256, "num_layers": 4, "num_attention_heads": 4, "vocab_size": 8192}
TINY = {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


class Job(NamedTuple):
    """deepspeed: the JSON's content. reference: `replicate`, `zero3`, `cached`, or None for no comparison. micro_steps: A."""

    deepspeed: dict[str, Any]
    reference: str | None = None
    micro_steps: int = 1
    model: dict[str, Any] = SHAPE
    rows: int = 4
    tokens: int = 256
    training: dict[str, Any] = {}  # noqa: RUF012 (a default that nobody changes)


class Measured(NamedTuple):
    """Bytes. left: what is still in use when the job is over and everything given back."""

    planned: int
    peak: int
    left: int


def plan_and_measure_each(jobs: dict[str, Job], device: str) -> dict[str, Measured]:
    """On every rank of a process group, one job after the other."""
    from pipeline.runtime.engine import initialize_distributed

    initialize_distributed(torch.device(device), "error")
    _run(tiny(next(iter(jobs.values()))), torch.device(device))
    in_bf16 = [job for job in jobs.values() if job.deepspeed.get("bf16", {}).get("enabled") is True]
    for job in in_bf16[:1] + in_bf16:
        # What a CPU's kernels load and keep for bf16 depends on the shapes, which a tiny job does not bring. It comes by and
        # by: 18, 5, 3 and 2 MB with the first, second, third and fourth job of the same shapes, and hardly more later.
        _run(job, torch.device(device))
    return {name: plan_and_measure(job, torch.device(device)) for name, job in jobs.items()}


def plan_and_measure(job: Job, device: torch.device) -> Measured:
    """The plan of a job, and the peak of building it and of two steps, from the second of which on an optimiser has its
    states."""
    from pipeline.planning.plan import plan_memory
    from pipeline.planning.resolve import resolve_planned_job
    from pipeline.runtime.memory import current_bytes, peak_bytes, reset_peak

    gc.collect()
    in_use_before, before = in_use(device), current_bytes(device)
    reset_peak(device)
    _run(job, device)
    peak = peak_bytes(device)
    gc.collect()
    on_gpu = device.type == "cuda"
    resolved, notes = resolve_planned_job(settings_of(job), job.deepspeed, dist.get_world_size(), on_gpu, None)
    assert notes == []
    plan = plan_memory(resolved)
    planned = plan.total + (plan.host_total if device.type == "cpu" else 0)
    return Measured(planned, peak - before, in_use(device) - in_use_before)


def in_use(device: torch.device) -> int:
    """Bytes in use now; on a CPU anonymous memory alone, because pages of libraries become resident when first run, and without
    the freed blocks that glibc keeps."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    return resident_anonymous()


def resident_anonymous() -> int:
    """Bytes of anonymous memory that this process has touched."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def tiny(job: Job) -> Job:
    """The same in everything but its sizes."""
    return job._replace(model=TINY, rows=1, tokens=16)


def settings_of(job: Job) -> Settings:
    comparison: dict[str, Any] = {
        None: {},
        "cached": {"cached": Path("losses")},
    }.get(job.reference, {"training_steps": 1, "training_data": Path("data"), "sharding": job.reference})
    rows = {"micro_batch": job.rows, "global_batch": job.rows * job.micro_steps * dist.get_world_size()}
    return Settings.model_validate(
        {
            "data": {"path": Path("data"), "sequence_length": job.tokens, **rows},
            "model": job.model,
            "reference": comparison,
            "training": job.training | ({"k_percent": 1.0} if job.reference is None else {}),
        }
    )


def _run(job: Job, device: torch.device) -> None:
    from pipeline.derived import reference_shape
    from pipeline.progress import Progress
    from pipeline.runtime.deepspeed_json import resolve_deepspeed_json
    from pipeline.runtime.engine import build_policy, build_reference, release
    from pipeline.train import advance, fetch_step, train_step
    from tests.stepping import run_of

    settings = settings_of(job)
    config = resolve_deepspeed_json(job.deepspeed, settings, dist.get_world_size())
    engine = build_policy(settings, config)
    shape = reference_shape(settings, include_untrained=True)
    reference = None if shape is None else build_reference(shape, None, settings.reference.sharding, config)
    run = run_of(settings, engine, reference, job.micro_steps, device)
    progress = Progress()
    for step in range(2):
        batches = iter(_batches(job, seed=10 * step + dist.get_rank()))
        result = train_step(run, fetch_step(run, batches, progress.step, progress.samples), progress)
        advance(progress, result, settings)
        assert result.applied
    for each in filter(None, (engine, reference)):
        release(each)


def _batches(job: Job, seed: int) -> list[Any]:
    from tests.rows import batch_of

    batches = []
    for number in range(job.micro_steps):
        batch = batch_of([[job.tokens]] * job.rows, job.tokens, job.model["vocab_size"], seed=100 * seed + number)
        losses_BTC = torch.rand(job.rows, job.tokens, 1) + 8 if job.reference == "cached" else None
        batches.append(replace(batch, reference_losses_BTC=losses_BTC))
    return batches

"""The dry run of a job: build everything, make two steps, and report memory, token budget and time. It writes nothing but
built-in data.

Its peak and the memory plan are in the same terms, so that a difference is the plan's fault. The plan counts tensors. On CUDA
so does the allocator. On a CPU the process's resident memory is measured, which grows with all that libraries load at first
use, tens of MiB; so a job of a few values runs before, and what is resident then is left out. Two steps are made because the
optimizer has its states from the second on.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.assembly import Job, build_run
from pipeline.config import ModelSettings, Settings
from pipeline.job import say, with_builtin_data
from pipeline.planning.plan import plan_memory
from pipeline.planning.report import summary
from pipeline.planning.resolve import resolve_planned_job
from pipeline.progress import Progress
from pipeline.run import Run, StepResult
from pipeline.runtime.distributed import max_over_ranks
from pipeline.runtime.engine import release
from pipeline.runtime.memory import current_bytes, give_back_freed, peak_bytes, reset_peak, total_bytes
from pipeline.runtime.parameters import num_parameters
from pipeline.train import advance, fetch_step, train_step


def dry_run(job: Job) -> int:
    """Build everything, make two steps, report; returns the exit code. Collective."""
    settings = with_builtin_data(job)
    if job.device.type == "cpu":
        _load_libraries(job, settings)
    before = current_bytes(job.device)

    # Two steps, the second of which is measured.
    run = build_run(job, settings, job.run_dir, dry=True)
    reset_peak(job.device)
    progress, batches = Progress(), run.stream.iterate(0)
    started = time.perf_counter()
    _step(run, batches, progress)
    between = time.perf_counter()
    result = _step(run, batches, progress)
    seconds = (between - started, time.perf_counter() - between)
    peak = max_over_ranks(peak_bytes(job.device) - before, job.device)

    say(job, "\n  ".join(_report(job, run, result, peak, seconds)))
    return 0


def _step(run: Run, batches: Iterator[Any], progress: Progress) -> StepResult:
    result = train_step(run, fetch_step(run, batches, progress.step, progress.samples), progress)
    advance(progress, result, run.settings)
    return result


def _load_libraries(job: Job, settings: Settings) -> None:
    """Have libraries load what these settings need, by two steps of a model of a few values, and free what that took."""
    with_reference = any((settings.reference.path, settings.reference.cached, settings.reference.training_steps))
    horizon = "own" if settings.reference.horizon == "own" else "shifted"
    shape = {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": None, "head_dim": None}
    tiny = settings.with_values(
        data={"num_workers": 0, "validation_path": None},
        model=shape | {"ffn_dim": None, "pretrained": None},
        reference={"path": None, "cached": None, "horizon": horizon, "training_steps": 1 if with_reference else None},
    )
    run = build_run(job, tiny, job.run_dir, dry=True)
    progress, batches = Progress(), run.stream.iterate(0)
    for _ in range(2):
        _step(run, batches, progress)
    for engine in filter(None, (run.engine, run.models.reference)):
        release(engine)
    del run, batches
    give_back_freed()


def _report(job: Job, run: Run, result: StepResult, peak: float, seconds: tuple[float, float]) -> list[str]:
    """The lines of the report. Collective.

    peak: bytes of the fullest rank. seconds: of both steps.
    """
    record = result.sums.record(result.counts.scale_H, run.stream.manifest.source_names or ("",), run.models.group)
    planned, _ = resolve_planned_job(run.settings, job.deepspeed, job.world.size, job.device.type == "cuda", total_bytes())
    steps, data = run.settings.training.steps, run.settings.data
    tokens, epoch = result.consumed.tokens, run.stream.manifest.num_tokens
    return [
        f"dry run: two steps on {job.world.size} rank(s), loss {math.nan if record['loss'] is None else record['loss']:.4f}",
        f"parameters                {num_parameters(run.settings.model):,} of the policy",
        f"reference                 {_reference_of(run, planned.reference)}",
        f"a step                    {data.global_batch} rows = {run.stream.micro_steps} micro-step(s) × "
        f"{job.world.size} rank(s) × {data.rows_per_rank} rows",
        f"peak memory of a step     {peak / 2**20:,.1f} MiB on the fullest rank ({_memory_source(job.device)})",
        f"memory plan               {summary(plan_memory(planned))}; what libraries take is in neither",
        f"token budget              {steps} steps × {tokens:,} tokens = {steps * tokens:,} tokens, "
        f"{steps * tokens / epoch:.2f} epochs of {epoch:,}",
        f"time                      {seconds[1]:.1f} s a step, {seconds[0]:.1f} s for the first",
    ]


def _reference_of(run: Run, shape: ModelSettings | None) -> str:
    """Describe the reference for a dry run. shape: the live one's; None without it."""
    if shape is None and run.settings.reference.horizon == "own":
        return "the policy's own head 0"
    if shape is None:
        return "none" if run.settings.reference.cached is None else f"cached losses in {run.settings.reference.cached}"
    size = f"{num_parameters(shape):,} parameters"
    if run.settings.reference.path is None:
        return f"{size} of random weights, a stand-in: the reference is yet to be trained, so losses and selection mean nothing"
    return f"{size}, {run.settings.reference.path}"


def _memory_source(device: torch.device) -> str:
    return "the allocator's peak" if device.type == "cuda" else "resident memory, less what it was before the models were built"

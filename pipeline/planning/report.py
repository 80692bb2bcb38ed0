"""Format a plan: a table for the terminal, a JSON document for programs."""

from typing import Any

from pipeline.planning.advice import MARGIN, savings, usable_bytes, verdict
from pipeline.planning.hardware import Hardware
from pipeline.planning.plan import PARTS, Plan, plan_memory
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.speed_report import speed_document, speed_lines
from pipeline.runtime.table import aligned


def summary(plan: Plan) -> str:
    """Format a plan as one line."""
    host = f", {_sized(plan.host_total)} of host memory" if plan.host else ""
    copies = f"; {_sized(plan.checkpoint_copies)} of host memory more to save checkpoints in the background"
    return f"{_sized(plan.total)} a rank, highest in {plan.peak_moment}{host}{copies}"


def document(job: PlannedJob, device_bytes: float | None, notes: list[str], hardware: Hardware | None = None) -> dict[str, Any]:
    """The plan and its verdict as JSON values, sizes in bytes; `table` prints the same.

    Args:
        device_bytes: memory of a rank's device; None if unknown.
        hardware: what the expected speed is computed from; None if unknown.
        notes: assumptions that were made, one sentence each.
    """
    plan = plan_memory(job)

    return {
        # The job.
        "gpus": job.num_ranks,
        "stage": job.stage,
        "precision": "bfloat16" if job.dtype_bytes == 2 else "float32",
        "device": "cuda" if job.on_gpu else "cpu",
        "parameters": job.num_parameters,
        "micro_steps": job.micro_steps,
        # Its plan.
        "at_rest": plan.at_rest,
        "peak": plan.peak,
        "peak_moment": plan.peak_moment,
        "moments": {moment: sum(parts.values()) for moment, parts in plan.moments.items()},
        "total": plan.total,
        "host": plan.host | {"checkpoint copies": plan.checkpoint_copies},
        # The verdict, if the device's memory is known.
        "device_memory": device_bytes,
        "left_aside": None if device_bytes is None else device_bytes - usable_bytes(job, device_bytes),
        "verdict": None if device_bytes is None else verdict(plan, usable_bytes(job, device_bytes)),
        "changes": [saving._asdict() for saving in savings(job)],
        "speed": None if hardware is None else speed_document(job, hardware),
        "notes": notes,
    }


def table(figures: dict[str, Any]) -> str:
    """Format the result of `document` for the terminal."""
    # One row per part, one column per place and time.
    columns = {"between steps": figures["at_rest"], "at the peak": figures["peak"]}
    columns |= {"on the host": figures["host"]}
    rows = [["GiB a rank", *columns]]
    for part in PARTS:
        if any(part in column for column in columns.values()):
            rows.append([part, *(_gib(column.get(part, 0)) for column in columns.values())])
    rows.append(["total", *(_gib(sum(column.values())) for column in columns.values())])

    lines = [
        f"{figures['parameters'] / 1e9:,.3f} billion parameters in {figures['precision']} on {figures['gpus']} "
        f"{'GPU' if figures['device'] == 'cuda' else 'CPU rank'}{'s' if figures['gpus'] > 1 else ''}, ZeRO stage "
        f"{figures['stage']}, {figures['micro_steps']} micro-step{'s' if figures['micro_steps'] > 1 else ''} a step",
        "",
        aligned(rows),
        "",
        f"The peak is in {figures['peak_moment']}. The plan leaves out what CUDA, NCCL and fragmentation take "
        "(1.5 to 3 GB of a GPU are common).",
        *figures["notes"],
    ]
    speed = [] if figures["speed"] is None else ["", *speed_lines(figures["speed"], figures["gpus"])]
    return "\n".join([*lines, *_judgement(figures), *speed])


def _judgement(figures: dict[str, Any]) -> list[str]:
    """Lines that say whether the plan fits and, if not, what each setting would save."""
    memory = figures["device_memory"]
    if memory is None:
        return ["How much memory a device has is not known here: --device-memory GiB says whether this fits."]
    aside = (
        f" {_sized(figures['left_aside'])} of it are left aside for what the plan leaves out." if figures["left_aside"] else ""
    )

    verdict_line = {
        "fits": f"It fits {_sized(memory)}, with {MARGIN:.0%} to spare.",
        "close": f"It may fit {_sized(memory)}, with less than the {MARGIN:.0%} to spare by which a plan can be wrong.",
        "does not fit": f"It does not fit {_sized(memory)}.",
    }[figures["verdict"]] + aside
    if figures["verdict"] == "fits":
        return [verdict_line]

    # Unless it fits for certain, list the settings that would save memory.
    table_of_savings = [
        [change["setting"], f"{_gib(figures['total'] - change['total'])} GiB less", f"{_gib(change['total'])} GiB"]
        for change in figures["changes"]
    ]
    if not table_of_savings:
        return [verdict_line, "No setting known here makes it smaller."]
    return [verdict_line, "Each of these by itself:", aligned(table_of_savings)]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f}"


def _sized(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"

"""Format the expected speed of a job: a JSON document, and lines for the terminal."""

from dataclasses import asdict
from typing import Any

from pipeline.planning.hardware import Hardware
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.speed import plan_speed
from pipeline.planning.speed_advice import gains
from pipeline.runtime.table import aligned


def speed_document(job: PlannedJob, hardware: Hardware) -> dict[str, Any]:
    """The expected speed and what would raise it, as JSON values: seconds, bytes, FLOPs and tokens a second."""
    speed = plan_speed(job, hardware)
    return {
        "hardware": asdict(hardware),
        "step_seconds": speed.seconds,
        "parts": speed.parts,
        "hidden_traffic": speed.hidden,
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
        "changes": [gain._asdict() for gain in gains(job, hardware)],
    }


def speed_lines(figures: dict[str, Any], gpus: int) -> list[str]:
    """Format the result of `speed_document`."""
    hardware, now = figures["hardware"], figures["tokens_per_second"]
    mfu = "" if figures["mfu"] is None else f", {figures['mfu']:.1%} MFU"
    seconds = figures["step_seconds"]
    lines = [
        f"Expected: {now:,.0f} tokens/s, {now / gpus:,.0f} a rank{mfu}, {seconds:.3f} s a step: "
        + ", ".join(f"{name} {part / seconds:.0%}" for name, part in figures["parts"].items())
        + (f" ({figures['hidden_traffic']:.3f} s of traffic hidden behind computation)." if gpus > 1 else "."),
        f"From {hardware['name']}: products {hardware['matrix_flops'] / 1e12:,.3g} TFLOP/s"
        + (f" ({hardware['step_share']:.0%} of it in a step)" if hardware["step_share"] != 1 else "")
        + ", memory "
        f"{hardware['memory_bandwidth'] / 1e9:,.0f} GB/s, {hardware['node_ranks']} ranks a node at "
        f"{hardware['node_bandwidth'] / 1e9:,.0f} GB/s each, {hardware['network_bandwidth'] / 1e9:,.0f} GB/s a rank "
        "between nodes.",
    ]
    if figures["changes"]:
        rows = [
            [
                each["setting"],
                f"{each['tokens_per_second'] / now - 1:+.0%}",
                f"{each['total'] / 2**30:,.2f} GiB a rank",
            ]
            for each in figures["changes"]
        ]
        lines += ["Faster, each of these by itself:", aligned(rows)]
    return lines

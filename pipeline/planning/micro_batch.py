"""Resolve `data.micro_batch: auto`: the largest micro-batch that divides a rank's lanes and whose memory plan fits the device.

It is a function of the settings, the ranks and the devices' whole memory, not of what happens to be free: a job that is started
again on the same machines has the same micro-batch, and with it the same pools and the same bits.
"""

from typing import Any

from pipeline.checks import vocabulary_of
from pipeline.config import ConfigError, Settings
from pipeline.data.loading.sizes import divisors
from pipeline.derived import lanes_of
from pipeline.planning.advice import usable_bytes, verdict
from pipeline.planning.plan import plan_memory
from pipeline.planning.resolve import resolve_planned_job


def with_micro_batch(
    settings: Settings, content: dict[str, Any], num_ranks: int, on_gpu: bool, device_bytes: float | None
) -> Settings:
    """Return the settings with a number for `data.micro_batch`; as they are if it is one.

    Args:
        settings: their sizes are checked: the ranks divide the lanes.
        content: the DeepSpeed JSON as given.
        device_bytes: memory that a rank may use, equal on all ranks; None if unknown: then the largest that divides.
    """
    if settings.data.micro_batch != "auto":
        return settings
    vocab_size, unreadable = vocabulary_of(settings)
    if vocab_size is None:
        raise ConfigError(
            [f"data.micro_batch: auto needs the vocabulary, which the data does not tell ({'; '.join(unreadable)})"]
        )
    sized = settings.with_values(model={"vocab_size": vocab_size})

    # Less memory with every smaller micro-batch; if none fits, one row at a time comes closest.
    candidates = divisors(lanes_of(settings) // num_ranks)[::-1]
    for rows in candidates:
        tried = sized.with_values(data={"micro_batch": rows})
        if device_bytes is None or rows == 1 or _fits(tried, content, num_ranks, on_gpu, device_bytes):
            break
    return settings.with_values(data={"micro_batch": rows})


def _fits(settings: Settings, content: dict[str, Any], num_ranks: int, on_gpu: bool, device_bytes: float) -> bool:
    job, _ = resolve_planned_job(settings, content, num_ranks, on_gpu, device_bytes)
    return verdict(plan_memory(job), usable_bytes(job, device_bytes)) == "fits"

"""The memory plan against the peak of a device's allocator, in bf16 with float32 losses."""

import json
from pathlib import Path

import pytest

from tests.gpu.test_device import on_cuda
from tests.planned import Job, plan_and_measure_each
from tests.ranks import run_ranks

ZERO3 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
SHAPE = {"dim": 1024, "num_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32_000}
JOBS = {
    kind: Job(ZERO3, "replicate", model=SHAPE, rows=8, tokens=1024, training={"activation_checkpointing": kind})
    for kind in ("none", "selective", "full")
}


@on_cuda
def test_the_plan_is_within_15_percent_of_the_devices_peak() -> None:
    (measured,) = run_ranks(plan_and_measure_each, 1, JOBS, "cuda")
    for name, found in measured.items():
        assert found.planned == pytest.approx(found.peak, rel=0.15), name

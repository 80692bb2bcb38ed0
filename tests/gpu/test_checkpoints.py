"""Checkpoints of engines on a device: pinned buffers, the fused optimizer's states, offloading."""

from pathlib import Path

import pytest

from tests.checkpointing import SHAPE, Layout, trained
from tests.gpu.test_device import on_cuda

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
# Flash attention wants heads of at least 8.
LAYOUT = Layout(1, bf16=True, device="cuda", model=SHAPE | {"dim": 32})
LAYOUTS = {
    "stage 1": LAYOUT._replace(stage=1),
    "stage 2": LAYOUT._replace(stage=2),
    "stage 3": LAYOUT,
    "offloaded": LAYOUT._replace(zero=OFFLOAD),
}


@on_cuda
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_device_continues_from_what_it_saved_and_from_what_others_did(tmp_path: Path, name: str) -> None:
    first = trained(LAYOUTS[name], tmp_path, 0, 3, save=True)
    continued = trained(LAYOUTS[name], tmp_path, 3, 3)
    assert continued.before == first.after
    assert continued.after == pytest.approx(trained(LAYOUTS[name], tmp_path / "whole", 0, 6).after, rel=0.02)
    for other in LAYOUTS:
        found = trained(LAYOUTS[other], tmp_path, 3, 3)
        assert found.before == first.after, other
        assert found.after == pytest.approx(continued.after, rel=0.02), other

"""Checkpoints of engines on a device: pinned buffers, the fused optimizer's states, offloading."""

from pathlib import Path

import pytest

from tests.checkpointing import SHAPE, Figures, Layout, train_on
from tests.gpu.test_device import on_cuda
from tests.ranks import run_ranks

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
# Flash attention wants heads of at least 8.
LAYOUT = Layout(1, bf16=True, device="cuda", model=SHAPE | {"dim": 32})
LAYOUTS = {
    "stage 1": LAYOUT._replace(stage=1),
    "stage 2": LAYOUT._replace(stage=2),
    "stage 3": LAYOUT,
    "offloaded": LAYOUT._replace(zero=OFFLOAD),
}


def saved_and_continued_by_each(run_dir: Path) -> dict[str, dict[str, tuple[Figures, Figures]]]:
    """{layout: {layout that continues: (first, continued)}}, all in one process: a start takes longer than all of them."""
    found: dict[str, dict[str, tuple[Figures, Figures]]] = {}
    for name, layout in LAYOUTS.items():
        first = train_on(layout, run_dir / name, 0, 3, True)
        found[name] = {other: (first, train_on(LAYOUTS[other], run_dir / name, 3, 2, False)) for other in LAYOUTS}
    return found


@on_cuda
def test_a_device_continues_from_what_it_saved_and_from_what_other_layouts_did(tmp_path: Path) -> None:
    (found,) = run_ranks(saved_and_continued_by_each, 1, tmp_path)
    for name, by_layout in found.items():
        for other, (first, continued) in by_layout.items():
            assert continued.before == first.after, (name, other)
            assert continued.after == pytest.approx(by_layout[name][1].after, rel=0.02), (name, other)

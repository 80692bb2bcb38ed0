"""`launch/benchmark.py gpu` where there is no GPU: the same command at sizes of no consequence, so that it runs on the day."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from pipeline.benchmark import gpu
from pipeline.benchmark.gpu import MEASURED, attempted, busy_seconds, table, waits_in_step
from pipeline.benchmark.phase_clock import PhaseClock
from tests.forked import run_script


def test_the_command_measures_steps_phases_and_memory_in_one_process(tmp_path: Path) -> None:
    done = run_script("benchmark.py", "gpu", "--shapes", "tiny", "--rounds", "1", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["matrix_flops"] > 1e8
    assert set(figures["loss_phase"]) == {"plain", "two_pass", "predicted"}
    tiny = figures["shapes"]["tiny"]
    assert 1 < tiny["flop_ratio"] < 4
    for name in ("next_token", "selective"):
        own = tiny[name]
        assert own["tokens_per_second"] == pytest.approx(64 / own["seconds"])
        assert own["planned_bytes"] > 0
        assert {"blocks", "loss", "backward", "optimizer", "other"} <= set(own["phases"])
        assert f"tiny {name}" in done.stdout
    assert figures["failed"] == {}
    assert f"tiny selective: {tiny['selective']['seconds']:.3f} s a step" in done.stderr
    assert tiny["selective"]["phases"]["reference"] > 0
    assert "reference" not in tiny["next_token"]["phases"]


def test_what_does_not_fit_the_device_is_said_and_leaves_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def work(size: int) -> dict[str, int]:
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return {"size": size}

    failed: dict[str, str] = {}
    assert attempted("large", failed, work, 2) is None
    assert attempted("small", failed, work, 1) == {"size": 1}
    assert failed == {"large": "OutOfMemoryError: CUDA out of memory."}
    assert "Traceback" in capsys.readouterr().err
    figures = {"device": "a card", "torch": "2.11", "matrix_flops": 1e12, "shapes": {}, "loss_phase": {}, "failed": failed}
    assert "large was not measured: OutOfMemoryError: CUDA out of memory." in table(figures)


def test_one_variant_is_kept_where_the_other_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"seconds": 0.5, "idle_share": None, "waits": None, "peak_bytes": 1, "planned_bytes": 1, "phases": {}}

    def work(variant: str, *_: object) -> dict[str, object]:
        if variant == "selective":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return dict(measured)

    monkeypatch.setattr(gpu, "_measure_variant", work)
    failed: dict[str, str] = {}
    found = gpu._measure_shape("tiny", 1, None, failed)
    assert (list(found), failed) == (["next_token"], {"tiny selective": "OutOfMemoryError: CUDA out of memory."})
    figures = {"device": "a card", "torch": "2.11", "matrix_flops": 1e12, "shapes": {"tiny": found}, "loss_phase": {}}
    assert "tiny next_token" in table(figures | {"failed": failed})


def test_the_time_of_nested_phases_goes_to_the_innermost() -> None:
    clock = PhaseClock(torch.device("cpu"))
    clock.enter("outer")
    clock.around("inner", time.sleep)(0.05)
    clock.enter("other")
    clock.leave()
    clock.leave()
    assert clock.seconds["inner"] >= 0.05
    assert clock.seconds["outer"] < clock.seconds["inner"]
    assert clock.open == []


def event(name: str, start: float, end: float, on_device: bool = False, is_user_annotation: bool = False) -> Any:
    """An event of torch's profiler, in microseconds."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=DeviceType.CUDA if on_device else DeviceType.CPU,
        is_user_annotation=is_user_annotation,
    )


def test_the_device_is_busy_in_kernels_alone_and_once_where_streams_overlap() -> None:
    events = [
        event("aten::mm", 0, 900),
        event("loss", 100, 900, on_device=True, is_user_annotation=True),
        event("kernel", 400, 500, on_device=True),
        event("kernel", 100, 300, on_device=True),
        event("copy", 250, 350, on_device=True),
        event("copy", 260, 270, on_device=True),
    ]
    assert busy_seconds(events) == pytest.approx(350e-6)


def test_waits_before_and_after_the_step_are_the_measurements_own() -> None:
    events = [
        event("cudaDeviceSynchronize", 0, 5),
        event(MEASURED, 10, 100),
        event(MEASURED, 12, 130, on_device=True, is_user_annotation=True),
        event("cudaStreamSynchronize", 20, 30),
        event("cudaMemcpyAsync", 40, 41),
        event("cudaEventSynchronize", 99, 120),
        event("cudaDeviceSynchronize", 125, 140),
    ]
    assert waits_in_step(events) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_command_says_so_at_once() -> None:
    done = run_script("benchmark.py", "gpu")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "sees none on this machine" in done.stderr
    assert "--shapes tiny" in done.stderr

"""`launch/benchmark.py gpu` where there is no GPU: the same command at sizes of no consequence, so that it runs on the day."""

import contextlib
import gc
import io
import itertools
import json
import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from pipeline import assembly
from pipeline.benchmark import gpu, heads, step
from pipeline.benchmark.attempts import attempted
from pipeline.benchmark.gpu import MEASURED, busy_seconds, table, waits_in_step
from pipeline.benchmark.options import GPU_SHAPES
from pipeline.benchmark.phase_clock import PHASES, PhaseClock
from pipeline.benchmark.streaming import random_rows
from tests.forked import ROOT, run_script
from tests.ranks import run_ranks


def test_the_command_measures_steps_phases_and_memory_in_one_process(tmp_path: Path) -> None:
    done = run_script("benchmark.py", "gpu", "--shapes", "tiny", "--rounds", "1", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["matrix_flops"] > 1e8
    assert set(figures["loss_phase"]["float32"]) == {"plain", "two_pass", "predicted"}
    tiny = figures["shapes"]["tiny"]
    assert 1 < tiny["flop_ratio"] < 4
    for name in ("next_token", "selective"):
        own = tiny[name]
        assert own["tokens_per_second"] == pytest.approx(64 / own["seconds"])
        assert own["planned_bytes"] > 0
        assert {"data", "blocks", "loss", "backward", "optimizer", "other"} <= set(own["phases"]) <= set(PHASES)
        assert f"tiny {name}" in done.stdout
    assert figures["failed"] == {}
    assert f"tiny selective: {tiny['selective']['seconds']:.3f} s a step" in done.stderr
    assert tiny["selective"]["phases"]["reference"] > 0
    assert "reference" not in tiny["next_token"]["phases"]
    # One head takes every pair, and exchanges nothing.
    assert tiny["selective"]["phases"]["exchange"] > 0
    assert "exchange" not in tiny["next_token"]["phases"]
    assert "loss phase float32 two_pass: " in done.stderr


def measure_what_fails_late(directory: Path) -> tuple[int, dict[str, Any], str]:
    """The command where all but the steps' seconds fails; its exit code, JSON and table."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("matrix_flops", "_planned_bytes", "_profiled", "seconds_by_phase", "release"):
            patch.setattr(gpu, name, fail)
        patch.setattr(heads, "_plain", fail)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = runpy.run_path(str(ROOT / "launch" / "benchmark.py"))["main"](
                ["gpu", "--shapes", "tiny", "--rounds", "1", "--json", str(directory / "gpu.json")]
            )
    return code, json.loads((directory / "gpu.json").read_text()), printed.getvalue()


def test_seconds_that_were_measured_outlive_whatever_fails_after_them_and_the_exit_code_tells(tmp_path: Path) -> None:
    ((code, figures, printed),) = run_ranks(measure_what_fails_late, 1, tmp_path)
    assert code == 1
    assert list(figures["loss_phase"]["float32"]) == ["two_pass", "predicted"]
    late = itertools.product(("next_token", "selective"), ("plan", "profile", "phases", "release"))
    failed = {f"tiny {variant} {part}" for variant, part in late} | {"matrix speed", "loss phase float32 plain"}
    assert set(figures["failed"]) == failed
    for variant in ("next_token", "selective"):
        own = figures["shapes"]["tiny"][variant]
        assert own["seconds"] > 0
        assert own["planned_bytes"] is own["phases"] is own["idle_share"] is None
        assert f"tiny {variant}    " in printed
    for name in figures["failed"]:
        assert f"{name} was not measured: RuntimeError: CUDA error: an illegal memory access was encountered\n" in printed


def bytes_alive() -> int:
    """Bytes of all tensors that anything refers to."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def build_twice(directory: Path) -> tuple[int, list[int]]:
    """The reduce bucket of the engine that is measured, and the bytes that live before and after a build that fails."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    options = {**GPU_SHAPES["tiny"], "dim": 128, "threads": 0}
    data = random_rows(directory, 4, options["sequence_length"], options["vocabulary"])
    run = step.build("selective", data, options)
    bucket = run.engine.zero_reduce_bucket_size()
    gpu.release_engines("tiny", run, {})
    del run

    alive = [bytes_alive()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "build_reference", fail)
        with pytest.raises(torch.OutOfMemoryError):
            step.build("selective", data, options)
    return bucket, [*alive, bytes_alive()]


def test_a_run_is_built_under_the_shipped_json_and_leaves_nothing_where_its_reference_fails(tmp_path: Path) -> None:
    ((bucket, (before, after)),) = run_ranks(build_twice, 1, tmp_path)
    # The matrices of attention alone take more.
    assert after - before < 100_000 < 5 * 4 * 4 * 128**2
    assert bucket == 2**22  # DeepSpeed's own is 5e8.


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

    def work(title: str, variant: str, *_: object) -> dict[str, object]:
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

"""What torch knows of the last collectives is kept at the end of a job, and nothing about it holds up the end."""

import faulthandler
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime import flight_recorder
from tests.forked import ROOT
from tests.ranks import run_ranks

HOLDS_PYTHON = """
import ctypes, sys
from pathlib import Path
from pipeline.runtime import flight_recorder
flight_recorder._SECONDS_FOR_EXIT = 1.0
flight_recorder._dump = lambda: lambda: ctypes.PyDLL(None).sleep(1000)
flight_recorder.write(Path(sys.argv[1]), 0, 0.5)
"""


def record_some(run_dir: Path) -> None:
    for _ in range(3):
        dist.all_reduce(torch.ones(5))
    flight_recorder.write(run_dir, dist.get_rank(), 60.0)
    faulthandler.cancel_dump_traceback_later()


def test_each_rank_leaves_its_last_collectives(tmp_path: Path) -> None:
    run_ranks(record_some, 2, tmp_path)
    files = sorted((tmp_path / "flight_recorder").iterdir())
    assert [file.name for file in files] == ["rank-00000.json", "rank-00001.json"]
    for file in files:
        entries = json.loads(file.read_bytes())["entries"]
        assert [entry["profiling_name"] for entry in entries[-3:]] == ["gloo:all_reduce"] * 3
        assert entries[-1]["input_sizes"] == [[5]]


def test_what_an_earlier_job_left_is_set_aside_once_another_begins(tmp_path: Path) -> None:
    flight_recorder.set_former_aside(tmp_path)
    for job in ("first", "second"):
        folder = tmp_path / "flight_recorder"
        folder.mkdir()
        (folder / f"{job}.json").touch()
        flight_recorder.set_former_aside(tmp_path)
        assert not folder.exists()
        assert [file.name for file in (tmp_path / "flight_recorder-before").iterdir()] == [f"{job}.json"]


def recording(monkeypatch: pytest.MonkeyPatch, dump: Callable[[], bytes]) -> None:
    """Have a recorder stand in for torch's, as NCCL's has to on a machine without a GPU."""
    monkeypatch.setattr(flight_recorder, "_dump", lambda: dump)


def test_nccls_recorder_is_asked_where_nccl_is_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    c10d = torch._C._distributed_c10d
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: b'{"entries": [7]}', raising=False)
    flight_recorder.write(tmp_path, 3, 60.0)
    faulthandler.cancel_dump_traceback_later()
    assert json.loads((tmp_path / "flight_recorder" / "rank-00003.json").read_bytes()) == {"entries": [7]}


def test_a_recorder_that_fails_or_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("no such thing")

    def hang() -> bytes:
        time.sleep(1000)
        return b""

    for dump in (fail, hang):
        recording(monkeypatch, dump)
        started = time.monotonic()
        flight_recorder.write(tmp_path, 0, 0.5)
        faulthandler.cancel_dump_traceback_later()
        assert time.monotonic() - started < 100
        assert not (tmp_path / "flight_recorder").exists()


def test_not_even_one_that_lets_no_other_thread_go_on(tmp_path: Path) -> None:
    """As torch's would whose lock is held by the collective that hangs."""
    command = [sys.executable, "-c", HOLDS_PYTHON, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01.500000)!" in done.stderr

"""Weights & Biases without a login: what is recorded offline, read back from its files."""

import contextlib
import io
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks import check_before_start
from pipeline.config import ConfigError, Settings
from pipeline.processes import find
from pipeline.recipe import read_settings
from pipeline.runtime.distributed import World
from pipeline.runtime.logbook import Logbook, read_records, trackers_of
from tests.ranks import run_ranks

SETTINGS = Settings().with_values(run={"name": "mine"}, logging={"wandb": {"project": "selective"}})


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    place, begun = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        part, place = content[place + 7 : place + 7 + size], place + 7 + size
        begun = part if kind in (1, 2) else begun + part
        if kind in (1, 4):
            yield begun


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The records in the offline files of a run directory, in the order of its starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in log_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                found.append({key: value for key, value in values.items() if not key.startswith("_")})
    return found


def test_records_are_kept_offline_under_their_names_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 2):
        logbook = Logbook(tmp_path, first_step, 1, trackers=trackers_of(SETTINGS, tmp_path, first_step))
        for step in (first_step + 1, first_step + 2, first_step + 3):
            logbook.write({"step": step, "loss": 1.5 * step, "threshold_head_1": None})
        logbook.write({"step": first_step + 3, "split": "validation", "set": "web", "loss_head_0": 2.5})
        logbook.close()
    assert logged(tmp_path) == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": 3.0},
        {"step": 3, "loss": 4.5},
        {"step": 3, "validation_web/loss_head_0": 2.5},
        # A step that comes again is not dropped, as it would be as the library's own step.
        {"step": 3, "loss": 4.5},
        {"step": 4, "loss": 6.0},
        {"step": 5, "loss": 7.5},
        {"step": 5, "validation_web/loss_head_0": 2.5},
    ]
    # One run there: both starts have the same id.
    names = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert set(names) == {(tmp_path / "wandb-id").read_text()}


@pytest.mark.parametrize(("mode", "kept"), [("disabled", 0), ("dryrun", 1)])
def test_the_librarys_own_switch_decides_what_is_kept(
    mode: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", mode)
    logbook = Logbook(tmp_path, 0, 1, trackers=trackers_of(SETTINGS, tmp_path, 0))
    logbook.write({"step": 1, "loss": 1.5})
    logbook.close()
    assert len(logged(tmp_path)) == kept
    assert [record["loss"] for record in read_records(tmp_path)] == [1.5]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../elsewhere", b"a" * 100_000])
def test_a_damaged_name_of_the_run_there_ends_no_training(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb-id").write_bytes(content)
    logbook = Logbook(tmp_path, 2, 1, trackers=trackers_of(SETTINGS, tmp_path, 2))
    logbook.write({"step": 3, "loss": 4.5})
    logbook.close()
    assert logged(tmp_path) == [{"step": 3, "loss": 4.5}]
    assert re.fullmatch("[0-9a-f]{8}", (tmp_path / "wandb-id").read_text())


def test_neither_a_network_nor_a_process_of_the_library_that_fails_ends_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for number, fails in enumerate((kill_its_process, refuse_to_begin)):
        (said,) = run_ranks(logs_while_it_fails, 1, tmp_path / str(number), fails)
        assert said.count("the run goes on without it, and metrics.jsonl has all records") == 1
        assert "zq7" not in said
        assert [record["step"] for record in read_records(tmp_path / str(number))] == [*range(1, 40)]


def logs_while_it_fails(run_dir: Path, fails: Callable[[pytest.MonkeyPatch, int], None]) -> str:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("WANDB_MODE", "offline")
        fails(patch, 0)
        logbook = Logbook(run_dir, 0, 1, trackers=trackers_of(SETTINGS, run_dir, 0))
        for step in range(1, 40):
            fails(patch, step)
            logbook.write({"step": step, "loss": 1.5})
            time.sleep(0.05)
        logbook.close()
    return said.getvalue()


def kill_its_process(patch: pytest.MonkeyPatch, step: int) -> None:
    if step == 2:
        ours = [find(int(path.name)) for path in Path("/proc").glob("[0-9]*")]
        of_library = [each for each in ours if "wandb" in "".join(each.command[:1]) and each.parent == find(os.getpid())]
        assert of_library
        for each in of_library:
            each.kill()


def refuse_to_begin(patch: pytest.MonkeyPatch, step: int) -> None:
    import wandb

    if step == 0:
        patch.setattr(wandb, "init", raise_no_answer)


def raise_no_answer(**settings: Any) -> None:
    raise ConnectionError("no answer from https://user:zq7@host")


def test_settings_are_read_from_the_command_line_and_unknown_ones_refused() -> None:
    settings, _ = read_settings(None, ["logging.wandb={project: mine}"])
    assert settings.logging.wandb is not None
    assert settings.logging.wandb.project == "mine"
    _, problems = read_settings(None, ["logging.wandb={projct: mine}"])
    assert any("projct" in problem for problem in problems)


def test_a_missing_library_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging\.wandb: the library is not installed"):
        check_before_start(SETTINGS, None, tmp_path / "run", World(0, 1, 0, 1))

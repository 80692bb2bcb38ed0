"""What a run can prove by its records: told of runs as they are written down, sound ones and ones that were tampered with.

Real runs are audited in tests/integration/test_interrupted_runs.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from pipeline.audit.report import audit, figures, text
from pipeline.data.loading.mixture import DataSet, MixtureOrder
from pipeline.data.loading.order import EpochOrder
from pipeline.data.loading.order_record import record_of_order, sample_numbers
from pipeline.data.loading.row_digest import sample_digest
from pipeline.progress import Progress
from pipeline.runtime.checkpoint.folders import step_name
from pipeline.runtime.events import EVENTS_FILE, OF_REFERENCE, EventLog, begun_and_ended, last_event, note_end, time_of_start
from tests.checkpointing import write_state
from tests.forked import ROOT

G, LANES = 8, 4


def order_of(seed: int) -> MixtureOrder:
    return MixtureOrder([EpochOrder([20, 20, 3], lanes=LANES, seed=seed, shuffle_block=8)], [1.0])


class Story:
    """Writes down a run: its events, metrics and checkpoints, with a clock that goes on by what each event takes."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.now, self.seed = 1000.0, 0
        self.skipped: list[list[int]] = []
        self.events: list[dict[str, Any]] = []
        self.logged: dict[int, dict[str, Any]] = {}

    def add(self, took: float, event: str, **values: Any) -> None:
        self.now += took
        self.events.append({"time": self.now, "event": event, **values})

    def resume(self, step: int) -> None:
        self.add(1, "resume", step=step, samples=G * step, skipped=self.skipped)
        self.logged = {number: record for number, record in self.logged.items() if number <= step}

    def start(self, ranks: int, step: int, seed: int = 0, after: float = 0.0) -> None:
        began = self.now + after
        self.add(after + 5, "start", began=began, ranks=ranks, host="here")
        if not self.events[:-1] or seed != self.seed:
            self.seed = seed
            order = record_of_order(order_of(seed), [DataSet(Path("data"))], G)
            self.add(0, "order", **order, data=f"data {seed}")
        self.resume(step)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            row = G * (step - 1)
            numbers = sample_numbers(order_of(self.seed), row // LANES, G // LANES, self.skipped)
            digest = f"{sample_digest(row + np.arange(G), numbers):016x}"
            values = {"step": step, "samples": G * step, "digest": digest, "waited": 0.25, "applied": True}
            self.add(1, "step", **values, logged=True)
            self.logged[step] = {"step": step, "samples": G * step, "loss": 1.0}

    def checkpoint(self, step: int) -> None:
        self.add(0.5, "save", step=step, seconds=0.5, saved={"name": step_name(step), "bytes": 1, "seconds": 0.1})
        write_state(self.run_dir, Progress(step, G * step, skipped=self.skipped), {"data": f"data {self.seed}"})

    def written(self) -> Path:
        self.run_dir.mkdir(exist_ok=True)
        write_lines(self.run_dir / EVENTS_FILE, self.events)
        write_lines(self.run_dir / "metrics.jsonl", list(self.logged.values()))
        return self.run_dir


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def story(run_dir: Path) -> Story:
    """Killed after step 6, on from step 4 on two ranks; stopped at step 8; finished on four. 43 samples, 10 rounds an epoch."""
    told = Story(run_dir)
    told.start(1, 0)
    told.add(2, "validation", step=0, seconds=1.5)
    told.steps(1, 4)
    told.checkpoint(4)
    told.steps(5, 6)
    told.start(2, 4, after=10)
    told.steps(5, 8)
    told.checkpoint(8)
    told.add(0, "end", code=75)
    told.start(4, 8, after=20)
    told.steps(9, 12)
    told.checkpoint(12)
    told.add(1, "end", code=0)
    return told


def test_a_run_that_was_killed_and_went_on_with_other_ranks_is_sound_and_its_time_adds_up(tmp_path: Path) -> None:
    found = figures(audit(story(tmp_path / "run").written()))
    assert (found["sound"], found["problems"], found["exit_code"]) == (True, [], 0)
    assert [start["ranks"] for start in found["starts"]] == [1, 2, 4]
    assert (found["steps"], found["steps_abandoned"], found["returns"]) == (
        12,
        2,
        [{"step": 4, "reached": 6, "left_out": None}],
    )
    assert found["samples"]["read"] == 96
    assert found["samples"]["steps_verified"] == 14
    (of_data,) = found["samples"]["sets"]
    assert (of_data["rows"], of_data["epochs"], of_data["left_over_an_epoch"], of_data["most"]) == (96, 2.4, 3, 3)

    # 3 starts of 6 s, 30 s without a job; 12 steps of 1 s that waited a quarter; 3 saves; 2 steps in vain.
    seconds = {
        "productive": 9,
        "reference": 0,
        "data_wait": 3,
        "saving": 1.5,
        "evaluation": 1.5,
        "lost_work": 2,
        "restarts": 48,
        "other": 1.5,
    }
    assert found["wall_clock"]["by_kind"] == pytest.approx(seconds)
    assert found["wall_clock"]["starting"] == pytest.approx(18)
    assert sum(found["wall_clock"]["percent"].values()) == pytest.approx(100)
    assert any("ended without a word, after step 6" in note for note in found["notes"])
    assert [each["sound"] for each in found["checkpoints"]] == [True] * 3
    assert text(found).endswith("\nsound")


def test_the_time_of_a_reference_that_the_run_trains_is_a_kind_of_its_own_and_all_still_adds_up(tmp_path: Path) -> None:
    # Trained in two starts of 6 s before its first step, in the first of which the job was killed.
    told, of_reference = Story(tmp_path / "run"), Story(tmp_path / "run" / OF_REFERENCE)
    told.add(5, "start", began=told.now, ranks=1, host="here")
    of_reference.now = told.now + 1
    of_reference.start(1, 0)
    of_reference.steps(1, 2)
    of_reference.checkpoint(2)
    of_reference.steps(3, 3)
    told.now = of_reference.now
    told.add(15, "start", began=told.now + 10, ranks=1, host="here")
    of_reference.now = told.now + 1
    of_reference.start(1, 2)
    of_reference.steps(3, 5)
    of_reference.add(0.5, "end", code=0)
    told.now = of_reference.now
    order = record_of_order(order_of(0), [DataSet(Path("data"))], G)
    told.add(1, "order", **order, data="data 0")
    told.resume(0)
    told.steps(1, 2)
    told.add(0, "end", code=0)

    of_reference.written()
    found = figures(audit(told.written()))
    # 10 s without a job; jobs that start 5 s, references 7 s, twice; 2 s after the reference.
    seconds = {"productive": 1.5, "reference": 3.75, "data_wait": 1.75, "saving": 0.5, "evaluation": 0, "lost_work": 1}
    assert found["wall_clock"]["by_kind"] == pytest.approx(seconds | {"restarts": 36, "other": 0.5})
    assert found["wall_clock"]["starting"] == pytest.approx(26)
    assert found["wall_clock"]["seconds"] == pytest.approx(told.now - 1000)
    assert re.search(r"^  reference +3.8 s ", text(found), re.MULTILINE)


Edit = Callable[[list[dict[str, Any]]], Any]


def story_of_rollbacks(run_dir: Path) -> Story:
    """Back from step 7 to 4, without the two steps' rows after step 5; killed at step 6, and so back to 4 again, with the same
    spike; saved at 8; killed at step 9; back from step 11 to 8 without one more step's rows, next to the others."""
    told = Story(run_dir)
    told.start(1, 0)
    told.steps(1, 4)
    told.checkpoint(4)
    told.steps(5, 7)
    told.skipped = [[40, 56]]
    told.resume(4)
    told.steps(5, 6)
    told.skipped = []
    told.start(1, 4)
    told.steps(5, 7)
    told.skipped = [[40, 56]]
    told.resume(4)
    told.steps(5, 8)
    told.checkpoint(8)
    told.steps(9, 9)
    told.start(2, 8)
    told.steps(9, 11)
    told.skipped = [[40, 56], [88, 96]]
    told.resume(8)
    told.steps(9, 12)
    told.checkpoint(12)
    told.add(1, "end", code=0)
    return told


def test_a_run_that_went_back_from_loss_spikes_and_left_samples_out_is_sound(tmp_path: Path) -> None:
    found = figures(audit(story_of_rollbacks(tmp_path / "run").written()))
    assert (found["problems"], found["exit_code"]) == ([], 0)
    assert [(each["step"], each["reached"], each["left_out"]) for each in found["returns"]] == [
        (4, 7, (40, 56)),
        (4, 6, None),
        (4, 7, (40, 56)),
        (8, 9, None),
        (8, 11, (88, 96)),
    ]
    assert (found["samples"]["left_out"], found["samples"]["steps_verified"]) == ([[40, 56], [88, 96]], 24)
    (of_data,) = found["samples"]["sets"]
    assert (of_data["rows"], of_data["left_out"], of_data["epochs"], of_data["most"]) == (96, 24, 3.0, 3)
    assert "went back from step 7 to 4, after a loss spike: 3 step(s) abandoned, rows 40 to 55 left out on purpose" in text(
        found
    )
    assert sum(found["wall_clock"]["percent"].values()) == pytest.approx(100)


def resumes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "resume"]


def leave_out_unrecorded(events: list[dict[str, Any]]) -> None:
    """As a start does that leaves rows out, and tells so, where no spike was."""
    resumes(events)[4]["skipped"] = [[40, 56], [80, 88]]


SKIPS: dict[str, tuple[Edit, str]] = {
    "other rows than are told": (lambda events: resumes(events)[3].update(skipped=[[48, 64]]), "step 6 (events.jsonl, line "),
    "nothing is told": (lambda events: [event.pop("skipped") for event in resumes(events)], "its samples are not those of"),
    "a start leaves out more": (
        leave_out_unrecorded,
        "step 8 goes on without other rows than before (40 to 55, 80 to 87), and no",
    ),
    "rows from before the return": (
        lambda events: resumes(events)[5].update(skipped=[[24, 32], [40, 56]]),
        "no rollback tells",
    ),
    "rows that were never reached": (
        lambda events: resumes(events)[5].update(skipped=[[40, 56], [160, 168]]),
        "no rollback tells",
    ),
    "a part of a step": (lambda events: resumes(events)[1].update(skipped=[[40, 50]]), "in multiples of 8"),
    "rows beyond numbers": (lambda events: resumes(events)[1].update(skipped=[[40, 2**80]]), "what is left out is damaged"),
    "no rows": (lambda events: resumes(events)[1].update(skipped=[None]), "what is left out is damaged"),
    "checkpoints of another story": (
        lambda events: resumes(events)[5].update(skipped=[[40, 56]]),
        "step-00000012: leaves out the rows [[40, 56], [88, 96]], and the events say [[40, 56]]",
    ),
}


@pytest.mark.parametrize("name", SKIPS)
def test_samples_that_were_left_out_without_a_rollback_are_named(name: str, tmp_path: Path) -> None:
    told = story_of_rollbacks(tmp_path / "run")
    edit, expected = SKIPS[name]
    edit(told.events)
    found = audit(told.written())
    assert any(expected in problem for problem in found.problems), found.problems


def of_step(events: list[dict[str, Any]], step: int) -> int:
    """The place of the last record of a step."""
    return max(place for place, event in enumerate(events) if event["event"] == "step" and event["step"] == step)


def swap_digests(events: list[dict[str, Any]]) -> None:
    one, other = events[of_step(events, 9)], events[of_step(events, 10)]
    one["digest"], other["digest"] = other["digest"], one["digest"]


EDITS: dict[str, tuple[Edit, str]] = {
    "a step is missing": (lambda events: events.pop(of_step(events, 10)), "step 10 has no record"),
    "two steps are missing": (lambda events: [events.pop(of_step(events, step)) for step in (9, 10)], "steps 9 to 10 have no"),
    "a step is there twice": (lambda events: events.append(events[of_step(events, 12)]), "step 12 again, after step 12"),
    "two steps are swapped": (swap_digests, "step 9 (events.jsonl, line 22): its samples are not those of the order"),
    "an abandoned step": (lambda events: events[10].update(digest="0" * 16), "step 6 (events.jsonl, line 11): its samples"),
    "the position leaps": (lambda events: events[of_step(events, 11)].update(samples=96), "stands at sample 96, expected 88"),
    "it goes on elsewhere": (lambda events: events[20].update(samples=72), "step 8 stands at sample 72, expected 64"),
    "no return is told": (lambda events: events.pop(12), "step 5 again, after step 6"),
    "no order is told": (lambda events: events.pop(1), "steps before any order of samples is recorded"),
    "another seed": (lambda events: events[1].update(seed=1), "step 1 (events.jsonl, line 5): its samples are not those"),
    "an order that is none": (
        lambda events: events[1].update(sets=[{"shards": 3}]),
        "the record of the order of samples is damaged",
    ),
    "no lanes": (lambda events: events[1].update(lanes=0), "record of the order of samples is damaged"),
    "no rows": (lambda events: events[1].update(global_batch=0), "record of the order of samples is damaged"),
    "other rows": (lambda events: events[1].update(global_batch=9), "record of the order of samples is damaged"),
    "more shards than memory": (
        lambda events: events[1]["sets"][0].update(shards=[[1, 2**50]]),
        "record of the order of samples is damaged",
    ),
    "more samples than numbers": (
        lambda events: events[1]["sets"][0].update(shards=[[2**70, 1]]),
        "record of the order of samples is damaged",
    ),
    "no weight": (lambda events: events[1]["sets"][0].update(weight=float("nan")), "record of the order of samples is damaged"),
    "a code that is none": (lambda events: events[20].update(code=[75]), "line 21 is damaged"),
    "a time that is none": (lambda events: events[5].update(time=float("inf")), "line 6 is damaged"),
    "a position beyond numbers": (lambda events: events[5].update(samples=2**80), "line 6 is damaged"),
    "the last steps are missing": (lambda events: [events.pop() for _ in range(4)], "step-00000012: no event tells of step 12"),
    "other data": (lambda events: events[1].update(data="another"), "step-00000012: was trained on other data"),
}


@pytest.mark.parametrize("name", EDITS)
def test_events_that_were_tampered_with_are_named(name: str, tmp_path: Path) -> None:
    told = story(tmp_path / "run")
    edit, expected = EDITS[name]
    edit(told.events)
    found = audit(told.written())
    assert any(expected in problem for problem in found.problems), found.problems


def test_a_clock_that_was_set_back_is_said_and_the_shares_are_those_of_the_time_that_is_known(tmp_path: Path) -> None:
    told = story(tmp_path / "run")
    for event in told.events[16:]:
        event["time"] -= 500
    found = audit(told.written())
    assert found.problems == []
    assert [note for note in found.notes if "line 17 is 499 s before the line above it by the clock" in note]
    assert sum(found.clock.percent.values()) == pytest.approx(100)


def edited_lines(path: Path, edit: Callable[[list[str]], Any]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    edit(lines)
    path.write_text("".join(lines), encoding="utf-8")


LINES: dict[str, tuple[str, Callable[[list[str]], Any], str]] = {
    "a torn event": (EVENTS_FILE, lambda lines: lines.insert(5, '{"time": 10\n'), "line 6 is damaged"),
    "an event of no kind": (EVENTS_FILE, lambda lines: lines.insert(5, '{"time": 1, "event": "x"}\n'), "line 6 is damaged"),
    "a record is missing": ("metrics.jsonl", lambda lines: lines.pop(4), "no record of step(s) 5"),
    "a record is there twice": ("metrics.jsonl", lambda lines: lines.insert(4, lines[3]), "line 5: step 4 after step 4"),
    "records out of order": ("metrics.jsonl", lambda lines: lines.insert(2, lines.pop(5)), "line 4: step 3 after step 6"),
    "a damaged record": ("metrics.jsonl", lambda lines: lines.insert(4, "\0\0\n"), "metrics.jsonl: line 5 is damaged"),
    "a record of another place": (
        "metrics.jsonl",
        lambda lines: lines.insert(4, lines.pop(4).replace("40", "48")),
        "line 5: step 5 stands at sample 48, expected 40",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_that_were_tampered_with_are_named(name: str, tmp_path: Path) -> None:
    run_dir = story(tmp_path / "run").written()
    file, edit, expected = LINES[name]
    edited_lines(run_dir / file, edit)
    found = audit(run_dir)
    assert any(expected in problem for problem in found.problems), found.problems


def test_a_torn_line_where_a_job_ended_is_said_and_no_problem(tmp_path: Path) -> None:
    run_dir = story(tmp_path / "run").written()
    edited_lines(run_dir / EVENTS_FILE, lambda lines: lines.insert(11, '{"time": 10\n'))
    with (run_dir / EVENTS_FILE).open("a") as file:
        file.write('{"time": 10')
    found = audit(run_dir)
    assert not found.problems
    assert [note for note in found.notes if "torn" in note] == [
        "events.jsonl: line 12 is torn, where a job was killed; it is left out",
        "events.jsonl: the last line is torn, as a kill leaves it; it is left out",
    ]


def test_a_flipped_bit_of_a_checkpoint_is_named_and_abandoned_ones_are_listed(tmp_path: Path) -> None:
    run_dir = story(tmp_path / "run").written()
    (run_dir / "checkpoints" / "step-00000004").rename(run_dir / "checkpoints" / "abandoned-step-00000004")
    (run_dir / "checkpoints" / "step-00000016.partial").mkdir()
    state = run_dir / "checkpoints" / "step-00000012" / "state.json"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    found = figures(audit(run_dir))
    (problem,) = found["problems"]
    assert problem.startswith("step-00000012: state.json: ")
    assert [(each["name"], each["kind"], each["sound"]) for each in found["checkpoints"]] == [
        ("step-00000012", "checkpoint", False),
        ("step-00000008", "checkpoint", True),
        ("abandoned-step-00000004", "abandoned", None),
        ("step-00000016.partial", "unfinished", None),
    ]
    assert "steps 9 to 12 are in no sound checkpoint: a start of now trains them again" in found["notes"]


def test_a_newest_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    run_dir = story(tmp_path / "run").written()
    shutil.rmtree(run_dir / "checkpoints" / "step-00000008")
    assert audit(run_dir).problems == [], "older ones are deleted on purpose"
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    found = figures(audit(run_dir))
    assert found["problems"] == ["step-00000012: was saved, and neither it nor a later one is there"]
    assert "steps 5 to 12 are in no sound checkpoint: a start of now trains them again" in found["notes"]


def test_an_order_that_was_changed_is_held_against_the_steps_that_followed_it(tmp_path: Path) -> None:
    told = Story(tmp_path / "run")
    told.start(1, 0)
    told.steps(1, 4)
    told.checkpoint(4)
    told.start(1, 4, seed=5)
    told.steps(5, 6)
    found = figures(audit(told.written()))
    assert (found["problems"], found["samples"]["steps_verified"], found["samples"]["sets"]) == ([], 6, [])
    assert any("the order of samples was changed" in note for note in found["notes"])

    told.events = [event for event in told.events if event.get("seed") != 5]
    assert len(audit(told.written()).samples.problems) == 2


def test_the_command_prints_and_writes_what_it_found_without_loading_torch(tmp_path: Path) -> None:
    run_dir = story(tmp_path / "run").written()

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = "import runpy, sys; sys.argv.pop(0); sys.modules['torch'] = None; runpy.run_path(sys.argv[0], None, '__main__')"
        line = [sys.executable, "-c", code, ROOT / "launch" / "audit.py", *arguments]
        return subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False, cwd=ROOT)

    done = command(run_dir, "--json", tmp_path / "figures.json")
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert done.stdout == text(written) + "\n"

    edited_lines(run_dir / EVENTS_FILE, lambda lines: lines.pop(4))
    done = command(run_dir)
    assert done.returncode == 1
    assert "NOT SOUND\n  events.jsonl: step 1 has no record\n" in done.stdout

    (run_dir / EVENTS_FILE).unlink()
    assert command(run_dir).returncode == 1
    for nothing in (tmp_path / "none", tmp_path):
        done = command(nothing)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"audit.py: error: {nothing}: expected a run directory")


def test_events_are_appended_by_one_job_after_another_and_a_torn_line_is_ended_first(tmp_path: Path) -> None:
    with begun_and_ended(tmp_path, 1.0, ranks=2) as outcome:
        outcome["code"] = 75
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"time": 1')
    with pytest.raises(KeyError), begun_and_ended(tmp_path, 2.0, ranks=4):
        raise KeyError
    with begun_and_ended(None, 3.0, ranks=4):
        pass

    lines = (tmp_path / EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    assert lines.pop(2) == '{"time": 1'
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "end", "start", "end"]
    assert (events[1]["code"], events[2]["ranks"], events[3]["error"]) == (75, 4, "KeyError")
    assert last_event(tmp_path, "start") == events[2]
    assert last_event(tmp_path, "order") is None

    log = EventLog(tmp_path)
    with log.timed("save", 3) as values:
        values["saved"] = 1
    log.close()
    last = last_event(tmp_path, "save")
    assert last is not None
    assert (last["step"], last["saved"], last["seconds"] >= 0) == (3, 1, True)
    assert 0 <= last["time"] - time_of_start() < 24 * 3600


def test_a_process_that_must_end_at_once_notes_the_end_of_all_its_jobs(tmp_path: Path) -> None:
    job, of_reference = tmp_path, tmp_path / OF_REFERENCE
    with begun_and_ended(job, 1.0, ranks=2), begun_and_ended(of_reference, 1.0, ranks=2):
        note_end(4, seconds=60)
        assert [last_event(each, "end") for each in (job, of_reference)] == [
            {"time": ANY, "event": "end", "code": 4},
            {"time": ANY, "event": "end", "code": 4},
        ]
    assert "not finished: ended by a rank that died or stood still" in text(figures(audit(job)))

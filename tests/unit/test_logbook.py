"""What is written and shown: the formats that people and tools rely on, and a log book that survives a kill."""

import json
import math

import pytest

from pipeline.runtime.logbook import Logbook, read_records, without_non_finite
from tests.drawn import scalars
from tests.records import training_record, validation_record


def test_metrics_keep_full_precision_and_one_object_a_line(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4)
    record = training_record(1, loss=0.1 + 0.2, grad_norm=1 / 3)
    logbook.write(record)
    assert read_records(tmp_path) == [record]  # readable before the file is closed
    logbook.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["loss"] == 0.30000000000000004


def test_resuming_drops_what_was_logged_beyond_the_checkpoint(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.write(validation_record(0, (5.0, 5.0, 5.0, 5.0)))
    for step in range(1, 6):
        logbook.write(training_record(step, loss=10.0 + step))
    logbook.write(validation_record(5, (4.0, 4.0, 4.0, 4.0)))
    logbook.close()
    logbook = Logbook(tmp_path, 3, num_heads=4)
    for step in (4, 5, 6):
        logbook.write(training_record(step, loss=20.0 + step))
    logbook.close()
    steps = [(record["step"], record.get("split"), record["loss"]) for record in read_records(tmp_path)]
    assert steps == [
        (0, "validation", 1.0),
        *((s, None, 10.0 + s) for s in (1, 2, 3)),
        *((s, None, 20.0 + s) for s in (4, 5, 6)),
    ]
    assert scalars(tmp_path)["", "train/loss"] == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]
    assert scalars(tmp_path)["head_0", "validation/loss"] == [(0, 5.0)]


def test_starting_again_from_nothing_drops_everything(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.write(validation_record(0, (5.0, 5.0, 5.0, 5.0)))
    logbook.write(training_record(1, loss=11.0))
    logbook.write(training_record(2, loss=12.0))
    logbook.close()
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.write(validation_record(0, (6.0, 6.0, 6.0, 6.0)))
    logbook.write(training_record(1, loss=21.0))
    logbook.close()
    assert [(record["step"], record["loss"]) for record in read_records(tmp_path)] == [(0, 1.0), (1, 21.0)]
    assert scalars(tmp_path)["", "train/loss"] == [(1, 21.0)]
    assert scalars(tmp_path)["head_0", "validation/loss"] == [(0, 6.0)]


def curves_after_a_resume(run_dir):
    """Steps 1 to 5, and from step 3 on again without head 3 and the source, which then write no more."""
    logbook = Logbook(run_dir, 0, num_heads=4)
    for step in range(1, 6):
        logbook.write(training_record(step, enrichment_head_1_source_noise=0.5))
    logbook.close()
    logbook = Logbook(run_dir, 3, num_heads=4)
    for step in (4, 5, 6):
        logbook.write({key: value for key, value in training_record(step).items() if not key.endswith("head_3")})
    logbook.close()
    return {place: [step for step, _ in points] for place, points in scalars(run_dir).items()}


def test_resuming_cuts_each_head_and_source_also_where_nothing_more_is_written(tmp_path):
    steps = curves_after_a_resume(tmp_path)
    assert steps["head_1", "selection/threshold"] == [1, 2, 3, 4, 5, 6]
    assert steps["head_3", "selection/threshold"] == [1, 2, 3]
    assert steps["source_noise", "selection/enrichment/head_1"] == [1, 2, 3]


def test_curves_go_on_where_the_clock_was_set_back_before_a_resume(tmp_path, monkeypatch):
    clock = iter([2_000_000_000.0] * 1000)
    monkeypatch.setattr("pipeline.runtime.event_files.time.time", lambda: next(clock))
    logbook = Logbook(tmp_path, 0, num_heads=4)
    for step in range(1, 6):
        logbook.write(training_record(step))
    logbook.close()
    monkeypatch.undo()
    logbook = Logbook(tmp_path, 3, num_heads=4)
    logbook.write(training_record(4, loss=7.0))
    logbook.close()
    assert scalars(tmp_path)["", "train/loss"] == [(step, pytest.approx(2.8467)) for step in (1, 2, 3)] + [(4, 7.0)]
    assert [step for step, _ in scalars(tmp_path)["head_2", "selection/threshold"]] == [1, 2, 3, 4]


def test_a_line_that_a_kill_cut_short_is_left_out_and_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(training_record(1)) + "\n"
    path.write_text(whole + json.dumps(training_record(2))[:40], encoding="utf-8")
    assert read_records(tmp_path) == [training_record(1)]
    logbook = Logbook(tmp_path, 1, num_heads=4)
    logbook.write(training_record(2))
    logbook.close()
    assert read_records(tmp_path) == [training_record(1), training_record(2)]


def test_there_are_no_records_before_there_is_a_file(tmp_path):
    assert read_records(tmp_path) == []


def test_what_is_not_a_number_becomes_null(tmp_path):
    record = without_non_finite(
        {"step": 1, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "name": "x", "good": 0.5}
    )
    assert record == {"step": 1, "loss": None, "grad_norm": None, "low": None, "name": "x", "good": 0.5}
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.write(without_non_finite(training_record(1, loss=math.nan)))
    logbook.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"loss": null' in text
    assert "NaN" not in text


DAMAGED = {
    "a torn last line": (b'{"step": 3, "lo', "1 damaged line(s) left out"),
    "a block of NULs": (b"\0" * 4096, "1 damaged line(s) left out"),
    "NULs between lines": (b"\0\0\n" + b'{"step": 4}\n', "1 damaged line(s) left out"),
    "other JSON": (b'[]\n7\n{"loss": 1}\n' + b"[" * 50_000 + b"\n", "4 damaged line(s) left out"),
    "not UTF-8": (b"\xff\xfe\n", "1 damaged line(s) left out"),
    "beyond the checkpoint": (b'{"step": 9}\n', "cut to step 5, where the run continues; it went on to step 9"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_a_crash_leaves_in_the_records_is_cut_and_said(tmp_path, kind):
    more, note = DAMAGED[kind]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 5}\n' + more)
    logbook = Logbook(tmp_path, 5, num_heads=4)
    logbook.close()
    assert logbook.notes == [f"metrics.jsonl: {note}"]
    assert [record["step"] for record in read_records(tmp_path)] in ([1, 5], [1, 5, 4])


def test_records_short_of_the_checkpoint_are_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 5}\n')
    logbook = Logbook(tmp_path, 9, num_heads=4)
    logbook.sync()
    logbook.close()
    assert logbook.notes == ["metrics.jsonl: ends at step 5, before the checkpoint of step 9: what lay between is lost"]

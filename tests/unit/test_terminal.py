"""The output of a run on a terminal and in a log."""

import io
import re

import pytest

from pipeline.runtime.terminal import Terminal, held_out_text, progress_line, selection_block, summary_table
from tests.records import training_record, validation_record

EXPECTED_BLOCK = """\
step 100: 70.0% of all pairs selected, 2.80 heads a position
                pairs selected  of valid  threshold  mean excess
  head 0 (t+1)           1,024    100.0%          –            –
  head 1 (t+2)             614     60.0%       0.42         0.42
  head 2 (t+3)             608     60.0%       0.51         0.51
  head 3 (t+4)             602     60.0%       0.38         0.38"""


def test_the_selection_block_has_a_row_for_each_head():
    assert selection_block(training_record(100)) == EXPECTED_BLOCK


def test_the_selection_block_of_next_token_training_has_head_0_alone():
    record = {key: value for key, value in training_record(5).items() if not key.endswith(("_1", "_2", "_3"))}
    assert selection_block(record).splitlines()[-1].split() == ["head", "0", "(t+1)", "1,024", "100.0%", "–", "–"]


def test_numbers_that_do_not_exist_are_shown_as_none():
    record = training_record(7, threshold_head_1=None, excess_mean_head_1=None, selected_ratio_head_1=None)
    assert selection_block(record).splitlines()[3].split() == ["head", "1", "(t+2)", "614", "none", "none", "none"]
    assert "loss none" in progress_line(training_record(7, loss=None), total_steps=9, seconds_left=1.0)


def test_the_progress_line_has_losses_thresholds_speed_and_time_left():
    record = training_record(7, memory_bytes=2.5e9, data_wait=0.003)
    assert progress_line(record, total_steps=1500, seconds_left=3723.9) == (
        "step    7/1500  loss 2.8467  heads 2.500 2.750 3.000 3.250  threshold 0.42 0.51 0.38  lr 1.00e-03  grad 0.50  "
        "12,346 tokens/s  2.50 GB  wait 0.3%  ETA 1:02:03"
    )
    assert "MFU 41.5%" in progress_line(record | {"mfu": 0.415}, 1500, 59.2)
    assert progress_line(training_record(7), 1500, 59.2).endswith("ETA 0:59")
    one_head = {key: value for key, value in record.items() if not key.endswith(("_1", "_2", "_3"))}
    assert "loss 2.8467  heads 2.500  lr" in progress_line(one_head, 1500, 1.0)


def written_to(file, monkeypatch, **environment):
    """Return what a terminal shows of two steps and a message between them, written to a file."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", file)
    terminal = Terminal()
    terminal.progress("step 1/2  loss 3.0")
    terminal.say("saved step 1")
    terminal.progress("step 2/2  loss 2.0")
    terminal.clear()
    return file.getvalue()


class FileOfATerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("file", "kind"), [(io.StringIO, "xterm"), (FileOfATerminal, "dumb")])
def test_what_is_piped_or_shown_by_a_dumb_terminal_has_plain_lines_and_no_colours(monkeypatch, file, kind):
    shown = written_to(file(), monkeypatch, TERM=kind)
    assert shown == "step 1/2  loss 3.0\nsaved step 1\nstep 2/2  loss 2.0\n"


def test_a_terminal_has_one_live_line_and_messages_stay_above_it(monkeypatch):
    shown = written_to(FileOfATerminal(), monkeypatch, TERM="xterm-256color", COLUMNS="12")
    kept = re.sub(r"[^\n]*\r", "", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert kept == "saved step 1\n"
    assert "\x1b[1m" in shown
    assert "\x1b[?25l" not in shown  # the cursor is never hidden, since a rank may be killed
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\n", "\r").split("\r")
    assert max(map(len, lines)) < 13


def test_a_narrow_terminal_goes_without_thresholds_before_it_goes_without_the_time_left(monkeypatch):
    file = FileOfATerminal()
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    Terminal().progress("step 1/2  loss 3.0  heads 3.0 3.1  threshold 0.1 0.2  lr 1.00e-03  grad 0.30  ETA 0:05")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).strip()
    assert shown == "step 1/2  loss 3.0  lr 1.00e-03  grad 0.30  ETA 0:05"


def with_sources(step, valid, selected):
    """A record of 2 heads; valid and selected: {source: (head 0, head 1)}."""
    record = {"step": step, "loss": 1.0}
    for head in (0, 1):
        record[f"loss_head_{head}"] = 1.0
        record[f"valid_count_head_{head}"] = sum(counts[head] for counts in valid.values())
        record[f"selected_count_head_{head}"] = sum(counts[head] for counts in selected.values())
        for name in valid:
            record[f"valid_count_head_{head}_source_{name}"] = valid[name][head]
            record[f"selected_count_head_{head}_source_{name}"] = selected[name][head]
    return record


def cells(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def test_the_closing_tables_shares_are_sums_over_the_last_quarter_divided_once(tmp_path):
    # Steps 1 to 75 must not count: their noise would be 100 %. Tokens are counted in the steps that are not logged, too.
    early = [with_sources(step, {"prose": (0, 0), "noise": (9, 9)}, {"prose": (0, 0), "noise": (9, 9)}) for step in (1, 75)]
    late = [
        with_sources(80, {"prose": (60, 50), "noise": (40, 30)}, {"prose": (60, 40), "noise": (40, 8)}),
        with_sources(100, {"prose": (10, 10), "noise": (10, 10)}, {"prose": (10, 9), "noise": (10, 3)}),
    ]
    consumed = [(0, 10), (0, 700), (60, 800), (750, 950)]
    for record, (prose, noise) in zip([*early, *late], consumed, strict=True):
        record |= {"data_tokens_source_prose": prose, "data_tokens_source_noise": noise}
    table = summary_table([*early, *late], tmp_path / "demo", ("prose", "noise"))
    # The data: 750 tokens of prose in steps 76 to 100, 250 of noise.
    assert cells(table, "share of noise in the data") == ["25.0%", "25.0%"]
    assert cells(table, "share of prose in the data") == ["75.0%", "75.0%"]
    # Head 0: all 120 pairs selected, noise 50 of them. Head 1: 60 of 100 selected, noise 40 of 100 valid, 11 of 60 selected.
    assert cells(table, "selected") == ["100.0%", "60.0%"]
    assert cells(table, "share of noise among selected") == ["41.7%", "18.3%"]
    assert cells(table, "share of prose among selected") == ["58.3%", "81.7%"]
    assert "\n(data: all tokens of steps 76 to 100; selection: of the 2 logged steps from 80 to 100)\n" in table
    assert "(selection: of the logged step 1 alone)" in summary_table(early[:1], tmp_path, ())


def test_the_closing_table_has_held_out_losses_and_where_to_look(tmp_path):
    records = [
        validation_record(0, (5.5, 5.6, 5.7, 5.8)),
        training_record(10),
        validation_record(10, (4.0, 4.1, 4.2, 4.3)),
        training_record(20),
        validation_record(20, (3.0, 3.1, 3.2, 3.3)),
    ]
    table = summary_table(records, tmp_path / "runs" / "demo", ())
    columns = [cell.strip() for cell in table.splitlines()[0].split("  ") if cell]
    assert columns == ["head 0 (t+1)", "head 1 (t+2)", "head 2 (t+3)", "head 3 (t+4)"]
    assert cells(table, "held-out loss, start (step 0)") == ["5.500", "5.600", "5.700", "5.800"]
    assert cells(table, "held-out loss, end (step 20)") == ["3.000", "3.100", "3.200", "3.300"]
    assert "share of" not in table
    assert f"run directory:  {tmp_path / 'runs' / 'demo'}" in table
    assert f"tensorboard --logdir {tmp_path / 'runs'}" in table


def test_the_closing_table_has_the_losses_of_each_held_out_set(tmp_path):
    records = [validation_record(step, (5.0 - step / 10,) * 4) | {"set": name} for step in (0, 10) for name in ("web", "books")]
    table = summary_table([*records[:2], training_record(10), *records[2:]], tmp_path, ())
    for name in ("web", "books"):
        assert cells(table, f"held-out loss of {name}, start (step 0)") == ["5.000"] * 4
        assert cells(table, f"held-out loss of {name}, end (step 10)") == ["4.000"] * 4


def test_the_closing_table_does_without_validation_and_with_nothing_trained(tmp_path):
    assert "held-out" not in summary_table([training_record(1)], tmp_path, ())
    assert summary_table([], tmp_path, ()) == ""
    assert summary_table([validation_record(0, (1.0,))], tmp_path, ()) == ""


def test_a_validation_is_a_line_with_the_losses_of_each_head_and_what_head_0s_mean():
    record = {"loss_head_0": 1.0, "loss_head_1": 0.0, "perplexity_head_0": 2.71828, "bits_per_byte": 0.5}
    assert held_out_text(record) == "per head 1.000 0.000; perplexity 2.72, 0.500 bits per byte"
    diverged = {"loss_head_0": None, "loss_head_1": 2.0, "perplexity_head_0": None}
    assert held_out_text(diverged) == "per head none 2.000; perplexity none"

"""What is written and shown: the formats that people and tools rely on, and a log book that survives a kill."""

import io
import json
import math
import re

import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2

from pipeline.model.mtp import HeadLosses
from pipeline.runtime.logbook import Logbook, read_records, without_non_finite
from pipeline.runtime.metrics import EXCESS_BIN_WIDTH, SelectionSums
from pipeline.runtime.tensorboard import is_drawn, place_of, split_of
from pipeline.runtime.terminal import Terminal, held_out_text, progress_line, selection_block, summary_table
from pipeline.weighting.selection import Selection
from tests.drawn import events_of, scalars

# The block of the project's plan, to the character.
EXPECTED_BLOCK = """\
[Step 100] Training metrics:
  Weighted CE loss: 2.847
  Selection statistics:
    Overall ratio: 70.0% (2.80 heads/position avg)
    Head 0 (t+1): 1024 tokens (100.0% - always selected)
    Head 1 (t+2): 614 tokens (60.0% - top-k, threshold=0.42)
    Head 2 (t+3): 608 tokens (60.0% - top-k, threshold=0.51)
    Head 3 (t+4): 602 tokens (60.0% - top-k, threshold=0.38)
  Avg excess loss: t+2=0.42, t+3=0.51, t+4=0.38"""


def training_record(step, **values):
    record = {"step": step, "samples": 8 * step, "tokens": 128 * step, "loss": 2.8467}
    for head, count in enumerate((1024, 614, 608, 602)):
        record[f"loss_head_{head}"] = 2.5 + 0.25 * head
        record[f"selected_ratio_head_{head}"] = 0.6 if head else 1.0
        record[f"selected_count_head_{head}"] = count
        record[f"valid_count_head_{head}"] = 1024 - head
    for head, value in ((1, 0.4213), (2, 0.5099), (3, 0.375)):
        record[f"threshold_head_{head}"] = value
        record[f"excess_mean_head_{head}"] = value
    record |= {"selection_ratio": 0.7, "heads_per_position": 2.8, "learning_rate": 1e-3, "grad_norm": 0.5}
    return record | {"tokens_per_second": 12345.6, "skipped_steps": 0} | values


def validation_record(step, losses):
    return {"step": step, "samples": 8 * step, "split": "validation", "loss": 1.0} | {
        f"loss_head_{head}": loss for head, loss in enumerate(losses)
    }


def charts(directory):
    """{title: tags} of the custom-scalars layout, in its order; of a band value, lower and upper edge."""
    (event,) = events_of(directory).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        chart.title: list(chart.multiline.tag)
        or [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
        for category in layout.category
        for chart in category.chart
    }


def test_the_selection_block_is_that_of_the_plan():
    assert selection_block(training_record(100)) == EXPECTED_BLOCK


def test_the_selection_block_of_next_token_training_has_no_excess():
    record = {key: value for key, value in training_record(5).items() if not key.endswith(("_1", "_2", "_3"))}
    assert selection_block(record).splitlines()[-1] == "    Head 0 (t+1): 1024 tokens (100.0% - always selected)"


def test_numbers_that_do_not_exist_are_shown_as_none():
    record = training_record(7, loss=None, threshold_head_1=None, excess_mean_head_1=None, selected_ratio_head_1=None)
    lines = selection_block(record).splitlines()
    assert lines[1] == "  Weighted CE loss: none"
    assert lines[5] == "    Head 1 (t+2): 614 tokens (none - top-k, threshold=none)"
    assert lines[-1] == "  Avg excess loss: t+2=none, t+3=0.51, t+4=0.38"


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
    """What a terminal shows of two steps and a message between them, written to a file."""
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


@pytest.mark.parametrize(
    ("key", "split", "place"),
    [
        ("loss", None, ("", "train/loss")),
        ("grad_norm", None, ("", "train/grad_norm")),
        ("loss_head_0", None, ("head_0", "train/loss")),
        ("selected_ratio_head_1", None, ("head_1", "selection/ratio")),
        ("threshold_head_1", None, ("head_1", "selection/threshold")),
        ("prediction_hit_rate_head_1", None, ("head_1", "selection/prediction_hit_rate")),
        ("excess_mean_head_3", None, ("head_3", "selection/excess_mean")),
        ("excess_p10_head_1", None, ("head_1", "selection/excess_p10")),
        ("selection_ratio", None, ("", "selection/ratio")),
        ("excess_mean", None, ("", "selection/excess_mean")),
        ("heads_per_position", None, ("", "selection/heads_per_position")),
        ("agreement", None, ("", "selection/agreement")),
        ("agreement_head_1_head_2", None, ("head_2", "selection/agreement/with_head_1")),
        ("selected_ratio_head_1_source_my_head_2", None, ("source_my_head_2", "selection/share/head_1")),
        ("selected_ratio_head_1_source_my_head_2_source_x", None, ("source_my_head_2_source_x", "selection/share/head_1")),
        ("enrichment_head_2_source_../a", None, ("source_..%2fa", "selection/enrichment/head_2")),
        ("tokens_per_second", None, ("", "wall_clock/tokens_per_second")),
        ("data_wait", None, ("", "wall_clock/data_wait")),
        ("data_epoch", None, ("", "z_data/epoch")),
        ("data_tokens_source_web_source_x", None, ("source_web_source_x", "z_data/tokens")),
        ("data_epoch_set_prose", None, ("set_prose", "z_data/epoch")),
        ("excess_mean", "validation", ("", "validation/excess_mean")),
        ("loss_head_0", "validation", ("head_0", "validation/loss")),
        ("loss", "validation", ("", "validation/loss")),
        ("loss_head_0_source_web", "validation", ("source_web", "validation/loss/head_0")),
        ("perplexity_head_1", "validation", ("head_1", "validation/perplexity")),
        ("bits_per_byte", "validation", ("", "validation/bits_per_byte")),
        ("loss_head_0", "validation_web", ("head_0", "validation_web/loss")),
        # Constants, and what a card each would be too much for, are in metrics.jsonl alone.
        ("selected_ratio_head_0_source_web", None, None),
        ("selected_count_head_2", None, None),
        ("excess_mean_source_web", None, None),
        ("agreement_head_1_head_2_source_web", None, None),
        ("selected_ratio_head_1", "validation", None),
        ("step", None, None),
        ("set", "validation_web", None),
        ("rows", "validation", None),
    ],
)
def test_every_key_has_its_place_in_tensorboard(key, split, place):
    assert place_of(key, split) == place


def test_tensorboard_reads_back_what_metrics_jsonl_holds(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.write(validation_record(0, (5.0, 5.1, 5.2, 5.3)))
    logbook.write(training_record(1, selected_ratio_head_1_source_noise=0.25))
    logbook.write(training_record(2, threshold_head_1=None))
    logbook.close()
    found = scalars(tmp_path)
    assert found["source_noise", "selection/share/head_1"] == [(1, 0.25)]
    assert found["head_1", "selection/threshold"] == [(1, pytest.approx(0.4213))]  # null has no point
    assert found["head_3", "validation/loss"] == [(0, pytest.approx(5.3))]
    for record in read_records(tmp_path):
        for key, value in record.items():
            place = place_of(key, split_of(record))
            if place is not None and is_drawn(key, value):
                assert dict(found[place])[record["step"]] == pytest.approx(value)


def test_the_heads_of_a_quantity_share_a_card_in_which_each_is_a_run(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.write(training_record(1))
    logbook.close()
    drawn = scalars(tmp_path)
    assert [run for run, tag in drawn if tag == "train/loss"] == ["", "head_0", "head_1", "head_2", "head_3"]
    assert [run for run, tag in drawn if tag == "selection/threshold"] == ["head_1", "head_2", "head_3"]


def test_counters_of_rare_events_are_drawn_from_the_first_event_on(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4)
    for step, skipped in enumerate((0, 0, 1, 1), start=1):
        logbook.write(training_record(step, skipped_steps=skipped, rollbacks=0))
    logbook.close()
    drawn = scalars(tmp_path)
    assert drawn["", "train/skipped_steps"] == [(3, 1.0), (4, 1.0)]
    assert ("", "train/rollbacks") not in drawn


def test_tensorboard_draws_the_excess_of_each_selecting_head_as_a_distribution(tmp_path):
    excess = torch.tensor([[-1.0, 0.03, 0.04], [2.5, 2.5, 2.5], [0.1, 0.1, 0.1]])
    valid = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]]).bool()
    losses = HeadLosses(
        torch.zeros(()),
        torch.zeros(1, 3, 4),
        Selection(valid.T[None], torch.zeros(3), torch.ones(3).double(), (excess * valid).T[None], torch.tensor(True)),
    )
    sums = SelectionSums(4, 1, torch.device("cpu"))
    sums.add(losses, torch.cat([torch.ones(1, 3, 1, dtype=torch.bool), valid.T[None]], dim=-1), torch.zeros(1, 3).long())
    logbook = Logbook(tmp_path, 0, num_heads=4)
    logbook.board.write_histograms(20, sums.over_ranks(None))
    logbook.close()
    # Head 3 had no valid pair: there is nothing to draw.
    assert not (tmp_path / "tensorboard" / "head_3").exists()
    (first,), (second,) = (events_of(tmp_path, f"head_{head}").Histograms("selection/excess") for head in (1, 2))
    assert (first.step, first.histogram_value.num, second.histogram_value.num) == (20, 3, 3)
    drawn = first.histogram_value
    filled = [(limit, count) for limit, count in zip(drawn.bucket_limit, drawn.bucket, strict=True) if count]
    assert filled == [(-0.9375, 1.0), (0.0625, 2.0)]
    assert (drawn.min, drawn.max) == (-1.0, 0.0625)
    assert drawn.sum == pytest.approx(excess[0].sum(), abs=3 * EXCESS_BIN_WIDTH / 2)
    assert drawn.sum_squares == pytest.approx((excess[0] ** 2).sum(), abs=3 * EXCESS_BIN_WIDTH)
    assert [count for count in second.histogram_value.bucket if count] == [3.0]
    assert second.histogram_value.min <= 2.5 <= second.histogram_value.max


def test_the_custom_scalars_draw_bands_and_sources_and_the_ratio_last(tmp_path):
    logbook = Logbook(tmp_path, 0, num_heads=4, held_out=["web", "a.b"])
    for name in ("web", "a.b", "axb"):
        logbook.write(validation_record(0, (5.0, 5.1, 5.2, 5.3)) | {"set": name})
    sources = {f"enrichment_head_1_source_{name}": 0.5 for name in ("prose", "noise")}
    more = {"selected_loss_head_1": 3.0, "rejected_loss_head_1": 2.0, "agreement": 0.4}
    more |= {"agreement_head_1_head_2": 0.5, "agreement_head_1_head_3": 0.3, "agreement_head_2_head_3": 0.4}
    logbook.write(training_record(1, **sources, **more))
    logbook.close()
    # Tags are regular expressions, but not a band's: each must match one card and no other.
    found, layout = scalars(tmp_path), charts(tmp_path)
    drawn = {title: [place for place in found for tag in tags if re.search(tag, place[1])] for title, tags in layout.items()}
    heads = ["", "head_0", "head_1", "head_2", "head_3"]
    assert drawn["policy loss"] == [(head, "train/loss") for head in heads]
    assert drawn["held-out loss (validation_web)"] == [(head, "validation_web/loss") for head in heads]
    assert drawn["held-out loss (validation_a.b)"] == [(head, "validation_a.b/loss") for head in heads]
    assert drawn["threshold of the excess loss"] == [(head, "selection/threshold") for head in heads[2:]]
    titles = {title.partition(":")[0].partition(" of ")[0]: title for title in layout}
    assert layout[titles["excess loss"]] == [f"selection/excess_{name}" for name in ("mean", "p10", "p90")]
    # Two heads' curve is the second one's, in its colour; that of all is in each chart.
    for first, others in ((1, ("head_2", "head_3")), (2, ("head_3",))):
        of_two = [(other, f"selection/agreement/with_head_{first}") for other in others]
        assert drawn[titles[f"agreement with head {first}"]] == [("", "selection/agreement"), *of_two]
    assert drawn[titles["enrichment by head 1"]] == [(f"source_{n}", "selection/enrichment/head_1") for n in ("noise", "prose")]
    assert list(drawn)[-1] == "selected ratio"
    assert {run for run, _ in drawn["selected ratio"]} == set(heads)


def test_a_validation_is_a_line_with_the_losses_of_each_head_and_what_head_0s_mean():
    record = {"loss_head_0": 1.0, "loss_head_1": 0.0, "perplexity_head_0": 2.71828, "bits_per_byte": 0.5}
    assert held_out_text(record) == "per head 1.000 0.000; perplexity 2.72, 0.500 bits per byte"
    diverged = {"loss_head_0": None, "loss_head_1": 2.0, "perplexity_head_0": None}
    assert held_out_text(diverged) == "per head none 2.000; perplexity none"


def test_a_run_without_further_heads_has_no_layout(tmp_path):
    Logbook(tmp_path, 0, num_heads=1).close()
    assert events_of(tmp_path).Tags()["tensors"] == []


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

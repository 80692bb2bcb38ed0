"""The places at which TensorBoard shows each quantity, as TensorBoard itself reads it."""

import re

import pytest
import torch
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pipeline.config import Settings
from pipeline.model.mtp import HeadLosses
from pipeline.runtime.event_files import EventFiles
from pipeline.runtime.logbook import Logbook, read_records
from pipeline.runtime.metrics import EXCESS_BIN_WIDTH, SelectionSums
from pipeline.runtime.tensorboard import is_drawn, place_of, split_of
from pipeline.weighting.selection import Selection
from tests.drawn import events_of, scalars
from tests.records import training_record, validation_record


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
        ("bits_per_byte_source_web", "validation", ("source_web", "validation/bits_per_byte")),
        ("perplexity_head_0_source_web", "validation", None),
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
    of_all = ": by head, and the objective (.)"
    assert drawn[f"policy loss{of_all}"] == [(head, "train/loss") for head in heads]
    assert drawn[f"held-out loss (validation_web){of_all}"] == [(head, "validation_web/loss") for head in heads]
    assert drawn[f"held-out loss (validation_a.b){of_all}"] == [(head, "validation_a.b/loss") for head in heads]
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


def test_a_run_without_further_heads_has_no_layout(tmp_path):
    Logbook(tmp_path, 0, num_heads=1).close()
    assert events_of(tmp_path).Tags()["tensors"] == []


def test_the_table_of_settings_shows_those_that_a_recipe_sets_and_head_0s_held_out_loss(tmp_path):
    settings = Settings().with_values(training={"learning_rate": 0.5}, run={"name": "mine"})
    files = EventFiles(tmp_path / "tensorboard", 0, num_heads=4, held_out=("web",))
    files.write_description(settings, 0)
    files.close()
    content = events_of(tmp_path).SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    assert {setting.name for setting in experiment.hparam_infos if setting.differs} == {"training.learning_rate", "run.name"}
    compared = [(metric.name.group, metric.name.tag) for metric in experiment.metric_infos]
    assert compared == [("head_0", "validation_web/loss"), ("", "validation_web/bits_per_byte")]

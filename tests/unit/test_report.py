"""Pages about runs: what they show of whole, unfinished, damaged and hostile run directories."""

import base64
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch.report import main
from pipeline.report.charts import Panel, panels_figure
from pipeline.report.colours import COLOURS, Look, looks_of
from pipeline.report.curves import MOST_POINTS, Curve, Enrichment, Metric, curve_of
from pipeline.report.errors import ReportError
from pipeline.report.figures import charts_of
from pipeline.report.page import number
from pipeline.report.run_files import read_run, read_runs

CONFIG = "training: {steps: 20, learning_rate: 0.001}\ndata: {path: 's3://KEY:SECRET@bucket/mix', seed: %d}\n"


def record(step: int, **values: Any) -> dict[str, Any]:
    """A record of three heads and two sources."""
    found: dict[str, Any] = {"step": step, "tokens": 100 * step, "tokens_per_second": 50.0, "learning_rate": 0.001}
    for head in range(3):
        found[f"loss_head_{head}"] = 5.0 + head - step / 20
        found[f"selected_ratio_head_{head}"] = 0.6 if head else 1.0
        for name, share in (("web", 0.9), ("noise", 0.3)):
            found[f"selected_ratio_head_{head}_source_{name}"] = share if head else 1.0
    return found | {"threshold_head_1": 0.5, "threshold_head_2": 0.25} | values


def made_run(path: Path, steps: int = 20, seed: int = 1, text: str = "") -> Path:
    path.mkdir(parents=True)
    lines = [record(step) for step in range(1, steps + 1)]
    lines += [record(steps, split="validation", bits_per_byte=2.125)] if steps else []
    path.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + text)
    path.joinpath("config.yaml").write_text(CONFIG % seed)
    return path


def write_events(path: Path, *events: dict[str, Any]) -> None:
    """Events that are a second apart, unless they say when they were."""
    path.mkdir(parents=True, exist_ok=True)
    known = [{"time": 1000.0 + number} | event for number, event in enumerate(events)]
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in known))


def start(**values: Any) -> dict[str, Any]:
    return {"event": "start", "began": 1000.0, "ranks": 1, "host": "n1"} | values


def resume(step: int, **values: Any) -> dict[str, Any]:
    return {"event": "resume", "step": step, "samples": 8 * step} | values


def step(number: int, **values: Any) -> dict[str, Any]:
    of_data = {"samples": 8 * number, "digest": "0", "waited": 0.0}
    return {"event": "step", "step": number, "applied": True, "logged": True} | of_data | values


def page_of(*runs: Path) -> str:
    output = runs[0].parent / "page.html"
    assert main([*map(str, runs), "-o", str(output)]) == 0
    return output.read_text(encoding="utf-8")


def pictures(page: str) -> dict[str, str]:
    """{description: SVG} of a page's pictures."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', page)
    return {about: base64.b64decode(content).decode() for about, content in found}


def test_a_page_has_losses_selection_and_sources_and_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "one"))
    shown = set(pictures(page))
    assert {"Policy loss by head", "Thresholds", "Enrichment of the sources", "Speed and memory"} <= shown
    assert "<td>2.125</td>" in page
    assert "finished" in page
    # No file and no address but those of the picture format's own name.
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [(5.21, "5.210"), (0.000123456, "0.0001235"), (1234.4, "1,234"), (1_234_567.8, "1,234,568"), (7, "7"), (None, "–")],
)
def test_a_number_has_its_digits_and_no_exponent_however_large(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_what_is_drawn_of_one_run_alone_is_not_spoken_of_with_several(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / name) for name in "ab"]
    texts = [" ".join(chart.text for chart in charts_of(read_runs(some))) for some in (runs[:1], runs)]
    assert [[word in text for word in ("band", "Dotted")] for text in texts] == [[True, True], [False, False]]


def test_each_run_of_several_has_a_row_of_panels_with_one_scale_for_all(tmp_path: Path) -> None:
    in_rows = {chart.heading: chart.columns for chart in charts_of(read_runs([made_run(tmp_path / name) for name in "ab"]))}
    # Runs with unlike numbers of heads have no common rows.
    fewer = made_run(tmp_path / "fewer") / "metrics.jsonl"
    records = [{k: v for k, v in json.loads(line).items() if "head_2" not in k} for line in fewer.read_text().splitlines()]
    fewer.write_text("".join(json.dumps(each) + "\n" for each in records))
    assert all(chart.columns is None for chart in charts_of(read_runs([tmp_path / "a", fewer.parent])))
    assert (in_rows["Enrichment of the sources"], in_rows["Selected and rejected pairs"], in_rows["Thresholds"]) == (2, 2, None)
    panels = [Panel("", [Curve("a", "a", [1.0, 2.0], [0.0, top])]) for top in (1.0, 800.0)]
    # matplotlib names each label of a scale in a comment.
    labels = [
        (panels_figure(panels, {"a": Look("red")}, columns=columns) or b"").count(b"<!-- 800 -->") for columns in (None, 1)
    ]
    assert labels == [1, 2]


def test_more_runs_than_there_are_colours_have_dashes_in_charts_legends_and_the_table(tmp_path: Path) -> None:
    names = [f"arm{number:02}" for number in range(12)]
    looks = looks_of(names)
    assert len(set(looks_of(list(map(str, range(100)))).values())) == 100
    chart = panels_figure([Panel("", [Curve(name, name, [1.0, 2.0], [0.0, 1.0]) for name in names])], looks) or b""
    # A line of 1.2 points is a run's: its curve, and its sample in the legend.
    line = r"fill: none;(?: stroke-dasharray: ([^;]+);)?[^\"]* stroke: (#\w+); stroke-width: 1.2"
    drawn = Counter(re.findall(line, chart.decode()))
    assert (len(drawn), set(drawn.values())) == (12, {2})

    # Runs of which there is nothing to draw yet have their rows.
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')
    page = page_of(*(tmp_path / name for name in names))
    assert len(set(re.findall(r'<svg class="swatch".*?</svg>', page))) == 12


def test_several_runs_are_told_apart_by_the_end_of_their_paths_and_by_settings_that_differ(tmp_path: Path) -> None:
    # A folder of runs stands for the runs in it.
    page = page_of(made_run(tmp_path / "a" / "run", seed=1), made_run(tmp_path / "b" / "run", seed=2).parent)
    differ = page.partition("Settings that differ")[2].partition("All settings")[0]
    assert "<td>data.seed</td><td>1</td><td>2</td>" in differ
    assert "training.steps" not in differ
    assert "a/run" in page


def test_text_that_comes_of_a_run_is_escaped_and_its_secrets_are_masked(tmp_path: Path) -> None:
    run = made_run(tmp_path / "<b>&amp;")
    hostile = record(21, **{'selected_ratio_head_0_source_"><script>alert(1)</script>$x_{$': 1.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(hostile) + "\n")
    (run / "environment.json").write_text(json.dumps({"command": ["train", "</pre><img src=x>", "s3://ME:HIDDEN@b"]}))
    page = page_of(run)
    assert "<script" not in page
    assert "<b>" not in page
    assert "<img src=x" not in page
    assert "&lt;b&gt;&amp;amp;" in page
    assert "SECRET" not in page
    assert "HIDDEN" not in page


def test_an_unfinished_and_damaged_run_is_shown_and_said(tmp_path: Path) -> None:
    run = made_run(tmp_path / "one", steps=7, text='{"step": 8, "lo')
    (run / "config.yaml").write_text("training: [")
    page = page_of(run)
    assert "1 damaged line(s) left out" in page
    assert "config.yaml: damaged" in page
    assert "not finished; step 7" in page
    assert "Policy loss by head" in pictures(page)


def test_the_training_of_a_runs_own_reference_is_no_restart(tmp_path: Path) -> None:
    run = made_run(tmp_path / "one", steps=1)
    write_events(run, start(time=1001.0), resume(0, time=1012.0), step(1, time=1014.0))
    write_events(run / "reference" / "training", start(time=1002.0), resume(0, time=1003.0), step(1, time=1010.0))
    seconds = read_run(run, "one").clock.seconds
    assert (seconds["reference"], seconds["productive"], seconds["restarts"]) == (7.0, 2.0, 5.0)


def test_a_rollback_has_a_row_of_its_own_beside_the_starts(tmp_path: Path) -> None:
    run = made_run(tmp_path / "one")
    rolled_back = [step(1), step(2), resume(1, skipped=[[8, 24]]), step(2)]
    write_events(run, start(), resume(0), *rolled_back, start(began=1060.0, host="n2", time=2000.0), resume(2))
    table = page_of(run).partition("Restarts and rollbacks")[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    assert [row[2:] for row in rows] == [["n1", "1", "0"], ["", "", "1, after a loss spike"], ["n2", "1", "2"]]
    assert [row[1] for row in rows] == ["1970-01-01 00:16:40 UTC", "1970-01-01 00:16:44 UTC", "1970-01-01 00:17:40 UTC"]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([{"event": "end", "code": 75}], "stopped on request, with more to do; step 20 of 20"),
        ([{"event": "end", "error": "DivergedError"}], "not finished: ended by DivergedError; step 20 of 20"),
        ([{"event": "end", "code": 0}], "finished, 20 steps"),
        ([start()], "not finished; step 20 of 20"),
        ([{"event": "end", "code": 0}, start(), resume(20)], "not finished; step 20 of 20"),
    ],
)
def test_a_page_says_how_a_run_has_ended(tmp_path: Path, ends: list[dict[str, Any]], said: str) -> None:
    run = made_run(tmp_path / "one")
    write_events(run, start(), resume(0), *map(step, range(1, 21)), *ends)
    assert read_run(run, "one").state == said


def test_an_empty_run_beside_another_is_said_and_alone_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, full = made_run(tmp_path / "empty", steps=0), made_run(tmp_path / "full")
    assert "empty: metrics.jsonl: no step has been logged" in page_of(full, empty)
    assert main([str(empty), "-o", str(tmp_path / "none.html")]) == 2
    assert "no step has been logged yet" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


HUGE = f'{{"step": 1, "loss": {10**400}}}'


@pytest.mark.parametrize(
    "content", ["", "\0\0\0", "[]\n{}", '{"step": true}', HUGE, '{"step": 1}', '{"step": 1, "loss_head_0": "x"}']
)
def test_records_without_anything_to_draw_end_in_a_page_or_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(f"{content}\n")
    is_a_record = '"step": 1' in content and content != HUGE
    assert main([str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == (0 if is_a_record else 2)


def test_what_is_no_run_and_runs_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="expected a run directory"):
        read_run(tmp_path, "x")
    run = made_run(tmp_path / "run")
    with pytest.raises(ReportError, match="named twice"):
        read_runs([run, tmp_path / "." / "run"])


def test_a_long_curve_is_averaged_in_stretches_and_gaps_stay_gaps(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "run"), "run")
    records = [{"step": step, "loss": math.nan if step == 1 else float(step)} for step in range(10 * MOST_POINTS)]
    curve = curve_of(run, records, Metric("loss"), "a", "a")
    assert len(curve.x) == MOST_POINTS
    assert curve.y[0] == pytest.approx(sum([0, *range(2, 10)]) / 9)
    assert curve.y[-1] == pytest.approx(10 * MOST_POINTS - 5.5)
    short = curve_of(run, [{"step": 1, "loss": None}, {"step": 2, "loss": 3}], Metric("loss"), "a", "a")
    assert (math.isnan(short.y[0]), short.y[1]) == (True, 3.0)


def test_enrichment_is_computed_of_records_that_do_not_have_it() -> None:
    assert Enrichment(1, "web")(record(1)) == pytest.approx(1.5)
    assert Enrichment(1, "web")(record(1, enrichment_head_1_source_web=1.25)) == 1.25
    assert Enrichment(1, "gone")(record(1)) is None


def test_the_same_curves_give_the_same_bytes_and_labels_are_plain_text() -> None:
    curves = [Curve(label, label, [1.0, 2.0], [3.0, 4.0]) for label in ("_hidden", "cost in $a", "$x_{", "数")]
    one, two = (panels_figure([Panel("a $title", curves)], looks_of([c.key for c in curves])) for _ in range(2))
    assert one is not None
    assert one == two
    assert panels_figure([Panel("nothing", [Curve("a", "a", [1.0], [math.nan])])], {"a": Look(COLOURS[0])}) is None

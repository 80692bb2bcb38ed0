"""The table of README's "What it buys" is the committed summary of the experiment, to the digit."""

import json
import re

from tests.forked import ROOT

SUMMARY = ROOT / "launch" / "recipes" / "experiment" / "results-1.json"


def test_readme_has_the_figures_of_the_committed_summary() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What it buys")[2].partition("\n## ")[0]
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `([\w.]+)` \| [^|]+ \| (.*) \|$", section, re.MULTILINE)}
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    assert list(rows) == list(summary["arms"])
    for name, arm in summary["arms"].items():
        spread = "" if arm["standard_deviation"] is None else f" ± {arm['standard_deviation']:.3f}"
        accepted = "" if arm["accepted_per_step"] is None else f"{arm['accepted_per_step']:.2f}"
        found = [cell.strip() for cell in rows[name].split("|")]
        assert found == [f"{arm['bits_per_byte']:.3f}{spread}", f"{arm['at_equal']['flops']:.3f}", accepted], name

    # What is primary is quoted with its interval, and what the experiment calls itself is said.
    for each in (each for each in summary["comparisons"] if each["primary"]):
        low, high = sorted((abs(each["low"]), abs(each["high"])))
        assert all(f"{value:.3f}" in section for value in (abs(each["mean"]), low, high)), each
    assert ("**invalid**" in section) is not summary["valid"]

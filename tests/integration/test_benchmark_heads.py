"""The benchmarks through their command line, at sizes that show their form and not their speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_heads_measures_every_variant_beside_plain_logits(tmp_path: Path) -> None:
    sizes = {"--tokens": 64, "--dim": 32, "--vocabulary": 5000, "--heads": 4, "--rounds": 3}
    command = [sys.executable, str(ROOT / "launch" / "benchmark.py"), "heads", "--json", str(tmp_path / "figures.json")]
    command += [str(word) for option in sizes.items() for word in option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    variants = figures["variants"]
    expected = {"plain", "two_pass", "predicted", "one_head"}
    expected |= {"linear_cross_entropy"} if hasattr(torch.nn.functional, "linear_cross_entropy") else set()
    assert expected <= set(variants)
    for name, own in variants.items():
        assert set(own) == {"seconds", "peak_bytes", "time_ratio", "peak_ratio"}
        assert own["time_ratio"] == pytest.approx(own["seconds"] / variants["plain"]["seconds"])
        assert own["peak_ratio"] == pytest.approx(own["peak_bytes"] / variants["plain"]["peak_bytes"])
        assert name in done.stdout
    assert variants["plain"]["time_ratio"] == variants["plain"]["peak_ratio"] == 1.0
    # All logits of four heads are 5 MB; a quarter of one head's is 0.3 MB.
    assert variants["plain"]["peak_bytes"] > 4 * 64 * 5000 * 4
    assert variants["predicted"]["peak_bytes"] < variants["plain"]["peak_bytes"] / 2
    assert max(figures["gradient_error"].values()) < 1e-5
    assert set(figures["gradient_error"]) == set(variants) - {"plain", "one_head"}
    assert 0.5 < figures["hit_rate"]["least"] < figures["hit_rate"]["most"] <= 1.0
    assert f"{figures['hit_rate']['mean']:.3f}" in done.stdout

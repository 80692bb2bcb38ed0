"""Samples while a model trains under ZeRO-3, on two ranks: taken at their interval, and without a trace in the training."""

from pathlib import Path
from typing import Any

from pipeline.audit.report import audit
from pipeline.storage.json_lines import read_json_lines
from tests.lives import difference, left_by, live, write_recipe

STEPS = 5


def lived(folder: Path, name: str, recipe: Path, *settings: str) -> tuple[dict[str, Any], str]:
    """What a run of two ranks leaves, without the settings that differ, and what its first rank printed."""
    life = live(folder / name, recipe, 2, settings=settings)
    assert life.codes == [0, 0], life.printed
    left = left_by(folder / name)
    for setting in ("samples_every", "sample_tokens"):
        del left["state"]["identity"][f"logging.{setting}"]
    return left, life.printed[0]


def test_a_run_that_takes_samples_is_to_the_bit_the_one_that_takes_none(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_data, tiny_reference, STEPS)
    without, _ = lived(tmp_path, "without", recipe, "logging.samples_every=null")
    taken, printed = lived(tmp_path, "with", recipe, "logging.samples_every=2", "logging.sample_tokens=6")
    assert difference(taken, without) == ""
    assert not (tmp_path / "without" / "samples.jsonl").exists()

    samples = [line.value for line in read_json_lines(tmp_path / "with" / "samples.jsonl")]
    assert sorted({sample["step"] for sample in samples}) == [2, 4]
    for sample in samples:
        assert len(sample["plain_ids"]) == 6
        assert sample["plain_ids"] == sample["self_speculative_ids"]
        assert isinstance(sample["plain"], str)
        assert 1 <= sample["accepted_per_step"] <= 4
    assert "step 4: sample " in printed

    # The time that samples take is an evaluation's.
    assert audit(tmp_path / "with").problems == []

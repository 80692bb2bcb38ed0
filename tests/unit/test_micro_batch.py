"""`data.micro_batch: auto`, and the demo on any number of ranks that a machine has GPUs."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.checks import size_problems
from pipeline.config import ConfigError, Settings
from pipeline.data.loading.stream import Stream
from pipeline.planning.advice import usable_bytes, verdict
from pipeline.planning.micro_batch import with_micro_batch
from pipeline.planning.plan import plan_memory
from pipeline.planning.resolve import resolve_planned_job
from pipeline.recipe import load_settings
from tests.data_sets import numbered_data

DEMO = load_settings(Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml")
CONTENT: dict[str, Any] = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}


def rows_of_a_step(data: Path, settings: Settings, ranks: int) -> list[int]:
    """The rows of the second step in the order of the global batch, each by the number in its first token."""
    sizes = settings.data
    rows = []
    streams = [
        Stream(
            data, lanes=24, global_batch=sizes.global_batch, micro_batch=sizes.rows_per_rank, rank=rank, world_size=ranks,
            seed=0, shuffle_block=8,
        ).iterate(sizes.global_batch)
        for rank in range(ranks)
    ]  # fmt: skip
    for _ in range(sizes.global_batch // (sizes.rows_per_rank * ranks)):
        for stream in streams:
            rows += [int(tokens[0]) // 10 for tokens in next(stream).tokens_BT]
    return rows


def test_the_demo_trains_on_the_same_samples_on_one_to_eight_ranks(tmp_path: Path) -> None:
    data = numbered_data(tmp_path / "data", 100)
    found = {}
    for ranks in (1, 2, 3, 4, 6, 8):
        assert size_problems(DEMO, ranks) == []
        settings = with_micro_batch(DEMO, CONTENT, ranks, False, 2**34)
        assert settings.data.rows_per_rank * ranks == 24
        found[ranks] = rows_of_a_step(data, settings, ranks)
    assert len(set(found[1])) == 24
    assert all(rows == found[1] for rows in found.values())


@pytest.mark.parametrize("ranks", [5, 7])
def test_the_demo_on_a_number_of_ranks_that_does_not_fit_lists_those_that_do(ranks: int) -> None:
    (problem,) = size_problems(DEMO, ranks)
    assert "numbers of ranks that fit: 1, 2, 3, 4, 6, 8, 12, 24" in problem
    assert f"for {ranks} ranks write data.global_batch=" in problem


def fits(settings: Settings, rows: int, memory: float) -> bool:
    sized = settings.with_values(data={"micro_batch": rows})
    job = resolve_planned_job(sized, CONTENT, 4, True, memory)[0]
    return verdict(plan_memory(job), usable_bytes(job, memory)) == "fits"


def test_the_micro_batch_is_the_largest_divisor_of_a_ranks_lanes_that_fits_the_memory_by_the_plan() -> None:
    model = {"dim": 1024, "num_layers": 12, "num_attention_heads": 16, "vocab_size": 32_000}
    data = {"path": Path("nowhere"), "global_batch": 192, "lanes": 96, "micro_batch": "auto", "sequence_length": 2048}
    settings = Settings.model_validate({"data": data, "model": model, "training": {"k_percent": 1}})
    chosen = {}
    for gib in (6, 16, 32, 80):
        chosen[gib] = with_micro_batch(settings, CONTENT, 4, True, gib * 2**30).data.rows_per_rank
        expected = [rows for rows in (1, 2, 3, 4, 6, 8, 12, 24) if fits(settings, rows, gib * 2**30)]
        assert chosen[gib] == max(expected, default=1)
    assert chosen[6] < chosen[16] < chosen[32] < chosen[80] == 24
    # Without a known memory the divisors alone decide.
    assert with_micro_batch(settings, CONTENT, 4, True, None).data.micro_batch == 24


def test_auto_without_a_known_vocabulary_is_an_error_of_the_settings() -> None:
    settings = Settings.model_validate({"data": {"path": Path("nowhere"), "micro_batch": "auto"}})
    with pytest.raises(ConfigError, match=r"data\.micro_batch: auto needs the vocabulary"):
        with_micro_batch(settings, CONTENT, 1, False, 2**34)

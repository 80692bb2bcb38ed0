"""Cached reference losses on two ranks: the same training as with the live reference, and nothing stale is taken."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, Settings
from pipeline.data.errors import DataError
from pipeline.data.shards.losses_writer import LossesWriter
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reference_losses import (
    CachedLosses,
    LossesManifest,
    ReferenceLosses,
    data_fingerprint,
    read_losses_manifest,
)
from pipeline.recipe import load_settings
from pipeline.runtime.metrics import OF_THE_MACHINE
from tests.integration.test_pipeline_rho1 import DEEPSPEED_JSON, job_on_this_rank, settings_for
from tests.ranks import run_ranks

# 29 held-out rows: the last micro-step of a validation is padded.
SHORT = (
    "training.steps=4",
    "logging.selection_every=4",
    "checkpoint.every=4",
    "logging.validation_samples=29",
    "logging.passage_every=2",
)


def score_then_train(settings: Settings, cache: Path, dtype: str, run_dir: Path) -> dict[str, Any]:
    """Score, train with what was kept and, for comparison, with the live reference."""
    from pipeline.job import run_job
    from pipeline.runtime.preemption import StopRequest
    from pipeline.scoring import score

    once = score(job_on_this_rank(settings, run_dir / "unused"), settings, cache, dtype, StopRequest())
    again = score(job_on_this_rank(settings, run_dir / "unused"), settings, cache, dtype, StopRequest())  # Finds it done.
    assert (once, again) == (0, 0)
    cached = settings.with_values(reference={"path": None, "cached": cache})
    codes = [run_job(job_on_this_rank(each, run_dir / name), StopRequest()) for name, each in (("c", cached), ("l", settings))]
    return {"exit_codes": codes}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    timed = OF_THE_MACHINE
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


@pytest.fixture(scope="module")
def scored(tiny_data: Path, tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("scored")
    settings = settings_for(tiny_data, tiny_reference, *SHORT)
    answers = run_ranks(score_then_train, 2, settings, directory / "cache", "float32", directory)
    return {"directory": directory, "cache": directory / "cache", "settings": settings, "answers": answers}


@pytest.mark.slow
def test_training_with_cached_losses_is_training_with_the_live_reference_to_the_bit(scored) -> None:
    assert [answer["exit_codes"] for answer in scored["answers"]] == [[0, 0], [0, 0]]
    cached, live = lines(scored["directory"] / "c"), lines(scored["directory"] / "l")
    assert len(live) == 6
    assert cached == live

    # The coloured passage too, by the page's own words.
    pages = [[file.read_text() for file in sorted((scored["directory"] / run / "passages").glob("*.html"))] for run in "cl"]
    assert len(pages[0]) == 2
    assert pages[0] == pages[1]


def test_every_token_has_the_loss_that_the_reference_gives_it(scored, tiny_data: Path, tiny_reference: Path) -> None:
    import torch

    from pipeline.data.loading.batch import collate
    from pipeline.data.shards.reader import ShardReader
    from pipeline.model.huggingface import load_weights, read_model_settings
    from pipeline.model.mtp import MTPModel
    from tests.unit.test_model import losses_by_hand

    model = MTPModel(read_model_settings(tiny_reference))
    load_weights(model, tiny_reference)
    data = read_manifest(tiny_data / "train")
    sha256 = data_fingerprint((tiny_data / "train" / "manifest.json").read_bytes())
    losses = ReferenceLosses(CachedLosses(scored["cache"], read_losses_manifest(scored["cache"], sha256, "train")), data)
    reader = ShardReader(tiny_data / "train", data)
    for shard, sample in ((0, 0), (0, data.shards[0].samples - 1), (len(data.shards) - 1, 1)):
        batch = collate([reader.read(shard, sample)])
        with torch.no_grad():
            by_hand = losses_by_hand(model, batch.tokens_BT, batch.document_ids_BT)
        found = losses.read(shard, sample)
        assert found.shape == (16, 1)
        for position in range(15):
            expected = float(by_hand.get((0, position, 0), 0.0))
            assert found[position + 1, 0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    losses.close()
    reader.close()


def score_again(settings: Settings, cache: Path, dtype: str, run_dir: Path, asked_to_stop: bool = False) -> str:
    from pipeline.runtime.preemption import StopRequest
    from pipeline.scoring import score

    stop = StopRequest()
    if asked_to_stop:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        exit_code = score(job_on_this_rank(settings, run_dir), settings, cache, dtype, stop)
    except (ConfigError, DataError) as error:
        return str(error)
    return "scored" if exit_code == 0 else f"exit code {exit_code}"


@pytest.mark.slow
def test_scoring_goes_on_where_it_was_and_ends_with_the_same_bytes(scored, tmp_path: Path) -> None:
    """One rank, of which half of the pieces are there already."""
    cache = shutil.copytree(scored["cache"], tmp_path / "cache")
    (done,) = (path for path in cache.iterdir() if len(list(path.glob("*.losses"))) > 1)
    partial = done.rename(done.with_name(f"{done.name}.partial"))
    names = sorted(path.name.removesuffix(".losses") for path in partial.glob("*.losses"))
    # A byte that scoring would not give shows that the piece is not made again.
    finished = bytearray((partial / f"{names[0]}.losses").read_bytes())
    finished[7] ^= 1
    data = read_manifest(scored["settings"].data.path)
    manifest = LossesManifest.model_validate_json((partial / "manifest.json").read_bytes())
    LossesWriter(cache, manifest, data).write((0, 0, data.shards[0].samples), np.frombuffer(finished, "<f4").reshape(-1, 16, 1))
    (partial / f"{names[0]}.losses").unlink()
    for name in names[1:]:
        (partial / f"{name}.losses").unlink()
    for half_written in (f"{names[1]}.00000000.piece.1-1.tmp", f"{names[1]}.losses.1-1.tmp"):
        (partial / half_written).write_bytes(b"half of")
    there = len(list(partial.glob("*.piece")))
    # A signal is heeded after the piece in hand, which is kept.
    assert run_ranks(score_again, 1, scored["settings"], cache, "float32", tmp_path / "run", True) == ["exit code 75"]
    assert len(list(partial.glob("*.piece"))) == there + 1
    assert run_ranks(score_again, 1, scored["settings"], cache, "float32", tmp_path / "run") == ["scored"]
    assert (done / f"{names[0]}.losses").read_bytes() == finished
    for name in names[1:]:
        for suffix in ("losses", "losses.crc32"):
            assert (done / f"{name}.{suffix}").read_bytes() == (scored["cache"] / done.name / f"{name}.{suffix}").read_bytes()
    assert not [*done.glob("*.piece*"), *done.glob("*.tmp")]


@pytest.mark.slow
def test_half_precision_is_half_the_size_and_as_near_as_it_says(scored, tiny_data: Path, tmp_path: Path) -> None:
    assert run_ranks(score_again, 1, scored["settings"], tmp_path / "half", "float16", tmp_path / "run") == ["scored"]
    data = read_manifest(tiny_data / "train")
    sha256 = data_fingerprint((tiny_data / "train" / "manifest.json").read_bytes())
    readers = []
    for cache in (tmp_path / "half", scored["cache"]):
        readers.append(ReferenceLosses(CachedLosses(cache, read_losses_manifest(cache, sha256, "train")), data))
    half, whole = (np.stack([reader.read(0, sample) for sample in range(data.shards[0].samples)]) for reader in readers)
    assert not (half == whole).all()
    assert (abs(half - whole) <= whole / 2048).all()
    other = run_ranks(score_again, 1, scored["settings"], scored["cache"], "float16", tmp_path / "run")
    assert "was made with other settings (dtype)" in other[0]
    for reader in readers:
        reader.close()


def problems_with(settings: Settings, run_dir: Path) -> list[str]:
    from pipeline.checks import check_before_start
    from pipeline.runtime.distributed import World

    with pytest.raises(ConfigError) as caught:
        check_before_start(settings, DEEPSPEED_JSON, run_dir, World(0, 1, 0, 1))
    return caught.value.problems


def refusal(settings: Settings, run_dir: Path) -> str:
    from pipeline.assembly import resolve_settings

    job = job_on_this_rank(settings, run_dir)
    with pytest.raises(DataError) as caught:
        resolve_settings(job, settings, run_dir)
    return str(caught.value)


def test_losses_of_other_data_another_reference_or_another_horizon_are_refused(
    scored, tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    cached = scored["settings"].with_values(reference={"cached": scored["cache"]})
    changed = shutil.copytree(tiny_data / "train", tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest))  # The same content in other bytes: it might be any.
    (problem,) = problems_with(cached.with_values(data={"path": changed}), tmp_path / "run")
    assert problem.startswith(f"reference.cached: {scored['cache']}: no reference losses of {changed} as it is now")

    other = shutil.copytree(tiny_reference, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    (refused,) = run_ranks(refusal, 1, cached.with_values(reference={"path": other}), tmp_path / "run")
    assert "were made with reference_sha256" in refused

    # The held-out data's losses come from another reference than the training data's.
    mixed = shutil.copytree(scored["cache"], tmp_path / "mixed")
    held_out = next(path for path in mixed.glob("*/manifest.json") if len(list(path.parent.glob("*.losses"))) == 1)
    held_out.write_text(json.dumps(json.loads(held_out.read_text()) | {"reference_sha256": "f" * 64}))
    (problem,) = problems_with(cached.with_values(reference={"path": None, "cached": mixed}), tmp_path / "run")
    assert problem.endswith("the sets of one run need the losses of one reference, stored alike: score one of them again")

    matched = cached.with_values(reference={"path": None, "horizon": "matched"})
    assert "were made with horizon shifted" in problems_with(matched, tmp_path / "run")[0]
    nowhere = cached.with_values(reference={"cached": tmp_path / "none"})
    assert "it has no reference losses at all; score it with launch/score.py" in problems_with(nowhere, tmp_path / "run")[0]


def test_damaged_losses_are_named_by_shard_and_sample(scored, tiny_data: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(scored["cache"], tmp_path / "cache")
    data = read_manifest(tiny_data / "train")
    sha256 = data_fingerprint((tiny_data / "train" / "manifest.json").read_bytes())
    file = cache / sha256[:16] / f"{data.shards[0].name}.losses"
    content = bytearray(file.read_bytes())
    content[5 * 64 + 3] ^= 1
    file.write_bytes(content)
    reader = ReferenceLosses(CachedLosses(cache, read_losses_manifest(cache, sha256, "train")), data)
    reader.read(0, 4)
    with pytest.raises(DataError, match=f"the reference losses of shard {data.shards[0].name}, sample 5, in .* are damaged"):
        reader.read(0, 5)
    file.write_bytes(content[:-64])
    with pytest.raises(DataError, match=f"sample {data.shards[0].samples - 1}, "):
        reader.read(0, data.shards[0].samples - 1)
    reader.close()


def test_a_cache_and_a_reference_to_train_are_not_both_meant() -> None:
    with pytest.raises(ConfigError, match=r"reference.training_steps: set, and so is reference.cached"):
        load_settings(None, ["data.path=x", "reference.cached=y", "reference.training_steps=3", "reference.training_data=z"])


def changed_reference(reference: Path, directory: Path, name: str, value: float) -> Path:
    """The same reference with one value of a tensor replaced."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(reference, directory)
    weights = load_file(directory / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, directory / "model.safetensors")
    return directory


def answers_of(settings: Settings, cache: Path, run_dir: Path, dtype: str = "float32") -> tuple[str, bool]:
    """(error of scoring, whether all ranks were said to raise it)."""
    from pipeline.model.huggingface import ModelFilesError
    from pipeline.runtime.preemption import StopRequest
    from pipeline.scoring import score

    with pytest.raises((DataError, ModelFilesError)) as caught:
        score(job_on_this_rank(settings, run_dir), settings, cache, dtype, StopRequest())
    return str(caught.value), caught.value.agreed


def test_a_reference_with_a_value_that_is_not_finite_is_refused_by_the_tensors_name(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    poisoned = changed_reference(tiny_reference, tmp_path / "poisoned", down, float("nan"))
    settings = settings_for(tiny_data, poisoned, *SHORT)
    for sharding in ("zero3", "replicate"):
        chosen = settings.with_values(reference={"sharding": sharding})
        for error, agreed in run_ranks(answers_of, 2, chosen, tmp_path / "cache", tmp_path / "run"):
            assert error.startswith(f"{poisoned}: values that are not finite (NaN or infinite) in {down};")
            assert agreed


def test_scoring_stops_at_the_first_loss_that_is_not_finite_and_names_the_sample(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    # A finite weight, by which every logit overflows.
    overflowing = changed_reference(tiny_reference, tmp_path / "overflowing", "model.norm.weight", 3e38)
    settings = settings_for(tiny_data, overflowing, *SHORT)
    for error, agreed in run_ranks(answers_of, 2, settings, tmp_path / "cache", tmp_path / "run"):
        assert re.search(
            rf"the reference {overflowing} gives a loss that is not finite in sample shard-\d+/\d+, token \d+: ", error
        )
        assert agreed
    assert not list((tmp_path / "cache").rglob("*.piece"))


def test_a_loss_too_large_for_the_dtype_of_the_cache_is_not_called_infinite(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    large = changed_reference(tiny_reference, tmp_path / "large", "model.norm.weight", 1e9)
    settings = settings_for(tiny_data, large, *SHORT)
    for error, _ in run_ranks(answers_of, 2, settings, tmp_path / "cache", tmp_path / "run", "float16"):
        assert re.search(r"a loss that is too large for float16 \(--dtype float32 holds it\) in sample ", error)

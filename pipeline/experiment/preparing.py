"""Make what all runs of an experiment share: the data, two references with their losses, the oracle's scores, filtered data.

Each is made once and kept: a folder that exists is complete. The references are runs like the others; they train on the clean
text alone, one with the next-token head, one with all heads.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Settings
from pipeline.data.loading.order import EpochOrder
from pipeline.data.shards.external_scores import import_scores
from pipeline.data.shards.manifest import Manifest, read_manifest
from pipeline.data.shards.output_folder import atomic_folder
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.reference_losses import CachedLosses, ReferenceLosses, data_fingerprint, read_losses_manifest
from pipeline.data.tokenizer import load_tokenizer
from pipeline.derived import lanes_of
from pipeline.experiment.corpus import (
    CLEAN_SOURCES,
    DOCUMENT_FILE,
    KIND_FILE,
    LabelledDocument,
    labels,
    write_corpus,
    write_rows,
)
from pipeline.experiment.plan import Plan, RunName, Sections, joined, settings_of
from pipeline.experiment.runs import Work, run_all, training

REFERENCES = {"shifted": 1, "matched": 4}
"""The references by the horizon that they serve, with their numbers of heads."""


def prepare(plan: Plan, directory: Path, slots: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Make all that is shared and not there yet."""
    corpus = directory / "data" / "corpus"
    if not corpus.is_dir():
        say("writing the corpus")
        write_corpus(corpus, plan.corpus)
    recipes = {horizon: _reference_settings(plan, horizon, directory) for horizon in REFERENCES}
    run_all([training(directory, f"reference-{name}", each) for name, each in recipes.items()], directory, slots, say)
    run_all([_export(directory, horizon) for horizon in REFERENCES], directory, slots, say)
    run_all([_score(plan, directory, horizon) for horizon in REFERENCES], directory, slots, say)

    if not (directory / "data" / "filtered").is_dir():
        _write_filtered(plan, directory)
    for seed in (0, *plan.seeds):
        _write_oracle(directory, seed)


def _reference_settings(plan: Plan, horizon: str, directory: Path) -> Settings:
    data = directory / "data" / "corpus"
    own: Sections = {
        "run": {"name": f"reference-{horizon}"},
        "data": {"path": data / "clean", "validation_path": {name: data / "validation" / name for name in CLEAN_SOURCES}},
        "model": {"num_prediction_heads": REFERENCES[horizon], "seed": 1000},
        "training": {
            "steps": plan.reference_steps,
            "learning_rate": plan.reference_learning_rate,
            "k_percent": 1,
            "head_weights": None,
        },
    }
    return Settings.model_validate(joined(plan.base, own))


def _export(directory: Path, horizon: str) -> Work:
    folder = directory / "references" / horizon
    arguments = ["export.py", str(directory / "runs" / f"reference-{horizon}"), str(folder)]
    return Work(f"export-{horizon}", arguments, (folder / "config.json").is_file)


def _score(plan: Plan, directory: Path, horizon: str) -> Work:
    """Score the mix and the held-out text, with the settings that the arms have."""
    settings = settings_of(plan, RunName(next(iter(plan.arms)), 1e-3, 0), directory).with_values(
        model={"num_prediction_heads": REFERENCES["matched"]},
        reference={"path": directory / "references" / horizon, "horizon": horizon, "cached": None},
        training={"k_percent": 0.6, "head_weights": None, "selection_score": "excess", "external_scores": None},
        data={"path": directory / "data" / "corpus" / "mix"},
    )
    work = training(directory, f"score-{horizon}", settings)
    cache = directory / "losses" / horizon
    script, *arguments = work.arguments
    assert script == "train.py"
    return Work(
        work.name, ["score.py", *arguments, "--output", str(cache)], lambda: len(list(cache.glob("*/manifest.json"))) >= 3
    )


def losses_of(data: Path, cache: Path) -> np.ndarray:
    """Read all cached losses of a data set, float32 [samples, T, C]."""
    manifest = read_manifest(data)
    losses = read_losses_manifest(cache, data_fingerprint((data / "manifest.json").read_bytes()), str(data))
    reader = ReferenceLosses(CachedLosses(cache, losses), manifest)
    found = [reader.read(shard, row) for shard, of in enumerate(manifest.shards) for row in range(of.samples)]
    reader.close()
    return np.stack(found)


def tokens_of(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a data set: their tokens [samples, T], and their numbers of tokens that are not padding [samples]."""
    manifest = read_manifest(data)
    reader = ShardReader(data, manifest)
    samples = [
        sample
        for shard, of in enumerate(manifest.shards)
        for sample in reader.read_many([shard] * of.samples, list(range(of.samples)))
    ]
    reader.close()
    return np.stack([sample.tokens for sample in samples]), np.array([sample.lengths.sum() for sample in samples])


def _write_filtered(plan: Plan, directory: Path) -> None:
    """Keep the documents with the lowest mean reference loss, as many tokens as a selection of k_percent keeps."""
    mix = directory / "data" / "corpus" / "mix"
    documents_ST, kinds_ST = labels(mix, DOCUMENT_FILE), labels(mix, KIND_FILE)
    losses_ST = losses_of(mix, directory / "losses" / "shifted")[..., 0]
    tokens_ST, _ = tokens_of(mix)
    is_token_ST = documents_ST >= 0
    of_token, losses = documents_ST[is_token_ST], losses_ST[is_token_ST]
    counts = np.bincount(of_token)
    mean = np.bincount(of_token, weights=losses) / np.maximum(counts, 1)
    order = np.argsort(mean, kind="stable")
    kept = order[np.cumsum(counts[order]) <= float(plan.base["training"]["k_percent"]) * counts.sum()]

    ids, kinds = tokens_ST[is_token_ST].astype(np.uint32), kinds_ST[is_token_ST]
    parts = [
        LabelledDocument(ids[where], kinds[where], 0) for where in (of_token == number for number in sorted(kept.tolist()))
    ]
    tokenizer = load_tokenizer(mix)
    with atomic_folder(directory / "data" / "filtering") as partial:
        write_rows(parts, partial / "filtered", tokenizer, plan.corpus)
    (directory / "data" / "filtering" / "filtered").rename(directory / "data" / "filtered")


def _write_oracle(directory: Path, seed: int) -> None:
    """External scores 1 + u for clean tokens and u for noise, u uniform by seed, of the mix and of the held-out text."""
    scores = directory / "scores" / str(seed)
    for data in (directory / "data/corpus/mix", *(directory / "data/corpus/validation" / name for name in CLEAN_SOURCES)):
        kinds_ST = labels(data, KIND_FILE)
        drawn_ST = np.random.default_rng(seed).random(kinds_ST.shape, np.float32) * 0.5
        file = directory / "scores" / f"{seed}-{data.name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, (drawn_ST + (kinds_ST == 0)).astype(np.float32))
        import_scores(file, data, scores)


def clean_share(plan: Plan, directory: Path, run: RunName) -> list[tuple[int, float]]:
    """k_percent over time at which a run that ranks clean tokens first takes no noise: in each step the share of clean targets
    among the valid pairs of the head that has fewest."""
    settings = settings_of(plan, run, directory)
    data = directory / "data" / "corpus" / "mix"
    manifest, kinds_ST, documents_ST = read_manifest(data), labels(data, KIND_FILE), labels(data, DOCUMENT_FILE)
    order = EpochOrder(
        [shard.samples for shard in manifest.shards],
        lanes=lanes_of(settings),
        seed=run.seed,
        shuffle_block=settings.data.shuffle_block,
    )
    first = _first_samples(manifest)
    pieces = []
    for step in range(plan.steps):
        rows = range(step * settings.data.global_batch, (step + 1) * settings.data.global_batch)
        located = [order.locate_row(row) for row in rows]
        numbers = [first[shard] + sample for _, shard, sample in located]
        pieces.append((step, _share(kinds_ST[numbers], documents_ST[numbers], settings.model.num_prediction_heads)))
    return pieces


def _share(kinds_BT: np.ndarray, documents_BT: np.ndarray, num_heads: int) -> float:
    """The largest k_percent that selects no more pairs than there are clean ones, for each selecting head: k · n + 0.5 rounds
    down to at most as many."""
    shares = []
    for head in range(1, num_heads):
        distance = 1 + head
        is_valid_BT = (documents_BT[:, :-distance] == documents_BT[:, distance:]) & (documents_BT[:, distance:] >= 0)
        num_clean = int((is_valid_BT & (kinds_BT[:, distance:] == 0)).sum())
        if is_valid_BT.any():
            shares.append((num_clean + 0.4) / int(is_valid_BT.sum()))
    return float(min(1.0, *shares)) if shares else 1.0


def _first_samples(manifest: Manifest) -> list[int]:
    return np.cumsum([0, *(shard.samples for shard in manifest.shards)]).tolist()

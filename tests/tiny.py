"""Tiny prepared data and a tiny reference, made by the package's own code; the fixtures of tests/conftest.py are these."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 16


def make_tiny_data(directory: Path) -> Path:
    """Prepare `train`, `validation` and their tokenizer in a folder; returns it."""
    from pipeline.data.corpus.prepare import prepare
    from pipeline.data.tokenizer import TOKENIZER_FILE, train_bpe

    documents = list(_documents())
    tokenizer = train_bpe([document.text for document in documents if document.source == "text"], 300)
    prepare(
        documents,
        directory,
        tokenizer,
        SEQUENCE_LENGTH,
        seed=0,
        source_names=["text", "other"],
        samples_per_shard=128,
        validation_fraction=0.2,
    )
    shutil.copyfile(directory / "train" / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    return directory


def make_tiny_reference(data: Path, directory: Path) -> Path:
    """Write a model folder for tiny data: D 16, 2 layers, 2 attention heads, untrained weights; returns it."""
    from pipeline.config import ModelSettings
    from pipeline.data.shards.manifest import read_manifest
    from pipeline.data.tokenizer import TOKENIZER_FILE
    from pipeline.model.export import save_model
    from pipeline.model.mtp import MTPModel, initialize_weights

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = read_manifest(data / "train").vocab_size
    settings = ModelSettings(dim=16, num_layers=2, num_attention_heads=2, num_prediction_heads=1, vocab_size=vocab_size, seed=1)
    model = MTPModel(settings)
    initialize_weights(model)
    save_model(model, directory)
    shutil.copyfile(data / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    return directory


def _documents() -> Iterator[Any]:
    """Sentences that a tiny model can learn, as `text`, and random letters, as `other`; always the same."""
    from pipeline.data.corpus.documents import Document

    draw = random.Random(0)
    nouns, verbs = ("cat", "dog", "bird", "fish", "child"), ("sees", "hears", "likes", "finds")
    for number in range(140):
        sentences = [f"the {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)}." for _ in range(1 + number % 6)]
        yield Document(f"{number}: {' '.join(sentences)}", "text")
    for _ in range(60):
        yield Document("".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=draw.randrange(5, 60))), "other")

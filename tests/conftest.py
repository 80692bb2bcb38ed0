"""Fixtures for all tests: tiny prepared data and a tiny reference, made once a session by the package's own code.

    tiny_data/                  the fixture's value
        train/                  T = 16, V <= 300, sources `text` and `other`, 256 rows or more
        validation/             the same, documents held out of train/, 32 rows or more
        tokenizer.json          the BPE both were prepared with (each has its own copy too)

Treat both as read-only: they are shared. A test that damages data copies them first (`shutil.copytree`).
"""

import random
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine's pauses are no defect of the code under test.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A session in a script's background has to ignore SIGINT, and so would every process that a test starts. What a handler ignores
# is ignored here alone: exec sets handlers back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)

TINY_SEQUENCE_LENGTH = 16


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared `train` and `validation`; see the module's docstring."""
    from pipeline.data.corpus.prepare import prepare
    from pipeline.data.tokenizer import TOKENIZER_FILE, train_bpe

    directory = tmp_path_factory.mktemp("tiny") / "data"
    documents = list(_documents())
    tokenizer = train_bpe([document.text for document in documents if document.source == "text"], 300)
    prepare(
        documents,
        directory,
        tokenizer,
        TINY_SEQUENCE_LENGTH,
        seed=0,
        source_names=["text", "other"],
        samples_per_shard=128,
        validation_fraction=0.2,
    )
    shutil.copyfile(directory / "train" / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    return directory


@pytest.fixture(scope="session")
def tiny_reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `reference.path` wants it, for `tiny_data`: D 16, 2 layers, 2 attention heads, untrained weights."""
    from pipeline.config import ModelSettings
    from pipeline.data.shards.manifest import read_manifest
    from pipeline.data.tokenizer import TOKENIZER_FILE
    from pipeline.model.export import save_model
    from pipeline.model.mtp import MTPModel, initialize_weights

    directory = tmp_path_factory.mktemp("tiny_reference")
    vocab_size = read_manifest(tiny_data / "train").vocab_size
    settings = ModelSettings(dim=16, num_layers=2, num_attention_heads=2, num_prediction_heads=1, vocab_size=vocab_size, seed=1)
    model = MTPModel(settings)
    initialize_weights(model)
    save_model(model, directory)
    shutil.copyfile(tiny_data / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    return directory


def _documents():
    """Sentences that a tiny model can learn, as `text`, and random letters, as `other`; always the same."""
    from pipeline.data.corpus.documents import Document

    draw = random.Random(0)
    nouns, verbs = ("cat", "dog", "bird", "fish", "child"), ("sees", "hears", "likes", "finds")
    for number in range(140):
        sentences = [f"the {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)}." for _ in range(1 + number % 6)]
        yield Document(f"{number}: {' '.join(sentences)}", "text")
    for _ in range(60):
        yield Document("".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=draw.randrange(5, 60))), "other")

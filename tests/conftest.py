"""Fixtures for all tests: tiny prepared data and a tiny reference, made once a session by the package's own code.

    tiny_data/                  the fixture's value (made by tests/tiny.py)
        train/                  T = 16, V <= 300, sources `text` and `other`, 256 rows or more
        validation/             the same, documents held out of train/, 32 rows or more
        tokenizer.json          the BPE both were prepared with (each has its own copy too)

Treat both as read-only: they are shared. A test that damages data copies them first (`shutil.copytree`).
"""

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import make_tiny_data, make_tiny_reference

# A shared machine's pauses are no defect of the code under test.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

# A session in a script's background has to ignore SIGINT, and so would every process that a test starts. What a handler ignores
# is ignored here alone: exec sets handlers back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared `train` and `validation`; see the module's docstring."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `reference.path` wants it, for `tiny_data`: D 16, 2 layers, 2 attention heads, untrained weights."""
    return make_tiny_reference(tiny_data, tmp_path_factory.mktemp("tiny_reference"))

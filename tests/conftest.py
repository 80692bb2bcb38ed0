"""Fixtures for all tests: tiny prepared data and a tiny reference, made once a session by the package's own code.

    tiny_data/                  the fixture's value (made by tests/tiny.py)
        train/                  T = 16, V <= 300, sources `text` and `other`, 256 rows or more
        validation/             the same, documents held out of train/, 32 rows or more
        tokenizer.json          the BPE both were prepared with (each has its own copy too)

Treat both as read-only: they are shared. A test that damages data copies them first (`shutil.copytree`).

With REQUIRE_EXTRAS=1 in the environment, as CI has it, a test that is skipped because a library is missing or too old fails.
"""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny import make_tiny_data, make_tiny_reference

# A shared machine's pauses are no defect of the code under test.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

# A session in a script's background has to ignore SIGINT, and so would every process that a test starts. What a handler ignores
# is ignored here alone: exec sets handlers back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)

# Workers of `pytest -n` share the cores between them; what they start has the environment of a session without workers.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared `train` and `validation`; see the module's docstring."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `reference.path` wants it, for `tiny_data`: D 16, 2 layers, 2 attention heads, untrained weights."""
    return make_tiny_reference(tiny_data, tmp_path_factory.mktemp("tiny_reference"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that needs a missing library, where all are required."""
    report = yield
    fail_for_missing_library(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that needs a missing library, where all are required."""
    report = yield
    fail_for_missing_library(report)
    return report


def fail_for_missing_library(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Turn a skip by `pytest.importorskip` into a failure if REQUIRE_EXTRAS is set."""
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    is_missing = "could not import" in reason or "has __version__" in reason
    if is_missing and os.environ.get("REQUIRE_EXTRAS"):
        report.outcome = "failed"
        report.longrepr = f"REQUIRE_EXTRAS is set, and a library that this test needs is not there: {reason}"

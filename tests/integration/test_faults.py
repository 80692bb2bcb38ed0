"""A part of the trials of tests/fault_matrix.py, three side by side; `python -m tests.fault_matrix` runs all of them."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fault_matrix import STEPS, Fault, Lab, Outcome, step_for, try_fault, try_kills, try_numbers_of_ranks, try_poison
from tests.forked import CAN_FORK

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CAN_FORK, reason="forks its ranks")]

FAULTS = [
    Fault(point, kind, rank, step_for(point))
    for kind, point, rank in [
        ("SIGKILL", "in the exchange", 1),
        ("SIGKILL", "in a rank's file", 0),
        ("SIGKILL", "before the rename", 0),
        ("SIGKILL", "in a loader's worker", 1),
        ("SIGSTOP", "before the forward", 1),
        ("SIGTERM", "between micro-steps", 1),
        ("exception", "after the update", 0),
        ("exception", "after state.json", 0),
        ("disk full", "in a rank's file", 1),
        ("exception", "in a loader's worker", 0),
        ("EIO", "in the loader", 1),
        ("EIO", "in a checkpoint's file", 1),
    ]
] + [Fault("in a rank's file", "disk full", 1, STEPS)]
OTHERS = {
    "four random kills": (try_kills, 4, 24, 1),
    "kills on 2, 1, 4, 2 ranks": (try_numbers_of_ranks, [2, 1, 4, 2], 50, 4, 2),
    "NaN loss": (try_poison, "loss", 1),
    "NaN gradient": (try_poison, "gradient", 0),
}


@pytest.fixture(scope="module")
def outcomes(
    tiny_data: Path, tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """What comes of each trial, by its name."""
    lab = Lab(tmp_path_factory.mktemp("faults"), tiny_data, tiny_reference)
    with ThreadPoolExecutor(3) as pool:
        started = {str(fault): pool.submit(try_fault, lab, fault) for fault in FAULTS}
        started |= {name: pool.submit(function, lab, *given) for name, (function, *given) in OTHERS.items()}
        yield started
        for trial in started.values():
            trial.cancel()


@pytest.mark.parametrize("name", [*map(str, FAULTS), *OTHERS])
def test_a_run_that_met_faults_and_ran_again_equals_one_that_met_none(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    found = outcomes[name].result()
    assert not found.wrong, found

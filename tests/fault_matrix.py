"""Every fault at every point, on two ranks under ZeRO-3: run again, the run must equal one that met none, bit for bit.

    python -m tests.fault_matrix [--only TEXT] [--side-by-side N]

prints a line a trial, then the table of points and kinds. tests/integration/test_faults.py has a part of it.
"""

import argparse
import itertools
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.runtime.logbook import read_records
from tests.faults import (
    IN_A_COMMIT,
    IN_A_RESUME,
    IN_A_SAVE,
    IN_A_STEP,
    IN_A_WORKER,
    KINDS,
    POINTS,
    Fault,
    inject,
    leave_out,
    poison_and_kill,
)
from tests.lives import Life, difference, left_by, live, write_recipe
from tests.tiny import make_tiny_data, make_tiny_reference

RANKS, STEPS = 2, 12
_SAVED, _BETWEEN = 6, 8
"""A step whose checkpoint is written in the background; one that goes on from the checkpoint before."""
_MOST_LIVES = 4


class Lab:
    """Where trials lie, with the runs that met no fault, which they are compared with."""

    def __init__(self, directory: Path, data: Path, reference: Path):
        self.directory, self._models = directory, (data, reference)
        self._whole: dict[str, dict[str, Any]] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def recipe(self, steps: int = STEPS) -> Path:
        return write_recipe(self.directory / f"{steps}.yaml", *self._models, steps)

    def run_dir(self, name: str) -> Path:
        path = self.directory / name.replace(" ", "_").replace("/", "_") / "run"
        path.parent.mkdir(parents=True)
        return path

    def whole(self, steps: int = STEPS, *altered: Any) -> dict[str, Any]:
        """What a run leaves that ends in its first life; made once. altered: as `live` takes it."""
        name = f"whole {steps} {'' if not altered else altered[0].__name__}{altered[1:]}"
        with self._locks[name]:
            if name not in self._whole:
                run_dir = self.run_dir(name)
                life = live(run_dir, self.recipe(steps), RANKS, *altered)
                assert life.codes == [0] * RANKS, life.printed
                self._whole[name] = left_by(run_dir)
            return self._whole[name]


class Outcome(NamedTuple):
    """codes: of the life that met the fault. wrong: "" where all was as it should be. lives: of the run, all together."""

    codes: list[int | None]
    wrong: str
    lives: int
    seconds: float


# What the victim's process, and those of the others, end with.
_CODES = {
    "SIGKILL": (-9, 4),
    "SIGSTOP": (-9, 4),
    "SIGTERM": (75, 75),
    "SIGUSR1": (75, 75),
    "exception": (1, 4),
    "delay": (0, 0),
    "disk full": (2, 4),
    "EIO": (2, 4),
}


def expected_codes(fault: Fault) -> list[int]:
    """The exit codes of the life that meets a fault."""
    of_victim, of_others = _CODES[fault.kind]
    is_error = fault.kind in ("exception", "disk full", "EIO")
    if is_error and fault.point in IN_A_SAVE | IN_A_COMMIT:
        # A save that fails is said, and the run goes on; but not the last.
        of_victim = of_others = 2 if fault.step == STEPS else 0
    if fault.kind in ("disk full", "EIO") and fault.point in ("in the loader", *IN_A_WORKER):
        of_others = 2
    if fault.point in IN_A_WORKER and fault.kind.startswith("SIG"):
        # The worker is not its rank: it leaves signals to that one, which cannot go on without it.
        of_victim, of_others = {"SIGKILL": (2, 4), "SIGSTOP": (4, 4)}.get(fault.kind, (0, 0))
    if fault.kind in ("disk full", "EIO") and fault.point == "in a checkpoint's file":
        # The checkpoint before it is taken.
        of_victim = of_others = 0
    if fault.kind in ("SIGTERM", "SIGUSR1") and fault.step == STEPS and fault.point not in IN_A_COMMIT:
        # In a commit it meets the one before the last, which ends beside the last step; the last validation is broken off.
        of_victim = of_others = 0
    return [of_victim if rank == fault.rank else of_others for rank in range(RANKS)]


def faults() -> list[Fault]:
    """Every kind at every point; on both ranks where both come to it, in two rounds that together have each."""
    rounds: list[list[Fault]] = [[], []]
    for number, (kind, point) in enumerate(itertools.product(KINDS, POINTS)):
        is_of_first = point in IN_A_COMMIT or point.endswith("cut")
        ranks = [0] if is_of_first else [number % 2, 1 - number % 2]
        for faults_of_round, rank in zip(rounds, ranks, strict=False):
            faults_of_round.append(Fault(point, kind, rank, step_for(point)))

    # Before there is any checkpoint, and in the last one.
    special = [Fault("before the forward", "SIGKILL", 0, 1)]
    special += [Fault("before the rename", kind, 0, STEPS) for kind in ("SIGKILL", "SIGSTOP", "SIGTERM")]
    special += [
        Fault("in a rank's file", kind, 1, STEPS) for kind in ("SIGKILL", "SIGSTOP", "SIGTERM", "exception", "disk full")
    ]
    return [*special, *rounds[0], *rounds[1]]


def step_for(point: str) -> int:
    if point in IN_A_RESUME | IN_A_WORKER:
        return 0
    if point == "in the loader":
        return 3  # It reads some steps at a time.
    return _BETWEEN if point in IN_A_STEP else _SAVED


def try_fault(lab: Lab, fault: Fault) -> Outcome:
    """Have a run meet a fault; then run it again, until it is done."""
    run_dir, recipe = lab.run_dir(str(fault)), lab.recipe()
    settings = ["data.num_workers=1"] if fault.point in IN_A_WORKER else []
    settings += ["run.hang_timeout=10"] if fault.kind == "SIGSTOP" else []
    earlier = 0
    if fault.step == 0:
        # A run that is there to be continued, with two checkpoints.
        live(run_dir, recipe, RANKS, inject, Fault("after the update", "SIGKILL", 0, 10), die_together=True)
        earlier = 1

    life = live(run_dir, recipe, RANKS, inject, fault, settings=settings)
    lives = [life, *run_to_its_end(run_dir, recipe, life)]
    wrong = "" if life.codes == expected_codes(fault) else f"exit codes {life.codes}, expected {expected_codes(fault)}"
    if f"injected: {fault}" not in life.printed[fault.rank]:
        wrong = "the fault did not happen"
    wrong = wrong or ended(lives) or difference(left_by(run_dir), lab.whole())
    return Outcome(life.codes, wrong, earlier + len(lives), sum(each.seconds for each in lives))


def run_to_its_end(run_dir: Path, recipe: Path, life: Life, *altered: Any) -> Iterator[Life]:
    """Run again, as a scheduler does."""
    for _ in range(_MOST_LIVES):
        if life.codes == [0] * RANKS:
            return
        life = live(run_dir, recipe, RANKS, *altered)
        yield life


def ended(lives: Sequence[Life]) -> str:
    """Say how the last life ended, if not well."""
    last = lives[-1]
    return "" if set(last.codes) == {0} else f"the last life ended with {last.codes}: {last.printed[0][-500:]}"


def try_poison(lab: Lab, what: str, victim: int) -> Outcome:
    """Have two steps be NaN, and the run killed after them: it equals one in which the same steps were left out."""
    steps = (5, _SAVED)
    run_dir, recipe = lab.run_dir(f"NaN {what} {victim}"), lab.recipe()
    life = live(
        run_dir,
        recipe,
        RANKS,
        poison_and_kill,
        what,
        victim,
        steps,
        Fault("before the forward", "SIGKILL", 1 - victim, _BETWEEN),
    )
    again = (poison_and_kill, what, victim, steps, Fault("before the forward", "SIGKILL", 1 - victim, STEPS + 1))
    lives = [life, *run_to_its_end(run_dir, recipe, life, *again)]
    left_out = lab.whole(STEPS, leave_out, steps)
    wrong = ended(lives) or difference(left_by(run_dir), left_out, but_steps=steps)
    return Outcome(life.codes, wrong, len(lives), sum(each.seconds for each in lives))


def try_kills(lab: Lab, kills: int, steps: int, seed: int) -> Outcome:
    """Kill one run again and again, at random points: it equals one that was never killed, bit for bit."""
    draw, recipe = random.Random(seed), lab.recipe(steps)
    run_dir, started = lab.run_dir(f"{kills} kills"), time.monotonic()
    for _ in range(kills):
        life = live(run_dir, recipe, RANKS, inject, _random_kill(draw, run_dir, RANKS), die_together=True)
        if -signal.SIGKILL not in life.codes:
            return Outcome(life.codes, f"not killed: {life.printed[0][-500:]}", kills, time.monotonic() - started)
    last = live(run_dir, recipe, RANKS)
    wrong = ended([last]) or difference(left_by(run_dir), lab.whole(steps))
    return Outcome(last.codes, wrong, kills + 1, time.monotonic() - started)


def _random_kill(draw: random.Random, run_dir: Path, ranks: int) -> Fault:
    """A kill of any rank at any point, within some steps of where the records end."""
    point = draw.choice([*IN_A_STEP, *IN_A_SAVE, *IN_A_COMMIT])
    rank = 0 if point in IN_A_COMMIT else draw.randrange(ranks)
    last = max((record["step"] for record in read_records(run_dir)), default=0)
    return Fault(point, "SIGKILL", rank, max(1, last + draw.randint(-2, 5)))


def try_numbers_of_ranks(lab: Lab, numbers: Sequence[int], steps: int, kills: int, seed: int) -> Outcome:
    """Kill a run and continue it on other numbers of ranks: the same samples, and losses within 1e-5 (I10)."""
    draw, recipe = random.Random(seed), lab.recipe(steps)
    run_dir, started = lab.run_dir(f"ranks {numbers}"), time.monotonic()
    for number in (numbers * kills)[:kills]:
        life = live(run_dir, recipe, number, inject, _random_kill(draw, run_dir, number), die_together=True)
        if -signal.SIGKILL not in life.codes:
            return Outcome(life.codes, f"not killed: {life.printed[0][-500:]}", kills, time.monotonic() - started)
    last = live(run_dir, recipe, numbers[-1])
    wrong = ended([last]) or _far_off(left_by(run_dir)["records"], lab.whole(steps)["records"])
    return Outcome(last.codes, wrong, kills + 1, time.monotonic() - started)


def _far_off(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> str:
    """Name the first step whose samples are others, or whose losses are more than 1e-5 (relative) off."""
    if len(found) != len(expected):
        return f"{len(found)} records, expected {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        if any(one.get(key) != other.get(key) for key in ("step", "samples", "tokens", "data_samples_source_text")):
            return f"step {one['step']}: other samples"
        for key in (key for key in other if key == "loss" or key.startswith("loss_head_")):
            if abs(one[key] - other[key]) > 1e-5 * abs(other[key]):
                return f"step {one['step']}: {key} is {one[key]}, expected {other[key]}"
    return ""


Trial = tuple[str, Callable[..., Outcome], tuple[Any, ...]]


def trials() -> list[Trial]:
    """(name, function, arguments) of every trial; the long ones first."""
    return [
        ("30 random kills", try_kills, (30, 120, 1)),
        ("random kills on 2, 1, 4, 2 ranks", try_numbers_of_ranks, ([2, 1, 4, 2], 50, 8, 2)),
        *((f"NaN {what}, rank {rank}", try_poison, (what, rank)) for what in ("loss", "gradient") for rank in range(RANKS)),
        *((str(fault), try_fault, (fault,)) for fault in faults()),
    ]


def table(outcomes: dict[str, Outcome]) -> str:
    """Points by kinds: how many trials were equal, of how many."""
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for fault in faults():
        if str(fault) in outcomes:
            cells[fault.point, fault.kind].append(not outcomes[str(fault)].wrong)
    lines = [f"{'':32}" + "".join(f"{kind:>11}" for kind in KINDS)]
    for point in POINTS:
        of_kinds = [cells.get((point, kind), []) for kind in KINDS]
        lines.append(f"{point:32}" + "".join(f"{f'{sum(cell)} of {len(cell)}' if cell else '–':>11}" for cell in of_kinds))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault_matrix", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="trials whose name has this text")
    parser.add_argument("--side-by-side", type=int, default=2, metavar="N", help="trials at a time (default 2)")
    options = parser.parse_args(arguments)
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.side_by_side) as pool:
        data = make_tiny_data(Path(folder) / "data")
        lab = Lab(Path(folder), data, make_tiny_reference(data, Path(folder) / "reference"))
        lab.whole()

        def run(trial: Trial) -> None:
            name, function, given = trial
            started = time.monotonic()
            try:
                found = function(lab, *given)
            except Exception as error:
                found = Outcome([], f"{type(error).__name__}: {str(error)[-500:]}", 0, time.monotonic() - started)
            outcomes[name] = found
            print(f"{found.wrong or 'equal':10} {name}: {found.codes}, {found.lives} lives, {found.seconds:.0f} s", flush=True)

        list(pool.map(run, [trial for trial in trials() if options.only in trial[0]]))
    wrong = {name: found.wrong for name, found in outcomes.items() if found.wrong}
    print(f"\n{table(outcomes)}\n\n{len(outcomes) - len(wrong)} of {len(outcomes)} trials equal the run without a fault")
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

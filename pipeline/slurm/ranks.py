"""The ranks of a job: srun, their logs, and the request to stop that reaches them when it is time.

Slurm signals the batch script alone (`--signal=B:USR1@600` of launch/train.sbatch), once, and where the limit is short before
there are ranks. A person's `scancel --signal=USR1 JOB` reaches the ranks alone, with `--full` all. The first rank prints a line
when it hears a request (`preemption.ASKED_TO_STOP`), by which one that came without the batch script is seen, and dated.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.runtime.preemption import ASKED_TO_STOP
from pipeline.slurm.commands import SlurmError, properties, time_left, time_limit
from pipeline.slurm.rank_logs import Follower, rank_file
from pipeline.slurm.requeueing import is_slurms, seconds_to_wait

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_REQUESTS = 15.0
_SECONDS_TO_END = 60.0

Value = TypeVar("Value")


class Request:
    """The batch script's ear for the request to stop, from its construction on.

    lead: the seconds before the limit at which Slurm signals. came_at: when it has, on the monotonic clock; None if not yet.
    """

    def __init__(self, lead: float):
        self.lead = lead
        self.came_at: float | None = None
        # launch/train.sbatch has it ignored while it has no ear for it.
        self._was_ignored = signal.signal(signal.SIGUSR1, self._on_signal) is signal.SIG_IGN

    def assume_missed(self, job: str) -> None:
        """Take a request for made that may have come while it was ignored, since Slurm makes it once."""
        left, limit = (or_none(time_left, job), or_none(time_limit, job)) if self._was_ignored else (None, None)
        if self.came_at is None and left is not None and limit is not None and is_slurms(left, False, self.lead):
            self.came_at = time.monotonic() - max(0.0, min(limit, self.lead) - left)

    def _on_signal(self, *_: object) -> None:
        self.came_at = self.came_at or time.monotonic()


class Ranks:
    """A job step with a task a rank. code: srun's exit code. lines: what srun itself wrote.

    asked_by_slurm: None if nobody asked the ranks to stop. cancelled: Slurm ended the job (scancel, the time limit).
    """

    def __init__(self, job: str, command: Sequence[str], environment: Mapping[str, str], logs: Path, request: Request):
        self._job, self._request = job, request
        self.code = 0
        self.lines: list[str] = []
        self.asked_by_slurm: bool | None = None
        self.cancelled = False
        signal.signal(signal.SIGTERM, self._on_cancelled)

        # Before the ranks, whose lines it would part.
        request.assume_missed(job)
        out, err = (rank_file(logs, "%5t", stream) for stream in ("out", "err"))
        options = ["--kill-on-bad-exit=1", f"--output={out}", f"--error={err}", *options_of_step(environment)]
        self._srun = subprocess.Popen(
            ["srun", *options, *command], env=dict(environment), stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._follower = Follower(rank_file(logs, 0, "out"), sys.stdout, ASKED_TO_STOP)
        self._reader = threading.Thread(target=self._pass_on, name="srun's own lines", daemon=True)
        self._reader.start()

    def wait(self) -> None:
        """Wait for the end of all ranks, and ask them to stop when Slurm has signalled and it is time."""
        due: float | None = None
        while self._srun.poll() is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            if self._request.came_at is not None and due is None:
                due = time.monotonic() + self._seconds_to_wait(time.monotonic() - self._request.came_at)

            if self._follower.seen.is_set():
                self._note_whose()
            # srun passes a signal on to the tasks that run by then; the first rank writes its first line when it can hear one.
            elif due is not None and time.monotonic() >= due and self._follower.begun.is_set():
                due = time.monotonic() + _SECONDS_BETWEEN_REQUESTS
                self._note_whose()
                self._srun.send_signal(signal.SIGUSR1)

        self._reader.join(_SECONDS_TO_END)
        self._follower.end(_SECONDS_TO_END)
        # As a shell has it where a signal ended the process.
        code = self._srun.returncode
        self.code = code if code >= 0 else 128 - code

    @property
    def is_preempted(self) -> bool:
        """True if Slurm takes the nodes away for another job."""
        found = or_none(properties, self._job) or {}
        return found.get("PreemptTime", "None") not in ("None", "Unknown")

    def _note_whose(self) -> None:
        if self.asked_by_slurm is None:
            left = or_none(time_left, self._job)
            self.asked_by_slurm = is_slurms(left, self.is_preempted, self._request.lead)
            if not self.asked_by_slurm and left is not None and self._request.came_at is not None:
                say(
                    f"this is a person's request, since {left:g} s are left and Slurm signals at {self._request.lead:g} s; for "
                    "another lead time set SBATCH_SIGNAL=B:USR1@SECONDS before sbatch"
                )

    def _seconds_to_wait(self, signalled_before: float) -> float:
        left, limit = or_none(time_left, self._job), or_none(time_limit, self._job)
        wait = 0.0 if left is None or limit is None else seconds_to_wait(left, limit, signalled_before)
        if wait > 0:
            say(f"the time limit, {limit:g} s, is short: the ranks are asked to stop in {wait:.0f} s, when a quarter is left")
        return wait

    def _on_cancelled(self, *_: object) -> None:
        self.cancelled = True

    def _pass_on(self) -> None:
        assert self._srun.stderr is not None
        with self._srun.stderr as lines:
            for line in lines:
                self.lines.append(line.rstrip("\n"))
                print(line, end="", file=sys.stderr, flush=True)


def options_of_step(environment: Mapping[str, str]) -> list[str]:
    """Options of srun for what it would otherwise take from the job's variables, and get wrong.

    By `sbatch --export=NONE`, the default of some sites, the ranks would have no variable of the batch script's. From 22.05 to
    23.02 srun does not take sbatch's --cpus-per-task over, so that each rank had a single core; later it ends where
    SLURM_CPUS_PER_TASK and SLURM_TRES_PER_TASK differ, which --mem-per-cpu makes them do.
    """
    cores = environment.get("SLURM_CPUS_PER_TASK")
    return ["--export=ALL", *([] if cores is None else [f"--cpus-per-task={cores}"])]


def or_none(ask: Callable[[str], Value], job: str) -> Value | None:
    """Slurm's answer, or None where it does not answer; the ranks go on all the same."""
    try:
        return ask(job)
    except SlurmError as error:
        say(f"Slurm does not answer: {error}")
        return None


def say(text: str) -> None:
    """Print a line of the batch script's own into the job's log."""
    print(f"slurm: {text}", flush=True)

"""Decide whether a job that has ended is put into the queue again, and without which node.

Slurm itself requeues after the failure of a node and for PreemptMode=REQUEUE. What it knows nothing of are the exit codes:

    75   the ranks have stopped on request. If the request was Slurm's, because the time limit or a preemption was near, the job
         goes on in another life; if it was a person's, it does not. The time left when the ranks are asked tells one from the
         other. Nor does a job go on where a life that was not preempted has saved nothing: the next would fare no better.
    4    a rank died or stood still. The job goes on without the node of that rank, if others can take its place; after
         `MOST_FAILURES` such lives in a row that have saved nothing it does not.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.runtime.preemption import EXIT_HANG, EXIT_TRY_AGAIN
from pipeline.slurm.rank_logs import Ended, own_errors
from pipeline.storage.json_lines import end_torn_line, read_json_lines

LEAD_SECONDS = 600.0
"""Time before the limit at which Slurm asks a job to stop, by --signal of launch/train.sbatch."""

MOST_FAILURES = 3

_TOLERANCE_SECONDS = 60.0


@dataclass(frozen=True)
class Life:
    """One start of a job, from what it left.

    code: the job's exit code. ends: the ranks that ended badly, in their order. progressed: something new was saved.
    asked_by_slurm: None if nobody asked the ranks to stop. is_preempted: Slurm has taken the nodes away for another job.
    accused: node of the rank that died or stood still, if it is known. cancelled: the batch script was sent SIGTERM.
    """

    code: int
    progressed: bool
    ends: list[Ended] = field(default_factory=list)
    asked_by_slurm: bool | None = None
    accused: str | None = None
    cancelled: bool = False
    is_preempted: bool = False

    @property
    def has_lost_a_rank(self) -> bool:
        """True if a rank died or stood still, and none ended with an error of its own, which would come again."""
        is_lost = any(end.code in (None, EXIT_HANG) for end in self.ends)
        return self.code != 0 and is_lost and not own_errors(self.ends)


@dataclass(frozen=True)
class Decision:
    """requeue: whether the job is put into the queue again. why: a sentence for the job's log. exclude: a node to leave out."""

    requeue: bool
    why: str
    exclude: str | None = None


def lead_seconds(environment: Mapping[str, str]) -> float:
    """The lead time of a job: by SBATCH_SIGNAL, Slurm's variable for --signal, such as `B:USR1@1800`, else the script's."""
    found = re.fullmatch(r"(?:[RB]*:)?\w+@(\d+)", environment.get("SBATCH_SIGNAL", ""))
    return LEAD_SECONDS if found is None else float(found[1])


def is_slurms(seconds_left: float | None, is_preempted: bool, lead: float = LEAD_SECONDS) -> bool:
    """True if a request to stop that the ranks heard so long before the time limit was Slurm's; a person's otherwise."""
    return is_preempted or (seconds_left is not None and seconds_left <= lead + _TOLERANCE_SECONDS)


def seconds_to_wait(seconds_left: float, limit: float, signalled_before: float = 0.0) -> float:
    """Seconds to wait before the ranks are asked to stop, when Slurm signalled `signalled_before` seconds ago.

    By the lead time of launch/train.sbatch Slurm signals at once where the limit is shorter than that, and early where it is
    little longer. Then the ranks are asked when a quarter of the limit is left. A longer lead time is a user's choice.
    """
    is_early = limit / 2 < seconds_left + signalled_before <= LEAD_SECONDS + _TOLERANCE_SECONDS
    return max(0.0, seconds_left - limit / 4) if is_early else 0.0


def decide(life: Life, failures_before: int) -> Decision:
    """Decide by the life that has ended. failures_before: lives before it, in a row, that lost a rank and saved nothing."""
    if life.cancelled:
        return Decision(False, "it was cancelled, somebody requeued it, or it is at its time limit")
    if life.has_lost_a_rank:
        failures = 0 if life.progressed else failures_before + 1
        if failures >= MOST_FAILURES:
            return Decision(False, f"it has lost a rank {failures} times in a row and saved nothing in between")
        return Decision(True, "a rank died or stood still", life.accused)
    if life.code != EXIT_TRY_AGAIN:
        return Decision(False, "" if life.code == 0 else "the same would happen again")
    if not life.asked_by_slurm:
        return Decision(False, "it was asked to stop by a person, not by Slurm; the same command continues it")
    if not life.progressed and not life.is_preempted:
        return Decision(False, "it has saved nothing since it began; give it more time: sbatch --time")
    return Decision(True, "Slurm asked it to stop, and there is more to do")


def failures_in_a_row(records: Path) -> int:
    """Count the last lives on record that lost a rank and saved nothing."""
    count = 0
    for line in reversed(read_json_lines(records)):
        if line.value is not None:
            if line.value["progressed"] or not line.value["has_lost_a_rank"]:
                break
            count += 1
    return count


def record(records: Path, life: Life, decision: Decision, nodes: Sequence[str]) -> None:
    """Append a life and what was decided to the records of a job, a JSON object a line."""
    line = {"time": round(time.time(), 1), "nodes": list(nodes), "has_lost_a_rank": life.has_lost_a_rank}
    end_torn_line(records)
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | asdict(life) | asdict(decision)) + "\n")

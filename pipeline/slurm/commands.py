"""Ask Slurm about a job, and tell it what to do with one, by its own commands.

Tried with Slurm 22.05. A controller under load answers late or not at all, so each command has a time limit and is tried again.
"""

import re
import subprocess
import time
from collections.abc import Mapping, Sequence

_TRIES = 3
_SECONDS_A_TRY = 30.0
_SECONDS_BETWEEN_TRIES = 2.0


class SlurmError(Exception):
    """A command of Slurm's failed; the message names it and has its answer."""


def ask(*command: str) -> str:
    """Run a command of Slurm's and return what it prints.

    Raises:
        SlurmError: it failed each time.
    """
    answer = ""
    for attempt in range(_TRIES):
        time.sleep(_SECONDS_BETWEEN_TRIES if attempt else 0.0)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_A_TRY, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            answer = str(error)
            continue
        if done.returncode == 0:
            return done.stdout
        answer = done.stderr.strip()
    raise SlurmError(f"{' '.join(command)}: {answer}")


def seconds_of(text: str) -> float | None:
    """Parse a time as squeue prints it: `45`, `2:05`, `1:00:00`, `1-00:00:00`; None for UNLIMITED and other words.

    A job beyond its limit has a negative time left.
    """
    found = re.fullmatch(r"(-?)(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text.strip())
    if found is None:
        return None
    sign, days, *clock = found.groups()
    hours, minutes = clock[:2] if clock[1] is not None else (None, clock[0])
    total = 86400 * int(days or 0) + 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(clock[2])
    return -float(total) if sign else float(total)


def time_left(job: str) -> float | None:
    """Seconds until a job's time limit; None if it has none."""
    return seconds_of(ask("squeue", "-h", "-j", job, "-O", "TimeLeft"))


def time_limit(job: str) -> float | None:
    """A job's time limit in seconds; None if it has none."""
    return seconds_of(ask("squeue", "-h", "-j", job, "-O", "TimeLimit"))


def properties(job: str) -> dict[str, str]:
    """Return a job's properties as `scontrol show job` names them, such as Requeue, Restarts, ExcNodeList, PreemptTime."""
    return dict(re.findall(r"(\S+?)=(\S*)", ask("scontrol", "show", "job", "-o", job)))


def name_of(environment: Mapping[str, str]) -> str:
    """The name of a job in Slurm's commands, from its own variables: of an array's task `ARRAY_TASK`.

    A task's number will not do: that of the last task is the array's as well, and with it a command would mean all tasks. The
    variables may be those of an array within which the job was submitted, so Slurm is asked whose name it is.
    """
    number, array = environment["SLURM_JOB_ID"], environment.get("SLURM_ARRAY_JOB_ID")
    if array is None:
        return number
    name = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}"
    try:
        return name if properties(name).get("JobId") == number else number
    except SlurmError:
        return number


def host_names(nodes: str) -> list[str]:
    """List the nodes of a list as Slurm writes it: `n[1-3,7]`."""
    return ask("scontrol", "show", "hostnames", nodes).split()


def node_address(node: str) -> str | None:
    """The address by which Slurm itself reaches a node."""
    found = re.search(r"NodeAddr=(\S+)", ask("scontrol", "show", "node", "-o", node))
    return found[1] if found else None


def gpus_of(nodes: str) -> str | None:
    """Describe the GPUs that nodes have by their configuration, such as `gpu:a100:8`; None where they have none."""
    resources = ask("sinfo", "-h", "-N", "-n", nodes, "-o", "%G").split()
    return next((each for each in resources if "gpu" in each.lower()), None)


def usable_nodes(partition: str) -> set[str]:
    """The nodes of a partition that are up, or will be."""
    unusable = re.compile(r"down|drain|fail|inval|maint|unk", re.IGNORECASE)
    lines = ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N %T").splitlines()
    return {name for name, state in (line.split() for line in lines) if not unusable.search(state)}


def requeue(job: str, exclude: Sequence[str] = ()) -> None:
    """Put a job into the queue again, to run on other nodes than those excluded; its batch script is sent SIGTERM.

    Raises:
        SlurmError: it may not be requeued.
    """
    ask("scontrol", "requeue", job)
    if exclude:
        # Slurm takes this of a job that waits, as it does from the requeueing on.
        ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(sorted(exclude))}")

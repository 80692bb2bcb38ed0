"""Processes of this machine, as `/proc` tells of them.

A number alone does not name a process: it is given to another one later. Number and start time together do.
"""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, by its number and its start time in clock ticks since the machine's start; 0 where nothing is known of it."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """False once it has ended, even if its parent has not yet asked for it. True where nothing is known."""
        return self.started == 0 or find(self.pid) == self

    @property
    def is_stopped(self) -> bool:
        """True while it is suspended (SIGSTOP, SIGTSTP), and so takes no notice of anything but SIGKILL and SIGCONT."""
        fields = _fields(self.pid)
        return fields is not None and fields[0] in ("T", "t") and self.is_alive

    @property
    def parent(self) -> "Process | None":
        """The process that started it, or has adopted it; None if that is not of this machine's or container's view."""
        fields = _fields(self.pid)
        return None if fields is None or fields[1] == "0" else find(int(fields[1]))

    @property
    def command(self) -> list[str]:
        """Its command line; empty if it has none, or is gone."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            return []

    def kill(self) -> None:
        """Kill it, if it is known and still there."""
        if self.started and self.is_alive:
            os.kill(self.pid, signal.SIGKILL)


def find(pid: int) -> Process:
    """The process that has this number now; with start time 0 where there is none, or a dead one."""
    fields = _fields(pid)
    return Process(pid, 0 if fields is None or fields[0] == "Z" else int(fields[19]))


def kill_children() -> None:
    """Kill what `multiprocessing` has started from this process, such as a loader's workers; the process is about to end.

    It would wait for them without end, or leave them behind: a suspended one takes no notice of anything else.
    """
    for child in multiprocessing.active_children():
        child.kill()


def _fields(pid: int) -> list[str] | None:
    """State, parent and all that follows in `/proc/PID/stat`; None where there is no such process."""
    try:
        # The name before these, in parentheses, may have spaces and parentheses in it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None

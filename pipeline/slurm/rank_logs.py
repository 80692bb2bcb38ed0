"""A log for each rank, and an extract of them in the job's own log.

srun writes each task's output on its own node to `rank-00000.out` and `rank-00000.err`. The job's log follows the first rank's
output while it runs. After a failure it has the message of one rank, the first that failed, and no other's.
"""

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from pipeline.runtime.preemption import EXIT_HANG, EXIT_TRY_AGAIN, STOPPING_SIGNALS

_SECONDS_BETWEEN_LOOKS = 0.3
_MOST_LINES = 60
_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (?:Exited with exit code (\d+)|(\w[\w ]*))")
_VERDICT = re.compile(r"the job cannot go on: rank (\d+) ")


_REQUESTS = {signal.strsignal(number) for number in STOPPING_SIGNALS}
"""srun's words for a rank that a request to stop ended before it could listen."""


class Ended(NamedTuple):
    """The end of a rank that srun reports as an error. code: None where a signal ended it, but 75 where that was a request."""

    node: str
    rank: int
    code: int | None


def rank_file(directory: Path, rank: int | str, stream: str) -> Path:
    """The file of a rank's stream, `out` or `err`; for `%5t` as rank it is srun's pattern of all."""
    return directory / (f"rank-{rank}.{stream}" if isinstance(rank, str) else f"rank-{rank:05d}.{stream}")


def ends_of_ranks(lines: Sequence[str]) -> list[Ended]:
    """Read which ranks ended badly from the lines of srun, in their order."""
    found = []
    for line in lines:
        match = _ENDED.match(line)
        if match is not None:
            node, ranks, exited, ended_by = match.groups()
            asked = EXIT_TRY_AGAIN if ended_by in _REQUESTS else None
            found += [Ended(node, rank, asked if exited is None else int(exited)) for rank in _numbers(ranks)]
    return found


def own_errors(ends: Sequence[Ended]) -> list[Ended]:
    """Those with an error of their own: who ended neither on request, nor for another rank's sake, nor by a signal."""
    return [end for end in ends if end.code not in (None, EXIT_HANG, EXIT_TRY_AGAIN)]


def code_of_job(ends: Sequence[Ended], of_srun: int) -> int:
    """Return the exit code of the first rank with an error of its own, else that for which a request ended all, else srun's.

    srun has the highest code, which may be that of a rank that it ended itself, after another one had failed.
    """
    own = [end.code for end in own_errors(ends) if end.code is not None]
    was_asked = of_srun in {128 + number for number in STOPPING_SIGNALS} and all(end.code == EXIT_TRY_AGAIN for end in ends)
    return own[0] if own else EXIT_TRY_AGAIN if was_asked else of_srun


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def accused_rank(directory: Path) -> tuple[int, int] | None:
    """(rank that says that the job cannot go on, rank that it names) of the lowest rank that says so."""
    for file in sorted(directory.glob("rank-*.err")):
        match = _VERDICT.search(file.read_text(encoding="utf-8", errors="replace"))
        if match is not None:
            return int(file.stem.removeprefix("rank-")), int(match[1])
    return None


def last_words(directory: Path, ranks: Sequence[int]) -> str:
    """Return the last lines on stderr of the first of these ranks that wrote any, with the name of its log.

    Where it said that the job cannot go on they begin with that message, because the stacks that follow it may be long.
    """
    for rank in ranks:
        file = rank_file(directory, rank, "err")
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        if lines:
            verdicts = [number for number, line in enumerate(lines) if _VERDICT.search(line)]
            begin = verdicts[0] if verdicts else max(0, len(lines) - _MOST_LINES)
            end = min(len(lines), begin + _MOST_LINES)
            before = [f"… ({begin} lines before)"] if begin else []
            after = [f"… ({len(lines) - end} lines after)"] if end < len(lines) else []
            return "\n".join([f"rank {rank} ({file}):", *before, *lines[begin:end], *after])
    return ""


class Follower:
    """Copies a file that grows to a stream, from a thread; `begun` is set when it has something, `seen` at the first line that
    has `word` in it."""

    def __init__(self, file: Path, stream: TextIO, word: str):
        self._file, self._stream, self._word = file, stream, word
        self._position = 0
        self._ending = threading.Event()
        self.begun, self.seen = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()

    def end(self, patience: float) -> None:
        """Copy what is left, and stop; a file system that hangs is left after `patience` seconds."""
        self._ending.set()
        self._thread.join(patience)

    def _follow(self) -> None:
        while not self._ending.wait(_SECONDS_BETWEEN_LOOKS):
            self._copy(whole_lines=True)
        self._copy(whole_lines=False)

    def _copy(self, whole_lines: bool) -> None:
        try:
            with self._file.open("rb") as file:
                file.seek(self._position)
                found = file.read()
        except OSError:
            return  # not there yet
        if whole_lines:
            found = found[: found.rfind(b"\n") + 1]
        self._position += len(found)
        if found:
            self.begun.set()
        text = found.decode("utf-8", errors="replace")
        self._stream.write(text)
        self._stream.flush()
        if self._word in text:
            self.seen.set()

"""Progress of long work: a bar in a terminal, a line every 30 s elsewhere (in a Slurm log)."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class Display:
    """Display of the stages of a preparation, one after the other; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._start = self._last_line = 0.0
        self._total = self._documents = self._tokens = self._bytes = 0

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        (self._bar.console if self._bar else self._console).print(text, markup=False, soft_wrap=True)

    def begin(self, title: str, total_bytes: int) -> None:
        """Begin a stage of `total_bytes` bytes; 0 if the progress of the stage cannot be measured."""
        self._title, self._total = title, total_bytes
        self._start = self._last_line = time.monotonic()
        self._documents = self._tokens = self._bytes = 0
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total_bytes or None, counts="")
        elif not total_bytes:
            self.say(f"{title} …")

    def advance(self, documents: int, tokens: int, size: int) -> None:
        """Add to the counts of the stage: documents, tokens, and `size` bytes."""
        self._documents += documents
        self._tokens += tokens
        self._bytes += size
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._bytes, counts=self._counts().removesuffix(", "))
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"{self._title}: {self._counts()}{self._remaining()}")

    def end(self) -> None:
        """End the stage."""
        if self._bar is None:
            self.say(f"{self._title}: {self._counts()}{time.monotonic() - self._start:.1f} s")
        elif self._task is not None:
            self._bar.update(self._task, total=self._total, completed=self._total)

    def _counts(self) -> str:
        """Format the counts that are not 0, each followed by a comma."""
        speed = self._bytes / max(time.monotonic() - self._start, 1e-9) / 1e6
        counts = [
            f"{self._documents:,} documents" if self._documents else "",
            f"{self._tokens:,} tokens" if self._tokens else "",
            f"{self._bytes / 1e6:,.1f} MB, {speed:.1f} MB/s" if self._bytes else "",
        ]
        return "".join(f"{count}, " for count in counts if count)

    def _remaining(self) -> str:
        share = self._bytes / max(self._total, 1)
        if not 0 < share <= 1:
            return "time left unknown"
        seconds = (time.monotonic() - self._start) * (1 - share) / share
        return f"{share:.0%}, about {seconds:,.0f} s left"

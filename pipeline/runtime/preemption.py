"""Requests to stop a run: SIGTERM, SIGUSR1, or a file STOP in the run directory.

A request sets a flag. The ranks agree on it at the end of a step, or of a micro-batch of a validation or of scoring, save
together and exit with `EXIT_TRY_AGAIN` if there is more to do, so that a scheduler knows to start the job again. While a job
starts there is nothing to save: until the ranks have met, a signal ends its process at once; then they agree on signals
between the parts of the start (`StoppedError`). A file STOP is obeyed at the end of a step.

Ctrl-C ends a job at once, and a second one does so without waiting for anything.

This module imports neither torch nor DeepSpeed. Loading them takes seconds, in which an unhandled signal would kill the
process, so a job installs the handlers first.
"""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

EXIT_TRY_AGAIN = 75
"""Exit code EX_TEMPFAIL of sysexits.h: stopped on request; run the same command again to continue."""

EXIT_HANG = 4
"""Exit code of the ranks that survive a dead or hanging one, or their launcher."""

EXIT_INTERRUPTED = 130
"""Exit code of a job that was ended by Ctrl-C."""

SECONDS_TO_FINISH = 10.0
"""Time after a signal in which a piece of work in hand may be finished; schedulers give 30 seconds before they kill."""

SECONDS_FOR_THE_FIRST = 20.0
"""Time in which the first rank, which speaks for all, has said why the job does not start; other ranks may be faster."""

_SECONDS_TO_INTERRUPT = 2.0

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

ASKED_TO_STOP = "asked to stop by "
"""Beginning of the line that the first rank prints when it hears a signal; `pipeline.slurm` looks out for it."""


class StoppedError(Exception):
    """A request to stop came where nothing is to be saved; raised on all ranks alike."""


class StopRequest:
    """Listens for requests from its construction on: every process for signals, the one that calls `watch` for the file too."""

    def __init__(self) -> None:
        self._signalled_at: float | None = None
        self._file: Path | None = None
        self._woken: socket.socket | None = None
        self._says = True
        self._ending = threading.Lock()
        for number in STOPPING_SIGNALS:
            signal.signal(number, self._on_signal)

    def end_at_once(self, is_first: bool = True) -> None:
        """End the process at the first signal, until `wait_for_agreement`. is_first: true on the rank that speaks for all."""
        self._says = is_first
        # Python's handlers wait until the main thread comes out of what it calls, such as a meeting of ranks of which one is
        # late; the byte that a signal writes here does not.
        here, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(here,), name="signals", daemon=True).start()

    def wait_for_agreement(self) -> None:
        """From now on a signal is a request, on which the ranks agree."""
        if self._woken is not None:
            signal.set_wakeup_fd(-1)
            woken, self._woken = self._woken, None
            woken.close()

    def wait_for_the_first(self) -> bool:
        """Before a rank ends with an error that the first one reports: a launcher ends all others as soon as one has ended.

        Returns:
            True if this process is still there, so that the first rank has no such error and this one must report it; False at
            once where the ranks have met already, and have agreed on the error.
        """
        if self._woken is None:
            return False
        time.sleep(SECONDS_FOR_THE_FIRST)
        return True

    def request(self) -> None:
        """Ask this process to stop, as a signal does."""
        self._signalled_at = self._signalled_at or time.monotonic()
        if self._woken is not None:
            self._end("stopped on request before anything was begun; run the same command again\n", EXIT_TRY_AGAIN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._says and self._woken is None and not self.is_signalled:
            # One write, because a print may be what the signal has interrupted.
            with suppress(OSError):
                os.write(1, f"{ASKED_TO_STOP}{signal.Signals(number).name}\n".encode())
        self.request()

    def _listen(self, here: socket.socket) -> None:
        with here:
            while numbers := here.recv(64):
                if any(number in STOPPING_SIGNALS for number in numbers):
                    self.request()
                if signal.SIGINT in numbers:
                    # The main thread ends by itself, unless what it waits for takes no notice of Ctrl-C.
                    time.sleep(_SECONDS_TO_INTERRUPT)
                    self._end("interrupted\n", EXIT_INTERRUPTED)

    def _end(self, message: str, exit_code: int) -> None:
        # Of the signal's handler and the thread one comes first, and the other says no more.
        if self._ending.acquire(blocking=False):
            with suppress(OSError):
                os.write(2, message.encode() if self._says else b"")
            os._exit(exit_code)

    def watch(self, run_dir: Path) -> None:
        """Also look for a file STOP in `run_dir`."""
        self._file = run_dir / "STOP"

    @property
    def is_signalled(self) -> bool:
        """True if this process was asked to stop by a signal."""
        return self._signalled_at is not None

    @property
    def is_overdue(self) -> bool:
        """True if a signal came so long ago that work which may be lost is to be broken off."""
        return self._signalled_at is not None and time.monotonic() - self._signalled_at > SECONDS_TO_FINISH

    @property
    def is_requested(self) -> bool:
        """True if this process was asked to stop. It says nothing of other ranks: they have to agree before they act."""
        return self.is_signalled or (self._file is not None and self._file.exists())

    def clear(self) -> None:
        """Remove the STOP file, once the request was obeyed or the job has ended."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def interrupt_once() -> None:
    """Have the first Ctrl-C raise KeyboardInterrupt, and a second one end the process without waiting for anything."""
    # In a shell's background Ctrl-C is ignored, and stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    raise KeyboardInterrupt

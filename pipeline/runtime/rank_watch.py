"""A rank's beats, and its watch over other ranks: who died, is silent or stands still, and how the job ends for it.

Each rank writes beats into the process group's store and looks at those of a few others, all of it in one thread. A second
thread judges; it touches neither store nor device, which may be what hangs. A beat has two clocks: the thread's, which goes on
as long as the process does, and the main loop's (phase, step, since when). So there are four verdicts:

    died           a process of this machine is gone (seen within seconds)
    silent         a process gives no beat: it was stopped, or its machine is unreachable
    stands still   a main loop has been in one phase for longer than the phase's patience
    no store       the store does not answer: the first rank's process, which holds it, stands still

A rank that ends with an error of its own says so itself, which is a verdict like these. The first rank to see one publishes it.
Each surviving rank prints it once, with the stacks of its threads, and exits with `EXIT_HANG`; what torch knows of its last
collectives it leaves in the run directory (`flight_recorder`), and the first rank the end of the job in events.jsonl. A silent
process of this machine is killed; one that is alone on its machine is its launcher's to end. Where the launcher itself is gone,
`launcher` ends the process, and nothing is judged any more.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import processes
from pipeline.runtime import events, flight_recorder, launcher
from pipeline.runtime.beat import Beat, doing, main_thread, named
from pipeline.runtime.distributed import World, gather_over_ranks
from pipeline.runtime.preemption import EXIT_HANG

LONG_PHASES = ("starting", "preparing", "validating", "scoring", "saving", "ending")
"""Phases that take longer than a step: their patience is `LONGER` times `run.hang_timeout`."""

LONGER = 4

_WATCHED = 4
_VERDICT = "verdict"
_ENDED = -1
_SECONDS_TO_TELL = 5.0
_SECONDS_TO_LEARN = 15.0


class RankWatch:
    """This rank's beats, and its watch over others; from `start` to `stop`.

    store: the process group's, of which clones are used: a client is one lock, and a call may wait in it.
    timeout: seconds; `run.hang_timeout`.
    run_dir: where the last collectives are written to; None: nowhere.

    Collective: who the others are is known from the beginning.
    """

    def __init__(self, world: World, store: Any, timeout: float, run_dir: Path | None = None):
        self._world = world
        self._run_dir = run_dir
        self._store = store.clone()
        self._verdicts = store.clone()
        self._timeout = timeout
        self._interval = min(1.0, timeout / 10)
        self._host, self._process = socket.gethostname(), processes.find(os.getpid())
        self._loop = ("starting", 0, time.monotonic())
        peers: list[Beat] = gather_over_ranks(self._own(0))
        # The first, which holds the store, the next few, and all of this machine, whose processes can be looked at.
        near = [rank for rank, beat in enumerate(peers) if beat.host == self._host]
        watched = {0, *((world.rank + ahead) % world.size for ahead in range(1, _WATCHED + 1)), *near} - {world.rank}
        self._beats = {rank: (peers[rank], time.monotonic()) for rank in sorted(watched)}
        self._gone: dict[int, float] = {}
        self._store_answered = time.monotonic()
        self._verdict: str | None = None
        self._waits_for_verdict = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to beat and to watch."""
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stop watching; the others are told that this rank has ended well."""
        self.enter("ending")
        self._stopped.set()
        # The first rank, which holds the store, may have ended before.
        with suppress(Exception):
            self._beat(_ENDED)

    def enter(self, phase: str, step: int = 0) -> None:
        """Say what the main loop begins to do."""
        self._loop = (phase, step, time.monotonic())

    @property
    def phase(self) -> tuple[str, int]:
        return self._loop[:2]

    def wait_for_verdict(self) -> None:
        # Another rank's verdict, on its way, must not be forestalled by one of this rank on the step that has just failed.
        self._waits_for_verdict = True
        time.sleep(max(_SECONDS_TO_LEARN, 5 * self._interval))

    def end_with(self, error: BaseException) -> None:
        """Tell the others of an error with which this rank ends by itself: they cannot go on without it."""
        self._stopped.set()
        if self._world.size == 1:
            return
        own = self._own(0)
        self._tell(f"{named(self._world.rank, own)} ended with an error of its own in {doing(own)}: {type(error).__name__}")
        self._let_others_read()

    def _exchange(self) -> None:
        """Thread: beat, read the beats of the ranks that this one watches, and the verdict."""
        number = 1
        while not self._stopped.wait(self._interval):
            try:
                self._beat(number)
                for other in self._beats:
                    if self._store.check([_key(other)]):
                        self._see(other, Beat(**json.loads(self._store.get(_key(other)))))
                if self._store.check([_VERDICT]):
                    self._verdict = self._store.get(_VERDICT).decode()
                self._store_answered = time.monotonic()
            except Exception as error:
                # The store's process is gone, or this thread was cut off from it: the judge sees how long ago it answered.
                if "Broken pipe" in str(error) or "Connection" in str(error):
                    self._store_answered = min(self._store_answered, time.monotonic() - self._timeout + 3 * self._interval)
            number += 1

    def _beat(self, number: int) -> None:
        self._store.set(_key(self._world.rank), json.dumps(asdict(self._own(number))))

    def _own(self, number: int) -> Beat:
        phase, step, since = self._loop
        where, waits = main_thread()
        pid, started = self._process.pid, self._process.started
        return Beat(self._host, pid, started, phase, step, time.monotonic() - since, where, waits, number)

    def _see(self, rank: int, beat: Beat) -> None:
        if self._beats[rank][0].number != beat.number:
            self._beats[rank] = (beat, time.monotonic())

    def _judge(self) -> None:
        """Thread: look at the clocks, and end this process where one says that the job cannot go on."""
        looked = time.monotonic()
        while not self._stopped.wait(self._interval):
            # A process that was suspended itself, as Slurm suspends whole jobs, knows nothing of the time between.
            late = time.monotonic() - looked - self._interval
            looked = time.monotonic()
            if late > self._timeout / 2:
                self._begin_anew(looked)
            if launcher.is_gone():
                self._kill_stopped()
                continue
            verdict = self._verdict or self._own_verdict()
            if verdict is not None and not self._stopped.is_set():
                self._end(verdict)

    def _begin_anew(self, now: float) -> None:
        self._loop = (*self._loop[:2], now)
        self._store_answered = now
        self._beats = {rank: (beat, now) for rank, (beat, _) in self._beats.items()}

    def _own_verdict(self) -> str | None:
        return self._of_peers() or self._of_this_rank() or self._of_the_store()

    def _of_peers(self) -> str | None:
        for rank, (beat, seen) in self._beats.items():
            if beat.number == _ENDED:
                continue
            if beat.host == self._host and not beat.process.is_alive and self._is_dead(rank):
                return f"{named(rank, beat)} died in {doing(beat)}"
            # Only a store that answers can tell that a beat is missing.
            silence = self._store_answered - seen
            if silence > self._timeout:
                return self._silent(rank, beat, silence)
        return None

    def _is_dead(self, rank: int) -> bool:
        """True if a process that is gone has had the time to have told that it ends well."""
        gone = self._gone.setdefault(rank, time.monotonic())
        return self._store_answered > gone + self._interval or time.monotonic() - gone > _SECONDS_TO_TELL

    def _of_this_rank(self) -> str | None:
        own = self._own(0)
        patience = self._timeout * (LONGER if own.phase in LONG_PHASES else 1)
        # A peer that fell silent when this phase began is named first; who waits for others leaves it to them to say that it is
        # they who stand still.
        patience += (10 if own.waits else 5) * self._interval
        if own.since < patience or self._waits_for_verdict:
            return None
        why = "; it waits for other ranks, none of which is known to stand still" if own.waits else ""
        rank = named(self._world.rank, own)
        return f"{rank} has stood still for {own.since:.0f} s in {doing(own)}, in {own.where}{why}"

    def _of_the_store(self) -> str | None:
        silence = time.monotonic() - self._store_answered
        if silence < self._timeout:
            return None
        if self._world.is_first:
            return f"the store of the process group has not answered for {silence:.0f} s"
        return self._silent(0, self._beats[0][0], silence)

    def _silent(self, rank: int, beat: Beat, silence: float) -> str:
        if beat.host == self._host and not beat.process.is_alive:
            return f"{named(rank, beat)} died in {doing(beat)}"
        if beat.host == self._host:
            beat.process.kill()
        return f"{named(rank, beat)} has been silent for {silence:.0f} s in {doing(beat)}: stopped, or unreachable"

    def _end(self, verdict: str) -> None:
        """Print the verdict and all stacks, tell the others, and end this process."""
        sys.stdout.flush()
        message = f"rank {self._world.rank} on {self._host}: the job cannot go on: {verdict}"
        print(f"{message}\nstacks of this rank's threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)

        self._tell(verdict)
        self._kill_silent()
        events.note_end(EXIT_HANG, _SECONDS_TO_TELL)
        if self._run_dir is not None:
            flight_recorder.write(self._run_dir, self._world.rank, _SECONDS_TO_TELL)
        self._let_others_read()
        processes.kill_children()
        os._exit(EXIT_HANG)

    def _tell(self, verdict: str) -> None:
        # The store may be what hangs: another thread tells the others, and is not waited for long.
        teller = threading.Thread(target=lambda: self._verdicts.set(_VERDICT, verdict), daemon=True)
        teller.start()
        teller.join(timeout=_SECONDS_TO_TELL)

    def _let_others_read(self) -> None:
        # Who holds the store ends last, so that the others can read it.
        time.sleep(3 * self._interval if self._world.is_first else 0)

    def _kill_stopped(self) -> None:
        """Kill every suspended process of this machine: it does not notice that the launcher is gone."""
        for beat, _ in self._beats.values():
            if beat.host == self._host and beat.process.is_stopped:
                beat.process.kill()

    def _kill_silent(self) -> None:
        """Kill every process of this machine that has given no beat for long: a stopped one does not end by itself.

        The verdict names one of them; others may have been stopped at about the same time.
        """
        for beat, seen in self._beats.values():
            if beat.host == self._host and beat.number != _ENDED and self._store_answered - seen > self._timeout / 2:
                beat.process.kill()


def _key(rank: int) -> str:
    return f"beat/{rank}"

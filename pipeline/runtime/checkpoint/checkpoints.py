"""The checkpoints of one run directory: save, find, load, go back.

`checkpoints/step-00000100/` holds a file of fragments for each rank of the job that wrote it, and `state.json`. Any number of
ranks, any ZeRO stage, offloaded or not, continues from it. `checkpoints/latest` names the newest one for people; the newest
complete folder wins.

The position in the data is one integer, samples consumed. Training draws no random numbers, so no generator state is saved.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import CheckpointSettings, ConfigError
from pipeline.progress import Progress
from pipeline.runtime.checkpoint.commit import Saved, SaveError, Writer, start_thread
from pipeline.runtime.checkpoint.continuing import changed_pools, check_settings, other_losses
from pipeline.runtime.checkpoint.folders import had_none_yet, note_none_yet, read_state_of, saved_steps, step_name
from pipeline.runtime.checkpoint.read import load
from pipeline.runtime.checkpoint.retention import remove_all, remove_unfinished, retire_later, set_old_aside
from pipeline.runtime.checkpoint.state import HeldOut, State
from pipeline.runtime.distributed import World, broadcast_from_first
from pipeline.runtime.identity import Change, changed_settings
from pipeline.runtime.logbook import read_records

REMEDY = "repair or remove what is there, or choose another --run-dir to start anew"


class Checkpoints:
    """Saves, finds and loads the checkpoints of one run directory. All methods are collective.

    identity: settings and fingerprints that a resumed run must share with the checkpoint (`identity.identity_of`).
    from_step: the step to go back to; None continues from the newest sound checkpoint.
    say: prints a line, on the first rank.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        identity: dict[str, Any],
        settings: CheckpointSettings,
        from_step: int | None = None,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ):
        self.run_dir = run_dir
        self.directory = run_dir / "checkpoints"
        self.world = world
        self.identity = identity
        self.settings = settings
        self.from_step = from_step
        self._writer = Writer(self.directory, world)
        self._say = say if world.is_first else lambda text: None
        # The newest checkpoint that was completed, until somebody takes note of it.
        self.saved: Saved | None = None
        self._failed_in_a_row = 0
        self._last_begun = time.monotonic()
        self._return_to: int | None = None
        self._removal = start_thread(remove_all, [])

    @property
    def is_due_by_time(self) -> bool:
        """True on the first rank when `checkpoint.every_minutes` are over. Not collective."""
        minutes = self.settings.every_minutes
        return self.world.is_first and minutes is not None and time.monotonic() - self._last_begun >= 60 * minutes

    @property
    def is_written(self) -> bool:
        """True if this rank has nothing left to write of the save in hand. Not collective: ranks agree before they `go_on`."""
        return self._writer.is_done

    def prepare(self, engine: Any) -> None:
        """Make the host buffers of saves in the background, or say that this machine has no memory for them.

        Raises:
            ConfigError: the disk has no room for one checkpoint, so that all that is trained would be lost.
        """
        missing = broadcast_from_first(self._writer.missing_space(engine) if self.world.is_first else None)
        if missing is not None:
            raise ConfigError([f"no room for a checkpoint: {missing}"], "free some of the disk, or choose another --run-dir")
        self._writer.prepare(engine)

    def save(
        self, engine: Any, progress: Progress, held_out: HeldOut, *, in_background: bool, return_to: int | None = None
    ) -> None:
        """Save a checkpoint: begin it, or have it complete on disk when this returns.

        return_to: the first step to which a rollback may have to return; what it may need is kept (`retention.prune`).

        Raises:
            SaveError: it failed, and it was the last of `checkpoint.max_failed_saves` in a row or not to be in the background.
        """
        self._last_begun = time.monotonic()
        self._finish(final=False)
        self._return_to = return_to
        content = {
            "progress": progress.to_json(),
            "identity": self.identity,
            "held_out": held_out,
        }
        try:
            self._writer.begin(engine, content, progress.step)
        except SaveError as error:
            self._failed(error, final=not in_background)
            return
        if not in_background:
            self._finish(final=True)
            self._removal.join()

    def go_on(self, final: bool = False) -> None:
        """Take the next step of the save in hand, once all ranks have agreed that they are done with the one before.

        Raises:
            SaveError: as `save`. final: after the first failure.
        """
        try:
            saved = self._writer.go_on()
        except SaveError as error:
            self._failed(error, final)
            return
        if saved is None:
            return
        self.saved = saved
        self._failed_in_a_row = 0
        if self.world.is_first:
            old = set_old_aside(self.directory, saved.step, self.settings, self._return_to)
            self._removal.join()
            self._removal = start_thread(remove_all, old)
        self._say(_saved_line(saved))

    def resume(self, engine: Any, allow_changed: bool, held_out: Callable[[], HeldOut] = HeldOut) -> Progress:
        """Load the newest sound checkpoint into `engine` and return its progress; without any checkpoint, a new `Progress`.

        Later checkpoints, which were not sound, are retired: from here on they belong to another past.

        held_out: computes each head's loss of the batch that is fixed for this. They must be those that were saved, unless
        the batch or a setting has changed.

        Raises:
            ConfigError: there are checkpoints but none can be used, or they were written under other settings.
        """
        self._removal.join()
        if self.world.is_first:
            remove_unfinished(self.directory)
        names = broadcast_from_first(self._candidates() if self.world.is_first else [])
        progress = self._load_first_sound(names, engine, allow_changed, held_out)
        if progress is None and self.world.is_first:
            note_none_yet(self.directory)
        return progress or Progress()

    def go_back(self, engine: Any, step: int, held_out: Callable[[], HeldOut] = HeldOut) -> Progress | None:
        """Load the newest sound checkpoint of `step`, or from before it, and retire the later ones; returns its progress.

        None, and nothing is done, where there is no such checkpoint.

        Raises:
            ConfigError: none of them can be used; `engine` is then spoilt.
        """
        self._finish(final=False)
        self.saved = None
        steps = saved_steps(self.directory) if self.world.is_first else []
        # The settings are those of this very run, or were allowed to differ when it was continued.
        names = [step_name(saved) for saved in steps if saved <= step]
        return self._load_first_sound(broadcast_from_first(names), engine, True, held_out)

    def _load_first_sound(
        self, names: Sequence[str], engine: Any, allow_changed: bool, held_out: Callable[[], HeldOut]
    ) -> Progress | None:
        """Load the first of these checkpoints that is sound; None if there are no names.

        Raises:
            ConfigError: as `resume`.
        """
        problems: list[str] = []
        for name in names:
            state, found = self._state_of(name)
            if state is not None:
                check_settings(state, self.identity, allow_changed)
                found = load(self.directory / name, state, engine, self.world)
                found = found or other_losses(state, self.identity, held_out())
                if not found:
                    if self.world.is_first:
                        retire_later(self.directory, state.step)
                    for note in changed_pools(state, self.identity, self.world.size):
                        self._say(note)
                    return Progress.from_json(state.progress)
            for problem in found:
                self._say(f"checkpoint not used: {problem}")
            problems += found
        if problems:
            raise self._unusable(problems)
        return None

    def check(self, allow_changed: bool) -> State | None:
        """Return the newest readable `state.json` if this run may resume from it; None for a run without a checkpoint.

        The first rank reads for all ranks: a shared file system may show the others an older state.

        Raises:
            ConfigError: the checkpoint has other fixed settings, or (unless `allow_changed`) others that change the result; or
                something says that a run was here, and no checkpoint can be read.
        """
        state, problems = self._newest_state()
        if state is None:
            if problems:
                raise self._unusable(problems)
            return None
        check_settings(state, self.identity, allow_changed)
        return state

    def _unusable(self, problems: list[str]) -> ConfigError:
        if self.from_step is not None:
            return ConfigError(problems)
        return ConfigError([*problems, f"{self.directory}: no checkpoint can be used"], REMEDY)

    def changed(self) -> list[Change]:
        """List the differences between this run's identity and the newest checkpoint's."""
        state, _ = self._newest_state()
        return changed_settings(state.identity, self.identity) if state else []

    def _newest_state(self) -> tuple[State | None, list[str]]:
        """(state of the newest checkpoint whose state.json is sound, problems with newer ones), from the first rank."""
        return broadcast_from_first(self._read_newest_state() if self.world.is_first else None)

    def _read_newest_state(self) -> tuple[State | None, list[str]]:
        problems: list[str] = []
        for name in self._candidates():
            state, problem = read_state_of(self.directory / name)
            if state is not None:
                return state, problems
            problems.append(problem)
        return None, problems or self._trace_of_a_run()

    def _candidates(self) -> list[str]:
        """The checkpoints that the run may continue from, best first."""
        steps = saved_steps(self.directory)
        return [step_name(step) for step in steps if self.from_step in (None, step)]

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order. Not collective."""
        return saved_steps(self.directory)[::-1]

    def _trace_of_a_run(self) -> list[str]:
        """Say what tells that there were checkpoints, where there are none: a run never starts anew in silence."""
        if self.from_step is not None:
            there = ", ".join(map(str, self.steps())) or "none"
            return [f"--from-step {self.from_step}: no checkpoint of that step; there are: {there}"]
        last = max((record["step"] for record in read_records(self.run_dir)), default=0)
        if last == 0 or had_none_yet(self.directory):
            return []
        return [f"{self.run_dir}: metrics.jsonl goes to step {last}, and the run had a checkpoint, which is gone"]

    def _finish(self, final: bool) -> None:
        """Complete the save in hand, if there is one."""
        while self._writer.is_busy:
            self.go_on(final)

    def _state_of(self, name: str) -> tuple[State | None, list[str]]:
        state, problem = broadcast_from_first(read_state_of(self.directory / name) if self.world.is_first else None)
        return state, [problem] if problem else []

    def _failed(self, error: SaveError, final: bool) -> None:
        """Report a save that failed; raise once there were too many in a row."""
        self._failed_in_a_row += 1
        most = self.settings.max_failed_saves
        if final or self._failed_in_a_row > most:
            raise error
        self._say(f"{error}; the run goes on ({self._failed_in_a_row} of at most {most} failed saves in a row)")


def _saved_line(saved: Saved) -> str:
    return f"saved step {saved.step}: {_size(saved.num_bytes)} in {saved.seconds:.1f} s, training waited {saved.waited:.2f} s"


def _size(num_bytes: float) -> str:
    units = ["TB", "GB", "MB", "KB", "B"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        units.pop()
    return f"{num_bytes:.3g} {units[-1]}"

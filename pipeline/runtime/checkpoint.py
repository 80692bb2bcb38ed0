"""Save and load checkpoints: `checkpoints/step-00000100/` holds DeepSpeed's files of every rank and our `state.json`.

A checkpoint is complete or it does not exist. It is written to `step-….partial`, renamed once all ranks have finished, and
only then named by the file `latest`. DeepSpeed's own `latest` is switched off: rank 0 writes it before the other ranks have
finished, so after a crash one rank would load the checkpoint and another raise, and the job would hang.

The position in the data is one integer, samples consumed. Training draws no random numbers, so no generator state is saved.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.config import ConfigError
from pipeline.progress import Progress
from pipeline.runtime.distributed import World, broadcast_from_first
from pipeline.runtime.engine import Engine, load_checkpoint
from pipeline.runtime.identity import Change, changed_settings
from pipeline.storage.whole_file import publish, write_file

REMEDY = "remove that checkpoint to continue from an older one, or choose another --run-dir to start anew"


class Checkpoints:
    """Saves, finds and loads the checkpoints of one run directory.

    identity: settings and fingerprints that a resumed run must share with the checkpoint (`identity.identity_of`).
    keep: number of newest checkpoints to keep; None keeps all.
    """

    def __init__(self, run_dir: Path, world: World, identity: dict[str, Any], keep: int | None):
        self.directory = run_dir / "checkpoints"
        self.world = world
        self.identity = identity
        self.keep = keep

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write a checkpoint; collective. It is complete on disk when this returns."""
        name = step_name(progress.step)
        partial, final = self.directory / f"{name}.partial", self.directory / name
        if self.world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()

        # Every rank writes its own partition. Without the second barrier the rename could happen under a rank that writes.
        try:
            engine.save_checkpoint(str(self.directory), tag=partial.name, save_latest=False)
        except RuntimeError as error:
            # torch reports a write that failed, on a full disk say, by a bare RuntimeError.
            if not any(words in str(error) for words in ("PytorchStreamWriter", "inline_container", "cannot be opened")):
                raise
            raise OSError(f"{partial}: the checkpoint could not be written; is the disk full? ({error})") from None
        dist.barrier()

        # state.json goes last: a folder without it is incomplete.
        if self.world.is_first:
            state = {"progress": progress.to_json(), "world_size": self.world.size, "identity": self.identity}
            write_file(partial / "state.json", json.dumps(state, indent=1).encode())
            shutil.rmtree(final, ignore_errors=True)
            publish(partial, final)
            write_file(self.directory / "latest", f"{name}\n".encode())
            self._prune(name)
        dist.barrier()

    def resume(self, engine: Engine, allow_changed: bool) -> Progress:
        """Load the newest checkpoint into `engine` and return its progress; without any checkpoint, a new `Progress`.

        Raises:
            ConfigError: there are checkpoints but none can be used, or they were written under other settings.
        """
        state = self.check(allow_changed)
        if not state:
            return Progress()
        name = step_name(state["progress"]["step"])
        if not load_checkpoint(engine, self.directory, name):
            raise ConfigError([f"{self.directory / name}: DeepSpeed could not load it"])
        return Progress.from_json(state["progress"])

    def newest(self) -> str | None:
        """Return the name of the checkpoint to resume from, or None if the run directory has none.

        Raises:
            ConfigError: every checkpoint is incomplete. A run never silently starts from scratch.
        """
        complete = self._complete()
        if not complete and any(path.suffix != ".partial" for path in self.directory.glob("step-*")):
            raise ConfigError([f"{self.directory}: has checkpoints, but none with a state.json; {REMEDY}"])
        pointer = self.directory / "latest"
        named = pointer.read_text().strip() if pointer.is_file() else None
        if named in complete:
            return named
        return complete[-1] if complete else None

    def check(self, allow_changed: bool) -> dict[str, Any]:
        """Return the newest checkpoint's `state.json` if this run may resume from it; {} if there is no checkpoint. Collective.

        The first rank reads for all ranks: a shared file system may show the others an older state.

        Raises:
            ConfigError: the checkpoint has another number of ranks, other fixed settings, or (unless `allow_changed`) other
                settings that change the result.
        """
        state = self._newest_state()
        if not state:
            return {}
        name = step_name(state["progress"]["step"])

        # Never allowed to differ: what could not take effect, and the number of ranks.
        changes = changed_settings(state["identity"], self.identity)
        fixed = [f"{change}; it is fixed for the life of a run" for change in changes if change.is_fixed]
        if state["world_size"] != self.world.size:
            fixed.append(
                f"number of ranks: {name} was written by {state['world_size']}, this job has {self.world.size}; "
                f"start it with {state['world_size']}"
            )

        # Allowed to differ only on request.
        changed = [f"{change} ({name} was trained with the former)" for change in changes if not change.is_fixed]
        if fixed or (changed and not allow_changed):
            remedy = "to start anew choose another --run-dir"
            remedy = remedy if fixed else f"to continue all the same pass --allow-changed; {remedy}"
            raise ConfigError([*fixed, *changed], remedy)
        return state

    def changed(self) -> list[Change]:
        """List the differences between this run's identity and the newest checkpoint's. Collective."""
        state = self._newest_state()
        return changed_settings(state["identity"], self.identity) if state else []

    def _newest_state(self) -> dict[str, Any]:
        """Broadcast the newest checkpoint's `state.json` from the first rank; {} if there is none."""
        state, broken = broadcast_from_first(self._read_newest_state() if self.world.is_first else None)
        if broken:
            raise ConfigError(broken)
        return state

    def _read_newest_state(self) -> tuple[dict[str, Any], list[str]]:
        """Read the newest `state.json` on this rank: (state, problems). Problems are returned, so that all ranks can raise."""
        try:
            name = self.newest()
        except ConfigError as error:
            return {}, error.problems
        if name is None:
            return {}, []
        try:
            state = json.loads((self.directory / name / "state.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            return {}, [f"{self.directory / name}: state.json cannot be read ({error}); {REMEDY}"]
        if not (isinstance(state, dict) and {"progress", "world_size", "identity"} <= state.keys()):
            return {}, [f"{self.directory / name}: state.json is not a checkpoint's; {REMEDY}"]
        return state, []

    def _complete(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        found = (path for path in self.directory.glob("step-*") if (path / "state.json").is_file())
        return sorted(path.name for path in found if path.suffix != ".partial")

    def _prune(self, current: str) -> None:
        """Delete all but the newest `keep` checkpoints, `current` among those kept."""
        # `current` need not have the highest number: a run that went back to an older checkpoint has later ones on disk.
        if self.keep is not None:
            others = [name for name in self._complete() if name != current]
            for name in others[: max(0, len(others) + 1 - self.keep)]:
                shutil.rmtree(self.directory / name)


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint: `step-00000100`."""
    return f"step-{step:08d}"

"""Checkpoints: `checkpoints/step-00000100/` holds DeepSpeed's files of every rank and `state.json`, our own part.

A checkpoint is written under a temporary name, renamed when all ranks have finished, and only then named by the file
`latest`; DeepSpeed's own `latest` is off, because it is written before the other ranks are done. The position of the
job is one integer, samples consumed; nothing in training draws random numbers, so there is no generator to save.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.config import ConfigError
from pipeline.progress import Progress
from pipeline.runtime.distributed import World, from_first
from pipeline.runtime.engine import Engine
from pipeline.runtime.identity import FIXED, differences_that_matter
from pipeline.storage.atomic_write import publish, write_file

REMEDY = "remove that checkpoint to continue from an older one, or choose another --run-dir to start anew"


class Checkpoints:
    """The checkpoints of a run directory. `identity` is what must not change between a run and its continuation."""

    def __init__(self, run_dir: Path, world: World, identity: dict[str, Any], keep: int | None):
        self.directory = run_dir / "checkpoints"
        self.world = world
        self.identity = identity
        self.keep = keep

    def save(self, engine: Engine, progress: Progress) -> None:
        """Every rank calls; when it returns the checkpoint is complete."""
        name = step_name(progress.step)
        partial, final = self.directory / f"{name}.partial", self.directory / name
        if self.world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(self.directory), tag=partial.name, save_latest=False)
        dist.barrier()
        if self.world.is_first:
            state = {"progress": progress.to_json(), "world_size": self.world.size, "identity": self.identity}
            write_file(partial / "state.json", json.dumps(state, indent=1).encode())
            shutil.rmtree(final, ignore_errors=True)
            publish(partial, final)
            write_file(self.directory / "latest", f"{name}\n".encode())
            self._forget_all_but_the_newest_and(name)
        dist.barrier()

    def resume(self, engine: Engine, allow_changed: bool) -> Progress:
        """Load the newest checkpoint into `engine`; a run directory without any starts from nothing.

        Raises:
            ConfigError: there are checkpoints but none can be used, or they belong to other settings.
        """
        state = self.check(allow_changed)
        if not state:
            return Progress()
        name = step_name(state["progress"]["step"])
        loaded, _ = engine.load_checkpoint(str(self.directory), tag=name)
        if loaded is None:
            raise ConfigError([f"{self.directory / name}: DeepSpeed could not load it"])
        return Progress.from_json(state["progress"])

    def newest(self) -> str | None:
        """The checkpoint that a run continues from; None where the run directory has none at all. One that has only
        broken ones is refused: a run never starts anew in silence."""
        complete = self._complete()
        if not complete and any(path.suffix != ".partial" for path in self.directory.glob("step-*")):
            raise ConfigError([f"{self.directory}: has checkpoints, but none with a state.json; {REMEDY}"])
        pointer = self.directory / "latest"
        named = pointer.read_text().strip() if pointer.is_file() else None
        if named in complete:
            return named
        return complete[-1] if complete else None

    def check(self, allow_changed: bool) -> dict[str, Any]:
        """The newest checkpoint's state, if this run may continue from it (ConfigError otherwise); {} if there is none.
        The first rank looks for all: a shared file system may show the others something older."""
        state = self._newest_state()
        if not state:
            return {}
        name = step_name(state["progress"]["step"])
        fixed = [
            f"{key}: was {state['identity'][key]!r}, is now {self.identity[key]!r}; it is fixed for the life of a run"
            for key in FIXED
            if state["identity"].get(key) != self.identity.get(key)
        ]
        if state["world_size"] != self.world.size:
            fixed.append(
                f"number of ranks: {name} was written by {state['world_size']}, this job has {self.world.size}; "
                f"start it with {state['world_size']}"
            )
        changed = [
            f"{change} ({name} was trained with the former)"
            for change in differences_that_matter(state["identity"], self.identity)
            if not change.startswith(FIXED)
        ]
        if fixed or (changed and not allow_changed):
            remedy = "to start anew choose another --run-dir"
            remedy = remedy if fixed else f"to continue all the same pass --allow-changed; {remedy}"
            raise ConfigError([*fixed, *changed, remedy])
        return state

    def changed(self) -> list[str]:
        """What of this run's identity differs from that of the newest checkpoint, one sentence each; none without one."""
        state = self._newest_state()
        return differences_that_matter(state["identity"], self.identity) if state else []

    def _newest_state(self) -> dict[str, Any]:
        """Our own part of the newest checkpoint as the first rank reads it, on every rank; {} if there is none."""
        state, broken = from_first(self._look() if self.world.is_first else None)
        if broken:
            raise ConfigError(broken)
        return state

    def _look(self) -> tuple[dict[str, Any], list[str]]:
        try:
            name = self.newest()
        except ConfigError as error:
            return {}, error.problems
        if name is None:
            return {}, []
        try:
            return json.loads((self.directory / name / "state.json").read_text()), []
        except (OSError, ValueError) as error:
            return {}, [f"{self.directory / name}: state.json cannot be read ({error}); {REMEDY}"]

    def _complete(self) -> list[str]:
        found = (path for path in self.directory.glob("step-*") if (path / "state.json").is_file())
        return sorted(path.name for path in found if path.suffix != ".partial")

    def _forget_all_but_the_newest_and(self, current: str) -> None:
        # After a return to an older checkpoint the one just written is not the one with the highest number.
        if self.keep is not None:
            others = [name for name in self._complete() if name != current]
            for name in others[: max(0, len(others) + 1 - self.keep)]:
                shutil.rmtree(self.directory / name)


def step_name(step: int) -> str:
    return f"step-{step:08d}"

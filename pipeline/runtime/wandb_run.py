"""A run's records at Weights & Biases, under metrics.jsonl's names (`logging.wandb`; an extra).

Where nobody has logged in, each start is recorded below the run directory (`wandb/offline-run-…`), and `wandb sync --id`
uploads them as one run, in their order. A run that resumes goes on in the same place; what was logged after its checkpoint
cannot be taken back, and is logged again.
What fails there, the network or the library's own process, is said once and ends no training: metrics.jsonl has all records.
Neither the command nor anything else of the machine is recorded, because they may hold secrets.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Settings
from pipeline.runtime.metrics import Record
from pipeline.runtime.tensorboard import split_of
from pipeline.storage.masking import masked_text, masked_values
from pipeline.storage.whole_file import write_file

ID_FILE = "wandb-id"


class WandbRun:
    """A tracker of the logbook. first_step: the step resumed from; 0 begins a new run there."""

    def __init__(self, settings: Settings, run_dir: Path, first_step: int):
        # The library is an extra, and takes a while to load.
        import wandb

        project = settings.logging.wandb
        assert project is not None
        run_id = _id_of(run_dir, is_new=first_step == 0)
        self.run: Any = None
        try:
            self.run = wandb.init(
                project=project.project,
                entity=project.entity,
                name=settings.run.name,
                id=run_id,
                dir=str(run_dir),
                resume="allow",
                mode=_mode(),
                config=masked_values(settings.model_dump(mode="json")),
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True, save_code=False
                ),
            )
            # Steps may come again after a restart, so they are a metric like others, and the axis of all.
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # of the library's own many kinds, and of the network's
            self._go_on_without(error)

    def write(self, record: Record) -> None:
        """Log a record; the names of a validation begin with `validation/`, or `validation_NAME/`."""
        if self.run is None:
            return
        split = split_of(record)
        values = {key: value for key, value in record.items() if isinstance(value, int | float)}
        if split is not None:
            values = {key if key == "step" else f"{split}/{key}": value for key, value in values.items()}
        try:
            self.run.log(values)
        except Exception as error:
            self._go_on_without(error)

    def sync(self) -> None:
        """Nothing: the library writes by itself."""

    def close(self) -> None:
        """Return when all is on disk or uploaded: `finish` alone leaves that to a process that may not outlive this one."""
        import wandb

        if self.run is None:
            return
        try:
            self.run.finish()
            wandb.teardown()
        except Exception as error:
            self._go_on_without(error)

    def _go_on_without(self, error: Exception) -> None:
        self.run = None
        said = masked_text(f"{type(error).__name__}: {error}")
        print(
            f"Weights & Biases has failed ({said}); the run goes on without it, and metrics.jsonl has all records", flush=True
        )


def _id_of(run_dir: Path, is_new: bool) -> str:
    """The run's name there, kept in its directory; another one for a new run, or where the file is damaged."""
    file = run_dir / ID_FILE
    before = file.read_bytes() if file.is_file() else b""
    if is_new or not re.fullmatch(rb"[\w-]{1,64}", before):
        run_dir.mkdir(parents=True, exist_ok=True)
        before = os.urandom(4).hex().encode()
        write_file(file, before)
    return before.decode()


def _mode() -> Literal["offline"] | None:
    """`offline` where nobody has logged in; None leaves it to the library's own WANDB_MODE."""
    import wandb

    if "WANDB_MODE" in os.environ:
        return None
    return None if wandb.login(prompt=False) else "offline"

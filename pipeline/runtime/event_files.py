"""TensorBoard's event files of a run: one folder for the run itself, and one below it for each head and source.

When a run resumes, TensorBoard drops the points after its checkpoint from all of them. It does so in the order of the files'
names, which begin with the clock's seconds; a file whose name bears a later clock (another node's, or one that was set back)
would be read last, and take the newer points away. Older files are therefore renamed to bear an earlier one.
"""

import json
import re
import shlex
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline.config import Settings
from pipeline.runtime.metrics import Record, Totals
from pipeline.runtime.tensorboard import chart_layout, histogram_arguments, is_drawn, place_of, split_of
from pipeline.storage.masking import masked_values
from pipeline.storage.whole_file import naming, sync_file

_EVENTS = "events.out.tfevents."
_COMPARED_BY = (("head_0", "loss"), ("", "bits_per_byte"))
"""Runs and quantities of a validation whose last values the table of settings shows beside them. The run's own `loss` is the
objective, which settings of the selection move by themselves."""


class EventFiles:
    """Writer of a run's event files. first_step: the step resumed from; 0 is a new run, of which no old point is shown."""

    def __init__(self, folder: Path, first_step: int, num_heads: int, held_out: tuple[str, ...]):
        self.folder, self.first_step, self.held_out = folder, first_step, held_out
        self.writers: dict[str, SummaryWriter] = {}
        # All folders that are there, because each may have points to be dropped.
        for run in ["", *sorted({path.parent.name for path in folder.glob(f"*/{_EVENTS}*")})]:
            self._writer(run)
        if num_heads > 1:
            self._writer("").add_custom_scalars(chart_layout(num_heads, held_out))

    def write(self, record: Record) -> None:
        """Add a record's values."""
        split = split_of(record)
        for key, value in record.items():
            place = place_of(key, split)
            if place is not None and is_drawn(key, value):
                writer = self._writer(place.run)
                with naming(Path(writer.log_dir)):
                    writer.add_scalar(place.tag, value, record["step"])

    def write_histograms(self, step: int, totals: Totals) -> None:
        """Add a histogram of each selecting head's excess loss."""
        for head, counts_V in enumerate(totals.whole.histogram_KV, start=1):
            filled = counts_V.nonzero().flatten().tolist()
            if filled:
                arguments = histogram_arguments(counts_V.tolist(), filled[0], filled[-1])
                self._writer(f"head_{head}").add_histogram_raw("selection/excess", global_step=step, **arguments)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text, shown as it is, line by line."""
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer("").add_text(tag, block, step)

    def write_description(self, settings: Settings, step: int) -> None:
        """Add the command and the resolved recipe as texts, and the settings to the table that compares runs."""
        self.write_text("run/command", shlex.join(masked_values(sys.argv)), step)
        self.write_text("run/recipe", settings.to_yaml(), step)
        columns, started, _ = hparams(_flat(settings), {})
        _arrange(columns, _flat(settings), [split_of({"split": "validation", "set": name}) or "" for name in self.held_out])
        # In TensorBoard's own form, because `add_hparams` would make one more run of each start.
        for summary in (columns, started):
            self._writer("")._get_file_writer().add_summary(summary)

    def write_png(self, tag: str, png: bytes, step: int) -> None:
        """Add a picture that is encoded already."""
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._writer("")._get_file_writer().add_summary(summary, step)

    def sync(self) -> None:
        """Have on the disk what was written so far."""
        for writer in self.writers.values():
            writer.flush()
            for path in Path(writer.log_dir).glob("events.*"):
                sync_file(path)

    def close(self) -> None:
        for writer in self.writers.values():
            with naming(Path(writer.log_dir)):
                writer.close()

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self.writers:
            folder = self.folder / run
            _name_earlier(folder)
            first = self.first_step + 1 if self.first_step else 0
            self.writers[run] = SummaryWriter(str(folder), purge_step=first)
        return self.writers[run]


def _arrange(columns: Summary, settings: Mapping[str, Any], splits: Sequence[str]) -> None:
    """Arrange the columns of the table of settings: TensorBoard shows the first few, by name, of those that are said to differ,
    so they are the ones that are not at their default. And add what runs are compared by; torch knows no run below the run."""
    plugin_data, defaults = columns.value[0].metadata.plugin_data, _flat(Settings())
    content = HParamsPluginData.FromString(plugin_data.content)
    for setting in content.experiment.hparam_infos:
        setting.differs = settings[setting.name] != defaults[setting.name]
    for split in splits:
        for run, quantity in _COMPARED_BY:
            content.experiment.metric_infos.add(name=MetricName(group=run, tag=f"{split}/{quantity}"))
    plugin_data.content = content.SerializeToString()


def _flat(settings: Settings) -> dict[str, bool | int | float | str]:
    """Settings as `section.name`, with values that TensorBoard can tabulate."""
    return {
        f"{section}.{name}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, values in settings.model_dump(mode="json").items()
        for name, value in values.items()
    }


def _name_earlier(folder: Path) -> None:
    """Rename the event files that are there so that they sort before any that is made now, and among each other as before."""
    files = sorted(folder.glob(f"{_EVENTS}*"))
    last = re.match(rf"{re.escape(_EVENTS)}(\d+)", files[-1].name) if files else None
    now = int(time.time())
    if last is None or int(last[1]) < now:
        return
    for number, path in enumerate(files):
        rest = re.sub(rf"^{re.escape(_EVENTS)}\d*\.?", "", path.name)
        # In the order of time, so that a kill in between leaves it as it was.
        path.rename(folder / f"{_EVENTS}{number + 1:010d}.{rest}")

"""The progress of a run: the counters that the loop advances, checkpoints save and metrics report.

It imports nothing but the prediction of thresholds and the windows of loss spikes, so that both the training loop and the
runtime below it can use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.loss_spikes import Recent
from pipeline.weighting.prediction import Prediction


@dataclass
class Progress:
    """Counters of a run, over all ranks.

    step: optimizer steps done, skipped ones included.
    samples: samples consumed, which is the position in the data.
    tokens: tokens consumed, without padding.
    skipped_steps: steps whose gradient was discarded.
    skipped_in_a_row: skipped steps since the last applied one.
    prediction: predicted thresholds of the next step. It belongs to a checkpoint because it decides the order in which the
        gradient is summed, and so its last bits.
    corrupt_samples: damaged samples that were replaced by padding.
    tokens_by_source, samples_by_source: in the order of the manifest's sources; a sample counts for each source in it.
    losses, gradient_norms: of the newest applied steps, over all ranks.
    rollbacks: returns to a checkpoint from before a loss spike.
    skipped: stretches [start, end) of rows that such returns have left out (`data.loading.skipping`).
    returned_to: the step at which the newest of these stretches began; what lies before it is sound.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    prediction: Prediction = field(default_factory=Prediction)
    corrupt_samples: int = 0
    tokens_by_source: list[int] = field(default_factory=list)
    samples_by_source: list[int] = field(default_factory=list)
    losses: Recent = field(default_factory=Recent)
    gradient_norms: Recent = field(default_factory=Recent)
    rollbacks: int = 0
    skipped: Sequence[Sequence[int]] = ()
    returned_to: int = 0

    @property
    def applied_steps(self) -> int:
        """Steps that updated the weights; the learning-rate schedule counts these."""
        return self.step - self.skipped_steps

    @property
    def samples_skipped(self) -> int:
        """Rows of the stretches that are left out."""
        return sum(end - start for start, end in self.skipped)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, exactly; the host waits for the device."""
        values = {known.name: getattr(self, known.name) for known in fields(self)}
        return values | {
            "prediction": {"threshold_K": self.prediction.numbers()},
            "losses": self.losses.numbers(),
            "gradient_norms": self.gradient_norms.numbers(),
            "skipped": [list(stretch) for stretch in self.skipped],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Restore from `to_json`; counters that an older checkpoint lacks start at their defaults."""
        known = {known.name: values[known.name] for known in fields(cls) if known.name in values}
        predicted = known.get("prediction", {})
        # An older program called it level_K.
        prediction = Prediction.of(predicted.get("threshold_K", predicted.get("level_K", [])))
        windows = {name: Recent(known.get(name, [])) for name in ("losses", "gradient_norms")}
        return cls(**known | windows | {"prediction": prediction})

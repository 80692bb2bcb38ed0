"""Where a run is: what training counts, checkpoints keep and metrics report.

Only the prediction of thresholds lies below it, so that the runtime can keep it as well as the loop that counts.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.weighting.prediction import Prediction


@dataclass
class Progress:
    """Where a run is. step: optimiser steps done, skipped ones among them; samples and tokens: consumed so far, over
    all ranks, tokens without padding; skipped_steps: steps whose gradient was discarded; skipped_in_a_row: those of
    them since the last step that was applied; corrupt_samples: damaged ones that were replaced by padding; by source:
    tokens, and samples that hold any. prediction: of the next step's thresholds; with another one the same gradient would be
    summed in another order."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    prediction: Prediction = field(default_factory=Prediction)
    corrupt_samples: int = 0
    tokens_by_source: list[int] = field(default_factory=list)
    samples_by_source: list[int] = field(default_factory=list)

    @property
    def applied_steps(self) -> int:
        return self.step - self.skipped_steps

    def to_json(self) -> dict[str, Any]:
        """Plain values, every bit of them; waits for the device."""
        values = {known.name: getattr(self, known.name) for known in fields(self)}
        return values | {"prediction": {"threshold_K": self.prediction.numbers()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """From what `to_json` gave, or gave when there were fewer of them."""
        known = {known.name: values[known.name] for known in fields(cls) if known.name in values}
        predicted = known.get("prediction", {})
        # An older program called it level_K.
        prediction = Prediction.of(predicted.get("threshold_K", predicted.get("level_K", [])))
        return cls(**known | {"prediction": prediction})

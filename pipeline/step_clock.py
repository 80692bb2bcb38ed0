"""Wall time of a run's steps: speed, waits for data, time left. Validations and checkpoints belong to no step's time."""

import time
from collections import deque

_STEPS_OF_A_MEAN = 20


class StepClock:
    """Measures the steps of this process.

    first: number and end time of its first step; None before that. seconds_saving: for which training has stood still for
    checkpoints since the last logged step; whoever logs it sets it back.
    """

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None
        self.seconds_saving = 0.0
        # The last steps: tokens, seconds since the end of the step before, and the part of these spent waiting for data.
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=_STEPS_OF_A_MEAN)
        self._last_end = time.perf_counter()

    def end_step(self, step: int, tokens: int, waited: float) -> None:
        """Record the end of a step. tokens: over all ranks; waited: seconds for which this rank waited for data."""
        now = time.perf_counter()
        self.first = self.first or (step, now)
        self._recent.append((tokens, now - self._last_end, waited))
        self.restart()

    def restart(self) -> None:
        """Exclude the time since the last step (a validation, a checkpoint) from the next step's."""
        self._last_end = time.perf_counter()

    def recent(self) -> tuple[float, float, float]:
        """Tokens a second, seconds a step, and the fraction of the time spent waiting for data, over the last steps."""
        tokens, seconds, waited = map(sum, zip(*self._recent, strict=True))
        return tokens / seconds, seconds / len(self._recent), waited / seconds

    def seconds_a_step(self, step: int) -> float:
        """Mean wall time a step up to this one, all that lies between included; without the first step, which warms up."""
        assert self.first is not None
        first, end = self.first
        return (time.perf_counter() - end) / (step - first) if step > first else self._recent[-1][1]

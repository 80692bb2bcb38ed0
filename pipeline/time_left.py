"""Progress of a long piece of work, and the time that the rest of it takes, said now and then."""

import time

_SECONDS_BETWEEN_LINES = 10.0


class TimeLeft:
    """Measures a piece of work that consists of equal parts, from now on.

    total: of the parts. unit: words for them and what is done with them, such as `rows evaluated`.
    """

    def __init__(self, total: int, unit: str):
        self.total, self.unit = total, unit
        self._started = self._last_said = time.monotonic()

    def line(self, done: int) -> str | None:
        """Return words for what is done and left; None where the last ones are younger than ten seconds, or all is done."""
        now = time.monotonic()
        if now - self._last_said < _SECONDS_BETWEEN_LINES or not 0 < done < self.total:
            return None
        self._last_said = now
        left = (now - self._started) / done * (self.total - done)
        return f"{done:,} of {self.total:,} {self.unit}, about {left:,.0f} s left"

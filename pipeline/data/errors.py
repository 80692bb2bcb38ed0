"""The one error of data.

Every mistake a user can make with data is a `DataError`, whose message says what was expected, what was found, and what
to do.
"""


class DataError(ValueError):
    """Something about the data that a user caused or can mend; one message, ready to be shown. `agreed`: all ranks raise
    it, with the same message."""

    agreed = False

"""DataError, the one error of data.

Every mistake that a user can make with data raises a `DataError`. Its message says what was expected, what was found, and what
to do.
"""


class DataError(ValueError):
    """A problem with data that a user caused or can mend. The message is ready to be shown.

    `agreed` is true if all ranks raise the error together, with the same message.
    """

    agreed = False

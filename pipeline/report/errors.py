"""Errors that end a page before it is begun."""


class ReportError(ValueError):
    """Runs that no page can be made of; the message is ready to be shown."""

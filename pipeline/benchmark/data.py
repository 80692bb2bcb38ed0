"""The figures of the data path."""

from pipeline.benchmark.preparing import add_arguments, measure, table

__all__ = ["add_arguments", "measure", "table"]

"""What `launch/benchmark.py` measures, a module a command.

Each has `add_arguments(parser)`, `measure(options) -> dict` (figures that JSON can hold) and `table(figures) -> str`. Times
are medians of several runs of which the ways compared took turns, because a machine's speed drifts; ratios are what is
worth reading.
"""

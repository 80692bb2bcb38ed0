"""The measurements of `launch/benchmark.py`, a module a command.

Each has `add_arguments(parser)`, `measure(options) -> dict` (figures that JSON can hold) and `table(figures) -> str`. Times
are medians of several rounds in which the variants compared took turns, because a machine's speed drifts; ratios are what is
worth reading. `timing` has the turns, `ranks` starts processes that are ranks, `collectives` records what they exchange.
"""

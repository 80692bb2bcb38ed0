"""Measure this system's parts beside what one would write in their place.

    python launch/benchmark.py COMMAND [--json FILE] [options of the command]

Prints a table; `--json` writes the same figures, at full precision. `pipeline.benchmark` has a module a command, which
says what is measured and how.

Exit code 0: all was measured. 1: a part failed, which the table and `failed` in the JSON name; the other figures are there all
the same. 2: wrong options, or a machine that cannot run the command.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from pipeline.benchmark.options import ADD_OPTIONS, description_of
from pipeline.data.errors import DataError
from pipeline.failures import EXIT_USAGE, fail, guarded
from pipeline.option_parser import OptionParser, OptionsError
from pipeline.options import json_problems, path_argument, write_json

PROG = "benchmark.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(f"{PROG}: error", lambda: _measure(_parser().read_or_refuse(arguments)), (OptionsError, DataError))


def _measure(options: argparse.Namespace) -> int:
    for problem in json_problems(options.json):
        return fail(f"{PROG}: error", problem, EXIT_USAGE, True)
    command = importlib.import_module(f"pipeline.benchmark.{options.command}")
    figures = command.measure(options)
    print(command.table(figures))
    if options.json is not None:
        write_json(options.json, figures)
    return 1 if figures.get("failed") else 0


def _parser() -> OptionParser:
    parser = OptionParser(prog=PROG, description=__doc__)

    # A subcommand for each module, with its docstring as help.
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(ADD_OPTIONS))
    for name, add_options in ADD_OPTIONS.items():
        description = description_of(name)
        command = commands.add_parser(name, help=description.partition("\n")[0], description=description)
        add_options(command)
        command.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())

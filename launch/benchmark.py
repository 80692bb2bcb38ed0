"""Measure this system's parts beside what one would write in their place.

    python launch/benchmark.py COMMAND [--json FILE] [options of the command]

Prints a table; `--json` writes the same figures, at full precision. `pipeline.benchmark` has a module a command, which
says what is measured and how.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.benchmark import checkpoint, data, heads, selection, step

COMMANDS = {"selection": selection, "heads": heads, "step": step, "data": data, "checkpoint": checkpoint}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    command = COMMANDS[options.command]
    figures = command.measure(options)
    print(command.table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    # A subcommand for each module, with its docstring as help.
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())

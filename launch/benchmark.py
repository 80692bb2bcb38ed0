"""Measure what this system promises.

    python launch/benchmark.py data [--json FILE] …

Prints a table; with --json the figures also go to a file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.benchmark import data

COMMANDS = {"data": data}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    figures = COMMANDS[options.command].measure(options)
    print(COMMANDS[options.command].table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure what this system promises.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0], allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

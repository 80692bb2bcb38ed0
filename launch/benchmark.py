"""Measure parts of the pipeline side by side with what a user would have without them.

    python launch/benchmark.py COMMAND [options] [--json FILE]

Prints a table; `--json` also writes its figures. COMMAND --help lists the options of each.
"""

import argparse
import json
import sys
from pathlib import Path

from pipeline.benchmark import heads

COMMANDS = {"heads": heads}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, _ = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    module = COMMANDS[options.command]
    figures = module.measure(options)
    print(module.table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

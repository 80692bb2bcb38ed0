"""Compare runs seed by seed, with intervals.

    python launch/compare.py A B ... [--json FILE]

A, B, ... are run directories, or folders of run directories. Runs that differ only in their seeds are one arm; each arm is
compared with the first run's, by held-out losses and bits per byte after the last step that all runs share, as differences of
runs with the same seeds, and their mean's 95 % interval. These are model.seed and data.seed, and training.selection_seed too
where runs of an arm differ in it alone. Runs whose data is unlike, by content, are refused, unless --allow-unlike is given.
Exit code 2, with one message, if there is nothing to compare.
"""

import sys
from collections.abc import Sequence

from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, OptionsError
from pipeline.options import json_problems, path_argument, write_json
from pipeline.report.errors import ReportError


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = OptionParser(prog="compare.py", description=__doc__)
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--allow-unlike", action="store_true", help="compare runs on unlike data all the same")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there")
    return guarded(f"{parser.prog}: error", lambda: _compare(parser, arguments), (OptionsError, ReportError))


def _compare(parser: OptionParser, arguments: Sequence[str]) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += parser.unknown_options(unknown)
    problems += json_problems(options.json)
    if problems:
        raise OptionsError(problems)

    from pipeline.report.comparison import compare, text

    figures = compare(options.runs, options.allow_unlike)
    print(text(figures))
    if options.json is not None:
        write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

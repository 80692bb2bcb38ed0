"""Say what a run can prove by its own records.

    python launch/audit.py RUN [--json FILE]

RUN is a run directory. From its files alone: that no sample was lost, repeated or read in another order, over all restarts and
numbers of ranks; which checkpoints are sound, every byte read; and where the wall clock went. Exit code 0 if all is sound; 1
with a list of what is not; 2, with one message, if RUN is no run directory. Nothing is changed, and no GPU is needed.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, OptionsError
from pipeline.options import json_problems, path_argument, write_json

NOT_SOUND = 1


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = OptionParser(prog="audit.py", description=__doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run directory")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there")
    return guarded(f"{parser.prog}: error", lambda: _audit(parser, arguments), (OptionsError,))


def _audit(parser: OptionParser, arguments: Sequence[str]) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += parser.unknown_options(unknown)
    problems += _problems(options)
    if problems:
        raise OptionsError(problems)

    from pipeline.audit.report import audit, figures, text

    values = figures(audit(options.run))
    print(text(values))
    if options.json is not None:
        write_json(options.json, values)
    return 0 if values["sound"] else NOT_SOUND


def _problems(options: argparse.Namespace) -> list[str]:
    traces = ("events.jsonl", "metrics.jsonl", "checkpoints", "config.yaml")
    problems = json_problems(options.json)
    if options.run is not None and not any((options.run / name).exists() for name in traces):
        problems.append(f"{options.run}: expected a run directory, with {', '.join(traces[:-1])} or {traces[-1]}")
    return problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Say what a run can prove by its own records.

    python launch/audit.py RUN [--json FILE]

RUN is a run directory. From its files alone: that no sample was lost, repeated or read in another order, over all restarts and
numbers of ranks; which checkpoints are sound, every byte read; and where the wall clock went. Exit code 0 if all is sound; 1
with a list of what is not; 2, with one message, if RUN is no run directory. Nothing is changed, and no GPU is needed.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.command_line import guarded, json_problems, path_argument, write_json

NOT_SOUND = 1


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run directory")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    return guarded(f"{parser.prog}: error", lambda: _audit(options), (ValueError,))


def _audit(options: argparse.Namespace) -> int:
    from pipeline.audit.report import audit, figures, text

    traces = ("events.jsonl", "metrics.jsonl", "checkpoints", "config.yaml")
    if not any((options.run / name).exists() for name in traces):
        raise ValueError(f"{options.run}: expected a run directory, with {', '.join(traces[:-1])} or {traces[-1]}")
    problems = json_problems(options.json)
    if problems:
        raise ValueError("; ".join(problems))

    values = figures(audit(options.run))
    print(text(values))
    if options.json is not None:
        write_json(options.json, values)
    return 0 if values["sound"] else NOT_SOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

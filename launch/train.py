"""Train a policy with selective multi-token prediction.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json [--config launch/recipes/NAME.yaml] [section.key=value ...]

Without --config it runs the demo. Run again with the same run directory it continues by itself. Exit codes: 0 finished,
2 wrong settings or data, 3 training diverged or ranks disagree, 4 another rank died or stands still, 75 stopped on request
with more to do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import end_process, run_command
from pipeline.option_parser import at_least
from pipeline.options import job_parser

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = job_parser("train.py", __doc__, DEMO)
    parser.add_argument("--dry-run", action="store_true", help="build everything, make two steps, report, stop")
    parser.add_argument("--allow-changed", action="store_true", help="continue a run with settings that change its result")
    parser.add_argument(
        "--from-step", type=at_least(0), metavar="N", help="go back to the checkpoint of step N; later ones are retired"
    )
    return run_command(parser, arguments, train)


def train(job, options: argparse.Namespace, stop) -> int:
    """The command on every rank (`on_all_ranks.Command`)."""
    from pipeline.dry_run import dry_run
    from pipeline.job import run_job

    return dry_run(job) if options.dry_run else run_job(job, stop)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

"""Score prepared data with a frozen reference once, so that training needs no reference model.

    deepspeed launch/score.py --deepspeed ds_configs/zero3.json --config launch/recipes/NAME.yaml --output DIR
    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --config launch/recipes/NAME.yaml reference.cached=DIR

Takes data, reference, precision and micro-batch from the same recipe as training, runs on any number of ranks, and resumes when
it is run again. After SIGTERM or SIGUSR1 it finishes the current piece, if that takes no more than ten seconds, and ends with
exit code 75.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import end_process, run_command
from pipeline.options import job_parser, path_argument

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = job_parser("score.py", __doc__, DEMO)
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="what reference.cached will name")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="of the stored losses; float16 is half the size and rounds a loss by at most one part in 2,048",
    )
    # The recipe may already name the cache that is to be written.
    return run_command(parser, arguments, score, own_overrides=["reference.cached=null"], own_checks=check)


def check(settings, options: argparse.Namespace, run_dir: Path) -> list[str]:
    """List what scoring alone lacks (`command_line.OwnChecks`)."""
    from pipeline.checks import folder_problems
    from pipeline.scoring import scoring_problems

    output = [] if options.output is None else folder_problems("--output", options.output)
    return [*scoring_problems(settings, run_dir), *output]


def score(job, options: argparse.Namespace, stop) -> int:
    """The command on every rank (`command_line.Command`)."""
    from pipeline.job import with_builtin_data
    from pipeline.scoring import score

    return score(job, with_builtin_data(job, stop), options.output, options.dtype, stop)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

"""Score prepared data with a frozen reference once, so that training needs no reference model.

    deepspeed launch/score.py --deepspeed ds_configs/zero3.json --config launch/recipes/NAME.yaml --output DIR
    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --config launch/recipes/NAME.yaml reference.cached=DIR

    python launch/score.py --import FILE --data DIR --output DIR      external scores, of your own making
    deepspeed launch/train.py … training.selection_score=external training.external_scores=DIR

Takes data, reference, precision and micro-batch from the same recipe as training, runs on any number of ranks, and resumes when
it is run again. After SIGTERM or SIGUSR1 it finishes the current piece, if that takes no more than ten seconds, and ends with
exit code 75.

--import reads the scores of one prepared folder's tokens instead of computing losses, without ranks: .npy, float32
[samples, T] in the manifest's order, or .jsonl, a line {"key": …, "scores": [T numbers]} a row; `launch/shards.py export-rows`
writes keys and ids to compute them from. Import the held-out folders too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import end_process, run_command
from pipeline.failures import guarded
from pipeline.option_parser import OptionParser
from pipeline.options import job_parser, path_argument
from pipeline.runtime.launcher import is_first_rank

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if any(argument.partition("=")[0] == "--import" for argument in arguments):
        return guarded("score.py: error", lambda: import_(arguments), (ValueError,))
    parser = job_parser("score.py", __doc__, DEMO)
    _add_options(parser)
    # The recipe may already name the cache that is to be written.
    return run_command(parser, arguments, score, own_overrides=["reference.cached=null"], own_checks=check)


def _add_options(parser: OptionParser) -> None:
    parser.add_argument(
        "--output",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="what reference.cached, or training.external_scores, will name",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="of the stored losses; float16 is half the size and rounds a loss by at most one part in 2,048",
    )
    parser.add_argument(
        "--import", dest="imported", type=path_argument, metavar="FILE", help="read external scores, .npy or .jsonl"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="with --import: the prepared folder that they score (default: the recipe's data.path)"
    )


def import_(arguments: Sequence[str]) -> int:
    """Import external scores, on the first rank alone."""
    from pipeline.config import ConfigError
    from pipeline.data.shards.external_scores import import_scores
    from pipeline.options import read_options, read_recipe
    from pipeline.storage.location import parse_location

    # What it needs of a recipe is the data alone; a launcher may start several ranks.
    parser = job_parser("score.py", __doc__, DEMO)
    _add_options(parser)
    read = read_options(parser, arguments)
    options = read.options
    settings, problems = read_recipe(parser, read)
    own = [problem for problem in problems if problem.startswith("--") and not problem.startswith("--deepspeed")]
    location = settings.data.path if options.data is None else parse_location(options.data)
    if location is None:
        own.append("--data: not set, and the recipe names no data.path; name the prepared folder that is scored")
    if options.imported is not None and not options.imported.is_file():
        own.append(f"--import: {options.imported}: no such file")
    if own:
        raise ConfigError(own)
    assert location is not None
    if not is_first_rank():
        return 0
    folder = import_scores(options.imported, location, options.output, options.dtype, settings.data.access)
    print(f"{location}: external scores in {folder}")
    return 0


def check(settings, options: argparse.Namespace, run_dir: Path) -> list[str]:
    """List what scoring alone lacks (`on_all_ranks.OwnChecks`)."""
    from pipeline.checks import folder_problems
    from pipeline.scoring import scoring_problems

    output = [] if options.output is None else folder_problems("--output", options.output)
    return [*scoring_problems(settings, run_dir), *output]


def score(job, options: argparse.Namespace, stop) -> int:
    """The command on every rank (`on_all_ranks.Command`)."""
    from pipeline.job import with_builtin_data
    from pipeline.scoring import score

    return score(job, with_builtin_data(job, stop), options.output, options.dtype, stop)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

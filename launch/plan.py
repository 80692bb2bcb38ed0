"""Estimate the memory that each rank of a job needs, before anything is built.

    python launch/plan.py --deepspeed ds_configs/zero3.json --config launch/recipes/NAME.yaml --gpus 64 [--device-memory 80]
        [--json FILE] [section.key=value ...]

Needs neither GPUs nor data (except for model.vocab_size, which a recipe may leave to the data). Prints the moment of a step at
which memory is highest, what it consists of, whether it fits, and how much each setting that saves memory would save. Exit
code 0; 1 if it does not fit; 2, with one message, if the arguments must be corrected.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, Read, at_least
from pipeline.options import json_problems, path_argument, read_options, read_recipe, recipe_parser, write_json

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
DOES_NOT_FIT = 1


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = recipe_parser("plan.py", __doc__, DEMO)
    parser.add_argument("--gpus", type=at_least(1), required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--device-memory", type=float, metavar="GIB", help="of one GPU; default: of this machine's, if it has one"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what the ranks run on (default: cuda)")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there, in bytes")
    read = read_options(parser, arguments)

    from pipeline.config import ConfigError

    return guarded(f"{parser.prog}: error", lambda: _plan(parser, read), (ConfigError,))


def _plan(parser: OptionParser, read: Read) -> int:
    options, figures = read.options, _figures(parser, read)

    from pipeline.planning.report import table

    print(table(figures))
    if options.json is not None:
        write_json(options.json, figures)
    return DOES_NOT_FIT if figures["verdict"] == "does not fit" else 0


def _figures(parser: OptionParser, read: Read):
    options = read.options
    settings, problems = read_recipe(parser, read)

    from pipeline.checks import check_before_planning
    from pipeline.planning.micro_batch import with_micro_batch
    from pipeline.planning.report import document
    from pipeline.planning.resolve import resolve_planned_job
    from pipeline.runtime.memory import total_bytes

    if options.device_memory is not None and not 0 < options.device_memory < math.inf:
        problems.append(f"--device-memory: got {options.device_memory}; expected a number of GiB above 0")
    problems += json_problems(options.json)
    settings, content = check_before_planning(settings, options.deepspeed, options.gpus, problems)
    on_gpu = options.device == "cuda"
    memory = total_bytes() if options.device_memory is None and on_gpu else (options.device_memory or 0) * 2**30 or None
    chosen = with_micro_batch(settings, content, options.gpus, on_gpu, memory)
    job, notes = resolve_planned_job(chosen, content, options.gpus, on_gpu, memory)
    if chosen != settings:
        limit = "the largest that fits" if memory else "the largest that divides a rank's lanes, as no memory is known"
        notes.append(f"data.micro_batch: auto is {chosen.data.micro_batch} rows, {limit}.")
    return document(job, memory, notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

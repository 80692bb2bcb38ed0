"""Evaluate a trained model on prepared data: each head's loss and perplexity, bits per byte, acceptance of drafts.

    python launch/evaluate.py MODEL --data DIR [--data DIR …] [--json FILE]
    torchrun --nproc-per-node N launch/evaluate.py MODEL --data DIR

MODEL is a run directory (its newest sound checkpoint, or that of step N), a checkpoint folder or an export. DIR is a prepared
folder, or a folder of such folders; each has figures of its own, and where sources have names each source. A loss is the mean
over all valid pairs, in nats; the ranks share the rows, and the figures are those of one. Exit code 0; 2, with one message, if
something must be corrected.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.command_line import end_process
from pipeline.failures import guarded
from pipeline.model_options import add_dtype, add_tokenizer, model_parser
from pipeline.option_parser import OptionParser, OptionsError, at_least
from pipeline.options import json_problems, path_argument, write_json
from pipeline.runtime.launcher import is_first_rank


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    return guarded(f"{parser.prog}: error", lambda: _evaluate(parser, arguments), (ValueError,), is_first_rank())


def _parser() -> OptionParser:
    parser = model_parser("evaluate.py", __doc__)
    parser.add_argument("--data", type=path_argument, action="append", required=True, metavar="DIR", help="held-out data")
    parser.add_argument("--rows", type=at_least(1), metavar="N", help="of each folder, spread evenly over it (default: all)")
    parser.add_argument("--micro-batch", type=at_least(1), default=8, metavar="N", help="rows of a rank at once (default: 8)")
    parser.add_argument(
        "--drafts",
        type=at_least(0),
        default=8,
        metavar="N",
        help="rows continued to count accepted drafts (default: 8; 0: none)",
    )
    # Appended by the deepspeed launcher; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_dtype(parser, "the model's on a GPU, float32 on a CPU")
    add_tokenizer(parser)
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there")
    return parser


def _evaluate(parser: OptionParser, arguments: Sequence[str]) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += [*parser.unknown_options(unknown), *json_problems(options.json)]
    if problems:
        raise OptionsError(problems)

    from pipeline.evaluate_model import evaluate_model

    found = evaluate_model(options)
    if options.json is not None and found is not None:
        write_json(options.json, found)
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

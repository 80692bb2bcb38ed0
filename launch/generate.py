"""Continue texts with a trained model, plainly or self-speculatively.

    python launch/generate.py MODEL --prompt TEXT --max-tokens N [--speculate | --no-speculate] [--json FILE]

MODEL is a run directory (its newest sound checkpoint, or that of step N), a checkpoint folder or an export. Greedy, unless
--temperature is given. Self-speculative decoding is what a model with several heads does by itself: its heads 1, 2, … draft
tokens, head 0 verifies them, and the tokens are those of plain decoding, or drawn from the same distribution. --speculate
decodes plainly as well, to compare: tokens accepted per step (head 0's own included), acceptance of each head, wall-clock. The
first token of a completion comes from reading its prompt, and belongs to no step; drafts accepted beyond its end count too. A
completion ends at the end of a document,
at a --stop token, after --max-tokens or where the context is full. Exit code 0; 2, with one message, if something must be
corrected.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.failures import guarded
from pipeline.model_options import add_dtype, add_tokenizer, model_parser
from pipeline.option_parser import OptionParser, OptionsError, at_least
from pipeline.options import json_problems, path_argument, write_json


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    return guarded(f"{parser.prog}: error", lambda: _generate(parser, arguments), (ValueError,))


def _parser() -> OptionParser:
    parser = model_parser("generate.py", __doc__)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", type=path_argument, metavar="FILE", help="one prompt a line")
    parser.add_argument("--max-tokens", type=at_least(1), default=64, metavar="N", help="of each completion (default: 64)")
    parser.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        help="self-speculatively, and plainly to compare; or plainly",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens with this share")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="a token that ends a completion as well")
    parser.add_argument("--batch", type=at_least(1), default=16, metavar="N", help="prompts decoded at once (default: 16)")
    parser.add_argument("--stream", action="store_true", help="print the text of a single prompt as it comes")
    add_dtype(parser, "the model's on a GPU, float32 on a CPU")
    add_tokenizer(parser)
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write completions and figures there")
    return parser


def _generate(parser: OptionParser, arguments: Sequence[str]) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += [*parser.unknown_options(unknown), *_problems(options)]
    if problems:
        raise OptionsError(problems)

    from pipeline.generation.generate import generate

    found = generate(options)
    if options.json is not None:
        write_json(options.json, found)
    return 0


def _problems(options: argparse.Namespace) -> list[str]:
    """List options that cannot be meant, before anything is loaded."""
    problems = json_problems(options.json)
    given = [
        name for name, value in (("--prompt", options.prompt), ("--prompt-file", options.prompt_file)) if value is not None
    ]
    if len(given) != 1:
        problems.append(f"--prompt or --prompt-file: got {' and '.join(given) or 'neither'}; expected one of them")
    if not 0 <= options.temperature < float("inf"):
        problems.append(f"--temperature: got {options.temperature}; expected a number of at least 0")
    if not 0 < options.top_p <= 1:
        problems.append(f"--top-p: got {options.top_p}; expected a share above 0, at most 1")
    elif options.top_p < 1 and options.temperature == 0:
        problems.append("--top-p: nothing is drawn at temperature 0; add --temperature 1, or leave it out")
    return problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

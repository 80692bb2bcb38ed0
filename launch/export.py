"""Export a trained model as an ordinary causal language model in Hugging Face's layout.

    python launch/export.py MODEL DIR [--step N] [--dtype float32|bfloat16] [--drafter eagle3 --engine vllm|sglang]

MODEL is a run directory (its newest sound checkpoint, or that of step N), a checkpoint folder or another export, written on any
number of ranks. Trunk and head 0 become the model, the other heads mtp_heads.safetensors beside it. With --drafter head 1
becomes a drafter of one token in DIR, as the engine reads it, and the model lies in DIR/verifier. What was written is verified
against the checkpoint before DIR appears. It needs neither a GPU nor the memory of the model. Exit code 0; 2, with one message
and no DIR, if something must be corrected.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.failures import guarded
from pipeline.model_options import add_dtype, add_tokenizer, dtype_of, model_parser
from pipeline.option_parser import OptionParser, OptionsError
from pipeline.options import path_argument

if TYPE_CHECKING:
    from pipeline.export_model import Verified


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    return guarded(f"{parser.prog}: error", lambda: _export(parser, arguments), (ValueError,))


def _parser() -> OptionParser:
    parser = model_parser("export.py", __doc__)
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="folder to make; it must be empty or not exist")
    add_dtype(parser, "that in which the model was trained")
    parser.add_argument("--drafter", choices=["eagle3"], help="write head 1 as a drafter for a serving engine")
    parser.add_argument("--engine", choices=["vllm", "sglang"], help="that the drafter is for")
    add_tokenizer(parser)
    return parser


def _export(parser: OptionParser, arguments: Sequence[str]) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += parser.unknown_options(unknown)
    if (options.drafter is None) != (options.engine is None) and not problems:
        missing = "--engine vllm or --engine sglang" if options.engine is None else "--drafter eagle3"
        problems.append(f"--drafter and --engine belong together; add {missing}")
    if problems:
        raise OptionsError(problems)

    from pipeline.export_model import check_place, export_model
    from pipeline.saved_model import find_model

    # The place first: verifying a checkpoint may take minutes.
    check_place(options.directory)
    model = find_model(options.model, options.step)
    for note in model.notes:
        print(note, flush=True)
    dtype = dtype_of(options, model.dtype)
    verified = export_model(model, options.directory, dtype, options.tokenizer, options.engine)
    print(_line(options, model.directory, str(dtype).removeprefix("torch."), verified))
    return 0


def _line(options: argparse.Namespace, source, dtype: str, verified: "Verified") -> str:
    return (
        f"{options.directory}: {verified.num_tensors} tensors, {verified.num_bytes:,} bytes in {dtype}, of {source}; every "
        f"byte is that of the source cast to {dtype}, losses of 4 {verified.rows} differ by at most "
        f"{verified.largest_difference:.1e}, relatively"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

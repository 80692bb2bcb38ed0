"""Export a trained model as an ordinary causal language model in Hugging Face's layout.

    python launch/export.py MODEL DIR [--step N] [--dtype float32|bfloat16]

MODEL is a run directory (its newest sound checkpoint, or that of step N), a checkpoint folder or another export, written on any
number of ranks. Trunk and head 0 become the model, the other heads mtp_heads.safetensors beside it. What was written is
verified against the checkpoint before DIR appears. It needs neither a GPU nor the memory of the model. Exit code 0; 2, with
one message and no DIR, if something must be corrected.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.failures import guarded
from pipeline.model_options import add_dtype, add_tokenizer, dtype_of, model_parser
from pipeline.options import path_argument

if TYPE_CHECKING:
    from pipeline.export_model import Verified


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = model_parser("export.py", __doc__)
    parser.add_argument("directory", type=path_argument, metavar="DIR", help="folder to make; it must be empty or not exist")
    add_dtype(parser, "that in which the model was trained")
    add_tokenizer(parser)
    options = parser.parse_args(arguments)
    return guarded(f"{parser.prog}: error", lambda: _export(options), (ValueError,))


def _export(options: argparse.Namespace) -> int:
    from pipeline.export_model import check_place, export_model
    from pipeline.saved_model import find_model

    # The place first: verifying a checkpoint may take minutes.
    check_place(options.directory)
    model = find_model(options.model, options.step)
    for note in model.notes:
        print(note, flush=True)
    dtype = dtype_of(options, model.dtype)
    verified = export_model(model, options.directory, dtype, options.tokenizer)
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

"""The options of the commands that read a trained model: export, generate, evaluate.

torch takes a while to load, so it is imported when a dtype is looked up.
"""

import argparse
from typing import TYPE_CHECKING

from pipeline.option_parser import OptionParser
from pipeline.options import path_argument

if TYPE_CHECKING:
    import torch

_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}


def model_parser(name: str, description: str | None) -> OptionParser:
    """Make the parser of a command, with the model that it reads."""
    parser = OptionParser(prog=name, description=description)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="run directory, checkpoint folder or export")
    parser.add_argument("--step", type=int, metavar="N", help="of a run directory's checkpoint (default: the newest sound one)")
    return parser


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add the option that names another tokenizer."""
    parser.add_argument(
        "--tokenizer", type=path_argument, metavar="FILE", help="tokenizer.json or its folder (default: the model's own)"
    )


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option that names a dtype. default: words for it."""
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help=f"of the weights (default: {default})")


def dtype_of(options: argparse.Namespace, default: "torch.dtype") -> "torch.dtype":
    """Return the dtype that the options name."""
    import torch

    return default if options.dtype is None else getattr(torch, _DTYPES[options.dtype])

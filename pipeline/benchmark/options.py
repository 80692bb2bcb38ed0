"""The options and descriptions of the commands of `launch/benchmark.py`, by command.

They are apart from what is measured, and descriptions are read from the modules' files, because the modules import torch and
DeepSpeed, for which `--help` need not wait.
"""

import argparse
import ast
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.option_parser import above_zero, at_least
from pipeline.storage.location import user_path

VARIANTS = ("next_token", "mtp", "selective", "origin")
"""The variants of a step that `step` measures."""


GPU_SHAPES: dict[str, dict[str, int]] = {
    "1.1B": {"layers": 22, "dim": 2048, "attention_heads": 32, "vocabulary": 32_000, "sequence_length": 2048, "rows": 8},
    # A 7B model's width, as deep as its states fit one card of 80 GB.
    "7B-width": {"layers": 4, "dim": 4096, "attention_heads": 32, "vocabulary": 32_000, "sequence_length": 2048, "rows": 8},
    "tiny": {"layers": 2, "dim": 32, "attention_heads": 2, "vocabulary": 128, "sequence_length": 32, "rows": 2},
}
"""The shapes of a step that `gpu` measures, by name."""


PLAN_SIZES = ("layers", "dim", "attention_heads", "vocabulary", "sequence_length", "rows")
"""The numbers that give a shape for `plan` to measure."""


def description_of(module: str) -> str:
    """The docstring of a module of this folder."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}; next_token is always measured (default: all)",
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measured steps, after two that warm up (default: 5)")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measured rounds, after one that warms up (default: 5)")
    parser.add_argument("--directory", type=user_path, metavar="DIR", help="where to write (default: a temporary folder)")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options for the sizes of a model and of its step."""
    parser.add_argument("--layers", type=at_least(1), default=8, help="depth of the next-token path (default: 8)")
    parser.add_argument("--dim", type=at_least(1), default=512, metavar="D", help="default: 512")
    parser.add_argument("--attention-heads", type=at_least(1), default=8, help="default: 8")
    parser.add_argument("--vocabulary", type=at_least(1), default=8192, metavar="V", help="default: 8192")
    parser.add_argument("--sequence-length", type=at_least(1), default=512, metavar="T", help="default: 512")
    parser.add_argument("--rows", type=at_least(1), default=4, metavar="B", help="rows of a step (default: 4)")
    parser.add_argument("--threads", type=at_least(0), default=0, help="of each variant on a CPU (default: all cores)")


def _add_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=at_least(1), default=2048, metavar="N", help="positions (default: 2048)")
    parser.add_argument("--dim", type=at_least(1), default=512, metavar="D", help="width of the hidden states (default: 512)")
    parser.add_argument("--vocabulary", type=at_least(1), default=32_000, metavar="V", help="default: 32000")
    parser.add_argument("--heads", type=at_least(1), default=4, metavar="H", help="default: 4")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measured rounds, after two that warm up (default: 5)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of each variant on a CPU (default: 1)")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    sizes = [2**12, 2**14, 2**16, 2**18, 2**20]
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=sizes, help="tokens a rank and micro-step")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2, 4, 8], help="gloo processes")
    parser.add_argument("--heads", type=at_least(1), default=3, help="heads that select")
    parser.add_argument("--runs", type=at_least(1), default=5, help="runs of which the median is taken")
    parser.add_argument("--gpus", type=at_least(1), nargs="+", default=[64, 256, 1024, 4096], help="sizes for the model")
    parser.add_argument("--gpu-tokens", type=at_least(1), default=2**14, help="the model's tokens a GPU and micro-step")
    parser.add_argument("--latency-us", type=float, default=5.0, help="the model's time of a message, microseconds")
    parser.add_argument("--bandwidth", type=above_zero, default=50.0, help="the model's bandwidth of a GPU, GB/s")
    parser.add_argument("--parameters", type=above_zero, default=1.1e9, help="of the policy, for the time of a step")
    parser.add_argument("--flops", type=above_zero, default=4e14, help="FLOP/s that a GPU achieves, for the time of a step")


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=at_least(1), default=9, metavar="N", help="depth of the next-token path (default: 9)")
    parser.add_argument("--dim", type=at_least(1), default=64, metavar="D", help="default: 64")
    parser.add_argument("--ranks", type=at_least(2), default=2, metavar="R", help="gloo processes (default: 2)")
    parser.add_argument("--gpus-per-node", type=at_least(1), metavar="N", help="ranks that share a node (default: all)")
    parser.add_argument("--attention-heads", type=at_least(1), default=2, help="default: 2")
    parser.add_argument("--vocabulary", type=at_least(1), default=512, metavar="V", help="default: 512")
    parser.add_argument("--sequence-length", type=at_least(5), default=16, metavar="T", help="default: 16")
    parser.add_argument("--live-blocks", type=above_zero, default=5, help="stage3_max_live_parameters, in blocks (default: 5)")
    parser.add_argument("--deepspeed", type=user_path, metavar="FILE", help="default: ds_configs/zero3.json")


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    names, default = ", ".join(GPU_SHAPES), ["1.1B", "7B-width"]
    parser.add_argument(
        "--shapes", nargs="+", choices=GPU_SHAPES, default=default, metavar="NAME", help=f"of {names} (default: the first two)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measured steps (default: 5)")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=_plan_shape,
        nargs="+",
        metavar="SIZES",
        help="each as layers,D,attention_heads,V,T,rows (default: five for a GPU, five for a CPU)",
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measured steps of each (default: 5)")


def _plan_shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) if size.isdecimal() else 0 for size in text.split(","))
    if len(sizes) != len(PLAN_SIZES) or not all(sizes):
        raise argparse.ArgumentTypeError(f"expected {len(PLAN_SIZES)} whole numbers above 0 with commas, got {text!r}")
    return sizes


def _add_data(parser: argparse.ArgumentParser) -> None:
    parts = {"preparing": _add_preparing, "streaming": _add_streaming}
    parser.add_argument("--only", choices=list(parts), help="measure one of the two")
    for name, add_part in parts.items():
        add_part(parser.add_argument_group(name, description_of(name).partition("\n")[0]))


def _add_preparing(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--text", metavar="PATH", help="what prepare.py takes as input (default: the standard library, 4 times)"
    )
    parser.add_argument("--tokenizer", type=user_path, metavar="FILE|DIR", help="default: a BPE of 32,000 trained on the text")
    parser.add_argument(
        "--processes", type=at_least(1), default=len(os.sched_getaffinity(0)), metavar="N", help="default: one a core"
    )


def _add_streaming(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared shards (default: random rows are written)")
    parser.add_argument("--rows", type=at_least(1), default=16_384, help="of the random rows")
    parser.add_argument("--sequence-length", type=at_least(1), default=2048, metavar="T", help="of the random rows")
    parser.add_argument("--lanes", type=at_least(1), default=64, metavar="L")
    parser.add_argument("--micro-batch", type=at_least(1), default=8, metavar="B")
    parser.add_argument(
        "--pace", type=above_zero, default=200_000, metavar="TOKENS/S", help="of the training whose waiting is measured"
    )
    parser.add_argument("--repeat", type=at_least(1), default=5, help="turns of each loop")


ADD_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "selection": _add_selection,
    "heads": _add_heads,
    "step": _add_step,
    "data": _add_data,
    "checkpoint": _add_checkpoint,
    "traffic": _add_traffic,
    "gpu": _add_gpu,
    "plan": _add_plan,
}
"""By command, what adds its options to a parser."""

"""Estimate the memory that each rank of a job needs, and its speed, before anything is built.

    python launch/plan.py --deepspeed ds_configs/zero3.json --config launch/recipes/NAME.yaml --gpus 64 [--device-memory 80]
        [--json FILE] [section.key=value ...]

Needs neither GPUs nor data (except for model.vocab_size, which a recipe may leave to the data). Prints the moment of a step at
which memory is highest, what it consists of, whether it fits, and how much each setting that saves memory would save; then the
expected tokens a second and MFU, from the stated peaks of card and network, what a step's time goes to, and which settings make
it faster (`launch/benchmark.py plan` compares expected and measured steps). Exit code 0; 1 if it does not fit; 2, with one
message, if the arguments must be corrected.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, Read, above_zero, at_least
from pipeline.options import json_problems, path_argument, read_options, read_recipe, recipe_parser, write_json

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
DOES_NOT_FIT = 1
_UNKNOWN_SPEED = "How fast this is, is not known here: --matrix-tflops and --memory-bandwidth say what the device can do."


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = recipe_parser("plan.py", __doc__, DEMO)
    parser.add_argument("--gpus", type=at_least(1), required=True, metavar="N", help="ranks of the job")
    parser.add_argument(
        "--device-memory", type=float, metavar="GIB", help="of one GPU; default: of this machine's, if it has one"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what the ranks run on (default: cuda)")
    _add_peaks(parser)
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the figures there, in bytes")
    read = read_options(parser, arguments)

    from pipeline.config import ConfigError

    return guarded(f"{parser.prog}: error", lambda: _plan(parser, read), (ConfigError,))


def _add_peaks(parser: OptionParser) -> None:
    """The options for what the expected speed is computed from."""
    peaks = parser.add_argument_group("speed", "from data sheets unless they are stated")
    peaks.add_argument("--card", metavar="NAME", help="H100, H100 PCIe, H200, A100 (default: this machine's, else H100)")
    peaks.add_argument(
        "--matrix-tflops", type=above_zero, metavar="X", help="of large products, as launch/benchmark.py gpu measures it"
    )
    peaks.add_argument("--memory-bandwidth", type=above_zero, metavar="GB/S", help="of a copy, reads and writes together")
    peaks.add_argument("--gpus-per-node", type=at_least(1), metavar="N", help="default: 8")
    peaks.add_argument("--node-bandwidth", type=above_zero, metavar="GB/S", help="of a GPU to others of its node, one way")
    peaks.add_argument(
        "--network-bandwidth", type=above_zero, metavar="GB/S", help="of a GPU's adapter to other nodes (default: 50, 400 Gb/s)"
    )


def _hardware(options: argparse.Namespace):
    """The hardware that the options state; None where too little is known, as of a CPU."""
    from pipeline.planning.hardware import hardware_of
    from pipeline.runtime.memory import device_name

    card = options.card or ((device_name() or "H100") if options.device == "cuda" else "CPU")
    return hardware_of(
        card,
        matrix_flops=None if options.matrix_tflops is None else options.matrix_tflops * 1e12,
        node_ranks=options.gpus_per_node,
        **{
            name: None if (given := getattr(options, name)) is None else given * 1e9
            for name in ("memory_bandwidth", "node_bandwidth", "network_bandwidth")
        },
    )


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
    from pipeline.flops import PEAK_FLOPS
    from pipeline.planning.micro_batch import with_micro_batch
    from pipeline.planning.report import document
    from pipeline.planning.resolve import resolve_planned_job
    from pipeline.runtime.deepspeed_json import RANKS_OF_A_NODE, with_nodes_of
    from pipeline.runtime.memory import total_bytes

    if options.device_memory is not None and not 0 < options.device_memory < math.inf:
        problems.append(f"--device-memory: got {options.device_memory}; expected a number of GiB above 0")
    problems += json_problems(options.json)
    hardware = _hardware(options)
    if hardware is None and options.device == "cuda":
        known = ", ".join(PEAK_FLOPS)
        problems.append(f"--card: got {options.card!r}; expected one of {known}, or --matrix-tflops and --memory-bandwidth")
    settings, content = check_before_planning(settings, options.deepspeed, options.gpus, problems)
    content = with_nodes_of(content, options.gpus_per_node or RANKS_OF_A_NODE, options.gpus)
    on_gpu = options.device == "cuda"
    memory = total_bytes() if options.device_memory is None and on_gpu else (options.device_memory or 0) * 2**30 or None
    chosen = with_micro_batch(settings, content, options.gpus, on_gpu, memory)
    job, notes = resolve_planned_job(chosen, content, options.gpus, on_gpu, memory)
    if chosen != settings:
        limit = "the largest that fits" if memory else "the largest that divides a rank's lanes, as no memory is known"
        notes.append(f"data.micro_batch: auto is {chosen.data.micro_batch}, {limit}.")
    if hardware is None:
        notes.append(_UNKNOWN_SPEED)
    return document(job, memory, notes, hardware)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

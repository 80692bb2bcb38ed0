"""Look at prepared shards.

    python launch/shards.py order DIR --global-batch G --ranks R --steps N [--lanes L] [--seed S] [--workers W] …

`order` prints a line a sample, `step rank shard key`: what reaches which rank when, read by the code that feeds training.
Exit code 2, with one message, when something about the arguments or the data has to be mended.
"""

import argparse
import sys
from collections.abc import Sequence

from pipeline.config import DataSettings
from pipeline.data.arrivals import arrivals
from pipeline.data.manifest import DataError
from pipeline.data.order import default_lanes
from pipeline.storage.location import place_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough
        sys.stdout = None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at prepared shards.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    order = commands.add_parser("order", help="print what reaches which rank in which step", allow_abbrev=False)
    order.add_argument("directory", metavar="DIR", help="prepared shards: a folder or a URL")
    order.add_argument("--global-batch", type=int, required=True, metavar="G", help="rows a step over all ranks")
    order.add_argument("--ranks", type=int, default=1, metavar="R")
    order.add_argument("--steps", type=int, required=True, metavar="N")
    order.add_argument("--lanes", type=int, metavar="L", help="default: that of training")
    order.add_argument("--seed", type=int, default=0, metavar="S")
    order.add_argument("--micro-batch", type=int, default=1, metavar="B", help="rows a rank and micro-step")
    order.add_argument("--workers", type=int, default=0, metavar="W", help="loader processes a rank")
    order.add_argument("--start", type=int, default=0, metavar="SAMPLES", help="rows consumed before; a multiple of G")
    order.add_argument("--shuffle-block", type=int, default=DataSettings().shuffle_block, metavar="SAMPLES")
    order.set_defaults(run=_order)
    return parser


def _order(options: argparse.Namespace) -> None:
    found = arrivals(
        place_of(options.directory),
        world_size=options.ranks,
        global_batch=options.global_batch,
        micro_batch=options.micro_batch,
        lanes=options.lanes or default_lanes(options.global_batch),
        seed=options.seed,
        shuffle_block=options.shuffle_block,
        num_workers=options.workers,
        start_sample=options.start,
        num_steps=options.steps,
    )
    for arrival in found:
        print(arrival.step, arrival.rank, arrival.shard, arrival.key)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Work on prepared shards.

    python launch/shards.py merge PART … --output DIR     join the parts that prepare.py --part made
    python launch/shards.py verify DIR                    check every byte against the manifest
    python launch/shards.py inspect DIR                   show counts, lengths of documents, and some rows as text
    python launch/shards.py index DIR                     write manifest and index files for token tars that others wrote
    python launch/shards.py order DIR --global-batch G --ranks R --steps N …
                                                          print a line `step rank shard key` for each sample: which rank reads
                                                          it in which step, by the code that feeds training
    python launch/shards.py export-rows DIR               print a line of JSON for each row: key, tokens, documents; to compute
                                                          external scores from (launch/score.py --import)

DIR may also be a folder of prepared folders (train, validation). Exit code 0; 1 if `verify` found damage; 2, with one message,
if the arguments or the data must be corrected; 130 on Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.data.corpus.display import Display
from pipeline.data.errors import DataError
from pipeline.data.loading.order import default_lanes
from pipeline.data.shards.adoption import index
from pipeline.data.shards.external_scores import export_rows
from pipeline.data.shards.inspection import inspect
from pipeline.data.shards.manifest import Manifest, read_manifest
from pipeline.data.shards.merging import merge, prepared_folders
from pipeline.data.shards.verification import verify
from pipeline.data.special_tokens import special_tokens
from pipeline.data.tokenizer import find_tokenizer, load_tokenizer
from pipeline.data_settings import DataSettings
from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, at_least
from pipeline.options import path_argument
from pipeline.storage.location import Url, parse_location
from pipeline.storage.whole_file import atomic_write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body() -> int:
        options = _parser().read_or_refuse(arguments)
        try:
            return options.command(options)
        except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
            sys.stdout = None
            return 0

    return guarded("error", body, (ValueError,))


def _parser() -> OptionParser:
    parser = OptionParser(prog="shards.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    joined = commands.add_parser("merge", help="join parts")
    joined.add_argument("parts", type=path_argument, nargs="+", metavar="PART")
    joined.add_argument("--output", type=path_argument, required=True, help="the folder to make")
    joined.set_defaults(command=_merge)

    verified = commands.add_parser("verify", help="check every byte against the manifest")
    verified.add_argument("directory", type=path_argument, metavar="DIR")
    verified.set_defaults(command=_verify)

    inspected = commands.add_parser("inspect", help="totals, lengths, and some rows as text")
    inspected.add_argument("directory", type=path_argument, metavar="DIR")
    inspected.add_argument("--rows", type=at_least(0), default=2, metavar="N", help="rows to show, spread over the folder")
    inspected.set_defaults(command=_inspect)

    indexed = commands.add_parser("index", help="adopt token tars that others wrote")
    indexed.add_argument("directory", type=path_argument, metavar="DIR")
    indexed.add_argument(
        "--tokenizer", type=path_argument, metavar="FILE|DIR", help="with which the ids were made; default: DIR's own"
    )
    indexed.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="the token that ends a document; default: the one that the tokenizer's folder declares, or one of the usual names",
    )
    indexed.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="the name of source 0, 1, …; may be repeated"
    )
    indexed.set_defaults(command=_index)

    exported = commands.add_parser("export-rows", help="print keys and ids of all rows, to score them")
    exported.add_argument("directory", metavar="DIR", help="prepared shards: a folder or a URL")
    exported.add_argument("--output", type=path_argument, metavar="FILE", help="write there instead")
    exported.set_defaults(command=_export_rows)

    order = commands.add_parser("order", help="print what reaches which rank in which step")
    order.add_argument("directory", metavar="DIR", help="prepared shards: a folder or a URL")
    order.add_argument("--global-batch", type=at_least(1), required=True, metavar="G", help="rows a step over all ranks")
    order.add_argument("--ranks", type=at_least(1), default=1, metavar="R")
    order.add_argument("--steps", type=at_least(0), required=True, metavar="N")
    order.add_argument("--lanes", type=at_least(1), metavar="L", help="default: that of training")
    order.add_argument("--seed", type=int, default=0, metavar="S")
    order.add_argument("--micro-batch", type=at_least(1), default=1, metavar="B", help="rows a rank and micro-step")
    order.add_argument("--workers", type=at_least(0), default=0, metavar="W", help="loader processes a rank")
    order.add_argument("--start", type=at_least(0), default=0, metavar="SAMPLES", help="rows consumed before; a multiple of G")
    order.add_argument("--shuffle-block", type=at_least(1), default=DataSettings().shuffle_block, metavar="SAMPLES")
    order.add_argument(
        "--skip",
        type=at_least(0),
        nargs=2,
        action="append",
        default=[],
        metavar=("FIRST", "END"),
        help="rows [FIRST, END) that the run leaves out after a loss spike, multiples of G; may be repeated. Which they are is "
        "in `skipped` of a checkpoint's state.json, and in `left_out` of launch/audit.py --json",
    )
    order.set_defaults(command=_order)
    return parser


def _order(options: argparse.Namespace) -> int:
    location = parse_location(options.directory)
    if isinstance(location, Url) and location.is_pipe:
        raise DataError(f"order runs no command of a pipe, as in {location}; name a folder or another URL")

    # torch takes seconds to load, and only this command needs it.
    from pipeline.data.loading.sample_trace import arrivals
    from pipeline.data.loading.skipping import checked_stretches

    found = arrivals(
        location,
        world_size=options.ranks,
        global_batch=options.global_batch,
        micro_batch=options.micro_batch,
        lanes=default_lanes(options.global_batch) if options.lanes is None else options.lanes,
        seed=options.seed,
        shuffle_block=options.shuffle_block,
        num_workers=options.workers,
        start_sample=options.start,
        num_steps=options.steps,
        skipped=checked_stretches(options.skip, options.global_batch),
    )
    for arrival in found:
        print(arrival.step, arrival.rank, arrival.shard, arrival.key)
    return 0


def _export_rows(options: argparse.Namespace) -> int:
    rows = export_rows(parse_location(options.directory))
    if options.output is None:
        for row in rows:
            print(row)
        return 0
    with atomic_write(options.output) as file:
        file.writelines(f"{row}\n".encode() for row in rows)
    return 0


def _merge(options: argparse.Namespace) -> int:
    for directory, manifest in merge(options.parts, options.output).items():
        _print_summary(directory, manifest)
    return 0


def _verify(options: argparse.Namespace) -> int:
    found = 0
    for folder in prepared_folders(options.directory):
        num_bytes = sum(shard.bytes for shard in read_manifest(options.directory / folder, check_files=False).shards)
        with Display(Console(stderr=True, highlight=False)) as display:
            display.begin(f"verifying {folder}" if folder != "." else "verifying", num_bytes)
            problems = verify(options.directory / folder, lambda shard: display.advance(0, shard.tokens, shard.bytes))
        for problem in problems:
            print(problem, file=sys.stderr)
        if not problems:
            _print_summary(options.directory / folder, read_manifest(options.directory / folder), ": whole")
        found += len(problems)
    return 1 if found else 0


def _inspect(options: argparse.Namespace) -> int:
    for folder in prepared_folders(options.directory):
        for line in inspect(options.directory / folder, options.rows):
            print(line)
    return 0


def _index(options: argparse.Namespace) -> int:
    file = find_tokenizer(options.tokenizer or options.directory)
    tokenizer = load_tokenizer(file)
    # The ids are there already, so whether documents begin with a BOS token is not asked.
    ends = special_tokens(tokenizer, file.parent, options.end_of_document, "never")
    manifest = index(options.directory, tokenizer, source_names=options.source, end_of_document=ends.end_of_document)
    print(f"documents end with {ends.end_of_document!r} (id {ends.end_of_document_id}, {ends.end_from})")
    _print_summary(options.directory, manifest)
    return 0


def _print_summary(directory: Path, manifest: Manifest, remark: str = "") -> None:
    print(
        f"{directory}{remark}: {manifest.num_tokens:,} tokens in {manifest.num_samples:,} rows of {manifest.sequence_length}, "
        f"{len(manifest.shards):,} shard(s)"
    )
    for source in manifest.sources:
        print(f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())

"""Work on prepared shards.

    python launch/shards.py merge PART … --output DIR     join the parts that prepare.py --part made
    python launch/shards.py verify DIR                    hold every byte against the manifest
    python launch/shards.py inspect DIR                   totals, lengths, and some rows as text
    python launch/shards.py index DIR                     adopt token tars that others wrote

DIR may also be a folder of prepared folders (train, validation). Exit code 0; 1 if `verify` found damage; 2, with one message,
when something about the arguments or the data has to be mended.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.foreign import index
from pipeline.data.inspection import inspect
from pipeline.data.manifest import DataError, Manifest, read_manifest
from pipeline.data.parts import merge, prepared_folders
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.verification import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    joined = commands.add_parser("merge", help="join parts", allow_abbrev=False)
    joined.add_argument("parts", type=Path, nargs="+", metavar="PART")
    joined.add_argument("--output", type=Path, required=True, help="the folder to make")
    joined.set_defaults(command=_merge)

    verified = commands.add_parser("verify", help="hold every byte against the manifest", allow_abbrev=False)
    verified.add_argument("directory", type=Path, metavar="DIR")
    verified.set_defaults(command=_verify)

    inspected = commands.add_parser("inspect", help="totals, lengths, and some rows as text", allow_abbrev=False)
    inspected.add_argument("directory", type=Path, metavar="DIR")
    inspected.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show, spread over the folder")
    inspected.set_defaults(command=_inspect)

    indexed = commands.add_parser("index", help="adopt token tars that others wrote", allow_abbrev=False)
    indexed.add_argument("directory", type=Path, metavar="DIR")
    indexed.add_argument("--tokenizer", type=Path, metavar="FILE|DIR", help="with which the ids were made; default: DIR's own")
    indexed.add_argument("--end-of-document", metavar="TOKEN", help="the tokenizer's token that ends a document, if not found")
    indexed.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="the name of source 0, 1, …; may be repeated"
    )
    indexed.set_defaults(command=_index)
    return parser


def _merge(options: argparse.Namespace) -> int:
    for directory, manifest in merge(options.parts, options.output).items():
        _print_totals(directory, manifest)
    return 0


def _verify(options: argparse.Namespace) -> int:
    found = 0
    for folder in prepared_folders(options.directory):
        problems = verify(options.directory / folder)
        for problem in problems:
            print(problem, file=sys.stderr)
        if not problems:
            _print_totals(options.directory / folder, read_manifest(options.directory / folder), ": whole")
        found += len(problems)
    return 1 if found else 0


def _inspect(options: argparse.Namespace) -> int:
    if options.rows < 0:
        raise DataError(f"expected at least 0 rows, got {options.rows}")
    for folder in prepared_folders(options.directory):
        for line in inspect(options.directory / folder, options.rows):
            print(line)
    return 0


def _index(options: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(options.tokenizer or options.directory)
    manifest = index(options.directory, tokenizer, source_names=options.source, end_of_document=options.end_of_document)
    _print_totals(options.directory, manifest)
    return 0


def _print_totals(directory: Path, manifest: Manifest, remark: str = "") -> None:
    print(
        f"{directory}{remark}: {manifest.num_tokens:,} tokens in {manifest.num_samples:,} rows of {manifest.sequence_length}, "
        f"{len(manifest.shards):,} shard(s)"
    )
    for source in manifest.sources:
        print(f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())

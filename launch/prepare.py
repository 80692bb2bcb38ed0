"""Prepare text for training: documents in, a folder of packed shards out.

    python launch/prepare.py --input prose=books/ --input web=crawl.jsonl --output data/mix \\
        --tokenizer tokenizer.json --sequence-length 2048

A thin command line over `pipeline.data.prepare`. Exit code 0 when the folder is complete; 2, with one message, when
something about the arguments or the data has to be mended.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.documents import DocumentReader, parse_input, source_names
from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.prepare import SAMPLES_PER_SHARD, is_held_out, prepare
from pipeline.data.tokenizer import load_tokenizer, train_bpe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _prepare(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Prepare text for training: tokenise, shuffle, pack and write shards.", allow_abbrev=False
    )
    parser.add_argument(
        "--input",
        metavar="[NAME=]PATH",
        action="append",
        required=True,
        help="a .txt file (one document), a .jsonl file (one document a line), a folder or a glob of these; may be "
        "repeated; with NAMEs selection can be followed per source",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, metavar="FILE_OR_DIR", help="a tokenizer.json, or its folder")
    tokenizer.add_argument("--train-bpe", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE on the input")
    parser.add_argument("--sequence-length", type=int, required=True, metavar="T", help="tokens a row")
    parser.add_argument("--text-field", default="text", help="the field of a .jsonl line that holds the text")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle of the documents")
    parser.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="rows in a shard")
    parser.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="hold out this fraction of the documents: writes OUTPUT/train and OUTPUT/validation",
    )
    return parser


def _prepare(options: argparse.Namespace) -> None:
    inputs = [parse_input(argument) for argument in options.input]
    documents = DocumentReader(inputs, options.text_field)
    prepare(
        documents,
        options.output,
        _tokenizer(options, documents),
        options.sequence_length,
        seed=options.seed,
        source_names=source_names(inputs),
        samples_per_shard=options.samples_per_shard,
        validation_fraction=options.validation,
    )
    print(f"{documents.num_documents:,} documents; {documents.num_empty:,} empty left out")
    for name in ("train", "validation") if options.validation else (".",):
        _print_summary(options.output / name)


def _tokenizer(options: argparse.Namespace, documents: DocumentReader):
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    # Not on the held-out documents: a validation loss should know nothing of them.
    texts = (document.text for document in documents if not is_held_out(document.text, options.validation))
    return train_bpe(texts, options.train_bpe)


def _print_summary(directory: Path) -> None:
    manifest = read_manifest(directory)
    padding = manifest.num_samples * manifest.sequence_length - manifest.num_tokens
    print(
        f"{directory}: {manifest.num_tokens:,} tokens in {manifest.num_samples:,} rows of {manifest.sequence_length}, "
        f"{len(manifest.shards)} shard(s), {padding:,} positions of padding"
    )
    for source in manifest.sources:
        print(f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())

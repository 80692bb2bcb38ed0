"""Prepare text for training: read documents, tokenise, shuffle and pack them, and write a folder of shards.

    python launch/prepare.py --input prose=books/ --input web=crawl.jsonl.zst --output data/mix \\
        --tokenizer tokenizer.json --sequence-length 2048 --validation 0.005

After a kill at any moment, the same command resumes. On a Slurm array, each task prepares one part of the input:

    python launch/prepare.py … --part $SLURM_ARRAY_TASK_ID/8 --output data/parts/$SLURM_ARRAY_TASK_ID      # --array=1-8
    python launch/shards.py merge data/parts/* --output data/mix

Exit code 0 if the folder is complete; 2, with one message, if the arguments or the data must be corrected; 130 on Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.corpus.counts import Counts
from pipeline.data.corpus.display import Display
from pipeline.data.corpus.documents import MAX_DOCUMENT_BYTES, ON_UNDECODABLE, Rules
from pipeline.data.corpus.inputs import DATASET_PREFIX, Input, input_files, parse_input, parse_weights, source_names
from pipeline.data.corpus.packing import PACKINGS
from pipeline.data.corpus.panics import without_panics
from pipeline.data.corpus.prepare import SAMPLES_PER_SHARD, PrepareSettings
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.corpus.removed_text import lost_white_space
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import Manifest
from pipeline.data.special_tokens import BOS_RULES, SpecialTokens, special_tokens
from pipeline.data.tokenizer import BYTES, END_OF_DOCUMENT, byte_tokenizer, find_tokenizer, load_tokenizer
from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, OptionsError, at_least
from pipeline.options import path_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    interrupted = "interrupted; the same command goes on where it was"
    return guarded("error", lambda: _prepare(_parser(), arguments), (OptionsError, DataError), interrupted=interrupted)


def _parser() -> OptionParser:
    parser = OptionParser(prog="prepare.py", description=__doc__)
    parser.add_argument(
        "--input",
        metavar="PATH",
        action="append",
        required=True,
        help="PATH or NAME=PATH: a .txt file (one document), a .jsonl, .jsonl.gz, .jsonl.zst (one a line) or .parquet (one a "
        "row), a webdataset .tar with .txt or .json members, a folder or a glob of these, or hf:DIR, a folder saved by the "
        "datasets library; may be repeated; with NAMEs selection can be followed per source",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="the folder to make")

    # Tokens.
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|DIR|bytes",
        help="either this: a tokenizer.json, its folder (a Hugging Face model's, or prepared data), or the bytes of UTF-8",
    )
    parser.add_argument(
        "--train-bpe",
        type=at_least(1, most=2**24),
        metavar="VOCAB_SIZE",
        help="or this: train a byte-level BPE on the input, or 1 GiB spread over it, which is then read twice, each part the "
        "same one; killed meanwhile, it begins anew",
    )
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="the tokenizer's token that ends a document; default: the one that its folder declares (tokenizer_config.json, "
        "generation_config.json, config.json), or one of the usual names",
    )
    parser.add_argument(
        "--bos",
        choices=BOS_RULES,
        default="auto",
        help="a beginning-of-document token before each document; auto: as the tokenizer does itself (add_bos_token in "
        "tokenizer_config.json, or its post-processor)",
    )

    # Rows.
    parser.add_argument("--sequence-length", type=at_least(2, most=2**24), required=True, metavar="T", help="tokens a row")
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default="concat",
        help="concat: no padding, documents are cut where a row ends; best_fit: only documents longer than a row are cut",
    )
    parser.add_argument(
        "--weight",
        metavar="NAME=W",
        action="append",
        default=[],
        help="how often the documents of a named input are taken for training: 2.3 is twice, and 30 %% of them once more",
    )

    # Documents, shuffle and shards.
    parser.add_argument("--text-field", default="text", help="the field or column that holds the text")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle of the documents")
    parser.add_argument(
        "--samples-per-shard", type=at_least(1, most=2**24), default=SAMPLES_PER_SHARD, help="rows in a shard (best_fit: about)"
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="hold out this fraction of the documents: writes OUTPUT/train and OUTPUT/validation",
    )
    parser.add_argument(
        "--on-undecodable",
        choices=ON_UNDECODABLE,
        default="skip",
        help="documents that are not UTF-8, no JSON or without text: leave them out, counted and the first ones named, or stop",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=at_least(1),
        default=MAX_DOCUMENT_BYTES,
        metavar="N",
        help="longer documents are left out, counted",
    )

    # The work.
    parser.add_argument("--processes", type=at_least(1), default=_cores(), metavar="N", help="default: one a core")
    parser.add_argument("--part", type=_part, metavar="i/N", help="prepare the i-th (from 1) of N parts of the input")
    return parser


def _prepare(parser: OptionParser, arguments: Sequence[str] | None) -> int:
    options, unknown, problems = parser.read(arguments)
    problems += parser.unknown_options(unknown)

    # The request.
    inputs = [_with_home(parse_input(argument)) for argument in options.input or ()]
    names = _noted(problems, source_names, inputs) or []
    weights = _noted(problems, parse_weights, options.weight, names) or {}
    tokenizer, ends = _noted(problems, _tokenizer, options) or (None, None)
    settings = PrepareSettings(
        sequence_length=2 if options.sequence_length is None else options.sequence_length,
        seed=options.seed,
        packing=options.packing,
        samples_per_shard=options.samples_per_shard,
        validation_fraction=options.validation,
        weights=weights,
        part=options.part,
        end_of_document=ends and ends.end_of_document,
        bos=ends and ends.bos,
        bos_rule=ends.bos_rule if ends else options.bos,
        special=ends.declared if ends else (),
        rules=Rules(options.text_field, options.max_document_bytes, options.on_undecodable),
    )
    problems += settings.problems(names)
    if problems:
        _noted(problems, input_files, inputs)
        raise OptionsError(problems)

    # The work, and its result.
    with without_panics(), Display() as display:
        prepared = prepare_files(inputs, options.output, tokenizer, settings, processes=options.processes, display=display)
    if prepared.was_complete:
        print(f"{options.output} is complete already, made with the same settings from the same input")
    print(ends)
    if not isinstance(tokenizer, int) and (lost := lost_white_space(tokenizer)):
        print(
            f"warning: the tokenizer does not tell {', '.join(lost)} from one space: a model cannot learn them", file=sys.stderr
        )
    _print_counts(prepared.counts)
    vocab_size = next(iter(prepared.manifests.values())).vocab_size
    if vocab_size < (options.train_bpe or 0):
        print(
            f"warning: the BPE has {vocab_size:,} ids and not the {options.train_bpe:,} asked for: the input has no more pairs "
            "to merge; give more of it, or ask for fewer",
            file=sys.stderr,
        )
    for directory, manifest in prepared.manifests.items():
        _print_summary(directory, manifest)
    return 0


def _noted(problems: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; None if it raised a DataError, which joins the problems, a line each."""
    try:
        return function(*arguments)
    except DataError as error:
        problems += str(error).splitlines()
        return None


def _with_home(entry: Input) -> Input:
    """Expand the `~` of an input's path, which shells leave alone behind `NAME=` and `hf:`."""
    prefix = DATASET_PREFIX if entry.path.startswith(DATASET_PREFIX) else ""
    return replace(entry, path=prefix + os.path.expanduser(entry.path.removeprefix(prefix)))


def _tokenizer(options: argparse.Namespace) -> tuple[Tokenizer | int, SpecialTokens]:
    """Choose the tokenizer, or the vocabulary size of the BPE to train, and the tokens around each document."""
    if (options.train_bpe is None) == (options.tokenizer is None):
        raise DataError("expected either --tokenizer, the one to use, or --train-bpe, the size of the one to train")
    if options.train_bpe is not None:
        if options.bos == "always" or options.end_of_document not in (None, END_OF_DOCUMENT):
            raise DataError(f"a BPE trained here has no other special token than {END_OF_DOCUMENT}, which ends documents")
        return options.train_bpe, SpecialTokens(END_OF_DOCUMENT, 0, "of a BPE trained here", bos_rule=options.bos)
    if options.tokenizer == BYTES:
        tokenizer = byte_tokenizer()
        return tokenizer, special_tokens(tokenizer, None, options.end_of_document, options.bos)
    given = path_argument(options.tokenizer)
    file = find_tokenizer(given)
    if file not in (given, given / file.name):
        print(f"the tokenizer is {file}")
    tokenizer = load_tokenizer(file)
    return tokenizer, special_tokens(tokenizer, file.parent, options.end_of_document, options.bos)


def _print_counts(counts: Counts) -> None:
    left_out = {
        "empty": counts.empty,
        "undecodable": counts.undecodable,
        "oversized": counts.oversized,
        "other members of tars": counts.ignored,
    }
    named = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)
    print(f"{counts.documents:,} documents; {named or 'none'} left out")
    for note in counts.notes:
        print(f"left out: {note}", file=sys.stderr)

    # Of the documents used.
    if counts.special_text:
        print(f"{counts.special_text:,} documents with the string of a special token in their text, encoded as text")
    if counts.without_token:
        print(
            f"warning: {counts.without_token:,} documents have characters that the tokenizer has no token for: they are lost, "
            "or became the unknown token; another tokenizer may suit the data better",
            file=sys.stderr,
        )
    for warning in counts.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _print_summary(directory: Path, manifest: Manifest) -> None:
    padding = manifest.num_samples * manifest.sequence_length - manifest.num_tokens
    print(
        f"{directory}: {manifest.num_tokens:,} tokens in {manifest.num_samples:,} rows of {manifest.sequence_length}, "
        f"{len(manifest.shards)} shard(s), {padding:,} positions of padding"
    )

    if 0 < manifest.num_tokens < manifest.sequence_length:
        print(
            f"warning: {directory}: its {manifest.num_tokens:,} tokens do not fill one row of {manifest.sequence_length:,}; "
            "give more input, or a smaller --sequence-length",
            file=sys.stderr,
        )

    # What packing cost.
    if (preparation := manifest.preparation) and preparation.documents:
        positions = max(1, manifest.num_samples * manifest.sequence_length)
        cut = preparation.documents_cut / preparation.documents
        print(
            f"  packing {preparation.packing}: {cut:.2%} of {preparation.documents:,} documents cut, "
            f"{padding / positions:.3%} padding"
        )

    # Each source.
    for source in manifest.sources:
        weight = preparation.weights.get(source.name, 1.0) if preparation else 1.0
        taken = f", weight {weight:g}" if weight != 1 else ""
        print(f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens{taken}")


def _part(argument: str) -> tuple[int, int]:
    number, slash, count = argument.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected i/N with 1 <= i <= N, got {argument!r}")
    return int(number), int(count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())

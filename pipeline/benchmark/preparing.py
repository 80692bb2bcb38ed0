"""How fast text becomes shards, beside what the tokenizers library does alone on the same cores.

Alone it has the texts in memory, encodes them in batches with its own threads, and drops the ids. Preparing reads the same
texts from a .jsonl, in processes that it starts, and writes packed shards with their checksums and a manifest, all of it
on the disk. Both take turns, so that a busy machine is busy for both; the figures are medians.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from pipeline.data.builtin import standard_library_documents
from pipeline.data.documents import DocumentReader, Rules
from pipeline.data.inputs import Input, input_files, slice_size, slices
from pipeline.data.prepare import Settings
from pipeline.data.progress import Display
from pipeline.data.resumable import prepare_files
from pipeline.data.tokenizer import load_tokenizer, train_bpe

_SEQUENCE_LENGTH = 2048
_VOCAB_SIZE = 32_000
_BATCH_CHARACTERS = 2_000_000
_LIBRARY_COPIES = 4
_TURNS = 3


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--text", metavar="PATH", help="what prepare.py takes as input (default: the standard library, 4 times)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE|DIR", help="default: a BPE of 32,000 trained on the text")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one a core")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each way, and preparing's as a multiple of the library's two batch encoders'."""
    texts = _texts(options.text)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else train_bpe(texts, _VOCAB_SIZE)
    os.environ["RAYON_NUM_THREADS"] = str(options.processes)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        turns, batches = itertools.count(), _batches(texts)
        ways: dict[str, Callable[[], int]] = {
            "encode_batch": lambda: _encode(tokenizer.encode_batch, batches),
            "encode_batch_fast": lambda: _encode(tokenizer.encode_batch_fast, batches),
            "prepare": lambda: _prepare(source, Path(scratch) / str(next(turns)), tokenizer, options.processes),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for name in list(ways) * _TURNS:
            started = time.perf_counter()
            tokens = ways[name]()
            speeds[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "tokens_per_second": medians,
        "prepare_over_encode_batch": medians["prepare"] / medians["encode_batch"],
        "prepare_over_encode_batch_fast": medians["prepare"] / medians["encode_batch_fast"],
        "characters": sum(map(len, texts)),
        "processes": options.processes,
        "load_average": load,
        "cores": len(os.sched_getaffinity(0)),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as lines."""
    lines = [f"{name:30} {speed / 1e6:8.2f}M tokens/s" for name, speed in figures["tokens_per_second"].items()]
    lines.append(f"{'prepare / encode_batch':30} {figures['prepare_over_encode_batch']:8.2f}   (goal: 0.9)")
    lines.append(f"{'prepare / encode_batch_fast':30} {figures['prepare_over_encode_batch_fast']:8.2f}")
    lines.append(
        f"({figures['characters']:,} characters, {figures['processes']} processes; "
        f"load average {figures['load_average']:.1f} on {figures['cores']} cores)"
    )
    return "\n".join(lines)


def _texts(path: str | None) -> list[str]:
    if path is None:
        return [document.text for document in standard_library_documents()] * _LIBRARY_COPIES
    files = input_files([Input("", path)])
    spans = itertools.chain.from_iterable(slices(files, slice_size(files)))
    return [document.text for document in DocumentReader(Rules(on_undecodable="skip")).read(spans)]


def _encode(encode: Callable[..., Sequence[Any]], batches: Sequence[Sequence[str]]) -> int:
    return sum(len(encoding) for batch in batches for encoding in encode(batch, add_special_tokens=False))


def _batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    characters = 0
    for text in texts:
        if characters >= _BATCH_CHARACTERS:
            batches.append([])
            characters = 0
        batches[-1].append(text)
        characters += len(text)
    return batches


def _prepare(source: Path, output: Path, tokenizer: Tokenizer, processes: int) -> int:
    quiet = Display(Console(file=StringIO()))
    settings = Settings(sequence_length=_SEQUENCE_LENGTH)
    prepared = prepare_files([Input("", str(source))], output, tokenizer, settings, processes=processes, display=quiet)
    return sum(manifest.num_tokens - prepared.counts.documents for manifest in prepared.manifests.values())

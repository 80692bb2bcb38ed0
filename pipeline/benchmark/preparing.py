"""Speed of making shards from text, beside what the tokenizers library does alone on the same cores.

Alone it has the texts in memory, encodes them in batches with its own threads, and drops the ids. Preparing reads the same
texts from a .jsonl, with as many workers, and writes packed shards with their checksums and a manifest, all of it on the
disk. Both take turns, so that a busy machine is busy for both; the figures are medians. Where others want the cores,
tokens a CPU second, whoever spent it, says more than tokens a second; what it leaves out is cores that stand idle.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from pipeline.benchmark.timing import in_turn
from pipeline.data.corpus.builtin import standard_library_documents
from pipeline.data.corpus.display import Display
from pipeline.data.corpus.documents import DocumentReader, Rules
from pipeline.data.corpus.inputs import Input, input_files, slice_size, slices
from pipeline.data.corpus.prepare import PrepareSettings
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.tokenizer import load_tokenizer, train_bpe

_SEQUENCE_LENGTH = 2048
_VOCAB_SIZE = 32_000
_BATCH_CHARACTERS = 2_000_000
_LIBRARY_COPIES = 4
_TURNS = 3


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each variant, and preparing's as a multiple of the library's two batch encoders'."""
    texts = _texts(options.text)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else train_bpe(texts, _VOCAB_SIZE)
    os.environ["RAYON_NUM_THREADS"] = str(options.processes)
    load = os.getloadavg()[0]

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        batches = _batches(texts)
        variants: dict[str, Callable[[int], int]] = {
            "encode_batch": lambda turn: _encode(tokenizer.encode_batch, batches),
            "encode_batch_fast": lambda turn: _encode(tokenizer.encode_batch_fast, batches),
            "prepare": lambda turn: _prepare(source, Path(scratch) / str(turn), tokenizer, options.processes),
        }
        turns_of = in_turn({name: partial(_speeds, variant) for name, variant in variants.items()}, _TURNS)

    of_clock, of_cpu = (
        {name: statistics.median(turn[kind] for turn in turns) for name, turns in turns_of.items()} for kind in (0, 1)
    )
    return {
        "tokens_per_second": of_clock,
        "tokens_per_cpu_second": of_cpu,
        "prepare_over_encode_batch": of_clock["prepare"] / of_clock["encode_batch"],
        "prepare_over_encode_batch_fast": of_clock["prepare"] / of_clock["encode_batch_fast"],
        "cpu_prepare_over_encode_batch": of_cpu["prepare"] / of_cpu["encode_batch"],
        "cpu_prepare_over_encode_batch_fast": of_cpu["prepare"] / of_cpu["encode_batch_fast"],
        "turns": turns_of,
        "characters": sum(map(len, texts)),
        "processes": options.processes,
        "load_average": load,
        "cores": len(os.sched_getaffinity(0)),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [
        f"{name:30} {speed / 1e6:8.2f}M tokens/s {figures['tokens_per_cpu_second'][name] / 1e6:14.2f}M a CPU second"
        for name, speed in figures["tokens_per_second"].items()
    ]
    for library in ("encode_batch", "encode_batch_fast"):
        by_clock, by_cpu = figures[f"prepare_over_{library}"], figures[f"cpu_prepare_over_{library}"]
        lines.append(f"{f'prepare / {library}':30} {by_clock:8.2f}   (goal: 0.9) {by_cpu:12.2f}")
    lines.append(
        f"({figures['characters']:,} characters, {figures['processes']} processes; "
        f"load average {figures['load_average']:.1f} on {figures['cores']} cores)"
    )
    return "\n".join(lines)


def _speeds(variant: Callable[[int], int], turn: int) -> tuple[float, float]:
    """Tokens a second by the clock, and tokens a CPU second, of one turn."""
    started, busy = time.perf_counter(), _cpu_seconds()
    tokens = variant(turn)
    return tokens / (time.perf_counter() - started), tokens / (_cpu_seconds() - busy)


def _cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


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
    settings = PrepareSettings(sequence_length=_SEQUENCE_LENGTH)
    prepared = prepare_files([Input("", str(source))], output, tokenizer, settings, processes=processes, display=quiet)
    return sum(manifest.num_tokens - prepared.counts.documents for manifest in prepared.manifests.values())

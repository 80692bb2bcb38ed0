"""Speed of reading rows from prepared shards, beside a bare webdataset loop over the same tars.

The bare loop reads and decodes (`np.load`) every sample in the order of the files, and checks, shuffles and remembers
nothing. The stream reads in a run's order, holds every sample against checksum and manifest, and hands out batches of a
position that can be resumed. Loops take turns, so that a busy machine is busy for all of them; the figures are medians.

Two more figures need no other loop to compare with: tokens by second of the reading process's own CPU time, which other
processes' work changes little; and how long a training step that takes tokens at a given pace waits for its batches.
"""

import argparse
import importlib.util
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.benchmark.timing import in_turn
from pipeline.data.loading.prefetch import prefetch_in_thread
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.manifest import Manifest, Source, read_manifest, write_manifest
from pipeline.data.shards.writer import Row, token_dtype, write_shards

_VOCAB_SIZE = 50_257
NUM_DOCUMENTS = 4
"""Documents in each row of `random_rows`, of equal length."""
_PACED_STEPS, _WARMING_STEPS = 60, 5


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each loop, and the stream's with one worker as a multiple of webdataset's; waiting, as a share."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.data or random_rows(Path(scratch), options.rows, options.sequence_length)
        loops: dict[str, Callable[[], int]] = {
            "webdataset, bare": lambda: _webdataset(directory),
            "stream, 1 worker": lambda: _stream(directory, options, 1),
            "stream, no worker": lambda: _stream(directory, options, 0),
        }
        if importlib.util.find_spec("streaming") is not None:
            _write_mosaic(directory, Path(scratch) / "mosaic")
            loops["MosaicML Streaming, 1 worker"] = lambda: _mosaic(Path(scratch) / "mosaic", options.micro_batch)

        load_before = os.getloadavg()[0]
        waiting, by_cpu = _waiting(directory, options), _by_cpu_second(lambda: _stream(directory, options, 0))
        # The first turn warms the disk's cache.
        speeds = in_turn({name: partial(_speed, loop) for name, loop in loops.items()}, 1 + options.repeat)

    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    return {
        "tokens_per_second": medians,
        "stream_over_webdataset": medians["stream, 1 worker"] / medians["webdataset, bare"],
        "stream_tokens_per_cpu_second": by_cpu,
        "waiting_share": waiting,
        "pace": options.pace,
        "load_average": load_before,
        "cores": len(os.sched_getaffinity(0)),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines."""
    lines = [f"{name:30} {speed / 1e6:8.1f}M tokens/s" for name, speed in figures["tokens_per_second"].items()]
    lines.append(f"{'stream, 1 worker / webdataset':30} {figures['stream_over_webdataset']:8.2f}   (goal: 2)")

    # Figures with no other loop to compare with.
    lines.append(
        f"{'stream, no worker, by CPU time':30} {figures['stream_tokens_per_cpu_second'] / 1e6:8.1f}M tokens/s   (goal: 20)"
    )
    lines.append(
        f"{'waiting for data / step':30} {figures['waiting_share']:8.2%}   (goal: below 1%; a rank with 1 worker, "
        f"training at {figures['pace']:,.0f} tokens/s)"
    )

    lines.append(f"(load average {figures['load_average']:.1f} on {figures['cores']} cores)")
    if "MosaicML Streaming, 1 worker" not in figures["tokens_per_second"]:
        lines.append("(MosaicML Streaming is not installed)")
    return "\n".join(lines)


def random_rows(directory: Path, num_rows: int, sequence_length: int, vocab_size: int = _VOCAB_SIZE) -> Path:
    """Write shards of random tokens into `directory`, and return it."""
    draw = np.random.default_rng(0)
    lengths = np.full(NUM_DOCUMENTS, sequence_length // NUM_DOCUMENTS, np.uint32)
    rows = (
        Row(draw.integers(0, vocab_size, sequence_length, np.uint32), lengths, np.zeros(NUM_DOCUMENTS, np.uint8))
        for _ in range(num_rows)
    )

    shards = write_shards(rows, directory, vocab_size=vocab_size, samples_per_shard=4096, named_sources=True)
    (directory / "tokenizer.json").touch()
    manifest = Manifest(
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        sources=(Source(name="random", documents=num_rows * NUM_DOCUMENTS, tokens=num_rows * sequence_length),),
        shards=tuple(shards),
    )

    write_manifest(directory, manifest)
    return directory


def _webdataset(directory: Path) -> int:
    tokens = 0
    for path in sorted(directory.glob("*.tar")):
        with path.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                arrays = {name: np.load(io.BytesIO(data)) for name, data in sample.items() if name.endswith(".npy")}
                tokens += len(arrays["tokens.npy"])
    return tokens


def _stream(directory: Path, options: argparse.Namespace, num_workers: int) -> int:
    sizes = {"lanes": options.lanes, "global_batch": options.lanes, "micro_batch": options.micro_batch}
    stream = Stream(directory, **sizes, rank=0, world_size=1, seed=0, shuffle_block=1024, num_workers=num_workers)
    return sum(batch.tokens_BT.numel() for batch in stream.iterate(0, end_sample=stream.samples_per_epoch))


def _speed(loop: Callable[[], int], turn: int) -> float:
    """Tokens a second of one turn of a loop."""
    started = time.perf_counter()
    tokens = loop()
    return tokens / (time.perf_counter() - started)


def _by_cpu_second(loop: Callable[[], int]) -> float:
    loop()  # warms the disk's cache
    started = time.process_time()
    return loop() / (time.process_time() - started)


def _waiting(directory: Path, options: argparse.Namespace) -> float:
    """The share of its time that a rank waits for batches, where a micro-step without waiting takes as long as its tokens at
    `options.pace`. The rest of the micro-step is spent asleep, as a host is that waits for its accelerator; and as with one,
    batches are made ahead in a thread."""
    sizes = {"lanes": options.lanes, "global_batch": options.lanes, "micro_batch": options.micro_batch}
    stream = Stream(directory, **sizes, rank=0, world_size=1, seed=0, shuffle_block=1024, num_workers=1)
    waited = worked = 0.0
    with closing(prefetch_in_thread(stream.iterate(0), stream.micro_steps)) as batches:
        for step in range(_WARMING_STEPS + _PACED_STEPS):
            started = time.perf_counter()
            num_tokens = next(batches).tokens_BT.numel()
            arrived = time.perf_counter()
            time.sleep(num_tokens / options.pace)
            if step >= _WARMING_STEPS:
                waited += arrived - started
                worked += time.perf_counter() - arrived
    return waited / (waited + worked)


def _rows_as_arrays(directory: Path) -> Iterator[np.ndarray]:
    manifest = read_manifest(directory)
    size, dtype = manifest.num_samples, token_dtype(manifest.vocab_size)
    stream = Stream(directory, lanes=1, global_batch=1, micro_batch=1, rank=0, world_size=1, seed=0, shuffle_block=size)
    yield from (batch.tokens_BT[0].numpy().astype(dtype) for batch in stream.iterate(0, end_sample=size))


def _write_mosaic(directory: Path, output: Path) -> None:
    from streaming import MDSWriter

    column = f"ndarray:{token_dtype(read_manifest(directory).vocab_size).name}"
    with MDSWriter(out=str(output), columns={"tokens": column}) as writer:
        for tokens in _rows_as_arrays(directory):
            writer.write({"tokens": tokens})


def _mosaic(directory: Path, micro_batch: int) -> int:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(directory), batch_size=micro_batch, shuffle=True, shuffle_seed=0)
    with warnings.catch_warnings():
        # Its arrays are views of what was read; torch says so in every worker.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return sum(batch["tokens"].numel() for batch in DataLoader(dataset, batch_size=micro_batch, num_workers=1))

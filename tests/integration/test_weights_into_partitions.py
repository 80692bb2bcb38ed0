"""Pretrained weights go into ZeRO-3's partitions one tensor at a time: no rank holds the model, and one rank reads it."""

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import ModelSettings
from pipeline.model.export import save_model
from pipeline.model.mtp import MTPModel, initialize_weights
from tests.ranks import run_ranks

# 32 blocks of 4 MiB: beside the whole of 128 MiB, one block or the embedding is little.
SHAPE = ModelSettings(
    dim=256, num_layers=32, num_attention_heads=4, ffn_dim=1024, vocab_size=512, num_prediction_heads=1, tied_embeddings=True
)

M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: blocks of at least so many bytes are mapped by themselves."""


def resident(kind: str) -> int:
    """Bytes of this process's memory: RssAnon, that no file backs, or RssFile, pages of files that it has read or mapped."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def peak_of(kind: str) -> Iterator[list[int]]:
    """Sample the memory while the body runs; yields a list that ends with the peak above the beginning."""
    begin, found, done = resident(kind), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            found[0] = max(found[0], resident(kind) - begin)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def build_from(directory: Path) -> tuple[int, int, int]:
    """(bytes of this rank's partitions, peaks of anonymous memory and of the files' pages) while a policy is built."""
    from pipeline.runtime.engine import _build_model, initialize_distributed

    initialize_distributed(torch.device("cpu"), "error")
    # Freed blocks go back to the system at once, so that what is resident is what is held (without it glibc keeps many).
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
    # What the libraries take at their first use is no part of it.
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    _build_model(SHAPE.model_copy(update={"num_layers": 1}), config, None, "off")
    dist.barrier()
    with peak_of("RssAnon") as anonymous, peak_of("RssFile") as mapped:
        model = _build_model(SHAPE, config, directory, "off")
    held = sum(parameter.ds_tensor.numel() * 4 for parameter in model.parameters())
    return held, anonymous[0], mapped[0]


def test_weights_go_into_partitions_without_any_rank_holding_the_model(tmp_path: Path) -> None:
    model = MTPModel(SHAPE)
    initialize_weights(model)
    save_model(model, tmp_path)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    del model
    first, second = run_ranks(build_from, 2, tmp_path)
    for held, anonymous, _ in (first, second):
        assert 0.49 * whole < held < 0.52 * whole
        # Its half, and what a few tensors take on their way.
        assert anonymous < 0.75 * whole, f"{anonymous / whole:.2f} of the model"

    # The first rank has read every byte, the other nothing but headers.
    assert first[2] > 0.9 * whole
    assert second[2] < 0.1 * whole

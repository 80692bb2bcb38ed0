"""Prefetching: batches are read, collated and copied to the device before the training loop asks for them.

A background thread does this work. It copies from pinned memory on a CUDA stream of its own, so reading and copying overlap
with the computation of the current step. The order of the batches is that of the iterator underneath. The training loop
counts only the samples that it has consumed, so batches that were prefetched and never used are simply read again on resume.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Full, Queue
from typing import Any, TypeVar

import torch

from pipeline.data.loading.batch import Batch

Item = TypeVar("Item")

STEPS_AHEAD = 2
"""Steps whose micro-batches wait on the device in training. The loop takes all micro-batches of a step at once, so one step in
the queue is the least that lets the next step begin without waiting; the second covers reads that take longer than a step."""
EVALUATION_BATCHES_AHEAD = 1
"""Batches that wait on the device in evaluation, which takes them one at a time: enough to overlap reading and copying."""

_POLL_SECONDS = 0.1
# How long closing waits for the item in progress, say from a storage that does not answer. The thread is a daemon.
_JOIN_SECONDS = 10.0


def training_depth(micro_steps: int) -> int:
    """Compute the prefetch depth of training, in micro-batches: `STEPS_AHEAD` steps of `micro_steps` micro-batches each."""
    return STEPS_AHEAD * micro_steps


def prefetched(batches: Iterator[Batch], device: torch.device, depth: int) -> Iterator[Batch]:
    """Move batches to `device` ahead of use; on a CPU there is nothing to copy, and the batches are returned unchanged.

    Args:
        batches: on the host.
        depth: batches that wait on the device, in its memory.
    """
    return _copied(batches, device, depth) if device.type == "cuda" else batches


def prefetch_in_thread(
    items: Iterator[Item], depth: int, begin: Callable[[], None] = lambda: None
) -> Generator[Item, None, None]:
    """Iterate over `items` in a background thread and yield the same items in the same order.

    Up to `depth` finished items wait in a queue while the thread works on one more. An exception of the iterator is raised
    where its item would have come. The thread calls `begin` before anything else.

    The first item is made in the calling thread: a DataLoader forks its workers then, and forking is safe only while no
    other thread runs.
    """
    queue: Queue[tuple[Any, BaseException | None]] = Queue(depth)
    closing = threading.Event()

    def put(item: Any, error: BaseException | None) -> None:
        while not closing.is_set():
            try:
                return queue.put((item, error), timeout=_POLL_SECONDS)
            except Full:
                continue

    def work() -> None:
        try:
            begin()
            for item in items:
                put(item, None)
                if closing.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    # The first item, in this thread.
    try:
        yield next(items)
    except StopIteration:
        return

    # All others, from the queue.
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = _take(queue, thread)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closing.set()
        thread.join(_JOIN_SECONDS)
        if isinstance(items, Generator) and not thread.is_alive():
            items.close()


def _take(queue: "Queue[tuple[Any, BaseException | None]]", thread: threading.Thread) -> tuple[Any, BaseException | None]:
    """Take the next item from the queue. Waits by polling, to notice signals and a thread that has died."""
    while True:
        try:
            return queue.get(timeout=_POLL_SECONDS)
        except Empty:
            if not thread.is_alive() and queue.empty():
                raise RuntimeError("the thread that fetches batches has died") from None


def _copied(batches: Iterator[Batch], device: torch.device, depth: int) -> Generator[Batch, None, None]:
    copies = torch.cuda.Stream(device)

    def begin() -> None:
        # A new thread would use device 0 and create a CUDA context there, and would run torch's CPU operations on all cores.
        torch.cuda.set_device(copies.device)  # It has an index, also where the device was given without one.
        torch.set_num_threads(1)

    def on_device() -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
        for batch in batches:
            # The yield is outside this block: inside it, the copy stream would stay the consumer's current stream.
            with torch.cuda.stream(copies):
                copied = batch.pin_memory().to(device, non_blocking=True)
                arrived = copies.record_event()
            yield copied, arrived

    for batch, arrived in prefetch_in_thread(on_device(), depth, begin):
        # The compute stream waits for the copy; the allocator keeps the memory until the compute stream is done with it.
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for tensor in batch.tensors:
            tensor.record_stream(current)
        yield batch

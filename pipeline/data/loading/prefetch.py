"""Batches on the device before they are asked for.

Reading, putting together and copying happen in a thread of their own, on a stream of its own, from memory that the device
fetches by itself: while the device works on one step, the next ones arrive. What comes, and in which order, is what the
iterator underneath gives; the position of a job is kept by who consumes (`stream`), so what was fetched ahead and never
used is lost to nobody.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Full, Queue
from typing import Any, TypeVar

import torch

from pipeline.data.loading.batch import Batch

Item = TypeVar("Item")

_POLL_SECONDS = 0.1
_LAST_SECONDS = 10.0
"""How long the end waits for an item that is being made, say of a storage that does not answer; what is left ends with the
process."""


def prefetched(batches: Iterator[Batch], device: torch.device, depth: int) -> Iterator[Batch]:
    """The same batches on `device`, `depth` of them ahead; on a CPU, where nothing is to be copied, as they are."""
    return _copied(batches, device, depth) if device.type == "cuda" else batches


def ahead(items: Iterator[Item], depth: int, begin: Callable[[], None] = lambda: None) -> Generator[Item, None, None]:
    """The same items, made ahead in a thread that calls `begin` first: `depth` wait, and one more is in hand. What making one
    raises is raised in its place.

    The first is made in the calling thread: loaders fork their workers then, and no other thread should be at work.
    """
    found: Queue[tuple[Any, BaseException | None]] = Queue(depth)
    closing = threading.Event()

    def put(item: Any, error: BaseException | None) -> None:
        while not closing.is_set():
            try:
                return found.put((item, error), timeout=_POLL_SECONDS)
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

    try:
        yield next(items)
    except StopIteration:
        return
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = _take(found, thread)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closing.set()
        thread.join(_LAST_SECONDS)
        if isinstance(items, Generator) and not thread.is_alive():
            items.close()


def _take(found: "Queue[tuple[Any, BaseException | None]]", thread: threading.Thread) -> tuple[Any, BaseException | None]:
    """The next item. A wait without an end would not hear a signal, nor that the thread has died."""
    while True:
        try:
            return found.get(timeout=_POLL_SECONDS)
        except Empty:
            if not thread.is_alive() and found.empty():
                raise RuntimeError("the thread that fetches batches has died") from None


def _copied(batches: Iterator[Batch], device: torch.device, depth: int) -> Generator[Batch, None, None]:
    copies = torch.cuda.Stream(device)

    def begin() -> None:
        # A thread begins on the first device, where it would leave a context of its own, and with all cores to itself.
        torch.cuda.set_device(device)
        torch.set_num_threads(1)

    def on_device() -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
        for batch in batches:
            # Not round the yield: the stream would stay the current one of whoever asked.
            with torch.cuda.stream(copies):
                copied = batch.pin_memory().to(device, non_blocking=True)
                arrived = copies.record_event()
            yield copied, arrived

    for batch, arrived in ahead(on_device(), depth, begin):
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived)
        for tensor in batch.tensors:
            tensor.record_stream(current)
        yield batch

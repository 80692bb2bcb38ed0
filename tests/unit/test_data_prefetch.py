"""Items made ahead in a thread: the same ones, the same errors, and nothing left running."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from pipeline.data.loading.prefetch import prefetch_in_thread, prefetched


def counted(end: int, made: list[int], closed: list[bool]) -> Iterator[int]:
    try:
        for number in range(end):
            made.append(number)
            yield number
    finally:
        closed.append(True)


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("end", [0, 1, 2, 50])
@pytest.mark.parametrize("depth", [1, 3])
def test_they_are_the_items_in_their_order_and_the_thread_ends_with_them(end: int, depth: int) -> None:
    made: list[int] = []
    closed: list[bool] = []
    assert list(prefetch_in_thread(counted(end, made, closed), depth)) == list(range(end))
    assert closed == [True]
    assert prefetching() == []


def test_while_one_item_is_used_the_next_ones_are_made_and_no_more_than_there_is_room_for() -> None:
    made: list[int] = []
    items = prefetch_in_thread(counted(100, made, []), 2)
    assert [next(items), next(items)] == [0, 1]
    # Two wait, and the thread holds one that finds no room.
    deadline = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 4]
    items.close()
    assert prefetching() == []


def test_who_stops_early_leaves_no_thread_and_closes_what_was_read_from() -> None:
    closed: list[bool] = []
    items = prefetch_in_thread(counted(100, [], closed), 2)
    next(items), next(items)
    items.close()
    assert closed == [True]
    assert prefetching() == []


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def failing() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("the third is damaged")

    items = prefetch_in_thread(failing(), 4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="the third is damaged"):
        next(items)
    assert prefetching() == []


def test_the_first_item_is_made_by_who_asks_for_it() -> None:
    def who() -> Iterator[threading.Thread]:
        while True:
            yield threading.current_thread()

    items = prefetch_in_thread(who(), 1)
    assert next(items) is threading.current_thread()
    assert next(items) is not threading.current_thread()
    items.close()


def test_on_a_cpu_nothing_is_fetched_ahead() -> None:
    batches: Iterator = iter([])
    assert prefetched(batches, torch.device("cpu"), 1) is batches

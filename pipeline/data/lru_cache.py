"""A least-recently-used (LRU) cache, which bounds memory and open files."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A cache of at most `capacity` values. `on_evict` is called with each value that is evicted or dropped."""

    def __init__(self, capacity: int, on_evict: Callable[[Value], None] | None = None) -> None:
        self.capacity = capacity
        self._on_evict = on_evict
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of `key`; made and cached if there is none."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        self._shrink_to(self.capacity - 1)
        value = self._values[key] = make()
        return value

    def find(self, key: Key) -> Value | None:
        """Return the value of `key`, or None."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Cache a value, unless `key` has one already."""
        self.get(key, lambda: value)

    def drop(self, key: Key) -> None:
        """Drop the value of `key`, if there is one."""
        if key in self._values:
            self._values.move_to_end(key, last=False)
            self._shrink_to(len(self._values) - 1)

    def clear(self) -> None:
        """Drop all values."""
        self._shrink_to(0)

    def _shrink_to(self, size: int) -> None:
        while len(self._values) > size:
            _, value = self._values.popitem(last=False)
            if self._on_evict is not None:
                self._on_evict(value)

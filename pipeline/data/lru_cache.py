"""A cache that forgets what was used longest ago, so that memory and open files have a bound."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LeastRecentlyUsed(Generic[Key, Value]):
    """At most `capacity` values; `forget` is called with each value that has to go."""

    def __init__(self, capacity: int, forget: Callable[[Value], None] | None = None) -> None:
        self.capacity = capacity
        self._forget = forget
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made if it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        self._shrink_to(self.capacity - 1)
        value = self._values[key] = make()
        return value

    def find(self, key: Key) -> Value | None:
        """The value of `key`, if it is there."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, unless `key` has one already: that one stays."""
        self.get(key, lambda: value)

    def drop(self, key: Key) -> None:
        """Forget the value of `key`, if it is there."""
        if key in self._values:
            self._values.move_to_end(key, last=False)
            self._shrink_to(len(self._values) - 1)

    def clear(self) -> None:
        """Forget everything."""
        self._shrink_to(0)

    def _shrink_to(self, size: int) -> None:
        while len(self._values) > size:
            _, value = self._values.popitem(last=False)
            if self._forget is not None:
                self._forget(value)

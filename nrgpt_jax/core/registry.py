"""Named choices: a dictionary whose failed look-up lists what there is."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping from names to registered objects, filled by `register`."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Registers `entry`; raises ValueError when the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def register(self, name: str, make: Callable[[Any], T]) -> Callable[[Any], Any]:
        """A decorator that registers `make(function)` and returns the function unchanged."""

        def decorate(function):
            self.add(name, make(function))
            return function

        return decorate

    def remove(self, name: str) -> None:
        """Forgets an entry, so that it can be registered anew (in a notebook, in a test)."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries))
            raise KeyError(f"unknown {self.kind} {name!r}; known: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

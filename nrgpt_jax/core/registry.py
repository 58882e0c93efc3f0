"""Named choices: a dictionary whose failed look-up lists what there is."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """A mapping from names to registered objects, filled by `register`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, name: str, entry: T) -> T:
        """Registers `entry`; raises ValueError when the name is taken."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self[name] = entry
        return entry

    def register(self, name: str, make: Callable[[Any], T]) -> Callable[[Any], Any]:
        """A decorator that registers `make(function)` and returns the function unchanged."""

        def decorate(function):
            self.add(name, make(function))
            return function

        return decorate

    def remove(self, name: str) -> None:
        """Forgets an entry, so that it can be registered again (in a notebook, in a test)."""
        del self[name]

    def __missing__(self, name: str) -> NoReturn:
        known = ", ".join(sorted(self))
        raise KeyError(f"unknown {self.kind} {name!r}; known: {known}")

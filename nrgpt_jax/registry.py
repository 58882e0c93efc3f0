"""Named choices: a dictionary whose failed look-up lists what there is."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

from nrgpt_jax.errors import require

T = TypeVar("T")


class Registry(dict[str, T]):
    """A mapping from names to registered objects, filled by `register`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.sources: dict[str, Any] = {}  # what was registered, as it stands in its file
        self.options: dict[str, dict[str, Any]] = {}  # of each entry, with their defaults
        self._makers: dict[str, Callable[[Any], T]] = {}

    def add(self, name: str, entry: T, source: Any = None) -> T:
        """Registers `entry`; raises ValueError when the name is taken by another source.

        The same function of the same file replaces itself: a module that is imported again.

        Args:
          name: under which it is found.
          entry: what is found.
          source: the function or class that it is made of; None: the entry itself.
        """
        source = entry if source is None else source
        if name in self and not _same(self.sources[name], source):
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self[name], self.sources[name] = entry, source
        self.options[name] = {}
        return entry

    def register(self, name: str, make: Callable[[Any], T]) -> Callable[[Any], Any]:
        """A decorator that registers `make(function)` and returns the function unchanged.

        Keyword-only parameters of the function that have a default are its options.
        """

        def decorate(function):
            self.add(name, make(function), function)
            self._makers[name], self.options[name] = make, _options(function)
            return function

        return decorate

    def configured(self, name: str, options: Mapping[str, Any]) -> T:
        """The entry with options of its own set to those of them that are given."""
        own = {n: options[n] for n in self.options.get(name, {}) if n in options}
        return self._makers[name](partial(self.sources[name], **own)) if own else self[name]

    def remove(self, name: str) -> None:
        """Forgets an entry, so that it can be registered again (in a notebook, in a test)."""
        del self[name], self.sources[name], self.options[name]
        self._makers.pop(name, None)

    def __missing__(self, name: str) -> NoReturn:
        known = ", ".join(sorted(self))
        raise KeyError(f"unknown {self.kind} {name!r}; known: {known}")


def check_options(field: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises UserError where an option is not known, or not of the kind of its default."""
    allowed = f"the options here are {', '.join(known) or '(none)'}"
    for name, value in options.items():
        require(name in known, f"{field}.{name}", value, allowed)
        kind = type(known[name])
        alike = type(value) is kind or (kind is float and type(value) is int)
        require(alike, f"{field}.{name}", value, f"a value like {known[name]!r}")


def _same(one: Any, other: Any) -> bool:
    """Whether two sources are made of functions of the same places in the same file."""
    places = [
        [
            (code.co_filename, code.co_qualname)
            for part in (source if isinstance(source, tuple) else (source,))
            if (code := getattr(part, "__code__", None))
        ]
        for source in (one, other)
    ]
    return bool(places[0]) and places[0] == places[1] and not places[0][0][0].startswith("<")


def _options(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    only = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
    return {p.name: p.default for p in only}

"""Registries of named objects: dictionaries whose failed look-ups list the known names."""

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
        self.sources: dict[str, Any] = {}  # the registered functions or classes, as defined
        self.options: dict[str, dict[str, Any]] = {}  # defaults of the options of each entry
        self._makers: dict[str, Callable[[Any], T]] = {}

    def add(self, name: str, entry: T, source: Any = None) -> T:
        """Register an entry; raises ValueError if another source has registered the name.

        The same function of the same file replaces itself, as its module may be imported again.

        Args:
          name: key of the entry.
          entry: object to register.
          source: function or class from which the entry is created; None: the entry itself.
        """
        source = entry if source is None else source
        if name in self and not _same(self.sources[name], source):
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self[name], self.sources[name] = entry, source
        self.options[name] = {}
        return entry

    def register(self, name: str, make: Callable[[Any], T]) -> Callable[[Any], Any]:
        """Return a decorator that registers `make(function)` and returns the function unchanged.

        Keyword-only parameters of the function with a default are its options.
        """

        def decorate(function):
            self.add(name, make(function), function)
            self._makers[name], self.options[name] = make, _options(function)
            return function

        return decorate

    def configured(self, name: str, options: Mapping[str, Any]) -> T:
        """Return the entry with its own options set from `options`; other options are ignored."""
        own = {n: options[n] for n in self.options.get(name, {}) if n in options}
        return self._makers[name](partial(self.sources[name], **own)) if own else self[name]

    def remove(self, name: str) -> None:
        """Remove an entry, so that its name can be registered again (in a notebook or a test)."""
        del self[name], self.sources[name], self.options[name]
        self._makers.pop(name, None)

    def __missing__(self, name: str) -> NoReturn:
        known = ", ".join(sorted(self))
        raise KeyError(f"unknown {self.kind} {name!r}; known: {known}")


def check_options(field: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise UserError if an option is unknown, or has another type than its default."""
    allowed = f"the options here are {', '.join(known) or '(none)'}"
    for name, value in options.items():
        require(name in known, f"{field}.{name}", value, allowed)
        kind = type(known[name])
        alike = type(value) is kind or (kind is float and type(value) is int)
        require(alike, f"{field}.{name}", value, f"a value like {known[name]!r}")


def _same(one: Any, other: Any) -> bool:
    """Return whether two sources consist of functions of the same names in the same files."""
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

"""Space: the axes of one backend, and the variants that they spell; which of them are lawful, elsa_tune.generate.lawful says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from elsa_tune import places
from elsa_tune.errors import BadVariant
from elsa_tune.parts import scan
from elsa_tune.variant import Value, Variant


@dataclass(frozen=True, slots=True)
class Axis:
    """One choice: its name in templates, how a value is spelled, its values, and what it means."""

    name: str
    spell: str
    values: tuple[Value, ...]
    meaning: str
    default: Value | None = None

    def token(self, value: Value) -> str:
        """A value as it appears in a variant's name; empty for the default."""
        return "" if value == self.default else self.spell.format(value)


@dataclass(frozen=True)
class Space:
    """The axes of ``backend``, and the spellings a search starts from."""

    backend: str
    axes: tuple[Axis, ...]
    start: tuple[str, ...]

    @staticmethod
    def read(backend: str) -> Space:
        """Read ``search_spaces/<backend>.toml``. Raises BadVariant for a backend that has none."""
        return _read(backend)

    def variant(self, values: Mapping[str, Value]) -> Variant:
        """A variant from axis values; defaults fill what is left out. Raises BadVariant."""
        known = {axis.name for axis in self.axes}
        if unknown := set(values) - known:
            raise BadVariant(f"{self.backend} has no axis {sorted(unknown)[0]!r}; it has {', '.join(sorted(known))}")
        chosen: list[tuple[str, Value]] = []
        for axis in self.axes:
            value = values.get(axis.name, axis.default)
            if value is None or value not in axis.values:
                raise BadVariant(
                    f"{axis.name}={value!r} is not possible; use one of {', '.join(map(str, axis.values))}"
                )
            chosen.append((axis.name, value))
        tokens = [axis.token(value) for axis, (_, value) in zip(self.axes, chosen, strict=True)]
        return Variant(self.backend, tuple(chosen), ".".join([self.backend, *filter(None, tokens)]))

    def parse(self, text: str) -> Variant:
        """Read a variant's spelling. Raises BadVariant."""
        backend, *tokens = text.strip().split(".")
        if backend != self.backend:
            raise BadVariant(f"variant {text!r} belongs to backend {backend!r}; give one of {self.backend!r}")
        values: dict[str, Value] = {}
        for token in tokens:
            read = self._spelled.get(token, [])
            if len(read) != 1 or read[0][0] in values:
                letters = ", ".join(f"{axis.spell.format('N')} {axis.name}" for axis in self.axes)
                raise BadVariant(f"variant {text!r}: {token!r} is not understood; tokens are {letters}")
            values[read[0][0]] = read[0][1]
        return self.variant(values)

    @cached_property
    def _spelled(self) -> dict[str, list[tuple[str, Value]]]:
        """Token -> the axes and values that it spells: one, or the search space is ambiguous."""
        found: dict[str, list[tuple[str, Value]]] = {}
        for axis in self.axes:
            for value in axis.values:
                found.setdefault(axis.spell.format(value), []).append((axis.name, value))
        return found

    @property
    def digest(self) -> str:
        """What tells this space's values from another version's."""
        return hashlib.sha256(repr([(axis.name, axis.values) for axis in self.axes]).encode()).hexdigest()[:8]


def _values(name: str, listed: list[Value]) -> tuple[Value, ...]:
    """The values of an axis; of scans, every one, those that the space names first: none needs a text in any language."""
    return tuple(dict.fromkeys([*listed, *(scan.names() if name == "scan" else ())]))


@cache
def _read(backend: str) -> Space:
    path = places.data("search_spaces") / f"{backend}.toml"
    content = places.read_toml(path) if re.fullmatch(r"[a-z_]+", backend) and path.is_file() else {}
    if "axis" not in content:
        raise BadVariant(f"backend {backend!r} is unknown; use one of {', '.join(names())}")
    axes = tuple(
        Axis(a["name"], a["spell"], _values(a["name"], a["values"]), a["meaning"], a.get("default"))
        for a in content["axis"]
    )
    return Space(backend, axes, tuple(content["start"]["variants"]))


def names() -> list[str]:
    """Every backend that has a space: files of ``search_spaces`` that list axes."""
    return sorted(path.stem for path in places.data("search_spaces").glob("*.toml") if "axis" in places.read_toml(path))


@lru_cache(maxsize=65536)
def parse(text: str) -> Variant:
    """Read any variant's spelling, whatever its backend. Raises BadVariant."""
    return Space.read(text.strip().partition(".")[0]).parse(text)

"""Space: the axes of one backend, the laws over them, and the valid variants that remain."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from elsa_tune import places
from elsa_tune.device import Device
from elsa_tune.errors import BadVariant
from elsa_tune.parts import scan
from elsa_tune.problem import Problem
from elsa_tune.variant import Value, Variant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Law = Callable[..., str | None]
"""A named rule: takes axis values by name (and ``problem``, ``device`` if it asks); returns a reason to refuse, or None."""


def read_toml(path: Path) -> dict[str, Any]:
    """One TOML file."""
    with path.open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)
        return content


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
    """The axes of ``backend``, its laws, and the spellings a search starts from."""

    backend: str
    axes: tuple[Axis, ...]
    laws: tuple[Law, ...]
    start: tuple[str, ...]

    @staticmethod
    def load(backend: str) -> Space:
        """Read ``search_spaces/<backend>.toml`` and the laws of ``elsa_tune/backends/<backend>.py``."""
        return _load(backend)

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
            raise BadVariant(f"variant {text!r} belongs to backend {backend!r}, not {self.backend!r}")
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

    def refusal(self, variant: Variant, problem: Problem, device: Device) -> str | None:
        """The first law's reason against this variant, or None if it is valid."""
        known = {**variant.axes, "problem": problem, "device": device}
        for law in self.laws:
            if reason := law(**{name: known[name] for name in _parameters(law)}):
                return f"{law.__name__}: {reason}"
        return None

    def variants(
        self,
        problem: Problem,
        device: Device,
        prefer: Mapping[str, Value] | None = None,
        rng: random.Random | None = None,
    ) -> Iterator[Variant]:
        """Every valid variant, values nearest to ``prefer`` first (else declared or shuffled order).

        A law is asked as soon as the axes it names are chosen, so refused corners are never walked through.
        """
        due = self._laws_due()
        known: dict[str, Any] = {"problem": problem, "device": device}

        def walk(depth: int) -> Iterator[Variant]:
            if depth == len(self.axes):
                yield self.variant({axis.name: known[axis.name] for axis in self.axes})
                return
            axis = self.axes[depth]
            for value in _ordered(axis, (prefer or {}).get(axis.name), rng):
                known[axis.name] = value
                if not any(law(**{name: known[name] for name in names}) for law, names in due[depth]):
                    yield from walk(depth + 1)

        return walk(0)

    def _laws_due(self) -> list[list[tuple[Law, tuple[str, ...]]]]:
        position = {axis.name: i for i, axis in enumerate(self.axes)}
        due: list[list[tuple[Law, tuple[str, ...]]]] = [[] for _ in self.axes]
        for law in self.laws:
            names = _parameters(law)
            due[max((position.get(name, 0) for name in names), default=0)].append((law, names))
        return due


@cache
def _parameters(law: Law) -> tuple[str, ...]:
    return tuple(inspect.signature(law).parameters)


def _ordered(axis: Axis, wanted: Value | None, rng: random.Random | None) -> tuple[Value, ...]:
    if wanted is not None:
        at = axis.values.index(wanted)
        return tuple(sorted(axis.values, key=lambda v: abs(axis.values.index(v) - at)))
    if rng is not None:
        return tuple(rng.sample(axis.values, len(axis.values)))
    return axis.values


def _values(name: str, listed: list[Value]) -> tuple[Value, ...]:
    """The values of an axis; of scans, every one, those that the space names first: none needs a text in any language."""
    return tuple(dict.fromkeys([*listed, *(scan.names() if name == "scan" else ())]))


@cache
def _load(backend: str) -> Space:
    from elsa_tune.generate import backends

    path = places.data("search_spaces") / f"{backend}.toml"
    if not re.fullmatch(r"[a-z_]+", backend) or not path.is_file():
        raise BadVariant(f"backend {backend!r} is unknown; use one of {', '.join(backends.names())}")
    content = read_toml(path)
    axes = tuple(
        Axis(a["name"], a["spell"], _values(a["name"], a["values"]), a["meaning"], a.get("default"))
        for a in content["axis"]
    )
    return Space(backend, axes, backends.get(backend).LAWS, tuple(content["start"]["variants"]))


@lru_cache(maxsize=65536)
def parse(text: str) -> Variant:
    """Read any variant's spelling, whatever its backend. Raises BadVariant."""
    return Space.load(text.strip().partition(".")[0]).parse(text)

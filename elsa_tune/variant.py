"""Variant: one way to compute a family, as a backend and one value per axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = str | int


@dataclass(frozen=True, slots=True)
class Variant:
    """A backend's name, its axis values in the order of the search space, and the spelling that space gives it.

    Spell one with ``str``; read one with ``Space.read(backend).parse(text)`` or ``elsa_tune.space.parse``.
    """

    backend: str
    values: tuple[tuple[str, Value], ...]
    spelling: str

    @property
    def axes(self) -> Mapping[str, Value]:
        """Axis name -> value."""
        return dict(self.values)

    def __str__(self) -> str:
        return self.spelling

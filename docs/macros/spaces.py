"""Tables of search spaces: axes with their values as they are spelled, and the laws that say which go together."""

from __future__ import annotations

from elsa_tune.generate import backends
from elsa_tune.space import Axis, Space

from ._markdown import code, said, table


def axis_table(backend: str) -> str:
    """Every axis of a backend, in the order of a variant's name."""
    axes = Space.read(backend).axes
    rows = ([code(axis.name), _tokens(axis), _default(axis), said(axis.meaning, f"axis {axis.name}")] for axis in axes)
    return table(["axis", "spelled", "left out", "meaning"], rows)


def law_table(backend: str) -> str:
    """Every law of a backend, and what it forbids."""
    laws = {law.__name__: law for law in backends.get(backend).LAWS}
    return table(["law", "why"], ([code(name), said(law.__doc__, f"law {name}")] for name, law in laws.items()))


def _tokens(axis: Axis) -> str:
    return code(*(token for token in map(axis.token, axis.values) if token))


def _default(axis: Axis) -> str:
    return "" if axis.default is None else code(axis.default)

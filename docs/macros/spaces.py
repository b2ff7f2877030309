"""Tables of search spaces: axes with their values as they are spelled, and the laws that say which go together."""

from __future__ import annotations

import inspect
from importlib import import_module

from elsa_tune.generate import backends
from elsa_tune.space import Axis, Space

from ._markdown import code, said, table


def backend_reference() -> str:
    """A section for each backend: what it is, its axes, its laws."""
    return "\n\n".join(map(_section, backends.names()))


def _section(name: str) -> str:
    told = inspect.cleandoc(import_module(f"{backends.__package__}.{name}").__doc__ or "")
    return f"## `{name}`\n\n{told}\n\n{_axes(name)}\n\n### Laws of `{name}`\n\n{_laws(name)}"


def _axes(backend: str) -> str:
    """In the order of a variant's name."""
    axes = Space.read(backend).axes
    rows = ([code(axis.name), _tokens(axis), _default(axis), said(axis.meaning, f"axis {axis.name}")] for axis in axes)
    return table(["axis", "spelled", "left out", "meaning"], rows)


def _laws(backend: str) -> str:
    """And what each forbids."""
    laws = {law.__name__: law for law in backends.get(backend).LAWS}
    return table(["law", "why"], ([code(name), said(law.__doc__, f"law {name}")] for name, law in laws.items()))


def _tokens(axis: Axis) -> str:
    return code(*(token for token in map(axis.token, axis.values) if token))


def _default(axis: Axis) -> str:
    return "" if axis.default is None else code(axis.default)

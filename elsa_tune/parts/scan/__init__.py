"""Scan strategies: one public file each, found by name."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from elsa_tune.errors import BadVariant
from elsa_tune.parts.scan._base import Round, Scan, depth, draw, run
from elsa_tune.parts.scan._svg import svg

__all__ = ["Round", "Scan", "depth", "draw", "get", "names", "run", "svg"]


@cache
def names() -> tuple[str, ...]:
    """Every strategy's name: the files of this folder."""
    return tuple(sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")))


@cache
def get(name: str) -> Scan:
    """The strategy called ``name``. Raises BadVariant."""
    if name not in names():
        raise BadVariant(f"scan {name!r} is unknown; use one of {', '.join(names())}")
    scan: Scan = import_module(f"elsa_tune.parts.scan.{name}").SCAN
    return scan

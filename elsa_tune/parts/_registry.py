"""How parts are found: each is a public file of its kind's folder, and nothing lists them a second time."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def files_of(path: Sequence[str]) -> tuple[str, ...]:
    """Names of the public files of a package's folders, sorted."""
    return tuple(sorted(m.name for m in iter_modules(path) if not m.name.startswith("_")))


def found(package: str, name: str, constant: str) -> Any:
    """What the file ``name`` of a package calls ``constant``."""
    return getattr(import_module(f"{package}.{name}"), constant)

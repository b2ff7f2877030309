"""timm where torchvision is not installed: importing it needs names that no model uses. PyPI's torchvision does not load beside a torch for CPUs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAMES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class _Class(type):
    """Of classes that have any attribute, and are never called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(ModuleType):
    """A module in which every name is a class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})


@contextmanager
def standing_in() -> Iterator[None]:
    """Inside, whoever imports torchvision gets what stands in its place; outside, transformers finds none, as before."""
    missing = find_spec("torchvision") is None
    made = {f"torchvision{name}": _Module(f"torchvision{name}") for name in NAMES if missing}
    for name, module in made.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(made[above], last, module)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]

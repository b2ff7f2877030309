"""Elements: what query, key, value and output are made of. One public file each, found by name."""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadProblem
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.element._base import Element

__all__ = ["Element", "get", "names"]


@cache
def names() -> tuple[str, ...]:
    """Every element's name: the files of this folder."""
    return files_of(__path__)


@cache
def get(name: str) -> Element:
    """The element called ``name``. Raises BadProblem."""
    if name not in names():
        raise BadProblem(f"dtype {name[:60]!r} is unknown; use one of {', '.join(names())}")
    element: Element = found(__name__, name, "ELEMENT")
    return element

"""Elements: what query, key, value and output are made of. One public file each, found by name."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from elsa_tune.errors import BadProblem
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.element._base import UNIT, Element, Precision

if TYPE_CHECKING:
    from torch import dtype as Dtype

__all__ = ["UNIT", "Element", "Precision", "get", "names", "of_dtype", "precision", "precisions"]


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


@cache
def of_dtype(dtype: Dtype) -> Element | None:
    """The element that tensors of torch's ``dtype`` are of, or None."""
    return next((one for one in map(get, names()) if str(dtype) == f"torch.{one.torch}"), None)


@cache
def precisions() -> tuple[str, ...]:
    """Every precision class's name, the widest element's first."""
    widest = sorted(map(get, names()), key=lambda element: -element.bytes)
    return tuple(name for element in widest for name in element.classes)


@cache
def precision(name: str) -> Precision:
    """The precision class called ``name``. Raises BadProblem."""
    for element in map(get, names()):
        for one in element.precisions:
            if one.name == name:
                return one
    raise BadProblem(f"precision {name[:60]!r} is unknown; use one of {', '.join(precisions())}")

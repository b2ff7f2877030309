"""Ways to 2^x, of which every weight is made. One public file each, found by name."""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadVariant
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.exp._base import DEGREE, Exp

__all__ = ["DEGREE", "Exp", "get", "names"]


@cache
def names() -> tuple[str, ...]:
    """Every way's name: the files of this folder."""
    return files_of(__path__)


@cache
def get(name: str) -> Exp:
    """The way called ``name``. Raises BadVariant."""
    if name not in names():
        raise BadVariant(f"exp {name[:60]!r} is unknown; use one of {', '.join(names())}")
    exp: Exp = found(__name__, name, "EXP")
    return exp

"""Masks: which keys a position sees. One public file each, found by name; several intersect, joined by ``+``."""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadProblem
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.mask._base import MOST_COUNTED, Mask, intersection

__all__ = ["CAUSAL", "MOST_COUNTED", "NONE", "Mask", "get", "names", "of_one_file"]

NONE = "none"

CAUSAL = "causal"
"""What torch's is_causal asks for."""


@cache
def names() -> tuple[str, ...]:
    """Every mask's name: the files of this folder."""
    return files_of(__path__)


@cache
def of_one_file(name: str) -> Mask:
    """The mask of that file. Raises BadProblem."""
    if name not in names():
        raise BadProblem(f"mask {name[:60]!r} is unknown; use {', '.join(names())}, or several joined by '+'")
    mask: Mask = found(__name__, name, "MASK")
    return mask


@cache
def get(text: str) -> Mask:
    """The mask that ``causal`` or ``causal+window`` spells. Raises BadProblem, also where it could be spelled shorter or sorted."""
    words = text.split("+")
    ones = [of_one_file(word) for word in words]
    if words != sorted(set(words)) or (len(words) > 1 and NONE in words):
        sound = "+".join(sorted(set(words) - {NONE}))
        raise BadProblem(f"mask {text[:60]!r} must be spelled {sound!r}: sorted, each once, and 'none' only alone")
    return ones[0] if len(ones) == 1 else intersection(ones)

"""Scores: what is done to a score, after the scale and before the mask. One public file each, found by name.

Several are done one after the other, joined by ``+`` in that order.
"""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadProblem
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.score._base import Chain, Score, farthest

__all__ = ["NONE", "Chain", "Score", "farthest", "get", "names", "of_one_file"]

NONE = "none"


@cache
def names() -> tuple[str, ...]:
    """Every score's name: the files of this folder."""
    return files_of(__path__)


@cache
def of_one_file(name: str) -> Score:
    """The score of that file. Raises BadProblem."""
    if name not in names():
        raise BadProblem(f"score {name[:60]!r} is unknown; use {', '.join(names())}, or several joined by '+'")
    score: Score = found(__name__, name, "SCORE")
    return score


@cache
def get(text: str) -> Chain:
    """The scores that ``softcap`` or ``softcap+bias`` spells, nothing for ``none``. Raises BadProblem."""
    words = text.split("+")
    ones = tuple(of_one_file(word) for word in words if word != NONE)
    if len(set(words)) < len(words) or (len(words) > 1 and NONE in words):
        raise BadProblem(
            f"score {text[:60]!r} is misspelled; name each once, in the order they are done, and 'none' only alone"
        )
    return Chain(text, ones)

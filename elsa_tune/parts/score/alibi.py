"""ALiBi: a score falls with the distance of its key, in each head at a slope of its own (Press et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.operand import STATE, Array
from elsa_tune.parts.score._base import Score


def slopes(sizes: Mapping[str, int]) -> list[list[float]]:
    """As models have them: 2^(-8 / heads), squared, cubed ..."""
    return [[2.0 ** (-8 * (head + 1) / sizes["heads"]) for head in range(sizes["heads"])]]


def error(
    error: float, largest: float, unit: float, slopes: Any, q_len: int, kv_len: int, **more: Any
) -> tuple[float, float]:
    """A product that is rounded, and a sum."""
    after = largest + float(slopes.abs().max()) * max(q_len, kv_len)
    return error + 2 * unit * after, after


def _lowered(score: Any, slopes: Any, position: Any, key: Any, **place: Any) -> Any:
    return score - slopes * abs(position - key)


SCORE = Score(
    "alibi",
    "score - `slopes` |position - key|",
    _lowered,
    error,
    arrays=(Array("slopes", STATE, ("batch", "heads"), slopes),),
    placed=True,
    additive=True,
    relative=True,
)

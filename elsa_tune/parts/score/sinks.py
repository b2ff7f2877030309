"""Sinks: each head has one more key, of a score of its own and of value 0, that takes a share of the weights (StreamingLLM, GPT-OSS).

The log-sum-exp includes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from elsa_tune.parts.operand import STATE, Array
from elsa_tune.parts.score._base import Score


def _spread(sizes: Mapping[str, int]) -> list[float]:
    """From -1 to 2."""
    return [3 * (head + 1) / sizes["heads"] - 1 for head in range(sizes["heads"])]


def _far(sizes: Mapping[str, int]) -> list[float]:
    """None at all, all that there is, and in between."""
    return [(float("-inf"), 90.0, -90.0, 4.0)[head % 4] for head in range(sizes["heads"])]


SCORE = Score(
    "sinks",
    "the score itself, beside a key of score `sinks` and value 0",
    lambda score, sinks: score,
    lambda error, largest, unit, **own: (error, largest),
    arrays=(Array("sinks", STATE, ("heads",), _spread, (_far,)),),
    term="sinks",
)

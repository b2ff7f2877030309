"""ALiBi counted from the lower right: the last query is where the last key is, as when a cache holds what came before the queries."""

from __future__ import annotations

from typing import Any

from elsa_tune.parts.operand import STATE, Array
from elsa_tune.parts.score import alibi
from elsa_tune.parts.score._base import Score


def _lowered(score: Any, lateslopes: Any, position: Any, key: Any, behind: Any, **place: Any) -> Any:
    return score - lateslopes * abs(position + behind - key)


def _error(
    error: float, largest: float, unit: float, lateslopes: Any, q_len: int, kv_len: int, **more: Any
) -> tuple[float, float]:
    return alibi.error(error, largest, unit, lateslopes, q_len, kv_len)


SCORE = Score(
    "alibi_lower_right",
    "score - `lateslopes` |position + kv_len - q_len - key|",
    _lowered,
    _error,
    arrays=(Array("lateslopes", STATE, ("batch", "heads"), alibi.slopes),),
    placed=True,
    additive=True,
    relative=True,
)

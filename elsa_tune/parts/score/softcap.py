"""A soft cap: scores approach plus and minus `softcap` and never pass them (Gemma 2)."""

from __future__ import annotations

from typing import Any

from elsa_tune.parts import tanh
from elsa_tune.parts.score._base import Score


def _capped(score: Any, softcap: Any) -> Any:
    return softcap * (score / softcap).tanh()


def _error(error: float, largest: float, unit: float, softcap: float, **more: Any) -> tuple[float, float]:
    """No slope is above 1; what is computed errs relatively, and is at most the cap."""
    after = min(largest, softcap)
    return min(error, 2 * softcap) + tanh.UNITS * unit * after, after


SCORE = Score(
    "softcap",
    "`softcap` tanh(score / `softcap`)",
    _capped,
    _error,
    reals=("softcap",),
    examples=({"softcap": 2.0}, {"softcap": 50.0}, {"softcap": 0.1}),
    constants={"limit": tanh.LIMIT, "over": tanh.NUMERATOR, "under": tanh.DENOMINATOR, "slope": tanh.SLOPE},
)

"""Operators: what scores and values become. One public file each, found by name."""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadProblem
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.operator._base import Operator

__all__ = ["SOFTMAX", "Operator", "get", "names"]

SOFTMAX = "softmax"
"""The one that a problem does not spell."""


@cache
def names() -> tuple[str, ...]:
    """Every operator's name: the files of this folder."""
    return files_of(__path__)


@cache
def get(name: str) -> Operator:
    """The operator called ``name``. Raises BadProblem."""
    if name not in names():
        raise BadProblem(f"operator {name[:60]!r} is unknown; use one of {', '.join(names())}")
    operator: Operator = found(__name__, name, "OPERATOR")
    return operator

"""Schedules: who folds, and who merges the states of splits. One public file each, found by name."""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadVariant
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.schedule._base import Schedule

__all__ = ["FOLD", "Schedule", "get", "names"]

FOLD = "fold"
"""That of a language which leaves no choice to whoever has one split."""


@cache
def names() -> tuple[str, ...]:
    """Every schedule's name: the files of this folder."""
    return files_of(__path__)


@cache
def get(name: str) -> Schedule:
    """The schedule called ``name``. Raises BadVariant."""
    if name not in names():
        raise BadVariant(f"schedule {name[:60]!r} is unknown; use one of {', '.join(names())}")
    schedule: Schedule = found(__name__, name, "SCHEDULE")
    return schedule

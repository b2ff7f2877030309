"""States: what is carried of the keys that a query row has seen. One public file each, found by name."""

from __future__ import annotations

from functools import cache

from elsa_tune.errors import BadVariant
from elsa_tune.parts._registry import files_of, found
from elsa_tune.parts.state._base import Cells, State

__all__ = ["Cells", "State", "get", "names"]


@cache
def names() -> tuple[str, ...]:
    """Every state's name: the files of this folder."""
    return files_of(__path__)


@cache
def get(name: str) -> State:
    """The state called ``name``. Raises BadVariant."""
    if name not in names():
        raise BadVariant(f"state {name[:60]!r} is unknown; use one of {', '.join(names())}")
    state: State = found(__name__, name, "STATE")
    return state

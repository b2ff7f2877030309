"""Ranges: each position says which keys it sees, as where sequences of unequal lengths follow one another without padding.

Both ends grow along q_len, or stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elsa_tune.parts.bound import Bound
from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.operand import Array

Sizes = Mapping[str, int]
RAGGED = [35 + 31 * (7 * i % 16) for i in range(16)]
"""Tokens of sequences, from 35 to 500; no tile divides them."""


def _of_sequences(sizes: Sizes, tokens: Sequence[int]) -> tuple[Any, Any]:
    """Sequences of so many tokens, scaled to q_len and kv_len, each of which sees itself: first keys and ends, [1, q_len]."""
    import numpy as np

    ends = np.cumsum([0, *tokens])
    queries, keys = (ends * sizes[axis] // ends[-1] for axis in ("q_len", "kv_len"))
    each = np.diff(queries)
    return np.repeat(keys[:-1], each)[None], np.repeat(keys[1:], each)[None]


def _any(seed: int) -> Callable[[Sizes], Any]:
    """Whatever grows, in each batch entry anew: beyond all keys and before them, and so that some positions see none."""

    def drawn(sizes: Sizes) -> Any:
        import numpy as np

        shape = sizes["batch"], sizes["q_len"]
        return np.sort(np.random.default_rng(seed).integers(-9, sizes["kv_len"] + 9, shape), -1)

    return drawn


def _limit(name: str, which: int, shared: int) -> Array:
    return Array(
        name,
        "int64",
        ("batch", "q_len"),
        lambda sizes: _of_sequences(sizes, RAGGED)[which],
        (lambda sizes: _of_sequences(sizes, [1, 2, 3])[which], _any(which), lambda sizes: [[shared]]),
    )


MASK = Mask(
    "ranges",
    "the keys from `first_key` on that lie before `end_key`",
    low=Bound("first_key"),
    high=Bound("end_key"),
    arrays=(_limit("first_key", 0, 3), _limit("end_key", 1, 50)),
    picture="x..... .xx... .xx... ...xxx ...xxx ...xxx",
)

"""Philox4x32: random words of a counter and a key, the same wherever and in whatever order they are asked for (Salmon et al. 2011).

Seven rounds pass every test of TestU01's BigCrush; each is two products of 32 bits.
"""

from __future__ import annotations

from typing import Any

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
ADDED = (0x9E3779B9, 0xBB67AE85)
"""To the key, from round to round."""

WORD = 0xFFFFFFFF


def words(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any], rounds: int = ROUNDS) -> tuple[Any, Any, Any, Any]:
    """Four words, from 0 to 2^32 - 1, of a counter of four and a key of two: whole numbers, or int64 tensors that broadcast."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(rounds):
        one, other = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # int64 wraps; what is above is shifted in and masked
        a, b, c, d = (other >> 32) & WORD ^ b ^ k, other & WORD, (one >> 32) & WORD ^ d ^ m, one & WORD
        k, m = k + ADDED[0] & WORD, m + ADDED[1] & WORD
    return a, b, c, d

"""Dropout: of each row's weights some, chosen by a seed, are left out of the sum of values, and the others grow instead."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from elsa_tune.parts import philox
from elsa_tune.parts.operand import Array
from elsa_tune.parts.score._base import Factor, Score

if TYPE_CHECKING:
    from torch import Tensor

MOST = 2**32 - 2**8
"""The largest float32 that is a word."""

BELOW = 1 - 2.0**-25
"""What rounds to 1 leaves nothing to divide by."""


def _rounded(dropout: float) -> float:
    """To float32, as GPUs have it: all devices leave out the same weights."""
    (found,) = struct.unpack("f", struct.pack("f", dropout))
    return float(found)


def _factor(
    dropout: float, seed: Any, stream: Any, batch: Any, head: Any, position: Any, key: Any, **place: Any
) -> Tensor:
    """Keys in fours: each is a word of what the counter (key // 4, position, head, batch) gives with the key (seed, stream)."""
    import torch

    own = seed.long() & philox.WORD, stream.long() & philox.WORD
    along = key.numel() == key.shape[-1]  # the last axis: they follow one another from a multiple of 4 on
    words = philox.words(((key[..., ::4] if along else key) // 4, position, head, batch), own)
    if along:
        drawn = torch.stack([x.expand(words[0].shape) for x in words], -1).flatten(-2)[..., : key.shape[-1]]
    else:
        drawn = words[3]
        for n in (2, 1, 0):
            drawn = words[n].where(key % 4 == n, drawn)
    p = _rounded(dropout)
    factor: Tensor = (drawn >= min(int(p * 2**32), MOST)).double() / (1 - p)
    return factor


def _seed(sizes: Mapping[str, int]) -> list[int]:
    return [1234]


def _seeds(sizes: Mapping[str, int]) -> list[int]:
    return [-1 - b for b in range(sizes["batch"])]


SCORE = Score(
    "dropout",
    "the score itself, whose weight is left out with probability `dropout`",
    lambda score, **own: score,
    lambda error, largest, unit, **own: (error, largest),
    reals=("dropout",),
    below=BELOW,
    arrays=(Array("seed", "int32", ("batch",), _seed, (_seeds,)), Array("stream", "int32", ("batch",), _seed)),
    examples=({"dropout": 0.1}, {"dropout": 0.5}),
    factor=Factor(_factor, lambda dropout: 1 / (1 - dropout)),
    constants={"rounds": philox.ROUNDS, "multipliers": philox.MULTIPLIERS, "added": philox.ADDED},
    placed=True,
)

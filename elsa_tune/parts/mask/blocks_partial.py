"""A layout of blocks of which some are seen in part, by bits for their pairs: FlexAttention's, once asked (Dong et al. 2024).

`partial` is 0 where nobody sees a block, 1 where everybody does, and from 2 on says which of the blocks of `bits` holds its pairs: a
word for 32 keys of a position. A row of a block begins with a word, its first key is the lowest bit, and rows follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.mask.blocks import AXES, LARGEST_BLOCK, a_quarter, drawn
from elsa_tune.parts.operand import Array

NOBODY, EVERYBODY, FIRST = 0, 1, 2
"""What a layout holds of a block: nobody sees it, every position of it does, or from FIRST on, which of the blocks of bits it is."""

WORD = 32
"""Bits of a word: a row of a block begins with a word, its first key is the lowest bit."""

KINDS = 3
"""Blocks of bits that typical layouts have."""


def _typical(sizes: Mapping[str, int]) -> Any:
    """A quarter of each head's blocks, of which one in four is seen in part."""
    x = drawn(PARTIAL, sizes, 0)
    return a_quarter(x) + (x < 0.0625) * (FIRST - EVERYBODY + (x * 1e4).long() % KINDS)


def _every_kind(sizes: Mapping[str, int]) -> Any:
    """Nothing shared."""
    import torch

    return torch.randint(
        FIRST + KINDS, [n or 1 for n in PARTIAL.lengths(sizes)], generator=torch.Generator().manual_seed(1)
    )


def _all(sizes: Mapping[str, int]) -> Any:
    return [[[[EVERYBODY]]]]


def _bits(sizes: Mapping[str, int]) -> Any:
    import torch

    words = KINDS * sizes["partialq"] * -(-sizes["partialk"] // WORD)
    return torch.randint(-(1 << 31), 1 << 31, (words,), generator=torch.Generator().manual_seed(2))


def _seen(partialq: int, partialk: int, partial: Any, bits: Any, position: Any, key: Any, **place: Any) -> Any:
    row = (partial - FIRST).clip(min=0) * partialq + position % partialq
    within = key % partialk
    word = bits[row * -(-partialk // WORD) + within // WORD]
    return (partial == EVERYBODY) | (partial >= FIRST) & ((word >> within % WORD & 1) == 1)


PARTIAL = Array("partial", "int32", AXES, _typical, (_every_kind, _all), {"q_len": "partialq", "kv_len": "partialk"})

MASK = Mask(
    "blocks_partial",
    "blocks of `partialq` positions and `partialk` keys of which `partial` says so, or some of their pairs, as `bits`",
    integers=("partialq", "partialk"),
    arrays=(PARTIAL, Array("bits", "int32", ("words",), _bits)),
    examples=(
        {"partialq": 16, "partialk": 16},
        {"partialq": 5, "partialk": 37},
        {"partialq": 128, "partialk": 64},
        {"partialq": 1, "partialk": 1},
        {"partialq": 8, "partialk": 128},
    ),
    allowed={"partialq": (1, LARGEST_BLOCK), "partialk": (1, LARGEST_BLOCK)},
    test=_seen,
    placed=True,
)

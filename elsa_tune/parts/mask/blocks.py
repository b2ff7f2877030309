"""A layout of blocks of positions and keys, each seen wholly or not at all, as sparse attention patterns are (S2-Attention 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.operand import Array

AXES = ("batch", "heads", "q_len", "kv_len")
LARGEST_BLOCK = 1 << 20


def drawn(array: Array, sizes: Mapping[str, int], seed: int) -> Any:
    """Numbers from 0 to 1, one for each block, alike for all sequences."""
    import torch

    _, *lengths = array.lengths(sizes)
    return torch.rand([1, *(n or 1 for n in lengths)], generator=torch.Generator().manual_seed(seed))


def a_quarter(x: Any) -> Any:
    """Of numbers from 0 to 1 for each block, those below a quarter, and the first of each row: what everybody sees, as a sink is."""
    few = x < 0.25
    few[..., 0] = True
    return few


def _typical(sizes: Mapping[str, int]) -> Any:
    """A quarter of each head's blocks, whichever."""
    return a_quarter(drawn(BLOCKS, sizes, 0))


def _holes(sizes: Mapping[str, int]) -> Any:
    """Rows of blocks that see nothing and that see everything, and nothing shared."""
    import torch

    lengths = [n or 1 for n in BLOCKS.lengths(sizes)]
    seen = torch.rand(lengths, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[:, :, ::3] = False
    seen[:, :, 1::3, ::2] = True
    return seen


def _all(sizes: Mapping[str, int]) -> Any:
    return [[[[True]]]]


BLOCKS = Array("blocks", "bool", AXES, _typical, (_holes, _all), {"q_len": "blockq", "kv_len": "blockk"})

MASK = Mask(
    "blocks",
    "blocks of `blockq` positions and `blockk` keys of which `blocks` says so",
    integers=("blockq", "blockk"),
    arrays=(BLOCKS,),
    examples=(
        {"blockq": 16, "blockk": 16},
        {"blockq": 5, "blockk": 7},
        {"blockq": 128, "blockk": 64},
        {"blockq": 1, "blockk": 1},
        {"blockq": 8, "blockk": 128},
    ),
    allowed={"blockq": (1, LARGEST_BLOCK), "blockk": (1, LARGEST_BLOCK)},
    test=lambda blockq, blockk, blocks: blocks,
)

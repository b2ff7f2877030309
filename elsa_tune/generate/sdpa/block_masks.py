"""FlexAttention's block masks of masks in closed form, from their bounds.

create_block_mask would evaluate every pair, 16 GiB of them at 128K.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from elsa_tune.parts import mask as masks
from elsa_tune.problem import Problem

BLOCK = 128
"""Rows and columns of a block."""


@lru_cache(maxsize=64)
def block_mask(mask: str, q_len: int, kv_len: int, operands: tuple[int, ...], device: torch.device) -> Any:
    """The BlockMask: blocks that every row of theirs sees, and those that need its function."""
    from torch.nn.attention.flex_attention import BlockMask

    posed = Problem(head_dim=1, mask=mask, q_len=q_len, kv_len=kv_len, integers=operands)
    rows, columns = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    first = row * BLOCK
    (low, common_high), (common_low, high) = (_seen(posed, x) for x in (first, (first + BLOCK).clip(max=q_len) - 1))
    begin = low // BLOCK
    end = torch.where(low < high, -(-high // BLOCK), begin)
    full_begin, full_end = -(-common_low // BLOCK), common_high // BLOCK
    is_whole = row < q_len // BLOCK  # what lies beyond the end counts as masked
    full = torch.where(is_whole, (full_end - full_begin).clip(min=0), 0)
    before = torch.where(full > 0, full_begin - begin, (end - begin).clip(min=0))  # partial ones, and then those behind
    behind = torch.where(full > 0, end - full_end, 0)
    column = torch.arange(columns, dtype=torch.int32, device=device)
    partial = torch.where(column < before[:, None], begin[:, None] + column, (full_end - before)[:, None] + column)
    return BlockMask.from_kv_blocks(
        (before + behind)[None, None].contiguous(),
        (partial % columns)[None, None].contiguous(),
        full[None, None].contiguous(),
        ((full_begin[:, None] + column) % columns)[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_function(posed),
        seq_lengths=(q_len, kv_len),
    )


def _seen(posed: Problem, position: Tensor) -> tuple[Tensor, Tensor]:
    low, high = posed.seen(position)
    return torch.zeros_like(position) + low, torch.zeros_like(position) + high


def _function(posed: Problem) -> Any:
    """What FlexAttention asks of a pair: no more than the bounds that cut."""
    mask, names = masks.get(posed.mask), posed.names

    def sees(batch: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
        seen: Tensor | None = key >= mask.low.value(position=position, **names) if mask.cuts_front else None
        if not mask.cuts_back:
            assert seen is not None
            return seen
        below = key < mask.high.value(position=position, **names)
        both: Tensor = below if seen is None else seen & below
        return both

    return sees

"""torch's BlockMask as a layout of blocks, with bits for those that are seen in part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elsa_tune.parts.mask.blocks_partial import EVERYBODY, FIRST, NOBODY, WORD

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PAIRS = 1 << 22
"""Of which mask_mod is asked at a time, unless a single block has more."""


def operands_of(block_mask: BlockMask) -> tuple[str, dict[str, Any]]:
    """The mask that it is, ``blocks``, or ``blocks_partial`` where some block is seen in part, and its operands."""
    size_q, size_k = block_mask.BLOCK_SIZE
    listed = _listed(block_mask, block_mask.kv_num_blocks, block_mask.kv_indices)
    layout = torch.full_like(listed, NOBODY, dtype=torch.int32)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        layout[_listed(block_mask, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)] = EVERYBODY
    words = []
    at_once = max(1, PAIRS // (size_q * size_k))
    for at in torch.split(listed.nonzero(), at_once) if listed.any() else ():
        seen = _seen(block_mask, at)
        kind = torch.where(seen.all(-1).all(-1), EVERYBODY, FIRST).where(seen.any(-1).any(-1), NOBODY)
        layout[tuple(at.T)] = kind.int()
        words.append(_words(seen[kind == FIRST]))
    if not (layout == FIRST).any():
        return "blocks", {"blockq": size_q, "blockk": size_k, "blocks": layout == EVERYBODY}
    bits, which = torch.unique(torch.cat(words), dim=0, return_inverse=True)
    layout[layout == FIRST] = FIRST + which.int()
    return "blocks_partial", {"partialq": size_q, "partialk": size_k, "partial": layout, "bits": bits.flatten()}


def _listed(block_mask: BlockMask, counts: Tensor, indices: Tensor) -> Tensor:
    """bool [batch or 1, heads or 1, rows, columns] of blocks: the first ``counts`` [...] of ``indices`` [..., n], within its lengths."""
    (size_q, size_k), (q_len, kv_len) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    rows, columns = -(-q_len // size_q), -(-kv_len // size_k)
    meant = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    found = torch.zeros((*counts.shape, columns + 1), dtype=torch.bool, device=indices.device)
    found.scatter_(-1, torch.where(meant, indices, columns).clip(max=columns).long(), True)
    return found[..., :rows, :columns]


def _seen(block_mask: BlockMask, at: Tensor) -> Tensor:
    """bool [n, size_q, size_k]: the pairs of blocks at [n, 4] that mask_mod lets through; what lies beyond the lengths repeats the last."""
    from torch.nn.attention.flex_attention import create_mask

    (size_q, size_k), (q_len, kv_len) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    batch, head, row, column = at.T

    def of_block(i: Tensor, _: Tensor, position: Tensor, key: Tensor) -> Tensor:
        there = (row[i] * size_q + position).clip(max=q_len - 1), (column[i] * size_k + key).clip(max=kv_len - 1)
        return block_mask.mask_mod(batch[i], head[i], *there)

    return create_mask(of_block, len(at), 1, size_q, size_k, device=str(at.device))[:, 0]


def _words(seen: Tensor) -> Tensor:
    """int32 [n, size_q * words of a row]: a bit for each pair, a row's first the lowest."""
    padded = torch.unflatten(torch.nn.functional.pad(seen, (0, -seen.shape[-1] % WORD)), -1, (-1, WORD))
    each = padded.int() << torch.arange(WORD, dtype=torch.int32, device=seen.device)
    return each.sum(-1, dtype=torch.int32).flatten(1)

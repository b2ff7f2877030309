"""What torch's kernels are given of masks and scores: dense masks, and FlexAttention's block masks made from bounds.

create_block_mask would evaluate every pair, 16 GiB of them at 128K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate.operands import of_sequences
from elsa_tune.generate.posed import Posed
from elsa_tune.parts import mask as masks

BLOCK = 128
"""Rows and columns of a block."""


def block_mask(posed: Posed) -> Any:
    """The BlockMask: blocks that every row of theirs sees, and those that need its function; of each sequence, where bounds are of
    it."""
    from torch.nn.attention.flex_attention import BlockMask

    problem, device = posed.problem, posed.device
    if masks.get(problem.mask).tested:
        return _asked(posed)
    q_len, kv_len = problem.q_len, problem.kv_len
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
    partial = torch.where(
        column < before[..., None], begin[..., None] + column, (full_end - before)[..., None] + column
    )
    return BlockMask.from_kv_blocks(
        (before + behind)[:, None].contiguous(),
        (partial % columns)[:, None].contiguous(),
        full[:, None].contiguous(),
        ((full_begin[..., None] + column) % columns)[:, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_function(posed),
        seq_lengths=(q_len, kv_len),
    )


def _asked(posed: Posed) -> Any:
    """The BlockMask of a mask that tests pairs: every one of them is asked, a row of blocks at a time."""
    from torch.nn.attention.flex_attention import BlockMask

    function, (q_len, kv_len) = _function(posed), (posed.problem.q_len, posed.problem.kv_len)
    batch, head, position, key = (
        torch.arange(n, device=posed.device)[(...,) + (None,) * later]
        for n, later in ((posed.problem.batch, 3), (posed.problem.heads, 2), (q_len, 1), (kv_len, 0))
    )
    some_of_rows, all_of_rows = [], []
    for positions in position.split(BLOCK):
        seen = function(batch, head, positions, key)
        seen = seen[(None,) * (4 - seen.dim())].expand(-1, -1, len(positions), kv_len)
        beyond = (0, -kv_len % BLOCK, 0, BLOCK - len(positions))  # counts as masked
        each = torch.nn.functional.pad(seen, beyond).unflatten(-1, (-1, BLOCK))
        some_of_rows.append(each.any(-1).any(-2))
        all_of_rows.append(each.all(-1).all(-2))
    some, every = torch.stack(some_of_rows, -2), torch.stack(all_of_rows, -2)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=function, seq_lengths=(q_len, kv_len)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are true, and which: those first."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def _seen(posed: Posed, position: Tensor) -> tuple[Tensor, Tensor]:
    """int32 bounds [batch or 1, positions]."""
    sequences = of_sequences(posed.problem, posed.own, dims=1)
    each = max((len(x) for x in sequences.values()), default=1)
    low, high = (torch.zeros_like(position) + x for x in posed.problem.seen(position, **sequences))
    return low.expand(each, -1).int(), high.expand(each, -1).int()


def _function(posed: Posed) -> Any:
    """What FlexAttention asks of a pair: no more than the bounds that cut, and the tests."""
    mask, names, own = masks.get(posed.problem.mask), posed.problem.names, posed.own
    sequences = {name: own[name].expand(posed.problem.batch) for name in mask.sequences}

    def sees(batch: Tensor, head: Tensor, position: Tensor, key: Tensor) -> Tensor:
        of_batch = {name: x[batch] for name, x in sequences.items()}
        seen: list[Any] = []
        if mask.cuts_front:
            seen.append(key >= mask.low.value(position=position, **names, **of_batch))
        if mask.cuts_back:
            seen.append(key < mask.high.value(position=position, **names, **of_batch))
        if mask.tested:
            place = {
                "batch": batch,
                "head": head,
                "kv_head": head // posed.problem.group,
                "position": position,
                "key": key,
            }
            seen.append(mask.passes(own, **place))
        both: Tensor = seen[0]
        for more in seen[1:]:
            both = both & more
        return both

    return sees

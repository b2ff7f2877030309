"""What torch's kernels are given of masks and scores: dense masks, and FlexAttention's block masks made from bounds.

create_block_mask would evaluate every pair, 16 GiB of them at 128K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from elsa_tune.generate.operands import named, of_sequences
from elsa_tune.generate.tensors import kernel_arguments
from elsa_tune.parts import mask as masks
from elsa_tune.parts.operand import Operands
from elsa_tune.problem import Problem

BLOCK = 128
"""Rows and columns of a block."""

T = TypeVar("T")


@dataclass(frozen=True)
class Posed:
    """A family with the lengths and operands of a call (``own``, by name), on a device."""

    problem: Problem
    own: dict[str, Any]
    device: torch.device

    def dense(self) -> Tensor:
        """bool [q_len, kv_len] or [batch or 1, heads or 1, q_len, kv_len]: which pairs are seen."""
        sequences = of_sequences(self.problem, self.own, dims=3)
        seen = self.problem.dense(**{name: x.cpu() for name, x in sequences.items()}).to(self.device)
        mask = masks.get(self.problem.mask)
        if not mask.tested:
            return seen
        sizes = [getattr(self.problem, name) for name in ("batch", "heads", "q_len", "kv_len")]
        index = [torch.arange(n, device=self.device).view([-1, *[1] * (3 - axis)]) for axis, n in enumerate(sizes)]
        passed: Tensor = mask.passes(self.own, **dict(zip(("batch", "head", "position", "key"), index, strict=True)))
        return seen & passed


class Derived(Generic[T]):
    """What is made of a family, lengths and operands, once for each: a race is about kernels, and mask and score are given."""

    def __init__(self, make: Callable[[Posed], T], most: int) -> None:
        self._make, self._most = make, most
        self._made: dict[tuple[object, ...], tuple[Operands, T]] = {}

    def of(self, family: Problem, operands: Operands, query: Tensor, key: Tensor) -> T:
        """As made before for these very numbers and tensors, which nobody has written to since, or made now. Raises WrongArguments
        where they do not fit."""
        known = tuple(x if isinstance(x, int | float) else (id(x), getattr(x, "_version", 0)) for x in operands)
        entry = (family.mask, family.score, query.shape[:3], key.shape[2], query.device, known)
        if entry not in self._made:
            if len(self._made) >= self._most:
                self._made.clear()
            kernel_arguments(family, operands, query, key)
            batch, heads, q_len, _ = query.shape
            posed = family.reshaped(batch=batch, heads=heads, kv_heads=key.shape[1], q_len=q_len, kv_len=key.shape[2])
            own = named(posed, operands)
            posed = posed.reshaped(integers=tuple(own[name] for name in masks.get(family.mask).integers))
            self._made[entry] = (
                operands,
                self._make(Posed(posed, own, query.device)),
            )  # operands are held: ids stay theirs
        return self._made[entry][1]


def block_mask(posed: Posed) -> Any:
    """The BlockMask: blocks that every row of theirs sees, and those that need its function; of each sequence, where bounds are of
    it."""
    from torch.nn.attention.flex_attention import BlockMask

    problem, device = posed.problem, posed.device
    q_len, kv_len, tested = problem.q_len, problem.kv_len, bool(masks.get(problem.mask).tested)
    rows, columns = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    first = row * BLOCK
    (low, common_high), (common_low, high) = (_seen(posed, x) for x in (first, (first + BLOCK).clip(max=q_len) - 1))
    begin = low // BLOCK
    end = torch.where(low < high, -(-high // BLOCK), begin)
    full_begin, full_end = -(-common_low // BLOCK), common_high // BLOCK
    is_whole = (row < q_len // BLOCK) & (not tested)  # what lies beyond the end counts as masked
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
            seen.append(mask.passes(own, batch=batch, head=head, position=position, key=key))
        both: Tensor = seen[0]
        for more in seen[1:]:
            both = both & more
        return both

    return sees

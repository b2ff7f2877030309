"""Ragged batches: sequences of unequal lengths, posed as one problem whose mask says where each begins, or answered one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elsa_tune.dispatch import serving
from elsa_tune.dispatch.autograd import differentiable
from elsa_tune.errors import WrongArguments
from elsa_tune.masks import NONE, AttnMask
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.operand import Array, Operands

Attention = Callable[..., Tensor]
"""attention()."""
Served = Callable[..., Tensor | None]
"""What a ready kernel answers, or None."""
IsDifferentiable = Callable[..., bool]
"""Whether a call of plain tensors needs gradients that are ours to give."""


@dataclass(frozen=True)
class Ragged:
    """query [tokens, heads, head_dim], key [tokens_k, kv_heads, head_dim], value [tokens_k, kv_heads, value_dim] of sequences whose
    tokens are those from ``cu_q[i]`` (``cu_k[i]`` of key and value) to before the next; int64 [sequences + 1], on the tensors' device."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_q: Tensor
    cu_k: Tensor

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.cu_q) - 1

    def attend(
        self, wanted: AttnMask, scale: float | None, enable_gqa: bool, served: Served, learns: IsDifferentiable,
        attention: Attention,
    ) -> Tensor:  # fmt: skip
        """[tokens, heads, value_dim]: for all sequences at once by ``served``, or where the call ``learns`` by kernels of both passes; or
        else by ``attention`` for each."""
        if (one := scores.get(wanted.score).weighing) is not None:
            raise WrongArguments(
                f"attn_mask has {one.name}, which would be the same in every sequence of a ragged batch; pad the sequences"
            )
        if self.says_it_together(wanted):
            tensors = _batch_of_one(self.query), _batch_of_one(self.key), _batch_of_one(self.value)
            together = _Together(self, wanted)
            output = served(*tensors, together, scale, enable_gqa)
            if (
                output is None
                and learns(*tensors, together, scale, enable_gqa)
                and _has_both(*tensors, together, enable_gqa)
            ):
                output, _ = differentiable(*tensors, self.together(wanted), scale, enable_gqa)
            if output is not None:
                return output[0].transpose(0, 1)
        return self.one_by_one(wanted, scale, enable_gqa, attention)

    def says_it_together(self, wanted: AttnMask) -> bool:
        """Whether ranges of keys say which are seen, and scores are the same wherever a sequence begins."""
        mask, chain = masks.get(wanted.mask), scores.get(wanted.score)
        if mask.tested or mask.by_position:
            return False
        shapes = [(one.axes, wanted.operands[one.name].shape) for one in chain.arrays]
        alike = all(n == 1 or axis == "heads" for axes, shape in shapes for axis, n in zip(axes, shape, strict=True))
        return alike and (not chain.placed or (chain.relative and torch.equal(self.cu_q, self.cu_k)))

    def together(self, wanted: AttnMask) -> AttnMask:
        """What ``wanted`` says within each sequence, said of all tokens as one sequence."""
        mask, chain = masks.get(wanted.mask), scores.get(wanted.score)
        token = torch.arange(len(self.query), device=self.cu_q.device)
        sequence = torch.bucketize(token, self.cu_q[1:-1], right=True)
        each = self.cu_q, self.cu_k, self.cu_q.diff(), self.cu_k.diff()
        first_query, first_key, q_len, kv_len = (x.index_select(0, sequence) for x in each)
        own = {name: wanted.operands[name] for name in mask.integers}
        limits = {one.name: one.at(self._of_sequences(one, wanted), {"batch": sequence}) for one in mask.limits}
        low, high = mask.seen(token - first_query, q_len, kv_len, **own, **limits)
        kept = {one.name: wanted.operands[one.name] for one in chain.operands}
        return AttnMask("ranges", wanted.score, {"first_key": first_key + low, "end_key": first_key + high, **kept})

    def _of_sequences(self, limit: Array, wanted: AttnMask) -> Tensor:
        """A limit, one for each sequence or for all. Raises WrongArguments, for what lies beyond keys on a CPU alone, where asking costs
        nothing."""
        value: Tensor = wanted.operands[limit.name]
        self._check(limit, value, {"batch": self.sequences})
        if value.is_cpu and self.cu_k.is_cpu and bool(((value < 0) | (value > self.cu_k.diff())).any()):
            raise WrongArguments(f"{limit.name} {value.tolist()[:8]} must lie within 0 and the keys of each sequence")
        return value.to(self.cu_q.device)

    def one_by_one(self, wanted: AttnMask, scale: float | None, enable_gqa: bool, attention: Attention) -> Tensor:
        """[tokens, heads, value_dim] by a call for each sequence; differentiable. Raises WrongArguments for arrays that fit no sequence."""
        queries = _lengths(checked("cu_q", self.cu_q.tolist(), len(self.query)))
        keys = _lengths(checked("cu_k", self.cu_k.tolist(), len(self.key)))
        longest = {"q_len": max(queries, default=0), "kv_len": max(keys, default=0)}
        arrays = [
            one
            for one in (*masks.get(wanted.mask).arrays, *scores.get(wanted.score).arrays)
            if isinstance(wanted.operands[one.name], Tensor)  # another is made for each sequence's lengths
        ]
        numbers = {name: n for name, n in wanted.operands.items() if isinstance(n, int)}
        sizes = {"batch": self.sequences, "heads": self.query.shape[1], "kv_heads": self.key.shape[1], **numbers}
        for one in arrays:
            self._check(one, wanted.operands[one.name], {**sizes, **longest})
        made = []
        split = torch.split(self.query, queries), torch.split(self.key, keys), torch.split(self.value, keys)
        for i, (query, key, value) in enumerate(zip(*split, strict=True)):
            if not len(key):
                made.append(_zeros(query, value))
            elif len(query):
                here = {**sizes, "q_len": len(query), "kv_len": len(key)}
                own = {one.name: _slice(one, wanted.operands[one.name], i, one.lengths(here)) for one in arrays}
                mask = AttnMask(wanted.mask, wanted.score, {**wanted.operands, **own}) if wanted is not NONE else None
                tensors = map(_batch_of_one, (query, key, value))
                output = attention(*tensors, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
                made.append(output[0].transpose(0, 1))
        return torch.cat(made or [_zeros(self.query[:0], self.value)])

    def _check(self, array: Array, value: Tensor, sizes: dict[str, int]) -> None:
        wanted = array.lengths(sizes)
        if any(n not in (1, m) and m is not None for n, m in zip(value.shape, wanted, strict=True)):
            axes = ", ".join(
                {"batch": "sequences", "q_len": "longest query", "kv_len": "longest key"}.get(x, x) for x in array.axes
            )
            raise WrongArguments(f"{array.name} {list(value.shape)} must broadcast to [{axes}] = {wanted}")


class _Together(AttnMask):
    """A ragged batch's mask over all tokens, whose ranges are computed when a kernel that takes them is ready."""

    __slots__ = ("_batch", "_wanted")

    def __init__(self, batch: Ragged, wanted: AttnMask) -> None:
        kept = scores.get(wanted.score).operands
        super().__init__(score=wanted.score, operands={one.name: wanted.operands[one.name] for one in kept})
        self.mask, self._batch, self._wanted = "ranges", batch, wanted

    def in_order(self, query: Tensor, key: Tensor) -> Operands:
        return self._batch.together(self._wanted).in_order(query, key)


def _zeros(query: Tensor, value: Tensor) -> Tensor:
    """What queries without keys receive, [tokens, heads, value_dim], of a graph that they are in."""
    return query[..., :0].sum(-1, keepdim=True).expand(*query.shape[:2], value.shape[2])


def _has_both(query: Tensor, key: Tensor, value: Tensor, together: AttnMask, enable_gqa: bool) -> bool:
    """Whether kernels of both passes are ready: of all tokens as one sequence others would compute every pair."""
    if serving.find(query, key, value, together, enable_gqa).call is None:
        return False
    return serving.backward_for(query, key, value, together, enable_gqa).gradients is not None


def _batch_of_one(x: Tensor) -> Tensor:
    """[1, heads, tokens, dim] of [tokens, heads, dim]."""
    return x.transpose(0, 1).unsqueeze(0)


def _slice(array: Array, value: Tensor, sequence: int, lengths: list[int | None]) -> Tensor:
    """What an array holds of one sequence, of its axes."""
    axes = zip(array.axes, value.shape, lengths, strict=True)
    return value[
        tuple(
            slice(None) if n == 1 else slice(sequence, sequence + 1) if axis == "batch" else slice(length)
            for axis, n, length in axes
        )
    ]


def _lengths(cu: list[int]) -> list[int]:
    return [end - first for first, end in pairwise(cu)]


def checked(name: str, cu: list[int], tokens: int) -> list[int]:
    """Offsets of sequences that ``tokens`` tokens hold. Raises WrongArguments."""
    if cu[0] != 0:
        raise WrongArguments(f"{name} starts at {cu[0]}; the first sequence starts at token 0")
    if cu != sorted(cu):
        fall = next(i for i, (x, y) in enumerate(pairwise(cu)) if y < x)
        raise WrongArguments(
            f"{name} falls from {cu[fall]} to {cu[fall + 1]}; a sequence ends no earlier than it starts"
        )
    if cu[-1] != tokens:
        raise WrongArguments(f"{name} ends at {cu[-1]}; the last sequence ends with the last of {tokens} tokens")
    return cu


def opened(query: Any, key: Any, value: Any) -> Ragged | None:
    """The ragged batch that torch has as nested tensors [batch, heads, ragged, dim] of layout jagged; None for others."""
    for x in (query, key, value):
        is_ragged = x.dim() == 4 and x.layout is torch.jagged and isinstance(x.shape[2], torch.SymInt)
        if not is_ragged or x.lengths() is not None:
            return None
    if key.shape[2] != value.shape[2] or not query.shape[0] == key.shape[0] == value.shape[0]:
        return None
    tokens = [x.values().transpose(0, 1) for x in (query, key, value)]
    return Ragged(tokens[0], tokens[1], tokens[2], query.offsets().long(), key.offsets().long())


def closed(output: Tensor, query: Any) -> Tensor:
    """[tokens, heads, value_dim] as nested as a query [batch, heads, ragged, head_dim] is."""
    nested: Any = torch.nested.nested_tensor_from_jagged
    shortest, longest = query._get_min_seqlen(), query._get_max_seqlen()  # as torch's own has them
    made: Tensor = nested(output, query.offsets(), min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
    return made

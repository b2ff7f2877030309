"""A problem as tensors pose it, and its attention as torch's plain operations state it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate.operands import limits_at, named, places
from elsa_tune.generate.tensors import kernel_arguments
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import NONE
from elsa_tune.parts.operand import PLACES, Operands
from elsa_tune.problem import Problem


@dataclass(frozen=True)
class Posed:
    """A family with the lengths and operands of a call (``own``, by name), on a device."""

    problem: Problem
    own: dict[str, Any]
    device: torch.device

    def factors(self, dtype: torch.dtype) -> Tensor | None:
        """[batch or 1, heads or 1, q_len, kv_len]: what weights are multiplied by; None where nothing is."""
        found = scores.get(self.problem.score).factor(self.own, **places(self.problem, self.device))
        return None if found is None else found.to(dtype)

    def dense(self) -> Tensor:
        """bool [q_len, kv_len] or [batch or 1, heads or 1, q_len, kv_len]: which pairs are seen."""
        everywhere = places(self.problem, self.device)
        limits = limits_at(self.problem, self.own, batch=everywhere["batch"], position=everywhere["position"])
        seen = self.problem.dense(device=self.device, **limits)
        mask = masks.get(self.problem.mask)
        if not mask.tested:
            return seen
        passed: Tensor = mask.passes(self.own, **{name: everywhere[name] for name in PLACES.values()})
        return seen & passed


def posed(family: Problem, operands: Operands, query: Tensor, key: Tensor) -> Posed:
    """A family as tensors pose it. Raises WrongArguments where operands do not fit."""
    batch, heads, q_len, _ = query.shape
    problem = family.reshaped(batch=batch, heads=heads, kv_heads=key.shape[1], q_len=q_len, kv_len=key.shape[2])
    kernel_arguments(family, operands, query, key)
    own = named(problem, operands)
    integers = tuple(own[name] for name in masks.get(family.mask).integers)
    return Posed(problem.reshaped(integers=integers), own, query.device)


def attn_mask(posed: Posed) -> Tensor:
    """What torch is given of a mask that is no flag and of scores that add: its own object where it takes one and means the same, or
    dense."""
    q_len, kv_len = posed.problem.q_len, posed.problem.kv_len
    chain = scores.get(posed.problem.score)
    if chain.additive:
        bias: Tensor = chain.of(torch.zeros((), device=posed.device), posed.own, **places(posed.problem, posed.device))
        return _four(bias if posed.problem.mask == NONE else bias.where(posed.dense(), float("-inf")))
    if (form := masks.get(posed.problem.mask).torchs) and q_len <= kv_len:
        from torch.nn.attention import bias as forms  # loads Triton, which many processes do without

        own: Tensor = getattr(forms, form)(q_len, kv_len)
        return own
    return _four(posed.dense())


def _four(mask: Tensor) -> Tensor:
    """With an axis for each of [batch, heads, q_len, kv_len]: torch's fused kernels refuse three."""
    return mask[(None,) * (4 - mask.dim())]


def eager(
    posed: Posed,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    hidden: Tensor | None,
    dropout_p: float = 0.0,
    factors: Tensor | None = None,
) -> Tensor:
    """What a program writes by hand: products, scores, mask (``hidden``: which pairs are not seen), softmax, products of weights times
    ``factors``, where there are any."""
    heads, (kv_heads, kv_len) = query.shape[1], key.shape[1:3]

    def of_group(x: Tensor, rows: Tensor) -> Tensor:
        """Products of [batch, heads, q_len, n] with the rows of each KV head, which its group shares."""
        grouped = x.reshape(x.shape[0], kv_heads, heads // kv_heads, *x.shape[2:])
        return (grouped @ rows.unsqueeze(2)).flatten(1, 2)

    logits = of_group(query, key.mT) * (query.shape[3] ** -0.5 if scale is None else scale)
    chain = scores.get(posed.problem.score)
    logits = chain.of(logits, posed.own, **places(posed.problem, query.device)).to(query.dtype)
    if hidden is not None:
        logits = logits.masked_fill_(hidden, float("-inf"))
    for term in chain.terms:
        sink = posed.own[term.name].to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights: Tensor = torch.dropout(torch.ops.aten._safe_softmax(logits, -1), dropout_p, train=True)
    weights = weights[..., :kv_len]
    return of_group(weights if factors is None else weights * factors.to(weights.dtype), value)

"""torch's fused CPU operator for attention: unlike torch's function it returns the log-sum-exp that gradients are computed from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elsa_tune.dispatch import fallback
from elsa_tune.generate.posed import attn_mask as torchs_mask
from elsa_tune.generate.posed import posed
from elsa_tune.masks import AttnMask
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem

OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


class Form(NamedTuple):
    """Masks and scores as the operator takes them: a flag, or what is added to scores [batch or 1, heads or 1, q_len, kv_len]."""

    is_causal: bool = False
    attn_mask: Tensor | None = None


def takes(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool) -> bool:
    """Whether the operator answers such a call, and rightly."""
    alike = query.dim() == key.dim() == value.dim() == 4 and query.shape[3] == key.shape[3] == value.shape[3]
    if not (hasattr(torch.ops.aten, OPERATOR) and query.is_cpu and alike) or 0 in (*query.shape, *key.shape):
        return False
    batch, rows = {x.shape[0] for x in (query, key, value)}, {x.stride(3) for x in (query, key, value)}
    if len(batch) > 1 or rows != {1} or (query.shape[1] != key.shape[1] and not enable_gqa):
        return False
    if elements.of_dtype(query.dtype) is None:
        return False
    if _is_causal(wanted):
        return scale is None or scale > 0  # where it errs
    additive = scores.get(wanted.score).additive
    return wanted.score == scores.NONE or (additive and not any(map(_lies_far, wanted.tensors)))


def _is_causal(wanted: AttnMask) -> bool:
    return wanted.score == scores.NONE and masks.get(wanted.mask).torchs == "is_causal"


def _lies_far(x: Tensor) -> bool:
    return x.is_floating_point() and bool(x.numel()) and fallback.lies_far(x)


def form(query: Tensor, key: Tensor, wanted: AttnMask) -> Form:
    """What the operator is given of a mask of ours, in a call that it takes."""
    if (wanted.mask, wanted.score) == (masks.NONE, scores.NONE):
        return Form()
    if _is_causal(wanted):
        return Form(True)
    element = elements.of_dtype(query.dtype)
    assert element is not None
    family = wanted.of(Problem(dtype=element.name, head_dim=query.shape[3]))
    there = posed(family, wanted.in_order(query, key), query, key)
    if wanted.score == scores.NONE:
        seen = there.dense()
        seen = seen[(None,) * (4 - seen.dim())]
        return Form(
            False, torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
        )
    return Form(False, torchs_mask(there).expand(-1, -1, query.shape[2], key.shape[2]))


def forward(query: Tensor, key: Tensor, value: Tensor, given: Form, scale: float | None) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp [batch, heads, q_len]: -inf of a row that sees no key."""
    output, lse = getattr(torch.ops.aten, OPERATOR)(
        query, key, value, 0.0, given.is_causal, attn_mask=given.attn_mask, scale=scale
    )
    if given.attn_mask is not None:  # where the operator says 0
        lse = lse.masked_fill((given.attn_mask == float("-inf")).all(-1), float("-inf"))
    return output, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, given: Form, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    sums = lse.masked_fill(lse == float("-inf"), 0.0)
    found: tuple[Tensor, Tensor, Tensor] = getattr(torch.ops.aten, f"{OPERATOR}_backward")(
        grad, query, key, value, output, sums, 0.0, given.is_causal, attn_mask=given.attn_mask, scale=scale
    )
    return found

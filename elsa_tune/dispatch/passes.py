"""The two passes of attention apart from each other, by whoever serves: forward with a log-sum-exp, and backward from it."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_tune.dispatch import fallback, serving, torchs
from elsa_tune.generate import incumbent
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.masks import NONE, AttnMask
from elsa_tune.problem import Problem


def forward(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [batch, heads, q_len, value_dim], in ``out`` where a kernel of ours serves, and the log-sum-exp [batch, heads, q_len],
    -inf of a row that sees no key; without gradients. Raises WrongArguments."""
    query, key, value = query.detach(), key.detach(), value.detach()
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    output = serving.by_kernel(query, key, value, wanted, scale, enable_gqa, out, lse)
    if output is not None:
        return output, lse
    with serving.left_to_torch(query, key, value, wanted, enable_gqa), incumbent.aside():
        if torchs.takes(query, key, value, wanted, scale, enable_gqa):
            return torchs.forward(query, key, value, torchs.form(query, key, wanted), scale)
        output = attend(query, key, value, wanted, scale, enable_gqa)
    query, key = query.expand(*output.shape[:2], -1, -1), key.expand(output.shape[0], -1, -1, -1)
    family = wanted.of(Problem(head_dim=max(1, query.shape[3])))
    return output, logsumexp(query, key, family, wanted.in_order(query, key), scale)


def attend(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> Tensor:
    """The output by torch."""
    return fallback.attend(query, key, value, None if wanted is NONE else wanted, 0.0, False, scale, enable_gqa)


def has_backward(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> bool:
    """Whether gradients can be computed from what a kernel of ours saves, without doing torch's forward pass again."""
    if serving.gradients_for(query, key, value, wanted, enable_gqa) is not None:
        return True
    return torchs.takes(query, key, value, wanted, scale, enable_gqa)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, wanted: AttnMask,
    scale: float | None, enable_gqa: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key and value: by a kernel of ours, by torch's from the same output and log-sum-exp, or again by torch."""
    gradients = serving.gradients_for(query, key, value, wanted, enable_gqa)
    if gradients is not None:
        return gradients(query, key, value, output, lse, grad, scale, wanted.in_order(query, key))
    if torchs.takes(query, key, value, wanted, scale, enable_gqa):
        return torchs.backward(grad, query, key, value, output, lse, torchs.form(query, key, wanted), scale)
    return again(grad, query, key, value, wanted, scale, enable_gqa)[:3]


def again(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, ...]:
    """The gradients of query, key, value and each tensor of floats in ``wanted``, by torch's forward pass and autograd."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in (query, key, value, *wanted.tensors)]
        q, k, v, *arrays = leaves
        output = attend(q, k, v, wanted.with_tensors(arrays), scale, enable_gqa)
        asked = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(output, asked, grad, allow_unused=True))
    return tuple(next(found) if x.requires_grad else None for x in leaves)  # type: ignore[misc]

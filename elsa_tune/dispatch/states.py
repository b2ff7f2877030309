"""Attention as a state: the output with each row's log-sum-exp, and the merge of states over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from elsa_tune.dispatch import attention as dispatch
from elsa_tune.dispatch import fallback, meaning, operator, serving
from elsa_tune.dispatch.autograd import differentiable
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.generate.tensors import check_tensors, described, lse_dtype, needs_grad, number
from elsa_tune.masks import CAUSAL, NONE, AttnMask, of_tensor
from elsa_tune.problem import Problem


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attn_mask: Tensor | AttnMask | None = None,
) -> tuple[Tensor, Tensor]:
    """attention() and the logarithm of each row's sum of exponentials, [batch, heads, q_len], float32 (of a float64 query float64).

    Shapes and ``attn_mask`` are attention()'s. A row that sees no key has output 0 and log-sum-exp -inf. Served by a tuned kernel where one
    is ready; else by torch's SDPA, with the log-sum-exp computed beside it. Raises WrongArguments.
    """
    recorded = torch.compiler.is_compiling()
    if recorded and operator.may_answer(query, key, value, attn_mask, 0.0, is_causal, enable_gqa):
        return operator.call(query, key, value, attn_mask, is_causal, scale, enable_gqa, True)
    check_tensors(query, key, value)
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        raise WrongArguments(
            f"is_causal is {described(is_causal)} and enable_gqa {described(enable_gqa)}; both must be True or False, and a mask be given"
            " as attn_mask="
        )
    if query.is_nested or key.is_nested or value.is_nested:
        raise WrongArguments("query, key or value is nested; states are of tensors [batch, heads, length, dim]")
    if not query.dim() == key.dim() == value.dim() == 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise WrongArguments(f"query, key, value {shapes} must have four dimensions, [batch, heads, length, dim]")
    scale = None if scale is None else number("scale", scale)
    if (made := dispatch.transformed(query, key, value, attn_mask, is_causal, scale, enable_gqa)) is not None:
        return made
    found = meaning.of(attn_mask, is_causal, query, key) if attn_mask is not None else CAUSAL if is_causal else NONE
    if found is not None:
        lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
        served = dispatch.served(query, key, value, found, scale, enable_gqa, lse)
        if served is not None:
            return served, lse
        if dispatch.is_differentiable(query, key, value, found, scale, enable_gqa):
            return differentiable(query, key, value, found, scale, enable_gqa)
    wanting = torch.is_grad_enabled() and needs_grad(query, key, value)
    with nullcontext() if found is None or wanting else serving.left_to_torch(query, key, value, found, enable_gqa):
        output = fallback.attend(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    wanted = of_tensor(attn_mask) if found is None and isinstance(attn_mask, Tensor) else found or NONE
    query, key = query.expand(*output.shape[:2], -1, -1), key.expand(output.shape[0], -1, -1, -1)
    family = wanted.of(Problem(head_dim=max(1, query.shape[3])))
    return output, logsumexp(query, key, family, wanted.in_order(query, key), scale)


def merge(states: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The state over all keys from states over disjoint sets of them: ring attention, prefix caches, split caches.

    Each state is (output [..., q_len, value_dim], log-sum-exp [..., q_len]) of the same queries, as attention_with_lse
    returns; the order does not matter. Computed in float32, or in float64 where outputs are; the output keeps its dtype. Differentiable.
    Raises WrongArguments.
    """
    parts = list(states)
    if not parts:
        raise WrongArguments("states is empty; give at least one (output, log-sum-exp)")
    for output, lse in parts:
        if output.shape != parts[0][0].shape or lse.shape != output.shape[:-1]:
            shapes = f"output {tuple(output.shape)} with log-sum-exp {tuple(lse.shape)}"
            raise WrongArguments(f"states hold {shapes}; all must be [..., q_len, value_dim] with [..., q_len], alike")
    wide = lse_dtype(parts[0][0])
    sums = torch.stack([lse.to(wide) for _, lse in parts])
    total = torch.logsumexp(sums, 0)
    weights = torch.exp(sums - torch.where(total == float("-inf"), 0.0, total))
    merged = torch.zeros_like(parts[0][0], dtype=wide)
    for weight, (output, _) in zip(weights, parts, strict=True):
        merged = merged + weight[..., None] * output.to(wide)
    return merged.to(parts[0][0].dtype), total

"""What torch answers where no kernel of ours may: its own function, kept away from what its fused CPU kernel gets wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.dispatch import meaning
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.posed import attn_mask as torchs_mask
from elsa_tune.generate.posed import eager, posed
from elsa_tune.generate.tensors import described
from elsa_tune.masks import CAUSAL, AttnMask
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch's function, but for causal with a scale of 0 or less, a float32 mask with a float64 query, and mistakes it lets pass.
    Differentiable, with dropout."""
    dense = isinstance(key, Tensor) and isinstance(value, Tensor) and not key.is_nested and not value.is_nested
    if dense and key.dim() >= 2 and value.dim() >= 2 and key.shape[-2] != value.shape[-2]:
        raise WrongArguments(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in length; both must have kv_len rows"
        )
    attn_mask = meaning.own(attn_mask, query, key)
    if isinstance(attn_mask, AttnMask):
        return _of_object(
            query, key, value, attn_mask & CAUSAL if is_causal else attn_mask, dropout_p, scale, enable_gqa
        )
    if attn_mask is not None and is_causal:
        raise WrongArguments(
            "attn_mask and is_causal are both given; fold causality into the mask, or drop one of them"
        )
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise WrongArguments(f"attn_mask is {described(attn_mask)}; it must be a tensor, or of elsa_tune.masks")
    if attn_mask is not None and attn_mask.device != query.device:
        raise WrongArguments(f"attn_mask is on {attn_mask.device}, query on {query.device}; move the mask there")
    arguments: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    causal_without_scale = is_causal and scale is not None and scale <= 0
    mixed_mask = attn_mask is not None and attn_mask.dtype not in (query.dtype, torch.bool)
    if (causal_without_scale or mixed_mask) and query.device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, **arguments)
    return scaled_dot_product_attention(query, key, value, **arguments)


def _of_object(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, dropout_p: float, scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """A mask of ours by torch's operations: its function with the mask it takes, or products and a softmax."""
    if not query.dim() == key.dim() == value.dim() == 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise WrongArguments(f"query, key, value {shapes} must have four dimensions where attn_mask is {wanted}")
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    if 0 in (*query.shape, *value.shape):
        return attend(query, key, value, None, dropout_p, False, scale, enable_gqa)
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        raise WrongArguments(
            f"query has {heads} heads, key and value {kv_heads}; they must be as many, or with enable_gqa divide"
        )
    element = elements.of_dtype(query.dtype)
    if element is None:
        known = ", ".join(f"torch.{elements.get(name).torch}" for name in elements.names())
        raise WrongArguments(f"query is {query.dtype}; it must be one of {known}")
    problem = wanted.of(
        Problem(
            dtype=element.name, head_dim=head_dim, value_dim=value_dim, batch=batch, heads=heads, kv_heads=kv_heads,
            q_len=q_len, kv_len=kv_len,
        )
    )  # fmt: skip
    there, chain = posed(problem, wanted.in_order(query, key), query, key), scores.get(problem.score)
    if problem.score == scores.NONE and masks.get(problem.mask).torchs == "is_causal":
        return attend(query, key, value, None, dropout_p, True, scale, enable_gqa)
    if problem.score == scores.NONE or chain.additive:
        mask = torchs_mask(there) if (problem.mask, problem.score) != (masks.NONE, scores.NONE) else None
        return attend(query, key, value, mask, dropout_p, False, scale, enable_gqa)
    hidden = None if problem.mask == masks.NONE else ~there.dense()
    return eager(there, query, key, value, scale, hidden, dropout_p)

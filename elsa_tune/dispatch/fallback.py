"""What torch answers where no kernel of ours may: its own function, kept away from what its fused CPU kernel gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.dispatch import derivatives, meaning
from elsa_tune.errors import WrongArguments
from elsa_tune.generate import incumbent
from elsa_tune.generate.posed import attn_mask as torchs_mask
from elsa_tune.generate.posed import eager, posed
from elsa_tune.generate.tensors import described, lse_dtype, needs_grad, number
from elsa_tune.masks import CAUSAL, AttnMask, may_be_read
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem

_broadcast: Callable[..., torch.Size] = torch.broadcast_shapes

FAR = 4096.0
"""A row of a mask whose largest is farther from 0 takes digits of a float32 log-sum-exp that gradients are computed from."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch's function, but for what its fused CPU kernel gets wrong, for masks of ours, and for mistakes that it lets pass or tells
    badly. Differentiable, with dropout. Raises WrongArguments."""
    if attn_mask is not None:
        if is_causal and isinstance(attn_mask, Tensor):
            raise WrongArguments(
                "attn_mask and is_causal are both given; fold causality into the mask, or drop one of them"
            )
        if isinstance(query, Tensor) and isinstance(key, Tensor) and not query.is_nested:
            attn_mask = meaning.own(attn_mask, *(x.shape[-2] if x.dim() > 1 else 1 for x in (query, key)))
        if not isinstance(attn_mask, Tensor | AttnMask):
            raise WrongArguments(f"attn_mask is {described(attn_mask)}; it must be a tensor, or of elsa_tune.masks")
    if not _recorded():
        _check(query, key, value, attn_mask, dropout_p, enable_gqa)
    if isinstance(attn_mask, AttnMask):
        if type(is_causal) is not bool or type(enable_gqa) is not bool:
            raise WrongArguments(
                f"is_causal is {described(is_causal)}, enable_gqa {described(enable_gqa)}; both must be True or False"
            )
        wanted = attn_mask & CAUSAL if is_causal else attn_mask
        scale = number("scale", scale) if scale is not None and not _recorded() else scale
        return _of_ours(query, key, value, wanted, dropout_p, scale, enable_gqa)
    return by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _recorded() -> bool:
    """Whether a compiler or tracer writes down what is done, and would take in every look at a size or a number."""
    return torch.compiler.is_compiling() or bool(torch._C._is_tracing())


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, enable_gqa: bool) -> None:
    """Raise WrongArguments for what torch lets pass, or tells without a name; what it tells well is left to it."""
    if not 0 <= number("dropout_p", dropout_p) <= 1:
        raise WrongArguments(f"dropout_p is {described(dropout_p)}; it must be a probability, from 0 to 1")
    given = query, key, value
    if not all(isinstance(x, Tensor) and not x.is_nested and x.dim() > 1 for x in given):
        return

    def told() -> str:
        return "query {}, key {}, value {}".format(*(list(x.shape) for x in given))

    if key.shape[-2] != value.shape[-2]:
        raise WrongArguments(f"{told()}: key and value differ in length; both must have kv_len rows")
    if query.shape[-1] != key.shape[-1]:
        raise WrongArguments(f"{told()}: query and key must have the same last dimension, head_dim")
    of_heads: tuple[int, ...] = ()
    outer: list[tuple[int, ...]] = [x.shape[:-2] for x in given]
    if enable_gqa and all(outer):
        of_heads = outer[0][-1:]
        if any(not x[-1] or of_heads[0] % x[-1] for x in outer):
            raise WrongArguments(
                f"{told()}: the {of_heads[0]} heads of query must be a multiple of those of key and value"
            )
        outer = [x[:-1] for x in outer]
    try:
        shared = outer[0] if outer[0] == outer[1] == outer[2] else _broadcast(*outer)
    except RuntimeError as error:
        more = "" if enable_gqa else ", or with enable_gqa its heads be a multiple of theirs"
        raise WrongArguments(f"{told()}: what comes before the last two dimensions must broadcast{more}") from error
    if isinstance(attn_mask, Tensor):
        if attn_mask.device != query.device:
            raise WrongArguments(f"attn_mask is on {attn_mask.device}, query on {query.device}; move the mask there")
        wanted = [*shared, *of_heads, query.shape[-2], key.shape[-2]]
        if attn_mask.layout != torch.strided:
            raise WrongArguments(f"attn_mask is {attn_mask.layout}; give a dense tensor, or masks of elsa_tune.masks")
        axes = zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
        if attn_mask.dim() > len(wanted) or any(n not in (1, m) for n, m in axes):
            raise WrongArguments(f"attn_mask {list(attn_mask.shape)} must broadcast to {wanted}, of {told()}")


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch's function; its math backend where the fused one errs: causal with a scale of 0 or less, a mask of another dtype, and
    gradients of rows that a mask takes far away as a whole."""
    if (
        isinstance(query, Tensor) and not query.is_nested and query.dim() > 2 and query.shape[-3] == 0
    ):  # heads, by whose number torch 2.9 divides
        return query[..., :1].expand(*query.shape[:-1], value.shape[-1]).clone()
    if attn_mask is not None and attn_mask.dim() < 2:  # which torch does not count as broadcasting
        attn_mask = attn_mask[(None,) * (2 - attn_mask.dim())]
    arguments: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if _fused_errs(query, key, value, attn_mask, is_causal, scale) and query.device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, **arguments)
    by_its_own = scaled_dot_product_attention if _recorded() else incumbent.attention
    return by_its_own(query, key, value, **arguments)


def _fused_errs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> bool:
    if attn_mask is None:
        return is_causal and scale is not None and scale <= 0
    if attn_mask.dtype == torch.bool:
        return False
    if attn_mask.dtype != query.dtype:
        return True
    if not (torch.is_grad_enabled() and needs_grad(query, key, value, attn_mask)) or _recorded():
        return False
    if not attn_mask.numel() or not may_be_read(attn_mask):
        return False
    return lies_far(attn_mask)


def lies_far(attn_mask: Tensor) -> bool:
    """Whether a mask takes a row so far away as a whole that a float32 log-sum-exp loses digits that gradients are computed from."""
    top = attn_mask.amax(-1)
    return bool(((top.abs() >= FAR) & top.isfinite()).any())


def _of_ours(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, dropout_p: float, scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """A mask of ours by torch's operations: its function with the mask it takes, or products and a softmax."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise WrongArguments(
            f"query, key or value is nested where attn_mask is {wanted}; give all three jagged, without dropout, or pad them"
        )
    if not query.dim() == key.dim() == value.dim() == 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise WrongArguments(f"query, key, value {shapes} must have four dimensions where attn_mask is {wanted}")
    casts = torch.amp.is_autocast_available(query.device.type)
    if casts and torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    shared = _broadcast(*(x.shape[: 1 if enable_gqa else 2] for x in (query, key, value)))
    query, key, value = (x.expand(*shared, *x.shape[len(shared) :]) for x in (query, key, value))
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    if 0 in (*query.shape, *value.shape):
        return by_torch(query, key, value, None, dropout_p, False, scale, enable_gqa)
    if heads % kv_heads:
        raise WrongArguments(f"query has {heads} heads, key and value {kv_heads}; they must divide")
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
        return by_torch(query, key, value, None, dropout_p, True, scale, enable_gqa)
    if problem.score == scores.NONE or chain.additive:
        mask = torchs_mask(there) if (problem.mask, problem.score) != (masks.NONE, scores.NONE) else None
        if type(mask).__name__ == "CausalBias" and scale is not None and scale <= 0:
            mask = there.dense()[None, None]  # what torch makes of its own object errs as is_causal does
        return by_torch(query, key, value, mask, dropout_p, False, scale, enable_gqa)
    if chain.weighing and not dropout_p:  # random words take more memory than scores: some rows at a time
        blocked = derivatives.attention(query, key, value, wanted, scale, False)
        return blocked(*derivatives.given(query, key, value, wanted))[0]
    hidden, wide = None if problem.mask == masks.NONE else ~there.dense(), lse_dtype(query)
    with torch.autocast(query.device.type, enabled=False) if casts else nullcontext():
        floats = (query.to(wide), key.to(wide), value.to(wide))
        return eager(there, *floats, scale, hidden, dropout_p, there.factors(wide)).to(query.dtype)

"""attention() as registered operators, elsa_tune::attention and its backward: what torch.compile, torch.export and AOTInductor record.

Who serves is decided when the operator is called, as in eager code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from elsa_tune.dispatch import fallback, meaning, passes, serving
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.masks import CAUSAL, NONE, AttnMask
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores

_MASK = (
    "Tensor? attn_mask, Tensor[] arrays, SymInt[] integers, float[] reals, str spelled, float? scale, bool enable_gqa"
)
_Library: Any = torch.library.Library  # without types
_library = _Library("elsa_tune", "FRAGMENT")
_library.define(
    f"attention(Tensor query, Tensor key, Tensor value, {_MASK}, bool keeps) -> (Tensor output, Tensor logsumexp)"
)
_library.define(
    f"attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, {_MASK})"
    " -> (Tensor, Tensor, Tensor)"
)
_CAUSAL = "causal"

_DTYPES = frozenset(
    getattr(torch, elements.get(name).torch) for name in elements.names() if hasattr(torch, elements.get(name).torch)
)


def recorded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """attention() for a compiler to follow: the operator where it may answer, torch's function elsewhere."""
    if not may_answer(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    wanting = query.requires_grad or key.requires_grad or value.requires_grad
    output, _ = call(query, key, value, attn_mask, is_causal, scale, enable_gqa, torch.is_grad_enabled() and wanting)
    return output


def call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, keeps: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator's output, and its log-sum-exp where it is kept."""
    place = query.device.type
    if torch.is_autocast_enabled(place):
        query, key, value = (x.to(torch.get_autocast_dtype(place)) for x in (query, key, value))
    arrays, integers, reals, spelled = [], [], [], _CAUSAL if is_causal else ""
    if isinstance(attn_mask, AttnMask):
        if is_causal:
            attn_mask = attn_mask & CAUSAL
        spelled = f"{attn_mask.mask} {attn_mask.score}"
        for name, given in attn_mask.operands.items():
            spelled += f" {name}"
            if isinstance(given, float):
                reals.append(given)
            elif isinstance(given, int | torch.SymInt):
                integers.append(given)
            elif isinstance(given, Tensor):
                arrays.append(given)
            elif hasattr(given, "made"):
                arrays.append(given.made(query.shape[2], key.shape[2], query.device))
            else:
                arrays.append(torch.as_tensor(given))
    mask = attn_mask if isinstance(attn_mask, Tensor) else None
    found: tuple[Tensor, Tensor] = torch.ops.elsa_tune.attention(
        query, key, value, mask, arrays, integers, reals, spelled, scale, enable_gqa, keeps
    )
    return found


def may_answer(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether these are [batch, heads, length, dim] of a kind that the operator is for."""
    given = (query, key, value)
    if dropout_p or not all(isinstance(x, Tensor) and not x.is_nested and x.dim() == 4 for x in given):
        return False
    if not query.dtype == key.dtype == value.dtype or query.dtype not in _DTYPES:
        return False
    if query.device != key.device or key.device != value.device or query.shape[3] != key.shape[3]:
        return False
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        return False
    if query.shape[1] != key.shape[1] and not (enable_gqa and query.shape[1] % key.shape[1] == 0):
        return False
    wanting = query.requires_grad or key.requires_grad or value.requires_grad
    tensors = [attn_mask] if isinstance(attn_mask, Tensor) else []
    if isinstance(attn_mask, AttnMask):
        tensors = [x for x in attn_mask.operands.values() if isinstance(x, Tensor)]
    elif attn_mask is not None and (type(attn_mask) is not Tensor or is_causal):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return query.is_cpu or not (
        torch.is_grad_enabled() and wanting
    )  # torch's training on GPUs keeps what it needs itself


def _wanted(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, arrays: Sequence[Tensor], integers: Sequence[int],
    reals: Sequence[float], spelled: str,
) -> AttnMask | None:  # fmt: skip
    """The mask that was recorded; None for a tensor that torch must be given as it is. Raises WrongArguments."""
    if attn_mask is not None:
        return meaning.of(attn_mask, False, query, key)
    if not spelled or spelled == _CAUSAL:
        return CAUSAL if spelled else NONE
    if arrays:
        return _put_together(spelled, tuple(integers), tuple(reals), arrays)
    return _without_tensors(spelled, tuple(integers), tuple(reals))


def _put_together(
    spelled: str, integers: tuple[int, ...], reals: tuple[float, ...], arrays: Sequence[Tensor]
) -> AttnMask:
    mask, score, *names = spelled.split(" ")
    of = {name: iter(integers) for name in masks.get(mask).integers} | {
        name: iter(reals) for name in scores.get(score).reals
    }
    its, whole, real = iter(arrays), iter(integers), iter(reals)
    operands: dict[str, Any] = {}
    for name in names:
        if name in masks.get(mask).integers:
            operands[name] = next(whole)
        elif name in of:
            operands[name] = next(real)
        else:
            operands[name] = next(its)
    return AttnMask(mask, score, operands)


@lru_cache(maxsize=256)
def _without_tensors(spelled: str, integers: tuple[int, ...], reals: tuple[float, ...]) -> AttnMask:
    return _put_together(spelled, integers, reals, ())


def _new(query: Tensor, value: Tensor) -> Tensor:
    """An output [batch, heads, q_len, value_dim] whose heads lie side by side, as models join them afterwards."""
    batch, heads, q_len, _ = query.shape
    return query.new_empty((batch, q_len, heads, value.shape[3])).transpose(1, 2)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, arrays: Sequence[Tensor], integers: Sequence[int],
    reals: Sequence[float], spelled: str, scale: float | None, enable_gqa: bool, keeps: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """output [batch, heads, q_len, value_dim], and the log-sum-exp [batch, heads, q_len] where the backward pass needs it."""
    wanted = _wanted(query, key, attn_mask, arrays, integers, reals, spelled)
    output, lse = _new(query, value), query.new_empty(0, dtype=lse_dtype(query))
    made: Tensor | None
    if keeps:
        if wanted is None:
            assert attn_mask is not None
            wanted = AttnMask(*_spelled_as_tensor(attn_mask))
        made, lse = passes.forward(query, key, value, wanted, scale, enable_gqa, output)
        lse = lse.contiguous()
    else:
        made = serving.by_kernel(query, key, value, wanted, scale, enable_gqa, output) if wanted is not None else None
        if made is None and wanted is not None and attn_mask is None:
            made = passes.attend(query, key, value, wanted, scale, enable_gqa)
        elif made is None:
            made = fallback.attend(query, key, value, attn_mask, 0.0, False, scale, enable_gqa)
    return output if made is output else output.copy_(made), lse


def _spelled_as_tensor(attn_mask: Tensor) -> Any:
    from elsa_tune.masks import of_tensor

    told = of_tensor(attn_mask)
    return told.mask, told.score, told.operands


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, attn_mask: Tensor | None,
    arrays: Sequence[Tensor], integers: Sequence[int], reals: Sequence[float], spelled: str, scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key and value, laid out as these are."""
    wanted = _wanted(query, key, attn_mask, arrays, integers, reals, spelled)
    if wanted is None:
        assert attn_mask is not None
        wanted = AttnMask(*_spelled_as_tensor(attn_mask))
    found = passes.backward(grad, query, key, value, output, lse, wanted, scale, enable_gqa)
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((query, key, value), found, strict=True))


def _shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, _, value, *_, keeps = arguments
    return _new(query, value), query.new_empty(query.shape[:3] if keeps else 0, dtype=lse_dtype(query))


def _shapes_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, (query, key, value)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, arrays, *ctx.told, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.none = [_nothing(x) for x in inputs[3:]]
    ctx.save_for_backward(query, key, value, *output, attn_mask, *arrays)


def _nothing(given: Any) -> Any:
    """What torch takes for no gradients of an argument: a list for a list of tensors, which an empty one always is."""
    of_tensors = isinstance(given, list | tuple) and all(isinstance(x, Tensor) for x in given)
    return [None] * len(given) if of_tensors else None


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, output, lse, attn_mask, *arrays = ctx.saved_tensors
    found = torch.ops.elsa_tune.attention_backward(grad, query, key, value, output, lse, attn_mask, arrays, *ctx.told)
    return (*found, *ctx.none)


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("elsa_tune::attention", _shapes, lib=_library)
torch.library.register_fake("elsa_tune::attention_backward", _shapes_backward, lib=_library)
torch.library.register_autograd("elsa_tune::attention", _differentiate, setup_context=_keep, lib=_library)

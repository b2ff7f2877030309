"""attention() as a differentiable operation of eager code and of torch.func: forward and backward by whoever serves, vmap, jvp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from elsa_tune.dispatch import passes
from elsa_tune.generate.posed import eager, posed
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.masks import AttnMask
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem

_Function: Any = torch.autograd.Function  # which has no types, nor has the next
unpack_dual: Any = forward_ad.unpack_dual


def differentiable(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Attention of [batch, heads, length, dim] whose first derivatives, backward and forward, and vmap are known. Saves query, key, value,
    output and log-sum-exp: O(n) memory."""
    output, _ = _Attention.apply(query, key, value, wanted, scale, enable_gqa, *wanted.tensors)
    return output  # type: ignore[no-any-return]


class _Attention(_Function):  # type: ignore[misc]
    """query, key, value, a mask, scale, enable_gqa, the mask's tensors -> output, log-sum-exp."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool, *arrays: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return passes.forward(query, key, value, wanted.with_tensors(arrays), scale, enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.wanted, ctx.scale, ctx.enable_gqa, *arrays = inputs
        ctx.mark_non_differentiable(output[1])
        # in the order in which torch keeps its own: a checkpoint may find another who serves when it computes again
        kept = (*arrays, key, query, value, output[1], output[0])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *arrays, key, query, value, lse, output = ctx.saved_tensors
        of_arrays = any(ctx.needs_input_grad[6:])
        found = _Gradients.apply(
            grad, query, key, value, output, lse, ctx.wanted, ctx.scale, ctx.enable_gqa, of_arrays, *arrays
        )
        of_three, rest = found[:3], found[3:] or [None] * len(arrays)
        return (*of_three, None, None, None, *rest)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        *arrays, key, query, value, _, _ = ctx.saved_tensors  # with their tangents
        with forward_ad._set_fwd_grad_enabled(True):
            output = _by_operations(query, key, value, ctx.wanted.with_tensors(arrays), ctx.scale)
            tangent: Tensor = unpack_dual(output).tangent
            return tangent, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        wanted = inputs[3]
        return _folded(_Attention, info.batch_size, dims, inputs, _batch_axes(3, wanted))


class _Gradients(_Function):  # type: ignore[misc]
    """The backward pass, differentiable no further."""

    @staticmethod
    def forward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, wanted: AttnMask,
        scale: float | None, enable_gqa: bool, of_arrays: bool, *arrays: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wanted = wanted.with_tensors(arrays)
        if of_arrays:
            return passes.again(grad, query, key, value, wanted, scale, enable_gqa)
        return passes.backward(grad, query, key, value, output, lse, wanted, scale, enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("attention has first derivatives, and no second ones: neither has torch's fused kernel")

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        wanted, of_arrays = inputs[6], inputs[9]
        if of_arrays:  # a tensor that is shared has a gradient of its own for each
            return _one_by_one(_Gradients, info.batch_size, dims, inputs)
        return _folded(_Gradients, info.batch_size, dims, inputs, _batch_axes(6, wanted))


def _batch_axes(tensors: int, wanted: AttnMask) -> list[int | None]:
    """Of the inputs that are tensors, in order, the axis that is the batch; None for a tensor of the mask that has none."""
    arrays = (*masks.get(wanted.mask).arrays, *scores.get(wanted.score).arrays)
    axes = {array.name: array.axes.index("batch") if "batch" in array.axes else None for array in arrays}
    return [*[0] * tensors, *(axes[name] for name, x in wanted.operands.items() if isinstance(x, Tensor))]


def _one_by_one(
    function: Any, count: int, dims: tuple[int | None, ...], inputs: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A function called ``count`` times."""
    each = [[x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True)] for i in range(count)]
    made = zip(*(function.apply(*some) for some in each), strict=True)
    stacked = tuple(map(torch.stack, made))
    return stacked, (0,) * len(stacked)


def _folded(
    function: Any, count: int, dims: tuple[int | None, ...], inputs: Sequence[Any], axes: Sequence[int | None]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A function of ``count`` times as many batch entries in the place of one that is called ``count`` times; called so where a tensor
    without batch differs."""
    at = [n for n, x in enumerate(inputs) if isinstance(x, Tensor)]
    if any(axis is None and dims[n] is not None for n, axis in zip(at, axes, strict=True)):
        return _one_by_one(function, count, dims, inputs)
    given = list(inputs)
    batch = next(x.shape[0] if d is None else x.movedim(d, 0).shape[1] for x, d in ((inputs[n], dims[n]) for n in at))
    for n, axis in zip(at, axes, strict=True):
        if axis is not None:
            x, d = inputs[n], dims[n]
            if d is None and x.shape[axis] == 1 and batch > 1:
                continue  # all share it as it is
            x = x.expand(count, *x.shape) if d is None else x.movedim(d, 0)
            sizes = list(x.shape)
            sizes[axis + 1] = batch
            given[n] = x.expand(sizes).movedim(0, axis).flatten(axis, axis + 1)
    found = tuple(x.unflatten(0, (count, batch)) for x in function.apply(*given))
    return found, (0,) * len(found)


def _by_operations(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None) -> Tensor:
    """Attention by torch's plain operations, which have every derivative."""
    element = elements.of_dtype(query.dtype)
    assert element is not None
    family = wanted.of(Problem(dtype=element.name, head_dim=query.shape[3], value_dim=value.shape[3]))
    there = posed(family, wanted.in_order(query, key), query, key)
    hidden = None if family.mask == masks.NONE else ~there.dense()
    wide = lse_dtype(query)
    return eager(there, query.to(wide), key.to(wide), value.to(wide), scale, hidden).to(query.dtype)

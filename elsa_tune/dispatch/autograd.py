"""attention() as a differentiable operation of eager code and of torch.func.

Forward and backward are by whoever serves; second derivatives and forward mode by operations; and vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack as _transforms
from torch.autograd import forward_ad

from elsa_tune.dispatch import derivatives, passes
from elsa_tune.masks import AttnMask
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores

_Function: Any = torch.autograd.Function  # which has no types


def differentiable(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """Attention of [batch, heads, length, dim] and its log-sum-exp [batch, heads, q_len]: both have first and second derivatives, backward
    and forward, and vmap. Saves query, key, value, output and log-sum-exp: O(n) memory."""
    output, lse = _Attention.apply(query, key, value, wanted, scale, enable_gqa, *wanted.tensors)
    return output, lse


class _Attention(_Function):  # type: ignore[misc]
    """query, key, value, a mask, scale, enable_gqa, the mask's tensors -> output, log-sum-exp."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool, *arrays: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return passes.forward(query, key, value, wanted.with_tensors(arrays), scale, enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, wanted, ctx.scale, ctx.enable_gqa, *arrays = inputs
        ctx.wanted = _bare(wanted)
        ctx.set_materialize_grads(False)
        # in the order in which torch keeps its own: a checkpoint may find another who serves when it computes again
        kept = (*arrays, key, query, value, output[1], output[0])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *arrays, key, query, value, lse, output = ctx.saved_tensors
        asked = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:])
        if (grad is None and grad_lse is None) or not any(asked):
            return (None,) * (6 + len(arrays))
        again = torch.is_grad_enabled() or _transforms() is not None or forward_ad._current_level >= 0
        if grad is not None and type(grad) is Tensor and not again:
            wanted = ctx.wanted.with_tensors(arrays)
            plain = passes.backward(
                grad, grad_lse, query, key, value, output, lse, wanted, ctx.scale, ctx.enable_gqa, asked
            )
            return (*plain[:3], None, None, None, *plain[3:])
        found = iter(
            _Gradients.apply(
                torch.zeros_like(output) if grad is None else grad, grad_lse, query, key, value, output, lse,
                ctx.wanted, ctx.scale, ctx.enable_gqa, _Asked(asked), *arrays,
            )
        )  # fmt: skip
        each = [next(found) if wanted else None for wanted in asked]
        return (*each[:3], None, None, None, *each[3:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        *arrays, key, query, value, _, _ = ctx.saved_tensors
        wanted = ctx.wanted.with_tensors(arrays)
        blocked = derivatives.attention(query, key, value, wanted, ctx.scale, True)
        changes = derivatives.flags(wanted, tangents[:3], tangents[6:], None)
        known = [x is not None for x in changes]
        output, lse = blocked.pushed(known)(*derivatives.given(query, key, value, wanted), *compress(changes, known))
        return output, lse

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        wanted = inputs[3]
        return _folded(_Attention, info.batch_size, dims, inputs, _batch_axes(3, wanted))


def _bare(wanted: AttnMask) -> AttnMask:
    """The same without its tensors, which are saved as others are: a checkpoint may let go of them."""
    return wanted.with_tensors([torch.empty((0,) * x.dim(), dtype=x.dtype, device="meta") for x in wanted.tensors])


@dataclass(frozen=True)
class _Asked:
    """Which gradients are asked for, of query, key, value and the mask's tensors: one thing to torch.func, which takes tuples apart."""

    each: tuple[bool, ...]


class _Gradients(_Function):  # type: ignore[misc]
    """The backward pass: of those asked for, in order."""

    @staticmethod
    def forward(
        grad: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
        wanted: AttnMask, scale: float | None, enable_gqa: bool, asked: _Asked, *arrays: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wanted = wanted.with_tensors(arrays)
        found = passes.backward(grad, grad_lse, query, key, value, output, lse, wanted, scale, enable_gqa, asked.each)
        return tuple(x for x in compress(found, asked.each) if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, grad_lse, query, key, value, _, _, wanted, ctx.scale, _, ctx.asked, *arrays = inputs
        ctx.wanted = _bare(wanted)
        ctx.has_lse = grad_lse is not None
        kept = (grad, *([grad_lse] if ctx.has_lse else []), query, key, value, *arrays)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def _given(ctx: Any) -> tuple[AttnMask, list[bool], tuple[Tensor, ...], int]:
        """The mask, what was asked for, and what the backward pass is of, by operations; how many of these come before results."""
        grad, *rest = ctx.saved_tensors
        results = (grad, rest.pop(0)) if ctx.has_lse else (grad,)
        query, key, value, *arrays = rest
        wanted = ctx.wanted.with_tensors(arrays)
        each = ctx.asked.each
        first, given = (
            derivatives.flags(wanted, each[:3], each[3:], False),
            derivatives.given(query, key, value, wanted),
        )
        return wanted, first, (*given, *results), len(given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, first, given, count = _Gradients._given(ctx)
        needs = ctx.needs_input_grad
        asked = [*derivatives.flags(wanted, needs[2:5], needs[11:], False), needs[0], *[needs[1]] * ctx.has_lse]
        query, key, value = given[:3]
        blocked = derivatives.second(query, key, value, wanted, ctx.scale, ctx.has_lse, first, asked)
        found = iter(blocked(*given, *grads))
        each = [next(found) if one else None for one in asked]
        floats = iter(each[3:count])
        arrays = [next(floats) if has else None for has in derivatives.has_derivatives(wanted)]
        return (each[count], each[-1] if ctx.has_lse else None, *each[:3], *[None] * 6, *arrays)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        wanted, first, given, _ = _Gradients._given(ctx)
        query, key, value = given[:3]
        blocked = derivatives.attention(query, key, value, wanted, ctx.scale, ctx.has_lse).pulled(first)
        changes = derivatives.flags(wanted, tangents[2:5], tangents[11:], None)
        changes += [tangents[0], *[tangents[1]] * ctx.has_lse]
        known = [x is not None for x in changes]
        return blocked.pushed(known)(*given, *compress(changes, known))

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        wanted, asked = inputs[7], inputs[10]
        if any(asked.each[3:]):  # a tensor that is shared has a gradient of its own for each
            return _one_by_one(_Gradients, info.batch_size, dims, inputs)
        return _folded(_Gradients, info.batch_size, dims, inputs, _batch_axes(6 + (inputs[1] is not None), wanted))


def _batch_axes(tensors: int, wanted: AttnMask) -> list[int | None]:
    """Of the inputs that are tensors, in order, the axis that is the batch; None for a tensor of the mask that has none."""
    arrays = (*masks.get(wanted.mask).arrays, *scores.get(wanted.score).arrays)
    axes = {array.name: array.axes.index("batch") if "batch" in array.axes else None for array in arrays}
    return [*[0] * tensors, *(axes[name] for name in derivatives.names(wanted))]


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
    without batch differs, and where weights are multiplied by what depends on a batch entry."""
    at = [n for n, x in enumerate(inputs) if isinstance(x, Tensor)]
    wanted = next(x for x in inputs if isinstance(x, AttnMask))
    of_places = scores.get(wanted.score).weighing is not None  # of batch entries too: as many would be others
    if of_places or any(axis is None and dims[n] is not None for n, axis in zip(at, axes, strict=True)):
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

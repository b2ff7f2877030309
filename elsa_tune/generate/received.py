"""What arrays of scores receive: where kernels leave it, and its sum."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_tune.parts.operand import Array


def room(array: Array, query: Tensor, given: Tensor) -> Tensor:
    """Room for what an array receives, shaped as it is given; for what each row adds, where rows have one number of it."""
    return query.new_empty(given.shape if array.over_keys else query.shape[:3], dtype=torch.float32)


def summed(array: Array, grad: Tensor | None, given: Tensor) -> Tensor | None:
    """What an array of scores receives, from what each row adds, or each pair, where it has a number for each key."""
    if grad is None:
        return None
    if array.over_keys:
        return grad.to(given.dtype)
    axes = ("batch", "heads", "q_len")
    shared = tuple(
        n for n, axis in enumerate(axes) if axis not in array.axes or given.shape[array.axes.index(axis)] == 1
    )
    return (_sum(grad, shared) if shared else grad).reshape(given.shape).to(given.dtype)


def _sum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """In float64, in an order that no number of threads changes: on a CPU numpy's."""
    if x.is_cpu:
        return torch.from_numpy(x.numpy().sum(axes, dtype="float64", keepdims=True))
    return x.sum(axes, keepdim=True, dtype=torch.float64)

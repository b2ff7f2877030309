"""What every backend does with tensors: check dimensions and operands, lay outputs out like the query, make rows contiguous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.parts.operand import Array, Operands
from elsa_tune.problem import Problem


def described(value: Any) -> str:
    """An argument as a message shows it: of a tensor its dtype, shape and device."""
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else shown(value)


def number(name: str, value: Any) -> float:
    """An argument as a float. Raises WrongArguments where it is none, or more than a float can hold."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        pass
    raise WrongArguments(f"{name} is {described(value)}; give a number that a float can hold")


def check_tensors(query: Any, key: Any, value: Any) -> None:
    """Raise WrongArguments unless all three are tensors."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise WrongArguments(f"{name} is {described(x)}; it must be a tensor")


def needs_grad(*given: Any) -> bool:
    """Whether some tensor among them takes gradients."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in given)


def one_of_each(x: Tensor) -> Tensor:
    """What a tensor holds along the axes on which it is expanded, once: of length 1 there."""
    return x[tuple(slice(1) if step == 0 else slice(None) for step in x.stride())]


def check_dims(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise WrongArguments unless the last dimensions are the family's."""
    dims = (query.shape[3], key.shape[3], value.shape[3])
    if dims != (problem.head_dim, problem.head_dim, problem.value_dim):
        raise WrongArguments(
            f"query, key, value have dimensions {dims}, which are not of {problem.family}; load a kernel of their own"
        )


def kernel_arguments(problem: Problem, operands: Operands, query: Tensor, key: Tensor) -> tuple[Any, ...]:
    """A kernel's arguments for the operands of a call, in the order of elsa_tune.parts.operand.arguments: numbers, and of an array
    the tensor and its strides. Raises WrongArguments where they are not what the family declares."""
    declared = problem.declared
    if len(operands) != len(declared):
        names = ", ".join(one.name for one in declared) or "none"
        raise WrongArguments(f"{problem.family} takes the operands {names}; {len(operands)} are given")
    given: list[Any] = []
    sizes: dict[str, Any] = {
        "batch": query.shape[0], "heads": query.shape[1], "kv_heads": key.shape[1], "q_len": query.shape[2],
        "kv_len": key.shape[2],
    }  # fmt: skip
    for one, value in zip(declared, operands, strict=True):
        if isinstance(one, Array):
            given += [value, *_strides(one, value, sizes, query.device)]
        elif isinstance(value, int if one.kind == "integer" else (int, float)):
            given.append(value)
            sizes[one.name] = value  # a mask's integers come before its arrays
        else:
            raise WrongArguments(f"operand {one.name} is {described(value)}; it must be a number ({one.kind})")
    return tuple(given)


def _strides(array: Array, value: Any, sizes: Mapping[str, Any], device: torch.device) -> list[int]:
    """Elements from one to the next along each axis, 0 where all share one."""
    wanted = array.lengths(sizes)
    fits = isinstance(value, Tensor) and value.dtype is getattr(torch, array.dtype) and value.device == device
    if (
        not fits
        or value.dim() != len(wanted)
        or any(n not in (1, m) and m is not None for n, m in zip(value.shape, wanted, strict=True))
    ):
        raise WrongArguments(
            f"operand {array.name} is {described(value)}; it must be torch.{array.dtype} [{', '.join(array.axes)}] = {wanted}, each or 1,"
            f" on {device}"
        )
    return [stride if n > 1 else 0 for stride, n in zip(value.stride(), value.shape, strict=True)]


def new_output(query: Tensor, value_dim: int) -> Tensor:
    """An output [batch, heads, q_len, value_dim] laid out like ``query``: by head, or by position."""
    batch, heads, q_len, head_dim = query.shape
    if value_dim == head_dim:
        alike = torch.empty_like(query)
        if alike.stride(3) == 1:  # not so for a query whose last columns lie farther apart than its heads or rows
            return alike
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, q_len, heads, value_dim)).transpose(1, 2)
    return query.new_empty((batch, heads, q_len, value_dim))


def lse_dtype(query: Tensor) -> torch.dtype:
    """Of a log-sum-exp: float32, or float64 where the query is."""
    return torch.promote_types(query.dtype, torch.float32)


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself, or a copy whose rows are contiguous and whose negation bit, if any, is applied."""
    return x if x.stride(3) == 1 and not x.is_neg() else x.resolve_neg().clone(memory_format=torch.contiguous_format)

"""What every backend does with tensors: check dimensions, lay outputs out like the query, make rows contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_tune.errors import WrongArguments
from elsa_tune.parts import element as elements
from elsa_tune.parts.mask import NONE
from elsa_tune.problem import Problem


def check_dims(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise WrongArguments unless the last dimensions are the family's."""
    dims = (query.shape[3], key.shape[3], value.shape[3])
    if dims != (problem.head_dim, problem.head_dim, problem.value_dim):
        raise WrongArguments(f"query, key, value have dimensions {dims}, which are not of {problem.family}")


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


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself, or a copy whose rows are contiguous and whose negation bit, if any, is applied."""
    return x if x.stride(3) == 1 and not x.is_neg() else x.resolve_neg().clone(memory_format=torch.contiguous_format)


def torch_dtype(problem: Problem) -> torch.dtype:
    """What torch calls the problem's element."""
    found: torch.dtype = getattr(torch, elements.get(problem.dtype).torch)
    return found


def hidden(problem: Problem, position: Tensor, first: int, count: int) -> Tensor:
    """Which of ``count`` keys from ``first`` on the queries at these positions [rows, 1] do not see, [rows, count]."""
    key = torch.arange(first, first + count, device=position.device)
    low, high = problem.seen(position)
    hidden: Tensor = (key < low) | (key >= high)
    return hidden


def logsumexp(
    query: Tensor, key: Tensor, mask: str, operands: tuple[int, ...], scale: float | None, rows: int = 256
) -> Tensor:
    """log of each row's sum of exponentials, [batch, heads, q_len], float32; scores of ``rows`` rows exist at a time."""
    batch, heads, q_len, head_dim = query.shape
    group, kv_len = heads // key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(wide).unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, 1, head_dim, kv_len]
    posed = Problem(head_dim=head_dim, mask=mask, q_len=q_len, kv_len=kv_len, integers=operands)
    found = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    for first in range(0, q_len, rows):
        some = query[:, :, first : first + rows].to(wide) * (head_dim**-0.5 if scale is None else scale)
        scores = (some.view(batch, -1, group, some.shape[2], head_dim) @ keys).flatten(1, 2)
        if mask != NONE:
            position = torch.arange(first, first + some.shape[2], device=query.device)[:, None]
            scores = scores.masked_fill(hidden(posed, position, 0, kv_len), float("-inf"))
        found[:, :, first : first + rows] = torch.logsumexp(scores, -1)
    return found

"""What every backend does with tensors: check dimensions, lay outputs out like the query, make rows contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_tune.errors import WrongArguments
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

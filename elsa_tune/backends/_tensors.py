"""Tensor layouts that every backend meets: outputs like the query, rows that must be contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def new_output(query: Tensor, value_dim: int) -> Tensor:
    """An output [batch, heads, q_len, value_dim] laid out like ``query``: by head, or by position."""
    batch, heads, q_len, head_dim = query.shape
    if value_dim == head_dim:
        return torch.empty_like(query)
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, q_len, heads, value_dim)).transpose(1, 2)
    return query.new_empty((batch, heads, q_len, value_dim))


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself, or a copy whose rows are contiguous (and whose negation bit, if any, is applied)."""
    return x if x.stride(3) == 1 else x.resolve_neg().clone(memory_format=torch.contiguous_format)

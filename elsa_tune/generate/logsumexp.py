"""The log-sum-exp of attention beside an output that somebody else computed, and which keys a mask hides."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_tune.parts.mask import NONE
from elsa_tune.problem import Problem


def hidden(problem: Problem, position: Tensor, first: int, count: int) -> Tensor:
    """Which of ``count`` keys from ``first`` on the queries at these positions [rows, 1] do not see, [rows, count]."""
    key = torch.arange(first, first + count, device=position.device)
    low, high = problem.seen(position)
    unseen: Tensor = (key < low) | (key >= high)
    return unseen


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

"""A bias: a tensor is added to scores, as torch's floating attn_mask is; -inf hides a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.operand import STATE, Array
from elsa_tune.parts.score._base import Score, farthest


def _of_heads(sizes: Mapping[str, int]) -> Any:
    """A relative position's, alike for all sequences."""
    import torch

    shape = (1, sizes["heads"], sizes["q_len"], sizes["kv_len"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _least(sizes: Mapping[str, int]) -> Any:
    """What hides a key: -inf, the least float, of 32 bits and of 64, and less; of rows wholly so, and of some keys of all rows."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = [sizes[axis] for axis in BIAS.axes]
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias[torch.rand(shape, generator=generator) < 0.5] = torch.finfo(torch.float32).min
    bias[..., ::5] = float("-inf")
    bias[:, :, 1::5] = torch.finfo(torch.float32).min
    bias[:, :, 2::5] = -1e30
    bias[:, :, 3::5] = float("-inf")
    bias[:, :, 4::5] = torch.finfo(torch.float64).min
    return bias


def _of_keys(sizes: Mapping[str, int]) -> Any:
    """The same for all queries, not contiguous; large and growing."""
    import torch

    grown = torch.linspace(-300, 300, sizes["kv_len"] * sizes["batch"], dtype=torch.float64)
    return grown.view(sizes["kv_len"], sizes["batch"], 1, 1).permute(1, 2, 3, 0)


def _error(error: float, largest: float, unit: float, bias: Any, **more: Any) -> tuple[float, float]:
    """One more rounding; keys as far away as farthest() weigh nothing, or as much as each other."""
    near = bias.where(bias > farthest(unit), 0.0)
    after = largest + (float(near.abs().max()) if near.numel() else 0.0)
    return error + unit * after, after


BIAS = Array("bias", STATE, ("batch", "heads", "q_len", "kv_len"), _of_heads, (_least, _of_keys))

SCORE = Score("bias", "score + `bias`", lambda score, bias: score + bias, _error, arrays=(BIAS,), additive=True)

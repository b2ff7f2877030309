"""A dense mask: a tensor says of each pair whether it is seen, as torch's boolean attn_mask does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.operand import Array


def _three_of_four(sizes: Mapping[str, int]) -> Any:
    """Alike for all heads, as models make them."""
    import torch

    shape = (sizes["batch"], 1, sizes["q_len"], sizes["kv_len"])
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.75


def _holes(sizes: Mapping[str, int]) -> Any:
    """Rows that see nothing, whole tiles that nobody or everybody sees, and nothing shared."""
    import torch

    seen = torch.rand([sizes[axis] for axis in DENSE.axes], generator=torch.Generator().manual_seed(1)) < 0.5
    seen[..., 16:64] = True
    seen[..., 64:112] = False
    seen[:, :, ::7] = False
    return seen


def _of_keys(sizes: Mapping[str, int]) -> Any:
    """The same for all queries, not contiguous."""
    import torch

    shape = (sizes["kv_len"], sizes["batch"], 1, 1)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6).permute(1, 2, 3, 0)


def _none(sizes: Mapping[str, int]) -> Any:
    return [[[[False]]]]


DENSE = Array("dense", "bool", ("batch", "heads", "q_len", "kv_len"), _three_of_four, (_holes, _of_keys, _none))

MASK = Mask("dense", "where `dense` says so", arrays=(DENSE,), test=lambda dense: dense)

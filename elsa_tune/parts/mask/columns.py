"""Column intervals: each key is hidden from the positions of an interval of its own (FlashMask, Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.operand import Array

AXES = ("batch", "kv_heads", "kv_len")
ENDLESS = 2**31 - 1
"""More than every position."""

DOCUMENTS = 8
"""Of a typical sequence."""


def of_document(sizes: Mapping[str, int], later: int) -> Any:
    """Where each key's document begins, or the one so many later; all are as long."""
    import torch

    document = torch.arange(sizes["kv_len"]) * DOCUMENTS // sizes["kv_len"] + later
    return -(-document * sizes["kv_len"] // DOCUMENTS)[None, None]


def _end_of_document(sizes: Mapping[str, int]) -> Any:
    return of_document(sizes, 1)


def anywhere(seed: int) -> Any:
    """Intervals that begin or end there, of which some are empty and some are everything; nothing shared."""

    def made(sizes: Mapping[str, int]) -> Any:
        import torch

        shape = [sizes[axis] for axis in AXES]
        x = torch.randint(-5, sizes["q_len"] + 5, shape, generator=torch.Generator().manual_seed(seed))
        x[..., 16:64] = 0 if seed % 2 else ENDLESS
        x[..., 64:112] = ENDLESS if seed % 2 else 0
        return x

    return made


def endless(sizes: Mapping[str, int]) -> Any:
    return [[[ENDLESS]]]


def outside(first: Any, end: Any, position: Any) -> Any:
    """Whether positions do not lie in [first, end)."""
    return (position < first) | (position >= end)


MASK = Mask(
    "columns",
    "keys but at positions from `hidefrom` to before `hideto`",
    arrays=(
        Array("hidefrom", "int32", AXES, _end_of_document, (anywhere(1), endless)),
        Array("hideto", "int32", AXES, endless, (anywhere(2), anywhere(4))),
    ),
    test=lambda hidefrom, hideto, position, **place: outside(hidefrom, hideto, position),
    placed=True,
)

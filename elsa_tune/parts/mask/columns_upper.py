"""A second interval of positions that each key is hidden from, as FlashMask has above the diagonal where it is not causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsa_tune.parts.mask._base import Mask
from elsa_tune.parts.mask.columns import AXES, anywhere, endless, of_document, outside
from elsa_tune.parts.operand import Array


def _start_of_document(sizes: Mapping[str, int]) -> Any:
    return of_document(sizes, 0)


def _first(sizes: Mapping[str, int]) -> Any:
    return [[[0]]]


MASK = Mask(
    "columns_upper",
    "keys but at positions from `upperfrom` to before `upperto`",
    arrays=(
        Array("upperfrom", "int32", AXES, _first, (anywhere(3), endless)),
        Array("upperto", "int32", AXES, _start_of_document, (anywhere(6), anywhere(8))),
    ),
    test=lambda upperfrom, upperto, position, **place: outside(upperfrom, upperto, position),
    placed=True,
)

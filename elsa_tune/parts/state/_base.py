"""A state of softmax attention: what a set of keys leaves of a query row, and the associative merge of two such sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Cells = tuple["Tensor", ...]
"""States of some rows: the scalars of each, [rows], then its columns, [rows, value_dim]."""


@dataclass(frozen=True)
class State:
    """``spelled`` as in a text about it. ``scalars``: floats of a row in memory, beside one for each value column; registers may
    carry more, what rounding leaves over. ``normalised``: its columns are the output itself, and a leaf enters as a whole.
    ``operator``: what it is a state of.

    ``leaf`` makes the state of scores [rows, keys] and values [keys, value_dim], of which -inf are hidden; ``merge`` that of two
    disjoint sets of keys; ``total`` the output and the log-sum-exp. No key at all is ``leaf`` of hidden ones, the identity.
    Natural exponentials, in the arithmetic of what they are given: kernels work in base 2.
    """

    name: str
    title: str
    spelled: str
    scalars: int
    normalised: bool
    operator: str
    leaf: Callable[[Tensor, Tensor], Cells]
    merge: Callable[[Cells, Cells], Cells]
    total: Callable[[Cells], tuple[Tensor, Tensor]]

    def floats(self, value_dim: int) -> int:
        """Floats of a row's state in memory."""
        return self.scalars + value_dim


def origin(m: Tensor) -> Tensor:
    """What exponents are taken from: a maximum over no keys is -inf, and must not meet itself, -inf - -inf is NaN."""
    return m.masked_fill(m.isneginf(), 0.0)

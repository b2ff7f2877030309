"""Softmax attention: P = exp(S - log sum exp S), O = P V."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING

from elsa_tune.parts.operator._base import Operator
from elsa_tune.parts.state.triple import leaf, merge, total

if TYPE_CHECKING:
    from torch import Tensor


def rows(some: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """A row that sees no key is 0, and the log of its sum -inf."""
    return total(reduce(merge, (leaf(*each) for each in some)))


def weights(scores: Tensor, sums: Tensor) -> Tensor:
    """P, from the log of each row's sum."""
    return (scores - sums[:, None]).exp()


def score_gradient(p: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    """dS = P * (dP - D)."""
    return p * (dp - delta)


def bound(unit: float, keys: int) -> float:
    """u (1 + log2 n): docs/how-it-works.md."""
    return unit * (1 + math.log2(keys))


OPERATOR = Operator(
    "softmax", "softmax attention", rows, weights, score_gradient, bound, torchs="scaled_dot_product_attention"
)

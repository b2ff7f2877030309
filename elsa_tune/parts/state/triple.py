"""The state (m, S, W): the largest score, the sum of exponentials beside it, and the sum of values they weigh (arXiv 2604.23798)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elsa_tune.parts.state._base import Cells, State, origin

if TYPE_CHECKING:
    from torch import Tensor


def leaf(scores: Tensor, values: Tensor, factors: Tensor | None = None) -> Cells:
    """m = max s, S = sum exp(s - m), W = sum exp(s - m) f v, with factors f where there are any."""
    m = scores.amax(1)
    weights = (scores - origin(m)[:, None]).exp()
    return m, weights.sum(1), (weights if factors is None else weights * factors) @ values


def merge(a: Cells, b: Cells) -> Cells:
    """Both beside the larger maximum."""
    m = a[0].maximum(b[0])
    keep_a, keep_b = ((x[0] - origin(m)).exp() for x in (a, b))
    return m, keep_a * a[1] + keep_b * b[1], keep_a[:, None] * a[2] + keep_b[:, None] * b[2]


def total(x: Cells) -> tuple[Tensor, Tensor]:
    """W / S and m + log S; a row that saw no key is 0, and its log-sum-exp -inf."""
    m, s, w = x
    return w / s.masked_fill(s == 0, 1.0)[:, None], m + s.log()


STATE = State("triple", "maximum, sum and weighted sum", "(m, S, W)", 2, False, "softmax", leaf, merge, total)

"""The state (lambda, O): log-sum-exp and output, FLASH-D (arXiv 2505.14201) made safe by merging whole leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elsa_tune.parts.state._base import Cells, State, origin

if TYPE_CHECKING:
    from torch import Tensor


def leaf(scores: Tensor, values: Tensor) -> Cells:
    """lambda = log sum exp(s), O = sum exp(s - lambda) v."""
    sums = scores.logsumexp(1)
    return sums, (scores - origin(sums)[:, None]).exp() @ values


def merge(a: Cells, b: Cells) -> Cells:
    """x = lambda_b - lambda_a; O = O_a + sigmoid(x) (O_b - O_a), lambda = lambda_a + softplus(x). A side of no keys gives nothing."""
    (sums_a, out_a), (sums_b, out_b) = a, b
    share = (sums_b - sums_a).sigmoid().masked_fill(sums_a.isneginf(), 1.0).masked_fill(sums_b.isneginf(), 0.0)
    return sums_a.logaddexp(sums_b), out_a + share[:, None] * (out_b - out_a)


def total(x: Cells) -> tuple[Tensor, Tensor]:
    """It is both."""
    return x[1], x[0]


STATE = State("pair", "log-sum-exp and output", "(lambda, O)", 1, True, "softmax", leaf, merge, total)

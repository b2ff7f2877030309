"""Scores, as a program writes them: what is done to a score after the scale, in the order written, before masks (elsa_tune.masks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.masks import AttnMask
from elsa_tune.parts.mask import NONE
from elsa_tune.problem import LARGEST_REAL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["alibi", "bias", "sinks", "softcap"]


def bias(added: Tensor) -> AttnMask:
    """Adds a tensor of floats, broadcastable to [batch, heads, q_len, kv_len]: float32 or of the query's dtype; -inf hides a key."""
    return AttnMask(NONE, "bias", {"bias": added})


def alibi(slopes: Tensor | Sequence[float], lower_right: bool = False) -> AttnMask:
    """Adds -slope |position - key|, ``slopes`` [heads] or [batch, heads]; ``lower_right``: the last query is where the last key is, as when
    decoding."""
    if lower_right:
        return AttnMask(NONE, "alibi_lower_right", {"lateslopes": slopes})
    return AttnMask(NONE, "alibi", {"slopes": slopes})


def softcap(c: float) -> AttnMask:
    """``c`` tanh(score / c)."""
    if isinstance(c, bool) or not isinstance(c, int | float) or not 1 / LARGEST_REAL <= c <= LARGEST_REAL:
        raise WrongArguments(f"c is {shown(c)}; it must be a number from {1 / LARGEST_REAL:.0e} to {LARGEST_REAL:.0e}")
    return AttnMask(NONE, "softcap", {"softcap": float(c)})


def sinks(logits: Tensor | Sequence[float]) -> AttnMask:
    """One more key in each head, of score ``logits`` [heads] and of value 0: it takes a share of the weights, and is in the
    log-sum-exp."""
    return AttnMask(NONE, "sinks", {"sinks": logits})

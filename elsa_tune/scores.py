"""Scores, as a program writes them: what is done to a score after the scale, in the order written, before masks (elsa_tune.masks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.masks import AttnMask, whole
from elsa_tune.parts.mask import NONE
from elsa_tune.parts.score.dropout import BELOW
from elsa_tune.problem import LARGEST_REAL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["alibi", "bias", "dropout", "sinks", "softcap"]


def bias(added: Tensor) -> AttnMask:
    """Adds a tensor of floats, broadcastable to [batch, heads, q_len, kv_len]: float32 or of the query's dtype; -inf hides a key."""
    return AttnMask(NONE, "bias", {"bias": added})


def alibi(slopes: Tensor | Sequence[float], lower_right: bool = False) -> AttnMask:
    """Adds -slope |position - key|, ``slopes`` [heads] or [batch, heads]; ``lower_right``: the last query is where the last key is, as when
    decoding."""
    if lower_right:
        return AttnMask(NONE, "alibi_lower_right", {"lateslopes": slopes})
    return AttnMask(NONE, "alibi", {"slopes": slopes})


def dropout(p: float, seed: int | Tensor) -> AttnMask:
    """Leaves each weight out of the sum of values with probability ``p``, from 1e-30 to below 1, and divides the others by 1 - p.

    ``seed``: a whole number of 64 bits, or a tensor of one. Which are left out depends on it, batch entry, head, position and key alone
    (Philox): the same in the backward pass, on every device and by whoever serves. So give each layer and step a seed of its own; what
    vmap maps over has the same in each sample. The log-sum-exp has them all. Raises WrongArguments.
    """
    import torch

    if isinstance(p, bool) or not isinstance(p, int | float) or not 1 / LARGEST_REAL <= p < BELOW:
        raise WrongArguments(f"p is {shown(p)}; it must be a number from {1 / LARGEST_REAL:.0e} to below 1")
    given: Any = seed if isinstance(seed, torch.Tensor) else whole("seed", seed, -(2**63), 2**64 - 1)
    if not isinstance(given, torch.Tensor):
        words = [(given >> shift) % 2**32 for shift in (0, 32)]
        low, high = (torch.tensor([word - (word >> 31 << 32)], dtype=torch.int32) for word in words)
    elif given.numel() == 1 and not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool:
        number = given.reshape(1).to(torch.int64)
        low, high = number.to(torch.int32), (number >> 32).to(torch.int32)
    else:
        raise WrongArguments(f"seed is {shown(seed)}; it must be a whole number of 64 bits, or a tensor of one")
    return AttnMask(NONE, "dropout", {"dropout": float(p), "seed": low, "stream": high})


def softcap(c: float) -> AttnMask:
    """``c`` tanh(score / c)."""
    if isinstance(c, bool) or not isinstance(c, int | float) or not 1 / LARGEST_REAL <= c <= LARGEST_REAL:
        raise WrongArguments(f"c is {shown(c)}; it must be a number from {1 / LARGEST_REAL:.0e} to {LARGEST_REAL:.0e}")
    return AttnMask(NONE, "softcap", {"softcap": float(c)})


def sinks(logits: Tensor | Sequence[float]) -> AttnMask:
    """One more key in each head, of score ``logits`` [heads] and of value 0: it takes a share of the weights, and is in the
    log-sum-exp."""
    return AttnMask(NONE, "sinks", {"sinks": logits})

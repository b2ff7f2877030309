"""What a call's attn_mask means: a mask of ours for whatever torch takes, or nothing where torch must answer."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from elsa_tune import scores
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.tensors import described, number
from elsa_tune.masks import CAUSAL, NONE, AttnMask, causal, from_block_mask, lengths, may_be_read, of_tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_AXES = 4

WORTH_A_LOOK = 1 << 19
"""(query row, key) pairs of a call above which looking at one row of a mask, a few small operations, is below 2 % of it."""


def of(attn_mask: Any, is_causal: bool, query: Tensor, key: Tensor) -> AttnMask | None:
    """The mask that the argument means for [batch, heads, length, dim] tensors; None where torch must answer: other shapes and kinds
    of tensors, which it may also refuse."""
    if is_causal and isinstance(attn_mask, Tensor):
        return None
    attn_mask = own(attn_mask, query.shape[-2], key.shape[-2])
    if isinstance(attn_mask, AttnMask):
        return attn_mask & CAUSAL if is_causal else attn_mask
    if query.dim() == _AXES and type(attn_mask) in _PLAIN:
        return _of_tensor(attn_mask, query, key)
    return None


def of_ragged(attn_mask: Any) -> AttnMask:
    """The mask that the argument means within each sequence of a ragged batch. Raises WrongArguments."""
    if attn_mask is None or isinstance(attn_mask, AttnMask):
        return attn_mask or NONE
    if type(attn_mask).__name__ == "CausalBias":  # whose corner is each sequence's own
        return _of_causal_bias(attn_mask)
    if not isinstance(attn_mask, Tensor):
        told = (
            "a BlockMask, of one q_len and kv_len" if type(attn_mask).__name__ == "BlockMask" else described(attn_mask)
        )
        raise WrongArguments(f"attn_mask is {told}; of a ragged batch it must be a tensor, or of elsa_tune.masks")
    return of_tensor(attn_mask)


def with_dropout(
    attn_mask: Any, dropout_p: float, dropout_seed: int | Tensor, is_causal: bool, query: Tensor, key: Tensor
) -> Any:
    """The mask that the arguments mean together with dropout by a seed; the argument itself where nothing is left out. Raises
    WrongArguments."""
    p = number("dropout_p", dropout_p)
    if not 0 <= p < 1:
        raise WrongArguments(f"dropout_p is {described(dropout_p)}; with dropout_seed it must be from 0 to below 1")
    dropped = scores.dropout(p or 0.5, dropout_seed)
    if p == 0:
        return attn_mask
    if any(isinstance(x, Tensor) and x.is_nested for x in (query, key)):
        raise WrongArguments("query or key is nested, where dropout_seed cannot tell sequences apart; pad them")
    if query.dim() != _AXES:
        raise WrongArguments(
            f"query {list(query.shape)} must be [batch, heads, q_len, head_dim] where dropout_seed is given"
        )
    if isinstance(attn_mask, Tensor) and type(attn_mask).__name__ != "CausalBias":
        if is_causal:
            raise WrongArguments("attn_mask is a tensor and is_causal is set; give either, or masks of elsa_tune.masks")
        return of_tensor(attn_mask) & dropped
    wanted = own(attn_mask, query.shape[-2], key.shape[-2])
    if wanted is None or isinstance(wanted, AttnMask):
        return (wanted or NONE) & dropped
    raise WrongArguments(f"attn_mask is {described(attn_mask)}; it must be a tensor, or of elsa_tune.masks")


_of_block_masks: WeakKeyDictionary[Any, AttnMask] = WeakKeyDictionary()


def own(attn_mask: Any, q_len: int, kv_len: int) -> Any:
    """Ours in the place of torch's objects, BlockMask and CausalBias; everything else as it is. Raises WrongArguments for one of other
    lengths."""
    kind = type(attn_mask).__name__
    if kind == "BlockMask":
        made_for = tuple(attn_mask.seq_lengths)
    elif kind == "CausalBias":
        made_for = attn_mask.seq_len_q, attn_mask.seq_len_kv
    else:
        return attn_mask
    if made_for != (q_len, kv_len):
        raise WrongArguments(
            f"attn_mask is a {kind} of q_len and kv_len {made_for}, query and key have {(q_len, kv_len)}; make one for these"
        )
    return _of_causal_bias(attn_mask) if kind == "CausalBias" else _of_block_mask(attn_mask)


def _of_block_mask(block_mask: Any) -> AttnMask:
    """Made once for each of them: nobody writes to its tensors, nor to what its mask_mod reads."""
    if block_mask not in _of_block_masks:
        _of_block_masks[block_mask] = from_block_mask(block_mask)
    return _of_block_masks[block_mask]


def _of_causal_bias(causal_bias: Any) -> AttnMask:
    from torch.nn.attention.bias import CausalVariant  # loads Triton, which who gives one has loaded

    return causal(lower_right=causal_bias.variant == CausalVariant.LOWER_RIGHT)


def _of_tensor(attn_mask: Tensor, query: Tensor, key: Tensor) -> AttnMask | None:
    wanted = (*query.shape[:3], key.shape[2])
    fits = attn_mask.dim() <= _AXES and all(
        n in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(wanted), strict=False)
    )
    known = attn_mask.dtype in (torch.bool, torch.float32, query.dtype) and attn_mask.device == query.device
    if not fits or not known or 0 in wanted:
        return None
    mask = attn_mask[(None,) * (_AXES - attn_mask.dim())]
    learns = attn_mask.requires_grad and torch.is_grad_enabled()  # a gradient is of what is added, whatever that is
    if not learns and worth_a_look(mask, query, key):
        padding = _padding(mask[:, 0, 0], key.shape[2])
        if padding is not None:
            return padding
    return of_tensor(mask)


def worth_a_look(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether what a mask of four axes holds may decide what it means: one that all rows and heads share, of a call that takes long."""
    shared = [n == 1 or step == 0 for n, step in zip(mask.shape, mask.stride(), strict=True)]
    return shared[1] and shared[2] and may_be_read(mask) and query.shape[:3].numel() * key.shape[2] >= WORTH_A_LOOK


def _padding(rows: Tensor, kv_len: int) -> AttnMask | None:
    """The key padding that a mask of keys [batch or 1, kv_len or 1] is, or None: keys that are seen lie together, and what is added is 0
    for them and hides the others."""
    if rows.shape[1] != kv_len:
        return None
    import numpy as np

    # By numpy, whose operations on so little take a fifth of torch's time; it has no bfloat16.
    seen = given = (rows.float() if rows.dtype is torch.bfloat16 else rows).detach().resolve_neg().numpy()
    if rows.dtype is not torch.bool:
        seen = given == 0
        hides = (given == -np.inf) | ((given == torch.finfo(rows.dtype).min) & seen.any(1, keepdims=True))
        if not (seen | hides).all():
            return None
    count, first = seen.sum(1), seen.argmax(1)
    key, end = np.arange(kv_len), first + count
    if not (((key >= first[:, None]) & (key < end[:, None])) == seen).all():
        return None
    return lengths(torch.from_numpy(end), torch.from_numpy(first) if first.any() else None)

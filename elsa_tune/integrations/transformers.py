"""transformers: ``attn_implementation="elsa"``, which is told what a mask means and not only what it holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from inspect import signature
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from elsa_tune import masks, scores
from elsa_tune.dispatch import meaning, passes, serving
from elsa_tune.dispatch.attention import attention, served
from elsa_tune.dispatch.rows import Rows, Seen
from elsa_tune.dispatch.varlen import attention_varlen
from elsa_tune.errors import WrongArguments
from elsa_tune.generate import incumbent
from elsa_tune.generate.tensors import needs_grad
from elsa_tune.integrations import offloaded
from elsa_tune.integrations.deferred import Deferred
from elsa_tune.integrations.offloaded import OffloadedCache as OffloadedCache
from elsa_tune.integrations.offloaded import Parted
from elsa_tune.masks import CAUSAL, NONE, AttnMask

NAME = "elsa"

PAIRS = 1 << 24
"""(query, key) pairs of which a mask function is asked at once, a byte each."""

_attentions: Any = AttentionInterface  # whose methods have no types
_masks: Any = AttentionMaskInterface
_torchs: Callable[..., tuple[Tensor, None]] = _attentions()["sdpa"]
_by_torch: Callable[..., Tensor | None] = _masks()["sdpa"]


def register() -> None:
    """Let every model of this process be loaded, or set, with ``attn_implementation="elsa"``. Nothing else changes, and doing it again
    changes nothing."""
    _attentions.register(NAME, attend)
    _masks.register(NAME, mask)


class Mask(Deferred):
    """The bools [batch, 1, q_len, kv_len] of a mask, made where anybody but attend() wants them."""

    seen: Seen


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **named: Any,
) -> Tensor | None:  # fmt: skip
    """transformers' mask interface: a Mask where the keys that a query sees lie together but for padding, which ``mask_function`` is asked
    of every pair; bools [batch, 1, q_len, kv_len] elsewhere; None where attention needs no mask but causality."""
    asked = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask,
    )  # fmt: skip
    device = torch.device(named.get("device", "cpu"))
    if _is_watched(device.type == "cuda") or not q_length or not kv_length:
        return _by_torch(**asked, **named)
    asked["q_offset"] = q_offset = int(q_offset)  # of a static cache a tensor, which is written to before anybody looks
    rows = _rows(asked, named, device)
    if rows is None:
        return _by_torch(**asked, **named)
    seen = Seen(rows, _tokens(attention_mask, kv_offset, kv_length))
    if _needs_none(seen, kv_length, q_length, **named):
        return None
    always = named | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Mask = Mask(
        partial(_made, asked | always), (batch_size, 1, q_length, kv_length), torch.bool, device
    )  # fmt: skip
    made.seen = seen
    return made


def _made(asked: dict[str, Any]) -> Tensor:
    """The bools themselves."""
    bools = _by_torch(**asked)
    assert bools is not None  # None was not allowed
    return bools


def _is_watched(on_gpu: bool) -> bool:
    """Whether a compiler, a tracer or fake tensors follow what is done, or a graph is being captured: contents cannot be asked for."""
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()
    return bool(followed) or (on_gpu and torch.cuda.is_current_stream_capturing())


def _rows(asked: dict[str, Any], named: dict[str, Any], device: torch.device) -> Rows | None:
    """What the mask function lets through, padding apart."""
    q_len, kv_len, function = asked["q_length"], asked["kv_length"], asked["mask_function"]
    if function is causal_mask_function:
        return Rows.causal(q_len, kv_len, asked["q_offset"] - asked["kv_offset"], device)
    if function is bidirectional_mask_function:
        return Rows.every(q_len, kv_len, device)
    step = max(1, PAIRS // max(1, kv_len * asked["batch_size"]))
    always = named | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def pieces() -> Iterator[Tensor]:
        for first in range(0, q_len, step):
            some = dict(q_length=min(step, q_len - first), q_offset=asked["q_offset"] + first, attention_mask=None)
            seen = _made(asked | some | always)
            yield (seen[:1] if seen.stride(0) == 0 else seen)[:, 0]

    return Rows.of(pieces()) if q_len else None


def _tokens(attention_mask: Tensor | None, kv_offset: int, kv_len: int) -> Tensor | None:
    """bool [batch, kv_len], true where a key is a token; None where all are."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_len - attention_mask.shape[-1]
    padded = torch.nn.functional.pad(attention_mask.bool(), (0, missing)) if missing > 0 else attention_mask.bool()
    tokens = padded[:, kv_offset : kv_offset + kv_len]
    return None if bool(tokens.all()) else tokens


def _needs_none(
    seen: Seen, kv_len: int, q_len: int, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False,
    **named: Any,
) -> bool:  # fmt: skip
    """Whether attention without a mask does what is wanted, and who calls takes that for an answer."""
    if seen.tokens is not None or seen.rows.reach != (0, kv_len):
        return False
    closed = seen.rows.closed
    if closed is NONE:
        return allow_is_bidirectional_skip or (allow_is_causal_skip and q_len == 1)
    return allow_is_causal_skip and q_len == kv_len and str(closed) == str(CAUSAL)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None, softcap: float | None = None,
    position_bias: Tensor | None = None, s_aux: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [batch, heads, q_len, head_dim], key and value [batch, kv_heads, kv_len, dim]; the output is
    [batch, q_len, heads, value_dim], contiguous, and there are no weights.

    Scores are capped (``softcap``), get ``position_bias``, broadcastable to [batch, heads, q_len, kv_len], and one more key, ``s_aux``
    [heads]. ``cu_seq_lens_q`` and ``_k`` say where sequences begin that are packed into one. Where no kernel of ours serves, transformers'
    own "sdpa" does. Raises WrongArguments for what means something to the model's own attention and cannot be done.
    """
    _refuse(module, named)
    grouped, q_len = query.shape[1] != key.shape[1], query.shape[2]
    causal = q_len > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    seen = attention_mask.seen if isinstance(attention_mask, Mask) and not attention_mask.is_held else None
    if isinstance(attention_mask, Deferred) and seen is None:
        attention_mask = attention_mask.made()
    hidden, added = _split(attention_mask if seen is None else None, position_bias)
    if _is_watched(query.is_cuda):
        wanted = _together(NONE if hidden is None else masks.dense(hidden), added, softcap, s_aux)
        top_left = causal and attention_mask is None
        output = attention(query, key, value, None if wanted is NONE else wanted, dropout, top_left, scaling, grouped)
        return output.transpose(1, 2).contiguous(), None
    if isinstance(key, Parted) and not dropout:
        if attention_mask is None and causal:
            seen = Seen(Rows.causal(q_len, key.shape[2], device=query.device))
        asked = partial(_of_part, seen, hidden, added, softcap)
        return offloaded.attend(query, key.parts, asked, s_aux, scaling).transpose(1, 2).contiguous(), None
    first, end = 0, key.shape[2]
    if seen is not None:
        first, end = seen.rows.reach
    elif attention_mask is None and causal:
        end = min(end, q_len)
    keys, values = (x if (first, end) == (0, x.shape[2]) else x[:, :, first:end] for x in (key, value))
    added = added if added is None else _of_keys(added, first, end)
    wanted = _together(_mask(seen, hidden, causal and attention_mask is None, query, key), added, softcap, s_aux)
    packed = None
    if added is None and not dropout and (attention_mask is None or (seen is not None and seen.tokens is None)):
        told = cu_seq_lens_q, cu_seq_lens_k, named.get("sliding_window")
        packed = _packed(*told, causal) or (seen and seen.packed(len(query)))
    if packed:
        tokens, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (query, keys, values))
        cu_q, cu_k, within = packed
        within = _together(within, None, softcap, s_aux)
        flat = attention_varlen(tokens, keys, values, cu_q, cu_k, within, scaling, grouped)
        return flat.view(len(query), q_len, *flat.shape[1:]), None
    begin = perf_counter()
    answer = None if dropout else _by_ours(query, keys, values, wanted, scaling, grouped)
    if answer is None and softcap is None and s_aux is None:
        given = attention_mask.made() if isinstance(attention_mask, Deferred) else attention_mask
        with incumbent.aside():
            output, _ = _torchs(
                module, query, key, value, given, dropout, scaling, is_causal, position_bias=position_bias, **named
            )
        if not dropout:
            serving.find(query, keys, values, wanted, grouped).row.count(begin)
        return output, None
    if answer is None:
        answer = attention(query, keys, values, wanted, dropout, False, scaling, grouped)
    return answer.transpose(1, 2).contiguous(), None


def _by_ours(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, grouped: bool
) -> Tensor | None:
    """The output by a kernel that is ready, with gradients where it saves what they are computed from; None where torch must answer."""
    if not (torch.is_grad_enabled() and needs_grad(query, key, value, *wanted.tensors)):
        return served(query, key, value, wanted, scale, grouped)
    if needs_grad(*wanted.tensors) or not passes.has_backward(query, key, value, wanted, scale, grouped):
        return None
    return attention(query, key, value, None if wanted is NONE else wanted, scale=scale, enable_gqa=grouped)


def _mask(seen: Seen | None, hidden: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> AttnMask:
    if seen is not None:
        return seen.attn_mask
    if hidden is not None:
        return meaning.of(hidden, False, query, key) or masks.dense(hidden)
    return CAUSAL if causal else NONE


def _packed(
    cu_q: Tensor | None, cu_k: Tensor | None, wide: int | None, causal: bool
) -> tuple[Tensor, Tensor, AttnMask] | None:
    """Sequences as flash attention is told of them: where they begin and end, of queries and of keys, and what is seen within each, of
    which the last query sees the last key."""
    if cu_q is None or cu_k is None:
        return None
    late = not torch.equal(cu_q, cu_k)
    within = masks.causal(late) if causal else NONE
    return cu_q, cu_k, within if wide is None else within & masks.window(wide - 1, 0 if causal else wide - 1, late)


def _of_part(
    seen: Seen | None, hidden: Tensor | None, added: Tensor | None, softcap: float | None, first: int, end: int
) -> tuple[int, int, AttnMask] | None:
    """The keys from ``first`` to before ``end`` that are seen, and the mask for them; None where none are."""
    mask = NONE if hidden is None else masks.dense(hidden[..., first:end])
    if seen is not None:
        part = seen.of_keys(first, end)
        if part.is_nothing:
            return None
        mask, (first, end) = part.attn_mask, (first + bound for bound in part.rows.reach)
    return first, end, _together(mask, added if added is None else _of_keys(added, first, end), softcap, None)


def _of_keys(added: Tensor, first: int, end: int) -> Tensor:
    return added if added.shape[-1] == 1 else added[..., first:end]


def _split(attention_mask: Tensor | None, position_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a mask of bools hides, and what is added to scores."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask, position_bias
    return None, attention_mask if position_bias is None else position_bias + attention_mask


def _together(mask: AttnMask, added: Tensor | None, softcap: float | None, s_aux: Tensor | None) -> AttnMask:
    """The mask, and what is done to scores in transformers' order."""
    chain = mask if softcap is None else mask & scores.softcap(softcap)
    chain = chain if added is None else chain & scores.bias(added)
    return chain if s_aux is None else chain & scores.sinks(s_aux)


def _refuse(module: torch.nn.Module, named: dict[str, Any]) -> None:
    """Raise WrongArguments for what the model's own attention would heed, and nobody here does."""
    if named.get("output_attentions"):
        raise WrongArguments(
            "output_attentions is true, and no fused attention has weights; load with attn_implementation='eager'"
        )
    for name in _heeded(type(module)):
        if named.get(name) is not None:
            raise WrongArguments(
                f"{name} is given to {type(module).__name__}, which elsa-tune does not know; load with attn_implementation='eager'"
            )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _heeded(kind: type) -> frozenset[str]:
    """What the attention that a model is written with reads by name, beyond what attend() does."""
    return _heeded_by(kind)


@lru_cache(maxsize=256)
def _heeded_by(kind: type) -> frozenset[str]:
    eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
    known = {*signature(attend).parameters, "sliding_window"}  # which a mask says, too
    return frozenset(signature(eager).parameters) - known if eager is not None else frozenset()

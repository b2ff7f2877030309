"""transformers: ``attn_implementation="elsa"``, which is told what a mask means and not only what it holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from inspect import signature
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
from elsa_tune.integrations.offloaded import Parted, States
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
    if _is_watched(device.type != "cpu") or not q_length or not kv_length:
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
    call = _Call.of(module, query, key, value, attention_mask, is_causal, position_bias, softcap, s_aux, scaling)
    told = cu_seq_lens_q, cu_seq_lens_k, named.get("sliding_window")
    if _is_watched(not query.is_cpu):
        output = call.recorded(dropout)
    elif dropout:
        output = None
    elif isinstance(key, Parted):
        output = call.in_parts(key.parts)
    elif (packed := call.packed(*told)) is not None:
        output = call.in_sequences(*packed)
    else:
        output = call.by_ours()
    if output is None and call.is_torchs:
        given = attention_mask.made() if isinstance(attention_mask, Deferred) else attention_mask
        with nullcontext() if dropout else call.left_to_torch(), incumbent.aside():
            return _torchs(
                module, query, key, value, given, dropout, scaling, is_causal, position_bias=position_bias, **named
            )
    output = call.by_operations(dropout) if output is None else output
    return output.transpose(1, 2).contiguous(), None


@dataclass(eq=False)
class _Call:
    """One call of a model's attention. Which keys are seen is told by rows (``seen``), by bools (``hidden``), or is all up to a query's own
    (``causal``), or all; what is done to scores, in transformers' order: a cap, what is ``added``, sinks. ``directed``: whether the model's
    queries see what comes before them alone, whoever tells it."""

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Seen | None
    hidden: Tensor | None
    directed: bool
    causal: bool
    added: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None

    @classmethod
    def of(
        cls, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        is_causal: bool | None, position_bias: Tensor | None, softcap: float | None, sinks: Tensor | None, scale: float | None,
    ) -> _Call:  # fmt: skip
        """What the arguments mean; a mask of floats is added."""
        seen = attention_mask.seen if isinstance(attention_mask, Mask) and not attention_mask.is_held else None
        hidden, added = None, position_bias
        directed = query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if attention_mask is not None and seen is None:
            plain = attention_mask.made() if isinstance(attention_mask, Deferred) else attention_mask
            if plain.dtype == torch.bool:
                hidden = plain
            else:
                added = plain if position_bias is None else position_bias + plain
        causal = directed and attention_mask is None
        return cls(query, key, value, seen, hidden, directed, causal, added, softcap, sinks, scale)

    @property
    def grouped(self) -> bool:
        """Whether heads of the query share those of key and value."""
        return self.query.shape[1] != self.key.shape[1]

    @property
    def is_torchs(self) -> bool:
        """Whether torch's function does what is done to scores."""
        return self.softcap is None and self.sinks is None

    def scored(self, mask: AttnMask, added: Tensor | None, sinks: Tensor | None) -> AttnMask:
        """The mask with what is done to scores."""
        chain = mask if self.softcap is None else mask & scores.softcap(self.softcap)
        chain = chain if added is None else chain & scores.bias(added)
        return chain if sinks is None else chain & scores.sinks(sinks)

    def recorded(self, dropout: float) -> Tensor:
        """For a compiler to follow."""
        mask = self.scored(NONE if self.hidden is None else masks.dense(self.hidden), self.added, self.sinks)
        given = None if mask is NONE else mask
        return attention(self.query, self.key, self.value, given, dropout, self.causal, self.scale, self.grouped)

    def in_parts(self, parts: list[States]) -> Tensor:
        """Each part of the keys where it is."""
        if self.causal:
            self.seen = Seen(Rows.causal(self.query.shape[2], self.key.shape[2], device=self.query.device))
        return offloaded.attend(self.query, parts, self._of_part, self.sinks, self.scale)

    def _of_part(self, first: int, end: int) -> tuple[int, int, AttnMask] | None:
        mask = NONE if self.hidden is None else masks.dense(self.hidden[..., first:end])
        if self.seen is not None:
            part = self.seen.of_keys(first, end)
            if part.is_nothing:
                return None
            mask, (first, end) = part.attn_mask, (first + bound for bound in part.rows.reach)
        return first, end, self.scored(mask, _of_keys(self.added, first, end), None)

    @cached_property
    def _reach(self) -> tuple[int, int]:
        """The keys that are seen at all, from and to before: of a static cache those that are used."""
        if self.seen is not None:
            return self.seen.rows.reach
        return 0, min(self.key.shape[2], self.query.shape[2]) if self.causal else self.key.shape[2]

    @cached_property
    def _within(self) -> tuple[Tensor, Tensor, AttnMask]:
        """Keys and values within reach, and the mask for them."""
        key, value = (_within(x, *self._reach) for x in (self.key, self.value))
        if self.seen is not None:
            mask = self.seen.attn_mask
        elif self.hidden is not None:
            mask = meaning.of(self.hidden, False, self.query, key) or masks.dense(self.hidden)
        else:
            mask = CAUSAL if self.causal else NONE
        return key, value, self.scored(mask, _of_keys(self.added, *self._reach), self.sinks)

    def packed(
        self, cu_q: Tensor | None, cu_k: Tensor | None, wide: int | None
    ) -> tuple[Tensor, Tensor, AttnMask] | None:
        """Sequences that are packed into rows: where they begin and end, of queries and of keys, and what is seen within each. They are told
        as flash attention is told of them, where the last query sees the last key, or are seen in the mask; None where there are none."""
        if (
            self.added is not None
            or self.hidden is not None
            or (self.seen is not None and self.seen.tokens is not None)
        ):
            return None
        if cu_q is None or cu_k is None:
            return None if self.seen is None else self.seen.packed(len(self.query))
        late = not torch.equal(cu_q, cu_k)
        within = masks.causal(late) if self.directed else NONE
        around = 0 if self.directed else None if wide is None else wide - 1
        return cu_q, cu_k, within if wide is None else within & masks.window(wide - 1, around, late)

    def in_sequences(self, cu_q: Tensor, cu_k: Tensor, within: AttnMask) -> Tensor:
        """Each sequence on its own."""
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (self.query, *self._within[:2]))
        mask = self.scored(within, None, self.sinks)
        flat = attention_varlen(query, key, value, cu_q, cu_k, mask, self.scale, self.grouped)
        return flat.view(len(self.query), -1, *flat.shape[1:]).transpose(1, 2)

    def by_ours(self) -> Tensor | None:
        """By a kernel that is ready, with gradients where it saves what they are computed from; None where torch must answer."""
        query, (key, value, mask) = self.query, self._within
        if not (torch.is_grad_enabled() and needs_grad(query, key, value, *mask.tensors)):
            return served(query, key, value, mask, self.scale, self.grouped)
        if needs_grad(*mask.tensors) or not passes.has_backward(query, key, value, mask, self.scale, self.grouped):
            return None
        return attention(query, key, value, None if mask is NONE else mask, scale=self.scale, enable_gqa=self.grouped)

    def by_operations(self, dropout: float) -> Tensor:
        """By torch's plain operations."""
        key, value, mask = self._within
        return attention(self.query, key, value, mask, dropout, False, self.scale, self.grouped)

    def left_to_torch(self) -> AbstractContextManager[None]:
        """Inside, torch answers what a kernel of ours might."""
        key, value, mask = self._within
        return serving.left_to_torch(self.query, key, value, mask, self.grouped)


def _within(x: Tensor, first: int, end: int) -> Tensor:
    return x if (first, end) == (0, x.shape[2]) else x[:, :, first:end]


def _of_keys(added: Tensor | None, first: int, end: int) -> Tensor | None:
    return added if added is None or added.shape[-1] == 1 else added[..., first:end]


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

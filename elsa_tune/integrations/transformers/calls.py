"""One call of a model's attention: what its arguments mean, and who answers it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from elsa_tune import masks, scores
from elsa_tune.dispatch import meaning, serving
from elsa_tune.dispatch.attention import attention, is_differentiable, served
from elsa_tune.dispatch.varlen import attention_varlen
from elsa_tune.errors import WrongArguments, shown
from elsa_tune.generate import incumbent
from elsa_tune.generate.tensors import needs_grad
from elsa_tune.integrations.deferred import Deferred
from elsa_tune.integrations.transformers import offloaded
from elsa_tune.integrations.transformers.masks import Mask, is_watched
from elsa_tune.integrations.transformers.offloaded import Parted, States
from elsa_tune.integrations.transformers.rows import Rows, Seen
from elsa_tune.masks import CAUSAL, NONE, AttnMask

_interface: Any = AttentionInterface  # whose methods have no types
_sdpa: Callable[..., tuple[Tensor, None]] = _interface()["sdpa"]


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
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    call = _Call.of(query, key, value, attention_mask, is_causal, position_bias, softcap, s_aux, scaling)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        call = call.of_sequences(cu_seq_lens_q, cu_seq_lens_k)
    if is_watched(not query.is_cpu):
        output = call.recorded(dropout)
    elif dropout:
        output = None
    elif isinstance(key, Parted):
        output = call.in_parts(key.parts)
    else:
        output = call.in_sequences()
        output = call.by_ours() if output is None else output
    if output is None and call.is_torchs:
        with nullcontext() if dropout else call.left_to_torch(), incumbent.aside():
            given, is_causal = call.torchs_mask()
            return _sdpa(
                module, query, key, value, given, dropout, scaling, is_causal, position_bias=position_bias, **named
            )
    output = call.by_operations(dropout) if output is None else output
    return output.transpose(1, 2).contiguous(), None


@dataclass(eq=False)
class _Call:
    """One call of a model's attention. Which keys are seen is told by rows (``seen``), by bools (``hidden``), or is all up to a query's own
    (``causal``), or all; what is done to scores, in transformers' order: a cap, what is ``added``, sinks. ``given`` is transformers' mask that
    says so."""

    query: Tensor
    key: Tensor
    value: Tensor
    given: Tensor | None
    seen: Seen | None
    hidden: Tensor | None
    causal: bool
    added: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool,
        position_bias: Tensor | None, softcap: float | None, sinks: Tensor | None, scale: float | None,
    ) -> _Call:  # fmt: skip
        """What the arguments mean; a mask of floats is added. Raises WrongArguments for masks of other kinds."""
        seen, hidden, added, given = None, None, position_bias, attention_mask
        if isinstance(given, Mask) and not given.is_held and given.shape[2:] == (query.shape[2], key.shape[2]):
            seen = given.seen
        elif given is not None:
            given = given.made() if isinstance(given, Deferred) else given
            if given.dtype == torch.bool:
                hidden = given
            elif given.is_floating_point():
                added = given if position_bias is None else position_bias + given
            else:
                raise WrongArguments(f"attention_mask is {given.dtype}; it must be torch.bool or of floats")
        causal = is_causal and given is None and query.shape[2] > 1
        return cls(query, key, value, given, seen, hidden, causal, added, softcap, sinks, scale)

    def of_sequences(self, cu_q: Any, cu_k: Any) -> _Call:
        """The same within sequences that are packed into one row, which begin and end at ``cu_q`` and ``cu_k``, whole numbers [sequences + 1],
        as flash attention has it: of each the last query sees the last key. Raises WrongArguments."""
        cu = {"cu_seq_lens_q": cu_q, "cu_seq_lens_k": cu_k}
        if wrong := [name for name, x in cu.items() if not isinstance(x, Tensor) or x.dim() != 1 or not len(x)]:
            raise WrongArguments(
                f"{wrong[0]} is {shown(cu[wrong[0]])}; it must be a tensor [sequences + 1], as the other"
            )
        if len(cu_q) != len(cu_k) or len(self.query) != 1:
            raise WrongArguments(
                f"cu_seq_lens_q {list(cu_q.shape)} and cu_seq_lens_k {list(cu_k.shape)} of query {list(self.query.shape)} must be as"
                " many, of a batch of 1"
            )
        position = torch.arange(self.query.shape[2], device=self.query.device)
        sequence = torch.bucketize(position, cu_q[1:-1].to(position), right=True)
        first, end, last = (x.to(position)[sequence][None] for x in (cu_k[:-1], cu_k[1:], cu_q[1:]))
        high = torch.maximum(first, position + 1 + end - last) if self.causal else end
        if is_watched(not self.query.is_cpu) or (self.seen is None and self.given is not None):
            key = torch.arange(self.key.shape[2], device=self.query.device)
            return self._but_for((key < first[..., None]) | (key >= high[..., None]))
        rows = (
            Rows.every(self.query.shape[2], self.key.shape[2], self.query.device)
            if self.seen is None
            else self.seen.rows
        )
        within = rows.between(first, high)
        if within is None:
            raise WrongArguments(
                "cu_seq_lens_q, cu_seq_lens_k and the mask leave queries between others without any key; give each a key, or leave the mask out"
            )
        return replace(self, given=None, seen=Seen(within, self.seen.tokens if self.seen else None), causal=False)

    def _but_for(self, others: Tensor) -> _Call:
        """The same without pairs of bools [1, q_len, kv_len]."""
        if self.given is not None and self.given.is_floating_point():
            given = self.given.masked_fill(others[:, None], -torch.inf)
        else:
            given = ~others[:, None] if self.given is None else self.given & ~others[:, None]
        hidden = ~others[:, None] if self.hidden is None else self.hidden & ~others[:, None]
        return replace(self, given=given, hidden=hidden, causal=False)

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
        call = self
        if self.causal:
            rows = Rows.causal(self.query.shape[2], self.key.shape[2], device=self.query.device)
            call = replace(self, seen=Seen(rows), causal=False)
        return offloaded.attend(self.query, parts, call._of_part, self.sinks, self.scale)

    def _added(self, first: int, end: int) -> Tensor | None:
        return None if self.added is None else _of_keys(self.added, first, end)

    def _of_part(self, first: int, end: int) -> tuple[int, int, AttnMask] | None:
        mask = NONE if self.hidden is None else masks.dense(_of_keys(self.hidden, first, end))
        if self.seen is not None:
            part = self.seen.of_keys(first, end)
            if part.is_nothing:
                return None
            mask, (first, end) = part.attn_mask, (first + bound for bound in part.rows.reach)
        return first, end, self.scored(mask, self._added(first, end), None)

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
        return key, value, self.scored(mask, self._added(*self._reach), self.sinks)

    def in_sequences(self) -> Tensor | None:
        """Each on its own of sequences that are packed into rows; None where there are none, or scores differ in them."""
        packed = self.seen.packed(len(self.query)) if self.seen is not None and self.added is None else None
        if packed is None:
            return None
        cu_q, cu_k, within = packed
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (self.query, *self._within[:2]))
        mask = self.scored(within, None, self.sinks)
        flat = attention_varlen(query, key, value, cu_q, cu_k, mask, self.scale, self.grouped)
        return flat.view(len(self.query), -1, *flat.shape[1:]).transpose(1, 2)

    def by_ours(self) -> Tensor | None:
        """By a kernel that is ready, with gradients where it saves what they are computed from; None where torch must answer."""
        query, (key, value, mask) = self.query, self._within
        if not (torch.is_grad_enabled() and needs_grad(query, key, value, *mask.tensors)):
            return served(query, key, value, mask, self.scale, self.grouped)
        if not is_differentiable(query, key, value, mask, self.scale, self.grouped):
            return None
        return attention(query, key, value, None if mask is NONE else mask, scale=self.scale, enable_gqa=self.grouped)

    def by_operations(self, dropout: float) -> Tensor:
        """By torch's plain operations."""
        key, value, mask = self._within
        return attention(self.query, key, value, mask, dropout, False, self.scale, self.grouped)

    def torchs_mask(self) -> tuple[Tensor | None, bool]:
        """The mask that transformers' own attention is given, and whether it is causal without one."""
        if self.seen is None:
            return self.given, self.causal
        mask = self.seen.attn_mask
        if mask is CAUSAL and self._reach[0] == 0:
            return None, True
        if mask is NONE and self._reach == (0, self.key.shape[2]):
            return None, False
        if isinstance(self.given, Mask):
            return self.given.made(), False
        return self.seen.dense(len(self.query), self.key.shape[2]), False

    def left_to_torch(self) -> AbstractContextManager[None]:
        """Inside, torch answers what a kernel of ours might."""
        key, value, mask = self._within
        return serving.left_to_torch(self.query, key, value, mask, self.grouped)


def _within(x: Tensor, first: int, end: int) -> Tensor:
    return x if (first, end) == (0, x.shape[2]) else x[:, :, first:end]


def _of_keys(x: Tensor, first: int, end: int) -> Tensor:
    return x if x.shape[-1] == 1 else x[..., first:end]


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

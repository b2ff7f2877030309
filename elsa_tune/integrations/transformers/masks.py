"""What a mask of transformers means: its function is asked, and bools are made only for those who look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from elsa_tune.errors import WrongArguments
from elsa_tune.integrations.deferred import Deferred
from elsa_tune.integrations.transformers.rows import Rows, Seen
from elsa_tune.masks import NONE

PAIRS = 1 << 24
"""(query, key) pairs of which a mask function is asked at once, a byte each."""

_interface: Any = AttentionMaskInterface  # whose methods have no types
_sdpa_mask: Callable[..., Tensor | None] = _interface()["sdpa"]


class Mask(Deferred):
    """The bools [batch, 1, q_len, kv_len] of a mask, made where anybody but attend() wants them."""

    seen: Seen


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, config: Any = None, **named: Any,
) -> Tensor | None:  # fmt: skip
    """transformers' mask interface: a Mask where the keys that a query sees lie together but for padding, which ``mask_function`` is asked
    of every pair; bools [batch, 1, q_len, kv_len] elsewhere; None where all keys are seen, and who calls takes that for an answer. Raises
    WrongArguments for an ``attention_mask`` that is not [batch, tokens]."""
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[0] not in (1, batch_size)):
        raise WrongArguments(f"attention_mask is {list(attention_mask.shape)}; it must be [{batch_size}, tokens]")
    asked = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False, **named,
    )  # fmt: skip
    device = torch.device(named.get("device", "cpu"))
    if is_watched(device.type != "cpu") or not q_length or not kv_length:
        trusted = _tells_causality(type(config))
        asked["allow_is_causal_skip"] = allow_is_causal_skip and trusted
        return _sdpa_mask(**asked, allow_is_bidirectional_skip=allow_is_bidirectional_skip and trusted)
    asked["q_offset"] = int(q_offset)  # of a static cache a tensor, which is written to before anybody looks
    rows = _rows(asked, device)
    if rows is None:
        return _sdpa_mask(**asked)
    seen = Seen(rows, _tokens(attention_mask, kv_offset, kv_length))
    may_be_none = (
        q_length == 1 if allow_is_causal_skip else allow_is_bidirectional_skip and _tells_causality(type(config))
    )
    if may_be_none and seen.tokens is None and rows.reach == (0, kv_length) and rows.closed is NONE:
        return None
    pairs = q_length * kv_length
    strides = (0 if seen.is_shared else pairs), pairs, kv_length, 1
    shape = batch_size, 1, q_length, kv_length
    made: Mask = Mask(partial(seen.dense, batch_size, kv_length), shape, torch.bool, device, strides)
    made.seen = seen
    return made


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tells_causality(kind: type) -> bool:
    """Whether attention modules of such a config's model say themselves that they are causal: those that transformers' "sdpa" may serve."""
    return _tells_causality_of(kind)


@lru_cache(maxsize=256)
def _tells_causality_of(kind: type) -> bool:
    from transformers import AutoModel

    try:
        model: Any = AutoModel._model_mapping[kind]
    except KeyError:
        return False
    return all(one._supports_sdpa for one in (model if isinstance(model, tuple) else (model,)))


def is_watched(on_gpu: bool) -> bool:
    """Whether a compiler, a tracer or fake tensors follow what is done, or a graph is being captured: contents cannot be asked for."""
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()
    return bool(followed) or (on_gpu and torch.cuda.is_current_stream_capturing())


def _rows(asked: dict[str, Any], device: torch.device) -> Rows | None:
    """What the mask function lets through, padding apart."""
    q_len, kv_len, function = asked["q_length"], asked["kv_length"], asked["mask_function"]
    if function is causal_mask_function:
        return Rows.causal(q_len, kv_len, asked["q_offset"] - asked["kv_offset"], device)
    if function is bidirectional_mask_function:
        return Rows.every(q_len, kv_len, device)
    step = max(1, PAIRS // (kv_len * asked["batch_size"]))

    def piece(first: int, count: int) -> Tensor:
        some = dict(q_length=count, q_offset=asked["q_offset"] + first, attention_mask=None)
        seen: Any = _sdpa_mask(**asked | some)
        one: Tensor = seen[:1] if seen.stride(0) == 0 else seen
        return one[:, 0]

    def pieces() -> Iterator[Tensor]:
        return (piece(first, min(step, q_len - first)) for first in range(0, q_len, step))

    band = Rows.band(piece(0, 1), piece(q_len - 1, 1), q_len, asked["q_offset"] - asked["kv_offset"])
    if band is not None and band.are(pieces()):
        return band
    return Rows.of(pieces())


def _tokens(attention_mask: Tensor | None, kv_offset: int, kv_len: int) -> Tensor | None:
    """bool [batch, kv_len], true where a key is a token; None where all are."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_len - attention_mask.shape[-1]
    padded = torch.nn.functional.pad(attention_mask.bool(), (0, missing)) if missing > 0 else attention_mask.bool()
    tokens = padded[:, kv_offset : kv_offset + kv_len]
    return None if bool(tokens.all()) else tokens

"""attention(query, key, value): look up, call; torch's own SDPA serves whatever no kernel of ours may.

The hot path is one dictionary look-up and one foreign call. Everything else happens once per shape.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad

from elsa_tune.dispatch import exactness, fallback, meaning, operator, passes, ragged, serving
from elsa_tune.dispatch.autograd import differentiable
from elsa_tune.dispatch.serving import entry_of
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.tensors import needs_grad, number
from elsa_tune.masks import CAUSAL, NONE, AttnMask

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack  # fake tensors, counters and tracers want to see torch's own call
_is_tracing = torch._C._is_tracing  # a recorded trace would hold the allocation of the output, and no kernel
_transforms = peek_interpreter_stack  # functorch's tensors have no memory of their own
_SCALES = frozenset((type(None), float))
_JAGGED = torch.jagged
_FUNCTIONALIZE = TransformType.Functionalize
_table = serving.table


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | AttnMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention, by the fastest kernel measured on this device.

    query [batch, heads, q_len, head_dim], key [batch, kv_heads, kv_len, head_dim], value [batch, kv_heads, kv_len,
    value_dim]; ``attn_mask`` is what torch takes, of any shape that broadcasts to [batch, heads, q_len, kv_len], or masks and scores
    of elsa_tune.masks and elsa_tune.scores, which intersect with ``is_causal``. Served by a tuned kernel where one is faster, and so are
    its gradients, those of scores' tensors too. Second derivatives and forward mode, also by torch.func, are exact and take memory that
    grows with lengths, where kernels serve both passes. Dropout is torch's, unless ``dropout_seed`` says which weights are left out, of tensors
    of four axes, not nested: elsa_tune.scores.dropout. Everything else, and every shape that is not tuned, goes to torch. The output's
    memory follows the query's. Raises what torch raises, and WrongArguments (a ValueError) for mistakes that torch's fused CPU kernel
    lets pass: key and value of different lengths, a mask together with is_causal, a mask on another device; for operands of masks and
    scores that do not fit; for a seed of more than 64 bits; and for a scale that no float can hold.
    """
    if dropout_seed is not None:
        attn_mask = meaning.with_dropout(attn_mask, dropout_p, dropout_seed, is_causal, query, key)
        dropout_p = 0.0
    if (
        not dropout_p
        and not _is_compiling()  # before what older compilers do not understand
        and (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        and type(is_causal) is bool is type(enable_gqa)
        and not _dispatch_modes()
        and not _is_tracing()
        and forward_ad._current_level < 0
        and _transforms() is None
    ):
        if type(scale) is int:
            scale = number("scale", scale)
        try:
            entry = entry_of(query, key, value, is_causal, enable_gqa)
            wanted: AttnMask | None = CAUSAL if is_causal else NONE
            if attn_mask is not None and (wanted := meaning.of(attn_mask, is_causal, query, key)):
                entry = (*entry, wanted.mask, wanted.score, wanted.numbers)
        except RuntimeError:  # nested tensors have no shape
            return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if wanted is None:
            return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if exactness.active:
            entry = (*entry, exactness.asked())
        found = _table.get(entry) or serving.decide(entry, query, key, value, wanted, enable_gqa)
        serve, begin = found.call, perf_counter()
        wanting = query.requires_grad or key.requires_grad or value.requires_grad
        of_operands = bool(wanted.operands) and needs_grad(*wanted.operands.values())
        needs = (wanting or of_operands) and _grad_enabled()
        is_ours = needs and found.problem and type(scale) in _SCALES and not _autocast()
        if is_ours and passes.keeps(query, key, value, wanted, scale, enable_gqa, serve is not None):
            return differentiable(query, key, value, wanted, scale, enable_gqa)[0]
        if serve is None:
            if found.problem and not _autocast():  # which would make another problem of it
                plain = attn_mask is None or (isinstance(attn_mask, Tensor) and type(attn_mask) in _PLAIN)
                by_torch: Callable[..., Tensor] = fallback.by_torch if plain else fallback.attend
                output = by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
                found.row.count(begin)
                return output
        elif not needs and type(scale) in _SCALES and not _autocast():
            try:
                output = serve(
                    query, key, value, scale, None, None, wanted.in_order(query, key) if wanted.operands else ()
                )
                found.row.count(begin)
                return output
            except WrongArguments:
                raise
            except Exception as error:  # no memory for splits, a failed launch
                serving.hand_over(error, query, key, value, wanted, enable_gqa)
    elif _is_compiling():
        return operator.recorded(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    elif (
        not dropout_p and (made := transformed(query, key, value, attn_mask, is_causal, scale, enable_gqa)) is not None
    ):
        return made[0]
    elif isinstance(query, Tensor) and query.layout is _JAGGED and not dropout_p:
        batches = _of_nested(query, key, value, meaning.of_ragged(attn_mask), is_causal, scale, enable_gqa)
        if batches is not None:
            return batches
    return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, and nobody else who must meet torch's own call."""
    at_work = forward_ad._current_level >= 0 or _transforms() is not None
    if not at_work or _dispatch_modes() or _is_tracing() or _autocast():
        return False
    stack = get_interpreter_stack() or ()
    return all(one.key() != _FUNCTIONALIZE for one in stack)


def transformed(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | AttnMask | None, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Output and log-sum-exp within torch.func and forward-mode differentiation; None elsewhere, and where torch must answer."""
    if not _is_transformed():
        return None
    if not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN and type(scale) in _SCALES):
        return None
    wanted: AttnMask | None = CAUSAL if is_causal else NONE
    if attn_mask is not None:
        wanted = meaning.of(attn_mask, is_causal, query, key)
    if wanted is None or serving.problem_of(query, key, value, wanted, enable_gqa) is None:
        return None
    return differentiable(query, key, value, wanted, scale, enable_gqa)


def _of_nested(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor | None:
    """Ragged batches as torch has them, nested tensors [batch, heads, ragged, dim]; None for others, and where torch's call must be seen."""
    batch = None if _watched() else ragged.opened(query, key, value)
    if batch is None:
        return None
    return ragged.closed(
        batch.attend(wanted & CAUSAL if is_causal else wanted, scale, enable_gqa, served, is_differentiable, attention),
        query,
    )


def _watched() -> bool:
    """Whether somebody follows the call who must meet torch's own: a compiler, a tracer, a dispatch mode, a transform."""
    followed = _is_compiling() or _dispatch_modes() or _is_tracing()
    return bool(followed or forward_ad._current_level >= 0 or _transforms() is not None)


def is_differentiable(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool
) -> bool:
    """Whether differentiable() is for such a call: of plain tensors, of which gradients are needed, and which nobody watches."""
    plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN and type(scale) in _SCALES
    of_operands = needs_grad(*wanted.operands.values())
    if (
        not plain
        or _autocast()
        or _watched()
        or not (_grad_enabled() and (of_operands or needs_grad(query, key, value)))
    ):
        return False
    found = serving.find(query, key, value, wanted, enable_gqa)
    serves = found.call is not None
    return bool(found.problem) and passes.keeps(query, key, value, wanted, scale, enable_gqa, serves)


def served(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool,
    lse: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The output by a kernel that is ready, which needs no gradients, or None; ``lse`` [batch, heads, q_len] receives the log-sum-exp."""
    plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN and type(scale) in _SCALES
    if (
        not plain
        or _autocast()
        or _watched()
        or (_grad_enabled() and needs_grad(query, key, value, *wanted.operands.values()))
    ):
        return None
    return serving.by_kernel(query, key, value, wanted, scale, enable_gqa, None, lse)

"""attention(query, key, value): look up, call; torch's own SDPA serves whatever no kernel of ours may.

The hot path is one dictionary look-up and one foreign call. Everything else happens once per shape.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from elsa_tune.device import Device, of_tensor, tf32_allowed
from elsa_tune.dispatch import exactness, fallback, handovers, meaning, ragged, shelf
from elsa_tune.dispatch.autograd import differentiable
from elsa_tune.dispatch.ladder import Choice
from elsa_tune.dispatch.shelf import MOST_SHAPES, Ready, Shelf
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.backends import Call, Gradients, Kernel, Operands
from elsa_tune.generate.tensors import needs_grad, number
from elsa_tune.masks import CAUSAL, NONE, AttnMask
from elsa_tune.order import joined, order_of
from elsa_tune.parts import element as elements
from elsa_tune.parts import operator as operators
from elsa_tune.parts.operand import Array
from elsa_tune.problem import Problem
from elsa_tune.remember import layers

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_FLOAT32 = torch.float32
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack  # fake tensors, counters and tracers want to see torch's own call
_is_tracing = torch._C._is_tracing  # a recorded trace would hold the allocation of the output, and no kernel
_transforms = torch._C._functorch.peek_interpreter_stack  # functorch's tensors have no memory of their own
_SCALES = frozenset((type(None), float))
_JAGGED = torch.jagged


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | AttnMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention, by the fastest kernel measured on this device.

    query [batch, heads, q_len, head_dim], key [batch, kv_heads, kv_len, head_dim], value [batch, kv_heads, kv_len,
    value_dim]; ``attn_mask`` is what torch takes, of any shape that broadcasts to [batch, heads, q_len, kv_len], or masks and scores
    of elsa_tune.masks and elsa_tune.scores, which intersect with ``is_causal``. Served by a tuned kernel where one is faster and no
    gradient is needed (without a tensor in masks and scores also gradients, on GPUs). Everything else, and every shape that is not
    tuned, goes to torch. The output's memory follows the query's. Raises what torch raises, and WrongArguments (a ValueError) for
    mistakes that torch's fused CPU kernel lets pass: key and value of different lengths, a mask together with is_causal, a
    mask on another device; for operands of masks and scores that do not fit; and for a scale that no float can hold.
    """
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
        operands: Operands = ()
        try:
            entry = _entry(query, key, value, is_causal, enable_gqa)
            wanted: AttnMask | None = CAUSAL if is_causal else NONE
            if attn_mask is not None and (wanted := meaning.of(attn_mask, is_causal, query, key)):
                entry = (*entry, wanted.mask, wanted.score, wanted.numbers)
        except RuntimeError:  # nested tensors have no shape
            return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if wanted is None:
            return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if exactness.active:
            entry = (*entry, exactness.asked())
        serve = _serving.get(entry)
        if serve is None:
            serve = _serving_for(entry, query, key, value, wanted, enable_gqa)
        if serve is _torch_serves and (
            attn_mask is None or (isinstance(attn_mask, Tensor) and type(attn_mask) in _PLAIN)
        ):
            return fallback.by_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if serve not in _OF_TORCH and type(scale) in _SCALES and not _autocast():
            if wanted.operands:
                operands = wanted.in_order(query, key)
            try:
                wanting = query.requires_grad or key.requires_grad or value.requires_grad
                if not (_grad_enabled() and (wanting or (operands and needs_grad(*operands)))):
                    return serve(query, key, value, scale, None, None, operands)
                gradients = _gradients_for(entry, query, key, value, wanted, enable_gqa)
                if gradients is not None:  # of families whose operands are numbers
                    return differentiable(query, key, value, scale, serve, gradients, operands)
            except WrongArguments:
                raise
            except Exception as error:  # no storage of its own (vmap), no memory for splits, a failed launch
                _hand_over(error, query, key, value, wanted, enable_gqa)
    elif isinstance(query, Tensor) and query.layout is _JAGGED and not dropout_p:
        output = _of_nested(query, key, value, meaning.of_ragged(attn_mask), is_causal, scale, enable_gqa)
        if output is not None:
            return output
    return fallback.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _of_nested(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor | None:
    """Ragged batches as torch has them, nested tensors [batch, heads, ragged, dim]; None for others, and where torch's call must be seen."""
    batch = None if _watched() else ragged.opened(query, key, value)
    if batch is None:
        return None
    return ragged.closed(
        batch.attend(wanted & CAUSAL if is_causal else wanted, scale, enable_gqa, served, attention), query
    )


def _watched() -> bool:
    """Whether somebody follows the call who must meet torch's own: a compiler, a tracer, a dispatch mode, a transform."""
    followed = _is_compiling() or _dispatch_modes() or _is_tracing()
    return bool(followed or forward_ad._current_level >= 0 or _transforms() is not None)


def served(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool,
    lse: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The output by a kernel that is ready, which needs no gradients, or None; ``lse`` [batch, heads, q_len] receives the log-sum-exp."""
    plain = type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN and type(scale) in _SCALES
    if not plain or _autocast() or _watched():
        return None
    entry = (*_entry(query, key, value, False, enable_gqa), wanted.mask, wanted.score, wanted.numbers)
    if exactness.active:
        entry = (*entry, exactness.asked())
    serve = _serving.get(entry) or _serving_for(entry, query, key, value, wanted, enable_gqa)
    if serve in _OF_TORCH:
        return None
    operands = wanted.in_order(query, key)
    if _grad_enabled() and needs_grad(query, key, value, *operands):
        return None
    try:
        return serve(query, key, value, scale, None, lse, operands)
    except WrongArguments:
        raise
    except Exception as error:
        _hand_over(error, query, key, value, wanted, enable_gqa)
        return None


def _hand_over(error: Exception, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> None:
    """Count that torch answers in a kernel's place."""
    with suppress(Exception):
        problem = problem_of(query, key, value, wanted, enable_gqa)
        handovers.note(problem.family if problem else "a tensor without memory of its own", error)


def _entry(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> _Key:
    """Where the tables keep what was decided for such tensors."""
    layout = (query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), is_causal, enable_gqa)
    if query.dtype is key.dtype is value.dtype is _FLOAT32 and query.is_cpu and key.is_cpu and value.is_cpu:
        return layout
    return layout, _place(query, key, value)


def _place(query: Tensor, key: Tensor, value: Tensor) -> object:
    """What decides on a GPU who serves, beside shapes: dtype, GPU, whether a graph is being captured, torch's setting."""
    if not (query.is_cuda and query.device == key.device == value.device and query.dtype is key.dtype is value.dtype):
        return query.dtype, key.dtype, value.dtype, query.device, key.device, value.device
    return query.dtype, query.device, torch.cuda.is_current_stream_capturing(), tf32_allowed()


def _mark() -> Call:
    def never(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor:
        raise AssertionError("a mark in the table, never called")

    return never


_torch_serves, _torch_decides = _mark(), _mark()
"""Marks in the table: tensors pose a problem that torch serves, or none, and torch may refuse them."""
_OF_TORCH = frozenset((_torch_serves, _torch_decides))

# Once per shape.

_Key = tuple[object, ...]
_serving: dict[_Key, Call] = {}
_gradients: dict[_Key, Gradients | None] = {}


def _serving_for(entry: _Key, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> Call:
    """Decide who serves a shape, and remember it."""
    before = _shelf
    like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (query, key, value)]

    def ready(kernel: Kernel | Gradients) -> None:
        if before is _shelf and isinstance(kernel, Kernel):  # nothing was tuned meanwhile
            _serving[entry] = kernel.bind(*like)

    problem = problem_of(query, key, value, wanted, enable_gqa)
    found, by_torch = _ready_kernel(problem, query, ready), _torch_serves if problem else _torch_decides
    if len(_serving) >= MOST_SHAPES:
        _serving.clear()
    return _serving.setdefault(entry, found.bind(query, key, value) if isinstance(found, Kernel) else by_torch)


def _gradients_for(
    entry: _Key, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool
) -> Gradients | None:
    """The kernel for a shape's gradients, if one is faster than torch's, decided once."""
    if entry not in _gradients:
        before = _shelf

        def ready(kernel: Kernel | Gradients) -> None:
            if before is _shelf and not isinstance(kernel, Kernel):
                _gradients[entry] = kernel

        problem = problem_of(query, key, value, wanted, enable_gqa)
        backward = problem.reshaped(direction="backward") if problem else None
        found = _ready_kernel(backward, query, ready)
        if len(_gradients) >= MOST_SHAPES:
            _gradients.clear()
        _gradients.setdefault(entry, None if isinstance(found, Kernel) else found)
    return _gradients[entry]


def _ready_kernel(problem: Problem | None, query: Tensor, ready: Ready) -> Kernel | Gradients | None:
    """A kernel that serves the problem now, or None; then ``ready`` is called if one is built later. Never raises."""
    try:
        device = of_tensor(query.device.type, query.device.index)
        return _shelf.kernel(problem, device, ready) if problem and device else None
    except Exception as error:  # dispatch never raises because of databases, compilers or caches
        _shelf.troubles[str(problem)] = f"{type(error).__name__}: {error}"
        handovers.note(problem.family if problem else "a device", error)
        return None


def problem_of(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask = NONE, enable_gqa: bool = False
) -> Problem | None:
    """The problem these tensors pose, or None if no kernel of ours is meant for such tensors.

    On a GPU, torch's setting that lets float32 matrix products use TF32 is read as the class tf32.
    """
    if not (query.dtype == key.dtype == value.dtype and query.dim() == key.dim() == value.dim() == 4):
        return None
    element = elements.of_dtype(query.dtype)
    if element is None or not query.device == key.device == value.device:
        return None
    batch, heads, q_len, head_dim = query.shape
    _, kv_heads, kv_len, value_dim = value.shape
    if key.shape != (batch, kv_heads, kv_len, head_dim) or value.shape[0] != batch or 0 in (*query.shape, *value.shape):
        return None
    if heads != kv_heads and (not enable_gqa or heads % kv_heads):
        return None
    rough = query.is_cuda and query.dtype == torch.float32 and tf32_allowed()
    captured = query.is_cuda and torch.cuda.is_current_stream_capturing()
    problem = Problem(
        dtype=element.name, precision="tf32" if rough else "", launch="graph" if captured else "eager",
        head_dim=head_dim, value_dim=value_dim,
        batch=batch, heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len,
        order=joined(*(order_of(x.shape, x.stride()) for x in (query, key, value))),
    )  # fmt: skip
    return problem if wanted is NONE else wanted.of(problem)


def asks_for(problem: Problem, device: Device) -> bool:
    """Whether a call of attention() can pose a problem of this family with tensors of the device."""
    own = problem.precision == problem.dtype or (device.is_gpu and problem.precision == "tf32")
    kept = problem.direction == "forward" or not any(isinstance(one, Array) for one in problem.declared)
    return kept and problem.operator == operators.SOFTMAX and own and (device.is_gpu or device.kind == "cpu")


_shelf = Shelf()


def refresh() -> None:
    """Forget what was read: the next call looks at the database again."""
    global _shelf
    with shelf.lock:
        _shelf = Shelf()
        _serving.clear()
        _gradients.clear()


layers.listeners.append(refresh)


def current() -> Shelf:
    """What this process has read and loaded since somebody tuned last."""
    return _shelf


def explain(problem: Problem, device: Device) -> Choice:
    """Which rung answers a problem, what the rungs before it said, and where torch had to answer in its place."""
    chosen = _shelf.explained(problem, device)
    return replace(chosen, steps=(*chosen.steps, *handovers.steps(problem.family)))

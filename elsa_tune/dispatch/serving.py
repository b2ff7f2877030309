"""Who serves tensors of one layout: decided once, and remembered."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from elsa_tune.device import Device, of_tensor, tf32_allowed
from elsa_tune.dispatch import exactness, handovers, ledger, notice, recording, shelf
from elsa_tune.dispatch.ladder import Choice
from elsa_tune.dispatch.ledger import Row
from elsa_tune.dispatch.shelf import MOST_SHAPES, Ready, Shelf
from elsa_tune.errors import WrongArguments
from elsa_tune.generate.backends import Call, Gradients, Kernel
from elsa_tune.masks import NONE, AttnMask
from elsa_tune.order import joined, order_of
from elsa_tune.parts import element as elements
from elsa_tune.parts import operator as operators
from elsa_tune.problem import Problem
from elsa_tune.remember import layers

_FLOAT32 = torch.float32


def entry_of(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> Key:
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


@dataclass(slots=True, eq=False)
class Serving:
    """Who serves tensors of one layout, and where that is counted. ``problem`` is None where the tensors pose none, and torch may refuse
    them; ``kernel``, and its ``call`` for the layout, where torch's own serves."""

    problem: Problem | None
    row: Row
    kernel: Kernel | None = None
    call: Call | None = None


def _serving(
    problem: Problem | None, place: torch.device, variant: str = ledger.TORCH, kernel: Kernel | None = None,
    call: Call | None = None,
) -> Serving:  # fmt: skip
    return Serving(problem, ledger.row(problem or "no problem of ours", variant, _spelled(place)), kernel, call)


def _spelled(place: torch.device) -> str:
    return str(of_tensor(place.type, place.index) or place)


def row_nearby(problem: Problem, place: torch.device) -> Row:
    """Where torch's calls of problems are counted that are served as this one is, but for their length of keys."""
    return ledger.row(problem.nearby, ledger.TORCH, _spelled(place))


Key = tuple[object, ...]
table: dict[Key, Serving] = {}
_backward: dict[Key, Backward] = {}
changes = 0
"""How often what was decided may have changed."""
listeners: list[Callable[[], object]] = []
"""Called when what was decided may no longer hold: somebody tuned, or a kernel was built beside the calls."""


def find(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> Serving:
    """Who serves such tensors and such a mask, decided now or before."""
    entry = _entry(query, key, value, wanted, enable_gqa)
    return table.get(entry) or decide(entry, query, key, value, wanted, enable_gqa)


def by_kernel(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, enable_gqa: bool,
    out: Tensor | None = None, lse: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The output by a kernel that is ready, or None: of plain tensors whose gradients, if any, are somebody else's. ``lse`` [batch, heads,
    q_len] receives the log-sum-exp."""
    found = find(query, key, value, wanted, enable_gqa)
    if found.call is None:
        return None
    operands, begin = wanted.in_order(query, key), perf_counter()
    try:
        output = found.call(query, key, value, scale, out, lse, operands)
    except WrongArguments:
        raise
    except Exception as error:
        hand_over(error, query, key, value, wanted, enable_gqa)
        return None
    found.row.count(begin)
    return output


@contextmanager
def left_to_torch(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> Iterator[None]:
    """Inside, torch answers such a call, and is counted if no kernel of ours was to."""
    found, begin = find(query, key, value, wanted, enable_gqa), perf_counter()
    yield
    if found.problem and found.call is None:
        found.row.count(begin)


def hand_over(error: Exception, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> None:
    """Count that torch answers in a kernel's place."""
    with suppress(Exception):
        problem = problem_of(query, key, value, wanted, enable_gqa)
        handovers.note(problem.family if problem else "a tensor without memory of its own", error)


def _entry(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> Key:
    entry: Key = (*entry_of(query, key, value, False, enable_gqa), wanted.mask, wanted.score, wanted.numbers)
    return (*entry, exactness.asked()) if exactness.active else entry


def decide(entry: Key, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> Serving:
    """Who serves such tensors, remembered under ``entry``."""
    before = _shelf
    like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (query, key, value)]

    def ready(variant: str, kernel: Kernel | Gradients) -> None:
        if before is _shelf and isinstance(kernel, Kernel):  # nothing was tuned meanwhile
            table[entry] = _serving(problem, query.device, variant, kernel, kernel.bind(*like))
            tell()

    notice.begin()
    problem = problem_of(query, key, value, wanted, enable_gqa)
    variant, found = _ready_kernel(problem, query, ready)
    if len(table) >= MOST_SHAPES:
        table.clear()
    serving = _serving(problem, query.device)
    if isinstance(found, Kernel):
        serving = _serving(problem, query.device, variant, found, found.bind(query, key, value))
    return table.setdefault(entry, serving) if before is _shelf else serving


@dataclass(frozen=True, slots=True)
class Backward:
    """Who computes the gradients of tensors of one layout, and where that is counted. ``problem`` is None where the tensors pose none,
    ``gradients`` where no kernel of ours is ready."""

    problem: Problem | None
    row: Row
    gradients: Gradients | None = None


def backward_for(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> Backward:
    """Who computes the gradients of such tensors with such a mask, decided now or before."""
    entry = _entry(query, key, value, wanted, enable_gqa)
    if (known := _backward.get(entry)) is not None:
        return known
    before, posed = _shelf, problem_of(query, key, value, wanted, enable_gqa)
    problem = posed.reshaped(direction="backward") if posed else None

    def by(variant: str, found: Kernel | Gradients | None) -> Backward:
        kernel = None if found is None or isinstance(found, Kernel) else found
        name = ledger.TORCH if kernel is None else variant
        return Backward(problem, ledger.row(problem or "no problem of ours", name, _spelled(query.device)), kernel)

    def ready(variant: str, kernel: Kernel | Gradients) -> None:
        if before is _shelf:  # nothing was tuned meanwhile
            _backward[entry] = by(variant, kernel)

    made = by(*_ready_kernel(problem, query, ready))
    if len(_backward) >= MOST_SHAPES:
        _backward.clear()
    return _backward.setdefault(entry, made) if before is _shelf else made


def _ready_kernel(problem: Problem | None, query: Tensor, ready: Ready) -> tuple[str, Kernel | Gradients | None]:
    """A kernel that serves the problem now, spelled, or None; then ``ready`` is called if one is built later. Never raises."""
    try:
        device = of_tensor(query.device.type, query.device.index)
        return _shelf.kernel(problem, device, ready) if problem and device else ("", None)
    except Exception as error:  # dispatch never raises because of databases, compilers or caches
        _shelf.troubles[str(problem)] = f"{type(error).__name__}: {error}"
        handovers.note(problem.family if problem else "a device", error)
        return "", None


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
    return problem.operator == operators.SOFTMAX and own and (device.is_gpu or device.kind == "cpu")


_shelf = Shelf()
if not recording.active:
    atexit.register(lambda: notice.tell(_shelf))


def refresh() -> None:
    """Forget what was read: the next call looks at the database again."""
    global _shelf
    with shelf.lock:
        _shelf = Shelf()
        table.clear()
        _backward.clear()
    tell()


def tell() -> None:
    """Let those know who remember what was decided."""
    global changes
    changes += 1
    for forget in listeners:
        forget()


layers.listeners.append(refresh)


def current() -> Shelf:
    """What this process has read and loaded since somebody tuned last."""
    return _shelf


def explain(problem: Problem, device: Device) -> Choice:
    """Which rung answers a problem, what the rungs before it said, and where torch had to answer in its place."""
    chosen = _shelf.explained(problem, device)
    return replace(chosen, steps=(*chosen.steps, *handovers.steps(problem.family)))

"""enable(): torch's own CPU operator for attention, answered by kernels of ours.

Every plain scaled_dot_product_attention that torch sends to its fused CPU kernel arrives here, under torch's own autograd. A small
extension answers without Python what was answered before (elsa_tune/generate/cpp/native.cpp); without a compiler, Python does. What no
kernel of ours may answer goes to the kernel that was there before.
"""

from __future__ import annotations

import _thread
import os
import re
import sys
import threading
import warnings
from functools import cache, lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import elsa_tune_autoload
from elsa_tune.dispatch import exactness, handovers, ledger, meaning, recording, serving
from elsa_tune.dispatch.torchs import OPERATOR
from elsa_tune.errors import HookMissing
from elsa_tune.generate import backends, incumbent
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.integrations import graphs
from elsa_tune.masks import CAUSAL, NONE, AttnMask, of_tensor
from elsa_tune.parts.operand import Operands
from elsa_tune.problem import Problem

NAME = "elsa-tune"
"""Under which the extension's override is registered, as torch tells who registered what."""

_WARNS = r"[\s\S]*elsa_tune::twice\("
"""What torch says of an override of that operator of ours, and only of that one."""

LATER = 0.005
"""Seconds after which a call that was interrupted is over."""

_Library: Any = torch.library.Library  # its methods have no types

BACKWARD = f"{OPERATOR}_backward"

_lock = threading.RLock()
_on: _Override | None = None


def enable() -> None:
    """Answer torch's CPU operator for attention by kernels of ours, in every thread of this process, until disable().

    Nothing happens where it is on. Raises HookMissing where this torch lets nobody override it.
    """
    global _on
    with _lock:
        if _on is None:
            elsa_tune_autoload.declare(*elsa_tune_autoload.OPERATORS)
            _on = _Override()
            graphs.install()


def disable() -> None:
    """Give torch's operator back to whoever answered it before enable(). Nothing happens where it is not on."""
    global _on
    with _lock:
        if _on is not None:
            graphs.remove()
            _on.end()
            _on = None


def is_on() -> bool:
    """Whether enable() was called, and disable() not since."""
    return _on is not None


def state() -> tuple[bool, str]:
    """Whether all is well, and who answers torch's operator now, in words."""
    with _lock:
        if (reason := _missing()) is not None:
            return False, reason
        last, _ = _registered()
        if _on is None:
            whose = "torch answers" if _is_torchs(last) or _is_ours(last) else "another package answers"
            return True, f"off; {whose}, {last}"
        if not _is_ours(last):
            return False, f"on, but another package overrode it later and answers, {last}"
        return True, f"on, {_on.way}"


def _missing() -> str | None:
    """Why this torch's operator cannot be overridden, or None."""
    if not hasattr(torch.ops.aten, OPERATOR):
        return f"torch {torch.__version__} has no operator {OPERATOR}; elsa_tune.sdpa() serves"
    if not hasattr(torch.library, "get_kernel"):
        return f"torch {torch.__version__} lets nobody keep the kernel that an override replaces, 2.9 does; elsa_tune.sdpa() serves"
    return None


def _registered() -> tuple[str, list[str]]:
    """Who answers the operator on CPUs now, and those of others than torch and us who would otherwise, as torch tells it."""
    told = torch._C._dispatch_dump(f"aten::{OPERATOR}")
    found = re.findall(r"^CPU(?: \(inactive\))?: registered at (.*?) :: ", told, re.M)
    return found[0] if found else "nobody", [one for one in found if not _is_torchs(one) and not _is_ours(one)]


def _is_torchs(place: str) -> bool:
    return "RegisterCPU" in place


def _is_ours(place: str) -> bool:
    """What we register stays when it is disabled, and then lets whoever was there before answer."""
    return place.startswith(NAME) or place.startswith(__file__)


class _Override:
    """The override in place."""

    def __init__(self) -> None:
        if (reason := _missing()) is not None:
            raise HookMissing(reason)
        global _torchs
        last, others = _registered()
        if _is_torchs(last):
            _torchs = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU")
        self._native, self.way = _extension(others)
        _use_up_torchs_warning()
        if self._native is not None:
            incumbent.standing_in.append(self._native.aside)
            try:
                self._native.enable(NAME)
                _extensions[:] = [self._native]
                serving.listeners.append(self._native.forget)
                exactness.listen(self._native.ask)
            except Exception as error:  # a torch of another interface
                incumbent.standing_in.remove(self._native.aside)
                self._native, self.way = None, f"by Python; the extension does not fit: {error}"
        if self._native is None:
            incumbent.standing_in.append(_steps_aside)
            if not last.startswith(__file__):
                _override_by_python(torch.library.get_kernel(f"aten::{OPERATOR}", "CPU") if others else _torchs)
        _override_backward()
        self.behind = _torchs if self._native is not None else _behind[-1]

    def end(self) -> None:
        """Answer no more."""
        if self._native is None:
            incumbent.standing_in.remove(_steps_aside)
            if self.behind is not _torchs:  # another package's, which may go
                _behind.remove(self.behind)
                _libraries.pop()._destroy()
            return
        self._native.disable()
        self._native.forget()
        incumbent.standing_in.remove(self._native.aside)
        serving.listeners.remove(self._native.forget)
        exactness.listen_no_more(self._native.ask)

    def answer(
        self, keys: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The operator: [batch, heads, q_len, head_dim] and the log-sum-exp [batch, heads, q_len]."""
        found = None
        if not (dropout_p or incumbent.is_asked()):
            try:
                found, operands = self._find(query, key, value, is_causal, attn_mask)
                if found is not None and found.call is not None:
                    return _by_kernel(found, query, key, value, operands, scale)
            except Exception as error:  # no memory for splits, a failed launch, whatever is wrong with ours
                handovers.note(found.problem.family if found and found.problem else f"torch's {OPERATOR}", error)
        begin = perf_counter()
        try:
            answer = _by(self.behind, keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        except Exception as error:
            if self._native is not None:
                self._native.fail(str(error))
            raise
        if found is not None and found.call is None:
            found.row.count(begin)
        return answer

    def _counts(self, row: ledger.Row) -> backends.Counts:
        """What the extension counts for a row."""
        assert self._native is not None
        if row.elsewhere is None:
            row.elsewhere = self._native.counts()
        return row.elsewhere

    def _find(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None
    ) -> tuple[serving.Serving | None, Operands]:
        """Who serves such calls, from then on by the extension where it can, and what a kernel takes beside them; nobody where they
        pose no problem of ours."""
        wanted, fixed = CAUSAL if is_causal else NONE, True
        if attn_mask is not None:
            attn_mask = attn_mask.detach()
            meant = meaning.of(attn_mask, False, query, key)
            if meant is None:
                return None, ()
            wanted = meant & wanted if is_causal else meant
            fixed = not (attn_mask.dim() == query.dim() and meaning.worth_a_look(attn_mask, query, key))
        changes = serving.changes
        found = serving.find(query, key, value, wanted, True)
        if not found.problem:
            return None, ()
        operands = wanted.in_order(query, key)
        if fixed and self._native is not None and not exactness.active:
            like = (query, key, value), is_causal, attn_mask
            results = _results(query.shape, query.stride(), query.dtype)
            self._native.bind(*like, self._counts(found.row), found.kernel, results, operands)
            if recording.active:
                self._native.bind_roughly(*like, self._counts(serving.row_nearby(found.problem, query.device)))
            if changes != serving.changes:  # a kernel became ready meanwhile
                self._native.forget()
        return found, operands


def _by(
    kernel: Any, keys: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator by a kernel that torch gave us; if its package has taken it away since, by torch's plain operations."""
    try:
        answer: tuple[Tensor, Tensor] = kernel.call_boxed(
            keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    except RuntimeError as error:
        if "invalidated" not in str(error):
            raise
    else:
        return answer
    handovers.note(f"torch's {OPERATOR}", RuntimeError("the package whose override was behind ours has taken it away"))
    wanted = (CAUSAL if is_causal else NONE) if attn_mask is None else of_tensor(attn_mask)
    family = wanted.of(Problem(head_dim=query.shape[3]))
    lse = logsumexp(query, key, family, wanted.in_order(query, key), scale)
    with sdpa_kernel(SDPBackend.MATH):
        output = incumbent.attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    _, kept = _results(query.shape, query.stride(), query.dtype)
    sums = torch.empty_strided(kept.shape, kept.stride(), dtype=lse.dtype, device=query.device)
    return output, sums.copy_(lse.masked_fill_(lse == float("-inf"), 0.0))


_extensions: list[backends.Interposer] = []
"""The one that was put in the operator's place, if any was."""
_behind: list[Any] = []
_libraries: list[Any] = []


def _override_by_python(behind: Any) -> None:
    """Put Python in the operator's place, before torch's own kernel for good: torch must not be relieved of a kernel of Python's while a
    thread is on its way into it. While nothing is enabled, or another way than this one, whoever is behind it answers."""

    def answer(keys: Any, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        override = _on
        if override is None or override.behind is not behind:
            return _by(behind, keys, *arguments, **named)
        return override.answer(keys, *arguments, **named)

    library = _Library("aten", "IMPL")
    library.impl(OPERATOR, answer, "CPU", with_keyset=True, allow_override=True)
    _behind.append(behind)
    _libraries.append(library)


@cache
def _override_backward() -> Any:
    """Put Python in the place of the operator's backward pass, for good; while nothing is enabled, whoever was there before answers."""
    behind = torch.library.get_kernel(f"aten::{BACKWARD}", "CPU")

    def answer(
        keys: Any, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, dropout_p: float,
        is_causal: bool, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        begin, served = perf_counter(), None
        if _on is not None and not (dropout_p or incumbent.is_asked()):
            try:
                wanted = NONE if attn_mask is None else meaning.of(attn_mask.detach(), False, query, key)
                if wanted is not None:
                    wanted = wanted & CAUSAL if is_causal else wanted
                    served = serving.backward_for(query, key, value, wanted, True)
                    if served.gradients is not None:
                        return _gradients_by_kernel(served, wanted, (query, key, value, output, lse, grad), scale)
            except Exception as error:  # no memory, a failed launch, whatever is wrong with ours
                handovers.note(f"torch's {BACKWARD}", error)
        tensors = grad, query, key, value, output, lse
        found: tuple[Tensor, ...] = behind.call_boxed(
            keys, *tensors, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        if served is not None and served.problem and served.gradients is None:
            served.row.count(begin)
        return found

    library = _Library("aten", "IMPL")
    library.impl(BACKWARD, answer, "CPU", with_keyset=True, allow_override=True)
    return library


def _gradients_by_kernel(
    served: serving.Backward, wanted: AttnMask, tensors: tuple[Tensor, ...], scale: float | None
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value by a kernel of ours, laid out as torch's are: who compiles relies on it."""
    assert served.gradients is not None
    query, key, value, output, lse, grad = tensors
    begin = perf_counter()
    found = served.gradients(query, key, value, output, lse, grad, scale, wanted.in_order(query, key))
    layouts = _layouts_of_gradients(*(y for x in (query, key, value) for y in (x.shape, x.stride())), query.dtype)
    made = tuple(
        x if x.stride() == layout else torch.empty_strided(x.shape, layout, dtype=x.dtype, device=x.device).copy_(x)
        for x, layout in zip((y for y in found if y is not None), layouts, strict=True)
    )
    served.row.count(begin)
    return made


@lru_cache(maxsize=4096)
def _layouts_of_gradients(*places: Any) -> tuple[tuple[int, ...], ...]:
    """Strides of what torch's own backward pass gives of query, key and value, of these shapes and strides and one dtype."""
    *layouts, dtype = places
    query, key, value = (
        torch.empty_strided(*layouts[n : n + 2], dtype=dtype, device="meta") for n in range(0, len(layouts), 2)
    )
    output, lse = getattr(torch.ops.aten, OPERATOR)(query, key, value)
    made = getattr(torch.ops.aten, BACKWARD)(output, query, key, value, output, lse, 0.0, False)
    return tuple(x.stride() for x in made)


def _steps_aside(by: int) -> None:
    """Python's override asks by itself."""


@cache
def _use_up_torchs_warning() -> Any:
    """torch warns of the first override in a process, and of no other: be that one, of an operator of ours, with this one line silenced."""
    library = _Library("elsa_tune", "FRAGMENT")
    library.define("twice() -> ()")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_WARNS)
        for _ in range(2):
            library.impl("twice", _steps_aside, "CPU", allow_override=True)
    return library


def _extension(others: list[str]) -> tuple[backends.Interposer | None, str]:
    """What answers without Python, built, and the way by which calls are answered, in words."""
    if others:
        return None, f"by Python, for another package's override is behind it, {others[0]}"
    try:
        found = next(filter(None, (backends.get(name).interposer() for name in backends.candidates())), None)
    except Exception as error:  # no compiler, a folder that may not be written to
        return None, f"by Python; the extension cannot be built: {error}"
    return found, "by the extension" if found is not None else "by Python"


def _by_kernel(
    found: serving.Serving, query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by a kernel of ours, as torch's kernel leaves them."""
    assert found.call is not None
    made, kept = _results(query.shape, query.stride(), query.dtype)
    place: dict[str, Any] = {"device": query.device}
    output = torch.empty_strided(made.shape, made.stride(), dtype=query.dtype, **place)
    lse = torch.empty_strided(kept.shape, kept.stride(), dtype=lse_dtype(query), **place)
    sums = torch.empty(query.shape[:3], dtype=lse.dtype, **place)
    begin = perf_counter()
    found.call(query, key, value, scale, output, sums, operands)
    # a row that sees no key has 0: torch's backward pass takes exp(-inf - lse)
    lse.copy_(sums.masked_fill_(sums == float("-inf"), 0.0))
    found.row.count(begin)
    return output, lse


@lru_cache(maxsize=4096)
def _results(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output and a log-sum-exp, without memory, laid out as torch's kernel lays out its own: who compiles relies on it. Torch 2.9 says
    a wrong dtype of the log-sum-exp."""
    like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    output, lse = getattr(torch.ops.aten, OPERATOR)(like, like, like)
    return output, lse


def decide(keys: Any, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """What the extension cannot answer, and what compiled programs ask while nothing is enabled."""
    override = _on
    if override is None:
        return _by(_torchs, keys, *arguments, **named)
    try:
        return override.answer(keys, *arguments, **named)
    except KeyboardInterrupt:  # the extension cannot hand it on: it comes again when the call, then torch's, is over
        with incumbent.aside():
            answer = override.answer(keys, *arguments, **named)
        threading.Timer(LATER, _thread.interrupt_main).start()
        return answer


def by_torch(keys: Any, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """By the kernel that was there before any of ours. Raises what it raises, told to the extension, too."""
    try:
        return _by(_torchs, keys, *arguments, **named)
    except Exception as error:
        for extension in _extensions:
            extension.fail(str(error))
        raise


def _after_fork() -> None:
    """Whoever held it is not in this child."""
    global _lock
    _lock = threading.RLock()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
elsa_tune_autoload.declare(*elsa_tune_autoload.OPERATORS)
_torchs: Any = None
"""torch's own kernel, or what was there in its place when this was imported."""
if _missing() is None:
    _torchs = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU")
if hasattr(torch.ops.aten, OPERATOR):
    for _operator in elsa_tune_autoload.OPERATORS:
        torch.library.register_fake(f"elsa_tune::{_operator}", getattr(torch.ops.aten, OPERATOR))

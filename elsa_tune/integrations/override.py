"""enable(): torch's own CPU operator for attention, answered by kernels of ours.

Every plain scaled_dot_product_attention that torch sends to its fused CPU kernel arrives here, under torch's own autograd. A small
extension answers without Python what was answered before (elsa_tune/generate/cpp/native.cpp); without a compiler, Python does. What no
kernel of ours may answer goes to the kernel that was there before.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.dispatch import exactness, handovers, meaning, serving
from elsa_tune.dispatch.torchs import OPERATOR
from elsa_tune.errors import HookMissing
from elsa_tune.generate import backends, incumbent
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.integrations import graphs
from elsa_tune.masks import CAUSAL, NONE, AttnMask

NAME = "elsa-tune"
"""Under which the extension's override is registered, as torch tells who registered what."""

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0.0, bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None)"
    " -> (Tensor output, Tensor logsumexp)"
)
"""Of torch's operator, and of two of ours."""

_WARNS = r"[\s\S]*" + OPERATOR
"""What torch says of an override of this operator, and only of this one."""

Library: Any = torch.library.Library  # its methods have no types

_lock = threading.RLock()
_on: _Override | None = None


def enable() -> None:
    """Answer torch's CPU operator for attention by kernels of ours, in every thread of this process, until disable().

    Nothing happens where it is on. Raises HookMissing where this torch lets nobody override it.
    """
    global _on
    with _lock:
        if _on is None:
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


@contextmanager
def aside() -> Iterator[None]:
    """Inside, in this thread, whoever answered torch's operator before enable() answers it."""
    override = _on
    if override is None:
        yield
        return
    override.step_aside(1)
    try:
        yield
    finally:
        override.step_aside(-1)


def _by_incumbent(*arguments: Any, **named: Any) -> Tensor:
    """torch's function, by whoever was there before."""
    with aside():
        return scaled_dot_product_attention(*arguments, **named)


def is_on() -> bool:
    """Whether enable() was called, and disable() not since."""
    return _on is not None


def state() -> tuple[bool, str]:
    """Whether all is well, and who answers torch's operator now, in words."""
    with _lock:
        if (reason := _missing()) is not None:
            return False, reason
        last, others = _registered()
        if _on is None:
            return True, f"off; {'another package answers' if others else 'torch answers'}, {last}"
        if not _is_ours(last):
            return False, f"on, but another package overrode it later and answers, {last}"
        return True, f"on, {_on.way}" + (f"; others behind it: {', '.join(others)}" if others else "")


def _missing() -> str | None:
    """Why this torch's operator cannot be overridden, or None."""
    if not hasattr(torch.ops.aten, OPERATOR):
        return f"torch {torch.__version__} has no operator {OPERATOR}; elsa_tune.sdpa() serves"
    if not hasattr(torch.library, "get_kernel"):
        return f"torch {torch.__version__} lets nobody keep the kernel that an override replaces, 2.9 does; elsa_tune.sdpa() serves"
    return None


def _registered() -> tuple[str, list[str]]:
    """Who answers the operator on CPUs now, and those of others than torch and us who would otherwise, as torch tells it."""
    found = re.findall(
        r"^CPU(?: \(inactive\))?: registered at (.*?) :: ", torch._C._dispatch_dump(f"aten::{OPERATOR}"), re.M
    )
    return found[0] if found else "nobody", [one for one in found if not _is_torchs(one) and not _is_ours(one)]


def _is_torchs(place: str) -> bool:
    return "RegisterCPU" in place


def _is_ours(place: str) -> bool:
    return place.startswith(NAME) or place.startswith(__file__)


class _Override:
    """The override in place."""

    def __init__(self) -> None:
        if (reason := _missing()) is not None:
            raise HookMissing(reason)
        last, _ = _registered()
        self._original = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU")
        self._aside, self._pythons = threading.local(), self._override()
        self._native, self.way = self._extension(last)
        if self._native is not None:
            self._pythons._destroy()
            serving.listeners.append(self._native.forget)
            exactness.listeners.append(self._native.ask)
            self._native.ask(exactness.active)
        incumbent.attention = _by_incumbent

    def _extension(self, last: str) -> tuple[backends.Interposer | None, str]:
        """What answers without Python, in place already, and the way by which calls are answered, in words."""
        if not _is_torchs(last):
            return None, f"by Python, for another package's override is behind it, {last}"
        _deciders.append(self)
        try:
            for name in backends.candidates():
                found = backends.get(name).interposer()
                if found is not None:
                    found.enable(NAME)
                    return found, "by the extension"
            reason = "there is no extension"
        except Exception as error:  # no compiler, a folder that may not be written to, a torch of another interface
            reason = f"the extension cannot be built: {error}"
        _deciders.remove(self)
        return None, f"by Python; {reason}"

    def _override(self) -> Any:
        library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_WARNS)
            library.impl(OPERATOR, self._attend, "CPU", with_keyset=True)
        return library

    def end(self) -> None:
        """Take it away."""
        incumbent.attention = scaled_dot_product_attention
        if self._native:
            self._native.disable()
            self._native.forget()
            serving.listeners.remove(self._native.forget)
            exactness.listeners.remove(self._native.ask)
            _deciders.remove(self)
        else:
            self._pythons._destroy()

    def step_aside(self, by: int) -> None:
        """Let whoever was there before answer this thread, by 1, until by -1."""
        if self._native:
            self._native.aside(by)
        else:
            self._aside.depth = getattr(self._aside, "depth", 0) + by

    def _attend(
        self, keys: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The operator: [batch, heads, q_len, head_dim] and the log-sum-exp [batch, heads, q_len]."""
        found = None
        if not dropout_p and not getattr(self._aside, "depth", 0):
            try:
                found, wanted = self._find(query, key, value, is_causal, attn_mask)
                if found is not None and found.call is not None:
                    return self._by_kernel(found, query, key, value, wanted, scale)
            except Exception as error:  # no memory for splits, a failed launch, whatever is wrong with ours
                handovers.note(str(found.problem) if found else f"torch's {OPERATOR}", error)
        begin = perf_counter()
        answer: tuple[Tensor, Tensor] = self._original.call_boxed(
            keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        if found is not None and found.call is None:
            found.row.count(begin)
        return answer

    def _find(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None
    ) -> tuple[serving.Serving | None, AttnMask]:
        """Who serves such calls, from then on by the extension where it can; None where they pose no problem of ours."""
        wanted, fixed = CAUSAL if is_causal else NONE, True
        if attn_mask is not None:
            meant = meaning.of(attn_mask.detach(), False, query, key)
            if meant is None:
                return None, wanted
            wanted = meant & wanted if is_causal else meant
            fixed = not (attn_mask.dim() == query.dim() and meaning.worth_a_look(attn_mask, query, key))
        changes = serving.changes
        found = serving.find(query, key, value, wanted, True)
        if not found.problem:
            return None, wanted
        if fixed and self._native and not exactness.active:
            self._bind(found, (query, key, value), is_causal, attn_mask, wanted)
            if changes != serving.changes:  # a kernel became ready meanwhile
                self._native.forget()
        return found, wanted

    def _by_kernel(
        self, found: serving.Serving, query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp by a kernel of ours, as torch's kernel leaves them."""
        assert found.call is not None
        made, kept = _results(query.shape, query.stride(), query.dtype)
        output = torch.empty_strided(made.shape, made.stride(), dtype=query.dtype)
        lse = torch.empty_strided(kept.shape, kept.stride(), dtype=lse_dtype(query))
        sums = torch.empty(query.shape[:3], dtype=lse.dtype)
        begin = perf_counter()
        found.call(query, key, value, scale, output, sums, wanted.in_order(query, key))
        # a row that sees no key has 0: torch's backward pass takes exp(-inf - lse)
        lse.copy_(sums.masked_fill_(sums == float("-inf"), 0.0))
        found.row.count(begin)
        return output, lse

    def _bind(
        self, found: serving.Serving, tensors: tuple[Tensor, Tensor, Tensor], is_causal: bool, attn_mask: Tensor | None,
        wanted: AttnMask,
    ) -> None:  # fmt: skip
        """Tell the extension who answers such calls, unless only Python can."""
        assert self._native is not None
        query, key, _ = tensors
        results, operands = _results(query.shape, query.stride(), query.dtype), wanted.in_order(query, key)
        if found.row.elsewhere is None:
            found.row.elsewhere = self._native.counts()
        self._native.bind(tensors, is_causal, attn_mask, found.row.elsewhere, found.kernel, results, operands)


@lru_cache(maxsize=4096)
def _results(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output and a log-sum-exp, without memory, laid out as torch's kernel lays out its own: who compiles relies on it. Torch 2.9 says
    a wrong dtype of the log-sum-exp."""
    like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    output, lse = getattr(torch.ops.aten, OPERATOR)(like, like, like)
    return output, lse


_deciders: list[_Override] = []


def _decide(
    keys: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the extension cannot answer, and what compiled programs ask while nothing is enabled."""
    with _lock:
        override = _deciders[-1] if _deciders else None
    if override is None:  # taken away meanwhile
        answer: tuple[Tensor, Tensor] = getattr(torch.ops.aten, OPERATOR)(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return answer
    return override._attend(keys, query, key, value, dropout_p, is_causal, attn_mask, scale)


_ours = Library("elsa_tune", "FRAGMENT")
for _name in (
    "decide",
    "attend",
):  # whom the extension asks; what compiled programs call where they would call torch's past everybody
    _ours.define(_name + _SCHEMA)
    _ours.impl(_name, _decide, "CPU", with_keyset=True)
    torch.library.register_fake(f"elsa_tune::{_name}", getattr(torch.ops.aten, OPERATOR), lib=_ours)

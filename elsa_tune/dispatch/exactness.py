"""How exact answers must be, where a caller says: the fastest measured variant that errs at most so many times as torch does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from numbers import Real

from elsa_tune.errors import WrongArguments, shown
from elsa_tune.generate.tensors import number
from elsa_tune.measurement import Measurement

_asked: ContextVar[float | None] = ContextVar("elsa_tune_accuracy", default=None)
_lock = threading.Lock()

active = 0
"""How many callers, in all threads, are inside accuracy() now: while it is 0, no call looks further."""

_listeners: list[Callable[[int], object]] = []


@contextmanager
def accuracy(times_torchs_error: float = 1.0) -> Iterator[None]:
    """Calls inside are served by kernels whose measured error on that very problem is at most so many times torch's, else by
    torch itself.

    torch's error is that of its fastest kernel, measured beside ours. Of the thread, or task, that enters it; the innermost
    counts. ``float("inf")`` asks for nothing. Raises WrongArguments for what is no number above 0.
    """
    if not isinstance(times_torchs_error, Real) or not times_torchs_error > 0:
        raise WrongArguments(
            f"times_torchs_error is {shown(times_torchs_error)}; give a number above 0, 1.0 for torch's own error"
        )
    times = number("times_torchs_error", times_torchs_error)
    _count(1)
    token = _asked.set(times)
    try:
        yield
    finally:
        _count(-1)
        with suppress(ValueError):  # left in another context than it was entered in
            _asked.reset(token)


def _count(by: int) -> None:
    global active
    with _lock:
        active += by
        for tell in _listeners:
            tell(active)


def listen(tell: Callable[[int], object]) -> None:
    """Be told how many callers are inside accuracy(), now and whenever that changes."""
    with _lock:
        _listeners.append(tell)
        tell(active)


def listen_no_more(tell: Callable[[int], object]) -> None:
    """Be told no more."""
    with _lock:
        _listeners.remove(tell)


def asked() -> float | None:
    """What this thread or task asked for: None where it asked for nothing."""
    times = _asked.get()
    return None if times == float("inf") else times


def torchs_error(measured: Iterable[Measurement]) -> float | None:
    """The error of torch's fastest kernel among a problem's measurements, relative to max|v|, or None if nobody measured it."""
    rows = list(measured)
    raced = {m.incumbent for m in rows if m.status == "ok" and m.incumbent and not m.is_hint}
    errors = {
        m.variant: m.error
        for m in rows
        if m.is_rival and m.status == "ok" and m.variant in raced and m.error is not None
    }
    return min(errors.values(), default=None)


def as_exact(measured: Iterable[Measurement], times: float) -> list[Measurement]:
    """The newest measurement of each generated variant that errs at most ``times`` torch's error, fastest first."""
    rows = list(measured)
    limit = torchs_error(rows)
    against = [m for m in rows if not m.is_hint]
    ours = [m for m in against if not m.is_rival and not m.disturbed]
    newest = {m.variant: m for m in sorted(ours, key=lambda m: m.status != "ok" or m.stage == "final")}  # over trials
    if limit is None:
        return []
    usable = [m for m in newest.values() if m.status == "ok" and m.ratio]
    exact = [m for m in usable if m.error is not None and m.error <= times * limit]
    return sorted(exact, key=lambda m: -(m.ratio or 0))

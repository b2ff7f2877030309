"""The incumbent: torch's function, answered by torch's own kernels, whoever stands in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

standing_in: list[Callable[[int], object]] = []
"""One for each who stands in the incumbent's place: called with 1 when it shall step aside in this thread, and with -1 when no more."""


class _Here(threading.local):
    asked = 0


_here = _Here()


def is_asked() -> bool:
    """Whether this thread asks for the incumbent: who stands in its place lets it answer."""
    return _here.asked > 0


@contextmanager
def aside() -> Iterator[None]:
    """Inside, in this thread, the incumbent answers torch's function."""
    told = tuple(standing_in)
    _here.asked += 1
    for step in told:
        step(1)
    try:
        yield
    finally:
        _here.asked -= 1
        for step in told:
            step(-1)


def attention(*arguments: Any, **named: Any) -> Tensor:
    """torch's scaled_dot_product_attention, by the incumbent."""
    if not standing_in:
        return scaled_dot_product_attention(*arguments, **named)
    with aside():
        return scaled_dot_product_attention(*arguments, **named)

"""sdpa(): torch's scaled_dot_product_attention is elsa_tune.attention within a block or a function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from elsa_tune.dispatch.attention import attention
from elsa_tune.generate import incumbent
from elsa_tune.integrations.rebound import rebound


class _Inside(threading.local):
    """Scopes of this thread, and the mode that the outermost put there."""

    depth = 0
    mode: Any = None


_inside = _Inside()


class sdpa(ContextDecorator):
    """``with elsa_tune.sdpa():`` or ``@elsa_tune.sdpa()``: inside, in this thread, torch's scaled_dot_product_attention is answered by
    elsa_tune.attention, also where a module took the name before. Scopes nest, and end with exceptions too.

    It sees what enable() does not: other devices, values of another dimension than keys, masks of other shapes, rows that are not contiguous,
    and torch.nn.MultiheadAttention without weights. It costs every torch function inside about a microsecond; where that shows, enable() is the
    cheaper way.
    """

    def __enter__(self) -> sdpa:
        if not _inside.depth:
            mode: Any = _Mode()
            _inside.mode = mode.__enter__()
            incumbent.standing_in.append(_steps_aside)
        _inside.depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not _inside.depth:
            raise RuntimeError(
                "elsa_tune.sdpa() is left in a thread that did not enter it; leave it where it was entered"
            )
        _inside.depth -= 1
        if not _inside.depth:
            incumbent.standing_in.remove(_steps_aside)
            _inside.mode.__exit__(kind, error, trace)
            _inside.mode = None


def _steps_aside(by: int) -> None:
    """The mode asks by itself."""


class _Mode(TorchFunctionMode):
    """Hands torch's function to attention()."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if function is scaled_dot_product_attention and not incumbent.is_asked():
            return attend(*args, **(kwargs or {}))
        if function is multi_head_attention_forward and set(types) <= {Tensor} and not incumbent.is_asked():
            return _of_module(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """attention() as torch's function, with what torch makes of a mask beside is_causal."""
    if attn_mask is not None and is_causal:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _nobody(tensors: Sequence[Any]) -> bool:
    """Whose class would answer in torch's place."""
    return False


_of_module = rebound(multi_head_attention_forward, attend, has_torch_function=_nobody)
"""What torch.nn.MultiheadAttention calls: torch hands it over as a whole, and asks nobody about what it calls inside."""

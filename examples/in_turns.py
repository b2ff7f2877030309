"""Two ways to call a model, timed in turns: what every example prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from torch import Tensor

import elsa_tune
from elsa_tune.errors import KernelMissing

Way = Callable[[], Tensor]


def compare(before: Way, after: Way, rounds: int, tokens: int = 0, gradients: bool = False) -> None:
    """Print how far the outputs are apart, median seconds of a call each way, and tokens per second of so many ``tokens`` a call, who
    answered, and how to tune what torch still serves. ``gradients`` are wanted or not. Both ways are called equally often."""
    with torch.inference_mode(not gradients):
        before(), after()
        for row in elsa_tune.served():
            with suppress(KernelMissing):
                elsa_tune.load(row.problem)  # builds now what calls would have built beside them
        samples: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            for way, seconds in zip((before, after), samples, strict=True):
                start = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - start)
        difference = (after() - before()).abs().max().item()
    torchs, ours = (median(seconds) for seconds in samples)
    print(f"largest difference of outputs: {difference:.1e}")
    print(f"before: {torchs:.3g} s, after: {ours:.3g} s, {torchs / ours:.3g} times as fast")
    if tokens:
        print(f"tokens per second before: {tokens / torchs:.3g}, after: {tokens / ours:.3g}")
    say_who_answered()


def say_who_answered() -> None:
    """A line for each family and kernel, with the shape called most."""
    rows = sorted(elsa_tune.served(), key=lambda row: row.calls, reverse=True)
    ours = {row.problem for row in rows if row.kernel != "torch"}
    alike: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        alike.setdefault((row.problem.partition("@")[0], row.kernel), []).append(row)
    for (_, kernel), some in alike.items():
        others = f" and {len(some) - 1} other shapes" if len(some) > 1 else ""
        remedy = "" if some[0].problem in ours else f"   (elsa-tune --problem {some[0].problem})"
        print(f"{sum(row.calls for row in some):5} calls of {some[0].problem}{others} by {kernel}{remedy}")


def by(implementation: str, model: Any, call: Way) -> Way:
    """The call with a model of transformers set to an ``attn_implementation``."""

    def way() -> Tensor:
        model.set_attn_implementation(implementation)
        return call()

    return way


def filled(cache: Any, config: Any, tokens: int) -> Any:
    """A cache of transformers with the same random states in every one of the config's layers."""
    states = torch.randn(2, 1, config.num_key_value_heads, tokens, config.head_dim).unbind()
    for layer in range(config.num_hidden_layers):
        cache.update(*states, layer)
    return cache

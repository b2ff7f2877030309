"""Two ways to call a model, timed in turns: what both examples print."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median

import torch
from torch import Tensor

import elsa_tune
from elsa_tune.errors import KernelMissing


@torch.inference_mode()
def compare(before: Callable[[], Tensor], after: Callable[[], Tensor], rounds: int) -> None:
    """Print how far the outputs are apart, median seconds of a call each way, who answered, and how to tune what torch still serves."""
    after()
    for row in elsa_tune.served():
        with suppress(KernelMissing):
            elsa_tune.load(row.problem)  # builds now what calls would have built beside them
    samples: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for way, seconds in zip((before, after), samples, strict=True):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    torchs, ours = (median(seconds) for seconds in samples)
    print(f"largest difference of outputs: {(after() - before()).abs().max().item():.1e}")
    print(f"before: {torchs:.3g} s, after: {ours:.3g} s, {torchs / ours:.3g} times as fast")
    ours_now = {row.problem for row in elsa_tune.served() if row.kernel != "torch"}
    for row in elsa_tune.served():
        remedy = "" if row.problem in ours_now else f"   (elsa-tune --problem {row.problem})"
        print(f"{row.calls:5} calls of {row.problem} by {row.kernel}{remedy}")

"""What a device allows: its measured peaks, what it says of its clocks under load, and the least that a problem can take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from elsa_tune.device import Device, tf32_allowed
from elsa_tune.generate import backends
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.tuning.telemetry import Gauge, Reading
from elsa_tune.tuning.timing import between_events, repeat


def least_seconds(problem: Problem, peaks: Mapping[str, str | float]) -> float | None:
    """What operations and bytes allow at measured ``peak_*`` rates, or None where those are unknown.

    A product of a class may be several of the kind that matrix units multiply; of wider floats there are fewer in a vector.
    """

    def rate(name: str) -> float:
        return float(peaks.get(f"peak_{name}", 0))

    precision, element = elements.precision(problem.precision), elements.get(problem.dtype)
    multiply_adds = 0.0 if element.narrow else (rate("gflops") or rate("fp32")) * 4 / element.bytes
    compute, gbytes = max(multiply_adds, rate(precision.peak) / precision.products), rate("gbytes")
    return max(problem.flops / compute, problem.bytes / gbytes) / 1e9 if compute and gbytes else None


def peak(device: Device, seconds: float = 0.02) -> dict[str, float]:
    """The device's measured peaks, all threads: GFLOP/s of each kind of product, and read GB/s (``gbytes``);
    nothing for an OpenCL device. A GPU is kept busy for longer than ``seconds``, until its clocks have settled."""
    if device.is_gpu:
        return _gpu_peak(device)
    found = [backends.get(name).peak(device, seconds) for name in backends.names()]
    return {name: value for peaks in found for name, value in peaks.items()}


def clocks(device: Device) -> dict[str, float]:
    """What the device says, while it works, of its clocks, power and temperature; nothing for a CPU."""
    return _gpu_clocks(device) if device.is_gpu else {}


def _gpu_clocks(device: Device) -> Reading:
    """What a GPU says of itself during SETTLED seconds of products (Gauge.summary); empty where it says nothing."""
    gauge = Gauge(device)
    with suppress(Exception):
        import torch

        x = torch.randn(4096, 4096, device=device.torch, dtype=torch.float16)
        _at_work(lambda: x @ x, gauge.read)
    return gauge.summary()


SETTLED = 0.25
"""Seconds of work after which clocks have settled."""


def _at_work(work: Callable[[], object], during: Callable[[], object] = lambda: None) -> float:
    """The least seconds of the work in a row of its kind that lasts SETTLED seconds, in runs of 10 ms or one."""
    work()
    many, found, end = max(1, round(0.01 / max(between_events(work), 1e-6))), list[float](), time.monotonic() + SETTLED
    while time.monotonic() < end or len(found) < 4:
        found.append(between_events(lambda: repeat(work, many), during) / many)
    return min(found[len(found) // 2 :])


def _gpu_peak(device: Device) -> dict[str, float]:
    """Peaks of a GPU measured under load: GFLOP/s of products in float32 multiply-adds (``fp32``), TF32 and halves; read GB/s.

    float32 products follow torch's matmul setting, TF32 products its convolution setting: both are read, never written.
    """
    import torch

    n, found = 4096, dict[str, float]()

    def rate(work: Callable[[], object], amount: float) -> float:
        return amount / _at_work(work) / 1e9

    def square(dtype: Any) -> Any:
        return torch.randn(n, n, device=device.torch).to(dtype)

    x = square(torch.float32)
    if not tf32_allowed():
        found["fp32"] = rate(lambda: x @ x, 2.0 * n**3)
    if device.capability >= 80 and torch.backends.cudnn.allow_tf32:
        image, weight = x.view(1, n, 64, 64), x.view(n, n, 1, 1)
        found["tf32"] = rate(lambda: torch.nn.functional.conv2d(image, weight), 2.0 * n**3)
    for element in map(elements.get, elements.names()):
        if element.narrow:
            y = square(element.dtype)
            found[element.name] = rate(lambda y=y: y @ y, 2.0 * n**3)  # type: ignore[misc]
    memory = torch.empty(max(1 << 28, 8 * device.last_cache) // 4, device=device.torch)
    found["gbytes"] = rate(lambda: memory.sum(), 4.0 * memory.numel())
    return found

"""How long calls take: by the monotonic clock on a CPU, by device events on a GPU, called or replayed as a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from elsa_tune.device import Device

Call = Callable[[], object]
Timer = Callable[[int], float]
"""Seconds per call, over at least so many calls."""


def timer(calls: Sequence[Call], device: Device, launch: str, before: Sequence[Call] = ()) -> Timer:
    """Times ``calls`` in turn: they do the same on different inputs, so that caches do not hold what is read next.

    On a CPU ``before`` holds what is done, and not timed, before each of them: a model writes what attention then reads.
    On a GPU, launch "eager" is timed call by call, as a program without graphs would; "graph" captures all calls into one
    CUDA graph and replays it. A call that cannot be captured raises what torch raises.
    """
    if not device.is_gpu:
        return _Called(calls, before) if before else _Repeated(calls)
    return _Graph(calls) if launch == "graph" else _Events(calls)


class _Called:
    def __init__(self, calls: Sequence[Call], before: Sequence[Call]) -> None:
        self._calls, self._before, self._turn = calls, before, 0

    def __call__(self, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            self._turn = (self._turn + 1) % len(self._calls)
            call = self._calls[self._turn]
            self._before[self._turn]()
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total / repeats


class _Repeated:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._turn = calls, 0

    def _next(self) -> Call:
        self._turn = (self._turn + 1) % len(self._calls)
        return self._calls[self._turn]

    def __call__(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            self._next()()
        return (time.perf_counter() - start) / repeats


class _Events(_Repeated):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        calls[0]()  # warm up: libraries and compilers do things once

    def __call__(self, repeats: int) -> float:
        return _between_events(lambda: _repeat(lambda: self._next()(), repeats)) / repeats


class _Graph:
    def __init__(self, calls: Sequence[Call]) -> None:
        cuda = _cuda()
        self._calls, self._graph = calls, cuda.CUDAGraph()
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # warm up: what is done once may be forbidden in a capture
            for call in calls[:2]:
                call()
        cuda.current_stream().wait_stream(side)
        with cuda.graph(self._graph):
            self._outputs = [call() for call in calls]

    def __call__(self, repeats: int) -> float:
        turns = -(-repeats // len(self._calls))
        return _between_events(lambda: _repeat(self._graph.replay, turns)) / (turns * len(self._calls))


def _cuda() -> Any:
    import torch

    return torch.cuda


def _repeat(work: Call, times: int) -> None:
    for _ in range(times):
        work()


def _between_events(work: Callable[[], object]) -> float:
    """Seconds that the GPU spends between the start and the end of the work."""
    cuda = _cuda()
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def gpu_state(device: Device) -> dict[str, float]:
    """Clocks in MHz, temperature in degrees Celsius, and the bit mask of reasons to slow down; empty where unknown."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device.index).uuid}")
        return {
            "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "memory_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            "celsius": float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            "throttled": float(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
    except Exception:  # telemetry: without it a measurement is still a measurement
        return {}


def tf32_allowed() -> bool:
    """Whether torch's own setting lets float32 matrix products on a GPU use TF32. Read, never written."""
    import torch

    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to say where its older and newer settings were mixed
        return False


def gpu_peak(device: Device, seconds: float) -> dict[str, float]:
    """Measured limits of a GPU: GFLOP/s of products in float32 multiply-adds (``fp32``), TF32 and halves; read GB/s.

    float32 products follow torch's matmul setting, TF32 products its convolution setting: both are read, never written.
    """
    import torch

    n, found = 4096, dict[str, float]()

    def rate(work: Callable[[], object], amount: float) -> float:
        work()
        best = min(_between_events(work) for _ in range(max(3, round(seconds / 0.005))))
        return amount / best / 1e9

    def square(dtype: Any) -> Any:
        return torch.randn(n, n, device=device.torch).to(dtype)

    x = square(torch.float32)
    if not tf32_allowed():
        found["fp32"] = rate(lambda: x @ x, 2.0 * n**3)
    if device.capability >= 80 and torch.backends.cudnn.allow_tf32:
        image, weight = x.view(1, n, 64, 64), x.view(n, n, 1, 1)
        found["tf32"] = rate(lambda: torch.nn.functional.conv2d(image, weight), 2.0 * n**3)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        y = square(dtype)
        found[name] = rate(lambda y=y: y @ y, 2.0 * n**3)  # type: ignore[misc]
    memory = torch.empty(max(1 << 28, 8 * device.last_cache) // 4, device=device.torch)
    found["gbytes"] = rate(lambda: memory.sum(), 4.0 * memory.numel())
    return found

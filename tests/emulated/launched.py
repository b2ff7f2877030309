"""Starts emulated kernels as a GPU's are started: by NVIDIA's own Python and AMD's library interface, through drivers whose
devices are this CPU (driver.cpp). Run by test_cuda.py in a process of its own, where torch knows a stream of such a device."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from contracts import kernels

import emulated
from elsa_tune import space
from elsa_tune.generate import cuda
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cuda import rocm as _rocm
from elsa_tune.generate.cuda import runtimes as _cuda_runtimes
from elsa_tune.problem import Problem

STREAM = 7
CAPTURE = 5


def report(spelling: str, family: str, folder: Path) -> dict[str, Any]:
    """By what was done ("fresh thread", ...): the error as a share of what is allowed, or what was raised, the driver's calls, and how
    often counters were cleared and a stream was waited for."""
    driver = folder / "libcuda.so.1"
    source = Path(__file__).parent / "driver.cpp"
    options = ["-std=c++17", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-ldl", "-o", str(driver)]
    _compiler.find().run(options, "the drivers")
    libraries = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
    }
    command = [sys.executable, __file__, spelling, family, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


class Torch:
    """What torch 2.11 knows of GPUs: each thread's device, which it tells the driver only where it changes, and streams."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.ordinal, self.stream, self.capture, self.waited = library, 0, STREAM, 0, 0
        self._thread = threading.local()
        torch.cuda.device = lambda device: self  # type: ignore[assignment, misc, return-value]
        torch.cuda.current_device = self.current  # type: ignore[assignment]
        torch.cuda.current_stream = lambda: self  # type: ignore[assignment, return-value]
        torch.cuda.Stream = lambda device: self  # type: ignore[assignment, misc]
        torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment]
        torch.cuda.is_current_stream_capturing = lambda: self.capture > 0  # type: ignore[assignment]

    @property
    def cuda_stream(self) -> int:
        return self.stream

    def synchronize(self) -> None:
        self.waited += 1

    def current(self) -> int:
        return int(getattr(self._thread, "ordinal", 0))

    def _exchange(self, ordinal: int) -> int:
        before = self.current()
        if ordinal != before:
            self._thread.ordinal = ordinal
            self.library.emulated_set_device(ordinal)
        return before

    def __enter__(self) -> None:
        self._thread.before = self._exchange(self.ordinal)

    def __exit__(self, *raised: object) -> None:
        self._exchange(self._thread.before)


def main(spelling: str, family: str, folder: Path) -> None:
    variant, problem = space.parse(spelling), Problem.parse(family)
    emulated.kernel(variant, problem, folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    library.emulated_calls.restype = ctypes.c_char_p
    _rocm.libraries = lambda *names: iter([library])  # type: ignore[assignment]
    gpu, zeros, cleared = Torch(library), torch.zeros, list[int]()

    def counted(*size: Any, **kind: Any) -> torch.Tensor:
        if kind.get("dtype") == torch.int32:
            cleared.append(1)
        return zeros(*size, **kind)

    (folder / "kernel").write_bytes(f"{folder / 'kernel.so'}\0".encode())
    runtime = _cuda_runtimes.load(str(variant.axes["dialect"]), folder / "kernel")
    kernel, found = cuda.CudaKernel(runtime, variant, problem), dict[str, Any]()
    torch.zeros = counted

    def attend() -> float:
        return kernels.compute(kernel, problem)[2]

    def no_blocks() -> None:
        q = torch.zeros(1, 1, 0, problem.head_dim)
        runtime.run([launch._replace(blocks=0) for launch in kernel._launches(q, q, q, None, q, None)[:1]])

    def step(name: str, work: Callable[[], Any], fresh: bool = False) -> None:
        answers: list[Any] = []

        def guarded() -> None:
            try:
                answers.append(work())
            except RuntimeError as failed:
                answers.append(str(failed))

        cleared.clear()
        gpu.waited = 0
        if fresh:
            thread = threading.Thread(target=guarded)
            thread.start()
            thread.join()
        else:
            guarded()
        calls = [line.split() for line in library.emulated_calls().decode().splitlines()]
        found[name] = {"answer": answers[0], "calls": calls, "cleared": len(cleared), "waited": gpu.waited}

    step("first", attend, fresh=True)
    step("again, on another thread", attend, fresh=True)
    step("on a thread that torch never sent anywhere", attend)
    step("again", attend)
    gpu.stream = STREAM + 1
    step("on another stream", attend)
    gpu.capture = CAPTURE
    library.emulated_capture(CAPTURE)
    step("captured", attend)
    step("captured again", attend)
    gpu.capture = CAPTURE + 1
    library.emulated_capture(CAPTURE + 1)
    step("in the next capture", attend)
    gpu.capture = 0
    step("after captures", attend)
    gpu.ordinal = 1
    step("on the second device", attend, fresh=True)
    gpu.ordinal = 0
    step("of no blocks", no_blocks)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

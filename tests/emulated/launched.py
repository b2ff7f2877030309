"""Starts emulated kernels as a GPU's are started: by NVIDIA's own Python and AMD's library interface, through drivers whose
device is this CPU (driver.cpp). Run by test_cuda.py in a process of its own, where torch knows a stream of such a device."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contracts import kernels

import emulated
from elsa_tune import space
from elsa_tune.backends import _compiler, _cuda_runtimes, _rocm, cuda
from elsa_tune.problem import Problem

STREAM = 7


def report(spelling: str, family: str, folder: Path) -> dict[str, Any]:
    """The error as a share of what is allowed, the driver's calls of a first and a second call, and what a launch of no blocks
    raises."""
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


def main(spelling: str, family: str, folder: Path) -> None:
    variant, problem = space.parse(spelling), Problem.parse(family)
    emulated.kernel(variant, problem, folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    library.emulated_calls.restype = ctypes.c_char_p
    _rocm.libraries = lambda *names: iter([library])  # type: ignore[assignment]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_device = lambda: 0
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=STREAM)  # type: ignore[assignment, return-value]
    (folder / "kernel").write_bytes(f"{folder / 'kernel.so'}\0".encode())
    runtime = _cuda_runtimes.load(str(variant.axes["dialect"]), folder / "kernel")
    kernel, calls = cuda.CudaKernel(runtime, variant, problem), []
    for _ in range(2):
        _, _, error = kernels.compute(kernel, problem)
        calls.append([line.split() for line in library.emulated_calls().decode().splitlines()])
    try:
        q = torch.zeros(1, 1, 0, problem.head_dim)
        runtime.run([launch._replace(blocks=0) for launch in kernel._launches(q, q, q, None, q, None)[:1]])
        raised = ""
    except RuntimeError as failed:
        raised = str(failed)
    print(json.dumps({"error": error, "calls": calls, "raised": raised}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

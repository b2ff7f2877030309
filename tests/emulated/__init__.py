"""A runtime that runs CUDA C and HIP text on the CPU, for small shapes: see cuda.h."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from elsa_tune.generate import cuda
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cuda.launch import Launch, c_types, values
from elsa_tune.generate.cuda.tiling import Tiling
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

HEADER = Path(__file__).parent / "cuda.h"


class EmulatedRuntime:
    """The kernels of one text. ``seed`` 0 runs threads and blocks in order; others shuffle them."""

    def __init__(self, variant: Variant, problem: Problem, text: str, folder: Path) -> None:
        ahead, copy = int(variant.axes["stages"]) - 2, Tiling.of(variant.axes, problem).vector_bytes
        entries = [name for name in ("attend", "finish") if f") {name}(" in text]
        calls = "".join(
            f'extern "C" const char* emulate_{name}(unsigned blocks, int threads, unsigned seed, void** arguments) {{\n'
            f"  emulated::fault = nullptr;\n  emulated::launch({name}, blocks, threads, seed, arguments);\n"
            f"  return emulated::fault;\n}}\n"
            for name in entries
        )
        given = "#define __HIPCC_RTC__\n#define __GFX9__\n" if variant.axes["dialect"] == "hip" else ""
        given += f"#define ASYNC_AHEAD {max(ahead, 0)}u\n#define COPY_BYTES {copy}\n"
        folder.mkdir(exist_ok=True)
        (folder / "kernel.cpp").write_text(f'{given}#include "{HEADER}"\n{text}\n{calls}')
        compiler = _compiler.find()
        compiler.run(
            [
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-mfma",
                "-ffp-contract=off",
                "-w",
                str(folder / "kernel.cpp"),
                "-o",
                str(folder / "kernel.so"),
            ],
            str(variant),
        )
        self._library, self.seed = ctypes.CDLL(str(folder / "kernel.so")), 0
        self._counters = torch.zeros(0, dtype=torch.int32)

    def floats(self, like: Tensor, count: int) -> Tensor:
        return torch.full((count,), float("nan"))

    def counters(self, like: Tensor, count: int) -> Tensor:
        """Cleared when they are made, and never again."""
        if len(self._counters) < count:
            self._counters = torch.zeros(count, dtype=torch.int32)
        return self._counters

    def run(self, launches: list[Launch]) -> None:
        for launch in launches:
            given = [kind(x) for kind, x in zip(c_types(launch.types), values(launch), strict=True)]
            pointers = (ctypes.c_void_p * len(given))(*(ctypes.addressof(x) for x in given))
            function = getattr(self._library, f"emulate_{launch.name}")
            function.restype = ctypes.c_char_p
            if fault := function(launch.blocks, launch.threads, self.seed, pointers):
                raise AssertionError(f"{launch.name}: {fault.decode()}")

    def reads(self, threads: int) -> list[list[int]]:
        """Where each thread of the last block read shared memory, in bytes and in its order, if the text keeps that."""
        count, read = ctypes.c_size_t(), self._library.emulated_reads
        read.restype = ctypes.POINTER(ctypes.c_uint)
        return [read(thread, ctypes.byref(count))[: count.value] for thread in range(threads)]


def kernel(variant: Variant, problem: Problem, folder: Path) -> tuple[cuda.CudaKernel, EmulatedRuntime]:
    """The variant's CUDA or HIP text on this CPU, and what runs it."""
    runtime = EmulatedRuntime(variant, problem, cuda.source(variant, problem).text, folder)
    return cuda.CudaKernel(runtime, variant, problem), runtime

"""How each language's kernels run on this CPU: compiled, emulated, by PoCL, interpreted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from elsa_tune import device as devices
from elsa_tune.generate import cpp, cuda, triton
from elsa_tune.generate.backends import Kernel
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant


def _on_opencl(variant: Variant, problem: Problem, folder: Path) -> Kernel:
    pytest.importorskip("pyopencl", reason="needs pyopencl: pip install 'elsa-tune[opencl]'")
    if not devices.opencl_devices():
        pytest.skip("needs an OpenCL device: apt-get install pocl-opencl-icd")
    return cuda.load(cuda.build(variant, problem, devices.opencl_devices()[0]), variant, problem)


_RUN: dict[str, Callable[[Variant, Problem, Path], Any]] = {
    "cpp": lambda variant, problem, folder: cpp.load(cpp.build(variant, problem), variant, problem),
    "cuda": lambda variant, problem, folder: emulated.kernel(variant, problem, folder)[0],
    "hip": lambda variant, problem, folder: emulated.kernel(variant, problem, folder)[0],
    "opencl": _on_opencl,
    "triton": lambda variant, problem, folder: triton.load(triton.build(variant, problem), variant, problem),
}


def kernel(language: str, variant: Variant, problem: Problem, folder: Path) -> Kernel:
    """The variant's kernel for the problem's family, whatever laws say of it; ``folder`` is for what is compiled on the way."""
    made: Kernel = _RUN[language](variant, problem, folder)
    return made


def marks(language: str) -> list[Any]:
    """Of tests that run a language."""
    return [pytest.mark.opencl] if language == "opencl" else []


def cases(found: Iterable[tuple[str, ...]]) -> list[Any]:
    """Parameters of a test whose first is a language."""
    return [pytest.param(*case, id="-".join(map(str, case)), marks=marks(case[0])) for case in found]


def seeds(kernel: Kernel) -> Iterator[int]:
    """Orders of threads and blocks to call a kernel in, one after the other; as they come where nothing emulates them."""
    runtime = getattr(kernel, "_runtime", None)
    if not isinstance(runtime, emulated.EmulatedRuntime):
        yield 0
        return
    for runtime.seed in (0, 1):
        yield runtime.seed


def starts(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where what calls of a kernel start on a GPU is noted from now on, by name."""
    noted: list[str] = []
    if runtime := getattr(kernel, "_runtime", None):
        run = runtime.run
        monkeypatch.setattr(runtime, "run", lambda some: (noted.extend(one.name for one in some), run(some)))
    else:
        module = sys.modules[kernel._launch.__module__]  # type: ignore[attr-defined]
        launches = module.launches

        def noting(*arguments: Any) -> Iterator[Any]:
            for launch in launches(*arguments):
                noted.append(launch[0].__name__)
                yield launch

        monkeypatch.setattr(module, "launches", noting)
    return noted


def counters(kernel: Kernel) -> list[Tensor]:
    """Those of arriving blocks that calls of a kernel left behind."""
    if runtime := getattr(kernel, "_runtime", None):
        kept = runtime._counters if isinstance(runtime, emulated.EmulatedRuntime) else torch.zeros(0)
        return [kept] if len(kept) else []
    return [*getattr(sys.modules[kernel._launch.__module__], "_arrivals", {}).values()]  # type: ignore[attr-defined]

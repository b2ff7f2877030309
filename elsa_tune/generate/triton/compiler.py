"""Compiles Triton modules for a target that need not be here, exactly as a launch would. The only file of ours that imports triton."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from elsa_tune.device import Device
from elsa_tune.generate.gpu import machine_code as _machine_code
from elsa_tune.generate.operands import named, typical
from elsa_tune.generate.received import room
from elsa_tune.generate.tensors import kernel_arguments
from elsa_tune.parts import element as elements
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem

MAIN = {"forward": "attend", "backward": "grad_key_value"}
"""The kernel of a module that does most of the work."""


class _Absent:
    """In place of Triton's driver: a target whose device need not be here. Enough for what compiles, not for what launches."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self._target  # Triton keeps compiled kernels by device: a real one must not find these

    def get_current_stream(self, device: Any) -> int:
        return 0


_compiling = threading.Lock()


@contextmanager
def _driver_of(device: Device) -> Iterator[None]:
    """Within, Triton compiles for ``device``. A process that has the device at work keeps its driver: others launch by it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    arch: Any = device.capability if device.kind == "cuda" else device.arch
    target = GPUTarget(device.kind, arch, device.warp)
    at_work: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if at_work and driver.active.get_current_target() == target:
        yield
        return
    with _compiling:
        before = driver._active
        absent: Any = _Absent(target)
        driver.set_active(absent)
        try:
            yield
        finally:
            driver._active = before


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """What the launcher of a module takes, for tensors of the problem's shape that have no memory."""

    dtype = elements.get(problem.dtype).dtype

    def rows(heads: int, length: int, dim: int) -> Tensor:
        return torch.empty(problem.batch, heads, length, dim, dtype=dtype, device="meta")

    query = rows(problem.heads, problem.q_len, problem.head_dim)
    key = rows(problem.kv_heads, problem.kv_len, problem.head_dim)
    value = rows(problem.kv_heads, problem.kv_len, problem.value_dim)
    out = rows(problem.heads, problem.q_len, problem.value_dim)
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device="meta")
    drawn = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in typical(problem))
    operands = [kernel_arguments(problem, drawn, query, key)] if drawn else []
    if problem.direction == "forward":
        return (query, key, value, None, out, lse, *operands)
    own = named(problem, drawn)
    more = [room(array, query, own[array.name]) for array in scores.get(problem.score).differentiable]
    return (query, key, value, out, lse, out, None, query, key, value, *operands, *([None, more] if more else []))


def compile_kernels(module: ModuleType, problem: Problem, device: Device) -> dict[str, Any]:
    """A module's kernels by name, compiled for a device that need not be here and kept in Triton's cache: the module's own launcher
    says what a call of the problem asks for, and Triton's own launch what that compiles."""
    compiled: dict[str, Any] = {}
    with _driver_of(device):
        for kernel, grid, arguments, options in module.launches(*_arguments(problem)):
            name = kernel.fn.__name__
            if name not in compiled:  # a later part of the heads is launched alike
                compiled[name] = kernel.warmup(*arguments, grid=grid, **options)
    return compiled


def reports(module: ModuleType, problem: Problem, device: Device) -> dict[str, dict[str, int]]:
    """What the compiler says of each of the module's kernels."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = dict[str, dict[str, int]]()
    for name, made in compile_kernels(module, problem, device).items():
        if device.kind == "cuda":
            found[name] = _machine_code.of_cubin(made.asm["cubin"], made.asm["ptx"], tools)
        else:
            found[name] = _machine_code.of_amdgcn(made.asm["amdgcn"])
        found[name]["shared"] = max(found[name]["shared"], made.metadata.shared)
    return found


def compile_report(module: ModuleType, problem: Problem, device: Device) -> dict[str, int]:
    """The most registers, stack and shared memory, all spills and matrix instructions, and the main kernel's hottest loop."""
    found = reports(module, problem, device)
    summed = {name: sum(r.get(name, 0) for r in found.values()) for name in ("spills", "local", "matrix")}
    largest = {name: max(r[name] for r in found.values()) for name in ("registers", "stack", "shared")}
    return {**found[MAIN[problem.direction]], **summed, **largest, "warps": module.OPTIONS["num_warps"]}

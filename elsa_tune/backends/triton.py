"""Triton kernels for NVIDIA and AMD GPUs: laws, compiling for any target, and calling. The only file that imports triton."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from elsa_tune import scan
from elsa_tune.backends import Built, Call, Gradients, Kernel, Operands, _gpu_report, _kernel_cache
from elsa_tune.backends._laws import SCRATCH_BYTES, dims_are_generated, mask_has_text
from elsa_tune.backends._tensors import check_dims, new_output, rows_contiguous
from elsa_tune.backends._triton_laws import DOTS, laws, parts, version
from elsa_tune.device import Device
from elsa_tune.errors import BuildFailed
from elsa_tune.problem import Problem
from elsa_tune.render import Source, render
from elsa_tune.variant import Variant

TEMPLATES = {"forward": "triton/attention.py.j2", "backward": "triton/backward.py.j2"}
MODULE = "kernel.py"
LARGEST_FINISH = 16
"""Query rows whose split states are merged at once."""

__all__ = ["laws", "version"]
generated = True


def refusal(problem: Problem, device: Device) -> str | None:
    """Triton serves float32, float16 and bfloat16, no mask or causal, dimensions up to 256, on GPUs."""
    if not device.is_gpu:
        return f"Triton runs on GPUs, not on {device}"
    if device.kind == "cuda" and device.capability < 70:
        return f"Triton serves sm_70 and later, not {device.arch}"
    if problem.precision not in DOTS:
        return f"no Triton kernel is of class {problem.precision}"
    if problem.dtype != "fp32" and problem.precision != problem.dtype:
        return f"{problem.dtype} tensors have no class {problem.precision}"
    return mask_has_text(problem) or dims_are_generated(problem)


@cache
def source(variant: Variant, problem: Problem) -> Source:
    """The Python text for the problem's family."""
    axes = variant.axes
    strategy = scan.get(str(axes["scan"]))
    dims = str(axes["dims"])
    return render(
        TEMPLATES[problem.direction],
        {
            **axes,
            "scan": strategy,
            "block_scan": scan.get(strategy.block or strategy.name),
            "grid_scan": scan.get(strategy.grid or strategy.name),
            "variant": variant,
            "family": problem.family,
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            "head_parts": parts(problem.head_dim, dims),
            "value_parts": parts(problem.value_dim, dims),
            "mask": problem.mask,
            "finish_m": min(LARGEST_FINISH, int(axes["block_m"])),
            "scratch_bytes": SCRATCH_BYTES,
        },
    )


def command(variant: Variant) -> list[str]:
    """No command: Triton compiles in its own process."""
    return []


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """What a built kernel is filed under: code, what a launch of the problem knows, target and Triton's version."""
    facts = [problem.dtype, problem.precision, repr(_known(variant, problem)), _target(device), version()]
    made = [source(variant, problem).digest, *facts]
    return hashlib.sha256("\0".join(made).encode()).hexdigest()[:20]


def _target(device: Device | None) -> str:
    """What is compiled for; the interpreter where no GPU is meant."""
    return device.arch if device and device.is_gpu else "interpreter"


def _known(variant: Variant, problem: Problem) -> dict[str, Any]:
    """Arguments that Triton compiles a kernel anew for, as a launch of the problem has them: one query head for each KV head,
    and whole leaves alone."""
    axes = variant.axes
    whole = problem.kv_len % (int(axes["block_n"]) * int(axes["workers"]) * int(axes["splits"])) == 0
    even = whole and problem.mask == "none" and axes["edges"] == "peeled" and problem.direction == "forward"
    return {**({"group": 1} if problem.group == 1 else {}), "EVEN": even, "WITH_LSE": False}


def find(digest: str) -> Built | None:
    """The kernel built earlier under ``digest``, or None."""
    found = _kernel_cache.find(digest, MODULE)
    return _built(digest, *found) if found else None


def _built(digest: str, path: Path, resources: Mapping[str, int]) -> Built:
    precision = "strict" if resources.get("strict") else ""
    return Built(digest, path, resources, _gpu_report.flaw(resources, precision))


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """The module of the family, compiled once for the device's target to learn what the compiler says of it."""
    name = digest(variant, problem, device)
    if built := find(name):
        return built
    text = source(variant, problem).text

    def fill(folder: Path) -> Mapping[str, int]:
        (folder / MODULE).write_text(text)
        if _target(device) == "interpreter":
            return {}
        assert device is not None
        try:
            report = compile_report(_module(folder / MODULE), problem, device, _known(variant, problem))
        except Exception as error:  # whatever the compiler raises is its answer
            raise BuildFailed(f"{variant} for {device.arch}: {_reason(error)}") from error
        return {**report, "strict": int(problem.precision == "strict")}

    return _built(name, *_kernel_cache.add(name, MODULE, fill))


def _reason(error: BaseException) -> str:
    """The last line that says something, of the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


@cache
def _module(path: Path) -> ModuleType:
    """The generated module, imported once under the name of its folder."""
    name = f"elsa_tune_kernel_{re.sub(r'[^a-z0-9]', '_', path.parent.name)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Compiling for a target that need not be here.

KERNELS = {"forward": ("finish", "attend"), "backward": ("prepare", "grad_query", "grad_key_value")}
"""The kernels of a module, the one that does most of the work last."""

SIDE_KERNELS = ("finish", "prepare")
"""Those launched with a module's SIDE_OPTIONS."""

_FLOATS = {"partial", "sums", "deltas"}
_SCALARS = {"c", "scale"}
_COUNTS = {"pair", "kv_heads", "group", "q_len", "kv_len", "first_pair", "slots"}


def _signature(names: Sequence[str], problem: Problem, module: ModuleType) -> dict[str, str]:
    """Triton's types of a kernel's arguments, as the launcher passes them for this problem."""
    element, splits = f"*{problem.dtype}", getattr(module, "SPLITS", None)
    alone = splits is not None and splits.value == 1  # nothing is left in memory, and the query stands in
    types = {}
    for name in names:
        if name in _SCALARS:
            types[name] = "fp32"
        elif name in _COUNTS or name.startswith("stride_"):
            types[name] = "i32"
        elif name == "arrivals" and hasattr(module, "finish_rows") and not hasattr(module, "finish"):  # last_block
            types[name] = "*i32"
        elif (name in _FLOATS and not alone) or (name == "lse" and problem.direction == "backward"):
            types[name] = "*fp32"
        else:
            types[name] = element
    return types


def _compiled(
    name: str, module: ModuleType, problem: Problem, device: Device, constants: Mapping[str, Any]
) -> dict[str, int]:
    """What the compiler says of the module's kernel ``name`` on ``device``, which need not be here; ``constants`` are arguments
    that it knows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, options = getattr(module, name), module.SIDE_OPTIONS if name in SIDE_KERNELS else module.OPTIONS
    signature = _signature(kernel.arg_names, problem, module)
    constants = {name: value for name, value in constants.items() if name in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    even = problem.head_dim % 16 == 0 and problem.value_dim % 16 == 0
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" or (name[:7] == "stride_" and even)]
    made = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    arch: Any = device.capability if device.kind == "cuda" else device.arch
    compiled = triton.compile(made, target=GPUTarget(device.kind, arch, device.warp), options=dict(options))
    if device.kind == "cuda":
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        report = _gpu_report.of_cubin(compiled.asm["cubin"], compiled.asm["ptx"], tools)
    else:
        report = _gpu_report.of_amdgcn(compiled.asm["amdgcn"])
    return {**report, "shared": max(report["shared"], compiled.metadata.shared)}


def compile_report(
    module: ModuleType, problem: Problem, device: Device, constants: Mapping[str, Any]
) -> dict[str, int]:
    """The most registers, stack and shared memory, all spills and matrix instructions, and the main kernel's hottest loop."""
    names = [name for name in KERNELS[problem.direction] if hasattr(module, name)]
    reports = [_compiled(name, module, problem, device, constants) for name in names]
    summed = {name: sum(r.get(name, 0) for r in reports) for name in ("spills", "local", "matrix")}
    largest = {name: max(r[name] for r in reports) for name in ("registers", "stack", "shared")}
    return {**reports[-1], **summed, **largest, "warps": module.OPTIONS["num_warps"]}


# Calling.


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)


class TritonKernel:
    """A family's module: call it with any shape."""

    def __init__(self, module: ModuleType, problem: Problem) -> None:
        self._launch, self._problem = module.attention, problem

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        operands: Operands = (),
    ) -> Tensor:
        check_dims(self._problem, query, key, value)
        if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
            query, key, value = map(rows_contiguous, (query, key, value))
        if out is None:
            out = new_output(query, self._problem.value_dim)
        with _on(query):
            made: Tensor = self._launch(query, key, value, scale, out, lse)
        return made

    def bind(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """Nothing can be computed beforehand."""
        return self


class TritonGradients:
    """A backward family's module."""

    def __init__(self, module: ModuleType) -> None:
        self._launch = module.gradients

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        grad: Tensor,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        rows = [rows_contiguous(x) for x in (query, key, value, output)]
        with _on(query):
            made: tuple[Tensor, ...] = self._launch(*rows, lse.contiguous(), rows_contiguous(grad), scale)
        return made


def load(built: Built, variant: Variant, problem: Problem) -> Kernel | Gradients:
    """The kernel of the problem's family."""
    assert built.path is not None
    module = _module(built.path)
    return TritonKernel(module, problem) if problem.direction == "forward" else TritonGradients(module)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """Triton's version."""
    return {"triton": version()}

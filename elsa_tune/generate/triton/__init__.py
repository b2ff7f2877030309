"""Triton kernels for NVIDIA and AMD GPUs: what this backend answers."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from elsa_tune import device as devices
from elsa_tune.device import Device
from elsa_tune.errors import BuildFailed, CompilerMissing
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Finding, Gradients, Kernel
from elsa_tune.generate.context import of_family
from elsa_tune.generate.gpu import machine_code as _machine_code
from elsa_tune.generate.gpu.work import Work
from elsa_tune.generate.laws import SCRATCH_BYTES, dims_are_generated, family_has_text, reliable, slopes_have_text
from elsa_tune.generate.render import Source, render
from elsa_tune.generate.triton.call import TritonGradients, TritonKernel
from elsa_tune.generate.triton.columns import parts
from elsa_tune.generate.triton.compiler import compile_kernels, compile_report
from elsa_tune.generate.triton.kinds import kinds, known
from elsa_tune.generate.triton.laws import LAWS, dots
from elsa_tune.generate.triton.merging import finish, merges
from elsa_tune.generate.triton.version import version
from elsa_tune.parts import element as elements
from elsa_tune.parts import operator as operators
from elsa_tune.parts import scan
from elsa_tune.parts import schedule as schedules
from elsa_tune.parts import state as states
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

TEMPLATES = {"forward": "triton/attention.py.j2", "backward": "triton/backward.py.j2"}
MODULE = "kernel.py"

__all__ = ["LAWS"]
_PRODUCTS = {"half": 1.0, "tf32": 2.0, "tf32x3": 6.0, "bf16x3": 3.0, "bf16x6": 6.0}
"""Clocks of the matrix unit relative to one float16 product; of whatever else would use it, eight."""


def refusal(problem: Problem, device: Device) -> str | None:
    """Triton serves float32, float16 and bfloat16, dimensions up to 256, on GPUs."""
    if not device.is_gpu:
        return f"Triton runs on GPUs, not on {device}"
    if device.kind == "cuda" and device.capability < 70:
        return f"Triton serves sm_70 and later, not {device.arch}"
    if not dots(problem):
        return f"no Triton kernel of {problem.dtype} tensors is of class {problem.precision}"
    if untold := family_has_text("triton", problem) or dims_are_generated(problem):
        return untold
    return slopes_have_text("triton", problem) if problem.direction == "backward" else None


@cache
def source(variant: Variant, problem: Problem) -> Source:
    """The Python text for the problem's family."""
    axes = variant.axes
    strategy, splits = scan.get(str(axes["scan"])), int(axes["splits"])
    grid = scan.get(strategy.grid or strategy.name)
    rows, warps = finish(variant, problem)
    dims = str(axes["dims"])
    return render(
        TEMPLATES[problem.direction],
        {
            **axes,
            "scan": strategy,
            "block_scan": scan.get(strategy.block or strategy.name),
            "grid_scan": grid,
            "merges": merges(grid.total(splits), splits),
            "schedule": schedules.get(str(axes["schedule"])),
            "state": states.get(str(axes["state"])),
            "operator": operators.get(problem.operator),
            "element": elements.get(problem.dtype),
            "variant": variant,
            "family": problem.family,
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            "head_parts": parts(problem.head_dim, dims),
            "value_parts": parts(problem.value_dim, dims),
            **of_family(problem),
            "finish_m": rows,
            "finish_warps": warps,
            "scratch_bytes": SCRATCH_BYTES,
            "reliable": reliable(problem),
        },
    )


def command(variant: Variant) -> list[str]:
    """No command: Triton compiles in its own process."""
    return []


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """What a built kernel is filed under: code, what a launch of the problem knows, target and Triton's version."""
    facts = [problem.dtype, problem.precision, repr(known(variant, problem)), _target(device), version()]
    made = [source(variant, problem).digest, *facts]
    return hashlib.sha256("\0".join(made).encode()).hexdigest()[:20]


def _target(device: Device | None) -> str:
    """What is compiled for; the interpreter where no GPU is meant."""
    return device.arch if device and device.is_gpu else "interpreter"


def find(digest: str) -> Built | None:
    """The kernel built earlier under ``digest``, or None."""
    found = _kernel_cache.find(digest, MODULE)
    return _built(digest, *found) if found else None


def _built(digest: str, path: Path, resources: Mapping[str, int]) -> Built:
    """What the kernel cache holds, and what the compiler's words say against it."""
    return Built(digest, path, resources, _machine_code.flaw(resources))


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """The module of the family, compiled for the device's target as launches of every kind will ask for it; what the compiler says
    is of the problem's own kind, and where that speaks against the kernel, the others are left out."""
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
            own, *others = kinds(variant, problem)
            module = _module(folder / MODULE)
            report = {**compile_report(module, own, device), "strict": int(elements.precision(problem.precision).ieee)}
            for other in others if not _machine_code.flaw(report) else ():
                compile_kernels(module, other, device)
        except Exception as error:  # whatever the compiler raises is its answer
            raise BuildFailed(f"{variant} for {device.arch}: {_reason(error)}") from error
        return report

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


def load(built: Built, variant: Variant, problem: Problem) -> Kernel | Gradients:
    """The kernel of the problem's family."""
    assert built.path is not None
    module = _module(built.path)
    return TritonKernel(module, problem) if problem.direction == "forward" else TritonGradients(module, problem)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """Triton's version."""
    return {"triton": version()}


def examine() -> Iterator[Finding]:
    """Whether Triton is installed; where no GPU is, it is not missed."""
    try:
        yield Finding("Triton", True, version())
    except CompilerMissing as error:
        yield Finding("Triton", not devices.gpus(), "not installed", str(error) if devices.gpus() else "")


def work(variant: Variant, problem: Problem, resources: Mapping[str, int]) -> Work | None:
    """As the compiler's report counts it."""
    axes = variant.axes
    launches, step = schedules.get(str(axes["schedule"])).launches, int(axes["block_n"]) * int(axes["workers"])
    iteration = {**resources, "wavefronts": 2 * resources["loop_shared"]}
    product = _PRODUCTS.get(str(axes["dot"]), 8.0)
    return Work(int(axes["block_m"]), step, int(axes["splits"]), int(axes["stages"]), launches, product, iteration)

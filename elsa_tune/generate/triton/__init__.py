"""Triton kernels for NVIDIA and AMD GPUs: rendering, building every kind that launches ask for, and calling."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from elsa_tune.device import Device
from elsa_tune.errors import BuildFailed
from elsa_tune.generate import gpu_report as _gpu_report
from elsa_tune.generate import kernel_cache as _kernel_cache
from elsa_tune.generate.backends import Built, Call, Gradients, Kernel, Operands
from elsa_tune.generate.counters import cleared
from elsa_tune.generate.laws import SCRATCH_BYTES, dims_are_generated
from elsa_tune.generate.render import Source, render
from elsa_tune.generate.tensors import check_dims, new_output, rows_contiguous
from elsa_tune.generate.triton.compiler import compile_kernels, compile_report
from elsa_tune.generate.triton.laws import DOTS, LAWS, parts, version
from elsa_tune.parts import mask as masks
from elsa_tune.parts import scan
from elsa_tune.parts.scan import Round
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

TEMPLATES = {"forward": "triton/attention.py.j2", "backward": "triton/backward.py.j2"}
MODULE = "kernel.py"
FINISH_REGISTERS = 32
"""Registers of a thread for the states of all splits of some query rows."""

__all__ = ["LAWS", "version"]
generated = True


def refusal(problem: Problem, device: Device) -> str | None:
    """Triton serves float32, float16 and bfloat16, dimensions up to 256, on GPUs."""
    if not device.is_gpu:
        return f"Triton runs on GPUs, not on {device}"
    if device.kind == "cuda" and device.capability < 70:
        return f"Triton serves sm_70 and later, not {device.arch}"
    if problem.precision not in DOTS:
        return f"no Triton kernel is of class {problem.precision}"
    if problem.dtype != "fp32" and problem.precision != problem.dtype:
        return f"{problem.dtype} tensors have no class {problem.precision}"
    return dims_are_generated(problem)


@cache
def source(variant: Variant, problem: Problem) -> Source:
    """The Python text for the problem's family."""
    axes = variant.axes
    strategy, splits = scan.get(str(axes["scan"])), int(axes["splits"])
    grid = scan.get(strategy.grid or strategy.name)
    rows, warps = _finish(variant, problem)
    dims = str(axes["dims"])
    return render(
        TEMPLATES[problem.direction],
        {
            **axes,
            "scan": strategy,
            "block_scan": scan.get(strategy.block or strategy.name),
            "grid_scan": grid,
            "merges": _merges(grid.total(splits), splits),
            "variant": variant,
            "family": problem.family,
            "head_dim": problem.head_dim,
            "value_dim": problem.value_dim,
            "head_parts": parts(problem.head_dim, dims),
            "value_parts": parts(problem.value_dim, dims),
            "mask": masks.get(problem.mask),
            "finish_m": rows,
            "finish_warps": warps,
            "scratch_bytes": SCRATCH_BYTES,
        },
    )


def _finish(variant: Variant, problem: Problem) -> tuple[int, int]:
    """Query rows whose split states are merged at once, up to 16, and warps of a kernel of its own that does so: there, the states
    of all splits take FINISH_REGISTERS registers of a thread, unless one row takes more."""
    axes = variant.axes
    columns = sum(part.size for part in parts(problem.value_dim, str(axes["dims"])))
    if axes["schedule"] == "last_block":
        return min(16, int(axes["block_m"])), int(axes["warps"])
    fit = FINISH_REGISTERS * 32 * 4 // (columns * int(axes["splits"]))
    rows = 1 << (max(1, min(16, fit)).bit_length() - 1)
    return rows, max(1, min(4, rows * columns // 32))


def _merges(rounds: Sequence[Round], n: int) -> list[tuple[int, ...]]:
    """What the last of n states needs of the rounds, one after the other: (i,) loads state i, (i, j) merges state i into state j. Of
    two states that meet, the earlier is complete before the later is begun, so that few are kept: the merges are the rounds'."""
    trees: list[Any] = [(i,) for i in range(n)]
    for r in rounds:
        for i in reversed(r.cells(n)):
            trees[i] = (trees[i - r.step], trees[i], (i - r.step, i))

    def steps(tree: Any) -> list[tuple[int, ...]]:
        return [tree] if len(tree) == 1 else [*steps(tree[0]), *steps(tree[1]), tree[2]]

    return steps(trees[n - 1])


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
    """What Triton compiles a kernel anew for, beside types, as a launch of the problem has it: one query head for each KV head,
    and whole leaves alone."""
    axes = variant.axes
    whole = problem.kv_len % _turn(variant) == 0
    even = whole and problem.mask == "none" and axes["edges"] == "peeled" and problem.direction == "forward"
    return {"group": min(problem.group, 2), "EVEN": even}


def _turn(variant: Variant) -> int:
    """Keys that all splits take in one turn of their loops."""
    axes = variant.axes
    return int(axes["block_n"]) * int(axes["workers"]) * int(axes["splits"])


def _kinds(variant: Variant, problem: Problem) -> Iterator[Problem]:
    """The problem, then one of its family and group of each other kind: lengths that leaves divide, or do not. Checks and other
    shapes ask for all of them."""
    yield problem
    for kv_len in (problem.kv_len + 1, -(-problem.kv_len // _turn(variant)) * _turn(variant)):
        posed = problem.reshaped(kv_len=kv_len)
        if _known(variant, posed) != _known(variant, problem):
            yield posed
            return


def find(digest: str) -> Built | None:
    """The kernel built earlier under ``digest``, or None."""
    found = _kernel_cache.find(digest, MODULE)
    return _built(digest, *found) if found else None


def _built(digest: str, path: Path, resources: Mapping[str, int]) -> Built:
    return Built(digest, path, resources, _flaw(resources))


def _flaw(resources: Mapping[str, int]) -> str:
    return _gpu_report.flaw(resources, "strict" if resources.get("strict") else "")


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
            own, *others = _kinds(variant, problem)
            module = _module(folder / MODULE)
            report = {**compile_report(module, own, device), "strict": int(problem.precision == "strict")}
            for other in others if not _flaw(report) else ():
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


# Calling.


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU: make it the tensor's."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(x.device)


def _given(operands: Operands) -> tuple[Operands, ...]:
    """The last argument of a module whose family has operands."""
    return (operands,) if operands else ()


class TritonKernel:
    """A family's module: call it with any shape."""

    def __init__(self, module: ModuleType, problem: Problem) -> None:
        self._launch, self._problem = module.attention, problem
        if torch.cuda.is_available():
            module.cleared = cleared  # type: ignore[attr-defined]

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
            made: Tensor = self._launch(query, key, value, scale, out, lse, *_given(operands))
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
        operands: Operands = (),
    ) -> tuple[Tensor, ...]:
        rows = [rows_contiguous(x) for x in (query, key, value, output)]
        with _on(query):
            made: tuple[Tensor, ...] = self._launch(
                *rows, lse.contiguous(), rows_contiguous(grad), scale, *_given(operands)
            )
        return made


def load(built: Built, variant: Variant, problem: Problem) -> Kernel | Gradients:
    """The kernel of the problem's family."""
    assert built.path is not None
    module = _module(built.path)
    return TritonKernel(module, problem) if problem.direction == "forward" else TritonGradients(module)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """Triton's version."""
    return {"triton": version()}

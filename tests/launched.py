"""Calls Triton kernels as checks, models and autograd do, on a simulated GPU that counts what Triton compiles. For a process of its
own, in which nobody has imported Triton to interpret."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.generate import triton
from elsa_tune.order import ORDERS
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem
from elsa_tune.prove import check, reference


class _Device:
    """In place of a GPU at Triton's driver: takes binaries and launches, and does nothing."""

    def __init__(self, target: Any, compiled: list[str], found: list[str]) -> None:
        self._target, self._compiled, self._found = target, compiled, found
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name: str, *binary: object) -> tuple[object, object, int, int, int]:
        return name, name, 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None

    def compiled(self, *, src: Any, cache_hit: bool, **more: object) -> None:
        """Triton's listener of compilations."""
        (self._found if cache_hit else self._compiled).append(src.name)


def launched(spelling: str, text: str, goal: Device, home: str) -> tuple[list[str], list[str]]:
    """Build, then call the kernel as checks, models and autograd do: what Triton compiled at launches, and what it found."""
    os.environ |= {"ELSA_TUNE_HOME": home, "TRITON_CACHE_DIR": f"{home}/triton"}
    os.environ.pop("TRITON_INTERPRET", None)
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    variant, problem = space.parse(spelling), Problem.parse(text)
    kernel: Any = triton.load(triton.build(variant, problem, goal), variant, problem)
    compiled, found = list[str](), list[str]()
    arch: Any = goal.capability if goal.kind == "cuda" else goal.arch
    device = _Device(GPUTarget(goal.kind, arch, goal.warp), compiled, found)
    driver.set_active(device)
    knobs.compilation.listener = device.compiled
    generator = torch.Generator().manual_seed(0)
    own = problem, reference.random_inputs(problem, generator)
    for posed, drawn in (own, *reference.hostile(problem, generator, 301)):
        for order in ORDERS if drawn.natural else ["bhsd"]:
            inputs = drawn.ordered([order] * 3)
            if posed.direction == "backward":
                rows = inputs.query.new_zeros(*inputs.query.shape[:3], posed.value_dim)
                call = *inputs.tensors, rows, rows[..., 0].float(), rows, inputs.scale, inputs.operands, None
                kernel(*call)
                kernel(*call, (True,) * (3 + len(scores.get(posed.score).arrays)))
            else:
                check.run(kernel, inputs)
                check.run_with_lse(kernel, inputs)
    return compiled, found

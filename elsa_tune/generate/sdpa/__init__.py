"""torch's own attention: the incumbent, raced like any candidate, and the last rung of dispatch.

On CPUs `flash` or `math`, on GPUs also `efficient`, `cudnn` and `flex`, each where it takes the problem; `eager` is what a program writes
by hand where a problem has scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from elsa_tune.device import Device
from elsa_tune.generate.backends import Built, Gradients, Kernel
from elsa_tune.generate.sdpa.call import BACKENDS, AutogradKernel, EagerKernel, FlexKernel, SdpaKernel
from elsa_tune.generate.sdpa.laws import LAWS
from elsa_tune.generate.sdpa.runs import RunsKernel
from elsa_tune.parts import element as elements
from elsa_tune.parts import operator as operators
from elsa_tune.problem import Problem
from elsa_tune.variant import Variant

if TYPE_CHECKING:
    from elsa_tune.generate.render import Source

__all__ = ["LAWS"]

SLOW_TO_START = ("flex",)
"""Compiled for every shape, for many seconds: raced where there is time."""


def refusal(problem: Problem, device: Device) -> str | None:
    """torch serves every problem whose operator it computes, of tensors that it has."""
    if not operators.get(problem.operator).torchs:
        return f"torch has no function for {problem.operator}"
    if not hasattr(torch, elements.get(problem.dtype).torch):
        return f"torch has no tensors of dtype {problem.dtype}"
    return None


def source(variant: Variant, problem: Problem) -> Source | None:
    """Nothing is rendered."""
    return None


def command(variant: Variant) -> list[str]:
    """Nothing is compiled."""
    return []


def digest(variant: Variant, problem: Problem, device: Device | None = None) -> str:
    """The variant itself."""
    return str(variant)


def build(variant: Variant, problem: Problem, device: Device | None = None) -> Built:
    """Nothing to build."""
    return Built(str(variant))


def find(digest: str) -> Built | None:
    """Always there."""
    return Built(digest)


def load(built: Built, variant: Variant, problem: Problem) -> Kernel | Gradients:
    """The chosen kernel, or the gradients through it."""
    name = str(variant.axes["kernel"])
    kernels: dict[str, Callable[[Problem], Kernel]] = {"flex": FlexKernel, "eager": EagerKernel, "runs": RunsKernel}
    kernel = kernels[name](problem) if name in kernels else SdpaKernel(BACKENDS[name], problem)
    return kernel if problem.direction == "forward" else AutogradKernel(kernel, problem)


def toolchain(device: Device | None = None) -> dict[str, str]:
    """torch's version."""
    return {"torch": torch.__version__}


def slow_to_start(variant: Variant) -> bool:
    """FlexAttention is."""
    return variant.axes["kernel"] in SLOW_TO_START

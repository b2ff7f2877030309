"""Checks the kernels of one family in every language, in a tree to which parts were added: for a process of its own, in whose path that
tree comes first."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import emulated
import torch

from elsa_tune import device as devices
from elsa_tune import space
from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import cpp, cuda, sdpa, triton
from elsa_tune.generate import operands as given
from elsa_tune.problem import Problem
from elsa_tune.prove import check, gradients, reference


def kernels(problem: Problem) -> dict[str, Any]:
    """By language; OpenCL where this machine has a device."""
    isa = host_cpu().isas[0]
    serial = space.parse(f"cpp.serial.{isa}.l{cpp.ISAS[isa].lanes}.q2.k4.v4.n24")
    split = space.parse(f"cpp.hybrid.{isa}.l{cpp.ISAS[isa].lanes}.c4.q2.k2.v4.n16.w2.s2")
    block = space.parse("triton.serial.ieee.m16.n16.warps4.stages1")
    texts = {"cuda": "cuda.serial.t64.x8.r2.k2", "halves": "cuda.serial.half2.v8.t64.x8.r4.k4.apart"}
    found = {
        "C++": cpp.load(cpp.build(serial, problem), serial, problem),
        "C++, split": cpp.load(cpp.build(split, problem), split, problem),
        "Triton": triton.load(triton.build(block, problem), block, problem),
        "CUDA": emulated.kernel(space.parse(texts["cuda"]), problem, Path(tempfile.mkdtemp()))[0],
        "torch": (sdpa.EagerKernel if problem.score != "none" else lambda p: sdpa.SdpaKernel(sdpa.BACKENDS["math"], p))(
            problem
        ),
    }
    if opencl := next(iter(devices.opencl_devices()), None):
        variant = space.parse("cuda.serial.opencl.t64.x8.r2.k2.shared")
        found["OpenCL"] = cuda.load(cuda.build(variant, problem, opencl), variant, problem)
    return found


def main(family: str) -> None:
    problem = given.with_example(Problem.parse(family)).reshaped(batch=2, heads=4, kv_heads=2, q_len=29, kv_len=53)
    inputs = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    cases = [inputs, *(replace(inputs, operands=given.example(problem, turn)) for turn in range(given.turns(problem)))]
    rows = reference.every_row(problem)
    for language, kernel in kernels(Problem.parse(family)).items():
        for case in cases:
            truth, sums = reference.attention_rows_with_lse(problem, case, rows)
            out, lse, stray = check.run_with_lse(kernel, case)
            error = reference.measure_error(problem, case, rows, out, truth)
            trouble = stray or reference.lse_trouble(problem, case, rows, lse, sums)
            assert error.allowed and not trouble, (language, case.operands, error, trouble)
        print(language, "agrees")
    backward = problem.reshaped(direction="backward")
    family = str(backward.family)
    if triton.refusal(backward, Device("cuda", "any", "sm_90", 1)) is None:
        variant = space.parse("triton.serial.ieee.m16.n16.warps4.stages1")
        gradients_of = triton.load(triton.build(variant, Problem.parse(family)), variant, Problem.parse(family))
        for case in cases:
            saved = gradients.with_forward(backward, case, torch.Generator().manual_seed(0))
            found = check.gradient_error(gradients_of, backward, saved)
            assert found.allowed, (case.operands, found)
        print("Triton's gradients agree")


if __name__ == "__main__":
    main(sys.argv[1])

"""Builds C++ kernels with a compiler that adds sanitizers, or runs them on small hostile inputs in a process that loaded those first."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from elsa_tune import space
from elsa_tune.generate import cpp
from elsa_tune.generate import operands as given
from elsa_tune.generate.backends import Kernel
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem
from elsa_tune.prove import gradients, reference
from elsa_tune.variant import Variant

for place in (cpp, import_module("elsa_tune.generate.cpp.build")):  # optimised with checks, they compile for minutes
    place.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in place.FLAGS)  # type: ignore[attr-defined]


def run(variant: Variant, problem: Problem) -> None:
    """Each tensor has memory of its own size, so that what lies beyond is known to be nobody's."""
    kernel = cpp.load(cpp.build(variant, problem), variant, problem)
    generator = torch.Generator().manual_seed(0)
    posed = given.with_example(problem)
    for q_len, kv_len in ((37, 131), (1, 70), (50, 3)):
        shaped = posed.reshaped(batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len)
        x = reference.random_inputs(shaped, generator)
        for operands in [x.operands, *(given.example(shaped, turn) for turn in range(given.turns(shaped)))]:
            own = tuple(o.clone() if isinstance(o, torch.Tensor) else o for o in operands)
            if not isinstance(kernel, Kernel):
                case = gradients.with_forward(shaped, replace(x, operands=own), generator)
                kernel(*case.tensors, None, own, asked=(True,) * (3 + len(scores.get(problem.score).differentiable)))
                continue
            lse = torch.empty(x.query.shape[:3], dtype=lse_dtype(x.query))
            kernel(x.query, x.key, x.value, None, None, lse, own)


def past(variant: Variant, problem: Problem) -> None:
    """A call that reads one key more than there are."""
    kernel: Any = cpp.load(cpp.build(variant, problem), variant, problem)
    tensors = [torch.randn(1, 1, n, problem.head_dim) for n in (5, 64, 64)]
    longer = [torch.empty(1, 1, n, problem.head_dim) for n in (5, 65, 65)]
    told = kernel.whole(*longer, longer[0].stride(), ())
    pointers = struct.pack("<5q", *(x.data_ptr() for x in (*tensors, longer[0])), 0)
    kernel._function(pointers + told.text[len(pointers) :])


def main(how: str, texts: list[str]) -> None:
    for text in texts:
        spelled, family = text.split("@")
        {"build": cpp.build, "run": run, "past": past}[how](space.parse(spelled), Problem.parse(family))
        print(text, "is done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Error against length: one query against 1K to 1M keys along which values drift, for folds and trees, beside torch and ONNX
Runtime. Writes results/error-DEVICE.json, which docs/how-it-works.md draws: python benchmarks/error.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from _side_by_side import results_file, shown
from cpu import onnxruntime_peer
from elsa_tune import space
from elsa_tune.device import host_cpu
from elsa_tune.generate import backends, cpp, sdpa
from elsa_tune.parts.element import UNIT
from elsa_tune.problem import Problem
from elsa_tune.prove import reference

LENGTHS = [1 << n for n in range(10, 21, 2)]
NATIVE = host_cpu().isas[0]
KERNELS = {
    "serial": "cpp.serial.{}.c4.q2.k4.v4.n32",
    "hillis_steele, 16 splits": "cpp.hillis_steele.{}.c4.q2.k4.v4.n32.s16",
    "blelloch, 16 splits": "cpp.blelloch.{}.c4.q2.k4.v4.n32.s16",
    "blelloch, 8 workers": "cpp.blelloch.{}.c4.q2.k4.v4.n32.w8",
    "hybrid, 8 workers, 16 splits": "cpp.hybrid.{}.c4.q2.k4.v4.n32.w8.s16",
}


def drifting(problem: Problem) -> reference.Inputs:
    """Normal queries and keys; values that go from -1 to 1, with a little noise."""
    made = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    along = torch.linspace(-1, 1, problem.kv_len)[:, None]
    return reference.Inputs("drift", made.query, made.key, made.value.mul_(0.1).add_(along))


def contenders(problem: Problem, x: reference.Inputs) -> dict[str, Callable[[], Any]]:
    """Calls that are compared, by name; ONNX Runtime's where it is installed."""
    found: dict[str, Callable[[], Any]] = {}
    for name, spelled in KERNELS.items():
        variant = space.parse(spelled.format(f"{NATIVE}.l{cpp.ISAS[NATIVE].lanes}"))
        kernel = cpp.load(cpp.build(variant, problem), variant, problem)
        found[name] = partial(kernel, x.query, x.key, x.value)
    for name in ("flash", "math"):
        found[f"torch, {name}"] = partial(sdpa.SdpaKernel(sdpa.BACKENDS[name], problem), x.query, x.key, x.value)
    with suppress(ImportError):
        found["ONNX Runtime"] = onnxruntime_peer(problem, x)
    return found


def measure(problem: Problem) -> dict[str, dict[int, float]]:
    """Largest error relative to max|v| of each contender at each length, and the bound."""
    errors: dict[str, dict[int, float]] = {}
    for length in LENGTHS:
        posed = problem.reshaped(kv_len=length)
        inputs, rows = drifting(posed), reference.every_row(posed)
        truth = reference.attention_rows(posed, inputs, rows)
        for name, call in contenders(posed, inputs).items():
            error = reference.measure_error(posed, inputs, rows, call(), truth)
            errors.setdefault(name, {})[length] = error.relative
        bound = reference.LARGEST_CONSTANT * UNIT * (1 + math.log2(length))
        errors.setdefault("bound, logits as given", {})[length] = bound
    return errors


def main() -> None:
    """Measure, print, write."""
    problem = Problem.parse("fp32.d64@b1.h1.q1.k1")
    errors = measure(problem)
    for name, of in errors.items():
        print(f"{name}: " + ", ".join(f"{error:.1e} at {length}" for length, error in of.items()))
    content = {
        "device": str(host_cpu()),
        "problem": problem.family,
        "versions": backends.get("cpp").toolchain(),
        "errors": errors,
    }
    path = results_file("error-")
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()

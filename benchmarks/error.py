"""Error against length: one query against 1K to 1M keys along which values drift, for folds and trees, beside torch and ONNX
Runtime. Writes results/error-DEVICE.json, docs/images/error.svg and the table to paste: python benchmarks/error.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cpu import onnxruntime_peer
from elsa_tune import space
from elsa_tune.device import host_cpu
from elsa_tune.generate import backends, cpp, sdpa
from elsa_tune.parts.element import UNIT
from elsa_tune.problem import Problem
from elsa_tune.prove import reference

ROOT = Path(__file__).parents[1]
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


def short(length: int) -> str:
    """1K, 64K, 1M."""
    return f"{length >> 20}M" if length >> 20 else f"{length >> 10}K"


def table(errors: dict[str, dict[int, float]]) -> str:
    """Markdown."""
    lines = ["| keys | " + " | ".join(map(short, LENGTHS)) + " |", "|---|" + "---|" * len(LENGTHS)]
    lines += [f"| {name} | " + " | ".join(f"{e[n]:.1e}" for n in LENGTHS) + " |" for name, e in errors.items()]
    return "\n".join(lines)


COLOURS = ("#d55e00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#999999", "#666666", "#e69f00", "#888888")
"""Okabe and Ito's, readable on white and on black."""


def figure(errors: dict[str, dict[int, float]]) -> str:
    """A small SVG: lengths against errors, both in octaves, each line named below."""
    values = [math.log10(e) for of in errors.values() for e in of.values()]
    low, high = math.floor(min(values)), math.ceil(max(values))

    def x(n: int) -> float:
        return 44 + 300 * LENGTHS.index(n) / (len(LENGTHS) - 1)

    def y(e: float) -> float:
        return 16 + 190 * (high - math.log10(e)) / (high - low)

    parts = ['<text x="44" y="10">error / max|v|</text><text x="344" y="236" class="end">keys</text>']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(
            f'<path class="grid" d="M44 {at:.1f}H344"/><text x="40" y="{at + 4:.1f}" class="end">1e{power}</text>'
        )
    parts += [f'<text x="{x(n):.1f}" y="222" class="mid">{short(n)}</text>' for n in LENGTHS]
    for i, (name, of) in enumerate(errors.items()):
        line = "M" + "L".join(f"{x(n):.1f} {y(e):.1f}" for n, e in of.items())
        dash = ' stroke-dasharray="5 3"' if "bound" in name else ' stroke-dasharray="2 2"' if "torch" in name else ""
        row, column = i // 2, i % 2
        parts.append(f'<path d="{line}" stroke="{COLOURS[i]}"{dash}/>')
        at = 252 + 15 * row
        parts.append(f'<path d="M{12 + 172 * column} {at - 4}h16" stroke="{COLOURS[i]}"{dash}/>')
        parts.append(f'<text x="{32 + 172 * column}" y="{at}">{name}</text>')
    style = (
        "text{font:11px sans-serif;fill:#222}.end{text-anchor:end}.mid{text-anchor:middle}path{fill:none;stroke-width:2}"
        ".grid{stroke:#8886;stroke-width:.5}@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    )
    tall = 262 + 15 * ((len(errors) - 1) // 2)
    title = "Error against the number of keys, values that drift"
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 {tall}" role="img"><title>{title}</title><style>{style}</style>\n{body}\n</svg>\n'


def main() -> None:
    """Measure, write, print."""
    problem = Problem.parse("fp32.d64@b1.h1.q1.k1")
    errors, device = measure(problem), str(host_cpu()).replace(":", "-")
    content = {
        "device": str(host_cpu()),
        "problem": problem.family,
        "versions": backends.get("cpp").toolchain(),
        "errors": errors,
    }
    (ROOT / "benchmarks" / "results" / f"error-{device}.json").write_text(json.dumps(content, indent=1) + "\n")
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    (ROOT / "docs" / "images" / "error.svg").write_text(figure(errors))
    print(table(errors))


if __name__ == "__main__":
    main()

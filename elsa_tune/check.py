"""Whether a kernel's answers may be trusted: float64, hostile inputs, poisoned and guarded outputs.

Wrong answers never reach the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elsa_tune import reference
from elsa_tune.backends import Gradients, Kernel
from elsa_tune.problem import Problem
from elsa_tune.reference import CLASS_UNITS, Inputs

WORSE_THAN_BEST = 3.0
"""A kernel may err this many times as much as torch's own kernels on the same natural inputs."""

_GUARD = 1024
_CANARY = 12352.0  # exact in every dtype


@dataclass(frozen=True, slots=True)
class Verdict:
    """The largest error relative to max|v|, its constant C, and the reason if the kernel is wrong."""

    error: float
    constant: float
    reason: str = ""


class GuardedOutput:
    """An output full of NaN between two canaries, so that a missing or stray write shows."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        size = torch.Size(shape).numel()
        self._memory = torch.full((size + 2 * _GUARD,), _CANARY, dtype=like.dtype, device=like.device)
        batch, heads, q_len, dim = shape
        inside = self._memory[_GUARD : _GUARD + size]
        by_position = like.stride(1) < like.stride(2)
        self.tensor = (
            inside.view(batch, q_len, heads, dim).transpose(1, 2)
            if by_position
            else inside.view(batch, heads, q_len, dim)
        )
        self.tensor.fill_(float("nan"))

    def stray_writes(self) -> int:
        """Canaries that were overwritten."""
        guards = torch.cat([self._memory[:_GUARD], self._memory[-_GUARD:]])
        return int((guards != torch.full_like(guards, _CANARY)).sum())


def run(kernel: Kernel, inputs: Inputs) -> tuple[Tensor, str]:
    """One guarded call: the output, and what was wrong about its memory."""
    shape = (*inputs.query.shape[:3], inputs.value.shape[3])
    out = GuardedOutput(shape, inputs.query)
    result = kernel(inputs.query, inputs.key, inputs.value, inputs.scale, out.tensor)
    stray = out.stray_writes()
    return result, f"{stray} values written outside the output" if stray else ""


def judge(problem: Problem, name: str, error: reference.Error, stray: str, peer_error: float | None = None) -> Verdict:
    """A verdict on one case, from its error, stray writes and the best peer's relative error."""
    reason, unit = "", CLASS_UNITS[problem.precision]
    if stray:
        reason = stray
    elif not error.allowed:
        reason = f"error {error.relative:.1e} of max|v|, C = {error.constant:.1f}"
    elif peer_error is not None and error.relative > WORSE_THAN_BEST * max(peer_error, 2 * unit):
        reason = f"error {error.relative:.1e} of max|v|, torch's is {peer_error:.1e}"
    return Verdict(error.relative, error.constant, f"{name}: {reason}" if reason else "")


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile input and what does not depend on who is checked: its truth, and the least error of torch's own kernels."""

    problem: Problem
    inputs: Inputs
    there: Inputs  # the same on the device
    rows: reference.Rows
    truth: Tensor
    peer_error: float | None

    def verdict(self, kernel: Kernel) -> Verdict:
        """What is to be said of a kernel's answer."""
        out, stray = run(kernel, self.there)
        error = reference.measure_error(self.problem, self.inputs, self.rows, out, self.truth)
        return judge(self.problem, self.inputs.name, error, stray, self.peer_error)


def cases(problem: Problem, peers: list[Kernel], seed: int = 0, device: str = "cpu") -> Iterator[Case]:
    """The hostile cases of a problem's family."""
    for small, inputs in reference.hostile(problem, torch.Generator().manual_seed(seed)):
        rows, there = reference.every_row(small), inputs.to(device)
        truth = reference.attention_rows(small, inputs, rows)
        errors = []
        for peer in peers if inputs.natural else ():
            with suppress(RuntimeError):  # torch's kernels on GPUs do not take every shape
                out, _ = run(peer, there)
                errors.append(reference.measure_error(small, inputs, rows, out, truth).relative)
        yield Case(small, inputs, there, rows, truth, min(errors, default=None))


def _not_a_number(kernel: Kernel, problem: Problem, generator: torch.Generator, device: str) -> str:
    """NaN in one query row must make that row NaN and no other."""
    small = problem.reshaped(batch=1, heads=problem.group, kv_heads=1, q_len=21, kv_len=70)
    inputs = reference.random_inputs(small, generator)
    inputs.query[0, 0, 7, 0] = float("nan")
    out, _ = run(kernel, inputs.to(device))
    rows = out.isnan().any(-1)
    return "" if rows[0, 0, 7] and int(rows.sum()) == 1 else "a NaN in one query row is lost or spreads to other rows"


def gradient_error(kernel: Gradients, problem: Problem, inputs: Inputs) -> reference.Error:
    """The error of dQ, dK and dV for the first and the last KV head."""
    assert inputs.forward is not None
    found = kernel(inputs.query, inputs.key, inputs.value, *inputs.forward, inputs.scale)
    heads = dict.fromkeys(((0, 0), (problem.batch - 1, problem.kv_heads - 1)))
    return reference.gradient_error(problem, inputs, found, list(heads))


def _check_gradients(kernel: Gradients, problem: Problem, generator: torch.Generator, device: str) -> Verdict:
    """The natural cases of the family, with what their forward pass saved."""
    worst = Verdict(0.0, 0.0)
    for small, inputs in reference.hostile(problem, generator):
        if not inputs.natural:
            continue
        case = reference.with_forward(small, inputs, generator).to(device)
        before = [x.clone() for x in case.tensors]
        verdict = judge(problem, inputs.name, gradient_error(kernel, small, case), "")
        if not all(torch.equal(x, y) for x, y in zip(before, case.tensors, strict=True)):
            verdict = Verdict(float("inf"), float("inf"), f"{inputs.name}: an input was overwritten")
        if verdict.reason:
            return verdict
        worst = max(worst, verdict, key=lambda v: v.constant)
    return worst


def check_family(
    kernel: Any,
    problem: Problem,
    peers: list[Kernel],
    seed: int = 0,
    device: str = "cpu",
    known: Iterable[Case] | None = None,
) -> Verdict:
    """Hostile inputs of the problem's family on torch's ``device``: the worst verdict on natural ones, or the first that
    fails. ``known`` are its cases, where somebody has them."""
    generator = torch.Generator().manual_seed(seed)
    if problem.direction == "backward":
        return _check_gradients(kernel, problem, generator, device)
    worst = Verdict(0.0, 0.0)
    for case in cases(problem, peers, seed, device) if known is None else known:
        verdict = case.verdict(kernel)
        if verdict.reason:
            return verdict
        if case.inputs.natural:
            worst = max(worst, verdict, key=lambda v: v.constant)
    lost = _not_a_number(kernel, problem, generator, device)
    return Verdict(float("inf"), float("inf"), lost) if lost else worst

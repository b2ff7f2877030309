"""Whether a kernel's answers may be trusted: the truth, hostile inputs, poisoned and guarded outputs.

Wrong answers never reach the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from elsa_tune.device import Device
from elsa_tune.generate import lawful
from elsa_tune.generate.backends import Gradients, Kernel
from elsa_tune.generate.operands import with_example
from elsa_tune.generate.tensors import lse_dtype, one_of_each
from elsa_tune.parts import score as scores
from elsa_tune.problem import Problem
from elsa_tune.prove import gradients, reference
from elsa_tune.prove.reference import Inputs
from elsa_tune.variant import Variant

WORSE_THAN_BEST = 3.0
"""A kernel may err this many times as much as torch's own kernels on the same natural inputs, or as rounding the result."""

_GUARD = 1024
_CANARY = 12352.0  # exact in every dtype


@dataclass(frozen=True, slots=True)
class Verdict:
    """The largest error relative to max|v|, its constant C, and the reason if the kernel is wrong."""

    error: float
    constant: float
    reason: str = ""


class Guarded:
    """A tensor full of NaN between two canaries, so that a missing or stray write shows."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        size = torch.Size(shape).numel()
        self._memory = torch.full((size + 2 * _GUARD,), _CANARY, dtype=dtype, device=device)
        self.tensor = self._memory[_GUARD : _GUARD + size].view(shape)
        self.tensor.fill_(float("nan"))

    def stray_writes(self) -> int:
        """Canaries that were overwritten."""
        guards = torch.cat([self._memory[:_GUARD], self._memory[-_GUARD:]])
        return int((guards != torch.full_like(guards, _CANARY)).sum())


def _guarded_output(query: Tensor, value_dim: int) -> tuple[Guarded, Tensor]:
    """Room for an output that lies in memory as the query does, and the output itself."""
    batch, heads, q_len, _ = query.shape
    if query.stride(1) < query.stride(2):
        room = Guarded((batch, q_len, heads, value_dim), query.dtype, query.device)
        return room, room.tensor.transpose(1, 2)
    room = Guarded((batch, heads, q_len, value_dim), query.dtype, query.device)
    return room, room.tensor


def run(kernel: Kernel, inputs: Inputs, lse: Tensor | None = None) -> tuple[Tensor, str]:
    """One guarded call: the output, and what was wrong about its memory."""
    room, out = _guarded_output(inputs.query, inputs.value.shape[3])
    more = {"operands": inputs.operands} if inputs.operands else {}
    result = kernel(inputs.query, inputs.key, inputs.value, inputs.scale, out, lse, **more)
    stray = room.stray_writes()
    return result, f"{stray} values written outside the output" if stray else ""


def run_with_lse(kernel: Kernel, inputs: Inputs) -> tuple[Tensor, Tensor, str]:
    """One guarded call: output, log-sum-exp [batch, heads, q_len], and what was wrong about their memory."""
    room = Guarded(tuple(inputs.query.shape[:3]), lse_dtype(inputs.query), inputs.query.device)
    out, stray = run(kernel, inputs, room.tensor)
    count = room.stray_writes()
    return out, room.tensor, stray or (f"{count} values written outside the log-sum-exp" if count else "")


def judge(problem: Problem, name: str, error: reference.Error, stray: str, peer_error: float | None = None) -> Verdict:
    """A verdict on one case, from its error, stray writes and the best peer's relative error. Where that is below what rounding
    the result may cost, rounding counts."""
    reason = ""
    if stray:
        reason = stray
    elif not error.allowed:
        reason = f"error {error.relative:.1e} of max|v|, C = {error.constant:.1f}"
    elif peer_error is not None and error.relative > WORSE_THAN_BEST * max(peer_error, error.rounding):
        reason = f"error {error.relative:.1e} of max|v|, torch's is {peer_error:.1e}"
    return Verdict(error.relative, error.constant, f"{name}: {reason}" if reason else "")


@dataclass(frozen=True, slots=True)
class _Truth:
    """What is known of a case, whichever kernel is checked: rows, their true output and log-sum-exp, peers' errors."""

    rows: reference.Rows
    output: reference.Truth
    lse: reference.Truth
    peer_errors: dict[Kernel, float] = field(default_factory=dict)


_truths: dict[tuple[object, ...], _Truth] = {}
_MOST_TRUTHS = 256
_LONGEST_OF_GRADIENTS = 1024
_EVERY_ROW = 1 << 22
"""(query row, key) pairs up to which every row is compared."""


def _truth(problem: Problem, inputs: Inputs, about: tuple[object, ...]) -> _Truth:
    """The truth of one of the cases ``about`` (seed, longest, device), computed once."""
    entry = (problem, inputs.name, *about)
    if entry not in _truths:
        pairs = problem.batch * problem.heads * problem.q_len * problem.kv_len
        sampled = reference.sample_rows(problem, torch.Generator().manual_seed(0))
        rows = reference.every_row(problem) if pairs <= _EVERY_ROW else sampled
        if len(_truths) >= _MOST_TRUTHS:
            _truths.clear()
        _truths[entry] = _Truth(rows, *reference.attention_rows_with_lse(problem, inputs, rows))
    return _truths[entry]


def _peer_error(problem: Problem, inputs: Inputs, peers: list[Kernel], truth: _Truth) -> float | None:
    """The least error of torch's kernels; on GPUs they do not take every shape."""
    for peer in peers:
        if peer not in truth.peer_errors:
            with suppress(RuntimeError):
                out = run(peer, inputs)[0]
                error = reference.measure_error(problem, inputs, truth.rows, out, truth.output)
                truth.peer_errors[peer] = error.relative
    return min((truth.peer_errors[peer] for peer in peers if peer in truth.peer_errors), default=None)


def _case(kernel: Kernel, problem: Problem, inputs: Inputs, peers: list[Kernel], truth: _Truth) -> Verdict:
    out, lse, stray = run_with_lse(kernel, inputs)
    error = reference.measure_error(problem, inputs, truth.rows, out, truth.output)
    peer_error = _peer_error(problem, inputs, peers, truth) if inputs.natural else None
    verdict = judge(problem, inputs.name, error, stray, peer_error)
    trouble = "" if verdict.reason else reference.lse_trouble(problem, inputs, truth.rows, lse, truth.lse)
    return replace(verdict, reason=f"{inputs.name}: {trouble}") if trouble else verdict


class _Surrounded:
    """A copy of what a kernel is given inside a larger tensor of what would show if it were read: NaN, true, the largest number."""

    def __init__(self, x: Tensor) -> None:
        shown = float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
        alone = one_of_each(x)  # what is shared stays so
        self._memory = torch.full([n + 3 for n in alone.shape], shown, dtype=x.dtype, device=x.device)
        inside = self._memory[(slice(1, -2),) * x.dim()]
        inside.copy_(alone)
        self.tensor, self._before = inside.expand(x.shape), self._memory.clone()

    def was_written(self) -> bool:
        """Whether a bit in or around it is another now."""
        return not torch.equal(self._memory.view(torch.uint8), self._before.view(torch.uint8))


def _without_lse(kernel: Kernel, problem: Problem, inputs: Inputs) -> str:
    """Whoever asks for no log-sum-exp gets the same bits, wherever query, key, value and operands lie: nothing around them is used, and
    they keep every bit."""
    given = [_Surrounded(x) if isinstance(x, Tensor) else x for x in (*inputs.tensors, *inputs.operands)]
    query, key, value, *operands = (x.tensor if isinstance(x, _Surrounded) else x for x in given)
    there = replace(inputs, query=query, key=key, value=value, operands=tuple(operands))
    with_it, (without, stray) = run_with_lse(kernel, inputs)[0], run(kernel, there)
    if stray or not torch.equal(with_it.nan_to_num(), without.nan_to_num()):
        return stray or "asking for no log-sum-exp, or what lies around the operands, changes the output"
    written = any(isinstance(x, _Surrounded) and x.was_written() for x in given)
    return "values were written in or around the operands" if written else ""


def _not_a_number(kernel: Kernel, problem: Problem, generator: torch.Generator, device: str) -> str:
    """NaN in one query row, the last, which most masks let see keys, must make that row NaN and no other; if it sees none, not even
    that one."""
    small = with_example(problem).reshaped(batch=1, heads=problem.group, kv_heads=1, q_len=21, kv_len=70)
    inputs = reference.random_inputs(small, generator)
    inputs.query[0, 0, -1, 0] = float("nan")
    last = reference.Rows(*(torch.tensor([n]) for n in (0, 0, small.q_len - 1)))
    sees = bool(reference.attention_rows(small, inputs, last).double().isnan().any())
    out, _ = run(kernel, inputs.to(device))
    rows = out.isnan().any(-1)
    kept = bool(rows[0, 0, -1]) is sees and int(rows.sum()) == sees
    return "" if kept else "a NaN in one query row is lost or spreads to other rows"


def gradient_error(
    kernel: Gradients, problem: Problem, inputs: Inputs, grad_lse: Tensor | None = None
) -> reference.Error:
    """The error of dQ, dK and dV for the first and the last KV head, or where there are few pairs for all, and of what arrays receive."""
    assert inputs.forward is not None
    beside: dict[str, Any] = {} if grad_lse is None else {"grad_lse": grad_lse}
    asked = (True,) * (3 + len(scores.get(problem.score).differentiable))
    found = kernel(
        inputs.query, inputs.key, inputs.value, *inputs.forward, inputs.scale, inputs.operands, asked=asked, **beside
    )
    heads = [(b, h) for b in range(problem.batch) for h in range(problem.kv_heads)]
    if problem.q_len * problem.kv_len * problem.batch * problem.heads > _EVERY_ROW:
        heads = list(dict.fromkeys((heads[0], heads[-1])))
    return gradients.error(problem, inputs, found, heads, grad_lse)


def _check_gradients(
    kernel: Gradients, problem: Problem, generator: torch.Generator, device: str, longest: int
) -> Verdict:
    """The cases of the family that are not long, with what their forward pass saved; of every other one the log-sum-exp is a result too."""
    worst = Verdict(0.0, 0.0)
    for number, (small, inputs) in enumerate(reference.hostile(problem, generator, longest)):
        if small.kv_len > _LONGEST_OF_GRADIENTS:
            continue
        case = gradients.with_forward(small, inputs, generator).to(device)
        grad_lse = torch.randn(case.query.shape[:3], generator=generator).to(case.query).to(lse_dtype(case.query))
        given = [*case.tensors, *(x for x in case.operands if isinstance(x, Tensor))]
        before = [x.clone() for x in given]
        error = gradient_error(kernel, small, case, grad_lse if number % 2 else None)
        verdict = judge(problem, inputs.name, error, "")
        if not all(torch.equal(x, y) for x, y in zip(before, given, strict=True)):
            verdict = Verdict(float("inf"), float("inf"), f"{inputs.name}: an input was overwritten")
        if verdict.reason:
            return verdict
        if inputs.natural:
            worst = max(worst, verdict, key=lambda v: v.constant)
    return worst


def longest(variant: Variant, problem: Problem, device: Device) -> int:
    """Keys of the long cases for a variant: as many as laws let it serve."""
    keys = reference.LONG
    while keys > reference.LONG // 16 and lawful.refusal(variant, problem.reshaped(kv_len=keys), device):
        keys //= 2
    return keys


def check_family(
    kernel: Kernel | Gradients,
    problem: Problem,
    peers: Sequence[Kernel | Gradients],
    seed: int = 0,
    device: str = "cpu",
    longest: int = reference.LONG,
) -> Verdict:
    """Hostile inputs of the problem's family on torch's ``device``, some of ``longest`` keys: the worst verdict on natural
    ones, or the first that fails."""
    generator = torch.Generator().manual_seed(seed)
    if problem.direction == "backward":
        return _check_gradients(cast(Gradients, kernel), problem, generator, device, longest)
    kernel, calls = cast(Kernel, kernel), [peer for peer in peers if isinstance(peer, Kernel)]
    worst = Verdict(0.0, 0.0)
    for number, (posed, inputs) in enumerate(reference.hostile(problem, generator, longest)):
        truth, there = _truth(posed, inputs, (seed, longest, device)), inputs.to(device)
        verdict = _case(kernel, posed, there, calls, truth)
        if not number and not verdict.reason and (trouble := _without_lse(kernel, posed, there)):
            verdict = judge(posed, inputs.name, reference.Error(float("inf"), float("inf"), False), trouble)
        if verdict.reason:
            return verdict
        if inputs.natural:
            worst = max(worst, verdict, key=lambda v: v.constant)
    lost = _not_a_number(kernel, problem, generator, device)
    return Verdict(float("inf"), float("inf"), lost) if lost else worst

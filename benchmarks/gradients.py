"""Training steps of attention, forward and backward, against torch's fused kernel in one interleaved run; their memory; second derivatives
against torch's math.

Run it with `make bench`. Both are called on tensors that take gradients, in the memory order of models; problems that are not tuned yet are
tuned first, forward and backward. Ratios are medians of round-by-round ratios with bootstrap intervals. Peak memory is that of a process of its
own which does one step, saved tensors and gradients included. Writes benchmarks/results/gradients-<device>.json and prints losses like
wins.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from _side_by_side import in_turns, mib_of, timed, told_by, tune_first, write
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.masks import NONE
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem
from elsa_tune.prove import reference

ROUNDS = 15
SECONDS_A_CASE = 8.0
PAUSE = 0.003
"""Seconds between samples: threads spin for a while after they finish."""
ZEN_5 = host_cpu().model.startswith("amd_f26")
SHAPES = ((8, 12, 197), (8, 12, 512), (1, 12, 1024), (1, 8, 2048), (1, 4, 4096))
HEADS = {1024: 12, 2048: 12, 4096: 12, 8192: 12, 65536: 1}
"""Of which tokens memory is measured, and of how many heads."""
LONG = 16384
"""Where torch's math cannot compute a second derivative."""
MEMORY = {n: f"fp32.d64@b1.h{h}.q{n}.k{n}.bshd" for n, h in HEADS.items()}
SECOND = "fp32.d64@b1.h8.q1024.k1024.bshd"
RACED = 4096
"""Longer ones are computed by the kernels that won here: a race of them would take an hour."""
ORDER = "fp32.d64@b1.h{}.q4096.k4096.bshd"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A problem, and what is passed as attn_mask and dropout_p."""

    name: str
    problem: str
    mask: Callable[[], Any] = lambda: None
    dropout: float = 0.0

    @property
    def posed(self) -> Problem:
        return Problem.parse(self.problem)


def cases() -> Iterator[Case]:
    for b, h, n in SHAPES:
        shape = f"b{b}.h{h}.q{n}.k{n}.bshd"
        yield Case(f"plain {n}", f"fp32.d64@{shape}")
        yield Case(f"causal {n}", f"fp32.d64.causal@{shape}")
        yield Case(f"bf16 {n}", f"bf16.d64@{shape}")
    for b, h, n in ((8, 12, 197), (8, 12, 512), (16, 12, 256)):
        each = torch.tensor([max(1, n * (2 * i + 1) // (2 * b)) for i in range(b)])
        seen = (torch.arange(n) < each[:, None])[:, None, None]
        yield Case(f"padding {n}", f"fp32.d64.lengths@b{b}.h{h}.q{n}.k{n}.bshd", lambda seen=seen: seen)
    yield Case("dropout 512", "fp32.d64.dropout@b2.h12.q512.k512.bshd.dropout0.1", dropout=0.1)


CASES = tuple(cases())
GOALS = (
    ("forward and backward, float32, against torch", 2.0 if ZEN_5 else 1.3, "plain"),
    ("the same, causal", 2.5 if ZEN_5 else 1.6, "causal"),
    ("the same, keys half padded", 2.5 if ZEN_5 else 1.6, "padding"),
    ("the same, bfloat16", 1.0, "bf16"),
    ("the same, dropout 0.1 (by a seed; torch's without one, by its math)", 1.0, "dropout"),
)
"""What is asked of the cases whose names begin so: to be at least so many times as fast as torch, in their geometric mean."""


def tensors(posed: Problem) -> list[Tensor]:
    plain = posed.unmasked.reshaped(dtype="fp32", precision="fp32")
    x = reference.random_inputs(plain, torch.Generator().manual_seed(0)).ordered(plain.orders)
    return [t.to(elements.get(posed.dtype).dtype).requires_grad_() for t in (x.query, x.key, x.value)]


def steps(case: Case, forward: Any = None, backward: Any = None) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Who does a training step, and how: ours by these kernels where they are given."""
    x, mask, causal = tensors(case.posed), case.mask(), case.posed.mask == "causal"
    grad = torch.empty_like(x[0]).copy_(torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1)))

    def of(attend: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(attend(*x, mask, case.dropout, causal), x, grad)

    def ours(*given: Any) -> Tensor:
        return elsa_tune.attention(*given, dropout_seed=1234 if case.dropout else None)

    def flash(*given: Any, **named: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH if case.dropout else SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*given, **named)

    def by_kernels() -> tuple[Tensor, ...]:
        q, k, v = (t.detach() for t in x)
        lse = torch.empty(q.shape[:3])
        return tuple(backward(q, k, v, forward(q, k, v, None, None, lse), lse, grad))

    return {"elsa-tune": by_kernels if forward else of(ours), "torch flash": of(flash)}


def interleaved(racing: Mapping[str, Call]) -> dict[str, Any]:
    for call in racing.values():
        call()
    return in_turns(racing, ROUNDS, SECONDS_A_CASE, PAUSE)


def step(case: Case) -> dict[str, Any]:
    racing = steps(case)
    ours, torchs = (racing[name]() for name in ("elsa-tune", "torch flash"))
    differences = [float((a.float() - b.float()).abs().max()) for a, b in zip(ours, torchs, strict=True)]
    apart = None if case.dropout else max(differences)  # torch leaves out others
    backward = serving.explain(case.posed.reshaped(direction="backward"), host_cpu())
    return {
        "problem": case.problem, "variant": str(backward.variant), "difference": apart, "peers": interleaved(racing),
    }  # fmt: skip


# Second derivatives.


def second(length: int, heads: int, attend: Callable[..., Tensor]) -> Call:
    """A gradient penalty: the second derivative of the squares of all first ones."""
    x = tensors(Problem.parse(f"fp32.d64@b1.h{heads}.q{length}.k{length}.bshd"))

    def call() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attend(*x).sum(), x, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), x)

    return call


def by_math(*given: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*given)


# Memory, of a process of its own.


def peak(who: str, length: int) -> float:
    """MiB that a step adds to what the process had with its inputs, at most. Raises CalledProcessError where ours is not by kernels of ours."""
    (mib,) = told_by(__file__, "--peak", who, str(length), MALLOC_MMAP_THRESHOLD_="65536")  # what is freed goes back
    return mib


def told_peak(who: str, length: int) -> None:
    case, small = (Case("memory", problem) for problem in (MEMORY[length], "fp32.d64@b1.h12.q256.k256.bshd"))
    steps(small)[who]()  # libraries, threads
    if who == "elsa-tune" and length > RACED:
        print(mib_of(steps(case, *winners(Problem.parse(MEMORY[RACED])))[who]))
        return
    mib = mib_of(steps(case)[who])
    if who == "elsa-tune":
        winners(case.posed)  # who were called
    print(mib)


def winners(posed: Problem) -> tuple[Any, Any]:
    """Kernels of ours for both passes. Raises RuntimeError where torch's are faster."""
    shape = (posed.batch, posed.q_len, posed.heads, posed.head_dim)
    x = [torch.empty(shape).transpose(1, 2) for _ in range(3)]  # no memory yet
    passes = (posed, posed.reshaped(direction="backward"))
    while not any(serving.explain(one, host_cpu()).by_sdpa for one in passes):  # until they are built
        forward, backward = serving.find(*x, NONE, False).kernel, serving.backward_for(*x, NONE, False).gradients
        if forward and backward:
            return forward, backward
        time.sleep(0.1)
    raise RuntimeError(f"{posed}: kernels of ours serve not both passes; tune for longer")


def both_passes(problems: Iterable[str]) -> list[str]:
    return [str(Problem.parse(p).reshaped(direction=d)) for p in problems for d in ("forward", "backward")]


def measure_order() -> dict[str, Any]:
    """What is left of the rate of two heads, a thread each, where two threads share one: rows or keys in an order that is always the same."""
    cases = [Case("order", ORDER.format(heads)) for heads in (1, 2)]
    for case in cases:
        winners(case.posed)
    one, two = map(steps, cases)
    peers = interleaved({"elsa-tune": one["elsa-tune"], "two heads": two["elsa-tune"]})
    left = peers["two heads"]["ratio"] / 2
    print(f"one head by two threads, at the rate of two heads: {left:.2f}", flush=True)
    return {"peers": peers, "left": left}


def measured(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What kernels of ours can be measured at; nothing, and why, where torch's won: the rest is written all the same."""
    try:
        return {what: measure()}
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"{what}: not measured, for {error}", flush=True)
        return {}


def verdict(goal: str, asked: float, ratios: Mapping[str, float], at_most: bool = False) -> dict[str, Any]:
    """The geometric mean of ratios, and the worst of them."""
    mean = math.exp(statistics.mean(map(math.log, ratios.values())))
    worst = (max if at_most else min)(ratios, key=lambda name: ratios[name])
    reached = ratios[worst] <= asked if at_most else mean >= asked
    found = {"goal": goal, "asked": asked, "geometric_mean": mean, "worst": ratios[worst], "worst_at": worst}
    return {**found, "reached": reached, **({"at_most": True} if at_most else {})}


def judge(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal that has cases."""
    of_cases = {name: found["peers"]["torch flash"]["ratio"] for name, found in results.items()}
    begun = ((goal, asked, {n: r for n, r in of_cases.items() if n.startswith(start)}) for goal, asked, start in GOALS)
    return [verdict(goal, asked, ratios) for goal, asked, ratios in begun if ratios]


def measure_memory() -> dict[str, dict[str, float]]:
    """MiB of a step, by length."""
    found = {}
    for n, heads in HEADS.items():
        times = 3 if n * heads < 1 << 16 else 1  # minutes each
        each = {who: statistics.median(peak(who, n) for _ in range(times)) for who in ("elsa-tune", "torch flash")}
        found[str(n)] = each
        told = ", ".join(f"{who} {mib:.0f} MiB" for who, mib in each.items())
        print(f"memory of a step of {n} tokens, {heads} heads: {told}", flush=True)
    first, last = (found[str(n)]["elsa-tune"] / (n * HEADS[n]) for n in (min(HEADS), max(HEADS)))
    print(f"memory for a token of a head at {max(HEADS)}, of that at {min(HEADS)}: {last / first:.2f}")
    return found


def measure_second() -> dict[str, Any]:
    """Of 1K tokens against torch's math, and how long that of LONG takes."""
    peers = interleaved({"elsa-tune": second(1024, 8, elsa_tune.attention), "torch math": second(1024, 8, by_math)})
    seconds = timed(second(LONG, 1, elsa_tune.attention))
    print(
        f"second derivative: torch math {peers['torch math']['ratio']:.2f}; of {LONG} tokens, one head: {seconds:.1f} s"
    )
    return {"peers": peers, "long": {"tokens": LONG, "seconds": seconds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", help="only cases whose names begin so; repeatable; nothing is written"
    )
    parser.add_argument("--tune-seconds", type=float, default=8.0, help="for each problem that is not tuned yet")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        told_peak(options.peak[0], int(options.peak[1]))
        return
    chosen = [c for c in CASES if not options.case or any(c.name.startswith(start) for start in options.case)]
    problems = [c.problem for c in chosen]
    if not options.case:
        problems += [SECOND, *(MEMORY[n] for n in HEADS if n <= RACED), ORDER.format(1), ORDER.format(2)]
    tune_first(both_passes(problems), options.tune_seconds)
    results: dict[str, dict[str, Any]] = {}
    for case in chosen:
        results[case.name] = found = step(case)
        torchs = found["peers"]["torch flash"]
        told = f"{torchs['ratio']:.2f} [{torchs['low']:.2f}, {torchs['high']:.2f}]"
        apart = "apart" if found["difference"] is None else f"apart by {found['difference']:.1e}"
        print(f"{case.name}: torch {told}; {found['variant']}, {apart}", flush=True)
    verdicts = judge(results)
    whole: dict[str, Any] = {}
    if not options.case:
        for what, measure in (("second", measure_second), ("memory", measure_memory), ("order", measure_order)):
            whole |= measured(what, measure)
    if "second" in whole:
        ratio = whole["second"]["peers"]["torch math"]["ratio"]
        verdicts.append(verdict("second derivative at 1K, against torch's math", 2.0, {"1024": ratio}))
    if "memory" in whole:
        shares = {n: mib["elsa-tune"] / mib["torch flash"] for n, mib in whole["memory"].items()}
        verdicts.append(verdict("peak memory of a step, of torch's", 1.1, shares, at_most=True))
    print("\ngoal | asked | reached | worst")
    for v in verdicts:
        reached = f"{v['geometric_mean']:.2f} {'' if v['reached'] else 'SHORT'}"
        print(f"{v['goal']} | {v['asked']:.2f} | {reached} | {v['worst']:.2f} {v['worst_at']}")
    if options.case:
        return
    write("gradients-", goals=verdicts, results=results, **whole)


if __name__ == "__main__":
    main()

"""The true gradients, in float64, of what a forward pass saved, and the error of those that a kernel found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate import operands as given
from elsa_tune.generate.logsumexp import hidden
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import operator as operators
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import NONE
from elsa_tune.problem import Problem
from elsa_tune.prove.reference import LARGEST_CONSTANT, Error, Inputs, logit_error

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class _Pair:
    """A KV head of a batch entry, in floats ``wide``; arrays of scores are leaves of autograd."""

    problem: Problem
    inputs: Inputs
    batch: int
    kv_head: int
    wide: torch.dtype
    own: dict[str, Any]
    key: Tensor
    value: Tensor

    def rows(self, query: Tensor, head: int, first: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """Scores [rows, keys], values beside them, of the pair's keys and of terms, whose value is 0, and what weights are multiplied by
        before they meet them. ``query`` [rows, head_dim] are those of a head from position ``first`` on."""
        problem, place = self.problem, query.device
        scale = 1 / math.sqrt(problem.head_dim) if self.inputs.scale is None else self.inputs.scale
        position = torch.arange(first, first + len(query), device=place)[:, None]
        key = torch.arange(problem.kv_len, device=place)
        at: dict[str, Any] = {"batch": self.batch, "head": head, "position": position, "key": key}
        at |= {"behind": problem.kv_len - problem.q_len, "kv_head": self.kv_head}
        chain, mask = scores.get(problem.score), masks.get(problem.mask)
        logits: Tensor = chain.of(query @ self.key.T * scale, self.own, **at)
        if problem.mask != NONE:
            limits = given.limits_at(problem, self.own, batch=self.batch, position=position)
            logits = logits.masked_fill(hidden(problem, position, key, limits), -math.inf)
        if mask.tested:
            logits = logits.masked_fill(~mask.passes(self.own, **at), -math.inf)
        value, factor = self.value, chain.factor(self.own, **at)
        factors: Tensor | float = 1.0 if factor is None else factor.to(self.wide)
        for term in chain.terms:
            score = term.at(self.own[term.name], {"batch": self.batch, "head": head})
            logits = torch.cat([logits, score.expand(len(query), 1)], 1)
            value = torch.cat([value, value.new_zeros(1, value.shape[1])])
            if isinstance(factors, Tensor):
                factors = torch.cat([factors, factors.new_ones(len(factors), 1)], 1)
        return logits, value, factors


def _pair(problem: Problem, inputs: Inputs, b: int, h: int, wide: torch.dtype, own: dict[str, Any]) -> _Pair:
    key, value = inputs.key[b, h].to(wide), inputs.value[b, h].to(wide)
    return _Pair(problem, inputs, b, h, wide, own, key, value)


def _own(problem: Problem, inputs: Inputs, wide: torch.dtype) -> dict[str, Any]:
    """Operands by name, arrays of scores in floats ``wide``."""
    own = given.named(problem, inputs.operands)
    return own | {array.name: own[array.name].to(wide) for array in scores.get(problem.score).differentiable}


def _weights(problem: Problem, logits: Tensor) -> tuple[Tensor, Tensor]:
    """P, and the log-sum-exp of each row, beside whose largest score its sum may vanish; a row that sees no key weighs nothing."""
    top = logits.amax(-1).nan_to_num(neginf=0.0)
    near = logits - top[:, None]
    sums = near.logsumexp(-1)
    return operators.get(problem.operator).weights(near, sums.masked_fill(sums == -math.inf, 0.0)), sums + top


def with_forward(problem: Problem, inputs: Inputs, generator: torch.Generator) -> Inputs:
    """The case with what its forward pass saved, by float32 or float64 products of ROWS_AT_ONCE rows at a time, and a gradient."""
    wide = torch.float64 if inputs.query.numel() <= 1 << 16 else lse_dtype(inputs.query)
    own = _own(problem, inputs, wide)
    output = inputs.query.new_empty(*inputs.query.shape[:3], problem.value_dim)
    lse = inputs.query.new_empty(inputs.query.shape[:3], dtype=lse_dtype(inputs.query))
    for b in range(problem.batch):
        for head in range(problem.heads):
            pair = _pair(problem, inputs, b, head // problem.group, wide, own)
            for first in range(0, problem.q_len, ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                logits, value, factors = pair.rows(inputs.query[b, head, rows].to(wide), head, first)
                p, lse[b, head, rows] = _weights(problem, logits)
                output[b, head, rows] = ((p * factors) @ value).to(output.dtype)
    grad = torch.randn(output.shape, generator=generator).to(output)
    return replace(inputs, forward=(output, lse, grad))


@dataclass(frozen=True)
class Gradients:
    """float64 gradients of a (batch, KV head) pair: dQ [group, q_len, head_dim], dK, dV; and of each array of scores what the pair adds,
    with the sum of magnitudes of its largest element."""

    query: Tensor
    key: Tensor
    value: Tensor
    arrays: dict[str, tuple[Tensor, float]]


def truth(problem: Problem, inputs: Inputs, b: int, h: int, grad_lse: Tensor | None = None) -> Gradients:
    """The gradients of what the forward pass saved. Weights are computed again, for a log-sum-exp is rounded; D is of the output."""
    assert inputs.forward is not None
    output, _, grad = inputs.forward
    operator, wide = operators.get(problem.operator), torch.float64
    own = _own(problem, inputs, wide)
    arrays = {array.name: own[array.name].requires_grad_() for array in scores.get(problem.score).differentiable}
    pair = _pair(problem, inputs, b, h, wide, own)
    pair.key.requires_grad_()
    dk, dv = torch.zeros_like(pair.key), torch.zeros_like(pair.value)
    dq = pair.key.new_zeros(problem.group, problem.q_len, problem.head_dim)
    found = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in arrays.items()}
    for n, head in enumerate(range(h * problem.group, (h + 1) * problem.group)):
        for first in range(0, problem.q_len, ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            query = inputs.query[b, head, rows].to(wide).requires_grad_()
            logits, value, factors = pair.rows(query, head, first)
            p, _ = _weights(problem, logits.detach())
            g = grad[b, head, rows].to(wide)
            delta = (g * output[b, head, rows].to(wide)).sum(-1, keepdim=True)
            if grad_lse is not None:
                delta = delta - grad_lse[b, head, rows].to(wide)[:, None]
            dp = g @ value.T * factors
            ds = operator.score_gradient(p, dp, delta)
            magnitude = p * (dp.abs() + delta.abs())
            leaves = [query, pair.key, *arrays.values()]
            of_query, of_key, *of_arrays = torch.autograd.grad(logits, leaves, ds, retain_graph=True)
            dq[n, rows] = of_query
            dk += of_key
            dv += (p * factors)[:, : problem.kv_len].T @ g
            sums = torch.autograd.grad(logits, list(arrays.values()), magnitude) if arrays else ()
            for (total, largest), one, size in zip(found.values(), of_arrays, sums, strict=True):
                total += one
                largest += size.abs()
    return Gradients(dq, dk, dv, {name: (total, float(size.max())) for name, (total, size) in found.items()})


def error(
    problem: Problem,
    inputs: Inputs,
    found: tuple[Tensor | None, ...],
    pairs: list[tuple[int, int]],
    grad_lse: Tensor | None = None,
) -> Error:
    """The largest error of dQ, dK, dV in some (batch, KV head) pairs, and of the gradients of arrays where all pairs are given, relative
    to the largest gradient of each kind, or to what rounding dO V^T - D alone may leave of one that cancels.

    Allowed is C u (1 + log2 n) of it, and what rounding the logits costs, as for outputs, with a factor 4 for the three
    products that each gradient passes through.
    """
    u = elements.precision(problem.precision).unit
    unit = operators.get(problem.operator).bound(u, max(problem.kv_len, problem.q_len))
    scale = abs(1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale)
    assert inputs.forward is not None

    def norm(x: Tensor) -> float:
        return float(x.float().norm(dim=-1).max())

    of_weights = scores.get(problem.score).largest_factor(problem.numbers)
    products = norm(inputs.forward[2]) * norm(inputs.value) * of_weights
    terms = products * scale  # of dS, before they cancel
    least = torch.finfo(lse_dtype(inputs.query)).tiny / unit  # weights below are 0
    element = torch.finfo(inputs.value.dtype)
    rounded = element.tiny * element.eps / unit  # of what is no more than the least number of the element
    floors = (
        terms * float(inputs.key.abs().max()),
        terms * float(inputs.query.abs().max()),
        max(norm(inputs.forward[2]) * least * of_weights, rounded),
        products,
    )
    totals: dict[str, tuple[Tensor, float]] = {}
    worst = 0.0
    for difference, largest in _differences(problem, inputs, found, pairs, grad_lse, floors, totals):
        if math.isnan(difference):
            return Error(math.inf, math.inf, False)
        worst = max(worst, difference / largest if largest else (math.inf if difference > unit else 0.0))
    allowed = 4 * (LARGEST_CONSTANT * unit + 2 * logit_error(problem, inputs))
    return Error(worst, worst / unit, worst <= allowed, u)


def _differences(
    problem: Problem, inputs: Inputs, found: tuple[Tensor | None, ...], pairs: list[tuple[int, int]],
    grad_lse: Tensor | None, floors: tuple[float, ...], totals: dict[str, tuple[Tensor, float]],
) -> Iterator[tuple[float, float]]:  # fmt: skip
    """Of every gradient how far it is from the truth, and what that is relative to."""
    for b, h in pairs:
        true = truth(problem, inputs, b, h, grad_lse)
        group = slice(h * problem.group, (h + 1) * problem.group)
        each: list[tuple[Any, Tensor]] = [(group, true.query), (h, true.key), (h, true.value)]
        for x, (head, those), floor in zip(found, each, floors, strict=False):
            if x is not None:
                yield float((x[b, head].double() - those).abs().max()), max(float(those.abs().max()), floor)
        for name, (one, size) in true.arrays.items():
            total, largest = totals.get(name, (torch.zeros_like(one), 0.0))
            totals[name] = total + one, largest + size
    arrays = scores.get(problem.score).differentiable
    if len(pairs) == problem.batch * problem.kv_heads:
        for array, x in zip(arrays, found[3:], strict=False):
            if x is not None:
                total, largest = totals[array.name]
                yield float((x.double() - total).abs().max()), max(largest, floors[3])

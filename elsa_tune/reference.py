"""Attention in float64: the truth, inputs that provoke mistakes, and the error bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elsa_tune.problem import Problem

UNIT = 2.0**-24
"""Unit round-off of float32."""

CLASS_UNITS = {"strict": UNIT, "fp32": UNIT, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Unit round-off of what each precision class rounds weights and outputs to."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Inputs:
    """One case: tensors as [batch, heads, length, dim], the scale (None: 1/sqrt(head_dim)), and what it provokes."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    natural: bool = True

    def to(self, device: str) -> Inputs:
        """The same case on another device."""
        return replace(self, query=self.query.to(device), key=self.key.to(device), value=self.value.to(device))


@dataclass(frozen=True, slots=True)
class Rows:
    """Some query rows, as index tensors into [batch, heads, q_len]."""

    batch: Tensor
    head: Tensor
    position: Tensor


def sample_rows(problem: Problem, generator: torch.Generator, most: int = 48, elements: int = 1 << 26) -> Rows:
    """Up to ``most`` query rows, the first and last among them, fewer where float64 copies of K and V grow large."""
    total = problem.batch * problem.heads * problem.q_len
    afford = max(2, elements // (problem.kv_len * (problem.head_dim + problem.value_dim)))
    count = min(total, most, afford)
    index = torch.randint(total, (count,), generator=generator)
    index[0], index[-1] = 0, total - 1
    per_batch = problem.heads * problem.q_len
    return Rows(index // per_batch, index % per_batch // problem.q_len, index % problem.q_len)


def attention_rows(problem: Problem, inputs: Inputs, rows: Rows) -> Tensor:
    """float64 attention of the chosen rows, [rows, value_dim]. A row that sees no key is 0."""
    kv_head = rows.head // problem.group
    out = torch.empty(len(rows.batch), problem.value_dim, dtype=torch.float64)
    scale = 1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale
    for i, (b, h, kv, q) in enumerate(zip(rows.batch, rows.head, kv_head, rows.position, strict=True)):
        seen = min(int(q) + 1, problem.kv_len) if problem.mask == "causal" else problem.kv_len
        logits = inputs.key[b, kv, :seen].double() @ (inputs.query[b, h, q].double() * scale)
        out[i] = (torch.softmax(logits, 0) @ inputs.value[b, kv, :seen].double()).cpu()
    return out


def every_row(problem: Problem) -> Rows:
    """All query rows of a problem."""
    grid = torch.meshgrid(
        torch.arange(problem.batch), torch.arange(problem.heads), torch.arange(problem.q_len), indexing="ij"
    )
    return Rows(*(axis.reshape(-1) for axis in grid))


def random_inputs(problem: Problem, generator: torch.Generator) -> Inputs:
    """Standard normal tensors of the problem's shape and dtype."""
    p, dtype = problem, DTYPES[problem.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Inputs(
        "normal",
        normal(p.batch, p.heads, p.q_len, p.head_dim),
        normal(p.batch, p.kv_heads, p.kv_len, p.head_dim),
        normal(p.batch, p.kv_heads, p.kv_len, p.value_dim),
    )


def _given_logits(problem: Problem, logits: Tensor, generator: torch.Generator, name: str) -> Inputs:
    """Inputs whose logits are ``logits`` (one value a key), whatever the query row."""
    base = random_inputs(problem, generator)
    query, key = torch.zeros_like(base.query), torch.zeros_like(base.key)
    query[..., 0], key[..., 0] = 1, logits.to(key.dtype)
    return Inputs(name, query, key, base.value, scale=1.0, natural=False)


def hostile(problem: Problem, generator: torch.Generator) -> Iterator[tuple[Problem, Inputs]]:
    """Small problems of the same family and group that provoke the known mistakes."""
    small = problem.reshaped(batch=2, heads=2 * problem.group, kv_heads=2, q_len=37, kv_len=131)
    lengths = {"one key": (5, 1), "one query": (1, 700), "more keys than queries": (19, 333), "more queries": (150, 67)}
    yield small, random_inputs(small, generator)
    for name, (q_len, kv_len) in lengths.items():
        shaped = small.reshaped(q_len=q_len, kv_len=kv_len)
        made = random_inputs(shaped, generator)
        yield shaped, Inputs(name, made.query, made.key, made.value)

    made = random_inputs(small, generator)
    yield small, Inputs("negative scale", made.query, made.key, made.value, scale=-0.3)
    yield small, Inputs("scale 0: equal logits", made.query, made.key, made.value, scale=0.0)
    signs = torch.tensor([1e3, -1e3]).repeat(small.kv_len)[: small.kv_len, None]
    yield small, Inputs("cancelling values", made.query * 0, made.key, made.value + signs)

    def by_position(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    yield (
        small,
        Inputs(
            "[batch, length, head, dim] memory", by_position(made.query), by_position(made.key), by_position(made.value)
        ),
    )

    normal = torch.randn(small.kv_len, generator=generator)
    three = small.reshaped(kv_len=3)
    yield small, _given_logits(small, normal + 1e4, generator, "logits shifted by 1e4")
    yield small, _given_logits(small, normal - 1e4, generator, "logits shifted by -1e4")
    yield small, _given_logits(small, normal * 1e3, generator, "one key takes all")
    yield three, _given_logits(three, torch.tensor([0.0, -120.0, 0.0]), generator, "a key at -120 between two at 0")


@dataclass(frozen=True, slots=True)
class Error:
    """The largest error of an output relative to max|v|, its constant C, and whether the bound allows it.

    C is the error as a multiple of u (1 + log2 n) max|v|, the bound for logits as given.
    """

    relative: float
    constant: float
    allowed: bool


LARGEST_CONSTANT = 4.0
"""C in |err| <= C u (1 + log2 n) max|v|: above it, and above what rounding the logits may cost, a kernel is wrong."""


def measure_error(problem: Problem, inputs: Inputs, rows: Rows, out: Tensor, truth: Tensor) -> Error:
    """Compare output rows with the truth. A NaN where the truth has none is an infinite error.

    Rounding the logits themselves may cost 2 max|ds| max|v| more, with |ds| <= u sqrt(head_dim) |q||k| scale, the
    statistical form of gamma_d (docs/how-it-works.md).
    """
    difference = float((out[rows.batch, rows.head, rows.position].double().cpu() - truth).abs().max())
    if math.isnan(difference):
        return Error(math.inf, math.inf, False)
    largest = float(inputs.value.abs().max()) or 1.0
    scale = abs(1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale)
    norms = float(inputs.query.float().norm(dim=-1).max() * inputs.key.float().norm(dim=-1).max()) * scale
    unit = CLASS_UNITS[problem.precision] * (1 + math.log2(problem.kv_len)) * largest
    products = 2 * CLASS_UNITS["tf32"] if problem.precision == "tf32" else UNIT  # halves multiply exactly in float32
    from_logits = 2 * products * math.sqrt(problem.head_dim) * norms * largest
    return Error(difference / largest, difference / unit, difference <= LARGEST_CONSTANT * unit + from_logits)

"""Attention in float64: the truth, inputs that provoke mistakes, and the error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elsa_tune.order import arranged
from elsa_tune.problem import Problem

UNIT = 2.0**-24
"""Unit round-off of float32."""

CLASS_UNITS = {"strict": UNIT, "fp32": UNIT, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8, "approx": 2.0**-10}
"""Unit round-off of what each precision class rounds weights and outputs to."""

ROUNDS_PRODUCTS = ("tf32", "approx")
"""Classes whose products are of rounded operands, or are summed rounded; the others' are exact in float32."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Inputs:
    """One case: tensors as [batch, heads, length, dim], the scale (None: 1/sqrt(head_dim)), and what it provokes.

    ``forward``, for gradients: output, its log-sum-exp [batch, heads, q_len] in float32, and the output's gradient.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    natural: bool = True
    forward: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a kernel is called with: query, key, value; for gradients also output, log-sum-exp, and output's gradient."""
        return (self.query, self.key, self.value, *(self.forward or ()))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same case with every tensor changed."""
        query, key, value, *rest = map(change, self.tensors)
        return replace(self, query=query, key=key, value=value, forward=(rest[0], rest[1], rest[2]) if rest else None)

    def ordered(self, orders: Sequence[str]) -> Inputs:
        """A copy in fresh memory with query, key and value in the given memory orders (elsa_tune.order)."""
        copy = self.with_tensors(torch.clone)
        query, key, value = arranged(orders, self.query, self.key, self.value)
        return replace(copy, query=query, key=key, value=value)

    def to(self, device: str) -> Inputs:
        """The same case on another device."""
        return self.with_tensors(lambda x: x.to(device))


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
    lengths = {
        "one key": (5, 1),
        "one query": (1, 700),
        "whole tiles": (64, 256),
        "more keys than queries": (19, 333),
        "more queries": (150, 67),
    }
    yield small, random_inputs(small, generator)
    for name, (q_len, kv_len) in lengths.items():
        shaped = small.reshaped(q_len=q_len, kv_len=kv_len)
        made = random_inputs(shaped, generator)
        yield shaped, Inputs(name, made.query, made.key, made.value)

    made = random_inputs(small, generator)
    yield small, Inputs("negative scale", made.query, made.key, made.value, scale=-0.3)
    yield small, Inputs("scale 0: equal logits", made.query, made.key, made.value, scale=0.0)
    signs = torch.tensor([1e3, -1e3]).repeat(small.kv_len)[: small.kv_len, None]
    yield small, Inputs("cancelling values", made.query * 0, made.key, made.value + signs.to(made.value.dtype))

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


def _product_unit(problem: Problem) -> float:
    """What a logit's products are rounded to, together; halves multiply exactly in float32."""
    return 2 * CLASS_UNITS[problem.precision] if problem.precision in ROUNDS_PRODUCTS else UNIT


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
    products = _product_unit(problem)
    from_logits = 2 * products * math.sqrt(problem.head_dim) * norms * largest
    return Error(difference / largest, difference / unit, difference <= LARGEST_CONSTANT * unit + from_logits)


def logsumexp(query: Tensor, key: Tensor, is_causal: bool, scale: float | None, rows: int = 256) -> Tensor:
    """log of each row's sum of exponentials, [batch, heads, q_len], float32; scores of ``rows`` rows exist at a time."""
    batch, heads, q_len, head_dim = query.shape
    group, kv_len = heads // key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = key.to(wide).unsqueeze(2).transpose(-1, -2)  # [batch, kv_heads, 1, head_dim, kv_len]
    found = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    for first in range(0, q_len, rows):
        some = query[:, :, first : first + rows].to(wide) * (head_dim**-0.5 if scale is None else scale)
        scores = (some.view(batch, -1, group, some.shape[2], head_dim) @ keys).flatten(1, 2)
        if is_causal:
            position = torch.arange(first, first + some.shape[2], device=query.device)[:, None]
            hidden = torch.arange(kv_len, device=query.device)[None, :] > position
            scores = scores.masked_fill(hidden, float("-inf"))
        found[:, :, first : first + rows] = torch.logsumexp(scores, -1)
    return found


# Gradients: from the output and log-sum-exp that the forward pass saved, as every kernel computes them.


def with_forward(problem: Problem, inputs: Inputs, generator: torch.Generator) -> Inputs:
    """The case with what its forward pass saved, by float32 or float64 products of 256 rows at a time, and a gradient."""
    wide = torch.float64 if inputs.query.numel() <= 1 << 16 else torch.float32
    lse = logsumexp(inputs.query.to(wide), inputs.key.to(wide), problem.mask == "causal", inputs.scale)
    group, dtype = problem.group, inputs.query.dtype
    output = torch.empty(*inputs.query.shape[:3], problem.value_dim, dtype=dtype, device=inputs.query.device)
    for b in range(problem.batch):
        for h in range(problem.heads):
            for first in range(0, problem.q_len, 256):
                p, _ = _weights(problem, inputs, lse, b, h, torch.arange(first, min(first + 256, problem.q_len)), wide)
                output[b, h, first : first + 256] = (p @ inputs.value[b, h // group].to(wide)).to(dtype)
    grad = torch.randn(output.shape, generator=generator).to(output)
    return replace(inputs, forward=(output, lse.float(), grad))


def _weights(
    problem: Problem, inputs: Inputs, lse: Tensor, b: int, h: int, rows: Tensor, wide: torch.dtype
) -> tuple[Tensor, float]:
    """P of some query rows of one head against all keys, [rows, kv_len], from the saved log-sum-exp; and the scale."""
    scale = 1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale
    at = rows.to(inputs.query.device)
    scores = inputs.query[b, h, at].to(wide) @ inputs.key[b, h // problem.group].to(wide).T * scale
    p = torch.exp(scores - lse[b, h, at, None].to(wide))
    if problem.mask == "causal":
        p = p.masked_fill(torch.arange(problem.kv_len, device=p.device)[None, :] > at[:, None], 0.0)
    return p, scale


def gradient_truth(problem: Problem, inputs: Inputs, b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """float64 dQ of the first head, dK and dV of KV head ``h`` of batch entry ``b``, from what the forward pass saved."""
    assert inputs.forward is not None
    output, lse, grad = inputs.forward
    key, value, wide = inputs.key[b, h].double(), inputs.value[b, h].double(), torch.float64
    dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    dq = torch.zeros(problem.q_len, problem.head_dim, dtype=wide, device=key.device)
    for head in range(h * problem.group, (h + 1) * problem.group):
        for first in range(0, problem.q_len, 256):
            rows = torch.arange(first, min(first + 256, problem.q_len))
            p, scale = _weights(problem, inputs, lse, b, head, rows, wide)
            g = grad[b, head, first : first + 256].double()
            delta = (g * output[b, head, first : first + 256].double()).sum(-1, keepdim=True)
            ds = p * (g @ value.T - delta) * scale
            dv += p.T @ g
            dk += ds.T @ inputs.query[b, head, first : first + 256].double()
            if head == h * problem.group:
                dq[first : first + 256] = ds @ key
    return dq, dk, dv


def gradient_error(problem: Problem, inputs: Inputs, found: tuple[Tensor, ...], heads: list[tuple[int, int]]) -> Error:
    """The largest error of dQ, dK, dV in some (batch, KV head) pairs, relative to the largest gradient of each kind, or to
    what rounding dO V^T - D alone may leave of one that cancels.

    Allowed is C u (1 + log2 n) of it, and what rounding the logits costs, as for outputs, with a factor 4 for the three
    products that each gradient passes through.
    """
    unit = CLASS_UNITS[problem.precision] * (1 + math.log2(max(problem.kv_len, problem.q_len)))
    products = _product_unit(problem)
    scale = abs(1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale)
    norms = float(inputs.query.float().norm(dim=-1).max() * inputs.key.float().norm(dim=-1).max()) * scale
    assert inputs.forward is not None

    def norm(x: Tensor) -> float:
        return float(x.float().norm(dim=-1).max())

    terms = norm(inputs.forward[2]) * norm(inputs.value) * scale  # of dS, before they cancel
    floors = (terms * float(inputs.key.abs().max()), terms * float(inputs.query.abs().max()), 0.0)
    worst = 0.0
    for b, h in heads:
        truths = gradient_truth(problem, inputs, b, h)
        places = ((b, h * problem.group), (b, h), (b, h))
        for x, truth, place, floor in zip(found, truths, places, floors, strict=True):
            difference = float((x[place].double() - truth).abs().max())
            largest = max(float(truth.abs().max()), floor)
            if math.isnan(difference):
                return Error(math.inf, math.inf, False)
            worst = max(worst, difference / largest if largest else (math.inf if difference > unit else 0.0))
    allowed = 4 * (LARGEST_CONSTANT * unit + 2 * products * math.sqrt(problem.head_dim) * norms)
    return Error(worst, worst / unit, worst <= allowed)

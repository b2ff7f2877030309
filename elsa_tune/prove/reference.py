"""The truth, in float64 or twice its digits; inputs that provoke mistakes; and the error bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elsa_tune.generate import operands as given
from elsa_tune.generate.logsumexp import hidden
from elsa_tune.order import arranged
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import operator as operators
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import NONE
from elsa_tune.parts.operand import Array, Operands
from elsa_tune.parts.score import farthest
from elsa_tune.problem import Problem
from elsa_tune.prove.double_double import DoubleDouble


@dataclass(frozen=True, slots=True)
class Inputs:
    """One case: tensors as [batch, heads, length, dim], the scale (None: 1/sqrt(head_dim)), and what it provokes.

    ``additions``: so many additions of equal numbers round the same way wherever keys are folded in a row; 0 where chance rules.
    ``forward``, for gradients: output, its log-sum-exp [batch, heads, q_len], and the output's gradient.
    ``operands``: what a kernel takes beside its tensors, as the problem's family declares them.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    natural: bool = True
    additions: int = 0
    forward: tuple[Tensor, Tensor, Tensor] | None = None
    operands: Operands = ()

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
        moved = tuple(x.to(device) if isinstance(x, Tensor) else x for x in self.operands)
        return replace(self.with_tensors(lambda x: x.to(device)), operands=moved)


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


Truth = Any
"""float64 tensors, or DoubleDouble where float64 is what is judged."""


def exactly(problem: Problem, x: Tensor) -> Truth:
    """A tensor in the arithmetic that the problem is judged by."""
    return DoubleDouble(x) if elements.get(problem.dtype).state == "float64" else x.double()


def attention_rows(problem: Problem, inputs: Inputs, rows: Rows) -> Truth:
    """The true attention of the chosen rows, [rows, value_dim]. A row that sees no key is 0."""
    return attention_rows_with_lse(problem, inputs, rows)[0]


def attention_rows_with_lse(problem: Problem, inputs: Inputs, rows: Rows) -> tuple[Truth, Truth]:
    """The true attention of the chosen rows, [rows, value_dim], and the log of each row's sum of exponentials, [rows].

    Rows that share K and V are computed together, over KEYS_AT_ONCE keys at a time. A row that sees no key is 0 and -inf.
    """
    out = exactly(problem, torch.zeros(len(rows.batch), problem.value_dim))
    total = exactly(problem, torch.full((len(rows.batch),), -math.inf))
    pairs = rows.batch * problem.kv_heads + rows.head // problem.group
    for pair in sorted(set(pairs.tolist())):
        which = pairs == pair
        some = Rows(rows.batch[which], rows.head[which], rows.position[which])
        out[which], total[which] = _rows_of_a_pair(
            problem, inputs, some, pair // problem.kv_heads, pair % problem.kv_heads
        )
    return out, total


KEYS_AT_ONCE = 1 << 14


def _rows_of_a_pair(problem: Problem, inputs: Inputs, rows: Rows, batch: int, kv_head: int) -> tuple[Truth, Truth]:
    scale = 1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale
    query = exactly(problem, inputs.query[rows.batch, rows.head, rows.position]) * scale
    position, heads = (x.to(query.device)[:, None] for x in (rows.position, rows.head))
    mask, chain = masks.get(problem.mask), scores.get(problem.score)
    own = given.named(problem, inputs.operands)
    limits = given.limits_at(problem, own, batch=batch, position=position)
    own |= {array.name: exactly(problem, own[array.name]) for array in chain.differentiable}
    far = farthest(elements.get(problem.dtype).unit)
    beside = {"behind": problem.kv_len - problem.q_len, "kv_head": kv_head}

    def some_keys() -> Iterator[tuple[Truth, Tensor, Tensor | None]]:
        for first in range(0, problem.kv_len, KEYS_AT_ONCE):
            key, value = (x[batch, kv_head, first : first + KEYS_AT_ONCE].double() for x in (inputs.key, inputs.value))
            index = torch.arange(first, first + len(key), device=query.device)
            place = {"batch": batch, "head": heads, "position": position, "key": index, **beside}
            logits = chain.of(query @ key.T, own, **place)
            logits = logits.where(
                logits.double() >= far, logits.double()
            )  # as torch's math does, loses the digits of a score
            if problem.mask != NONE:
                logits = logits.masked_fill(hidden(problem, position, index, limits), -math.inf)
            if mask.tested:
                logits = logits.masked_fill(~mask.passes(own, **place), -math.inf)
            yield logits, value, chain.factor(own, **place)
        for term in chain.terms:
            score = term.at(own[term.name], {"batch": batch, "head": heads}).expand(len(query), 1)
            yield score, torch.zeros(1, problem.value_dim, dtype=torch.float64, device=query.device), None

    out, total = operators.get(problem.operator).rows(some_keys())
    return out.cpu(), total.cpu()


def every_row(problem: Problem) -> Rows:
    """All query rows of a problem."""
    grid = torch.meshgrid(
        torch.arange(problem.batch), torch.arange(problem.heads), torch.arange(problem.q_len), indexing="ij"
    )
    return Rows(*(axis.reshape(-1) for axis in grid))


def drawn(dtype: torch.dtype) -> torch.dtype:
    """Of which random numbers are, before they are rounded to ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def random_inputs(problem: Problem, generator: torch.Generator) -> Inputs:
    """Standard normal tensors of the problem's shape and dtype."""
    p, dtype = problem, elements.get(problem.dtype).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=drawn(dtype)).to(dtype)

    return Inputs(
        "normal",
        normal(p.batch, p.heads, p.q_len, p.head_dim),
        normal(p.batch, p.kv_heads, p.kv_len, p.head_dim),
        normal(p.batch, p.kv_heads, p.kv_len, p.value_dim),
        operands=given.typical(p),
    )


def _given_logits(problem: Problem, logits: Tensor, generator: torch.Generator, name: str) -> Inputs:
    """Inputs whose logits are ``logits`` (one value a key), whatever the query row."""
    base = random_inputs(problem, generator)
    query, key = torch.zeros_like(base.query), torch.zeros_like(base.key)
    query[..., 0], key[..., 0] = 1, logits.to(key.dtype)
    return Inputs(name, query, key, base.value, scale=1.0, natural=False, operands=base.operands)


LONG = (1 << 16) + 1
"""Keys of the long cases: one more than tiles share."""

_MASKED_PAIRS = 1 << 24
"""(query, key) pairs of a long case with a mask, where as many queries as keys are needed."""


def hostile(problem: Problem, generator: torch.Generator, longest: int = LONG) -> Iterator[tuple[Problem, Inputs]]:
    """Problems of the same family and group that provoke the known mistakes: small ones, and some of ``longest`` keys; numbers in
    turn what the examples of mask and scores are, so that they cut inside small shapes. Arrays are typical first, then hostile."""
    arrays = any(isinstance(one, Array) for one in problem.declared)
    for turn in range(given.turns(problem)):
        posed = given.with_example(problem, turn)
        if not turn:
            yield from _small(posed, generator)
            yield from _long(posed, generator, longest)
        if turn or arrays:
            for shaped, inputs in _lengths(posed, generator):
                name = f"{inputs.name}, example {turn}"
                yield shaped, replace(inputs, name=name, operands=given.example(shaped, turn))


def _long(problem: Problem, generator: torch.Generator, longest: int) -> Iterator[tuple[Problem, Inputs]]:
    """Few queries and many keys, along which values and scores change slowly, or not at all: what a fold does to its state at
    every leaf adds up. Of the query rows one sees the scores, one none of them, one their negatives."""
    masked = problem.mask != NONE
    keys = min(longest, math.isqrt(_MASKED_PAIRS // problem.group)) if masked else longest
    shaped = problem.reshaped(batch=1, heads=problem.group, kv_heads=1, q_len=keys if masked else 3, kv_len=keys)
    dtype = elements.get(problem.dtype).dtype
    turns = torch.tensor([1.0, 0.0, -1.0]).repeat(-(-shaped.q_len // 3))[: shaped.q_len]
    query = torch.zeros(1, shaped.heads, shaped.q_len, shaped.head_dim, dtype=dtype)
    query[..., 0] = turns.to(dtype)
    along = torch.linspace(0, 1, keys, dtype=drawn(dtype))
    few = 0.1 * torch.randn(1009, shaped.value_dim, generator=generator, dtype=drawn(dtype))
    noise = (
        few.repeat(-(-keys // 1009), 1)[:keys] * (1 + along)[:, None]
    )  # many numbers at little cost, none of them twice

    def case(name: str, scores: Tensor, values: Tensor, additions: int = 0) -> tuple[Problem, Inputs]:
        key = torch.zeros(1, 1, keys, shaped.head_dim, dtype=dtype)
        key[0, 0, :, 0] = scores.to(dtype)
        value = values.to(dtype)[None, None]
        operands = given.typical(shaped)
        posed = Inputs(name, query, key, value, scale=1.0, natural=False, additions=additions, operands=operands)
        return shaped, posed

    yield case("scores and values that drift", 8 * along, noise + (2 * along - 1)[:, None])
    early, kept, first = torch.zeros_like(along), noise.clone(), min(3, keys - 1)
    early[first], kept[first] = math.log(keys), 1.0
    yield case("one early key against all others", early, kept)
    least = math.floor(-math.log(elements.get(problem.dtype).unit / 2))
    early[first], kept = least, torch.zeros_like(noise)  # the others weigh half a unit each, and there are many
    kept[first] = 1.0
    yield case("one key that outweighs all others", early, kept, additions=keys // 16)
    constant = torch.rand(1, shaped.value_dim, generator=generator, dtype=drawn(dtype)).expand(keys, -1)
    yield case("equal leaves", torch.full_like(along, 0.3), constant, _additions(keys))


def _additions(keys: int) -> int:
    """In a fold over leaves of 16 keys, the shortest, or in a running sum as long as a law allows."""
    return max(keys // 16, min(keys, LONG // 16))


def _few_heads(problem: Problem) -> Problem:
    return problem.reshaped(batch=2, heads=2 * problem.group, kv_heads=2, q_len=37, kv_len=131)


def _lengths(problem: Problem, generator: torch.Generator) -> Iterator[tuple[Problem, Inputs]]:
    """Normal inputs of lengths that divide nothing, that tiles divide, of one query, of one key."""
    small = _few_heads(problem)
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
        yield shaped, replace(random_inputs(shaped, generator), name=name)


def _small(problem: Problem, generator: torch.Generator) -> Iterator[tuple[Problem, Inputs]]:
    small = _few_heads(problem)
    yield from _lengths(problem, generator)
    made = random_inputs(small, generator)
    yield small, replace(made, name="negative scale", scale=-0.3)
    yield small, replace(made, name="scale 0: equal logits", scale=0.0)
    signs = torch.tensor([1e3, -1e3]).repeat(small.kv_len)[: small.kv_len, None]
    values = made.value + signs.to(made.value.dtype)
    yield small, replace(made, name="cancelling values", query=made.query * 0, value=values)

    def by_position(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    yield small, replace(made.with_tensors(by_position), name="[batch, length, head, dim] memory")

    wide = drawn(made.query.dtype)
    normal = torch.randn(small.kv_len, generator=generator, dtype=wide)
    three = small.reshaped(kv_len=3)
    yield small, _given_logits(small, normal + 1e4, generator, "logits shifted by 1e4")
    yield small, _given_logits(small, normal - 1e4, generator, "logits shifted by -1e4")
    yield small, _given_logits(small, normal * 1e3, generator, "one key takes all")
    steep = small.reshaped(batch=1, heads=problem.group, kv_heads=1, q_len=333, kv_len=333)
    rise = 3000 * round(math.log2(torch.finfo(wide).max)) // 128  # between two leaves farther than an exponent reaches
    slope = torch.linspace(0, rise, steep.kv_len, dtype=wide)
    yield steep, _given_logits(steep, slope, generator, f"scores that grow by {rise}")
    yield steep, _given_logits(steep, -slope, generator, f"scores that fall by {rise}")
    yield three, _given_logits(three, torch.tensor([0.0, -120.0, 0.0]), generator, "a key at -120 between two at 0")


@dataclass(frozen=True, slots=True)
class Error:
    """The largest error of an output relative to max|v|, its constant C, and whether the bound allows it.

    C is the error as a multiple of u (1 + log2 n) max|v|, the bound for logits as given. ``rounding`` is what rounding the true
    result to the output's class may cost, relative to max|v|: no kernel is expected to err less.
    """

    relative: float
    constant: float
    allowed: bool
    rounding: float = 0.0


def _product_unit(problem: Problem) -> float:
    """What a logit's products are rounded to, together; halves multiply exactly in float32."""
    precision = elements.precision(problem.precision)
    return 2 * precision.unit if precision.rounds_products else elements.get(problem.dtype).unit


LARGEST_CONSTANT = 4.0
"""C in |err| <= C u (1 + log2 n) max|v|: above it, and above what rounding the logits may cost, a kernel is wrong."""


def measure_error(problem: Problem, inputs: Inputs, rows: Rows, out: Tensor, truth: Truth) -> Error:
    """Compare output rows with the truth. A NaN where the truth has none is an infinite error.

    Rounding the logits themselves may cost 2 max|ds| max|v| more, with |ds| <= u sqrt(head_dim) |q||k| scale, the
    statistical form of gamma_d; additions that round the same way cost u each (docs/how-it-works.md).
    """
    difference = float((truth - out[rows.batch, rows.head, rows.position].double().cpu()).double().abs().max())
    if math.isnan(difference):
        return Error(math.inf, math.inf, False)
    of_weights = scores.get(problem.score).largest_factor(problem.numbers)
    largest = (float(inputs.value.abs().max()) or 1.0) * of_weights
    u = elements.precision(problem.precision).unit
    unit = operators.get(problem.operator).bound(u, problem.kv_len) * largest
    more = (2 * logit_error(problem, inputs) + elements.get(problem.dtype).unit * inputs.additions) * largest
    rounding = u * float(truth.double().abs().max()) / largest
    return Error(difference / largest, difference / unit, difference <= LARGEST_CONSTANT * unit + more, rounding)


def logit_error(problem: Problem, inputs: Inputs) -> float:
    """What rounding its products may cost a logit; those of columns in which every query is 0 cost nothing."""
    scale = abs(1 / math.sqrt(problem.head_dim) if inputs.scale is None else inputs.scale)
    norms = float(inputs.query.float().norm(dim=-1).max() * inputs.key.float().norm(dim=-1).max()) * scale
    terms = int((inputs.query != 0).flatten(0, -2).any(0).sum())
    error = _product_unit(problem) * math.sqrt(terms) * norms
    own = {"q_len": problem.q_len, "kv_len": problem.kv_len, **given.named(problem, inputs.operands)}
    return scores.get(problem.score).error(error, norms, elements.get(problem.dtype).unit, own)[0]


def lse_trouble(problem: Problem, inputs: Inputs, rows: Rows, lse: Tensor, truth: Truth) -> str:
    """What is wrong about a log-sum-exp [batch, heads, q_len] against the truth of some rows, or nothing.

    Its sum of weights, of the floats that states are of, errs relatively as an output does: C u (1 + log2 n), and a logarithm turns
    that into an absolute error. Adding the maximum and changing the base cost C u |lse| more, and an error of all logits is one
    of their log-sum-exp. -inf, of a row that sees no key, is met exactly. A row all of whose scores lie below farthest() is as far away
    as they are, within a factor of 2.
    """
    u = elements.get(problem.dtype).unit
    found = lse[rows.batch, rows.head, rows.position].double().cpu()
    difference, truth, far = (truth - found).double().abs(), truth.double(), farthest(u)
    both_far = (truth < far) & (found < far) & (found <= truth / 2) & (found >= 2 * truth) & truth.isfinite()
    difference = torch.where((found == truth) | both_far, 0.0, difference).nan_to_num(math.inf)
    unit = u * (1 + math.log2(problem.kv_len) + truth.abs().nan_to_num(posinf=0.0))
    allowed = LARGEST_CONSTANT * unit + u * inputs.additions + logit_error(problem, inputs)
    worst = int((difference / allowed).argmax())
    if bool(difference[worst] <= allowed[worst]):
        return ""
    return f"the log-sum-exp errs by {float(difference[worst]):.1e}, more than {float(allowed[worst]):.1e}"

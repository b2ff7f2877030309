"""Derivatives of attention that no kernel has, of any order, by torch's operations.

Some query rows of some heads are at work at a time, and nothing is kept between them: memory grows with lengths as attention's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elsa_tune.generate.operands import limits_at
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.masks import AttnMask
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.operand import PLACES, Array, values_at
from elsa_tune.problem import Problem

_Function: Any = torch.autograd.Function  # which has no types, nor has the next
_pull: Any = torch.func.vjp
_C: Any = torch._C
_saved = _C._autograd

AT_ONCE = 1 << 19
"""Scores that exist at a time, at least those of one row of a KV head: a few such tensors stay in a cache."""

QUERY, KEY, LSE = (
    ("batch", "heads", "q_len", "dim"),
    ("batch", "kv_heads", "kv_len", "dim"),
    ("batch", "heads", "q_len"),
)


class Region(NamedTuple):
    """Query rows of heads that share some KV heads of a batch entry: where they begin and end along each axis."""

    batch: slice
    heads: slice
    kv_heads: slice
    q_len: slice

    def part(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """Its part of a tensor; all of an axis along which it is shared."""
        places = self._asdict()
        for n, axis in enumerate(axes):
            of = places.get(axis)
            if of is not None and x.shape[n] > 1 and (of.start, of.stop) != (0, x.shape[n]):
                x = x.narrow(n, of.start, of.stop - of.start)
        return x


Rows = Callable[..., tuple[Tensor, ...]]
"""Of a region and its parts of tensors, parts of results."""


@dataclass(frozen=True)
class Blocked:
    """A function of tensors, computed region by region: ``rows`` of their parts gives parts of results; what regions share is added up.
    ``given`` and ``made`` name axes of tensors and results, ``like`` which tensor a result is of the shape of, -1 for none; ``shape`` is
    the problem's."""

    rows: Rows
    given: tuple[tuple[str, ...], ...]
    made: tuple[tuple[str, ...], ...]
    like: tuple[int, ...]
    shape: Problem
    fast: Rows | None = None  # the same as ``rows``, without derivatives

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The results, differentiable again."""
        return tuple(_Blocked.apply(self, *tensors))

    def regions(self) -> Iterator[Region]:
        """All that there is, each at most AT_ONCE scores."""
        p = self.shape
        heads = max(1, min(p.kv_heads, AT_ONCE // max(1, p.group * p.q_len * p.kv_len)))
        rows = max(1, min(p.q_len, AT_ONCE // max(1, heads * p.group * p.kv_len)))
        for b in range(p.batch):
            for h in range(0, p.kv_heads, heads):
                end = min(h + heads, p.kv_heads)
                for first in range(0, p.q_len, rows):
                    yield Region(
                        slice(b, b + 1), slice(h * p.group, end * p.group), slice(h, end),
                        slice(first, min(first + rows, p.q_len)),
                    )  # fmt: skip

    def _of(self, region: Region, parts: Sequence[Tensor], which: Sequence[int]) -> Rows:
        """Of a region, as a function of some of its parts."""

        def of_some(*some: Tensor) -> tuple[Tensor, ...]:
            given = list(parts[: len(self.given)])
            for n, x in zip(which, some, strict=True):
                given[n] = x
            return self.rows(region, *given)

        return of_some

    def pulled(self, asked: Sequence[bool]) -> Blocked:
        """Of the same tensors and what results receive: what the tensors receive that are asked for."""
        count, which = len(self.given), [n for n, wanted in enumerate(asked) if wanted]

        def back(region: Region, *parts: Tensor) -> tuple[Tensor, ...]:
            pull = _pull(self._of(region, parts, which), *(parts[n] for n in which))[1]
            return tuple(pull(parts[count:]))

        return Blocked(back, (*self.given, *self.made), tuple(self.given[n] for n in which), tuple(which), self.shape)

    def pushed(self, known: Sequence[bool]) -> Blocked:
        """Of the same tensors and changes of those that are ``known`` to change: how results change."""
        count, which = len(self.given), [n for n, changes in enumerate(known) if changes]

        def along(region: Region, *parts: Tensor) -> tuple[Tensor, ...]:
            # forward mode does not nest: what is pulled back is linear, and pulled back itself
            made, pull = _pull(self._of(region, parts, which), *(parts[n] for n in which))
            push = _pull(lambda *some: tuple(pull(some)), *map(torch.zeros_like, made))[1]
            return tuple(push(parts[count:]))

        return Blocked(along, (*self.given, *(self.given[n] for n in which)), self.made, self.like, self.shape)


@contextmanager
def as_it_is(x: Tensor) -> Iterator[None]:
    """Within it no operation is cast to a narrower dtype, and what torch.func saves, which does not outlive it, meets nobody's hooks."""
    casts = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    hooks: list[tuple[Any, Any]] = []
    while (top := _saved._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _saved._pop_saved_tensors_default_hooks()
    try:
        with torch.autocast(x.device.type, enabled=False) if casts else nullcontext():
            yield
    finally:
        for pack, unpack in reversed(hooks):
            _saved._push_saved_tensors_default_hooks(pack, unpack)


class _Blocked(_Function):  # type: ignore[misc]
    @staticmethod
    def forward(blocked: Blocked, *tensors: Tensor) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        p, rows = blocked.shape, blocked.fast or blocked.rows
        sizes = {axis: getattr(p, axis) for axis in PLACES}
        for region in blocked.regions():
            given = (region.part(x, axes) for x, axes in zip(tensors, blocked.given, strict=True))
            with as_it_is(tensors[0]):
                parts = rows(region, *given)
            if not made:
                for part, axes, n in zip(parts, blocked.made, blocked.like, strict=True):
                    shape = [sizes.get(axis, size) for axis, size in zip(axes, part.shape, strict=True)]
                    made.append(part.new_zeros(tensors[n].shape if n >= 0 else shape))
            for whole, part, axes in zip(made, parts, blocked.made, strict=True):
                region.part(whole, axes).add_(part)
        return tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.blocked, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1:]
        found = iter(ctx.blocked.pulled(asked)(*ctx.saved_tensors, *grads))
        return (None, *(next(found) if wanted else None for wanted in asked))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        known = [x is not None for x in tangents]
        found: tuple[Tensor, ...] = ctx.blocked.pushed(known)(
            *ctx.saved_tensors, *(x for x in tangents if x is not None)
        )
        return found

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        each = [
            [x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True)]
            for i in range(info.batch_size)
        ]
        made = tuple(map(torch.stack, zip(*(_Blocked.apply(*some) for some in each), strict=True)))
        return made, (0,) * len(made)


def given(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask) -> tuple[Tensor, ...]:
    """The tensors that attention() and second() are of: query, key, value, those of ``wanted`` that have derivatives, in its order, and its
    others."""
    floats, operands = _of_scores(wanted), wanted.in_order(query, key)
    held = [
        x for one, x in zip(_problem(query, key, value, wanted).declared, operands, strict=True)
        if isinstance(x, Tensor) and one.name not in floats
    ]  # fmt: skip
    return (query, key, value, *(wanted.operands[name] for name in floats), *held)


def flags(wanted: AttnMask, of_three: Sequence[Any], of_tensors: Sequence[Any], none: Any) -> list[Any]:
    """What belongs to query, key and value and what belongs to the tensors of ``wanted``, in the order of given(); ``none`` for those
    without derivatives."""
    floats = _of_scores(wanted)
    each = [x for name, x in zip(names(wanted), of_tensors, strict=True) if name in floats]
    return [*of_three, *each, *[none] * (len(names(wanted)) - len(floats))]


def names(wanted: AttnMask) -> list[str]:
    """What its tensors are called, in order."""
    return [name for name, x in wanted.operands.items() if isinstance(x, Tensor)]


def has_derivatives(wanted: AttnMask) -> list[bool]:
    """Which of its tensors have."""
    floats = _of_scores(wanted)
    return [name in floats for name in names(wanted)]


def attention(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, with_lse: bool
) -> Blocked:
    """Attention of given(); results are output and, where asked for, the log-sum-exp."""
    problem, wide = _problem(query, key, value, wanted), lse_dtype(query)
    scored = _scores(problem, wanted, scale, wide)

    def rows(region: Region, q: Tensor, k: Tensor, v: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        h, n, hk = q.shape[1], q.shape[2], k.shape[1]
        logits, may_be_blind, factors = scored(region, q, k, *arrays)
        weights = _weights(logits, may_be_blind)[..., : v.shape[2]]
        weights = weights if factors is None else weights * factors
        output = (weights.reshape(hk, h // hk * n, -1) @ v.to(wide)[0]).view(1, h, n, -1).to(q.dtype)
        return (output, logits.logsumexp(-1)[None]) if with_lse else (output,)

    floats = _of_scores(wanted)
    whole = [one for one in problem.declared if isinstance(one, Array) and one.name not in floats]
    axes = (QUERY, KEY, KEY, *(one.axes for one in floats.values()), *(("",) * len(one.axes) for one in whole))
    made = (QUERY, LSE) if with_lse else (QUERY,)
    return Blocked(rows, axes, made, tuple(-1 for _ in made), problem)


def second(
    query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, scale: float | None, with_lse: bool,
    first: Sequence[bool], asked: Sequence[bool],
) -> Blocked:  # fmt: skip
    """Of given(), the gradient of the output, with_lse that of the log-sum-exp, and what the ``first`` derivatives receive that were asked
    for: what all but the last receive, where ``asked`` for."""
    plain = attention(query, key, value, wanted, scale, with_lse)
    found = plain.pulled(first).pulled(asked)
    count = len(plain.given)
    chain = scores.get(wanted.score)
    if not all(one.additive for one in chain.ones) or any((*first[3:], *asked[3:count])):
        return found
    wide, factor = lse_dtype(query), query.shape[3] ** -0.5 if scale is None else scale
    scored = _scores(plain.shape, wanted, scale, wide)

    def fast(region: Region, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        h, n, hk = q.shape[1], q.shape[2], k.shape[1]

        def of_group(x: Tensor) -> Tensor:
            return x.to(wide).reshape(hk, h // hk * n, -1)

        arrays, (g, *more) = rest[: count - 3], rest[count - 3 :]
        received = iter(more[with_lse:])
        u, w, x = (
            next(received) if one else torch.zeros_like(like) for one, like in zip(first, (q, k, v), strict=False)
        )
        p = of_group(_weights(*scored(region, q, k, *arrays)[:2])[None])
        q_, g_, u_, (k_, v_, w_, x_) = of_group(q), of_group(g), of_group(u), (y[0].to(wide) for y in (k, v, w, x))
        delta = (g_ * (p @ v_)).sum(-1, keepdim=True)
        for y in more[:with_lse]:
            delta = delta - of_group(y)
        t = torch.cat([u_, q_], -1) @ (torch.cat([k_, w_], -1) * factor).mT  # what dS receives
        mean = t.mul_(p).sum(-1, keepdim=True)
        e = t.addcmul_(p, mean, value=-1)  # what dP receives
        a = torch.cat([g_, -delta], -1) @ torch.cat([v_, torch.ones_like(v_[..., :1])], -1).mT
        ds = p * a
        f = a.mul_(e).addcmul_(p, g_ @ x_.mT)  # what P receives, times P, but for what all keys of a row share
        f.addcmul_(p, f.sum(-1, keepdim=True), value=-1)  # what S receives
        each: list[Callable[[], Tensor]] = [
            lambda: torch.baddbmm(f @ k_, ds, w_) * factor, lambda: torch.baddbmm(f.mT @ q_, ds.mT, u_) * factor,
            lambda: e.mT @ g_, *[lambda: mean] * len(arrays), lambda: torch.baddbmm(e @ v_, p, x_), *[lambda: mean] * with_lse,
        ]  # fmt: skip
        like = [q, k, v, *arrays, g, *more[:with_lse]]
        return tuple(make().reshape(x.shape).to(x.dtype) for make, x, one in zip(each, like, asked, strict=True) if one)

    return replace(found, fast=fast)


def _problem(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask) -> Problem:
    """What tensors of four axes pose."""
    element = elements.of_dtype(query.dtype)
    assert element is not None
    batch, heads, q_len, head_dim = query.shape
    family = wanted.of(Problem(dtype=element.name, head_dim=head_dim, value_dim=value.shape[3]))
    return family.reshaped(batch=batch, heads=heads, kv_heads=key.shape[1], q_len=q_len, kv_len=key.shape[2])


def _of_scores(wanted: AttnMask) -> dict[str, Array]:
    """Its tensors that have derivatives, in its order."""
    by_name = {array.name: array for array in scores.get(wanted.score).differentiable}
    return {name: by_name[name] for name in wanted.operands if name in by_name}


def _scores(
    problem: Problem, wanted: AttnMask, scale: float | None, wide: torch.dtype
) -> Callable[..., tuple[Tensor, bool, Tensor | None]]:
    """A function of a region, parts of query and key, and the other tensors of given(): scores of a region's pairs [heads, rows, keys],
    -inf where they are not seen; whether a row may see no key; and what weights are multiplied by, None for nothing."""
    floats, chain = _of_scores(wanted), scores.get(problem.score)
    factor = problem.head_dim**-0.5 if scale is None else scale
    whole = [one.name for one in problem.declared if isinstance(one, Array) and one.name not in floats]
    numbers = {name: x for name, x in wanted.operands.items() if isinstance(x, int | float)}

    def of_region(region: Region, q: Tensor, k: Tensor, *arrays: Tensor) -> tuple[Tensor, bool, Tensor | None]:
        h, n, hk = q.shape[1], q.shape[2], k.shape[1]
        own: dict[str, Any] = {**numbers, **dict(zip((*floats, *whole), arrays, strict=True))}
        grouped = (q.to(wide) * factor).reshape(hk, h // hk * n, -1)
        place = _places(problem, region, q.device)
        logits = _scored(chain, (grouped @ k.to(wide)[0].mT).view(h, n, -1), own, place, wide)
        hidden = _hidden(problem, own, place)
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        for term in chain.terms:
            logits = torch.cat([logits, own[term.name].to(wide).view(-1, 1, 1).expand(h, n, 1)], -1)
        factors = chain.factor(own, **place)
        return logits, hidden is not None or bool(floats), None if factors is None else factors.to(wide)

    return of_region


def _weights(logits: Tensor, may_be_blind: bool) -> Tensor:
    """Their softmax; a row that sees no key weighs nothing."""
    if not may_be_blind:
        return logits.softmax(-1)
    blind = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _places(problem: Problem, region: Region, device: torch.device) -> dict[str, Any]:
    """Where the pairs of a region are, [heads, rows, keys]."""
    position = torch.arange(region.q_len.start, region.q_len.stop, device=device)[:, None]
    head = torch.arange(region.heads.start, region.heads.stop, device=device)[:, None, None]
    key = torch.arange(problem.kv_len, device=device)
    at = {"batch": region.batch.start, "head": head, "kv_head": head // problem.group, "position": position, "key": key}
    return {**at, "behind": problem.kv_len - problem.q_len}


def _scored(chain: Any, logits: Tensor, own: dict[str, Any], place: dict[str, Any], wide: torch.dtype) -> Tensor:
    """What becomes of scores; arrays of scores are parts, counted from where they begin."""
    beside = {name: x - x.flatten()[0] if isinstance(x, Tensor) else 0 for name, x in place.items() if name != "behind"}
    for one in chain.ones:
        if not one.alters:
            continue
        values = values_at(one.operands, own, beside)
        values = {name: x.to(wide) if isinstance(x, Tensor) else x for name, x in values.items()}
        logits = one.function(logits, **values, **(place if one.placed else {}))
    return logits


def _hidden(problem: Problem, held: dict[str, Any], place: dict[str, Any]) -> Tensor | None:
    """Which pairs of a region are not seen; None where all are."""
    mask = masks.get(problem.mask)
    if problem.mask == masks.NONE:
        return None
    seen: Any = True
    if mask.cuts_front or mask.cuts_back:
        limits = limits_at(problem, held, batch=place["batch"], position=place["position"])
        low, high = problem.seen(place["position"], **limits)
        seen = (place["key"] >= low) & (place["key"] < high)
    if mask.tested:
        seen = mask.passes(held, **{name: place[name] for name in PLACES.values()}) & seen
    hidden: Tensor = ~seen
    return hidden

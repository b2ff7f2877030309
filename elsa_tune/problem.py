"""Problem: which attention is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

from elsa_tune.errors import BadProblem, shown
from elsa_tune.order import CONTIGUOUS, ORDERS, alike, joined, split
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import operator as operators
from elsa_tune.parts import score as scores
from elsa_tune.parts.mask import MOST_COUNTED
from elsa_tune.parts.operand import STATE, Array, Operand

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = elements.precisions()
DIRECTIONS = ("forward", "backward")
LAUNCHES = ("eager", "graph")
LARGEST = 2**40
"""Of every dimension: more than any memory holds."""
LARGEST_REAL = 1e30
"""Of a score's numbers: they and their reciprocals are floats."""

_MASKS, _SCORES = ("|".join(sorted(kind.names(), key=len, reverse=True)) for kind in (masks, scores))
_FAMILY = re.compile(
    rf"((?P<operator>{'|'.join(operators.names())})\.)?(?P<dtype>{'|'.join(elements.names())})(\.(?P<precision>{'|'.join(PRECISIONS)}))?\.d(?P<head_dim>\d{{1,13}})(\.v(?P<value_dim>\d{{1,13}}))?"
    rf"(\.(?P<mask>({_MASKS})(\+({_MASKS}))*))?(\.(?P<score>({_SCORES})(\+({_SCORES}))*))?(\.(?P<direction>backward))?",
    re.ASCII,
)
_NUMBER = r"\d{1,17}(?:\.\d{1,25})?(?:e[+-]?\d{1,3})?"
_SHAPE = re.compile(
    r"b(?P<batch>\d{1,13})\.h(?P<heads>\d{1,13})(\.kv(?P<kv_heads>\d{1,13}))?\.q(?P<q_len>\d{1,13})\.k(?P<kv_len>\d{1,13})"
    rf"(\.(?P<order>({'|'.join(ORDERS)})(-({'|'.join(ORDERS)})){{0,2}}))?(?P<numbers>(\.[a-z]+{_NUMBER})*)(\.(?P<launch>graph))?",
    re.ASCII,
)
_EXAMPLE = "fp32.d64.causal@b1.h8.q4096.k4096 (grouped heads: h32.kv8)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An attention problem: a family (what a kernel is compiled for) and a shape (what it is called with).

    query [batch, heads, q_len, head_dim], key [batch, kv_heads, kv_len, head_dim],
    value [batch, kv_heads, kv_len, value_dim]. ``mask`` names one of elsa_tune.parts.mask, or several joined by ``+``; ``integers``
    are the mask's own, in its order: a part of the shape, and nothing (the least) where a family alone is meant. ``score`` names one of
    elsa_tune.parts.score, or several joined by ``+`` in the order they are done; ``reals`` are theirs, as integers are the mask's
    (ones where a family alone is meant).
    ``precision`` is the arithmetic class; by default the dtype's own. ``operator`` names one of elsa_tune.parts.operator. ``order`` is
    how query, key and value lie in memory (elsa_tune.order): one word for all, or three, and the plainest among those that are alike
    for these lengths. ``launch`` is how a GPU is told: call by call (eager), or as part of a captured graph.
    """

    dtype: str = "fp32"
    head_dim: int
    value_dim: int = 0
    mask: str = masks.NONE
    score: str = scores.NONE
    precision: str = ""
    direction: str = "forward"
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0
    q_len: int = 1
    kv_len: int = 1
    order: str = CONTIGUOUS
    integers: tuple[int, ...] = ()
    reals: tuple[float, ...] = ()
    launch: str = "eager"
    operator: str = operators.SOFTMAX

    def __post_init__(self) -> None:
        for name, default in (("value_dim", self.head_dim), ("kv_heads", self.heads), ("precision", self.dtype)):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        words = {
            "operator": operators.names(),
            "dtype": elements.names(),
            "precision": PRECISIONS,
            "direction": DIRECTIONS,
            "launch": LAUNCHES,
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise BadProblem(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        for name in ("head_dim", "value_dim", "batch", "heads", "kv_heads", "q_len", "kv_len"):
            if not (isinstance(size := getattr(self, name), (int, Integral)) and 1 <= int(size) <= LARGEST):
                raise BadProblem(f"{name} is {shown(size)}; it must be an integer from 1 to {LARGEST}")
        if self.heads % self.kv_heads:
            raise BadProblem(
                f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}; choose kv_heads that divide"
            )
        own = self._allowed
        if self.integers and not (
            len(self.integers) == len(own)
            and all(least <= n <= most for n, (least, most) in zip(self.integers, own.values(), strict=True))
        ):
            given = ", ".join(map(shown, self.integers))
            ranges = ", ".join(f"{name} from {least} to {most}" for name, (least, most) in own.items())
            raise BadProblem(f"mask {self.mask} has the integers ({ranges}); {given} are given")
        chain = scores.get(self.score)
        try:
            reals = tuple(map(float, self.reals))
        except (OverflowError, TypeError, ValueError):
            reals = (float("nan"),) * len(self.reals)
        if reals and not (chain.allow(reals) and all(1 / LARGEST_REAL <= x <= LARGEST_REAL for x in reals)):
            limits = ", ".join(
                f"{name} from {1 / LARGEST_REAL:.0e} {f'to below {one.below:g}' if one.below < LARGEST_REAL else f'to {LARGEST_REAL:.0e}'}"
                for one in chain.ones
                for name in one.reals
            )
            given = ", ".join(map(shown, self.reals))
            raise BadProblem(f"score {self.score} has the numbers ({limits}); {given} are given")
        object.__setattr__(self, "reals", reals)
        object.__setattr__(self, "order", self._plainest_order())

    def _plainest_order(self) -> str:
        orders = split(self.order)
        if orders is None:
            raise BadProblem(
                f"order {self.order[:60]!r} is unknown; use one of {', '.join(ORDERS)}, or three joined by '-'"
            )
        query = alike(orders[0], self.heads, self.q_len)
        key, value = (alike(order, self.kv_heads, self.kv_len) for order in orders[1:])
        return joined(key if self.q_len == 1 else query, key, value)

    @property
    def family(self) -> str:
        """What a kernel is compiled for, as spelled before the ``@``."""
        return ".".join(
            part
            for part in (
                self.operator if self.operator != operators.SOFTMAX else "",
                self.dtype,
                self.precision if self.precision != self.dtype else "",
                f"d{self.head_dim}",
                f"v{self.value_dim}" if self.value_dim != self.head_dim else "",
                self.mask if self.mask != masks.NONE else "",
                self.score if self.score != scores.NONE else "",
                self.direction if self.direction != "forward" else "",
            )
            if part
        )

    @property
    def shape(self) -> str:
        """What a kernel is called with, as spelled after the ``@``."""
        grouped = f".kv{self.kv_heads}" if self.kv_heads != self.heads else ""
        launch = f".{self.launch}" if self.launch != "eager" else ""
        order = f".{self.order}" if self.order != CONTIGUOUS else ""
        own = "".join(f".{name}{_spelled(value)}" for name, value in self.numbers.items()) if self._has_numbers else ""
        return f"b{self.batch}.h{self.heads}{grouped}.q{self.q_len}.k{self.kv_len}{order}{own}{launch}"

    @property
    def orders(self) -> tuple[str, str, str]:
        """The memory orders of query, key and value."""
        found = split(self.order)
        assert found is not None
        return found

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def seen_pairs(self) -> int:
        """(query, key) pairs of one head that the mask lets through, on average over the sequences of a typical batch."""
        return _pairs(self.mask, min(self.batch, _MOST_SEQUENCES), tuple(self.names.items()), MOST_COUNTED)

    @property
    def seen_share(self) -> float:
        """The share of keys that a position sees, at least of one pair of all: estimated of a few positions, for what is asked at every
        new shape."""
        pairs = _pairs(self.mask, min(self.batch, _FEW), tuple(self.names.items()), _FEW)
        return max(pairs, 1) / (self.q_len * self.kv_len)

    def seen(self, position: Any, **limits: Any) -> tuple[Any, Any]:
        """The keys [low, high) that the queries at these positions (an integer or a tensor) see; ``limits`` are what the mask's hold
        there, integers or tensors that broadcast with positions."""
        return masks.get(self.mask).seen(position, **self.names, **limits)

    def dense(self, device: Any = None, **limits: Any) -> Tensor:
        """bool [q_len, kv_len], or [..., q_len, kv_len] for limits shaped [..., 1 or q_len, 1] on the device: whether a position sees a
        key."""
        return masks.get(self.mask).dense(device=device, **self.names, **limits)

    @property
    def declared(self) -> tuple[Operand, ...]:
        """What a kernel of the family takes beside its tensors, in order: what the mask has, then what scores have."""
        return declared(self.mask, self.score, elements.get(self.dtype).state)

    @property
    def numbers(self) -> dict[str, int | float]:
        """The numbers among them by name, in order; where a family alone is meant, the least integers, and examples."""
        score, allowed = scores.get(self.score), self._allowed
        integers = zip(allowed, self.integers or [least for least, _ in allowed.values()], strict=True)
        return {**dict(integers), **dict(zip(score.reals, self.reals or score.reals_of(0), strict=True))}

    @property
    def _allowed(self) -> dict[str, tuple[int, int]]:
        """The least and the most that each of its mask's integers may be."""
        mask = masks.get(self.mask)
        return {name: mask.allowed.get(name, (0, LARGEST)) for name in mask.integers}

    @property
    def _has_numbers(self) -> bool:
        mask, score = masks.get(self.mask), scores.get(self.score)
        return len(self.integers) == len(mask.integers) and len(self.reals) == len(score.reals)

    @property
    def names(self) -> dict[str, int]:
        """What the bounds of the mask are of, beside positions and limits."""
        own = zip(masks.get(self.mask).integers, self.numbers.values(), strict=False)
        return {"q_len": self.q_len, "kv_len": self.kv_len, **{name: int(value) for name, value in own}}

    def akin(self, family: str) -> bool:
        """Whether a family differs from this problem's in its dimensions at most."""
        try:
            other = Problem.parse(family)
        except BadProblem:  # of another version
            return False
        mine = (self.operator, self.dtype, self.mask, self.score, self.precision, self.direction)
        return (other.operator, other.dtype, other.mask, other.score, other.precision, other.direction) == mine

    def but_for_its_mask(self, family: str) -> bool:
        """Whether a family differs from this problem's in its mask and scores at most."""
        try:
            other = Problem.parse(family)
        except BadProblem:  # of another version
            return False
        return other.unmasked.family == self.unmasked.family

    @property
    def unmasked(self) -> Problem:
        """The same without a mask and scores."""
        return replace(self, mask=masks.NONE, score=scores.NONE, integers=(), reals=())

    @property
    def flops(self) -> int:
        """Floating-point operations of the products over the pairs the mask lets through: Q K^T and P V, or for the
        gradients Q K^T, dO V^T, P^T dO, dS K and dS^T Q."""
        columns = (
            self.head_dim + self.value_dim if self.direction == "forward" else 3 * self.head_dim + 2 * self.value_dim
        )
        return 2 * self.batch * self.heads * self.seen_pairs * columns

    @property
    def bytes(self) -> int:
        """Bytes of query, key, value and output, each once; with their gradients for the backward direction."""
        rows = self.batch * self.heads * self.q_len + self.batch * self.kv_heads * self.kv_len
        once = rows * (self.head_dim + self.value_dim) * elements.get(self.dtype).bytes
        return once if self.direction == "forward" else 2 * once

    @property
    def nearby(self) -> Problem:
        """With the least length of keys that is served alike, within an eighth of its own: a growing key cache poses a new problem at every
        step."""
        step = 1 << max(0, self.kv_len.bit_length() - 4)
        return self.reshaped(kv_len=self.kv_len // step * step)

    def reshaped(self, **shape: int | str | tuple[float, ...]) -> Problem:
        """The same family with another shape."""
        return replace(self, **shape)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.family}@{self.shape}"

    @classmethod
    def parse(cls, text: str) -> Problem:
        """Read ``family@shape``, or a family alone (with a shape of ones). Raises BadProblem."""
        if not isinstance(text, str):
            raise BadProblem(f"problem is {shown(text)}; give a Problem, or spell one like {_EXAMPLE}")
        return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Problem:
    family, _, shape = text.strip().partition("@")
    found = [_FAMILY.fullmatch(family)] + ([_SHAPE.fullmatch(shape)] if shape else [])
    if not all(found):
        raise BadProblem(f"problem {text[:100]!r} is misspelled; write it like {_EXAMPLE}")
    words = {k: v for match in found if match for k, v in match.groupdict().items() if v is not None}
    found_numbers = re.findall(rf"([a-z]+)({_NUMBER})", words.pop("numbers", ""))
    spelled = dict(found_numbers)
    values: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in words.items()}
    integers = masks.get(values.get("mask", masks.NONE)).integers
    reals = scores.get(values.get("score", scores.NONE)).reals
    in_order = [name for name, _ in found_numbers] == [*integers, *reals]
    if shape and not (in_order and all(spelled[name].isdigit() for name in integers)):
        own = ", ".join((*integers, *reals)) or "none"
        raise BadProblem(f"problem {text[:100]!r} must have the numbers of its mask and scores and no others: {own}")
    if not shape:
        return Problem(**values)
    return Problem(
        **values,
        integers=tuple(int(spelled[name]) for name in integers),
        reals=tuple(float(spelled[name]) for name in reals),
    )


def _spelled(value: float) -> str:
    """A number without a needless fraction; read back, it is the same number."""
    return repr(value).removesuffix(".0")


@lru_cache(maxsize=1024)
def declared(mask: str, score: str, state: str) -> tuple[Operand, ...]:
    """What a kernel takes for a mask and scores, in order; ``state`` is the dtype of the floats that states are of."""
    both = (*masks.get(mask).operands, *scores.get(score).operands)
    return tuple(replace(one, dtype=state) if isinstance(one, Array) and one.dtype == STATE else one for one in both)


_MOST_SEQUENCES = 64
"""Of a batch, that are counted."""
_FEW = 64
"""Positions and sequences that are counted for an estimate."""


@lru_cache(maxsize=4096)
def _pairs(mask: str, batch: int, names: tuple[tuple[str, int], ...], most: int) -> int:
    one, known = masks.get(mask), dict(names)
    sizes = {**known, "batch": batch, "q_len": min(known["q_len"], most)}
    drawn = {limit.name: limit.typical(sizes) for limit in one.limits}
    each = max((len(x) for x in drawn.values()), default=1)
    counts = [one.pairs(most=most, **known, **{name: x[i % len(x)] for name, x in drawn.items()}) for i in range(each)]
    return sum(counts) // len(counts)

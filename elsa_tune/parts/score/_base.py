"""A score is a function of each score of a query and a key, and what it does to an error; each language has a text of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elsa_tune.parts.operand import PLACES, Array, Number, Operand, values_at

if TYPE_CHECKING:
    from torch import Tensor

PLACE = (*PLACES.values(), "behind")
"""What a score may ask of where it is: indices, or tensors of them that broadcast with the scores, and by how much keys outnumber
queries."""


def farthest(unit: float) -> float:
    """A score below it may be rounded to a power of 2, in floats of such round-off: the difference of two such scores is then exact, or a
    row that sees nothing else, as where a mask holds the least float, would be the exponential of a rounding error."""
    return -64 / unit


@dataclass(frozen=True)
class Factor:
    """What a weight is multiplied by before it meets its value, and not where weights are summed: ``function`` of a score's operands by name
    and of where it is, PLACE, in float64; ``largest`` of its numbers, the most that it can be."""

    function: Callable[..., Tensor]
    largest: Callable[..., float]


@dataclass(frozen=True)
class Score:
    """``function(score, **own)`` is what becomes of scores: ``own`` are its numbers, and what its arrays hold there. ``placed``: it
    is asked, as its texts are, with where that is too, PLACE.

    ``error(error, largest, unit, **own)`` is what it makes of the largest error and the largest magnitude of scores before it, computed
    in floats of round-off ``unit``: both after it; ``own`` has q_len and kv_len too, and what others take. ``reals`` are positive numbers, part of a
    problem's shape, less than ``below``, and ``examples`` values of them; ``arrays`` come with the tensors. ``constants`` are what its texts are written
    with. ``additive``: it adds to a score what does not depend on it. ``relative``: what it asks of a place stays as it is where
    positions and keys are counted from elsewhere.
    ``term`` names an array, of one number for each head, that is the score of one more key, whose value is 0. ``factor`` is what it does to
    weights; a score that has either leaves scores as they are.
    """

    name: str
    title: str
    function: Callable[..., Any]
    error: Callable[..., tuple[float, float]]
    reals: tuple[str, ...] = ()
    below: float = math.inf
    arrays: tuple[Array, ...] = ()
    examples: tuple[Mapping[str, float], ...] = ({},)
    constants: Mapping[str, Any] = field(default_factory=dict)
    placed: bool = False
    additive: bool = False
    relative: bool = False
    term: str = ""
    factor: Factor | None = None

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What a kernel takes because of it, in order."""
        return (*(Number(name, "real") for name in self.reals), *self.arrays)

    @property
    def alters(self) -> bool:
        """Whether it does something to scores."""
        return not self.term and self.factor is None

    @property
    def bends(self) -> bool:
        """Whether what becomes of a score grows otherwise than the score does: gradients pass a slope."""
        return self.alters and not self.additive


@dataclass(frozen=True)
class Chain:
    """Scores done one after the other; none is a chain of nothing."""

    name: str
    ones: tuple[Score, ...]

    def __post_init__(self) -> None:
        names = [one.name for one in self.operands]
        if len(set(names)) < len(names):
            raise ValueError(f"scores {self.name} share the name of an operand")
        if sum(one.factor is not None for one in self.ones) > 1:
            raise ValueError(f"scores {self.name} multiply weights twice")

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What a kernel takes because of them, in order."""
        return tuple(operand for one in self.ones for operand in one.operands)

    @property
    def reals(self) -> tuple[str, ...]:
        """Their numbers, in order."""
        return tuple(name for one in self.ones for name in one.reals)

    def allow(self, reals: Sequence[float]) -> bool:
        """Whether numbers are as many as theirs, and less than what each must be below."""
        below = [one.below for one in self.ones for _ in one.reals]
        return len(reals) == len(below) and all(x < most for x, most in zip(reals, below, strict=True))

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Their tensors, in order."""
        return tuple(array for one in self.ones for array in one.arrays)

    @property
    def differentiable(self) -> tuple[Array, ...]:
        """Their tensors that have gradients, in order."""
        return tuple(array for array in self.arrays if array.is_float)

    @property
    def placed(self) -> bool:
        """Whether a text of theirs asks where a score is."""
        return any(one.placed for one in self.ones)

    @property
    def relative(self) -> bool:
        """Whether they stay as they are where positions and keys are counted from elsewhere."""
        return all(one.relative or not one.placed for one in self.ones)

    @property
    def terms(self) -> tuple[Array, ...]:
        """Their arrays that are scores of one more key, whose value is 0."""
        return tuple(array for one in self.ones for array in one.arrays if array.name == one.term)

    @property
    def additive(self) -> bool:
        """Whether they add to scores what does not depend on them, something at least."""
        return bool(self.ones) and all(one.additive for one in self.ones)

    @property
    def turns(self) -> int:
        """How many examples there are."""
        return max((len(one.examples) for one in self.ones), default=1)

    def reals_of(self, number: int) -> tuple[float, ...]:
        """Their numbers in one of the examples, in turn."""
        return tuple(one.examples[number % len(one.examples)][name] for one in self.ones for name in one.reals)

    def of(self, scores: Any, own: Mapping[str, Any], **place: Any) -> Any:
        """What becomes of scores somewhere (PLACE); ``own`` holds their operands by name."""
        for one in self.ones:
            scores = one.function(scores, **values_at(one.operands, own, place), **(place if one.placed else {}))
        return scores

    @property
    def weighing(self) -> Score | None:
        """The one among them that multiplies weights."""
        return next((one for one in self.ones if one.factor is not None), None)

    def factor(self, own: Mapping[str, Any], **place: Any) -> Tensor | None:
        """What weights somewhere (PLACE) are multiplied by, float64; None: nothing."""
        if (one := self.weighing) is None or one.factor is None:
            return None
        return one.factor.function(**values_at(one.operands, own, place), **place)

    def largest_factor(self, own: Mapping[str, Any]) -> float:
        """The most that weights are multiplied by."""
        one = self.weighing
        return one.factor.largest(*(own[name] for name in one.reals)) if one and one.factor else 1.0

    def error(self, error: float, largest: float, unit: float, own: Mapping[str, Any]) -> tuple[float, float]:
        """The largest error and magnitude of scores after them, of those before, in floats of round-off ``unit``; ``own`` holds operands
        by name, q_len and kv_len."""
        for one in self.ones:
            error, largest = one.error(error, largest, unit, **own)
        return error, largest

"""A problem as tensors pose it, and what is made of it once for each: dense masks, block masks, functions of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from elsa_tune.generate.operands import named, of_sequences, places
from elsa_tune.parts import mask as masks
from elsa_tune.parts.operand import PLACES, Operands
from elsa_tune.problem import Problem

T = TypeVar("T")


@dataclass(frozen=True)
class Posed:
    """A family with the lengths and operands of a call (``own``, by name), on a device."""

    problem: Problem
    own: dict[str, Any]
    device: torch.device

    def dense(self) -> Tensor:
        """bool [q_len, kv_len] or [batch or 1, heads or 1, q_len, kv_len]: which pairs are seen."""
        sequences = of_sequences(self.problem, self.own, dims=3)
        seen = self.problem.dense(**{name: x.cpu() for name, x in sequences.items()}).to(self.device)
        mask = masks.get(self.problem.mask)
        if not mask.tested:
            return seen
        everywhere = places(self.problem, self.device)
        passed: Tensor = mask.passes(self.own, **{name: everywhere[name] for name in PLACES.values()})
        return seen & passed


def posed(family: Problem, operands: Operands, query: Tensor, key: Tensor) -> Posed:
    """A family as tensors pose it."""
    batch, heads, q_len, _ = query.shape
    problem = family.reshaped(batch=batch, heads=heads, kv_heads=key.shape[1], q_len=q_len, kv_len=key.shape[2])
    own = named(problem, operands)
    integers = tuple(own[name] for name in masks.get(family.mask).integers)
    return Posed(problem.reshaped(integers=integers), own, query.device)


class Derived(Generic[T]):
    """What is made of a family, lengths and operands, once for each: a race is about kernels, and mask and score are given."""

    def __init__(self, make: Callable[[Posed], T], most: int) -> None:
        self._make, self._most = make, most
        self._made: dict[tuple[object, ...], tuple[Operands, T]] = {}

    def of(self, family: Problem, operands: Operands, query: Tensor, key: Tensor) -> T:
        """As made before for these very numbers and tensors, which nobody has written to since, or made now."""
        known = tuple((id(x), x._version) if isinstance(x, Tensor) else x for x in operands)
        entry = (family.mask, family.score, query.shape[:3], key.shape[2], query.device, known)
        if entry not in self._made:
            if len(self._made) >= self._most:
                self._made.clear()
            # operands are held: ids stay theirs
            self._made[entry] = operands, self._make(posed(family, operands, query, key))
        return self._made[entry][1]

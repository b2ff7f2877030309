"""What is made of a problem once for each set of operands: dense masks, block masks, functions of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from elsa_tune.generate.posed import Posed, posed
from elsa_tune.parts.operand import Operands
from elsa_tune.problem import Problem

T = TypeVar("T")


class Derived(Generic[T]):
    """What is made of a family, lengths and operands, once for each: a race is about kernels, and mask and score are given. Nothing that
    answers a program's call may ask for it: a tensor can change without telling."""

    def __init__(self, make: Callable[[Posed], T], most: int) -> None:
        self._make, self._most = make, most
        self._made: dict[tuple[object, ...], tuple[Operands, T]] = {}

    def of(self, family: Problem, operands: Operands, query: Tensor, key: Tensor) -> T:
        """As made before for these very numbers and tensors, which nobody has written to since, or made now."""
        known = tuple((id(x), 0 if x.is_inference() else x._version) if isinstance(x, Tensor) else x for x in operands)
        entry = (family.mask, family.score, query.shape[:3], key.shape[2], query.device, known)
        if entry not in self._made:
            if len(self._made) >= self._most:
                self._made.clear()
            # operands are held: ids stay theirs
            self._made[entry] = operands, self._make(posed(family, operands, query, key))
        return self._made[entry][1]

"""An operator: what it makes of scores and values, its gradients, how far a kernel may be off, and who else computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elsa_tune.parts import state as states

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """The oracle's arithmetic, in the arithmetic of what it is given, float64 as a rule.

    ``rows``: of some query rows, an output [rows, value_dim] and the log of their sums [rows], from their scores [rows, keys], the values
    [keys, value_dim] and what weights are multiplied by before they meet them, [rows, keys] or None, some keys at a time; -inf is a
    hidden key. ``weights``: of scores [rows, keys] and those logs [rows].
    ``score_gradient``: dS of weights, dP [rows, keys] and D [rows, 1], the sum of dO * O. ``bound``: what a kernel of so many keys and
    a class's unit may err by, as a multiple of max |v|, up to a constant. ``torchs`` names torch's own function,
    where it has one.
    """

    name: str
    title: str
    rows: Callable[[Iterable[tuple[Tensor, Tensor, Tensor | None]]], tuple[Tensor, Tensor]]
    weights: Callable[[Tensor, Tensor], Tensor]
    score_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    bound: Callable[[float, int], float]
    torchs: str = ""

    @property
    def states(self) -> tuple[str, ...]:
        """What may be carried while it is computed."""
        return tuple(name for name in states.names() if states.get(name).operator == self.name)

"""An element: its size, torch's name for it, and the classes of arithmetic that it may be computed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from elsa_tune.errors import BadProblem

if TYPE_CHECKING:
    from torch import dtype as Dtype

UNITS = {"float32": 2.0**-24, "float64": 2.0**-53}
"""Unit round-off of the floats that states may be of, by torch's name."""

UNIT = UNITS["float32"]


@dataclass(frozen=True)
class Precision:
    """A class of arithmetic: ``title`` says what products are of, ``unit`` is the unit round-off of what weights and outputs are
    rounded to.

    ``ieee``: IEEE multiply-adds alone, proven from the machine code. ``rounds_operands``: products may be of operands rounded to
    ``unit``. ``rounds_sums``: products may be summed rounded to it. Else products are of the floats that states are of, or as good as
    that.
    ``peak``, ``products``: the rate of matrix units that serves it, by the name that measured peaks have, and how many products of
    that kind one of the class may take; without, multiply-adds alone do.
    """

    name: str
    title: str
    unit: float
    ieee: bool = False
    rounds_operands: bool = False
    rounds_sums: bool = False
    peak: str = ""
    products: int = 1

    @property
    def exact(self) -> bool:
        """Whether weights and outputs are float32's, or finer."""
        return self.unit <= UNIT

    @property
    def rounds_products(self) -> bool:
        """Whether products are of rounded operands, or are summed rounded."""
        return self.rounds_operands or self.rounds_sums


@dataclass(frozen=True)
class Element:
    """``bytes`` of one number, the name of its dtype in ``torch``, and the precision classes that its tensors have, the one it is
    named after among them. ``state``: the dtype of the floats that its states are of."""

    name: str
    bytes: int
    torch: str
    precisions: tuple[Precision, ...]
    state: str = "float32"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its precision classes."""
        return tuple(precision.name for precision in self.precisions)

    @property
    def dtype(self) -> Dtype:
        """What torch calls it. Raises BadProblem."""
        import torch

        found: Dtype | None = getattr(torch, self.torch, None)
        if found is None:
            raise BadProblem(
                f"torch {torch.__version__} has no {self.torch}, of which dtype {self.name} is; upgrade torch"
            )
        return found

    @property
    def narrow(self) -> bool:
        """Whether it is widened to the floats that states are of."""
        return self.bytes < 4

    @property
    def unit(self) -> float:
        """Unit round-off of the floats that its states are of."""
        return UNITS[self.state]

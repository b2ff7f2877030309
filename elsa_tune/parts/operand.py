"""Operands: what a part takes beside query, key and value. Numbers are part of a problem's shape; arrays come with the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PLACES = {"batch": "batch", "heads": "head", "kv_heads": "kv_head", "q_len": "position", "kv_len": "key"}
"""What each axis of an array is indexed with: where a pair of a query and a key is."""

NOTHING: Mapping[str, Any] = {}

STATE = "state"
"""As the dtype of an array: the floats that states are of, whatever the element."""


class Argument(NamedTuple):
    """One argument of a kernel: an integer (64 bits), a real (a float on GPUs, a double on CPUs), or a pointer to ``dtype``."""

    name: str
    kind: str
    dtype: str = ""


@dataclass(frozen=True)
class Number:
    """A whole number of at least 0 (``kind`` integer), or a real above 0."""

    name: str
    kind: str

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Itself."""
        return (Argument(self.name, self.kind),)


@dataclass(frozen=True)
class Array:
    """A tensor of torch's ``dtype``, or STATE. Of its ``axes`` (those of PLACES) each may be 1: then all share what it holds.

    ``per`` names, for axes along which it holds one thing for so many positions or keys, the whole number that says how many: there are
    as many as cover them. An array of an axis that is none of PLACES, of any length, is given to parts whole.

    ``typical`` makes what a race is run with from the sizes of PLACES and its part's whole numbers, the same whenever it is asked;
    ``hostile`` what else kernels are checked with. Both return nested lists or tensors.
    """

    name: str
    dtype: str
    axes: tuple[str, ...]
    typical: Callable[[Mapping[str, int]], Any]
    hostile: tuple[Callable[[Mapping[str, int]], Any], ...] = ()
    per: Mapping[str, str] = field(default_factory=dict)

    @property
    def over_keys(self) -> bool:
        """Whether it holds something for each key."""
        return "kv_len" in self.axes and "kv_len" not in self.per

    @property
    def over_blocks(self) -> bool:
        """Whether it holds something for each block of keys."""
        return "kv_len" in self.per

    @property
    def placed(self) -> bool:
        """Whether it holds something for each pair of a query and a key; otherwise it is given whole."""
        return set(self.axes) <= set(PLACES)

    def lengths(self, sizes: Mapping[str, int]) -> list[int | None]:
        """Along each axis, of the sizes of all and the numbers that ``per`` names; None where any will do."""
        return [-(-sizes[axis] // sizes[self.per[axis]]) if axis in self.per else sizes.get(axis) for axis in self.axes]

    @property
    def is_float(self) -> bool:
        """Whether it holds floats, and no integers or truths."""
        return self.dtype == STATE or self.dtype.startswith("float")

    def at(self, whole: Any, place: Mapping[str, Any], own: Mapping[str, Any] = NOTHING) -> Any:
        """What ``whole``, of its axes or 1, holds at places (of PLACES): indices, or tensors of them that broadcast; ``own`` holds
        the numbers that ``per`` names."""
        if not self.placed:
            return whole
        index: list[Any] = [
            0 if n == 1 else place[PLACES[axis]] for axis, n in zip(self.axes, whole.shape, strict=True)
        ]
        return whole[
            tuple(i // own[self.per[axis]] if axis in self.per else i for axis, i in zip(self.axes, index, strict=True))
        ]

    @property
    def data(self) -> str:
        """What a kernel calls the pointer."""
        return f"{self.name}_data"

    @property
    def strides(self) -> tuple[str, ...]:
        """What a kernel calls the elements from one to the next along each axis; 0 where all share one."""
        return tuple(f"{self.name}_{axis}" for axis in self.axes)

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The pointer, and the strides."""
        return (Argument(self.data, "pointer", self.dtype), *(Argument(name, "integer") for name in self.strides))


Operand = Number | Array
Operands = tuple[Any, ...]
"""What a call gives: numbers and tensors, in the order in which a family declares them."""


def values_at(operands: Iterable[Operand], own: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, Any]:
    """What parts are given of their operands for pairs at places: numbers, and of arrays what they hold there."""
    return {
        one.name: one.at(own[one.name], place, own) if isinstance(one, Array) else own[one.name] for one in operands
    }


def arguments(declared: tuple[Operand, ...]) -> tuple[Argument, ...]:
    """The arguments of a kernel that takes all of them, in order."""
    return tuple(argument for one in declared for argument in one.arguments)

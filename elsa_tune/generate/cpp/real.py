"""The floats that vectors and states are of, as C++ writes them."""

from __future__ import annotations

from dataclasses import dataclass

from elsa_tune.parts import element as elements


@dataclass(frozen=True, slots=True)
class Real:
    """``name`` of the type, its ``bytes``, whole numbers of as many (``integer``), bits of its stored ``fraction``, how many ``digits``
    its literals have, what they end with (``f``), and a ``byte`` of ones as such a whole number."""

    name: str
    bytes: int
    integer: str
    fraction: int
    digits: int
    f: str
    byte: str

    def __str__(self) -> str:
        return self.name

    def lanes(self, floats: int) -> int:
        """How many fill a vector that holds so many floats of 32 bits."""
        return floats * 4 // self.bytes

    @property
    def least_exponent(self) -> int:
        """Of the least number that is not denormal."""
        return 2 - (1 << (8 * self.bytes - 2 - self.fraction))

    @property
    def largest(self) -> float:
        """The largest number."""
        return (2.0 - 2.0**-self.fraction) * 2.0 ** (1 - self.least_exponent)

    @property
    def rounder(self) -> str:
        """Added and taken away again, it rounds to a whole number, which is in its last bits meanwhile."""
        return self.literal(1.5 * 2**self.fraction)

    def literal(self, x: float) -> str:
        """A number with all its digits, and a fraction."""
        digits = f"{x:.{self.digits}g}"
        return f"{digits}{'' if '.' in digits or 'e' in digits else '.0'}{self.f}"


_REALS = {
    "float32": Real("float", 4, "int32_t", 23, 9, "f", "0xff"),
    "float64": Real("double", 8, "int64_t", 52, 17, "", "int64_t{0xff}"),
}


def real_of(dtype: str) -> Real:
    """What the states of tensors of an element are of."""
    return _REALS[elements.get(dtype).state]

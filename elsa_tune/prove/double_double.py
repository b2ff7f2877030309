"""Tensors of numbers with twice the digits of float64, each the sum of two: what judges float64.

Sums and products keep what rounding leaves over (Dekker 1971; Hida, Li and Bailey 2001). Products of matrices are sums of products of
slices, of few enough bits that float64 rounds nothing (Ozaki et al. 2012). They understand what operators, states and scores ask of a
tensor, which are then computed as accurately. An infinity, and what is no number, is as in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

SPLITTER = 2.0**27 + 1
"""A product with it splits a float64 into two halves, whose products are exact."""

SLICED = 90
"""Bits of a row or column, below its largest number, that its slices hold."""

STEPS = 64
"""Powers of 2 between 1 and 2 that are known, for exponents to begin from."""

LEAST = -708.0
"""e^LEAST is not denormal; below, 0."""

with localcontext(Context(prec=50)):
    _LN2 = Fraction(Decimal(2).ln())


def _parts(number: float | Fraction) -> tuple[float, float]:
    first = float(number)
    return first, float(Fraction(number) - Fraction(first))


_STEP = _parts(_LN2 / STEPS)
_SERIES = [_parts(Fraction(1, math.factorial(k))) for k in range(13)]
"""e^x, lowest power first: to 2^-110 where |x| is below 2^-7."""

_LEADING = 6
"""Terms of it that matter beyond float64."""

with localcontext(Context(prec=50)):
    _POWERS = [_parts(Fraction(Decimal(2) ** (Decimal(step) / STEPS))) for step in range(STEPS)]


class DoubleDouble:
    """``high`` is the number rounded to float64, ``low`` what is left; shapes and indices are those of tensors."""

    __slots__ = ("high", "low")

    def __init__(self, high: Tensor, low: Tensor | None = None) -> None:
        self.high = high.double()
        self.low = torch.zeros_like(self.high) if low is None else low

    # What tensors do without arithmetic.

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    @property
    def device(self) -> torch.device:
        return self.high.device

    def __len__(self) -> int:
        return len(self.high)

    def __getitem__(self, index: Any) -> DoubleDouble:
        return self._each(lambda x: x[index])

    def __setitem__(self, index: Any, value: DoubleDouble) -> None:
        self.high[index], self.low[index] = value.high, value.low

    def expand(self, *shape: int) -> DoubleDouble:
        return self._each(lambda x: x.expand(*shape))

    def cpu(self) -> DoubleDouble:
        return self._each(Tensor.cpu)

    def double(self) -> Tensor:
        """Rounded to float64."""
        return self.high

    def isneginf(self) -> Tensor:
        return self.high.isneginf()

    def isnan(self) -> Tensor:
        return self.high.isnan()

    def masked_fill(self, mask: Tensor, value: float) -> DoubleDouble:
        return DoubleDouble(self.high.masked_fill(mask, value), self.low.masked_fill(mask, 0.0))

    def where(self, condition: Tensor, other: Any) -> DoubleDouble:
        """Itself where the condition holds, elsewhere ``other``."""
        else_ = _of(other, self)
        return DoubleDouble(self.high.where(condition, else_.high), self.low.where(condition, else_.low))

    def _each(self, change: Callable[[Tensor], Tensor]) -> DoubleDouble:
        return DoubleDouble(change(self.high), change(self.low))

    # Comparisons.

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        y = _of(other, self)
        return (self.high == y.high) & (self.low == y.low)

    __hash__ = None  # type: ignore[assignment]

    def __lt__(self, other: Any) -> Tensor:
        below: Tensor = (self - other).high < 0
        return below

    def maximum(self, other: DoubleDouble) -> DoubleDouble:
        return other.where(self < other, self)

    def amax(self, dim: int) -> DoubleDouble:
        high = self.high.amax(dim)
        return DoubleDouble(high, self.low.where(self.high == high.unsqueeze(dim), -math.inf).amax(dim))

    # Arithmetic.

    def __neg__(self) -> DoubleDouble:
        return self._each(Tensor.neg)

    def __abs__(self) -> DoubleDouble:
        return (-self).where(self.high < 0, self)

    def __add__(self, other: Any) -> DoubleDouble:
        y = _of(other, self)
        high, error = _sum(self.high, y.high)
        return _normal(high, error + self.low + y.low)

    __radd__ = __add__

    def __sub__(self, other: Any) -> DoubleDouble:
        return self + -_of(other, self)

    def __rsub__(self, other: Any) -> DoubleDouble:
        less: DoubleDouble = -self + other
        return less

    def __mul__(self, other: Any) -> DoubleDouble:
        y = _of(other, self)
        high, error = _product(self.high, y.high)
        return _normal(high, error + (self.high * y.low + self.low * y.high))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> DoubleDouble:
        y = _of(other, self)
        quotient = DoubleDouble(self.high / y.high)
        for _ in range(2):
            rest = self - y * quotient
            quotient = quotient + (rest.high / y.high).nan_to_num(0.0, 0.0, 0.0)
        return quotient

    def sum(self, dim: int) -> DoubleDouble:
        """By a tree."""
        x = self._each(lambda t: t.movedim(dim, 0))
        while len(x) > 1:
            half = len(x) // 2
            pairs, odd = x[:half] + x[half : 2 * half], x[2 * half :]
            x = DoubleDouble(torch.cat([pairs.high, odd.high]), torch.cat([pairs.low, odd.low]))
        return x[0]

    def __matmul__(self, other: Any) -> DoubleDouble:
        """[rows, n] by [n, columns]: what is left out is below 2^-SLICED of the largest product of a row and a column."""
        bits = (53 - (8 * self.shape[1] - 1).bit_length()) // 2  # up to 8 products of n numbers are added
        left, right = list(_slices(self, bits, 1)), list(_slices(_of(other, self), bits, 0))
        total = _of(0.0, self)
        for last in range(-(-SLICED // bits)):
            pairs = [(left[i], right[last - i]) for i in range(last + 1) if i < len(left) and last - i < len(right)]
            if pairs:
                ones, others = zip(*pairs, strict=True)
                total = total + torch.cat(ones, 1) @ torch.cat(others)
        return total

    # Functions.

    def exp(self) -> DoubleDouble:
        x = self.masked_fill(self.high < LEAST, LEAST)
        steps = (x.high * (STEPS / float(_LN2))).round()
        f = x - _constant(_STEP, x) * steps
        rest = torch.zeros_like(x.high)
        for first, _ in reversed(_SERIES[_LEADING:]):
            rest = rest * f.high + first
        series = DoubleDouble(rest)
        for one in reversed(_SERIES[:_LEADING]):
            series = series * f + _constant(one, x)
        known = torch.tensor(_POWERS, dtype=torch.float64, device=x.device)[steps.long() % STEPS]
        whole = _power(steps.long() // STEPS)
        found = series * DoubleDouble(known[..., 0] * whole, known[..., 1] * whole)
        return found.masked_fill(self.high < LEAST, 0.0)

    def log(self) -> DoubleDouble:
        """By a step of Newton's: twice the digits of float64's logarithm."""
        near = self.high.log()
        known = near.where(near.isfinite(), 0.0)
        better = self * (-DoubleDouble(known)).exp() - 1.0 + known
        return better.where(near.isfinite(), near)

    def tanh(self) -> DoubleDouble:
        less = (abs(self) * -2.0).exp()
        found = (1.0 - less) / (less + 1.0)
        return (-found).where(self.high < 0, found)


def _slices(x: DoubleDouble, bits: int, dim: int) -> Iterator[Tensor]:
    """Its leading bits, and the next ones, and so on, counted from the largest number along a dimension."""
    _, exponent = torch.frexp(x.high.abs().amax(dim, keepdim=True))
    high, low = x.high, x.low if x.low.any() else None
    for last in range(bits, SLICED + bits, bits):
        rounder = 1.5 * _power(exponent + (52 - last))
        leading = (high + rounder) - rounder
        yield leading
        high = high - leading
        if low is not None:
            high, low = _sum(high, low)
        if not high.any():
            return


def _of(x: Any, like: DoubleDouble) -> DoubleDouble:
    """A number or tensor as what it is added to."""
    if isinstance(x, DoubleDouble):
        return x
    return DoubleDouble(x) if isinstance(x, Tensor) else _constant((x, 0.0), like)


def _constant(parts: tuple[float, float], like: DoubleDouble) -> DoubleDouble:
    return DoubleDouble(*(torch.tensor(part, dtype=torch.float64, device=like.device) for part in parts))


def _sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y rounded, and what that leaves over, exactly (Knuth)."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


def _product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x y rounded, and what that leaves over, exactly (Dekker)."""
    (a, b), (c, d), product = _halves(x), _halves(y), x * y
    return product, ((a * c - product) + a * d + b * c) + b * d


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x * SPLITTER
    upper = scaled - (scaled - x)
    return upper, x - upper


def _normal(high: Tensor, low: Tensor) -> DoubleDouble:
    """The same number, ``high`` of which is rounded; nothing is left of what is no number."""
    rest = low.nan_to_num(0.0, 0.0, 0.0)
    total = high + rest
    return DoubleDouble(total, (rest - (total - high)).nan_to_num(0.0, 0.0, 0.0))


def _power(exponent: Tensor) -> Tensor:
    """2^n of whole numbers, from its bits."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)

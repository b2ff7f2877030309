"""Polynomials for 2^f on [-1/2, 1/2] that are exactly 1 at 0, with the smallest possible relative error, lowest power first.

A state that meets no larger score is multiplied by 2^0: were that not 1, the error would grow with the number of leaves.
Found by Remez's exchange algorithm; run ``python -m elsa_tune.parts.exp.polynomial`` to derive and check them.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import zip_longest
from math import factorial
from typing import Any

import numpy as np

from elsa_tune.parts.exp._base import Exp

COEFFICIENTS: dict[int, tuple[str, ...]] = {
    4: ("1.0", "0.693124175", "0.240240991", "0.0559064262", "0.00958285294"),
    5: ("1.0", "0.693147004", "0.240222424", "0.0555073358", "0.00967151299", "0.00132647273"),
    6: ("1.0", "0.693147182", "0.240226477", "0.0555033237", "0.00961843692", "0.00133988739", "0.00015353362"),
    10: (
        "1.0", "0.6931471805599492", "0.240226506959091", "0.05550410866448181", "0.009618129107983103",
        "0.0013333558225801067", "0.00015403529994287692", "1.5252659427253973e-05", "1.3215653574139295e-06", "1.0208323077598024e-07",
        "7.038183177272391e-09",
    ),
    11: (
        "1.0", "0.6931471805599453", "0.2402265069591013", "0.055504108664820084", "0.00961812910759412",
        "0.0013333558146774623", "0.00015403530457112126", "1.5252733493125527e-05", "1.3215435282293565e-06", "1.0178199572710636e-07",
        "7.0737832505786415e-09", "4.434771161313258e-10",
    ),
}  # fmt: skip
"""Degree -> coefficients, in the floats that it is exact enough for: float32's, from 10 on float64's."""

_LN2 = Fraction("0.69314718055994530941723212145817656807550013436025525412068")
SERIES = tuple(_LN2**k / factorial(k) for k in range(28))
"""2^f, lowest power first. What polynomials differ from it by is small enough for float64, whatever they are of."""


@cache
def relative_error(degree: int) -> float:
    """Largest relative error of the polynomial, whatever it is evaluated in."""
    f = np.linspace(-0.5, 0.5, 20001)
    stored = (Fraction(float(c)) for c in COEFFICIENTS[degree])
    differs = [float(c - s) for c, s in zip_longest(stored, SERIES, fillvalue=Fraction())]
    return float(np.abs(np.polyval(differs[::-1], f) / np.exp2(f)).max())


def remez(degree: int, iterations: int = 12) -> list[float]:
    """Minimax coefficients of the relative error among polynomials 1 + f q(f), lowest power first, in float64.

    That error is weight(f) (q(f) - g(f)) with weight |f| / 2^f, up to its sign, and g(f) = (2^f - 1) / f: q is the best
    weighted approximation of g, whose error alternates at degree + 1 points. Sought is what q adds to the first terms of g's
    series, which float64 holds to many more digits than q itself.
    """
    grid = np.linspace(-0.5, 0.5, 20000)  # without 0, where the weight vanishes
    points: Any = -0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    first, rest = SERIES[1 : degree + 1], [0.0] * degree + [float(s) for s in SERIES[degree + 1 :]]

    def weight(f: Any) -> Any:
        return np.abs(f) / np.exp2(f)

    def target(f: Any) -> Any:
        return np.polyval(rest[::-1], f)

    added = np.zeros(degree)
    for _ in range(iterations):
        powers = points[:, None] ** np.arange(degree)
        signs = (-1.0) ** np.arange(degree + 1) / weight(points)
        added = np.linalg.solve(np.column_stack([powers, signs]), target(points))[:-1]
        error = (np.polyval(added[::-1], grid) - target(grid)) * weight(grid)
        runs = np.split(np.arange(grid.size), np.flatnonzero(np.diff(np.sign(error))) + 1)
        if len(runs) != degree + 1:
            break
        points = np.array([grid[run[np.argmax(np.abs(error[run]))]] for run in runs])
    return [1.0, *(float(s + Fraction(float(a))) for s, a in zip(first, added, strict=True))]


EXP = Exp("polynomial", "multiply-adds alone", relative_error, 11, COEFFICIENTS.__getitem__)

if __name__ == "__main__":
    for degree in COEFFICIENTS:
        found = [repr(c) if degree >= 10 else f"{np.float32(c):.9g}" for c in remez(degree)]
        print(degree, found, f"relative error {relative_error(degree):.1e}")

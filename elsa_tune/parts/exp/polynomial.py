"""Polynomials for 2^f on [-1/2, 1/2] that are exactly 1 at 0, with the smallest possible relative error, lowest power first.

A state that meets no larger score is multiplied by 2^0: were that not 1, the error would grow with the number of leaves.
Found by Remez's exchange algorithm; run ``python -m elsa_tune.parts.exp.polynomial`` to derive and check them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from elsa_tune.parts.exp._base import Exp

COEFFICIENTS: dict[int, tuple[str, ...]] = {
    4: ("1.0", "0.693124175", "0.240240991", "0.0559064262", "0.00958285294"),
    5: ("1.0", "0.693147004", "0.240222424", "0.0555073358", "0.00967151299", "0.00132647273"),
    6: ("1.0", "0.693147182", "0.240226477", "0.0555033237", "0.00961843692", "0.00133988739", "0.00015353362"),
}
"""Degree -> float32 coefficients."""


@cache
def relative_error(degree: int) -> float:
    """Largest relative error of the polynomial, evaluated in float64."""
    f = np.linspace(-0.5, 0.5, 20001)
    return float(np.abs(np.polyval([float(c) for c in COEFFICIENTS[degree][::-1]], f) / np.exp2(f) - 1).max())


def remez(degree: int, iterations: int = 12) -> list[float]:
    """Minimax coefficients of the relative error among polynomials 1 + f q(f), lowest power first, in float64.

    That error is weight(f) (q(f) - g(f)) with weight |f| / 2^f, up to its sign, and g(f) = (2^f - 1) / f: q is the best
    weighted approximation of g, whose error alternates at degree + 1 points.
    """
    grid = np.linspace(-0.5, 0.5, 20000)  # without 0, where the weight vanishes
    points: Any = -0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))

    def weight(f: Any) -> Any:
        return np.abs(f) / np.exp2(f)

    def target(f: Any) -> Any:
        return np.expm1(f * np.log(2)) / f

    coefficients = np.zeros(degree)
    for _ in range(iterations):
        powers = points[:, None] ** np.arange(degree)
        signs = (-1.0) ** np.arange(degree + 1) / weight(points)
        coefficients = np.linalg.solve(np.column_stack([powers, signs]), target(points))[:-1]
        error = (np.polyval(coefficients[::-1], grid) - target(grid)) * weight(grid)
        runs = np.split(np.arange(grid.size), np.flatnonzero(np.diff(np.sign(error))) + 1)
        if len(runs) != degree + 1:
            break
        points = np.array([grid[run[np.argmax(np.abs(error[run]))]] for run in runs])
    return [1.0, *(float(c) for c in coefficients)]


EXP = Exp("polynomial", "multiply-adds alone", relative_error, 11, COEFFICIENTS.__getitem__)

if __name__ == "__main__":
    for degree in COEFFICIENTS:
        print(degree, [f"{np.float32(c):.9g}" for c in remez(degree)], f"relative error {relative_error(degree):.1e}")

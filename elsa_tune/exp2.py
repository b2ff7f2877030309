"""Polynomials for 2^f on [-1/2, 1/2] with the smallest possible relative error, lowest power first.

Found by Remez's exchange algorithm on p(f) / 2^f - 1; run ``python -m elsa_tune.exp2`` to derive and check them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

COEFFICIENTS: dict[int, tuple[str, ...]] = {
    4: ("0.999999285", "0.693121791", "0.240247443", "0.0559178591", "0.00957010221"),
    5: ("1.00000012", "0.693146944", "0.240221202", "0.0555071346", "0.00967554096", "0.00132764678"),
    6: ("1.0", "0.693147182", "0.240226462", "0.0555032864", "0.00961848907", "0.00133999309", "0.000153458212"),
}
"""Degree -> float32 coefficients."""


@cache
def relative_error(degree: int) -> float:
    """Largest relative error of the polynomial, evaluated in float64."""
    f = np.linspace(-0.5, 0.5, 20001)
    return float(np.abs(np.polyval([float(c) for c in COEFFICIENTS[degree][::-1]], f) / np.exp2(f) - 1).max())


def remez(degree: int, iterations: int = 12) -> list[float]:
    """Minimax coefficients of the relative error, lowest power first, in float64."""
    grid = np.linspace(-0.5, 0.5, 20001)
    points: Any = -0.5 * np.cos(np.pi * np.arange(degree + 2) / (degree + 1))
    coefficients = np.zeros(degree + 1)
    for _ in range(iterations):
        powers = points[:, None] ** np.arange(degree + 1) / np.exp2(points)[:, None]
        signs = (-1.0) ** np.arange(degree + 2)
        coefficients = np.linalg.solve(np.column_stack([powers, signs]), np.ones(degree + 2))[:-1]
        error = np.polyval(coefficients[::-1], grid) / np.exp2(grid) - 1
        runs = np.split(np.arange(grid.size), np.flatnonzero(np.diff(np.sign(error))) + 1)
        if len(runs) != degree + 2:
            break
        points = np.array([grid[run[np.argmax(np.abs(error[run]))]] for run in runs])
    return [float(c) for c in coefficients]


if __name__ == "__main__":
    for degree in COEFFICIENTS:
        print(degree, [f"{np.float32(c):.9g}" for c in remez(degree)], f"relative error {relative_error(degree):.1e}")

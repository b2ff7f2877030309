"""tanh on multiply-adds and a division, with a small relative error everywhere.

Near 0 too, where 1 - 2 / (1 + e^2y) has none of its digits left. In float32 a quotient of polynomials, y P(y^2) / Q(y^2) up to LIMIT,
where it has rounded to 1, lowest powers first; found by weighted least squares, weights raised where the error is (Lawson 1961): run
``python -m elsa_tune.parts.tanh``. In float64 that would take twice the multiply-adds of tanh |y| = -x / (2 + x) with
x = e^(-2|y|) - 1 = 2^n f q(f) + (2^n - 1), of which nothing cancels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elsa_tune.parts.exp.polynomial import COEFFICIENTS

LIMIT = 9.0
NUMERATOR = ("1.0", "0.133809999", "0.00349555607", "2.06085206e-05", "1.33538274e-08")
DENOMINATOR = ("1.0", "0.467143148", "0.0258768629", "0.00032855809", "7.77622802e-07")
"""float32 coefficients."""

SLOPE = COEFFICIENTS[11][1:]
"""float64 coefficients of q: (2^f - 1) / f on [-1/2, 1/2]."""

UNITS = 8
"""Either way errs by at most so many units of round-off, relative to tanh."""


def relative_error() -> float:
    """The largest relative error of the quotient, evaluated in float64."""
    y = np.linspace(0, LIMIT, 20001)[1:]
    over, under = (np.polyval([float(c) for c in x[::-1]], y * y) for x in (NUMERATOR, DENOMINATOR))
    return float(np.abs(y * over / under / np.tanh(y) - 1).max())


def derived(over: int, under: int, iterations: int = 80) -> tuple[list[float], list[float]]:
    """Coefficients of polynomials of those degrees, lowest power first, in float64; the denominator's first is 1."""
    y = np.linspace(0, LIMIT, 4001)[1:]
    z, target = (y / LIMIT) ** 2, np.tanh(y) / y
    emphasis, last, least = np.ones_like(z), np.ones_like(z), np.inf
    found: Any = None
    for _ in range(iterations):
        columns = np.column_stack([*(z**k for k in range(over + 1)), *(-target * z**k for k in range(1, under + 1))])
        weight = np.sqrt(emphasis) / target / last
        size = np.linalg.norm(columns * weight[:, None], axis=0)
        solved = np.linalg.lstsq(columns * weight[:, None] / size, target * weight, rcond=None)[0] / size
        last = np.polyval([*solved[over + 1 :][::-1], 1.0], z)
        error = np.abs(np.polyval(solved[: over + 1][::-1], z) / last / target - 1)
        if error.max() < least:
            least, found = error.max(), solved
        emphasis *= error / error.max() + 1e-3
    scaled = [float(c) / LIMIT ** (2 * k) for k, c in zip([*range(over + 1), *range(1, under + 1)], found, strict=True)]
    return scaled[: over + 1], [1.0, *scaled[over + 1 :]]


if __name__ == "__main__":
    for polynomial in derived(len(NUMERATOR) - 1, len(DENOMINATOR) - 1):
        print([f"{np.float32(c):.9g}" for c in polynomial])
    print(f"relative error {relative_error():.1e}")

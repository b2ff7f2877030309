"""A way to 2^x: how far it may be off, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Exp:
    """``error(degree)`` is its largest relative error, of a polynomial for that degree. ``instructions``: of one 2^x on a GPU.
    ``coefficients(degree)``: what a polynomial's text writes, lowest power first; other ways have none."""

    name: str
    title: str
    error: Callable[[int], float]
    instructions: int
    coefficients: Callable[[int], tuple[str, ...]] = lambda degree: ()


DEGREE = 5
"""Of polynomials where a language leaves no choice."""

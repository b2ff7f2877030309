"""The arithmetic that judges float64: sums, products and functions to 2^-95 and more, infinities and what is no number as float64 has
them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from elsa_tune.parts import operator as operators
from elsa_tune.prove.double_double import DoubleDouble

mpmath = pytest.importorskip("mpmath", reason="comes with torch, by way of sympy")
mpmath.mp.prec = 300
GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int, spread: float = 1.0) -> DoubleDouble:
    """Normal numbers of which the lower part is not 0."""
    high, low = (torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    return DoubleDouble(high * spread) + low * spread * 2.0**-55


def numbers(x: DoubleDouble) -> list[Any]:
    """As mpmath has them."""
    parts = zip(x.high.flatten().tolist(), x.low.flatten().tolist(), strict=True)
    return [mpmath.mpf(high) + mpmath.mpf(low) for high, low in parts]


def error(found: DoubleDouble, expected: list[Any]) -> float:
    """The largest, beside numbers of at least 1."""
    return float(max(abs(x - y) / max(1, abs(y)) for x, y in zip(numbers(found), expected, strict=True)))


X, Y = drawn(500), drawn(500)
TWO: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda x, y: x + y,
    "difference": lambda x, y: x - y,
    "product": lambda x, y: x * y,
    "quotient": lambda x, y: x / y,
}


@pytest.mark.parametrize("name", TWO)
def test_two_numbers(name: str) -> None:
    expected = [TWO[name](x, y) for x, y in zip(numbers(X), numbers(Y), strict=True)]
    assert error(TWO[name](X, Y), expected) < 2.0**-98
    with_float = [TWO[name](x, mpmath.mpf(0.1)) for x in numbers(X)]
    assert error(TWO[name](X, 0.1), with_float) < 2.0**-98
    with_tensor = [TWO[name](x, mpmath.mpf(y)) for x, y in zip(numbers(X), Y.high.tolist(), strict=True)]
    assert error(TWO[name](X, Y.high), with_tensor) < 2.0**-98


FUNCTIONS: dict[str, tuple[DoubleDouble, float]] = {
    "exp": (drawn(2000, spread=50.0), 2.0**-95),
    "log": (abs(drawn(500, spread=1e5)), 2.0**-95),
    "tanh": (drawn(500, spread=3.0), 2.0**-95),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    x, allowed = FUNCTIONS[name]
    assert error(getattr(x, name)(), [getattr(mpmath, name)(number) for number in numbers(x)]) < allowed


@pytest.mark.parametrize("n", [1, 3, 64, 1000])
def test_products_of_matrices(n: int) -> None:
    """To 2^-90 of the largest number in a row, times the largest in a column, times as many as are added."""
    x, y = drawn(3, n), drawn(n, 2)
    rows, columns = numbers(x), numbers(y)
    expected = [sum(rows[i * n + k] * columns[k * 2 + j] for k in range(n)) for i in range(3) for j in range(2)]
    assert error(x @ y, expected) < n * 16 * 2.0**-90
    exact = [
        sum(rows[i * n + k] * mpmath.mpf(float(y.high[k, j])) for k in range(n)) for i in range(3) for j in range(2)
    ]
    assert error(x @ y.high, exact) < n * 16 * 2.0**-90


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_sums_and_largest(n: int) -> None:
    x = drawn(4, n)
    rows = [numbers(x)[i * n : (i + 1) * n] for i in range(4)]
    assert error(x.sum(1), [sum(row) for row in rows]) < 2.0**-95
    assert error(x.amax(1), [max(row) for row in rows]) == 0
    close = DoubleDouble(torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 2.0**-60, -(2.0**-60)]))
    assert float(close.amax(0).low) == 2.0**-60
    assert (close < 1.0).tolist() == [False, False, True] and (close == 1.0).tolist() == [True, False, False]


def test_what_is_no_finite_number() -> None:
    odd = torch.tensor([-math.inf, math.nan, -1e308, -1000.0, 0.0], dtype=torch.float64)
    x = DoubleDouble(odd)

    def same(found: DoubleDouble, expected: Tensor) -> bool:
        lost = ~found.high.isfinite()
        return torch.equal(found.high.nan_to_num(7.0), expected.nan_to_num(7.0)) and not found.low[lost].any()

    assert same(x.exp(), odd.exp()) and same(x - 1.5e308, odd - 1.5e308) and same(x * 2.0, odd * 2.0)
    assert same(DoubleDouble(odd.exp()).log(), torch.tensor([-math.inf, math.nan, -math.inf, -math.inf, 0.0]).double())
    assert same(x / 2.0, odd / 2.0) and same(x.tanh(), odd.tanh())
    assert x.isneginf().tolist() == [True, False, False, False, False]


def test_attention_written_out() -> None:
    """The operator's own function, of numbers with twice the digits, against Python's sums over three keys."""
    scores, values = drawn(2, 3, spread=4.0), torch.randn(3, 2, generator=GENERATOR, dtype=torch.float64)
    hidden = torch.tensor([[False, False, True], [False, False, False]])
    out, total = operators.get(operators.SOFTMAX).rows([(scores.masked_fill(hidden, -math.inf), values)])  # type: ignore[list-item]
    each = numbers(scores)
    for row, seen in enumerate(([0, 1], [0, 1, 2])):
        weights = {k: mpmath.exp(each[row * 3 + k]) for k in seen}
        sums = sum(weights.values())
        means = [sum(w * mpmath.mpf(float(values[k, j])) for k, w in weights.items()) / sums for j in range(2)]
        assert error(out[row], means) < 2.0**-85  # type: ignore[arg-type]
        assert error(total[row : row + 1], [mpmath.log(sums)]) < 2.0**-85  # type: ignore[arg-type]

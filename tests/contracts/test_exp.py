"""What every way to 2^x promises: kernels err by no more than it says, over the range and in every language; 2^0 is 1, far below
2^-126 nothing is left, and what is no number stays none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contracts import covering, running
from elsa_tune.device import host_cpu
from elsa_tune.generate import lawful, laws
from elsa_tune.generate.backends import Kernel
from elsa_tune.parts import exp
from elsa_tune.parts.element import UNIT
from elsa_tune.parts.exp import polynomial
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Variant

FAMILY = "fp32.d4.v2"
ROUNDED = 4
"""Units of round-off beside the way's own error: two of its multiply-adds in float32, two of the quotient of a weight and a sum."""


def offered() -> Iterator[tuple[str, str, str]]:
    """Language, way and degree of every 2^x that has a text. The library's and the unit's own are here those of this CPU."""
    for language, one in covering.LANGUAGES.items():
        degrees = covering.offered(language, "exp_degree") or (exp.DEGREE,)
        texts = [name for name in exp.names() if laws.has_text(one.backend, "exp", name)]
        yield from ((language, name, str(degree)) for name in texts for degree in degrees)


def variant_of(language: str, name: str, degree: int) -> Variant:
    """Small, of one state: laws refuse degrees that err too much for the class, a text has them all the same."""
    own = {"exp": name} if covering.offered(language, "exp") else {}
    found = covering.variant_with(language, FAMILY, workers=1, splits=1, **own)
    assert found is not None
    chosen = {"exp_degree": degree} if covering.offered(language, "exp_degree") else {}
    return Space.read(found.backend).variant({**found.axes, **chosen})


def weights(kernel: Kernel, scores: Tensor) -> Tensor:
    """What the kernel makes of scores [n] up to 0, each beside one of 0: the quotient of its two outputs."""
    query, key, value = torch.zeros(1, 1, len(scores), 4), torch.zeros(1, 1, 2, 4), torch.eye(2)[None, None]
    query[..., 0], key[0, 0, 1, 0] = scores, 1
    out = kernel(query, key, value.contiguous(), 1.0)[0, 0].double()
    return out[:, 1] / out[:, 0]


def exponents(scores: Tensor) -> Tensor:
    """In base 2, rounded once, as a kernel's multiply-add does beside a maximum of 0."""
    return (scores * torch.tensor(math.log2(math.e))).double()


@pytest.mark.parametrize("name", exp.names())
class TestContract:
    def test_its_facts(self, name: str) -> None:
        one = exp.get(name)
        assert one.name == name and one.instructions > 0 and 0 < one.error(exp.DEGREE) < 8 * UNIT
        coefficients = one.coefficients(exp.DEGREE)
        assert not coefficients or (len(coefficients) == exp.DEGREE + 1 and float(coefficients[0]) == 1)


@pytest.mark.parametrize(("language", "name", "degree"), running.cases(offered()))
def test_a_kernel_errs_as_it_says(language: str, name: str, degree: str, tmp_path: Path) -> None:
    one, problem = exp.get(name), Problem.parse(FAMILY)
    kernel = running.kernel(language, variant_of(language, name, int(degree)), problem, tmp_path)
    drawn = torch.rand(1500, generator=torch.Generator().manual_seed(0))
    near, far = -drawn[:1000] * 2, -drawn[1000:] * 87.3  # 2^-126 is e^-87.336
    scores = torch.cat([near, far, torch.tensor([-0.0, -1e-30, -0.34657, -0.34658, -87.3])])
    found, x = weights(kernel, scores), exponents(scores)
    error = (found / torch.exp2(x) - 1).abs()
    assert float(error.max()) <= one.error(int(degree)) + ROUNDED * UNIT
    assert bool((found[scores == 0] == 1).all()), "2^0"
    assert float(weights(kernel, torch.tensor([-87.34, -88.1, -103.0])).max()) < 2.0**-126, "denormal, or 0"
    assert not weights(kernel, torch.tensor([-104.7, -1e4, -3e38])).any(), "below 2^-151"
    lost = weights(kernel, torch.tensor([-1.0, torch.nan, -2.0])).isnan()
    assert lost.tolist() == [False, True, False]


def test_every_way_has_a_text_and_every_degree_its_coefficients() -> None:
    cases = list(offered())
    assert {name for _, name, _ in cases} == set(exp.names())
    assert {int(degree) for *_, degree in cases} == set(polynomial.COEFFICIENTS)


@pytest.mark.parametrize("degree", sorted(polynomial.COEFFICIENTS))
def test_polynomials_are_minimax(degree: int) -> None:
    derived = polynomial.remez(degree)
    stored = [float(c) for c in polynomial.COEFFICIENTS[degree]]
    assert max(abs(a - b) for a, b in zip(derived, stored, strict=True)) < (2e-7 if degree < 10 else 2e-16)
    assert stored[0] == derived[0] == 1
    assert polynomial.relative_error(degree) < {4: 2.9e-6, 5: 1.1e-7, 6: 2e-8, 10: 2.3e-16, 11: 3e-17}[degree]


def test_a_polynomial_that_is_not_1_at_0_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variant, problem = variant_of("cpp", "polynomial", exp.DEGREE), Problem.parse("fp32.d4.v2@b1.h2.q64.k64")
    assert lawful.refusal(variant, problem, host_cpu()) is None
    almost = ("1.00000012", *polynomial.COEFFICIENTS[exp.DEGREE][1:])
    monkeypatch.setitem(polynomial.COEFFICIENTS, exp.DEGREE, almost)
    assert "2^0" in str(lawful.refusal(variant, problem, host_cpu()))

"""What every element promises: its bytes and round-off are its dtype's, and in every language each of its patterns is widened as it
is, NaN and infinity too, and what is stored is rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from contracts import covering, running
from elsa_tune.generate import laws
from elsa_tune.generate.backends import Kernel
from elsa_tune.generate.tensors import lse_dtype
from elsa_tune.parts import element
from elsa_tune.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter meets NaN
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes."""

HEADS, COLUMNS = 1024, 64
"""Of which a head's values are COLUMNS patterns: 65536 together, as many as two bytes have."""


def patterns(name: str, language: str = "") -> Tensor:
    """[1, heads, 1, COLUMNS]: every pattern of two bytes; of more, as many random ones, special numbers among them. Triton's
    conversions are the compiler's own, and its interpreter's lose denormal bf16 numbers: it has some of the others."""
    one, count = element.get(name), HEADS * COLUMNS
    least, most = torch.finfo(one.dtype).smallest_normal, torch.finfo(one.dtype).max
    if one.bytes == 2:
        made = torch.arange(-count // 2, count // 2, dtype=WHOLE[2]).view(one.dtype)
    else:
        whole, generator = torch.iinfo(WHOLE[one.bytes]), torch.Generator().manual_seed(0)
        made = torch.randint(whole.min, whole.max, (count,), dtype=WHOLE[one.bytes], generator=generator).view(
            one.dtype
        )
        special = [0.0, torch.inf, -torch.inf, torch.nan, least, least / 3, most, -most]
        made[: len(special)] = torch.tensor(special, dtype=one.dtype)
    if language == "triton":
        made = made[:: count // 1024].masked_fill(made[:: count // 1024].abs() < least, 0.0)
    return made.reshape(1, -1, 1, COLUMNS)


def equal(found: Tensor, expected: Tensor) -> bool:
    """The same numbers, and NaN in the same places, of whichever payload; zeros have either sign."""
    assert found.dtype == expected.dtype
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found[~found.isnan()], expected[~found.isnan()])


@pytest.mark.parametrize("name", element.names())
class TestContract:
    def test_its_facts_are_its_dtypes(self, name: str) -> None:
        one = element.get(name)
        assert one.name == name and one.bytes == one.dtype.itemsize and one.narrow == (one.bytes < 4)
        assert element.precision(name).unit == torch.finfo(one.dtype).eps / 2
        assert name in one.classes and all(element.precision(c) in one.precisions for c in one.classes)

    def test_what_a_problem_moves_is_counted(self, name: str) -> None:
        problem = Problem(dtype=name, head_dim=5, value_dim=3, batch=2, heads=4, kv_heads=2, q_len=7, kv_len=9)
        shapes = ((2, 4, 7, 5), (2, 2, 9, 5), (2, 2, 9, 3), (2, 4, 7, 3))
        tensors = [torch.empty(shape, dtype=element.get(name).dtype) for shape in shapes]
        assert problem.bytes == sum(x.nbytes for x in tensors)


def test_no_class_is_of_two_elements_and_the_widest_come_first() -> None:
    assert len(set(element.precisions())) == sum(len(element.get(name).classes) for name in element.names())
    sizes = [next(e.bytes for e in map(element.get, element.names()) if c in e.classes) for c in element.precisions()]
    assert sizes == sorted(sizes, reverse=True)


of_every_kernel = pytest.mark.parametrize(
    ("language", "name"),
    running.cases(
        (language, name)
        for language, one in covering.LANGUAGES.items()
        for name in element.names()
        if laws.has_text(one.backend, "element", name)
    ),
    scope="module",
)


@pytest.fixture(scope="module")
def kernel(language: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """Of one state that sums: a normalised one moves its columns by differences, and infinity less infinity is NaN. Its 2^x is the finest
    that a law allows: of halves it may be coarser than their scores."""
    family = f"{name}.d16.v{COLUMNS}"
    one_state = {"workers": 1, "splits": 1, **covering.summing(language)}
    finest = [{"exp_degree": degree} for degree in reversed(covering.offered(language, "exp_degree"))]
    variants = (covering.variant_with(language, family, **one_state, **own) for own in finest or [{}])
    variant = next(filter(None, variants))
    return running.kernel(language, variant, Problem.parse(family), tmp_path_factory.mktemp("kernel"))


def scores_of_patterns(values: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Patterns and a scale that makes scores of them which a log-sum-exp tells apart: from 1 to 2^12, of either sign."""
    finite = values.flatten()
    finite = finite[finite.isfinite() & (finite != 0)]
    for exponent in range(-120, 130, 24):
        size = finite.double().abs() * 2.0**exponent
        some = finite[(size >= 1) & (size < 4096)]
        if len(some):
            yield some[:: max(1, len(some) // 16)], 2.0**exponent


@of_every_kernel
def test_every_pattern_is_widened_and_stored(language: str, name: str, kernel: Kernel) -> None:
    """One key is its own mean: each value comes back as it was; two are rounded once, as torch rounds their mean; a score is that
    of the query's and the key's number, whatever its size."""
    values = patterns(name, language)
    zeros = torch.zeros(1, values.shape[1], 1, 16, dtype=values.dtype)
    assert equal(kernel(zeros, zeros, values), values)
    others = values.flatten()[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))]
    two = torch.cat([values, others.view_as(values)], 2)
    wide = lse_dtype(values)
    mean = ((two[:, :, :1].to(wide) + two[:, :, 1:].to(wide)) / 2).to(values.dtype)
    found = kernel(zeros, zeros.repeat(1, 1, 2, 1), two)
    if language == "triton":  # whose interpreter rounds bf16 towards 0
        unit = 2 * element.precision(name).unit
        assert torch.allclose(found.double(), mean.double(), rtol=unit, atol=1e-37, equal_nan=True)
    else:
        assert equal(found, mean)
    for some, scale in scores_of_patterns(values):
        for of_query in (True, False):
            numbers, one = (torch.zeros(1, 1, n, 16, dtype=some.dtype) for n in (len(some), 1))
            numbers[..., 3], one[..., 3] = some, 1
            numbers = numbers if of_query else numbers.transpose(1, 2)
            query, key = (numbers, one) if of_query else (one.expand_as(numbers), numbers)
            lse = torch.full(query.shape[:3], torch.nan, dtype=wide)
            kernel(query, key, values[:, : key.shape[1]], scale, None, lse)
            # a 2^x of fewer terms may serve narrow elements
            error = 1e-5 if element.get(name).narrow else 16 * element.get(name).unit
            assert torch.allclose(lse.flatten().double(), some.double() * scale, rtol=error, atol=0)


@of_every_kernel
def test_what_is_no_number_stays_in_its_rows(language: str, name: str, kernel: Kernel) -> None:
    """NaN of a query is its row's, of a key its head's, of a value its column's, infinity of a value too."""
    generator = torch.Generator().manual_seed(1)
    dtype = element.get(name).dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for which, place in (("query", (0, 1, 5, 2)), ("key", (0, 1, 20, 2)), ("value", (0, 1, 20, 2))):
        tensors = {"query": normal(1, 2, 19, 16), "key": normal(1, 2, 37, 16), "value": normal(1, 2, 37, COLUMNS)}
        for special in (torch.nan, *((torch.inf, -torch.inf) if which == "value" else ())):
            tensors[which][place] = special
            out = kernel(**tensors)
            rows = (slice(0, 1), slice(1, 2), slice(5, 6) if which == "query" else slice(None))
            columns = slice(2, 3) if which == "value" else slice(None)
            odd = torch.zeros_like(out, dtype=torch.bool)
            odd[(*rows, columns)] = True
            assert torch.equal(~out.isfinite(), odd), (which, special)
            assert equal(out[odd], torch.full_like(out[odd], special))

"""Bounds mean the same in Python, in arrays, in C and in Triton, negative numbers included; what is no bound is refused."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from elsa_tune.parts import mask
from elsa_tune.parts.bound import Bound, least_of, most_of
from elsa_tune.parts.mask import Mask

NAMES = ("position", "q_len", "kv_len", "left")
VALUES = (-1000003, -17, -8, -7, -1, 0, 1, 6, 7, 8, 100, 1000003)
DIVISIONS = [Bound(text) for text in ("position // 7", "(position - left) // 8 * 8", "-(position // 3) // 4")]
EVERY = [
    *DIVISIONS,
    *(b for n in mask.names() for b in (mask.get(n).low, mask.get(n).high)),
    Bound("min(position, left, 3) - -2"),
]

expressions = some.recursive(
    some.sampled_from(NAMES) | some.integers(-9, 9).map(lambda n: f"({n})"),
    lambda inner: some.one_of(
        some.tuples(inner, some.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        some.tuples(inner, some.integers(1, 9)).map(lambda t: f"({t[0]} // {t[1]})"),
        some.tuples(some.sampled_from(("min", "max")), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=6,
)


@given(expressions, some.lists(some.integers(-50, 50), min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_values_are_pythons(text: str, numbers: list[int]) -> None:
    """Python itself evaluates what was parsed, what is written as Python, and arrays."""
    names, bound = dict(zip(NAMES, numbers, strict=True)), Bound(text)
    expected = eval(text, {**names})
    assert bound.value(**names) == expected == eval(bound.written("python"), {**names})
    arrays = {name: np.array([value, value + 1]) for name, value in names.items()}
    tensors = {name: torch.tensor([value, value + 1]) for name, value in names.items()}
    more = eval(text, {name: value + 1 for name, value in names.items()})
    assert np.broadcast_to(bound.value(**arrays), 2).tolist() == [expected, more]
    found = bound.value(**tensors)
    assert (found.tolist() if isinstance(found, torch.Tensor) else [found] * 2) == [expected, more]


growing = some.recursive(
    some.sampled_from(("position", "position", "left", "q_len", "(-3)", "kv_len")),
    lambda inner: some.one_of(
        some.tuples(inner, some.sampled_from("+-"), some.integers(-9, 9)).map(lambda t: f"({t[0]} {t[1]} ({t[2]}))"),
        inner.map(lambda x: f"(kv_len + {x} - left * 2)"),
        some.tuples(inner, some.sampled_from(("*", "//")), some.integers(1, 9)).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        some.tuples(some.sampled_from(("min", "max")), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=6,
)


@given(growing, some.integers(1, 40), some.integers(1, 40), some.integers(-20, 20))
@settings(max_examples=300, deadline=None)
def test_the_first_position_beyond_a_key(text: str, q_len: int, kv_len: int, left: int) -> None:
    names, bound = {"q_len": q_len, "kv_len": kv_len, "left": left}, Bound(text)
    values = [bound.value(position=position, **names) for position in range(q_len)]
    assert values == sorted(values)
    for key in range(kv_len):
        first = bound.first_beyond.value(key=key, **names)
        assert max(0, min(first, q_len)) == next((i for i, value in enumerate(values) if value > key), q_len)


@pytest.mark.parametrize(
    "text", ["left - position", "-position", "position * left", "position + position", "2 * -position"]
)
def test_a_bound_that_may_fall_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not seen to grow"):
        Mask("planted", "planted", high=Bound(text), integers=("left",))


def test_c_means_what_python_means(tmp_path: Path) -> None:
    functions = "\n".join(
        f"long f{i}(long position, long q_len, long kv_len, long left, long right, long prefix) {{ return {bound.written('c')}; }}"
        for i, bound in enumerate(EVERY)
    )
    text = (
        "static long floor_divide(long x, long n) { return (x - (x < 0 ? n - 1 : 0)) / n; }\n"
        "static long least(long x, long y) { return x < y ? x : y; }\nstatic long most(long x, long y) { return x > y ? x : y; }\n"
    )
    (tmp_path / "f.c").write_text(text + functions)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "f.so", tmp_path / "f.c"], check=True)
    library = ctypes.CDLL(str(tmp_path / "f.so"))
    for i, bound in enumerate(EVERY):
        function = getattr(library, f"f{i}")
        function.argtypes, function.restype = [ctypes.c_long] * 6, ctypes.c_long
        for position, left in itertools.product(VALUES, VALUES):
            given_ = {"position": position, "q_len": 12, "kv_len": 30, "left": left, "right": 5, "prefix": 4}
            assert function(*given_.values()) == bound.value(**given_), (bound, given_)


def test_names_are_substituted() -> None:
    bound = Bound("max(position - left, 0)")
    assert bound.names == {"position", "left"}
    assert bound.written("c", {"left": "c.left", "position": "row / group"}) == "most((row / group - c.left), 0)"
    assert bound.written("triton") == "tl.maximum((position - left), 0)"


def test_least_and_most_name_each_bound_once() -> None:
    one, other = Bound("position + 1"), Bound("left")
    assert least_of([one, one]) == one and most_of([one, other]).text == "max(position + 1, left)"


@pytest.mark.parametrize(
    "text",
    ["position / 2", "position // 0", "position // left", "position // -2", "position ** 2", "f(position)", "min(position)",
     "position if left else 0", "position.real", "True", "1.5", "position @ left", "[position]", "min(position, key=left)", "~position"],
)  # fmt: skip
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="bound"):
        Bound(text)

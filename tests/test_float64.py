"""float64 in C++: what it is computed with is as accurate as it is, what is not is caught, and what has no text of it refuses it by
name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import elsa_tune
from elsa_tune import space
from elsa_tune.device import host_cpu, named
from elsa_tune.dispatch import states
from elsa_tune.generate import backends, cpp, lawful
from elsa_tune.generate.backends import Kernel
from elsa_tune.parts import element
from elsa_tune.parts.exp import polynomial
from elsa_tune.problem import Problem
from elsa_tune.prove import check
from elsa_tune.ship import export
from elsa_tune.space import Space

HERE = host_cpu()
ISA = f"{HERE.isas[0]}.l{cpp.ISAS[HERE.isas[0]].lanes}"
UNIT = element.get("fp64").unit


def kernel_of(spelled: str, family: str, change: Callable[[str], str] = lambda text: text) -> Kernel:
    """The variant's kernel, its text changed."""
    variant, problem = space.parse(spelled.format(ISA)), Problem.parse(family)
    source = cpp.source(variant, problem)
    text = change(source.text)
    name = cpp.digest(variant, problem) if text == source.text else f"fault-{abs(hash(text)):x}"
    built = cpp.find(name) or cpp.build_text(text, name, variant)
    return cpp.load(built, variant, problem)


def in_float32(text: str) -> str:
    """Numbers with more digits than a float has, rounded to one."""
    return re.sub(r"\d+\.\d{10,}(e-\d+)?", lambda found: repr(float(torch.tensor(float(found[0]))) + 0.0), text)


def within(function: str, change: Callable[[str], str]) -> Callable[[str], str]:
    """A change of one function of a text."""

    def changed(text: str) -> str:
        first = text.index(f"INLINE vec {function}(")
        last = text.index("\n}\n", first)
        body = change(text[first:last])
        assert body != text[first:last], f"{function} is another"
        return text[:first] + body + text[last:]

    return changed


def lost(text: str) -> str:
    """A polynomial without its highest power."""
    return re.sub(r"splat\([^)]*\);\n  ([pq]) = \1 \* f \+ ([^;]*);", r"splat(\2);", text)


FAULTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "2^f of float32 coefficients": ("fp64.d16", within("exp2", in_float32)),
    "2^f without its highest power": ("fp64.d16", within("exp2", lost)),
    "a logarithm of float32": ("fp64.d16", lambda text: text.replace("LOG2_E = 1.4426950408889634", "LOG2_E = 1.44269504")),
    "a scale of float32": ("fp64.d33.v17", lambda text: text.replace("<double>(c.scale)", "<float>(c.scale)")),
    "a sum of float32": ("fp64.d16", lambda text: text.replace("sum[i] += p;", "for (int l = 0; l < LANES; ++l) sum[i][l] = float(sum[i][l] + p[l]);")),
    "tanh of float32 coefficients": ("fp64.d16.softcap", within("softcap_score", in_float32)),
    "tanh without its highest power": ("fp64.d16.softcap", within("softcap_score", lost)),
}  # fmt: skip


@pytest.mark.parametrize("degree", [10, 11])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_accurate_is_caught(fault: str, degree: int) -> None:
    """The very kernel without the fault passes."""
    family, change = FAULTS[fault]
    spelled, problem = (
        f"cpp.serial.{{}}.q2.k4.v4.n24.e{degree}",
        Problem.parse(family).reshaped(heads=2, q_len=64, kv_len=64),
    )
    healthy = check.check_family(kernel_of(spelled, family), problem, [], longest=301)
    assert not healthy.reason and healthy.error < 2.0**-48
    found = check.check_family(kernel_of(spelled, family, change), problem, [], longest=301)
    assert "error" in found.reason or "errs" in found.reason


@pytest.mark.parametrize("state", ["", ".pair"])
@pytest.mark.parametrize("degree", [10, 11])
def test_weights_err_as_the_polynomial_says(degree: int, state: str) -> None:
    """Each of a score up to 0 beside one of 0; a logarithm's rounding costs a unit of the score."""
    mpmath = pytest.importorskip("mpmath", reason="comes with torch, by way of sympy")
    drawn = torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.cat(
        [-2 * drawn[:300], -708 * drawn[300:], torch.tensor([0.0, -1e-300, -1e-9, -708.3], dtype=torch.float64)]
    )
    query, key = (torch.zeros(1, 1, n, 4, dtype=torch.float64) for n in (len(scores), 2))
    query[0, 0, :, 0], key[0, 0, 1, 0] = scores, 1
    value = torch.eye(2, dtype=torch.float64)[None, None].contiguous()
    kernel = kernel_of(f"cpp.serial.{{}}.q1.k4.v2.n16{state}.e{degree}", "fp64.d4.v2")
    out = kernel(query, key, value, 1.0)[0, 0]
    for score, (of_zero, of_score) in zip(scores.tolist(), out.tolist(), strict=True):
        error = abs(mpmath.mpf(of_score) / mpmath.mpf(of_zero) / mpmath.exp(score) - 1)
        assert error <= polynomial.relative_error(degree) + (4 + abs(score)) * UNIT
    assert out[600].tolist() == [0.5, 0.5]
    far = torch.tensor([-708.5, -745.2, -1e5, -1e300], dtype=torch.float64)
    query[0, 0, :4, 0] = far
    assert not kernel(query[:, :, :4], key, value, 1.0)[..., 1].any()


def test_degrees_of_float64_and_of_float32_are_apart() -> None:
    """What a law lets float64 have, no other element is let have, and the other way round."""
    degrees = {}
    for name in element.names():
        problem = Problem.parse(f"{name}.d64@b1.h8.q512.k512")
        drawn = [next(lawful.variants(Space.read("cpp"), problem, HERE, rng=random.Random(seed))) for seed in range(60)]
        degrees[name] = {variant.axes["exp_degree"] for variant in drawn}
    doubles = degrees.pop("fp64")
    assert doubles == {10, 11} and all(not found & doubles and found for found in degrees.values())


def test_vectors_hold_half_as_many() -> None:
    problem = Problem.parse("fp64.d64@b1.h8.q512.k512")
    variant = space.parse("cpp.serial.avx512.l16.q3.k8.v8.n96.e10")
    text = cpp.source(variant, problem).text
    assert "constexpr int LANES = 8;" in text and "24 query rows" in text and "float" not in re.sub(r"//.*", "", text)
    one = problem.reshaped(q_len=1)
    assert "8 lanes" in str(
        lawful.refusal(space.parse("cpp.serial.avx512.l16.c16.q4.k1.v4.n32.e10"), one, named("zen4"))
    )


def test_what_has_no_text_of_it_refuses_it_by_name() -> None:
    problem = Problem.parse("fp64.d64@b1.h8.q512.k512")
    for backend, device in (("cuda", "sm_75"), ("cuda", "opencl"), ("triton", "sm_90")):
        assert f"no text for the element fp64 in templates/{backend}" in str(
            backends.get(backend).refusal(problem, named(device))
        )
    for target in ("sm_75", "opencl", "zen4"):
        assert "fp64" in str(export.refusal(problem, named(target)))
    assert "floats, not fp64" in str(cpp.no_header(problem))
    gpu = named("sm_90")
    kernels = [str(v) for v in lawful.variants(Space.read("sdpa"), problem, gpu)]
    assert kernels == ["sdpa.math"], "whose sums are float64"


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, n, 16, generator=generator, dtype=torch.float64) for n in (33, 70, 70)]


@pytest.mark.parametrize("cuts", [[70], [1, 70], [8, 9, 40, 70]])
def test_parts_merge_into_the_whole_in_float64(cuts: list[int]) -> None:
    q, k, v = tensors()
    parts = [
        elsa_tune.attention_with_lse(q, k[:, :, first:last], v[:, :, first:last])
        for first, last in zip([0, *cuts], cuts, strict=False)
    ]
    scores = q @ k.mT / 4
    for order in (parts, parts[::-1]):
        output, lse = elsa_tune.merge(order)
        assert output.dtype == lse.dtype == torch.float64
        assert torch.allclose(output, scores.softmax(-1) @ v, rtol=0, atol=1e-14)
        assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=1e-14)


def test_log_sum_exps_beside_an_output_of_torch_are_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states.dispatch, "served", lambda *call: None)
    q, k, v = tensors()
    output, lse = elsa_tune.attention_with_lse(q, k, v)
    assert output.dtype == lse.dtype == torch.float64
    assert torch.allclose(lse, (q @ k.mT / 4).logsumexp(-1), rtol=0, atol=1e-14)

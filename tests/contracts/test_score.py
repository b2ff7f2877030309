"""What every score promises: a formula worked out by hand, an error that it does not exceed, and a refusal where a language has no
text of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from elsa_tune.device import Device, host_cpu
from elsa_tune.errors import BadProblem
from elsa_tune.generate import backends, laws
from elsa_tune.generate.logsumexp import logsumexp
from elsa_tune.parts import mask, score, tanh
from elsa_tune.parts.element import UNIT
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.prove.reference import Inputs

NAMES = [name for name in score.names() if name != score.NONE]
BY_HAND: dict[str, Callable[..., float]] = {
    "softcap": lambda s, own, **place: own["softcap"] * math.tanh(s / own["softcap"]),
    "bias": lambda s, own, batch, head, position, key, **more: s + float(own["bias"][batch, head, position, key]),
    "alibi": lambda s, own, batch, head, position, key, **more: (
        s - float(own["slopes"][batch, head]) * abs(position - key)
    ),
    "alibi_lower_right": lambda s, own, batch, head, position, key, behind: (
        s - float(own["lateslopes"][batch, head]) * abs(position + behind - key)
    ),
    "sinks": lambda s, own, **place: s,
    "dropout": lambda s, own, **place: s,
}
"""Each in Python's own words."""

WRITTEN: dict[str, tuple[dict[str, object], list[float], list[float]]] = {
    "softcap": ({"softcap": 2.0}, [0.0, 1.0, -1.0, 8.0], [0.0, 0.92423431, -0.92423431, 1.99865860]),
    "bias": ({"bias": torch.tensor([[[[0.5, -math.inf, 1.0]]]])}, [1.0, 2.0, -3.0], [1.5, -math.inf, -2.0]),
    "alibi": ({"slopes": torch.tensor([[0.5]])}, [1.0, 2.0, 3.0], [0.0, 1.5, 3.0]),
    "alibi_lower_right": ({"lateslopes": torch.tensor([[0.5]])}, [1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]),
    "sinks": ({"sinks": torch.tensor([4.0])}, [1.0, 2.0], [1.0, 2.0]),
    "dropout": ({"dropout": 0.5, "seed": torch.tensor([1]), "stream": torch.tensor([0])}, [1.0, 2.0], [1.0, 2.0]),
}
"""Each of a few scores of the query at position 2, where keys outnumber queries by 2, worked out on paper."""

SIZES = {"batch": 2, "heads": 2, "q_len": 2, "kv_len": 3}


def own_of(one: score.Score, example: Mapping[str, float], **sizes: int) -> dict[str, Any]:
    """Its operands: an example's numbers, and typical arrays, none of which is shared."""
    arrays = {a.name: torch.as_tensor(a.typical(sizes), dtype=torch.float32) for a in one.arrays}
    return {**example, **{a.name: arrays[a.name].expand([sizes[axis] for axis in a.axes]) for a in one.arrays}}


def places(behind: int, **sizes: int) -> dict[str, Any]:
    names = ("batch", "head", "position", "key")
    index = torch.meshgrid(*(torch.arange(n) for n in sizes.values()), indexing="ij")
    return {**dict(zip(names, index, strict=True)), "behind": behind}


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_the_formula_by_hand(self, name: str) -> None:
        one = score.of_one_file(name)
        scores = torch.linspace(-9, 9, 24, dtype=torch.float64).view(2, 2, 2, 3)
        for example in one.examples:
            own, place = own_of(one, example, **SIZES), places(1, **SIZES)
            found = score.get(name).of(scores, own, **place)
            for at in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).tolist():
                where = {**dict(zip(place, at, strict=False)), "behind": 1}
                expected = BY_HAND[name](float(scores[tuple(at)]), own, **where)
                assert float(found[tuple(at)]) == pytest.approx(expected, rel=1e-12, abs=1e-12)

    def test_the_oracle(self, name: str) -> None:
        """Attention written out in Python for two queries and three keys."""
        one = score.of_one_file(name)
        problem = Problem(head_dim=1, score=name, reals=tuple(one.examples[0].values()), q_len=2, kv_len=3)
        query, keys, values = [1.0, -2.0], [0.5, 3.0, -1.0], [1.0, 2.0, 4.0]
        tensors = [torch.tensor(x).view(1, 1, -1, 1) for x in (query, keys, values)]
        own = own_of(one, one.examples[0], batch=1, heads=1, q_len=2, kv_len=3)
        inputs = Inputs("by hand", *tensors, scale=1.0, operands=tuple(own.values()))
        out, lse = reference.attention_rows_with_lse(problem, inputs, reference.every_row(problem))
        for position, q in enumerate(query):
            place = {"batch": 0, "head": 0, "position": position, "behind": 1}
            weights = [math.exp(BY_HAND[name](q * k, own, key=j, **place)) for j, k in enumerate(keys)]
            weights += [math.exp(float(own[one.term][0]))] if one.term else []
            stay = [1.0, 1.0, 1.0, 1.0]
            if (factors := score.get(name).factor(own, **{**place, "head": 0, "key": torch.arange(3)})) is not None:
                stay = [float(x) for x in factors.flatten()]
            mean = sum(w * f * v for w, f, v in zip(weights, stay, [*values, 0.0], strict=False)) / sum(weights)
            assert float(out[position, 0]) == pytest.approx(mean) and float(lse[position]) == pytest.approx(
                math.log(sum(weights))
            )
        sums = logsumexp(inputs.query, inputs.key, problem, inputs.operands, 1.0)
        assert torch.allclose(sums.double().flatten(), lse, atol=1e-6)

    def test_errors_grow_as_it_says(self, name: str) -> None:
        """Scores that err by as much as given never err by more afterwards, computed in float64."""
        one = score.of_one_file(name)
        sizes = {"batch": 1, "heads": 2, "q_len": 3, "kv_len": 1000}
        exact = torch.linspace(-30, 30, 6000, dtype=torch.float64).view(1, 2, 3, 1000)
        for example in one.examples:
            own, place, chain = own_of(one, example, **sizes), places(997, **sizes), score.get(name)
            for error in (1e-6, 1e-2, 100.0):
                difference = chain.of(exact + error, own, **place) - chain.of(exact, own, **place)
                allowed, largest = one.error(error, 30 + error, UNIT, **{**sizes, **own})
                assert float(difference.abs().max()) <= allowed + 1e-13
                assert float(chain.of(exact, own, **place).abs().max()) <= largest

    def test_a_language_without_its_text_refuses_it_by_name(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        devices = {"cpp": host_cpu(), "triton": Device("cuda", "nvidia_h200", "sm_90", 132)}
        devices["cuda"] = devices["triton"]
        problem = Problem(head_dim=64, score=name, reals=tuple(score.of_one_file(name).examples[0].values()))
        for backend, device in devices.items():
            with monkeypatch.context() as patched:
                assert backends.get(backend).refusal(problem, device) is None
                patched.setattr(laws, "has_text", lambda language, kind, value: kind != "score")
                assert f"no text for the score {name}" in (backends.get(backend).refusal(problem, device) or "")

    def test_gradients_without_what_they_need_refuse_it_by_name(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In texts that say what becomes of a score, and not how it grows."""
        one, gpu = score.of_one_file(name), Device("cuda", "nvidia_h200", "sm_90", 132)
        problem = Problem(head_dim=64, score=name, direction="backward")
        assert backends.get("cuda").refusal(problem, gpu)
        for backend, device in (("cpp", host_cpu()), ("triton", gpu)):
            assert backends.get(backend).refusal(problem, device) is None
            text = tmp_path / backend / "score" / f"{name}.j2"
            text.parent.mkdir(parents=True)
            text.write_text(f"{name}_score(score)")
            needs = one.bends or any(a.is_float and not a.over_keys and a.name != one.term for a in one.arrays)
            with monkeypatch.context() as patched:
                patched.setattr(laws.places, "data", lambda folder: tmp_path)
                found = laws.slopes_have_text.__wrapped__(backend, problem)
            assert found == (f"no gradients of the score {name} in templates/{backend}" if needs else None)

    def test_headers_refuse_it_by_name(self, name: str) -> None:
        problem = Problem(head_dim=64, score=name, reals=score.get(name).reals_of(0))
        for language in ("cpp", "cuda"):
            assert f"score {name}" in (backends.get(language).no_header(problem) or "")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_few_scores_written_out(name: str) -> None:
    own, scores, expected = WRITTEN[name]
    place = {"batch": 0, "head": 0, "position": 2, "key": torch.arange(len(scores)), "behind": 2}
    found = score.get(name).of(torch.tensor(scores, dtype=torch.float64), own, **place)
    assert torch.allclose(found.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-8)


def test_every_score_is_written_out_here_and_shares_no_name() -> None:
    assert set(BY_HAND) == set(WRITTEN) == set(NAMES)
    assert not set(NAMES) & set(mask.names())
    operands = [one.name for kind in (score, mask) for name in kind.names() for one in kind.of_one_file(name).operands]
    assert len(set(operands)) == len(operands)


@pytest.mark.parametrize("text", ["steep", "softcap+softcap", "none+softcap", "softcap+", ""])
def test_misspelled(text: str) -> None:
    with pytest.raises(BadProblem, match="unknown|misspelled"):
        score.get(text)


def test_tanh_by_a_quotient() -> None:
    """What it claims, in float64, and in float32 with every operation rounded."""
    assert tanh.relative_error() < 2.0**-24
    y = torch.linspace(1e-6, tanh.LIMIT, 100001)
    z = y * y

    def polynomial(coefficients: tuple[str, ...]) -> torch.Tensor:
        total = torch.zeros_like(z)
        for c in reversed(coefficients):
            total = total * z + float(c)
        return total

    found = y * polynomial(tanh.NUMERATOR) / polynomial(tanh.DENOMINATOR)
    error = (found.double() / torch.tanh(y.double()) - 1).abs().max()
    assert float(error) < tanh.UNITS * 2.0**-24

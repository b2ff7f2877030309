"""Outputs with their log-sum-exp, and merging those of disjoint keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_dispatch import record, won
from torch import Tensor

import elsa_tune
from elsa_tune.dispatch import states
from elsa_tune.errors import WrongArguments


def tensors(q_len: int = 33, kv_len: int = 70, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return normal(2, heads, q_len, 16), normal(2, kv_heads, kv_len, 16), normal(2, kv_heads, kv_len, 16)


def truth(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT / 4
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), float("-inf"))
    return torch.softmax(scores, -1) @ v.double().repeat_interleave(group, 1), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("causal", [False, True])
def test_log_sum_exp_beside_torchs_own_kernel(causal: bool) -> None:
    q, k, v = tensors()
    output, lse = elsa_tune.attention_with_lse(q, k, v, is_causal=causal, enable_gqa=True)
    expected, sums = truth(q, k, v, causal)
    assert torch.allclose(output.double(), expected, atol=1e-6) and torch.allclose(lse.double(), sums, atol=1e-6)


def test_log_sum_exp_by_a_tuned_kernel(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    record(won("fp32.d16@b2.h4.kv2.q33.k70"))
    monkeypatch.setattr(states, "logsumexp", None)  # not needed: the kernel itself says it
    q, k, v = tensors()
    output, lse = elsa_tune.attention_with_lse(q, k, v, enable_gqa=True)
    expected, sums = truth(q, k, v)
    assert torch.allclose(output.double(), expected, atol=1e-6) and torch.allclose(lse.double(), sums, atol=1e-6)


@pytest.mark.parametrize("cuts", [[70], [1, 70], [8, 9, 40, 70], [0, 33, 33, 70]])
def test_parts_merge_into_the_whole(cuts: list[int]) -> None:
    q, k, v = tensors()
    parts = []
    for first, last in zip([0, *cuts], cuts, strict=False):
        if first == last:  # a worker that has no key
            parts.append((torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"))))
        else:
            some = (x[:, :, first:last] for x in (k, v))
            parts.append(elsa_tune.attention_with_lse(q, *some, enable_gqa=True))
    expected, sums = truth(q, k, v)
    for order in (parts, parts[::-1]):
        output, lse = elsa_tune.merge(order)
        assert torch.allclose(output.double(), expected, atol=2e-6) and torch.allclose(lse.double(), sums, atol=2e-6)


def test_merging_nothing_seen_is_zero_and_merging_keeps_nan_and_dtype() -> None:
    empty = (torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), float("-inf")))
    output, lse = elsa_tune.merge([empty, empty])
    assert torch.equal(output, empty[0]) and torch.equal(lse, empty[1])
    broken = (torch.full((1, 1, 2, 4), float("nan")), torch.zeros(1, 1, 2))
    assert elsa_tune.merge([broken, empty])[0].isnan().all()
    assert elsa_tune.merge([(empty[0].half(), empty[1])])[0].dtype == torch.float16


def test_merge_is_differentiable() -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors(5, 6, 2, 2))

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halves = [(k[:, :, :3], v[:, :, :3]), (k[:, :, 3:], v[:, :, 3:])]
        return elsa_tune.merge([elsa_tune.attention_with_lse(q, *half) for half in halves])[0]

    expected = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    found = torch.autograd.grad(whole(q, k, v).square().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_mistakes_name_what_is_wrong() -> None:
    with pytest.raises(WrongArguments, match="states is empty"):
        elsa_tune.merge([])
    with pytest.raises(WrongArguments, match=r"output \(1, 2, 3, 4\) with log-sum-exp \(1, 2\)"):
        elsa_tune.merge([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2))])
    with pytest.raises(WrongArguments, match="four dimensions"):
        elsa_tune.attention_with_lse(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("is_causal", [False, True])
def test_states_under_transforms(is_causal: bool, home: Path) -> None:
    q, k, v, t = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(4))

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return elsa_tune.attention_with_lse(x, k, v, is_causal=is_causal)

    def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ k.mT / 2
        logits = logits.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf) if is_causal else logits
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    for found, expected in zip(torch.func.jvp(both, (q,), (t,)), torch.func.jvp(by_hand, (q,), (t,)), strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))
    one, other = (torch.func.hessian(lambda x, f=f: f(x)[1].square().sum())(q) for f in (both, by_hand))
    assert torch.allclose(one, other, atol=1e-10)

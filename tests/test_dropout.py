"""Dropout by a seed: which weights are left out, whoever serves, in both passes and beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.dispatch import serving
from elsa_tune.errors import WrongArguments
from elsa_tune.parts import philox
from elsa_tune.parts.score.dropout import SCORE
from elsa_tune.problem import Problem
from tests.test_dispatch import record, won

SEED = 0x9E3779B97F4A7C15


def test_philox_gives_what_its_authors_say() -> None:
    """Of Random123's file of known answers."""
    zeros, ones, pi = (0,) * 4, (philox.WORD,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox.words(zeros, (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox.words(zeros, (0, 0), 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox.words(ones, (philox.WORD,) * 2, 10) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox.words(pi, (0xA4093822, 0x299F31D0), 10) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    tensors = philox.words(tuple(map(torch.tensor, pi)), (torch.tensor(0xA4093822), 0x299F31D0), 10)  # type: ignore[arg-type]
    assert tuple(map(int, tensors)) == philox.words(pi, (0xA4093822, 0x299F31D0), 10)


def stays(p: float, seed: int, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """What each weight is multiplied by, by Python's whole numbers, one at a time."""
    low, high = seed % 2**64 & philox.WORD, seed % 2**64 >> 32
    least = min(int(float(torch.tensor(p, dtype=torch.float32)) * 2**32), 2**32 - 2**8)
    made = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, made.shape)).tolist():
        made[b, h, i, j] = philox.words((j // 4, i, h, b), (low, high))[j % 4] >= least
    return made / (1 - p)


def by_hand(query: Tensor, key: Tensor, value: Tensor, factors: Tensor, is_causal: bool = False) -> Tensor:
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), float("-inf"))
    return (logits.softmax(-1) * factors.to(query.dtype)) @ value


@pytest.fixture(params=["torch", "kernel"])
def server(request: pytest.FixtureRequest, home: Path) -> str:
    """Whether nothing is tuned, or both passes are."""
    if request.param == "kernel":
        for direction in ("", ".backward"):
            record(won(f"fp32.d16.dropout{direction}@b2.h3.q21.k30.dropout0.3"))
            record(won(f"fp32.d16.causal.dropout{direction}@b2.h3.q21.k30.dropout0.3"))
    serving.refresh()
    return str(request.param)


def drawn(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 16, generator=generator) for n in (21, 30, 30))
    return query.requires_grad_(**options), key.requires_grad_(**options), value.requires_grad_(**options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seed", [0, 1234, -1, SEED])
def test_both_passes_leave_out_what_the_seed_says(server: str, seed: int, is_causal: bool) -> None:
    inputs = drawn()
    plain = [x.detach() for x in inputs]
    found = elsa_tune.attention(*plain, dropout_p=0.3, is_causal=is_causal, dropout_seed=seed)
    expected = by_hand(*inputs, stays(0.3, seed, 2, 3, 21, 30), is_causal)
    assert torch.allclose(found, expected, atol=2e-6)
    wrapped = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert torch.equal(found, elsa_tune.attention(*plain, None, 0.3, is_causal, dropout_seed=wrapped))
    wanted = scores.dropout(0.3, seed) & (masks.causal() if is_causal else masks.none())
    for served in (serving.find(*plain, wanted, False).call, serving.backward_for(*plain, wanted, False).gradients):
        assert (served is not None) is (server == "kernel")
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    trained = elsa_tune.attention(*inputs, None, 0.3, is_causal, dropout_seed=seed)
    for one, other in zip(
        torch.autograd.grad(trained, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert torch.allclose(one, other, atol=2e-5)


def test_other_seeds_leave_out_others(server: str) -> None:
    inputs = drawn(requires_grad=False)
    made = [elsa_tune.attention(*inputs, dropout_p=0.3, dropout_seed=seed) for seed in (1, 2, 1 << 32)]
    assert not torch.allclose(made[0], made[1]) and not torch.allclose(made[0], made[2])
    assert torch.equal(elsa_tune.attention(*inputs, dropout_p=0.0, dropout_seed=1), elsa_tune.attention(*inputs))


def test_as_many_are_left_out_as_asked_for() -> None:
    """Of a million weights, within five standard deviations; and neighbours along each axis agree no more often than chance has it."""
    own = {
        "dropout": 0.2,
        "seed": torch.tensor([7], dtype=torch.int32),
        "stream": torch.tensor([-3], dtype=torch.int32),
    }
    place = {
        "batch": torch.arange(4).view(-1, 1, 1, 1),
        "head": torch.arange(4).view(-1, 1, 1),
        "position": torch.arange(256)[:, None],
    }
    assert SCORE.factor is not None
    left = SCORE.factor.function(**own, **place, key=torch.arange(256)) == 0
    count = left.numel()
    assert abs(int(left.sum()) - 0.2 * count) < 5 * (0.16 * count) ** 0.5
    for axis in range(4):
        both = (left & left.roll(1, axis)).sum()
        assert abs(int(both) - 0.04 * count) < 5 * (0.05 * count) ** 0.5, axis


def test_derivatives_of_any_order() -> None:
    query, key, value = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6))
    from elsa_tune.dispatch.autograd import differentiable

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return differentiable(
            query, key, value, masks.causal() & scores.softcap(2.0) & scores.dropout(0.4, 3), None, False
        )

    assert gradcheck(attend, (query, key, value), check_forward_ad=True)
    assert gradgradcheck(attend, (query, key, value), check_fwd_over_rev=True, fast_mode=True)


def test_vmap_is_a_loop(server: str) -> None:
    query, key, value = (torch.randn(2, 2, 3, n, 16) for n in (21, 30, 30))

    def attend(*tensors: Tensor) -> Tensor:
        return elsa_tune.attention(*tensors, dropout_p=0.3, dropout_seed=5)

    found = torch.func.vmap(attend)(query, key, value)
    assert torch.allclose(
        found, torch.stack([attend(*each) for each in zip(query, key, value, strict=True)]), atol=1e-6
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same(server: str) -> None:
    inputs = drawn()
    torch._dynamo.reset()

    def step(query: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> Tensor:
        return elsa_tune.attention(query, key, value, dropout_p=0.3, dropout_seed=seed)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in (1, -(2**40)):
        found, expected = compiled(*inputs, torch.tensor(seed)), step(*inputs, torch.tensor(seed))
        assert torch.allclose(found, expected, atol=1e-6)
        grads = [torch.autograd.grad(x.sum(), inputs) for x in (found, expected)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_seeds_may_be_whole_numbers() -> None:
    inputs = drawn(requires_grad=False)
    torch._dynamo.reset()

    def step(seed: int) -> Tensor:
        return elsa_tune.attention(*inputs, dropout_p=0.3, dropout_seed=seed)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for seed in (1, 2, 3, -1):
        assert torch.allclose(compiled(seed), step(seed), atol=1e-6), seed


def test_autocast_casts_inputs_alone(server: str) -> None:
    """Products are of what inputs were cast to, with sums in float32, in both passes."""
    inputs = [3 * x for x in drawn()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = elsa_tune.attention(*inputs, dropout_p=0.3, dropout_seed=5)
        grads = torch.autograd.grad(found.float().square().sum(), inputs)
    narrow = [x.bfloat16() for x in inputs]
    expected = by_hand(*(x.float() for x in narrow), stays(0.3, 5, 2, 3, 21, 30))
    assert found.dtype == torch.bfloat16 and float((found - expected).abs().max()) < 2**-7 * float(expected.abs().max())
    truth = torch.autograd.grad(found.detach().float().mul(2 * expected).sum(), inputs)
    for one, other in zip(grads, truth, strict=True):
        assert float((one - other).abs().max()) < 0.03 * float(other.abs().max())


def test_shapes_are_known_without_memory() -> None:
    """On a device that holds nothing, and of fake tensors: a seed goes where the query is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = [x.to("meta") for x in drawn(requires_grad=False)]
    assert elsa_tune.attention(*meta, dropout_p=0.3, dropout_seed=5).shape == (2, 3, 21, 16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in drawn(requires_grad=False)]
        assert elsa_tune.attention(*fake, dropout_p=0.3, dropout_seed=5).shape == (2, 3, 21, 16)


def test_a_checkpoint_draws_the_same(server: str) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = drawn()

    def attend(*tensors: Tensor) -> Tensor:
        return elsa_tune.attention(*tensors, dropout_p=0.3, dropout_seed=5)

    kept, again = attend(*inputs), checkpoint(attend, *inputs, use_reentrant=False)
    one, other = (torch.autograd.grad(x.square().sum(), inputs) for x in (kept, again))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"dropout_p": 1.0}, "dropout_p is 1.0; with dropout_seed it must be from 0 to below 1"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1"),
        ({"dropout_p": 1e-40}, "p is 1e-40"),
        ({"dropout_p": "half"}, "dropout_p"),
        ({"dropout_seed": 1.5}, "seed is 1.5"),
        ({"dropout_seed": 2**64}, "seed is"),
        ({"dropout_seed": torch.tensor([1, 2])}, "seed is"),
        ({"dropout_seed": torch.tensor(1.0)}, "seed is"),
        ({"dropout_seed": "x"}, "seed is"),
        ({"is_causal": True, "attn_mask": torch.ones(21, 30).bool()}, "attn_mask is a tensor and is_causal"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(WrongArguments, match=told.split(";")[0]):
        elsa_tune.attention(*drawn(requires_grad=False), **{"dropout_p": 0.5, "dropout_seed": 1, **arguments})


def test_sequences_of_ragged_batches_are_not_told_apart() -> None:
    tokens, ends = torch.randn(3, 40, 2, 16), torch.tensor([0, 10, 40], dtype=torch.int32)
    with pytest.raises(WrongArguments, match="dropout, which would be the same in every sequence"):
        elsa_tune.attention_varlen(*tokens, ends, ends, scores.dropout(0.5, 1))
    nested = torch.nested.nested_tensor([torch.randn(5, 2, 16), torch.randn(7, 2, 16)], layout=torch.jagged).transpose(
        1, 2
    )
    with pytest.raises(WrongArguments, match="nested"):
        elsa_tune.attention(nested, nested, nested, dropout_p=0.5, dropout_seed=1)


def test_masks_of_tensors_go_along(home: Path) -> None:
    query, key, value = drawn(requires_grad=False)
    seen, added = torch.rand(2, 1, 21, 30) > 0.3, torch.randn(1, 3, 21, 30)
    factors = stays(0.3, 9, 2, 3, 21, 30)
    for mask in (seen, added):
        found = elsa_tune.attention(query, key, value, mask, 0.3, dropout_seed=9)
        bias = added if mask is added else torch.zeros(()).masked_fill(~seen, float("-inf"))
        expected = ((query @ key.mT / 4 + bias).softmax(-1) * factors.float()) @ value
        assert torch.allclose(found, expected, atol=2e-6)


def test_problems_spell_it() -> None:
    problem = Problem.parse("fp32.d16.dropout@b1.h1.q4.k4.dropout0.25")
    assert problem.numbers == {"dropout": 0.25} and str(problem).endswith("dropout0.25")

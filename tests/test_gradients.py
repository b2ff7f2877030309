"""Gradients on CPUs: kernels of backward families against float64, second derivatives, forward mode, and who computes them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import masks, scores, space
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import derivatives, ledger, passes, serving
from elsa_tune.dispatch.autograd import differentiable
from elsa_tune.generate import cpp, lawful
from elsa_tune.generate.backends import Gradients
from elsa_tune.generate.operands import typical, with_example
from elsa_tune.masks import NONE, AttnMask
from elsa_tune.parts import mask as mask_parts
from elsa_tune.parts import score as score_parts
from elsa_tune.problem import Problem
from elsa_tune.prove import check, gradients, reference
from tests.test_dispatch import record, won

HERE = host_cpu()
NATIVE = f"{HERE.isas[0]}.l{cpp.ISAS[HERE.isas[0]].lanes}"


def spelled(variant: str) -> space.Variant:
    return space.parse(variant.format(isa=NATIVE))


def posed(family: str) -> Problem:
    return with_example(Problem.parse(family)).reshaped(batch=64, heads=4, kv_heads=2, q_len=64, kv_len=64)


def kernel_of(variant: str, family: str) -> Gradients:
    problem = posed(family)
    assert lawful.refusal(spelled(variant), problem, HERE) is None
    made = cpp.load(cpp.build(spelled(variant), problem), spelled(variant), problem)
    assert not isinstance(made, cpp.CppKernel)
    return made


# Every mask and every score: with each way to pass over keys, to split, to pack, with every element and dimensions of no vector.
HOW = {
    "one pass": "cpp.serial.{isa}.q2.k4.v4.n24",
    "split": "cpp.serial.{isa}.q1.k4.v4.n16.g4.s4.packed",
    "two passes": "cpp.serial.{isa}.q2.k4.v2.n24.products7.s2",
    "head": "cpp.serial.{isa}.q2.k4.v4.n24.g4.head",
    "two packed": "cpp.serial.{isa}.q3.k2.v4.n16.g4.products7.packed",
}
FAMILIES = [
    ("one pass", "fp32.d16"),
    ("one pass", "fp32.d16.dropout"),
    ("two passes", "fp32.d33.v17.causal"),
    ("split", "fp32.d16.window.bias"),
    ("two packed", "bf16.d16.lengths+starts.alibi+dropout"),
    ("head", "fp16.d40.v24.blocks_partial.alibi_lower_right+softcap"),
    ("one pass", "fp64.d16.columns+columns_upper.sinks"),
    ("split", "bf16.d33.v17.dense.bias+softcap"),
    ("two passes", "fp64.d16.blocks+causal.softcap+bias+dropout"),
    ("head", "fp32.d16.causal_lower_right+ranges.alibi+sinks"),
    ("two packed", "fp32.d40.v24.prefix+window_lower_right.bias+sinks"),
]


@pytest.mark.parametrize(("how", "family"), FAMILIES)
def test_kernels_against_float64(how: str, family: str) -> None:
    variant = HOW[how] + (".e10" if family.startswith("fp64") else "")
    problem = posed(f"{family}.backward")
    verdict = check.check_family(kernel_of(variant, f"{family}.backward"), problem, [], longest=1024)
    assert not verdict.reason and verdict.constant > 0, verdict


def test_every_mask_and_score_is_there() -> None:
    words = {word for _, family in FAMILIES for word in family.replace("+", ".").split(".")}
    assert {*mask_parts.names(), *score_parts.names()} - {mask_parts.NONE} <= words


@pytest.mark.parametrize("how", ["one pass", "split", "two passes"])
def test_threads_change_no_bit(how: str) -> None:
    problem = Problem.parse("fp32.d16.causal.bias.backward").reshaped(
        batch=2, heads=4, kv_heads=2, q_len=150, kv_len=131
    )
    generator = torch.Generator().manual_seed(0)
    case = gradients.with_forward(problem, reference.random_inputs(problem, generator), generator)
    kernel, found = kernel_of(HOW[how], "fp32.d16.causal.bias.backward"), []
    before = torch.get_num_threads()
    assert case.forward is not None
    try:
        for threads in (1, 2, 4, 2):
            torch.set_num_threads(threads)
            found.append(kernel(*case.tensors, None, case.operands, asked=(True,) * 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for one in found[1:] for x, y in zip(found[0], one, strict=True))  # type: ignore[arg-type]


def test_what_is_not_asked_for_is_not_computed() -> None:
    problem = Problem.parse("fp32.d16.bias.backward").reshaped(batch=1, heads=2, kv_heads=1, q_len=37, kv_len=50)
    generator = torch.Generator().manual_seed(0)
    case = gradients.with_forward(problem, reference.random_inputs(problem, generator), generator)
    kernel = kernel_of(HOW["split"], "fp32.d16.bias.backward")
    whole = kernel(*case.tensors, None, case.operands, asked=(True,) * 4)
    for n in range(4):
        asked = tuple(i == n for i in range(4))
        found = kernel(*case.tensors, None, case.operands, asked=asked)
        assert [x is not None for x in found] == list(asked) and torch.equal(found[n], whole[n])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape", [(1, 1, 37, 50), (2, 1, 37, 50), (1, 4, 1, 50), (2, 4, 37, 1), (1, 1, 1, 50), (2, 4, 1, 1)]
)
def test_what_shares_a_bias_adds_up(shape: tuple[int, ...]) -> None:
    problem = Problem.parse("fp32.d16.bias.backward").reshaped(batch=2, heads=4, kv_heads=2, q_len=37, kv_len=50)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(shape, generator=generator)
    inputs = reference.random_inputs(problem, generator)
    case = gradients.with_forward(problem, reference.Inputs("shared", *inputs.tensors, operands=(bias,)), generator)
    error = check.gradient_error(kernel_of(HOW["one pass"], "fp32.d16.bias.backward"), problem, case)
    assert error.allowed, error


def test_rows_far_away_as_a_whole() -> None:
    """A float32 log-sum-exp of such rows has lost ln n: torch's gradients are wrong, ours not."""
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    bias = torch.full((1, 1, 40, 40), torch.finfo(torch.float32).min)
    bias[..., ::2] = -1e30
    problem = Problem.parse("fp32.d16.bias.backward").reshaped(batch=1, heads=2, kv_heads=2, q_len=40, kv_len=40)
    generator = torch.Generator().manual_seed(0)
    case = gradients.with_forward(problem, reference.Inputs("far", q, k, v, operands=(bias,)), generator)
    assert check.gradient_error(kernel_of(HOW["one pass"], "fp32.d16.bias.backward"), problem, case).allowed


@pytest.mark.parametrize("how", ["head", "one pass", "two packed"])
def test_tiles_whose_rows_lie_far_read_what_is_packed(how: str) -> None:
    """A task of some of a bias's keys computes sums of weights again over all keys, of its later tiles alone."""
    problem = Problem.parse("fp32.d16.bias.backward").reshaped(batch=1, heads=4, kv_heads=4, q_len=333, kv_len=333)
    generator = torch.Generator().manual_seed(0)
    inputs = reference.random_inputs(problem, generator)
    inputs.query[:, :, 100:] *= 60
    case = replace(inputs, operands=(torch.randn(1, 1, 1, 333, generator=generator),))
    case = gradients.with_forward(problem, case, generator)
    assert case.forward is not None
    assert (case.forward[1].abs() > 32).any() and not (case.forward[1][:, :, :100].abs() > 32).any()
    error = check.gradient_error(kernel_of(HOW[how], "fp32.d16.bias.backward"), problem, case)
    assert error.allowed, error


def test_not_a_number_goes_where_keys_are_seen() -> None:
    """Of a row that is not a number, to its own gradient and to the keys it sees, and nowhere else than by the math."""
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        q[0, 0, 7, 3] = torch.nan
    problem = Problem.parse("fp32.d16.causal.backward").reshaped(batch=1, heads=2, kv_heads=2, q_len=40, kv_len=40)
    inputs = reference.Inputs("nan", q.detach(), k.detach(), v.detach())
    case = gradients.with_forward(problem, inputs, torch.Generator().manual_seed(0))
    assert case.forward is not None
    dq, dk, dv = kernel_of(HOW["one pass"], "fp32.d16.causal.backward")(*case.tensors)
    assert dq is not None and dk is not None and dv is not None
    assert dq.isnan().any(-1).nonzero()[:, 1:].tolist() == [[0, 7]]
    assert (
        dk[0, 0, :8].isnan().all()
        and dv[0, 0, :8].isnan().all()
        and dk[0, 1].isfinite().all()
        and dv[0, 1].isfinite().all()
    )
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.grad(
            scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), case.forward[2]
        )
    for ours, maths in zip((dq, dk, dv), expected, strict=True):
        assert not (ours.isnan() & ~maths.isnan()).any()
        assert torch.allclose(ours.where(~maths.isnan(), 0.0), maths.nan_to_num(0.0), atol=1e-5)


def test_gradients_too_small_for_halves_are_0() -> None:
    """A sink leaves keys so little that what values receive is below the least number of the element, which no kernel can write."""
    problem = Problem.parse("fp16.d16.sinks.backward").reshaped(batch=1, heads=1, q_len=9, kv_len=20)
    generator = torch.Generator().manual_seed(0)
    inputs = reference.random_inputs(problem, generator)
    case = gradients.with_forward(
        problem, reference.Inputs("a sink", *inputs.tensors, operands=(torch.full((1,), 40.0),)), generator
    )
    true = gradients.truth(problem, case, 0, 0)
    found = [x.half()[None, None] if x.dim() == 2 else x.half()[None] for x in (true.query, true.key, true.value)]
    assert true.value.any() and not found[2].any()
    of_sinks = true.arrays["sinks"][0].float()
    assert gradients.error(problem, case, (*found, of_sinks), [(0, 0)]).allowed
    found[2][0, 0, 3, 0] = 1e-3
    assert not gradients.error(problem, case, (*found, of_sinks), [(0, 0)]).allowed


def test_a_number_that_is_none_stays_in_its_row() -> None:
    """NaN in a gradient of one row: its query's gradient, and what the keys that it sees receive, are NaN, and no other query's."""
    kernel = kernel_of(HOW["one pass"], "fp32.d16.causal.backward")
    problem = Problem.parse("fp32.d16.causal.backward").reshaped(batch=1, heads=1, q_len=40, kv_len=40)
    generator = torch.Generator().manual_seed(0)
    case = gradients.with_forward(problem, reference.random_inputs(problem, generator), generator)
    assert case.forward is not None
    case.forward[2][0, 0, 9, 0] = math.nan
    dq, dk, dv = kernel(*case.tensors)
    assert dq is not None and dk is not None and dv is not None
    assert dq.isnan().any(-1).nonzero()[:, 2].tolist() == [9]
    assert dk[0, 0, :10].isnan().any(-1).all() and dv[0, 0, :10, 0].isnan().all()


# Derivatives of attention(), by kernels of ours.

Call = Callable[..., Any]
CALLS: dict[str, tuple[Callable[..., AttnMask], tuple[tuple[int, ...], ...]]] = {
    "plain": (lambda: NONE, ()),
    "causal": (lambda: masks.causal(), ()),
    "padding": (lambda: masks.lengths(torch.tensor([3])), ()),
    "no key": (lambda: masks.dense(torch.arange(5)[:, None] > torch.arange(6)), ()),
    "softcap": (lambda: scores.softcap(2.0), ()),
    "bias": (scores.bias, ((1, 1, 5, 6),)),
    "alibi": (scores.alibi, ((2,),)),
    "sinks": (scores.sinks, ((2,),)),
    "all": (
        lambda b, s: scores.bias(b) & scores.softcap(2.0) & scores.sinks(s) & masks.window(2),
        ((1, 2, 5, 6), (2,)),
    ),
}


@pytest.fixture
def ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels of ours compute every gradient; which families were asked for."""
    asked: list[str] = []

    def of(query: Tensor, key: Tensor, value: Tensor, wanted: AttnMask, enable_gqa: bool) -> serving.Backward:
        problem = serving.problem_of(query, key, value, wanted, enable_gqa)
        assert problem is not None
        family = str(problem.reshaped(direction="backward").family)
        asked.append(family)
        degree = ".e10" if problem.dtype == "fp64" else ""
        variant = spelled(
            "cpp.serial.{isa}.q1.k4.v2.n16.g4" + degree + ("" if problem.dtype in ("fp32", "fp64") else ".packed")
        )
        found = cpp.load(
            cpp.build(variant, problem.reshaped(direction="backward")), variant, problem.reshaped(direction="backward")
        )
        assert not isinstance(found, cpp.CppKernel)
        return serving.Backward(problem, ledger.row(family, str(variant)), found)

    monkeypatch.setattr(serving, "backward_for", of)
    yield asked


REGISTERED = [
    *((name, "none") for name in mask_parts.names()),
    *(("causal", name) for name in score_parts.names() if name != score_parts.NONE),
]


@pytest.mark.parametrize(("mask", "score"), REGISTERED)
def test_operations_have_the_true_derivatives_of_every_part(
    mask: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First ones against float64 that was written down otherwise, of several sequences and grouped heads, some rows at a time; second ones
    against differences."""
    monkeypatch.setattr(derivatives, "AT_ONCE", 60)
    generator = torch.Generator().manual_seed(0)
    family = Problem(dtype="fp64", head_dim=3, mask=mask, score=score, direction="backward")
    problem = with_example(family, 1).reshaped(batch=2, heads=4, kv_heads=2, q_len=7, kv_len=9)
    inputs = replace(reference.random_inputs(problem, generator), operands=typical(problem))
    case = gradients.with_forward(problem, inputs, generator)
    assert case.forward is not None
    grad_lse = torch.randn(case.forward[1].shape, generator=generator, dtype=torch.float64)
    names = [one.name for one in problem.declared]
    learning = [array.name for array in score_parts.get(score).differentiable]
    wide = [x.double() if name in learning else x for name, x in zip(names, case.operands, strict=True)]
    wanted = AttnMask(mask, score, dict(zip(names, wide, strict=True)))
    blocked = derivatives.attention(case.query, case.key, case.value, wanted, None, True)
    asked = derivatives.flags(wanted, (True,) * 3, [name in learning for name in derivatives.names(wanted)], False)
    found = blocked.pulled(asked)(
        *derivatives.given(case.query, case.key, case.value, wanted), case.forward[2], grad_lse
    )
    pairs = [(b, h) for b in range(2) for h in range(2)]
    assert gradients.error(problem, case, tuple(found), pairs, grad_lse).relative < 1e-12

    at = [n for n, name in enumerate(derivatives.names(wanted)) if name in learning]

    def attend(query: Tensor, key: Tensor, value: Tensor, *floats: Tensor) -> Any:
        arrays = list(wanted.tensors)
        for n, x in zip(at, floats, strict=True):
            arrays[n] = x
        return differentiable(query, key, value, wanted.with_tensors(arrays), None, True)

    tensors = [x.clone() for x in (case.query, case.key, case.value, *(wanted.tensors[n] for n in at))]
    if all(x.isfinite().all() for x in attend(*tensors)):
        assert gradgradcheck(attend, [x.requires_grad_() for x in tensors], fast_mode=True)


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_of_every_kind(name: str, ours: list[str]) -> None:
    """Of output and log-sum-exp, in float64, backward and forward."""
    make, shapes = CALLS[name]
    inputs = doubles((1, 2, 5, 4), (1, 1, 6, 4), (1, 1, 6, 3), *shapes)

    def attend(q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = differentiable(q, k, v, make(*operands), None, True)
        return output, lse.masked_fill(lse == -math.inf, 0.0)

    assert gradcheck(attend, inputs, check_forward_ad=True, fast_mode=len(shapes) > 0)
    assert gradgradcheck(attend, inputs, check_fwd_over_rev=True, fast_mode=True)
    assert ours


def loss_of(attend: Call) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: attend(q, k, v, is_causal=True).square().sum()


def math_of(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """By operations that torch differentiates as often as one likes."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril() if is_causal else torch.ones(())
    return logits.masked_fill(~seen.bool(), -math.inf).softmax(-1) @ v


def test_through_torch_func(ours: list[str]) -> None:
    """grad, vjp, jvp, three ways to a product of the Hessian with a vector, and gradients of each sample."""
    q, k, v = (x.detach() for x in doubles((2, 2, 9, 4), (2, 2, 9, 4), (2, 2, 9, 4)))
    t = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    own, plain = loss_of(elsa_tune.attention), loss_of(math_of)
    func = torch.func
    ways: dict[str, Callable[[Any], Any]] = {
        "grad": lambda f: func.grad(f, argnums=(0, 1, 2))(q, k, v),
        "jvp": lambda f: func.jvp(f, (q, k, v), (t, t, t)),
        "forward over reverse": lambda f: func.jvp(lambda x: func.grad(f)(x, k, v), (q,), (t,)),
        "reverse over forward": lambda f: func.grad(lambda x: func.jvp(lambda y: f(y, k, v), (x,), (t,))[1])(q),
        "reverse over reverse": lambda f: func.grad(lambda x: (func.grad(f)(x, k, v) * t).sum())(q),
        "each sample": lambda f: func.vmap(func.grad(f, argnums=(0, 1, 2)))(q[:, None], k[:, None], v[:, None]),
        "each pair": lambda f: func.vmap(lambda x: func.jvp(lambda y: f(y, k, v), (q,), (x,))[1])(
            torch.stack([t, 2 * t])
        ),
    }
    for name, way in ways.items():
        found, expected = torch.utils._pytree.tree_leaves(way(own)), torch.utils._pytree.tree_leaves(way(plain))
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(found, expected, strict=True)), name
    assert ours


def test_a_tangent_passes_the_backward_pass(ours: list[str]) -> None:
    """Forward mode over reverse in eager code, of gradients that nobody differentiates backward again: a kernel would lose the tangent."""
    q, k, v = (x.detach() for x in doubles((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4)))
    t = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    own, plain = loss_of(elsa_tune.attention), loss_of(math_of)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.clone().requires_grad_(), t)
        (gradient,) = torch.autograd.grad(own(dual, k, v), dual)
        found = forward_ad.unpack_dual(gradient).tangent
    expected = torch.func.jvp(lambda x: torch.func.grad(plain)(x, k, v), (q,), (t,))[1]
    assert found is not None and torch.allclose(found, expected, atol=1e-12)


def test_second_derivatives_in_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows and heads are at work at a time."""
    inputs = doubles((2, 4, 23, 8), (2, 2, 19, 8), (2, 2, 19, 8))
    u = torch.randn(2, 4, 23, 8, dtype=torch.float64)

    def found() -> list[Tensor]:
        output, lse = differentiable(*inputs, masks.causal(), None, True)
        first = torch.autograd.grad((output * u).sum() + lse.exp().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum((x.square().sum() for x in first), torch.zeros(())), inputs))

    whole = found()
    monkeypatch.setattr(derivatives, "AT_ONCE", 50)
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(whole, found(), strict=True))


def test_operations_meet_no_hooks(home: Path) -> None:
    """What is saved while some rows are differentiated is nobody's to move."""
    q, k, v = doubles((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4))
    dropped = {"dropout_p": 0.3, "dropout_seed": 5}
    expected = torch.autograd.grad(elsa_tune.attention(q, k, v, **dropped).square().sum(), (q, k, v))  # type: ignore[arg-type]
    with torch.autograd.graph.save_on_cpu():
        found = torch.autograd.grad(elsa_tune.attention(q, k, v, **dropped).square().sum(), (q, k, v))  # type: ignore[arg-type]
        first = torch.autograd.grad(differentiable(q, k, v, NONE, None, False)[0].square().sum(), q, create_graph=True)
        first[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and q.grad is not None


@pytest.mark.parametrize("name", ["plain", "bias", "sinks"])
def test_batches_of_gradients(name: str, ours: list[str]) -> None:
    make, shapes = CALLS[name]
    inputs = doubles((1, 2, 5, 4), (1, 1, 6, 4), (1, 1, 6, 3), *shapes)
    output = differentiable(*inputs[:3], make(*inputs[3:]), None, True)[0]
    grads = torch.randn(3, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, inputs, grads, retain_graph=True, is_grads_batched=True)
    for n, grad in enumerate(grads):
        alone = torch.autograd.grad(output, inputs, grad, retain_graph=True)
        assert all(torch.allclose(x[n], y, atol=1e-12) for x, y in zip(together, alone, strict=True))


def test_sinks_that_base_2_has_no_number_for(home: Path) -> None:
    record(won("fp32.d16.sinks@b1.h2.q20.k20"))
    serving.refresh()
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    for sink in (3e38, -3e38):
        found = elsa_tune.attention(q, k, v, scores.sinks(torch.full((2,), sink)))
        expected = torch.zeros_like(q) if sink > 0 else scaled_dot_product_attention(q, k, v)
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_mask_that_is_not_asked_for_again_is_let_go_of(ours: list[str]) -> None:
    import gc
    import weakref

    q, k, v, bias = doubles((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4), (1, 1, 9, 9))
    added = bias * 1.0
    seen, alive = added.shape, weakref.ref(added)
    out = differentiable(q, k, v, scores.bias(added), None, False)[0]
    del added
    out.sum().backward()
    gc.collect()
    assert alive() is None and bias.grad is not None and bias.grad.shape == seen


def test_inputs_changed_in_between_are_noticed(ours: list[str]) -> None:
    q, k, v = doubles((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4))
    key = k * 1.0
    out = differentiable(q, key, v, NONE, None, False)[0]
    key.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("a launch failed")])
def test_a_kernel_that_fails_hands_over(error: Exception, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **named: Any) -> Any:
        raise error

    found = serving.Backward(None, ledger.row("of a test", "failing"), failing)
    monkeypatch.setattr(serving, "backward_for", lambda *arguments: found)
    x = [torch.randn(1, 2, 33, 16, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, 1, 33, 33, requires_grad=True)
    differentiable(*x, NONE, None, False)[0].sum().backward()
    y = [t.detach().clone().requires_grad_() for t in x]
    scaled_dot_product_attention(*y).sum().backward()
    assert all(torch.allclose(a.grad, b.grad, atol=2e-6) for a, b in zip(x, y, strict=True))  # type: ignore[arg-type]
    differentiable(*x, scores.bias(bias), None, False)[0].sum().backward()
    scaled_dot_product_attention(*y, bias.detach()).sum().backward()
    assert bias.grad is not None and bias.grad.isfinite().all()
    assert all(torch.allclose(a.grad, b.grad, atol=4e-6) for a, b in zip(x, y, strict=True))  # type: ignore[arg-type]


def test_operations_agree_with_kernels(ours: list[str]) -> None:
    """What nobody tuned is computed by operations, some rows at a time: the same gradients."""
    q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
    bias, sinks = torch.randn(1, 4, 33, 33, requires_grad=True), torch.randn(4, requires_grad=True)
    wanted = scores.bias(bias) & scores.sinks(sinks) & masks.lengths(torch.tensor([9, 33]))
    output, lse = differentiable(q, k, v, wanted, 0.3, False)
    grad, grad_lse = torch.randn(output.shape), torch.randn(lse.shape)
    found = torch.autograd.grad((output, lse), (q, k, v, bias, sinks), (grad, grad_lse))
    asked = [True] * 3 + derivatives.has_derivatives(wanted)
    with torch.no_grad():
        expected = [x for x in passes.by_operations(grad, grad_lse, q, k, v, wanted, 0.3, asked) if x is not None]
    assert len(expected) == 5 and ours
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(found, expected, strict=True))


# Programs that know nothing of us.


def settle() -> None:
    """Until what is built beside calls is there."""
    end = time.monotonic() + 60
    while serving.current()._builder is not None and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_program_under_the_override_is_served(compiled: bool, home: Path) -> None:
    """Where kernels were tuned, of the backward pass alone too; a mask comes as torch makes it; layouts are torch's."""
    shape = "b2.h4.q50.k50"
    record(
        *(won(f"fp32.d16.{kind}.backward@{shape}", HOW["one pass"].format(isa=NATIVE)) for kind in ("causal", "bias"))
    )
    x = [torch.randn(2, 4, 50, 16, requires_grad=True) for _ in range(3)]
    seen = torch.rand(50, 50) > 0.4

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = scaled_dot_product_attention(q, k, v, is_causal=True)
        return (causal * scaled_dot_product_attention(q, k, v, seen)).square().sum()

    expected = torch.autograd.grad(loss(*x), x)
    ledger.forget()
    elsa_tune.enable()
    try:
        program = torch.compile(loss) if compiled else loss
        torch.autograd.grad(program(*x), x)
        settle()
        found = torch.autograd.grad(program(*x), x)
    finally:
        elsa_tune.disable()
    ours = {row.problem: row.calls for row in elsa_tune.served() if row.kernel != ledger.TORCH}
    assert ours == {f"fp32.d16.{kind}.backward@{shape}": 2 for kind in ("causal", "bias")}
    assert all(
        torch.allclose(a, b, atol=1e-4) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_is_served_forward_and_backward(compiled: bool, home: Path) -> None:
    """Every problem that a training step asks is counted, and known by the name that tuning takes."""
    shape = "b2.h4.q50.k50"
    record(won(f"fp32.d16.window.alibi.backward@{shape}.left9.right0", HOW["one pass"].format(isa=NATIVE)))
    q, k, v = (torch.randn(2, 4, 50, 16, requires_grad=True) for _ in range(3))
    slopes = torch.rand(4, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return elsa_tune.attention_with_lse(q, k, v, attn_mask=masks.window(9) & scores.alibi(slopes))

    torch._dynamo.reset()
    program = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    ledger.forget()
    for _ in range(2):
        output, lse = program(q, k, v, slopes)
        settle()
        found = torch.autograd.grad(output.square().sum() + lse.sum(), (q, k, v, slopes))
        settle()
    rows = {row.problem: (row.kernel != ledger.TORCH, row.calls) for row in elsa_tune.served()}
    assert rows[f"fp32.d16.window.alibi.backward@{shape}.left9.right0"][0] and all(x.isfinite().all() for x in found)

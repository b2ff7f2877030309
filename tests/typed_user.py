"""A program of a user, as strict type checkers read it (`make types`): every public name, and mistakes that they must reject."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    from typing_extensions import assert_type

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.errors import ElsaTuneError, WrongArguments

SMALL = "fp32.d16@b1.h2.q24.k24"


def calls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in every way of calling it."""
    out = elsa_tune.attention(query, key, value, is_causal=True)
    assert_type(out, Tensor)
    assert_type(elsa_tune.attention(query, key, value, None, 0.0, False, 0.5, True), Tensor)
    first, lse = elsa_tune.attention_with_lse(query, key[:, :, :9], value[:, :, :9])
    states = [(first, lse), elsa_tune.attention_with_lse(query, key[:, :, 9:], value[:, :, 9:])]
    assert_type(elsa_tune.merge(states), tuple[Tensor, Tensor])
    starts = torch.tensor([0, 7, query.shape[2]])
    tokens = query[0].transpose(0, 1)
    assert_type(elsa_tune.attention_varlen(tokens, tokens, tokens, starts, starts, masks.causal()), Tensor)
    return out


def composed(query: Tensor, bounds: Tensor) -> list[masks.AttnMask]:
    """Masks and scores are values of one type, and so is what they compose to."""
    heads, length = query.shape[1], query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool)
    made = [
        masks.none(), masks.causal(), masks.causal(lower_right=True), masks.window(3), masks.window(None, 2), masks.prefix(2),
        masks.lengths([length]), masks.lengths(torch.tensor([length]), start=[0]), masks.dense(seen), masks.columns(bounds, causal=True),
        masks.ranges([0] * length, [length] * length), masks.blocks(torch.ones(1, 1, dtype=torch.bool), block_q=length, block_k=length),
        masks.strided(heads=heads, local=1, stride=2, block=8),
        scores.softcap(30.0), scores.alibi([0.5] * heads), scores.sinks(torch.zeros(heads)), scores.bias(torch.zeros(length, length)),
    ]  # fmt: skip
    assert_type(masks.causal() & masks.window(3) & scores.softcap(30.0), masks.AttnMask)
    return made


def kernels(query: Tensor) -> None:
    """Problems, kernels as objects, tuning and what a run reports."""
    problem = elsa_tune.Problem.parse(SMALL)
    assert_type(problem.head_dim, int)
    assert_type(problem.family, str)
    kernel = elsa_tune.load(problem)
    assert_type(kernel.variant, elsa_tune.Variant)
    assert_type(kernel.device, elsa_tune.Device)
    assert_type(kernel.error, "float | None")
    assert_type(kernel(query, query, query, attn_mask=None), Tensor)
    for row in elsa_tune.served():
        assert_type(row.seconds, float)
        assert_type((row.problem, row.kernel), tuple[str, str])
    assert_type(elsa_tune.__version__, str)


def tuned(budget: float) -> bool:
    """A run; its report says what won."""
    report = elsa_tune.tune([SMALL], device="cpu", budget=budget, effort="quick", watch=lambda progress: None)
    for outcome in report.outcomes:
        assert_type(outcome.problem, elsa_tune.Problem)
        assert_type(outcome.gflops, "float | None")
    return report.complete


@elsa_tune.sdpa()
def decorated(x: Tensor) -> Tensor:
    """A decorated function keeps its type."""
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def scopes(query: Tensor) -> None:
    """Context managers, the override, and a module."""
    decorating: Callable[[Tensor], Tensor] = decorated
    with elsa_tune.accuracy(2.0), elsa_tune.sdpa():
        assert_type(decorating(query), Tensor)
    try:
        elsa_tune.enable()
    except ElsaTuneError as error:
        assert_type(str(error), str)
    else:
        elsa_tune.disable()
    module = elsa_tune.nn.Attention(32, 2, kv_heads=1, dtype=torch.float32)
    assert_type(module.forward(torch.randn(1, 5, 32), attn_mask=masks.causal()), Tensor)
    assert issubclass(WrongArguments, ValueError)


def mistakes(x: Tensor) -> None:
    """Never called: each line must be rejected, or its comment is an error itself."""
    elsa_tune.attention(x, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    elsa_tune.attention(x, x, x, attn_mask="causal")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    elsa_tune.attention(x, x, x, causal=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    masks.causal() & x  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    masks.window("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scores.softcap(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    elsa_tune.merge([x])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    elsa_tune.load(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    elsa_tune.tune(SMALL, sampler=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    elsa_tune.nn.Attention("32", 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    elsa_tune.Problem.parse(SMALL).heads = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    elsa_tune.attend(x, x, x)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    with elsa_tune.accuracy("exact"):  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        pass

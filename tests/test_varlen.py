"""attention_varlen() and nested tensors: each sequence on its own, whoever serves it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dispatch import record, won
from test_gradients import settle
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.device import host_cpu
from elsa_tune.dispatch import attention as dispatch
from elsa_tune.dispatch import serving
from elsa_tune.dispatch.ragged import Ragged
from elsa_tune.errors import WrongArguments
from elsa_tune.generate import cpp
from elsa_tune.masks import AttnMask
from elsa_tune.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's nested tensors are a prototype

HEADS, DIM = 4, 16
QUERIES, KEYS = [5, 0, 1, 33, 7, 40, 0], [9, 3, 1, 33, 0, 70, 0]
"""Tokens of sequences: some without queries, one without keys, one of a single token, one that is nothing at all."""
SHAPE = f"b1.h{HEADS}.q{sum(QUERIES)}.k{sum(KEYS)}.bshd"

HERE = host_cpu()

generator = torch.Generator().manual_seed(0)
ENDS, STARTS = torch.tensor([9, 0, 1, 30, 0, 61, 0]), torch.tensor([2, 0, 0, 4, 0, 7, 0])
SLOPES, SINKS = torch.rand(HEADS, generator=generator), torch.randn(HEADS, generator=generator)
DENSE = torch.rand(len(QUERIES), 1, 40, 70, generator=generator) < 0.7
BIAS = torch.randn(HEADS, 40, 70, generator=generator)

Logits = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def seen(sees: Callable[[int, Tensor, Tensor, int], Tensor]) -> Logits:
    """Logits that only pairs keep which a mask sees: of a sequence, positions, keys, and by how much keys outnumber queries."""
    return lambda x, i, position, key: x.masked_fill(~sees(i, position, key, x.shape[2] - x.shape[1]), -torch.inf)


def distance(x: Tensor, behind: int) -> Tensor:
    return (torch.arange(x.shape[1])[:, None] + behind - torch.arange(x.shape[2])).abs()


CLOSED: dict[str, tuple[AttnMask | None, Logits]] = {
    "none": (None, lambda x, *_: x),
    "causal": (masks.causal(), seen(lambda i, p, k, behind: k <= p)),
    "causal, lower right": (masks.causal(lower_right=True), seen(lambda i, p, k, behind: k <= p + behind)),
    "window": (masks.window(3, 2), seen(lambda i, p, k, behind: (k >= p - 3) & (k <= p + 2))),
    "window without end": (masks.window(None, 2), seen(lambda i, p, k, behind: k <= p + 2)),
    "window, lower right": (
        masks.window(3, 2, lower_right=True),
        seen(lambda i, p, k, behind: (k >= p + behind - 3) & (k <= p + behind + 2)),
    ),
    "prefix": (masks.prefix(3), seen(lambda i, p, k, behind: (k <= p) | (k < 3))),
    "lengths": (masks.lengths(ENDS, STARTS), seen(lambda i, p, k, behind: (k >= STARTS[i]) & (k < ENDS[i]))),
}
OTHERS: dict[str, tuple[AttnMask | Tensor, Logits]] = {
    "causal softcap": (
        masks.causal() & scores.softcap(2.0),
        lambda x, i, p, k: seen(lambda i, p, k, behind: k <= p)(2 * (x / 2).tanh(), i, p, k),
    ),
    "alibi": (scores.alibi(SLOPES), lambda x, i, p, k: x - SLOPES[:, None, None] * distance(x, 0)),
    "alibi, lower right": (
        scores.alibi(SLOPES, lower_right=True),
        lambda x, i, p, k: x - SLOPES[:, None, None] * distance(x, x.shape[2] - x.shape[1]),
    ),
    "sinks": (scores.sinks(SINKS), lambda x, *_: torch.cat([x, SINKS[:, None, None].expand(-1, x.shape[1], 1)], -1)),
    "dense": (DENSE, lambda x, i, p, k: x.masked_fill(~DENSE[i, :, : x.shape[1], : x.shape[2]], -torch.inf)),
    "bias": (BIAS, lambda x, i, p, k: x + BIAS[:, : x.shape[1], : x.shape[2]]),
    "slopes of each sequence": (
        scores.alibi(SLOPES * torch.arange(len(QUERIES))[:, None]),
        lambda x, i, p, k: x - i * SLOPES[:, None, None] * distance(x, 0),
    ),
}


def cu(tokens: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=dtype)


def tensors(kv_heads: int = HEADS, value_dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (sum(QUERIES), HEADS, DIM), (sum(KEYS), kv_heads, DIM), (sum(KEYS), kv_heads, value_dim)
    query, key, value = (
        torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)
    )
    return query, key, value


def truth(query: Tensor, key: Tensor, value: Tensor, keys: list[int], logits: Logits) -> Tensor:
    """float64, sequence by sequence."""
    made = []
    for i, (q, k, v) in enumerate(zip(query.split(QUERIES), key.split(keys), value.split(keys), strict=True)):
        q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // len(x), 0) for x in (k, v))
        x = logits(q @ k.mT / DIM**0.5, i, torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1]))
        weights = x.softmax(-1).nan_to_num() if x.shape[2] else x
        made.append((weights[..., : k.shape[1]] @ v).transpose(0, 1))
    return torch.cat(made).float()


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A database in which kernels won ragged batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_HOME", str(tmp_path_factory.mktemp("tuned")))
        families = "fp32.d16.ranges", "fp32.d16.ranges.alibi", "fp32.d16.ranges.sinks"
        record(*(won(f"{family}@{SHAPE}") for family in families), won(f"fp32.d16.ranges.softcap@{SHAPE}.softcap2"))
        yield
    serving.refresh()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_a_call_for_each_sequence(name: str, kv_heads: int, home: object) -> None:
    mask, logits = {**CLOSED, **OTHERS}[name]
    x = tensors(kv_heads)
    out = elsa_tune.attention_varlen(*x, cu(QUERIES), cu(KEYS), mask, enable_gqa=True)
    assert close(out, truth(*x, KEYS, logits))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [*CLOSED, "causal softcap", "sinks"])
def test_one_kernel_for_all_sequences(name: str, kv_heads: int, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "attention", None)  # not needed
    mask, logits = {**CLOSED, **OTHERS}[name]
    x = tensors(kv_heads)
    out = elsa_tune.attention_varlen(*x, cu(QUERIES), cu(KEYS, torch.int64), mask, enable_gqa=True)
    assert close(out, truth(*x, KEYS, logits)) and out.is_contiguous()


@pytest.mark.parametrize("name", ["alibi", "slopes of each sequence"])
def test_scores_that_ask_where_they_are(name: str, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distance is the same wherever queries and keys of a sequence begin together; what differs between sequences is not."""
    mask, logits = OTHERS[name]
    calls: list[object] = []
    one = dispatch.attention
    monkeypatch.setattr(dispatch, "attention", lambda *args, **named: (calls.append(1), one(*args, **named))[1])
    query = tensors()[0]
    assert close(
        elsa_tune.attention_varlen(*[query] * 3, cu(QUERIES), cu(QUERIES), mask), truth(*[query] * 3, QUERIES, logits)
    )
    assert bool(calls) is (name != "alibi")
    apart = tensors()
    assert close(elsa_tune.attention_varlen(*apart, cu(QUERIES), cu(KEYS), mask), truth(*apart, KEYS, logits))
    assert calls


@pytest.mark.parametrize("scale", [None, 0.3, 1, -0.5])
def test_scale_and_value_dim(scale: float | None, home: object) -> None:
    query, key, value = tensors(value_dim=24)
    out = elsa_tune.attention_varlen(query, key, value, cu(QUERIES), cu(KEYS), scale=scale)
    factor = 1 if scale is None else scale * DIM**0.5
    assert close(out, truth(query, key, value, KEYS, lambda x, *_: x * factor))


def test_ranges_grow_whatever_sequences_hold(home: object) -> None:
    """Of empty sequences and rows that see nothing too, in every mask: what kernels skip and leave untested follows from it."""
    query, key, value = tensors()
    batch = Ragged(query, key, value, cu(QUERIES, torch.int64), cu(KEYS, torch.int64))
    for mask, _ in CLOSED.values():
        wanted = batch.together(mask or masks.NONE)
        assert batch.says_it_together(mask or masks.NONE) and wanted.mask == "ranges"
        for limit in wanted.operands.values():
            assert limit.shape == (1, len(query)) and bool((limit.diff() >= 0).all())
            assert 0 <= int(limit.min()) <= int(limit.max()) <= len(key)


def test_tokens_alone(known: None) -> None:
    """No sequences, sequences of nothing, one sequence, one token each."""
    x = torch.randn(6, HEADS, DIM)
    for tokens in ([], [0, 0]):
        assert elsa_tune.attention_varlen(x[:0], x[:0], x[:0], cu(tokens), cu(tokens)).shape == (0, HEADS, DIM)
    assert close(elsa_tune.attention_varlen(x, x, x, cu([1] * 6), cu([1] * 6)), x)
    alone = elsa_tune.attention_varlen(x, x, x, cu([6]), cu([6]), masks.causal())
    whole = scaled_dot_product_attention(*[x.transpose(0, 1)[None]] * 3, is_causal=True)
    assert close(alone, whole[0].transpose(0, 1))
    assert not elsa_tune.attention_varlen(x, x[:0], x[:0], cu([6]), cu([0])).any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A database in which kernels won both passes of ragged batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELSA_TUNE_HOME", str(tmp_path_factory.mktemp("trained")))
        lanes = f"{HERE.isas[0]}.l{cpp.ISAS[HERE.isas[0]].lanes}"
        backward = f"cpp.serial.{lanes}.q2.k4.v4.n24"
        for score in ("", ".alibi", ".sinks"):
            family = f"fp32.d16.ranges{score}"
            record(won(f"{family}@{SHAPE}"), won(f"{family}.backward@{SHAPE}", backward))
        yield
    serving.refresh()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [*CLOSED, "sinks"])
def test_one_backward_pass_for_all_sequences(
    name: str, kv_heads: int, trained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, logits = {**CLOSED, **OTHERS}[name]
    x = [t.requires_grad_() for t in tensors(kv_heads)]
    given = torch.randn(sum(QUERIES), HEADS, DIM)

    def found() -> tuple[Tensor, ...]:
        out = elsa_tune.attention_varlen(*x, cu(QUERIES), cu(KEYS), mask, enable_gqa=True)
        return (out.detach(), *torch.autograd.grad(out, x, given))

    found()
    settle()
    monkeypatch.setattr(dispatch, "attention", None)  # not needed
    out = truth(*x, KEYS, logits)
    expected = out.detach(), *torch.autograd.grad(out, x, given)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(found(), expected, strict=True))


@pytest.mark.parametrize("score", [scores.sinks, scores.alibi])
def test_scores_learn_from_all_sequences(
    score: Callable[[Tensor], AttnMask], trained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = tensors()[0]

    def found() -> Tensor:
        held = SINKS.clone().requires_grad_()
        out = elsa_tune.attention_varlen(query, query, query, cu(QUERIES), cu(QUERIES), score(held) & masks.causal())
        return torch.autograd.grad(out.square().sum(), held)[0]

    with monkeypatch.context() as patch:
        patch.setattr(Ragged, "says_it_together", lambda *_: False)
        expected = found()
    found()
    settle()
    monkeypatch.setattr(dispatch, "attention", None)  # not needed
    assert torch.allclose(found(), expected, rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_each_sequence(known: None) -> None:
    x = [t.requires_grad_() for t in tensors()]
    given = torch.randn(sum(QUERIES), HEADS, DIM)
    out = elsa_tune.attention_varlen(*x, cu(QUERIES), cu(KEYS), masks.causal())
    found = torch.autograd.grad(out, x, given)
    expected = torch.autograd.grad(truth(*x, KEYS, CLOSED["causal"][1]), x, given)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(found, expected, strict=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "falls": ({"cu_q": torch.tensor([0, 9, 5, 86])}, "cu_q falls from 9 to 5"),
    "overruns": ({"cu_k": cu([*KEYS[:-1], 1])}, "cu_k ends at 117"),
    "ends early": ({"cu_k": cu(KEYS)[:4]}, "cu_k ends at 13"),
    "starts late": ({"cu_q": cu(QUERIES) + 1}, "cu_q starts at 1"),
    "another number": ({"cu_q": torch.tensor([0, 86])}, "cu_q has 1 sequences, cu_k 7"),
    "floats": ({"cu_q": cu(QUERIES).float()}, "cu_q is torch.float32"),
    "bytes": ({"cu_k": cu(KEYS).to(torch.int16)}, "cu_k is torch.int16"),
    "a list": ({"cu_q": [0, 86]}, r"cu_q is \[0, 86\]"),
    "two dimensions": ({"cu_q": cu(QUERIES)[None]}, r"cu_q is torch.int32 \[1, 8\]"),
    "nothing": ({"cu_q": cu([])[:0]}, r"cu_q is torch.int32 \[0\]"),
    "a batch": ({"query": torch.randn(1, HEADS, 86, DIM)}, "three dimensions"),
    "heads": ({"query": torch.randn(86, 6, DIM)}, "6 heads"),
    "dims": ({"query": torch.randn(86, HEADS, 8)}, "do not fit"),
    "tokens": ({"value": torch.randn(9, HEADS, DIM)}, "do not fit"),
    "a word": ({"attn_mask": "causal"}, "attn_mask is 'causal'"),
    "too few lengths": ({"attn_mask": masks.lengths([1, 2])}, r"lengths \[2\] must broadcast to \[sequences\] = \[7\]"),
    "long lengths": ({"attn_mask": masks.lengths(ENDS + 1)}, "within 0 and the keys"),
    "a dense mask of all tokens": (
        {"attn_mask": torch.ones(86, 116, dtype=torch.bool)}, r"dense \[1, 1, 86, 116\] must broadcast to \[sequences, heads, ",
    ),
    "a bias of another dtype": ({"attn_mask": torch.zeros(1, 1, dtype=torch.float64)}, "bias of torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_by_name(name: str, known: None) -> None:
    query, key, value = tensors()
    call = {"query": query, "key": key, "value": value, "cu_q": cu(QUERIES), "cu_k": cu(KEYS), "enable_gqa": True}
    changed, told = WRONG[name]
    with pytest.raises(WrongArguments, match=told):
        elsa_tune.attention_varlen(**{**call, **changed})


def test_masks_of_blocks_and_columns_count_within_each_sequence() -> None:
    """Layouts of each sequence's own lengths, and what is given for the longest."""
    lengths = [5, 33, 70]
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    q, k, v = (torch.randn(sum(lengths), HEADS, DIM, generator=generator) for _ in range(3))
    layout = torch.rand(len(lengths), 1, 5, 5, generator=generator) < 0.5
    bounds = torch.randint(0, 70, (len(lengths), HEADS, 70, 1), generator=generator)
    for i, mask in enumerate(
        (
            masks.strided(heads=HEADS, local=1, stride=2, block=16),
            masks.blocks(layout, 16, 16),
            masks.columns(bounds, True),
        )
    ):
        out = elsa_tune.attention_varlen(q, k, v, cu, cu, mask)
        for j, (first, end) in enumerate(pairwise(cu.tolist())):
            n = end - first
            blocks = -(-n // 16)
            own = (
                mask,
                masks.blocks(layout[j : j + 1, :, :blocks, :blocks], 16, 16),
                masks.columns(bounds[j : j + 1, :, :n], True),
            )[i]
            alone = elsa_tune.attention(*(x[None, first:end].transpose(1, 2) for x in (q, k, v)), own)
            assert close(out[first:end], alone[0].transpose(0, 1))


def test_ranges_that_fall_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    for first, end in (([0, 2, 1], [3, 3, 3]), ([0, 0, 0], [3, 2, 3])):
        with pytest.raises(WrongArguments, match="falls"):
            elsa_tune.attention(q, k, v, masks.ranges(first, end))
    out = elsa_tune.attention(q, k, v, masks.ranges([0, 1, 1], [1, 3, 3]))
    parts = [(0, 1), (1, 3)]
    assert close(
        out, torch.cat([scaled_dot_product_attention(*(x[:, :, a:b] for x in (q, k, v))) for a, b in parts], 2)
    )


# Nested tensors.


def nested(tokens: list[int], heads: int = HEADS) -> tuple[Tensor, Tensor]:
    """[batch, heads, ragged, dim], as a projection leaves it, and its tokens."""
    values = torch.randn(sum(tokens), heads, DIM)
    made = torch.nested.nested_tensor_from_jagged(values, cu(tokens, torch.int64))
    return made.transpose(1, 2), values


@pytest.mark.parametrize(("mask", "is_causal"), [(None, False), (None, True), (masks.window(2, 1), False), (masks.window(4, 4), True)])  # fmt: skip
@pytest.mark.parametrize("won", [True, False])
def test_nested_tensors(mask: AttnMask | None, is_causal: bool, won: bool, request: pytest.FixtureRequest) -> None:
    """As torch's function of each, and nested likewise; torch itself knows no causal ones on CPUs."""
    request.getfixturevalue("known" if won else "home")
    x, _ = nested([5, 1, 33, 40])
    out = elsa_tune.attention(x, x, x, mask, is_causal=is_causal)
    assert out.shape == x.shape and (out.transpose(1, 2) + x.transpose(1, 2)).is_nested
    for mine, one in zip(out.unbind(), x.unbind(), strict=True):
        position, key = torch.arange(one.shape[1])[:, None], torch.arange(one.shape[1])
        left, right = (mask.operands["left"], mask.operands["right"]) if mask else (99, 99)
        sees = (key >= position - left) & (key <= position + (0 if is_causal else right))
        assert close(mine, scaled_dot_product_attention(one[None], one[None], one[None], sees)[0])
    if mask is None and not is_causal:
        theirs = scaled_dot_product_attention(x, x, x)
        assert theirs.shape == out.shape and close(theirs.values(), out.values())
    rows = out.transpose(1, 2).flatten(2)
    assert rows.to_padded_tensor(0.0).shape == (4, 40, HEADS * DIM), "the longest is known"


def test_nested_queries_and_keys_of_unlike_lengths(known: None) -> None:
    (query, q), (key, k) = nested([5, 1, 3]), nested([9, 2, 40])
    out = elsa_tune.attention(query, key, key)
    assert out.shape == query.shape
    assert close(out.values().transpose(0, 1), elsa_tune.attention_varlen(q, k, k, query.offsets(), key.offsets()))


def test_gradients_through_nested_tensors(known: None) -> None:
    values = torch.randn(34, HEADS, DIM, requires_grad=True)
    x = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 1, 34])).transpose(1, 2)
    (found,) = torch.autograd.grad(elsa_tune.attention(x, x, x, is_causal=True).values().sin().sum(), values)
    parts = [values[a:b].transpose(0, 1)[None] for a, b in pairwise((0, 1, 34))]
    made = torch.cat([scaled_dot_product_attention(t, t, t, is_causal=True) for t in parts], 2)
    (expected,) = torch.autograd.grad(made.sin().sum(), values)
    assert torch.allclose(found, expected, atol=1e-6)


def test_other_nested_tensors_go_to_torch(known: None) -> None:
    """Ragged in another dimension; of torch's older layout."""
    x = nested([5, 1, 3])[0].transpose(1, 2)
    assert torch.equal(elsa_tune.attention(x, x, x).values(), scaled_dot_product_attention(x, x, x).values())
    old = torch.nested.nested_tensor([torch.ones(4, 50, 16), torch.ones(4, 30, 16)])
    assert elsa_tune.attention(old, old, old).is_nested


def test_a_ragged_batch_is_a_problem_like_any_other(known: None) -> None:
    """A batch of other lengths is a neighbour."""
    problem = Problem.parse(f"fp32.d16.ranges@b1.h{HEADS}.q99.k99.bshd")
    chosen = serving.explain(problem, host_cpu())
    assert chosen.rung == "neighbour" and not chosen.by_sdpa


def test_queries_without_keys_are_in_the_graph(home: Path) -> None:
    query, none = torch.randn(5, 4, 16, requires_grad=True), torch.randn(0, 4, 16)
    ends = torch.tensor([0, 5])
    out = elsa_tune.attention_varlen(query, none, none, ends, torch.tensor([0, 0]))
    out.sum().backward()
    assert not out.any() and query.grad is not None and not query.grad.any()
    empty = torch.randn(0, 4, 16, requires_grad=True)
    elsa_tune.attention_varlen(empty, none, none, torch.tensor([0, 0]), torch.tensor([0, 0])).sum().backward()

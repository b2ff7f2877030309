"""Modules: torch.nn.MultiheadAttention and what is built of it, in a scope; elsa_tune.nn.Attention."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.errors import WrongArguments
from tests.test_dispatch import VARIANT, record, won

CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(10)
PADDING = torch.arange(10) >= torch.tensor([[10], [7], [4]])


def reached(kernel: str | None = None) -> int:
    """Calls of attention(), or those that a kernel answered; backward passes are none."""
    forward = (row for row in elsa_tune.served() if ".backward" not in row.problem)
    return sum(row.calls for row in forward if kernel in (None, row.kernel))


def built() -> None:
    """Until what is built beside calls is there."""
    for thread in threading.enumerate():
        if thread.name == "elsa-tune-build":
            thread.join()


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=1e-5)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal mask": {"attn_mask": CAUSAL},
    "bool mask": {"attn_mask": CAUSAL < 0},
    "padding": {"key_padding_mask": PADDING},
    "padding and causal": {"key_padding_mask": PADDING, "attn_mask": CAUSAL < 0, "is_causal": True},
    "mask of heads": {"attn_mask": torch.zeros(12, 10, 10).masked_fill(torch.rand(12, 10, 10) > 0.9, -1e4)},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CALLS)
def test_a_scope_serves_multi_head_attention(name: str, training: bool, home: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(64, 4, batch_first=True).train(training)
    x = torch.randn(3, 10, 64, requires_grad=True)

    def made() -> list[Tensor]:
        out, weights = module(x, x, x, need_weights=False, **CALLS[name])
        assert weights is None
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    expected = made()
    before = reached()
    with elsa_tune.sdpa():
        got = made()
        assert reached() == before + 1
        with torch.no_grad():
            again = module(x, x, x, need_weights=False, **CALLS[name])[0]
    assert reached() == before + 2
    assert close(again, expected[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, expected, strict=True))


SHAPED: dict[str, Callable[[], tuple[torch.nn.Module, tuple[Tensor, ...]]]] = {
    "length first": lambda: (torch.nn.MultiheadAttention(64, 4), (torch.randn(10, 3, 64),) * 3),
    "no batch": lambda: (torch.nn.MultiheadAttention(64, 4), (torch.randn(10, 64),) * 3),
    "key and value of their own": lambda: (
        torch.nn.MultiheadAttention(64, 4, kdim=8, vdim=6, batch_first=True, bias=False),
        (torch.randn(3, 5, 64), torch.randn(3, 10, 8), torch.randn(3, 10, 6)),
    ),
    "rows appended": lambda: (
        torch.nn.MultiheadAttention(64, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        (torch.randn(3, 10, 64),) * 3,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPED)
def test_in_every_shape(name: str, home: Path) -> None:
    module, tensors = SHAPED[name]()
    expected = module(*tensors, need_weights=False)[0]
    before = reached()
    with elsa_tune.sdpa():
        assert close(module(*tensors, need_weights=False)[0], expected)
    assert reached() == before + 1


def test_weights_are_torchs(home: Path) -> None:
    module, x = torch.nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(3, 10, 64)
    expected = module(x, x, x)
    before = reached()
    with elsa_tune.sdpa():
        got = module(x, x, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and reached() == before


@torch.no_grad()
def test_encoders_and_decoders_are_served_by_our_kernels(home: Path) -> None:
    """Of an encoder every layer, of a decoder its own and the other's keys."""
    record(won("fp32.d16@b3.h4.q10.k10"), won("fp32.d16.bias@b3.h4.q10.k10"))
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(64, 4, 96, batch_first=True), 2).eval()
    x = torch.randn(3, 10, 64)

    def made() -> Tensor:
        return decoder(x, encoder(x), memory_mask=CAUSAL)  # type: ignore[no-any-return]

    expected = made()
    with elsa_tune.sdpa():
        made()
        built()
        before = reached(VARIANT)
        assert close(made(), expected)
    assert reached(VARIANT) == before + 6


def test_dropout_is_torchs(home: Path) -> None:
    module, x = torch.nn.MultiheadAttention(64, 4, dropout=0.5, batch_first=True), torch.randn(3, 10, 64)
    torch.manual_seed(1)
    expected = module(x, x, x, need_weights=False)[0]
    with elsa_tune.sdpa():
        torch.manual_seed(1)
        assert torch.equal(module(x, x, x, need_weights=False)[0], expected)


def test_compiled_in_a_scope(home: Path) -> None:
    module, x = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval(), torch.randn(3, 10, 64)
    expected, graphs = module(x, x, x, need_weights=False)[0], []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    with elsa_tune.sdpa():
        got = torch.compile(module, fullgraph=True, backend=backend)(x, x, x, need_weights=False)[0]
    assert close(got, expected) and len(graphs) == 1 and graphs[0].count("ops.elsa_tune.attention") == 1


def test_other_modes_and_classes_are_asked_as_before(home: Path) -> None:
    """A mode around ours sees what the module calls inside, and classes with an answer of their own get the whole function."""
    module, x = torch.nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(3, 10, 64)
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Theirs(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    before = reached()
    with Mode(), elsa_tune.sdpa():
        module(x, x, x, need_weights=False)
    assert any(one is torch.nn.functional.linear for one in seen) and reached() == before + 1
    seen.clear()
    with elsa_tune.sdpa():
        module(*(x.as_subclass(Theirs),) * 3, need_weights=False)
    assert any(one is torch.nn.functional.multi_head_attention_forward for one in seen)


# A module for new models.


def plainly(module: elsa_tune.nn.Attention, query: Tensor, key: Tensor, seen: Tensor | None = None) -> Tensor:
    """The same by matrix products, in float64."""
    module = copy.deepcopy(module).double()
    q, k, v = (
        projection(x.double()).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projection, x in ((module.query, query), (module.key, key), (module.value, key))
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT / module.head_dim**0.5
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    return module.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("head_dim", [None, 24])
def test_attention_is_attention(kv_heads: int | None, head_dim: int | None, home: Path) -> None:
    torch.manual_seed(0)
    module = elsa_tune.nn.Attention(64, 4, kv_heads, head_dim)
    x, other = torch.randn(3, 10, 64), torch.randn(3, 7, 64)
    lower = torch.ones(10, 10, dtype=torch.bool).tril()
    assert close(module(x), plainly(module, x, x))
    assert close(module(x, other), plainly(module, x, other))
    assert close(module(x, is_causal=True), plainly(module, x, x, lower))
    assert close(module(x, attn_mask=lower), plainly(module, x, x, lower))
    seen = lower & (torch.arange(10) < torch.tensor([10, 7, 4])[:, None, None, None])
    assert close(module(x, attn_mask=masks.causal() & masks.lengths([10, 7, 4])), plainly(module, x, x, seen))
    assert not close(module(x, attn_mask=scores.softcap(0.1)), module(x)), "scores, too"
    assert not close(module(x, x, other.mean(1, keepdim=True).expand_as(x)), module(x)), "a value of its own"


def test_attention_trains_compiles_and_moves(home: Path) -> None:
    module, x = elsa_tune.nn.Attention(64, 4, 2, bias=False, dropout=0.5), torch.randn(3, 10, 64)
    assert not close(module(x), module(x)), "weights are dropped"
    module.eval()
    expected = module(x)
    x.requires_grad_()
    (theirs,) = torch.autograd.grad(plainly(module, x, x).square().sum(), x)
    module(x).square().sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, theirs, rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    torch._dynamo.reset()
    assert close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    there = elsa_tune.nn.Attention(64, 4, 2, bias=False, device="meta").to_empty(device="cpu")
    there.reset_parameters()
    assert not close(there(x), expected)
    there.load_state_dict(module.state_dict())
    assert torch.equal(there.eval()(x), expected)
    assert elsa_tune.nn.Attention(64, 4, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=3e-2)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@torch.no_grad()
def test_attention_is_served_by_our_kernels(home: Path) -> None:
    record(won("fp32.d16@b3.h4.kv2.q10.k10"))
    module, x = elsa_tune.nn.Attention(64, 4, 2), torch.randn(3, 10, 64)
    expected = module(x)
    built()
    before = reached(VARIANT)
    assert close(module(x), expected) and reached(VARIANT) == before + 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((64, 5), "embed_dim is 64, num_heads 5"),
        ((64, 4, 3), "num_heads is 4, kv_heads 3"),
        ((64, 0), "num_heads is 0"),
        ((64.0, 4), "embed_dim is 64.0"),
        ((64, 4, None, 0), "head_dim is 0"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(WrongArguments, match=named):
        elsa_tune.nn.Attention(*arguments)

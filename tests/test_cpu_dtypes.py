"""What attention() serves on a CPU by kernels, of every element: with and without masks and scores, with the log-sum-exp."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_dispatch import LANES, only_kernels, record, won
from torch import Tensor

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.dispatch import serving
from elsa_tune.parts import element as elements
from elsa_tune.problem import Problem

BATCH, HEADS, LENGTH, DIM = 2, 4, 50, 16
VARIANTS = {
    "fp32": "cpp.serial.{}.q2.k4.v4.n48",
    "fp64": "cpp.serial.{}.q2.k4.v4.n48.e11",
    "bf16": "cpp.serial.{}.q2.k4.v4.n48.packed",
    "fp16": "cpp.serial.{}.q2.k4.v4.n48.packed",
}
GENERATOR = torch.Generator().manual_seed(1)
SEEN = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=GENERATOR) < 0.7
BIAS = torch.randn(HEADS, LENGTH, LENGTH, generator=GENERATOR, dtype=torch.float64)
SINKS = torch.randn(HEADS, generator=GENERATOR)
AWAY = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]


def with_sinks(logits: Tensor) -> Tensor:
    return torch.cat([logits, SINKS.double()[:, None, None].expand(*logits.shape[:3], 1)], -1)


ASKED: dict[str, tuple[Callable[[torch.dtype], Any], Callable[[Tensor, Any], Tensor]]] = {
    "": (lambda dtype: None, lambda s, mask: s),
    "dense": (lambda dtype: SEEN, lambda s, mask: s.masked_fill(~mask, -torch.inf)),
    "bias": (lambda dtype: BIAS.float(), lambda s, mask: s + mask),
    "bias of its dtype": (BIAS.to, lambda s, mask: s + mask.double()),
    "window": (lambda dtype: masks.window(5, 2), lambda s, mask: s.masked_fill((AWAY < -5) | (AWAY > 2), -torch.inf)),
    "softcap": (lambda dtype: scores.softcap(3.0), lambda s, mask: 3 * (s / 3).tanh()),
    "causal.softcap": (
        lambda dtype: masks.causal() & scores.softcap(0.5),
        lambda s, mask: (0.5 * (s / 0.5).tanh()).masked_fill(AWAY > 0, -torch.inf),
    ),
    "sinks": (lambda dtype: scores.sinks(SINKS), lambda s, mask: with_sinks(s)),
}
"""By family: the attn_mask of a call, and what becomes of scores in float64."""


@pytest.fixture(scope="module", autouse=True)
def one_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where a family's kernel is built once."""
    before = os.environ["ELSA_TUNE_HOME"]
    os.environ["ELSA_TUNE_HOME"] = str(tmp_path_factory.mktemp("dtypes"))
    serving.refresh()
    yield
    os.environ["ELSA_TUNE_HOME"] = before
    serving.refresh()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", elements.names())
def test_a_recorded_winner_serves(name: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is not called; the answer is as exact as the element is, and the log-sum-exp as its states are."""
    dtype, (make, change) = elements.get(name).dtype, ASKED[asked]
    mask = make(dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, LENGTH, DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    family = f"{name}.d{DIM}" + (f".{asked.partition(' ')[0]}" if asked else "")
    wanted = mask.of(Problem.parse(family)) if isinstance(mask, masks.AttnMask) else Problem.parse(family)
    problem = wanted.reshaped(batch=BATCH, heads=HEADS, kv_heads=HEADS, q_len=LENGTH, kv_len=LENGTH)
    record(won(str(problem), VARIANTS[name].format(LANES)))
    logits = change(q.double() @ k.double().mT / DIM**0.5, mask)
    truth = logits.softmax(-1)[..., :LENGTH] @ v.double()
    only_kernels(monkeypatch)
    out = elsa_tune.attention(q, k, v, attn_mask=mask)
    assert out.dtype == dtype
    assert float((out.double() - truth).abs().max()) <= 32 * elements.precision(name).unit
    again, lse = elsa_tune.attention_with_lse(q, k, v, attn_mask=mask)
    assert torch.equal(again, out) and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert float((lse.double() - logits.logsumexp(-1)).abs().max()) <= 64 * elements.get(name).unit


@pytest.mark.parametrize("name", elements.names())
def test_what_load_returns_is_the_winner(name: str) -> None:
    shape = f"b{BATCH}.h{HEADS}.q{LENGTH}.k{LENGTH}"
    record(won(f"{name}.d{DIM}.causal@{shape}", VARIANTS[name].format(LANES)))
    kernel = elsa_tune.load(f"{name}.d{DIM}.causal@{shape}", device="cpu")
    assert str(kernel.variant) == VARIANTS[name].format(LANES) and kernel.rung == "exact"
    q = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=torch.float64).to(elements.get(name).dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    out = kernel(q, q, q, lse=lse)
    logits = (q.double() @ q.double().mT / DIM**0.5).masked_fill(AWAY > 0, -torch.inf)
    assert float((out.double() - logits.softmax(-1) @ q.double()).abs().max()) <= 32 * elements.precision(name).unit
    assert float((lse.double() - logits.logsumexp(-1)).abs().max()) <= 64 * elements.get(name).unit

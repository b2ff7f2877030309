"""What attn_mask means: every form that torch takes and ours, at every entry, served by kernels and by torch, against float64."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dispatch import LANES, only_kernels, record, won
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

import elsa_tune
from elsa_tune import masks, scores
from elsa_tune.dispatch import meaning, serving
from elsa_tune.errors import WrongArguments
from elsa_tune.problem import Problem

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 40, 50, 16
SHAPE = f"b{BATCH}.h{HEADS}.q{Q_LEN}.k{KV_LEN}"
VARIANT = f"cpp.serial.{LANES}.q2.k4.v4.n48"
LOWEST = torch.finfo(torch.float32).min
POSITION, KEY = torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, n, DIM, generator=generator, dtype=dtype) for n in (Q_LEN, KV_LEN, KV_LEN))
    return q, k, v


def truth(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64 where ``added`` is added to scores; a row of -inf alone is 0."""
    logits = q.double() @ k.double().mT / DIM**0.5 + added
    return logits.softmax(-1).nan_to_num() @ v.double(), logits.logsumexp(-1)


def hides(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def with_row(row: Tensor | float, *shape: int) -> Tensor:
    mask = normal(*shape)
    mask[..., 7, :] = row
    return mask


FORMS: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Tensor]]] = {
    "bools": (lambda: drawn(Q_LEN, KV_LEN), "dense", hides),
    "bools of each sequence": (lambda: drawn(BATCH, 1, Q_LEN, KV_LEN), "dense", hides),
    "bools of each head, of keys": (lambda: drawn(HEADS, 1, KV_LEN), "dense", hides),
    "bools of keys": (lambda: drawn(KV_LEN), "dense", hides),
    "bools of rows": (lambda: drawn(Q_LEN, 1), "dense", hides),
    "one bool": (lambda: torch.tensor(True), "dense", hides),
    "bools that lie transposed": (lambda: drawn(KV_LEN, Q_LEN).T, "dense", hides),
    "bools that are shared": (lambda: drawn(1, 1, 1, KV_LEN).expand(BATCH, HEADS, Q_LEN, KV_LEN), "dense", hides),
    "bools and a row that sees nothing": (lambda: drawn(Q_LEN, KV_LEN) & (POSITION != 7), "dense", hides),
    "floats": (lambda: normal(BATCH, HEADS, Q_LEN, KV_LEN), "bias", Tensor.double),
    "floats of each head": (lambda: normal(HEADS, Q_LEN, KV_LEN), "bias", Tensor.double),
    "floats of keys": (lambda: normal(BATCH, 1, 1, KV_LEN), "bias", Tensor.double),
    "floats and a row of -inf": (lambda: with_row(-torch.inf, Q_LEN, KV_LEN), "bias", Tensor.double),
    "floats and a row of the least": (lambda: with_row(LOWEST, Q_LEN, KV_LEN), "bias", Tensor.double),
    "floats and a row far up": (lambda: with_row(3e38, Q_LEN, KV_LEN), "bias", Tensor.double),
    "floats and a row of the least but one": (
        lambda: with_row(torch.where(KEY == 9, 1.0, LOWEST), Q_LEN, KV_LEN), "bias", Tensor.double,
    ),
    "floats that are negated when read": (lambda: torch._neg_view(normal(Q_LEN, KV_LEN)), "bias", Tensor.double),
    "floats that take gradients, with nobody asking": (
        lambda: normal(Q_LEN, KV_LEN).requires_grad_(), "bias", lambda mask: mask.detach().double(),
    ),
    "CausalBias": (lambda: causal_upper_left(Q_LEN, KV_LEN), "causal", lambda mask: hides(KEY <= POSITION)),
    "CausalBias, lower right": (
        lambda: causal_lower_right(Q_LEN, KV_LEN), "causal_lower_right", lambda mask: hides(KEY <= POSITION + 10),
    ),
    "ours": (lambda: masks.window(5, 2), "window", lambda mask: hides((KEY >= POSITION - 5) & (KEY <= POSITION + 2))),
    "lengths that are a list": (
        lambda: masks.lengths([30, 9]), "lengths", lambda mask: hides(torch.tensor([30, 9])[:, None, None, None] > KEY),
    ),
    "lengths of int32": (
        lambda: masks.lengths(torch.tensor([30, 0], dtype=torch.int32)), "lengths",
        lambda mask: hides(torch.tensor([30, 0])[:, None, None, None] > KEY),
    ),
}  # fmt: skip
"""By what it is: how it is made, which family's kernels serve it, and what it adds to scores."""


@pytest.fixture(scope="module", autouse=True)
def one_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where a family's kernel is built once."""
    before = os.environ["ELSA_TUNE_HOME"]
    os.environ["ELSA_TUNE_HOME"] = str(tmp_path_factory.mktemp("attn-mask"))
    serving.refresh()
    yield
    os.environ["ELSA_TUNE_HOME"] = before
    serving.refresh()


def has_a_winner(family: str, mask: Any) -> None:
    """A kernel of the family serves calls with that mask from now on."""
    problem = mask.of(Problem(head_dim=DIM)) if isinstance(mask, masks.AttnMask) else Problem.parse(family)
    shape = {"batch": BATCH, "heads": HEADS, "kv_heads": HEADS, "q_len": Q_LEN, "kv_len": KV_LEN}
    record(won(str(problem.reshaped(**shape)), VARIANT))


@pytest.mark.parametrize("by", ["torch", "a kernel"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, family, added = FORMS[form]
    (q, k, v), mask = tensors(), make()
    expected, sums = truth(q, k, v, added(mask))
    if by == "a kernel":
        has_a_winner(f"fp32.d{DIM}.{family}", mask)
        only_kernels(monkeypatch)
    else:
        monkeypatch.setattr(serving, "_ready_kernel", lambda *arguments: ("", None))
        serving.refresh()
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(elsa_tune.attention(q, k, v, attn_mask=mask).double(), expected, rtol=0, atol=2e-6)
        out, lse = elsa_tune.attention_with_lse(q, k, v, attn_mask=mask)
    assert torch.allclose(out.double(), expected, rtol=0, atol=2e-6)
    far = (sums.abs() > 2.0**100) & sums.isfinite()  # where base 2 has no number for it
    assert torch.allclose(lse.double().where(~far, 0.0), sums.where(~far, 0.0), rtol=1e-6, atol=4e-6)
    assert bool((lse[far] / sums[far] > 0.5).all())


def test_a_loaded_kernel_takes_torchs_forms() -> None:
    q, k, v = tensors()
    seen = drawn(Q_LEN, KV_LEN)
    block_mask = create_block_mask(lambda b, h, i, j: j <= i + 3, None, None, Q_LEN, KV_LEN, device="cpu")
    for mask, family, added in (
        (seen, "dense", hides(seen)),
        (causal_upper_left(Q_LEN, KV_LEN), "causal", hides(KEY <= POSITION)),
        (block_mask, "blocks_partial", hides(KEY <= POSITION + 3)),
    ):
        numbers = ".partialq128.partialk128" if family == "blocks_partial" else ""
        kernel = elsa_tune.load(f"fp32.d{DIM}.{family}@{SHAPE}{numbers}", device="cpu")
        assert torch.allclose(kernel(q, k, v, attn_mask=mask).double(), truth(q, k, v, added)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "mask_dtype"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float64", "float32")],
)
def test_what_is_shared_is_not_written_out(dtype: str, mask_dtype: str) -> None:
    """Floats of another dtype than states are converted once each, however many pairs share them."""
    q, k, _ = tensors(getattr(torch, dtype))
    bias = normal(BATCH, 1, 1, KV_LEN).to(getattr(torch, mask_dtype)).expand(BATCH, HEADS, Q_LEN, KV_LEN)
    (given,) = scores.bias(bias).in_order(q, k)
    assert given.shape == (BATCH, 1, 1, KV_LEN) or given.data_ptr() == bias.data_ptr()
    assert torch.equal(given.expand_as(bias).double(), bias.double())


def padding(ends: list[int], starts: list[int] | None = None) -> Tensor:
    first = torch.tensor(starts or [0] * len(ends))
    return ((first[:, None] <= KEY) & (torch.tensor(ends)[:, None] > KEY))[:, None, None]


HOLES = padding([30, 50]) & (KEY != 4)
LOOKS: dict[str, tuple[Tensor, str]] = {
    "on the right": (padding([30, 50]), "lengths"),
    "on the left": (padding([50, 50], [0, 11]), "lengths+starts"),
    "on both sides": (padding([40, 0], [3, 0]), "lengths+starts"),
    "with holes": (HOLES, "dense"),
    "of -inf": (hides(padding([30, 50])).float(), "lengths"),
    "of the least float": (torch.zeros(2, 1, 1, KV_LEN).masked_fill(~padding([30, 50]), LOWEST), "lengths"),
    "of the least float, and a sequence without keys": (torch.zeros(2, 1, 1, KV_LEN).masked_fill(~padding([30, 0]), LOWEST), ""),
    "of other floats": (torch.zeros(2, 1, 1, KV_LEN).masked_fill(~padding([30, 50]), -1e4), ""),
    "of holes of -inf": (hides(HOLES).float(), ""),
    "of each row": (padding([30, 50]).expand(-1, -1, Q_LEN, -1).contiguous(), "dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKS)
def test_padding_is_found_by_a_look(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call is so large that a look costs little; the meaning is the same either way."""
    mask, family = LOOKS[name]
    (q, k, v), added = tensors(), hides(mask) if mask.dtype == torch.bool else mask.double()
    assert meaning.of(mask, False, q, k).mask == ("dense" if mask.dtype == torch.bool else "none")  # type: ignore[union-attr]
    monkeypatch.setattr(meaning, "WORTH_A_LOOK", 0)
    found = meaning.of(mask, False, q, k)
    assert found is not None and (found.mask, found.score) == (family or "none", "none" if family else "bias")
    out = elsa_tune.attention(q, k, v, attn_mask=mask)
    assert torch.allclose(out.double(), truth(q, k, v, added)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("look", [True, False])
def test_what_a_tensor_held_is_not_remembered(look: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to through numpy and .data, which tell nobody, and in inference mode, whose tensors have no version."""
    monkeypatch.setattr(meaning, "WORTH_A_LOOK", 0 if look else 1 << 40)
    q, k, v = tensors()
    for family in ("dense", "lengths"):
        has_a_winner(f"fp32.d{DIM}.{family}", None if family == "dense" else masks.lengths([KV_LEN] * BATCH))
    with torch.inference_mode():
        mask = padding([30, 50])
        lengths = torch.tensor([30, 50], dtype=torch.int32)
        ours = masks.lengths(lengths)
        for write in (
            lambda: None,
            lambda: mask.numpy().__setitem__((0, 0, 0, slice(10, None)), False),
            lambda: mask.data[1].fill_(False),
        ):
            write()
            lengths.copy_(mask.sum(-1).flatten())
            expected = truth(q, k, v, hides(mask))[0]
            for given in (mask, ours):
                assert torch.allclose(elsa_tune.attention(q, k, v, given).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "form", ["floats", "floats and a row of the least", "floats and a row of -inf", "floats and a row far up", "bools"]
)
def test_gradients_are_maths(form: str) -> None:
    """Of a row that a mask takes far away as a whole too, where torch's fused kernel has lost ln n in its log-sum-exp."""
    mask = FORMS[form][0]()

    def gradients(attend: Callable[..., Tensor], *extra: Tensor) -> list[Tensor]:
        given = [x.detach().clone().requires_grad_() for x in (*tensors(), *extra)]
        out = attend(*given[:3], attn_mask=given[3] if extra else mask)
        return list(torch.autograd.grad((out * normal(*out.shape)).sum(), given))

    for extra in [(), (mask,)] if mask.dtype != torch.bool else [()]:
        with sdpa_kernel(SDPBackend.MATH):
            expected = gradients(scaled_dot_product_attention, *extra)
        for found, wanted in zip(gradients(elsa_tune.attention, *extra), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("q_len", [Q_LEN, KV_LEN])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_scale_that_reverses_order(make: Callable[[int, int], CausalBias], q_len: int, scale: float) -> None:
    q, k, v = tensors()
    q = torch.cat([q, q], 2)[:, :, :q_len]
    ahead = 0 if make is causal_upper_left else KV_LEN - q_len
    logits = q.double() @ k.double().mT * scale + hides(torch.arange(q_len)[:, None] + ahead >= KEY)
    out = elsa_tune.attention(q, k, v, make(q_len, KV_LEN), scale=scale)
    assert torch.allclose(out.double(), logits.softmax(-1) @ v.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("chain", ["softcap", "sinks"])
def test_scores_that_torch_lacks_are_as_exact_as_its_own(chain: str, dtype: str) -> None:
    """By torch's operations, in floats of states; grouped heads share keys and values by view."""
    q, k, v = (x.to(getattr(torch, dtype)) for x in tensors())
    k, v, sinks = k[:, ::2], v[:, ::2], normal(HEADS)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT / DIM**0.5
    if chain == "softcap":
        weights = (5 * (logits / 5).tanh()).softmax(-1)
    else:
        one = sinks.double()[:, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, one], -1).softmax(-1)[..., :KV_LEN]
    mask = scores.softcap(5.0) if chain == "softcap" else scores.sinks(sinks)
    out = elsa_tune.attention(q, k, v, mask, enable_gqa=True)
    unit = torch.finfo(q.dtype).eps
    truth_of_it = weights @ v.double().repeat_interleave(2, 1)
    assert out.dtype == q.dtype and float((out.double() - truth_of_it).abs().max()) <= 2 * unit


EMPTY = {
    "no keys": ((2, 4, 3, 16), (2, 4, 0, 16)),
    "no queries": ((2, 4, 0, 16), (2, 4, 5, 16)),
    "no sequences": ((0, 4, 3, 16), (0, 4, 5, 16)),
    "no heads": ((2, 0, 3, 16), (2, 0, 5, 16)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("asked", ["nothing", "causal", "a tensor", "ours", "sinks"])
def test_zero_sizes(name: str, asked: str) -> None:
    of_query, of_key = EMPTY[name]
    q, k = torch.randn(of_query), torch.randn(of_key)
    own = {
        "a tensor": torch.ones(of_query[2], of_key[2], dtype=torch.bool), "ours": masks.causal(), "sinks": scores.sinks(torch.ones(of_query[1])),
    }  # fmt: skip
    more: dict[str, Any] = {"is_causal": True} if asked == "causal" else {"attn_mask": own.get(asked)}
    out, lse = elsa_tune.attention_with_lse(q, k, k, **more)
    assert out.shape == of_query and not out.any() and lse.shape == of_query[:3]
    assert torch.equal(elsa_tune.attention(q, k, k, **more), out)
    assert torch.equal(lse, torch.full_like(lse, 1.0 if asked == "sinks" else -torch.inf))


def test_sequences_that_share_a_query() -> None:
    q, k, v = tensors()
    for mask in (None, masks.lengths([30, 9]), drawn(Q_LEN, KV_LEN), drawn(BATCH, 1, 1, KV_LEN)):
        expected, sums = elsa_tune.attention_with_lse(q[:1].expand_as(q), k, v, attn_mask=mask)
        out, lse = elsa_tune.attention_with_lse(q[:1], k, v, attn_mask=mask)
        assert torch.allclose(out, expected, rtol=0, atol=2e-6) and torch.allclose(lse, sums, rtol=0, atol=2e-6)
        assert torch.allclose(elsa_tune.attention(q[:1], k, v, attn_mask=mask), expected, rtol=0, atol=2e-6)


def test_where_nothing_can_be_read() -> None:
    """Tensors without numbers, and transformed ones: torch's operations, as without a mask."""
    lengths = torch.tensor([30, 9])
    meta = [x.to("meta") for x in tensors()]
    for mask in (
        masks.lengths(lengths.to("meta")),
        causal_upper_left(Q_LEN, KV_LEN),
        masks.window(3) & scores.softcap(5.0),
    ):
        assert elsa_tune.attention(*meta, attn_mask=mask).shape == meta[0].shape
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in tensors()]
        for mask in (masks.lengths(mode.from_tensor(lengths)), masks.causal() & masks.window(3)):
            assert elsa_tune.attention(*fake, attn_mask=mask).shape == fake[0].shape
    q, k, v = tensors()
    mapped = torch.vmap(lambda n: elsa_tune.attention(q, k, v, masks.lengths(n)))(
        torch.stack([lengths, lengths.flip(0)])
    )
    for i, own in enumerate((lengths, lengths.flip(0))):
        expected = truth(q, k, v, hides(own[:, None, None, None] > KEY))[0]
        assert torch.allclose(mapped[i].double(), expected, rtol=0, atol=2e-6)


def test_masks_that_lie_far_apart() -> None:
    """Masks, biases, keys and values whose distance in memory outgrows 32 bits; only the touched pages of it exist."""

    def far(x: Tensor) -> Tensor:
        """The same, one sequence more than 2^31 elements from the next."""
        memory = torch.empty(2**31 + 64 + x[0].numel(), dtype=x.dtype)
        return memory.as_strided(x.shape, (2**31 + 64, x[0, 0].numel(), x.shape[3], 1)).copy_(x)

    q, k, v = (x.half() for x in tensors())
    seen, bias = drawn(BATCH, HEADS, Q_LEN, KV_LEN), normal(BATCH, HEADS, Q_LEN, KV_LEN).half().float()
    mask = masks.dense(seen) & scores.bias(bias)
    has_a_winner(f"fp16.d{DIM}.dense.bias", None)
    kernel = elsa_tune.load(f"fp16.d{DIM}.dense.bias@{SHAPE}", device="cpu")
    expected = truth(q, k, v, hides(seen) + bias.double())[0]
    apart = masks.dense(far(seen)) & scores.bias(far(bias))
    for given, key in ((mask, k), (apart, far(k))):
        out = kernel(q, key, v, attn_mask=given)
        assert torch.allclose(out.double(), expected, rtol=0, atol=2e-3)


BLOCK_MASK = create_block_mask(lambda b, h, i, j: j < 3, None, None, 5, 5, device="cpu")


@pytest.mark.parametrize("score", ["bias", "alibi", "sinks", "torch's mask"])
def test_gradients_of_operands_are_kept(score: str, home: Path) -> None:
    """Torch's where a kernel serves calls without gradients alone, for operations would cost more; ours where one serves them too."""
    q, k, v = tensors()
    operand = {"alibi": normal(HEADS).abs(), "sinks": normal(HEADS)}.get(score, normal(1, HEADS, Q_LEN, KV_LEN))
    of_ours = getattr(scores, score, scores.bias)(operand.requires_grad_())
    mask = of_ours if hasattr(scores, score) else operand
    problem = of_ours.of(Problem(head_dim=DIM)).reshaped(
        batch=BATCH, heads=HEADS, kv_heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN
    )
    record(won(str(problem), VARIANT))
    serving.refresh()
    with torch.no_grad():
        expected = elsa_tune.attention(q, k, v, mask)
    before = serving.find(q, k, v, of_ours, False).row.calls
    assert torch.allclose(elsa_tune.attention(q, k, v, mask), expected, rtol=0, atol=2e-6)
    assert serving.find(q, k, v, of_ours, False).row.calls == before
    record(won(str(problem.reshaped(direction="backward")), VARIANT))
    serving.refresh()
    for out in (elsa_tune.attention(q, k, v, mask), *elsa_tune.attention_with_lse(q, k, v, attn_mask=mask)):
        (gradient,) = torch.autograd.grad(
            out.sum(), operand, retain_graph=True
        )  # output and log-sum-exp are of one graph
        assert gradient.isfinite().all()
    before = serving.find(q, k, v, of_ours, False).row.calls
    assert torch.allclose(elsa_tune.attention(q, k, v, mask), expected, rtol=0, atol=2e-6)
    assert serving.find(q, k, v, of_ours, False).row.calls == before + 1
    with pytest.raises(WrongArguments, match="no gradients"):
        elsa_tune.load(problem, device="cpu")(q, k, v, attn_mask=mask)


def test_one_query_head_for_all_keys() -> None:
    q, k, v = tensors()
    expected = elsa_tune.attention(q[:, :1].expand_as(q), k, v, masks.window(3))
    assert torch.allclose(elsa_tune.attention(q[:, :1], k, v, masks.window(3)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["softcap", "sinks", "window", "none"])
def test_autocast_decides_the_dtype(name: str) -> None:
    q, k, v = tensors()
    mask = {"softcap": scores.softcap(5.0), "sinks": scores.sinks(normal(HEADS)), "window": masks.window(3)}.get(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = elsa_tune.attention(q, k, v, mask)
        cu = torch.tensor([0, 17, Q_LEN])
        ragged = elsa_tune.attention_varlen(*(x[0, :, :Q_LEN].transpose(0, 1) for x in (q, k, v)), cu, cu, mask)
    assert out.dtype == ragged.dtype == torch.bfloat16
    assert torch.allclose(out.float(), elsa_tune.attention(q, k, v, mask), rtol=0, atol=3e-2)


def test_masks_can_be_pickled() -> None:
    q, k, v = tensors()
    for mask in (
        masks.strided(heads=HEADS, local=1, stride=2, block=16),
        masks.lengths([30, 9]),
        masks.window(3) & scores.softcap(5.0),
    ):
        again = pickle.loads(pickle.dumps(mask))
        assert str(again) == str(mask)
        assert torch.equal(elsa_tune.attention(q, k, v, again), elsa_tune.attention(q, k, v, mask))


def test_states_are_mapped_over_masks() -> None:
    q, k, v = tensors()
    seen = torch.stack([drawn(Q_LEN, KV_LEN), ~drawn(Q_LEN, KV_LEN)])
    found = torch.vmap(lambda m: elsa_tune.attention_with_lse(q, k, v, attn_mask=masks.dense(m))[1])(seen)
    for i in range(2):
        assert torch.allclose(found[i].double(), truth(q, k, v, hides(seen[i]))[1], rtol=1e-6, atol=4e-6)


def test_a_script_may_end_while_a_kernel_is_built(tmp_path: Path) -> None:
    """A thread that computes must not outlive the interpreter."""
    has_a_winner(f"fp32.d{DIM}", None)
    program = (
        "import torch, elsa_tune\n"
        "from elsa_tune import masks\n"
        f"x = torch.randn({BATCH}, {HEADS}, {KV_LEN}, {DIM})\n"
        "for m in (masks.lengths([30, 7]), masks.window(31), masks.prefix(3)):\n"
        "    elsa_tune.attention(x, x, x, m)\n"
    )
    shutil.copytree(os.environ["ELSA_TUNE_HOME"], tmp_path / "home")
    shutil.rmtree(tmp_path / "home" / "kernels")
    environment = {**os.environ, "ELSA_TUNE_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


X, Y = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 6, 16)
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "a mask of other lengths": (lambda: elsa_tune.attention(X, Y, Y, torch.ones(4, 6)), r"attn_mask \[4, 6\] must broadcast to \[2, 4, 5, 6\]"),
    "a mask of other heads": (lambda: elsa_tune.attention(X, Y, Y, torch.ones(3, 5, 6)), r"attn_mask \[3, 5, 6\] must broadcast"),
    "a mask of more dimensions": (lambda: elsa_tune.attention(X, Y, Y, torch.ones(2, 2, 4, 5, 6)), "must broadcast"),
    "a sparse mask": (lambda: elsa_tune.attention(X, Y, Y, torch.ones(5, 6).to_sparse()), "attn_mask is torch.sparse_coo"),
    "a sparse operand": (lambda: masks.dense(torch.ones(5, 6).bool().to_sparse()), "dense is torch.sparse_coo"),
    "unsigned lengths": (lambda: masks.lengths(torch.tensor([1, 2], dtype=torch.uint64)), "lengths is torch.uint64"),
    "a function": (lambda: masks.dense(lambda: 1), "dense is"),  # type: ignore[arg-type,return-value]
    "no flag": (lambda: masks.window(1, lower_right="no"), "lower_right is 'no'"),  # type: ignore[arg-type]
    "no BlockMask": (lambda: masks.from_block_mask(None), "block_mask is None"),  # type: ignore[arg-type]
    "states of a mask in the place of is_causal": (
        lambda: elsa_tune.attention_with_lse(X, X, X, masks.window(3)), "is_causal is",  # type: ignore[arg-type]
    ),
    "ours, and a flag": (lambda: elsa_tune.attention(X, X, X, masks.window(3), is_causal="x"), "is_causal is 'x'"),  # type: ignore[arg-type]
    "a query of nothing": (lambda: elsa_tune.attention_with_lse(None, X, X), "query is None"),  # type: ignore[arg-type]
    "ours, and a scale that is a word": (lambda: elsa_tune.attention(X, X, X, masks.window(3), scale="x"), "scale is 'x'"),  # type: ignore[arg-type]
    "a mask that is no tensor": (lambda: elsa_tune.attention(X, Y, Y, [1]), r"attn_mask is \[1\]; it must be a tensor"),  # type: ignore[arg-type]
    "a mask and is_causal": (lambda: elsa_tune.attention(X, Y, Y, torch.ones(5, 6), is_causal=True), "attn_mask and is_causal"),
    "CausalBias and is_causal": (lambda: elsa_tune.attention(X, Y, Y, causal_upper_left(5, 6), is_causal=True), "attn_mask and is_causal"),
    "CausalBias of other lengths": (lambda: elsa_tune.attention(X, Y, Y, causal_upper_left(6, 6)), r"CausalBias of q_len and kv_len \(6, 6\)"),
    "heads that do not divide": (lambda: elsa_tune.attention(X, Y[:, :3], Y[:, :3], enable_gqa=True), "4 heads of query must be a multiple"),
    "heads without enable_gqa": (lambda: elsa_tune.attention(X, Y[:, :2], Y[:, :2]), "with enable_gqa"),
    "ours, and heads": (lambda: elsa_tune.attention(X, Y[:, :2], Y[:, :2], masks.causal()), "with enable_gqa"),
    "dimensions": (lambda: elsa_tune.attention(X, Y[..., :8], Y), "head_dim"),
    "lengths": (lambda: elsa_tune.attention(X, Y, Y[:, :, :5]), "differ in length"),
    "dropout below 0": (lambda: elsa_tune.attention(X, Y, Y, dropout_p=-0.5), "dropout_p is -0.5; it must be a probability"),
    "dropout above 1": (lambda: elsa_tune.attention(X[:, :, :0], Y, Y, dropout_p=1.5), "dropout_p is 1.5"),
    "dropout that is no number": (lambda: elsa_tune.attention(X, Y, Y, dropout_p=float("nan")), "dropout_p is nan"),
    "lengths beyond keys": (lambda: elsa_tune.attention(X, Y, Y, masks.lengths([7, 2])), "lengths reach from 2 to 7"),
    "lengths below 0": (lambda: masks.lengths([-1, 2]).dense(2, 4, 5, 6), "lengths reach from -1"),
    "a dense form of another shape": (lambda: masks.dense(torch.ones(7, 8, dtype=torch.bool)).dense(1, 1, 5, 6), "operand dense"),
    "ranges that fall": (lambda: elsa_tune.attention(X, Y, Y, masks.ranges([0, 1, 0, 1, 1], [6] * 5)), "first_key falls"),
    "a prefix that is two": (lambda: masks.prefix(torch.tensor([1, 2])), "p is tensor"),  # type: ignore[arg-type]
    "a window that is a fraction": (lambda: masks.window(torch.tensor(5.5)), "left is tensor"),  # type: ignore[arg-type]
    "a BlockMask of a ragged batch": (
        lambda: elsa_tune.attention_varlen(*[X[0]] * 3, torch.tensor([0, 4]), torch.tensor([0, 4]), BLOCK_MASK),
        "a BlockMask, of one q_len",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_argument(name: str) -> None:
    """Of the kinds that torch raises."""
    call, message = MISTAKES[name]
    with pytest.raises(WrongArguments, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)


def test_what_lies_beyond_queries_hides_nothing_more() -> None:
    """Columns of int64 that no int32 holds."""
    far = torch.tensor([3, 2**40, -(2**40), 2**31, 5, 2])[None, None, :, None]
    near = far.clamp(0, 100)
    assert torch.equal(masks.columns(far, True).dense(1, 1, 5, 6), masks.columns(near, True).dense(1, 1, 5, 6))

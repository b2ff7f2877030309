"""Masks as programs write them: blocks, FlexAttention's block masks, column intervals, strided attention."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import running
from test_dispatch import VARIANT, Served, record, won
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

import elsa_tune
from elsa_tune import masks, scores, space
from elsa_tune.device import host_cpu
from elsa_tune.errors import WrongArguments
from elsa_tune.generate import cpp
from elsa_tune.generate.backends import Kernel
from elsa_tune.masks import AttnMask
from elsa_tune.problem import Problem

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN = 2, 4, 2, 300, 413
DOCUMENT = torch.randint(0, 5, (BATCH, KV_LEN), generator=torch.Generator().manual_seed(0)).sort(-1).values


def tensors(q_len: int = Q_LEN, kv_len: int = KV_LEN) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, HEADS, q_len, 16), (BATCH, KV_HEADS, kv_len, 16), (BATCH, KV_HEADS, kv_len, 16))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def kernel(mask: AttnMask | None = None, variant: str = VARIANT) -> Callable[..., Tensor]:
    """A C++ kernel of the mask's family, called with a mask of it."""
    family = Problem.parse("fp32.d16")
    problem = mask.of(family) if mask else family
    built: Kernel = cpp.load(cpp.build(space.parse(variant), problem), space.parse(variant), problem)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return built(query, key, value, operands=mask.in_order(query, key) if mask else ())

    return call


def by_definition(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    key, value = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    logits = (query.double() @ key.mT / 4).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1).nan_to_num() @ value).float()


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2e-6)


MASK_MODS: dict[str, tuple[Callable[..., Tensor], int | None, int | None]] = {
    "documents": (lambda b, h, i, j: (DOCUMENT[b, i] == DOCUMENT[b, j]) & (j <= i), BATCH, None),
    "a prefix of each head": (lambda b, h, i, j: (j <= i) | (j < 40 * h), None, HEADS),
}
"""A mask_mod, and along which of batch and heads it differs."""


class TestFromBlockMask:
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("size", [128, (64, 32), (16, 48)])
    @pytest.mark.parametrize("name", MASK_MODS)
    def test_is_what_flex_attention_computes(self, name: str, size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        mask_mod, batch, heads = MASK_MODS[name]
        torchs = create_block_mask(mask_mod, batch, heads, Q_LEN, KV_LEN, device="cpu", BLOCK_SIZE=size)
        mask = masks.from_block_mask(torchs)
        dense = create_mask(mask_mod, BATCH, HEADS, Q_LEN, KV_LEN, device="cpu")
        assert torch.equal(mask.dense(BATCH, HEADS, Q_LEN, KV_LEN).expand_as(dense), dense)
        query, key, value = tensors()
        theirs = flex_attention.flex_attention(query, key, value, block_mask=torchs, enable_gqa=True)
        assert close(kernel(mask)(query, key, value), theirs)

    def test_alike_blocks_are_kept_once(self) -> None:
        mask = masks.from_block_mask(create_block_mask(lambda b, h, i, j: j <= i, None, None, 512, 512, device="cpu"))
        assert mask.mask == "blocks_partial" and mask.operands["bits"].shape == (128 * 128 // 32,)
        assert mask.operands["partial"][0, 0].tolist() == [[2, 0, 0, 0], [1, 2, 0, 0], [1, 1, 2, 0], [1, 1, 1, 2]]

    def test_without_partial_blocks_it_is_a_plain_layout(self) -> None:
        """What is listed in any order, with nothing known of it, and asked of a function that lets everything through."""
        counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0, 7], [2, 0, 1]]]])
        for more in ({}, {"full_kv_num_blocks": counts * 0, "full_kv_indices": indices}):
            torchs = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64, seq_lengths=(70, 150), **more)
            mask = masks.from_block_mask(torchs)
            assert str(mask) == "blocks@blockq64.blockk64"
            assert mask.operands["blocks"].tolist() == [[[[False, True, False], [True, False, True]]]]

    @pytest.mark.parametrize("size", [1, 64, 128])
    def test_nothing_is_seen_in_part(self, size: int) -> None:
        """Everything, nothing, and blocks of single pairs."""
        query, key, value = tensors(128, 256)
        for mask_mod in (lambda b, h, i, j: j >= 0, lambda b, h, i, j: j < 0, lambda b, h, i, j: j < 128):
            torchs = create_block_mask(mask_mod, None, None, 128, 256, device="cpu", BLOCK_SIZE=size)
            seen = create_mask(mask_mod, 1, 1, 128, 256, device="cpu")
            out = elsa_tune.attention(query, key, value, torchs, enable_gqa=True)
            assert close(out, by_definition(query, key, value, seen))

    def test_a_function_that_hides_all_of_a_listed_block(self) -> None:
        ones = torch.ones(1, 1, 1, dtype=torch.int32)
        torchs = BlockMask.from_kv_blocks(ones, ones[..., None] - 1, BLOCK_SIZE=64, mask_mod=lambda b, h, i, j: j < 0)
        assert not masks.from_block_mask(torchs).operands["blocks"].any()

    def test_given_as_attn_mask(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Asked once, and forgotten with the object; intersected with is_causal; of other lengths refused."""
        asked = []

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            asked.append(1)
            return j < i + 30

        given = [create_block_mask(mask_mod, None, None, 50, 50, device="cpu")]
        query, key, value = tensors(50, 50)
        before = len(asked)
        seen = torch.ones(50, 50, dtype=torch.bool)

        def attention(is_causal: bool = False) -> Tensor:
            return elsa_tune.attention(query, key, value, given[0], is_causal=is_causal, enable_gqa=True)

        assert close(attention(), by_definition(query, key, value, seen.tril(29)))
        assert close(attention(is_causal=True), by_definition(query, key, value, seen.tril()))
        record(won("fp32.d16.blocks_partial@b2.h4.kv2.q50.k50.partialq128.partialk128"))
        served = Served(monkeypatch)
        assert close(attention(), by_definition(query, key, value, seen.tril(29))) and served.by_torch == 0
        output, lse = elsa_tune.attention_with_lse(query, key, value, attn_mask=given[0], enable_gqa=True)
        assert close(output, attention()) and lse.isfinite().all()
        assert len(asked) == before + 1
        with pytest.raises(
            WrongArguments, match=r"BlockMask of q_len and kv_len \(50, 50\), query and key have \(49, 50\)"
        ):
            elsa_tune.attention(query[:, :, 1:], key, value, given[0], enable_gqa=True)
        gone = weakref.ref(given.pop())
        gc.collect()
        assert gone() is None


class TestColumns:
    @pytest.mark.parametrize(("causal", "n"), [(True, 1), (True, 2), (False, 2), (False, 4)])
    @pytest.mark.parametrize("kv_heads", [1, KV_HEADS])
    def test_each_form_by_definition(self, causal: bool, n: int, kv_heads: int) -> None:
        bounds = torch.randint(0, 30, (BATCH, kv_heads, 40, n), generator=torch.Generator().manual_seed(n))
        expected = torch.ones(BATCH, HEADS, 30, 40, dtype=torch.bool)
        for b, h, i, j in itertools.product(range(BATCH), range(HEADS), range(30), range(40)):
            first, *more = bounds[b, h * kv_heads // HEADS, j].tolist()
            if causal:
                hidden = j > i or (i >= first and (n == 1 or i < more[0]))
            elif n == 2:
                hidden = i >= first or i < more[0]
            else:
                hidden = first <= i < more[0] or more[1] <= i < more[2]
            expected[b, h, i, j] = not hidden
        mask, (query, key, value) = masks.columns(bounds, causal), tensors(30, 40)
        assert torch.equal(mask.dense(BATCH, HEADS, 30, 40).expand_as(expected), expected)
        assert close(kernel(mask)(query, key, value), by_definition(query, key, value, expected))

    def test_mistakes(self) -> None:
        bounds = torch.zeros(1, 1, 8, 4, dtype=torch.int32)
        for wrong, causal in (
            (bounds, True),
            (bounds[..., :1], False),
            (bounds[..., :3], False),
            (bounds[0, ..., :1], True),
        ):
            with pytest.raises(WrongArguments, match=r"bounds is \(.*\); it must be a tensor .* of n (1 or 2|2 or 4)"):
                masks.columns(wrong, causal)
        with pytest.raises(WrongArguments, match="bounds is torch.float32; it must be of whole numbers"):
            masks.columns(bounds[..., :2].float(), True)
        query, key, value = tensors(8, 9)
        with pytest.raises(WrongArguments, match="operand hidefrom is torch.int32"):
            elsa_tune.attention(query, key, value, masks.columns(bounds, False), enable_gqa=True)


class TestBlocks:
    def test_by_definition(self) -> None:
        layout = torch.rand(BATCH, HEADS, 5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
        seen = layout.repeat_interleave(13, 2).repeat_interleave(8, 3)[:, :, :61, :70]
        query, key, value = tensors(61, 70)
        assert close(kernel(masks.blocks(layout, 13, 8))(query, key, value), by_definition(query, key, value, seen))
        given = masks.blocks(layout[0, 0], 13, 8) & scores.softcap(50.0)
        assert str(given) == "blocks.softcap@blockq13.blockk8.softcap50"

    def test_mistakes(self) -> None:
        layout = torch.ones(2, 2, dtype=torch.bool)
        for sizes in ((0, 8), (8, -1), (8, 1 << 21), (True, 8), (8.0, 8)):
            with pytest.raises(WrongArguments, match=r"block_[qk] is .*; it must be a whole number from 1 to 1048576"):
                masks.blocks(layout, *sizes)  # type: ignore[arg-type]
        with pytest.raises(WrongArguments, match="blocks is torch.int64; it must be torch.bool"):
            masks.blocks(layout.long(), 8, 8)
        query, key, value = tensors(17, 16)
        with pytest.raises(WrongArguments, match=r"operand blocks is .* = \[2, 4, 3, 2\], each or 1"):
            elsa_tune.attention(query, key, value, masks.blocks(layout, 8, 8), enable_gqa=True)


class TestStrided:
    @pytest.mark.parametrize(("local", "stride"), [(1, 3), (2, 8), (0, 2)])
    def test_by_definition(self, local: int, stride: int) -> None:
        mask, block = masks.strided(heads=HEADS, local=local, stride=stride, block=8), 8
        for q_len, kv_len in ((70, 70), (33, 100)):  # the layout follows the lengths of a call
            expected = torch.zeros(HEADS, q_len, kv_len, dtype=torch.bool)
            for h, i, j in itertools.product(range(HEADS), range(q_len), range(kv_len)):
                row, column, step = i // block, j // block, max(1, stride // HEADS)
                expected[h, i, j] = j <= i and (row - column < local or (column + h * step) % stride == 0)
            assert torch.equal(mask.dense(1, HEADS, q_len, kv_len), expected)
            query, key, value = tensors(q_len, kv_len)
            assert close(kernel(mask)(query, key, value), by_definition(query, key, value, expected))
            served = elsa_tune.attention(query, key, value, mask, enable_gqa=True)
            assert close(served, by_definition(query, key, value, expected))

    def test_mistakes(self) -> None:
        for wrong in ({"heads": 0}, {"local": -1}, {"stride": 0}, {"block": 0}):
            with pytest.raises(WrongArguments, match=f"{next(iter(wrong))} is"):
                masks.strided(**{"heads": 1, "local": 1, "stride": 1, "block": 1, **wrong})
        query, key, value = tensors(16, 16)
        with pytest.raises(WrongArguments, match="operand blocks"):
            elsa_tune.attention(query, key, value, masks.strided(heads=3, local=1, stride=2, block=8), enable_gqa=True)


NO_HIDING = [
    ("blocks", lambda: masks.blocks(torch.ones(1, 1, dtype=torch.bool), 512, 512), None),
    ("columns", lambda: masks.columns(torch.full((1, 1, KV_LEN, 1), KV_LEN), True), masks.causal),
    ("strided", lambda: masks.strided(heads=HEADS, local=0, stride=1, block=32), masks.causal),
    ("a block mask", lambda: masks.from_block_mask(create_block_mask(lambda b, h, i, j: j >= 0, None, None, Q_LEN, KV_LEN, device="cpu")), None),
]  # fmt: skip


@pytest.mark.parametrize(("made", "plain"), [case[1:] for case in NO_HIDING], ids=[case[0] for case in NO_HIDING])
@pytest.mark.parametrize("packing", ["", ".head"])
def test_what_hides_nothing_more_gives_the_same_bits(made: Any, plain: Any, packing: str) -> None:
    """Leaves that all rows see run as they do without the mask."""
    query, key, value = tensors()
    expected = kernel(plain() if plain else None, VARIANT + packing)(query, key, value)
    assert torch.equal(kernel(made(), VARIANT + packing)(query, key, value), expected)


LANGUAGES = {
    "cpp": VARIANT,
    "cuda": "cuda.serial.t64.x8.r2.k2",
    "hip": "cuda.hybrid.hip.t64.x8.r2.k2.w2.s2.last_block.stages2",
    "opencl": "cuda.serial.opencl.t64.x8.r2.k2.shared",
    "triton": "triton.serial.ieee.m16.n16.warps4.stages1",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_nobody_sees_is_not_even_loaded(language: str, tmp_path: Path) -> None:
    """Not a number in keys and values of whole leaves that no row of any tile sees: it is met nowhere."""
    query, key, value = tensors(50, 250)
    hidden = slice(64, 192)
    kept = [torch.cat([x[:, :, : hidden.start], x[:, :, hidden.stop :]], 2) for x in (key, value)]
    expected = by_definition(query, *kept, torch.tensor(True))
    key[:, :, hidden], value[:, :, hidden] = torch.nan, torch.nan
    layout = torch.tensor([True, False, False, True])
    ends = torch.full((250,), 50)
    ends[hidden] = 0
    bounds = torch.stack([ends, torch.zeros_like(ends)], -1)[None, None]
    sizes = {"partialq": 50, "partialk": 64}
    partial = AttnMask("blocks_partial", operands={**sizes, "partial": layout.int(), "bits": [0]})
    for mask in (masks.blocks(layout, 64, 64), masks.columns(bounds, False), partial):
        problem = mask.of(Problem(head_dim=16))
        built = running.kernel(language, space.parse(LANGUAGES[language]), problem, tmp_path / mask.mask)
        assert close(built(query, key, value, operands=mask.in_order(query, key)), expected), mask


def test_lanes_of_one_row_and_of_many_agree() -> None:
    """Decoding shares a vector among keys; a leaf longer than a word of bits, and blocks that begin anywhere."""
    isa = host_cpu().isas[0]
    lanes = cpp.ISAS[isa].lanes
    query, key, value = tensors(1, KV_LEN)
    torchs = create_block_mask(
        lambda b, h, i, j: j % 3 != h % 2, None, HEADS, 1, KV_LEN, device="cpu", BLOCK_SIZE=(16, 48)
    )
    for mask in (masks.from_block_mask(torchs), masks.columns(torch.arange(KV_LEN)[None, None, :, None] % 2, True)):
        expected = by_definition(query, key, value, mask.dense(1, HEADS, 1, KV_LEN))
        for variant in (f"c{lanes}.q4.k1.v1.n96", "c4.q2.k2.v4.n48.w2.s2"):
            name = "hybrid" if "w2" in variant else "serial"
            assert close(kernel(mask, f"cpp.{name}.{isa}.l{lanes}.{variant}")(query, key, value), expected)

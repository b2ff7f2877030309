"""torch's own kernels as rivals: FlexAttention stays compiled however many shapes it is raced on, and its masks cost nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.generate import sdpa
from elsa_tune.generate.backends import Built
from elsa_tune.generate.sdpa.block_masks import block_mask
from elsa_tune.parts import mask as masks
from elsa_tune.problem import Problem
from elsa_tune.space import parse

FLEX = parse("sdpa.flex")


def flex(problem: str) -> Any:
    return sdpa.load(Built(str(FLEX)), FLEX, Problem.parse(problem))


def test_flex_attention_is_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's limit is eight recompilations of one code object; after that it calls the function eagerly."""
    compiled: list[int] = []

    def counted(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    shapes = [(1, 2, 16 + 4 * n, 8) for n in range(4)]
    for number, shape in enumerate(shapes, 1):
        q, k, v = (torch.randn(shape) for _ in range(3))
        kernel = flex(f"fp32.d8@b1.h2.q{shape[2]}.k{shape[2]}")
        assert torch.allclose(kernel(q, k, v), scaled_dot_product_attention(q, k, v), atol=1e-5)
        kernel(q, k, v)
        assert len(compiled) == number, "once for each shape, and never by hand"


@pytest.mark.parametrize(("q_len", "kv_len"), [(128, 128), (300, 300), (512, 256), (256, 512), (1, 700), (200, 130), (513, 90)])  # fmt: skip
@pytest.mark.parametrize("mask", ["causal", "causal_lower_right", "window", "prefix", "causal+window", "prefix+window"])
def test_block_masks_are_torchs(q_len: int, kv_len: int, mask: str) -> None:
    operands = tuple(150 if name == "left" else 20 for name in masks.get(mask).integers)
    mine = block_mask(mask, q_len, kv_len, operands, torch.device("cpu"))
    dense = Problem(head_dim=1, mask=mask, q_len=q_len, kv_len=kv_len, integers=operands).dense()
    torchs = create_block_mask(lambda b, h, i, j: dense[i, j], None, None, q_len, kv_len, device="cpu")
    position, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    assert torch.equal(mine.mask_mod(None, None, position, key).expand(q_len, kv_len), dense)
    assert mine.seq_lengths == torchs.seq_lengths and mine.BLOCK_SIZE == torchs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(mask, f"{kind}_num_blocks")[0, 0] for mask in (mine, torchs))
        assert torch.equal(counts, others), kind
        places, theirs = (getattr(mask, f"{kind}_indices")[0, 0] for mask in (mine, torchs))
        for row, count in enumerate(counts.tolist()):
            assert torch.equal(places[row, :count].sort().values, theirs[row, :count].sort().values), (kind, row)

"""torch's own kernels as rivals: FlexAttention stays compiled however many shapes it is raced on, and its masks cost nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from elsa_tune.device import host_cpu
from elsa_tune.generate import lawful, sdpa
from elsa_tune.generate import operands as given
from elsa_tune.generate.backends import Built
from elsa_tune.generate.posed import Posed, posed
from elsa_tune.generate.sdpa.block_masks import block_mask
from elsa_tune.generate.sdpa.derived import Derived
from elsa_tune.generate.sdpa.runs import RunsKernel, runs
from elsa_tune.parts import mask as masks
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.space import parse

FLEX = parse("sdpa.flex")


def flex(problem: str) -> Any:
    return sdpa.load(Built(str(FLEX)), FLEX, Problem.parse(problem))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_and_eager_attention_know_scores_and_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # FlexAttention itself, not its compiler
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    problem = Problem.parse("fp32.d16.causal+lengths.softcap@b2.h4.kv2.q50.k60.softcap1.5")
    inputs = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    rows = reference.every_row(problem)
    truth = reference.attention_rows(problem, inputs, rows)
    for kernel in (flex(str(problem)), sdpa.EagerKernel(problem)):
        out = kernel(inputs.query, inputs.key, inputs.value, operands=inputs.operands)
        assert float((out[rows.batch, rows.head, rows.position].double() - truth).abs().max()) < 2e-6


def test_flex_attention_is_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's limit is eight recompilations of one code object; after that it calls the function eagerly."""
    compiled: list[int] = []

    def counted(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    shapes = [(1, 2, 16 + 4 * n, 8) for n in range(4)]
    with torch._dynamo.config.patch(recompile_limit=2):
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
    problem = Problem(head_dim=1, mask=mask, q_len=q_len, kv_len=kv_len, integers=operands)
    mine = block_mask(Posed(problem, dict(problem.numbers), torch.device("cpu")))
    dense = problem.dense()
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


@pytest.mark.parametrize("mask", ["lengths", "causal+lengths", "lengths+window"])
def test_block_masks_of_sequences_are_torchs(mask: str) -> None:
    q_len, kv_len, lengths = 300, 200, torch.tensor([0, 200, 130, 1])
    problem = Problem(head_dim=1, mask=mask, batch=4, q_len=q_len, kv_len=kv_len)
    problem = problem.reshaped(integers=tuple(50 for _ in masks.get(mask).integers))
    mine = block_mask(Posed(problem, {**problem.numbers, "lengths": lengths}, torch.device("cpu")))
    dense = problem.dense(lengths=lengths[:, None, None])
    torchs = create_block_mask(lambda b, h, i, j: dense[b, i, j], 4, None, q_len, kv_len, device="cpu")
    batch, position, key = torch.arange(4)[:, None, None], torch.arange(q_len)[:, None], torch.arange(kv_len)
    assert torch.equal(mine.mask_mod(batch, None, position, key).expand(4, q_len, kv_len), dense)
    assert torch.equal(mine.to_dense(), torchs.to_dense())


@pytest.mark.parametrize("turn", range(3))
def test_block_masks_of_ranges_are_torchs(turn: int) -> None:
    """But for blocks that lie between those of their first and last row and nobody sees, where rows in between see nothing."""
    q_len, kv_len = 300, 200
    problem = Problem(head_dim=1, mask="ranges", batch=2, q_len=q_len, kv_len=kv_len)
    own = given.named(problem, given.example(problem, turn))
    mine = block_mask(Posed(problem, own, torch.device("cpu")))
    dense = Posed(problem, own, torch.device("cpu")).dense().expand(2, 1, q_len, kv_len)[:, 0]
    torchs = create_block_mask(lambda b, h, i, j: dense[b, i, j], 2, None, q_len, kv_len, device="cpu")
    batch, position, key = torch.arange(2)[:, None, None], torch.arange(q_len)[:, None], torch.arange(kv_len)
    assert torch.equal(mine.mask_mod(batch, None, position, key).expand(2, q_len, kv_len), dense)
    kept, needed = mine.to_dense().expand(2, 1, -1, -1), torchs.to_dense()
    assert torch.equal(kept, needed) if dense.any(2).all() else bool((kept >= needed).all())


@pytest.mark.parametrize("order", ["bhsd", "bshd"])
@pytest.mark.parametrize("turn", range(-1, 3))
def test_rows_that_see_the_same_keys_are_one_call(turn: int, order: str) -> None:
    problem = Problem.parse(f"fp32.d16.ranges@b2.h4.kv2.q50.k60.{order}".removesuffix(".bhsd"))
    x = reference.random_inputs(problem, torch.Generator().manual_seed(0)).ordered(problem.orders)
    operands = given.example(problem, turn) if turn >= 0 else given.typical(problem)
    lse = torch.empty(2, 4, 50)
    out = RunsKernel(problem)(x.query, x.key, x.value, lse=lse, operands=operands)
    case, rows = replace(x, operands=operands), reference.every_row(problem)
    truth, sums = reference.attention_rows_with_lse(problem, case, rows)
    assert reference.measure_error(problem, case, rows, out, truth).allowed
    assert not reference.lse_trouble(problem, case, rows, lse, sums)
    assert out.stride() == torch.empty_like(x.query).stride()


def test_runs_are_sequences_and_raced_for_what_has_some() -> None:
    problem = Problem.parse("fp32.d16.ranges@b1.h2.q6.k6")
    x = torch.zeros(1, 2, 6, 16)
    assert runs(posed(problem, given.example(problem, 0), x, x)) == [[[0, 1, 0, 1], [1, 3, 1, 3], [3, 6, 3, 6]]]
    kernel = parse("sdpa.runs")
    assert lawful.refusal(kernel, problem, host_cpu()) is None
    for other in (
        "fp32.d16",
        "fp32.d16.lengths",
        "fp32.d16.causal+ranges",
        "fp32.d16.dense+ranges",
        "fp32.d16.ranges.alibi",
    ):
        assert lawful.refusal(kernel, Problem.parse(other), host_cpu())


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 200), (256, 512), (1, 130)])
@pytest.mark.parametrize("mask", ["dense", "causal+dense", "blocks", "blocks_partial+causal", "columns+columns_upper"])
def test_block_masks_of_tests_are_torchs(mask: str, q_len: int, kv_len: int) -> None:
    """Blocks that nobody sees are not visited, those that all see not tested: else the rival would be slow."""
    problem = Problem(head_dim=1, mask=mask, batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len)
    problem = problem.reshaped(integers=tuple(64 for _ in masks.get(mask).integers))
    for operands in (given.typical(problem), given.example(problem, 0)):
        posed = Posed(problem, given.named(problem, operands), torch.device("cpu"))
        mine, dense = block_mask(posed), posed.dense().expand(2, 4, q_len, kv_len)
        torchs = create_block_mask(lambda b, h, i, j, d=dense: d[b, h, i, j], 2, 4, q_len, kv_len, device="cpu")
        for kind in ("kv_num_blocks", "full_kv_num_blocks"):
            counts, others = getattr(mine, kind), getattr(torchs, kind)
            assert torch.equal(counts.expand_as(others), others), kind
        assert torch.equal(mine.to_dense().expand(2, 4, -1, -1), torchs.to_dense())


def test_what_is_made_of_operands_is_made_once_and_anew_for_others() -> None:
    made: list[Posed] = []
    derived, problem = Derived(made.append, 2), Problem.parse("fp32.d16.lengths@b2.h1.q5.k7")
    query, lengths = torch.zeros(2, 1, 5, 16), torch.tensor([3, 4])
    for _ in range(3):
        derived.of(problem, (lengths,), query, query)
    assert len(made) == 1
    lengths[0] = 1
    derived.of(problem, (lengths,), query, query)
    derived.of(problem, (lengths.clone(),), query, query)
    assert len(made) == 3

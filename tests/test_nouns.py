"""Problem, Device, Variant and Space: what is spelled is read back, and what is impossible is refused with a reason."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elsa_tune import space, workload
from elsa_tune.device import Device, detect, host_cpu
from elsa_tune.dispatch import serving
from elsa_tune.errors import BadDevice, BadProblem, BadVariant, BadWorkload
from elsa_tune.generate import backends, cpp, cuda, lawful, triton
from elsa_tune.generate.render import undeclared
from elsa_tune.order import CONTIGUOUS, ORDERS
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.problem import DIRECTIONS, PRECISIONS, Problem
from elsa_tune.prove import reference
from elsa_tune.space import Space

AVX512 = Device("cpu", "amd_f26m2", "zen5", 2)
H200 = Device("cuda", "nvidia_h200", "sm_90", 132)
NEON = Device("cpu", "arm_0x41_0xd0c", "neoverse_n1", 4)

sizes = st.integers(1, 1 << 20)
reals = st.floats(1e-30, 1e30)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv_heads, mask = (
        draw(st.integers(1, 16)),
        draw(st.sampled_from((*masks.names(), "causal+window", "lengths+prefix+window"))),
    )
    score = draw(st.sampled_from(scores.names()))
    return Problem(
        dtype=draw(st.sampled_from(elements.names())), head_dim=draw(st.integers(1, 512)), value_dim=draw(st.integers(1, 512)),
        mask=mask, integers=tuple(draw(sizes) for _ in masks.get(mask).integers), precision=draw(st.sampled_from(PRECISIONS)),
        score=score, reals=tuple(min(draw(reals), one.below / 2) for one in scores.get(score).ones for _ in one.reals),
        direction=draw(st.sampled_from(DIRECTIONS)), batch=draw(sizes), heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads, q_len=draw(sizes), kv_len=draw(sizes),
    )  # fmt: skip


@given(problems())
def test_problem_reads_what_it_spells(problem: Problem) -> None:
    assert Problem.parse(str(problem)) == problem
    assert Problem.parse(problem.family).family == problem.family


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fp32",
        "fp32.d64@b1",
        "fp128.d64",
        "fp32.d0",
        "fp32.d64@b1.h3.kv2.q1.k1",
        "d64.fp32",
        "fp32.d64@b1.h8.q1.k0",
        "fp32.d64.window@b1.h1.q4.k5",
        "fp32.d64.window@b1.h1.q4.k5.right3.left2",
        "fp32.d64@b1.h1.q4.k5.left3",
        "fp32.d64.window+causal",
        "fp32.d64.causal+causal",
        "fp32.d64.softcap@b1.h1.q4.k5",
        "fp32.d64.softcap@b1.h1.q4.k5.softcap0",
        "fp32.d64.dropout@b1.h1.q4.k5.dropout1",
        "fp32.d64.softcap@b1.h1.q4.k5.softcap1.softcap1",
        "fp32.d64.softcap.causal@b1.h1.q4.k5.softcap1",
        "fp32.d64.softcap+softcap",
        "fp32.d64.window@b1.h1.q4.k5.left1.5.right2",
    ],
)
def test_bad_problem(text: str) -> None:
    with pytest.raises(BadProblem):
        Problem.parse(text)


def test_problem_counts_what_the_mask_lets_through() -> None:
    for q_len, kv_len in ((5, 5), (3, 9), (9, 3), (1, 7)):
        problem = Problem(head_dim=4, mask="causal", q_len=q_len, kv_len=kv_len)
        assert problem.seen_pairs == sum(j <= i for i in range(q_len) for j in range(kv_len))
        assert problem.flops == 4 * problem.seen_pairs * 4
        window = Problem(head_dim=4, mask="window", integers=(2, 1), q_len=q_len, kv_len=kv_len)
        assert window.seen_pairs == sum(i - 2 <= j <= i + 1 for i in range(q_len) for j in range(kv_len))


def test_a_masks_integers_are_its_own() -> None:
    with pytest.raises(BadProblem, match="left from 0 to"):
        Problem(head_dim=4, mask="window", integers=(2,))
    with pytest.raises(BadProblem, match="integers"):
        Problem(head_dim=4, mask="causal", integers=(2,))
    assert Problem(head_dim=4, mask="window").numbers == {"left": 0, "right": 0}, "of a family alone"


def test_a_scores_numbers_are_its_own() -> None:
    for cap in (0.1, 30, 50.0, 1e-05, 2e29, 1 / 3):
        problem = Problem(head_dim=4, score="softcap", reals=(cap,))
        assert Problem.parse(str(problem)) == problem and problem.numbers == {"softcap": cap}
    assert str(Problem(head_dim=4, score="softcap", reals=(50,))).endswith(".softcap50")
    for wrong in ((0.0,), (-1.0,), (float("nan"),), (float("inf"),), (1e31,), (1e-31,), (1.0, 2.0)):
        with pytest.raises(BadProblem, match="softcap"):
            Problem(head_dim=4, score="softcap", reals=wrong)
    with pytest.raises(BadProblem, match="numbers"):
        Problem(head_dim=4, reals=(1.0,))


def test_pairs_of_sequences_are_of_a_typical_batch() -> None:
    one = Problem.parse("fp32.d4.lengths@b1.h1.q8.k400")
    assert one.seen_pairs == 8 * 300 and one.reshaped(batch=2).seen_pairs == 8 * (250 + 350) // 2
    assert Problem.parse("fp32.d4.causal+lengths@b1.h1.q8.k400").seen_pairs == 36


@pytest.mark.parametrize("device", [AVX512, NEON, host_cpu()])
def test_device_reads_what_it_spells(device: Device) -> None:
    assert Device.parse(str(device)) == device


def test_kinship() -> None:
    assert AVX512.kinship(AVX512) == "exact"
    assert AVX512.kinship(Device("cpu", "amd_f26m2", "zen5", 64)) == "model"
    assert AVX512.kinship(Device("cpu", "intel_f6m143", "sapphirerapids", 2)) == "arch"
    assert AVX512.kinship(NEON) == "family"
    assert AVX512.kinship(Device("cuda", "h200", "sm90", 132)) is None


def test_detect() -> None:
    assert detect("auto") == detect("cpu") == detect(str(host_cpu())) == [host_cpu()]
    with pytest.raises(BadDevice, match="use auto"):
        detect("cuda:h200-sm90-c132")


@pytest.mark.parametrize("name", backends.names())
def test_variants_read_what_they_spell(name: str) -> None:
    search_space = Space.read(name)
    problem = Problem.parse("fp32.d64@b1.h8.q1024.k1024")
    for seed in range(20):
        device = H200 if name == "cuda" else AVX512
        variant = next(lawful.variants(search_space, problem, device, rng=random.Random(seed)))
        assert space.parse(str(variant)) == variant
        assert lawful.refusal(variant, problem, device) is None


@pytest.mark.parametrize(
    "text",
    [
        "cpp",
        "cpp.serial",
        "cpp.serial.avx2.l8.q2.k5.v5.n121",
        "cpp.serial.serial.avx2",
        "gpu.x",
        "../cpp",
        "cpp.serial.avx2.l8.q2.k5.v5.n120.z9",
    ],
)
def test_bad_variant(text: str) -> None:
    with pytest.raises(BadVariant):
        space.parse(text)


@pytest.mark.parametrize("device", [AVX512, NEON])
@pytest.mark.parametrize(
    "name",
    [
        "fp32.d64@b1.h8.q1024.k1024",
        "fp32.d128@b1.h32.kv8.q1.k4096",
        "fp32.d33.v40.causal@b1.h1.q7.k7",
        "fp64.d64@b1.h8.q1024.k1024",
        "fp64.d128@b1.h8.kv8.q1.k4096",
    ],
)
def test_every_enumerated_variant_obeys_every_law(device: Device, name: str) -> None:
    search_space, problem = Space.read("cpp"), Problem.parse(name)
    found = list(islice(lawful.variants(search_space, problem, device), 500))
    assert found and len(set(map(str, found))) == len(found)
    assert all(lawful.refusal(v, problem, device) is None for v in found)


def test_nearest_variants_come_first() -> None:
    search_space, problem = Space.read("cpp"), Problem.parse("fp32.d64@b1.h8.q1024.k1024")
    wanted = search_space.parse("cpp.serial.avx512.l16.q3.k8.v8.n192")
    assert next(lawful.variants(search_space, problem, AVX512, prefer=wanted.axes)) == wanted


@pytest.mark.parametrize(
    ("spelling", "problem", "law"),
    [
        ("cpp.serial.neon.l4.q4.k6.v6.n96", "fp32.d64@b1.h8.q99.k99", "isa_is_here"),
        ("cpp.serial.avx512.l4.q4.k6.v6.n96", "fp32.d64@b1.h8.q99.k99", "lanes_fit_isa"),
        ("cpp.serial.avx512.l16.c16.q4.k1.v4.n32", "fp32.d72@b1.h8.q1.k99", "chunk_divides"),
        ("cpp.serial.avx512.l16.c16.q4.k1.v4.n32", "fp32.d64@b1.h8.q99.k99", "rows_fill_vectors"),
        ("cpp.serial.avx512.l16.q4.k12.v6.n96", "fp32.d64@b1.h8.q99.k99", "tiles_fill_registers"),
        ("cpp.serial.avx512.l16.q1.k3.v6.n96", "fp32.d64@b1.h8.q99.k99", "tiles_fill_registers"),
        ("cpp.serial.avx512.l16.q4.k5.v6.n96", "fp32.d64@b1.h8.q99.k99", "leaf_holds_key_tiles"),
        ("cpp.serial.avx512.l16.q1.k6.v24.n96", "fp32.d64.v16@b1.h8.q99.k99", "value_tile_fits"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.s4", "fp32.d64@b1.h8.q99.k99", "scan_merges_states"),
        ("cpp.blelloch.avx512.l16.q4.k6.v6.n96", "fp32.d64@b1.h8.q99.k99", "scan_merges_states"),
        ("cpp.hybrid.avx512.l16.q4.k6.v6.n96.s4", "fp32.d64@b1.h8.q99.k99", "scan_merges_states"),
        ("cpp.blelloch.avx512.l16.q4.k6.v6.n96.s4", "fp32.d64.backward@b1.h8.q99.k99", "scan_merges_states"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.d2", "fp32.d64.backward@b1.h8.q99.k99", "axes_of_direction"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.head", "fp32.d64.backward@b1.h8.q99.k99", "packed_heads_are_little"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.products7", "fp32.d64@b1.h8.q99.k99", "axes_of_direction"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.g2", "fp32.d16.backward@b1.h8.q99.k99", "grad_tile_hides_latency"),
        (
            "cpp.serial.avx512.l16.q4.k6.v6.n96.products7.head",
            "fp32.d64.backward@b1.h8.q99.k99",
            "packed_heads_are_of_tasks",
        ),
        ("cpp.blelloch.avx512.l16.q4.k6.v6.n96.s4.head", "fp32.d64@b1.h8.q99.k99", "packed_heads_are_read_again"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.head", "fp32.d64@b1.h8.q64.k99", "packed_heads_are_read_again"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.head", "fp32.d64@b1.h8.q99.k99999", "packed_heads_fit"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.d4", "fp32.d48@b1.h8.q99.k99", "head_parts_are_long"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96", "bf16.d64@b1.h8.q99.k99", "narrow_elements_are_packed"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.e4", "fp32.d64@b1.h8.q99.k99", "exp_is_exact"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.e6", "fp64.d64@b1.h8.q99.k99", "exp_is_exact"),
        ("cpp.serial.avx512.l16.q4.k6.v6.n96.e10", "fp32.d64@b1.h8.q99.k99", "exp_is_noticed"),
        ("cpp.serial.avx512.l16.c16.q4.k1.v4.n32.e10", "fp64.d64@b1.h8.q1.k99", "chunk_divides"),
    ],
)
def test_laws_refuse_with_their_reason(spelling: str, problem: str, law: str) -> None:
    reason = lawful.refusal(space.parse(spelling), Problem.parse(problem), AVX512)
    assert reason and reason.startswith(f"{law}: ")


def test_every_law_is_tested() -> None:
    of_texts = {"state_has_text", "state_is_of_operator"}  # tests/contracts/test_unknown_parts.py
    marks = test_laws_refuse_with_their_reason.pytestmark  # type: ignore[attr-defined]
    assert {case[2] for case in marks[0].args[1]} == {law.__name__ for law in cpp.LAWS} - of_texts


PARTS = {"scores", "score", "weighing", "scored", "placed", "reads", "arguments", "elements"}
"""What templates are told of a family's scores and operands."""


def test_axes_and_templates_agree_both_ways() -> None:
    axes = {axis.name for axis in Space.read("cpp").axes}
    family = {
        "head_dim",
        "value_dim",
        "mask",
        "family",
        "variant",
        "block_m",
        "element",
        "real",
        "operator",
        "altered",
        *PARTS,
    }
    imported = {"storage", "carried", "operator_of", "leaf", "test"}
    derived = {"block_scan", "grid_scan", "exp", "scratch_bytes"}
    of_gradients = {
        "query_columns",
        "value_columns",
        "reliable",
        "row_gradients",
        "dense_gradients",
        "bends",
        "direction",
    }
    used = {direction: undeclared(name) for direction, name in cpp.TEMPLATES.items()}
    assert not axes - used["forward"] - used["backward"]
    assert used["forward"] - axes <= family | derived | imported | of_gradients
    assert used["backward"] - axes <= family | derived | imported | of_gradients and of_gradients <= used["backward"]


def test_triton_axes_and_templates_agree_both_ways() -> None:
    axes = {axis.name for axis in Space.read("triton").axes}
    family = {"head_dim", "value_dim", "mask", "family", "variant", "operator", "element", *PARTS} - {"elements"}
    derived = {"block_scan", "grid_scan", "merges", "head_parts", "value_parts", "scratch_bytes"}
    derived |= {"finish_m", "finish_warps", "test"}
    shared, own = {"bends", "direction", "row_gradients"}, {"dense_gradients", "products", "reliable"}
    used = {direction: undeclared(name) for direction, name in triton.TEMPLATES.items()}
    forward = axes - {"dims", "products"} | family | derived | shared
    assert used["forward"] == forward, "dims decides head_parts and value_parts"
    assert used["backward"] <= axes | family | derived | shared | own and shared | own <= used["backward"]


def test_cuda_axes_and_templates_agree_both_ways() -> None:
    axes = {axis.name for axis in Space.read("cuda").axes}
    family = {"head_dim", "value_dim", "mask", "element", "family", "variant", "operator", *PARTS}
    derived = {
        "block_scan",
        "grid_scan",
        "tiling",
        "parts",
        "exp_degree",
        "state",
        "exp_of",
        "sight",
        "scheduled",
        "carried",
        "test",
    }
    for name in cuda.TEMPLATES.values():
        assert undeclared(name) == axes - {"slice"} | family | derived, "slice decides tiling"


def test_workloads() -> None:
    assert "default" in workload.names()
    found = workload.read("default", host_cpu())
    assert {p.head_dim for p in found} == {32, 64, 80, 128} and {128, 197, 512, 577, 2305} <= {p.q_len for p in found}
    assert any(p.q_len == 1 and p.group > 1 for p in found) and any(p.mask == "causal" and p.group > 1 for p in found)
    assert {"bshd", "fused", "bshd-bhsd-bhsd", CONTIGUOUS} == {p.order for p in found} and len(found) <= 21
    assert {p.dtype for p in found} == {"fp32", "bf16"} and any("window" in p.mask for p in found)
    assert any(p.mask == "dense" for p in found) and any(p.score == "bias" for p in found)


@pytest.mark.parametrize("content", ["", "x = 1", "[a]\nproblems = 3", "[a]\nproblems = []", "not toml ["])
def test_bad_workload(content: str, tmp_path: object) -> None:
    path = tmp_path / "w.toml"  # type: ignore[operator]
    path.write_text(content)
    with pytest.raises(BadWorkload):
        workload.read(str(path), host_cpu())


def test_missing_workload() -> None:
    with pytest.raises(BadWorkload, match="default"):
        workload.read("no-such-workload", host_cpu())


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("fp32.d64@b8.h12.q512.k512.bshd", "fp32.d64@b8.h12.q512.k512.bshd"),
        ("fp32.d64@b8.h12.q512.k512.bhsd-bhsd-bhsd", "fp32.d64@b8.h12.q512.k512"),
        ("fp32.d64@b8.h12.q512.k512.bshd-bhsd-bhsd.graph", "fp32.d64@b8.h12.q512.k512.bshd-bhsd-bhsd.graph"),
        ("fp32.d64@b8.h12.q1.k512.bshd-cache-cache", "fp32.d64@b8.h12.q1.k512.cache"),  # one row has no order
        ("fp32.d64@b8.h1.q512.k512.bshd", "fp32.d64@b8.h1.q512.k512"),  # nor has one head
    ],
)
def test_memory_orders_are_spelled_in_the_plainest_way(given: str, spelled: str) -> None:
    problem = Problem.parse(given)
    assert str(problem) == spelled and Problem.parse(spelled) == problem


@pytest.mark.parametrize("order", ["bshd-bshd", "sbhd"])
def test_an_unknown_memory_order_is_refused(order: str) -> None:
    with pytest.raises(BadProblem, match="order"):
        Problem(head_dim=64, heads=2, q_len=8, kv_len=8, order=order)


@pytest.mark.parametrize("orders", [*ORDERS, "bshd-bhsd-bhsd", "bshd-cache-cache", "bhsd-bhsd-fused"])
@pytest.mark.parametrize("shape", ["b2.h4.q9.k9", "b1.h4.kv2.q9.k9", "b3.h6.kv1.q5.k8", "b1.h4.q1.k9", "b2.h1.q7.k7"])
def test_a_memory_order_is_recognised_as_it_is_made(orders: str, shape: str) -> None:
    """Tensors arranged in an order hold the same values, and pose the problem that spells the order."""
    problem = Problem.parse(f"fp32.d8@{shape}.{orders}")
    plain = reference.random_inputs(problem, torch.Generator().manual_seed(0))
    made = plain.ordered(problem.orders)
    assert all(torch.equal(a, b) for a, b in zip(made.tensors, plain.tensors, strict=True))
    assert serving.problem_of(*made.tensors, enable_gqa=True) == problem

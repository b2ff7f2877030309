"""Triton: every scan, state and schedule under its interpreter, against float64, with the contracts of every language."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contracts import kernels

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.generate import operands as given
from elsa_tune.generate import triton
from elsa_tune.generate.backends import Kernel
from elsa_tune.parts import mask as masks
from elsa_tune.parts import scan
from elsa_tune.problem import Problem
from elsa_tune.prove import check, gradients, reference

H200 = Device("cuda", "nvidia_h200", "sm_90", 132)
MI300 = Device("hip", "amd_instinct_mi300x", "gfx942", 304)
BIG = "@b1.h8.q4096.k4096"
INTERPRETED = 151
"""Keys of the long cases: the interpreter takes a millisecond for a leaf."""


MASKED = [name for name in masks.names() if name != masks.NONE]
GRADIENTS = [  # loops that are peeled or not, dS^T recomputed or kept, tiles of either kind longer
    "triton.serial.half.m32.n32.warps4.stages1",
    "triton.serial.half.m64.n32.warps4.stages1.products5",
    "triton.serial.ieee.m16.n64.warps4.stages1",
    "triton.serial.ieee.m32.n16.warps4.stages1.products5",
]


def kernel_of(spelling: str, problem: Problem) -> Kernel:
    variant = space.parse(spelling)
    return triton.load(triton.build(variant, problem), variant, problem)


def networks() -> list[str]:
    """Every scan on every level where it has states, with every schedule that merges them."""
    found = ["serial.ieee.m64.n64.warps4.stages1"]
    for name in scan.names():
        if name in ("hillis_steele", "blelloch"):
            found.append(f"{name}.ieee.m64.n32.warps4.stages1.w4")
        if name != "serial":
            workers = ".w2" if name == "hybrid" else ""
            found += [f"{name}.ieee.m64.n32.warps4.stages1{workers}.s4.{s}" for s in ("two_kernels", "last_block")]
    return found


def every_network() -> list[object]:
    """A fold; the others meet in the covering array, and with hostile inputs in `make test-all`."""
    first, *others = networks()
    return [first, *(pytest.param(network, marks=pytest.mark.slow) for network in others)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("state", ["running", "pair.apart"])
@pytest.mark.parametrize("network", every_network())
def test_every_scan_state_and_schedule(network: str, state: str) -> None:
    problem = Problem.parse("fp32.d16.causal" if "hillis" in network else "fp32.d16")
    kernel = kernel_of(f"triton.{network}.{state}".replace(".running", ""), problem)
    kernels.obeys(kernel, problem, [], keys=150, longest=INTERPRETED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "spelling, problem",
    [
        ("triton.serial.half.m64.n64.warps4.stages1", "fp16.d32.causal"),
        ("triton.serial.ieee.m64.n64.warps4.stages1.apart.masked.parts.longest", "fp32.d80.causal@b1.h6.kv2.q1.k1"),
        ("triton.serial.ieee.m64.n64.warps4.stages1.heads.persistent1", "fp32.d40.v72@b1.h6.kv2.q1.k1"),
        ("triton.serial.fma.m16.n64.warps8.stages1.apart.parts", "fp16.d24"),
        ("triton.serial.ieee.m32.n64.warps4.stages1", "fp32.d16.causal+window"),
        ("triton.serial.ieee.m32.n64.warps4.stages1", "fp32.d16.causal+lengths.softcap"),
        ("triton.serial.ieee.m32.n64.warps4.stages1", "fp32.d16.causal.alibi+dropout"),
        pytest.param(
            "triton.blelloch.fma.m16.n32.warps8.stages1.s2.two_kernels.apart", "bf16.d16.v24", marks=pytest.mark.slow
        ),
        pytest.param(
            "triton.blelloch.fma.m16.n64.warps8.stages1.s2.last_block.apart",
            "fp32.strict.d16.causal@b1.h8.kv2.q1.k1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "triton.hybrid.ieee.m16.n32.warps4.stages1.w2.s2.two_kernels", "fp32.d16.lengths", marks=pytest.mark.slow
        ),
        pytest.param(
            "triton.serial.half.m32.n64.warps4.stages1.pair.apart.masked", "bf16.d16.softcap", marks=pytest.mark.slow
        ),
        pytest.param(
            "triton.blelloch.ieee.m32.n64.warps4.stages1.w2", "fp32.d16.causal+window", marks=pytest.mark.slow
        ),
        pytest.param(
            "triton.blelloch.ieee.m32.n64.warps4.stages1.s2.two_kernels.masked",
            "fp32.d16.prefix",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_axes_and_families(spelling: str, problem: str) -> None:
    family = Problem.parse(problem)
    kernels.obeys(kernel_of(spelling, family), family, [], keys=150, longest=INTERPRETED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
@pytest.mark.parametrize("state", ["running", "pair.apart"])
def test_states_of_many_leaves_stay_within_the_bound(state: str) -> None:
    """As long as hostile inputs are on a GPU: outputs and log-sum-exps of a thousand leaves."""
    problem = Problem.parse("fp32.d16")
    kernel = kernel_of(f"triton.serial.ieee.m16.n64.warps4.stages1.{state}".replace(".running", ""), problem)
    long = [
        (posed, x)
        for posed, x in reference.hostile(problem, torch.Generator().manual_seed(0))
        if posed.kv_len == reference.LONG
    ]
    for posed, inputs in long:
        rows = reference.every_row(posed)
        truth, sums = reference.attention_rows_with_lse(posed, inputs, rows)
        out, lse, stray = check.run_with_lse(kernel, inputs)
        error = reference.measure_error(posed, inputs, rows, out, truth)
        assert error.allowed and not stray and not reference.lse_trouble(posed, inputs, rows, lse, sums), inputs.name
    assert len(long) == 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "spelling, problem",
    [
        ("triton.serial.ieee.m32.n32.warps4.stages1", "fp32.d16.backward"),
        pytest.param(
            "triton.serial.ieee.m32.n64.warps4.stages1.parts",
            "fp32.d40.v24.causal.backward@b1.h6.kv2.q1.k1",
            marks=pytest.mark.slow,
        ),
        ("triton.serial.half.m64.n32.warps4.stages1", "fp16.d16.causal.backward"),
        pytest.param("triton.serial.fma.m16.n32.warps8.stages1.apart", "bf16.d16.backward", marks=pytest.mark.slow),
        ("triton.serial.ieee.m16.n64.warps4.stages1.products5", "fp32.d24.v16.causal.backward@b1.h6.kv2.q1.k1"),
        ("triton.serial.half.m64.n32.warps4.stages1.products5", "fp16.d16.backward"),
        ("triton.serial.ieee.m32.n32.warps4.stages1", "fp32.d16.softcap+sinks+dropout.backward"),
        pytest.param(
            "triton.serial.ieee.m32.n32.warps4.stages1", "fp32.d16.causal.alibi.backward", marks=pytest.mark.slow
        ),
        pytest.param(
            "triton.serial.half.m32.n32.warps4.stages1",
            "fp16.d16.causal+lengths.softcap+bias.backward",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "triton.serial.ieee.m16.n16.warps4.stages1.products5",
            "fp32.d16.columns+ranges.bias+softcap.backward",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "triton.serial.fma.m16.n32.warps8.stages1.apart",
            "fp32.d16.blocks+causal.alibi_lower_right+bias.backward@b1.h6.kv2.q1.k1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients(spelling: str, problem: str) -> None:
    family = Problem.parse(problem)
    variant = space.parse(spelling)
    verdict = check.check_family(triton.load(triton.build(variant, family), variant, family), family, [])
    assert not verdict.reason and 0 < verdict.constant < 4, verdict


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("spelling", GRADIENTS)
@pytest.mark.parametrize(
    "mask",
    [
        "causal+window",
        "causal_lower_right+prefix",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MASKED if not masks.get(name).arrays),
    ],
)
def test_gradients_of_masks(mask: str, spelling: str) -> None:
    """Memory that nobody wrote holds NaN: what is read of kept scores was written."""
    family = Problem.parse(f"{'fp16' if 'half' in spelling else 'fp32'}.d16.v8.{mask}.backward")
    variant, generator = space.parse(spelling), torch.Generator().manual_seed(0)
    kernel = triton.load(triton.build(variant, family), variant, family)
    torch.use_deterministic_algorithms(True)
    try:
        for example in masks.get(mask).examples[:2]:
            for q_len, kv_len in ((37, 70), (70, 37)):
                lengths = {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": q_len, "kv_len": kv_len}
                posed = family.reshaped(**lengths, integers=tuple(example.values()))
                inputs = reference.random_inputs(posed, generator)
                inputs = gradients.with_forward(posed, inputs, generator)
                error = check.gradient_error(kernel, posed, inputs)
                assert error.allowed, (example, lengths, error)
    finally:
        torch.use_deterministic_algorithms(False)


def posed_gradients(family: Problem, turn: int, q_len: int, kv_len: int) -> tuple[Problem, reference.Inputs]:
    """A problem of the family with an example's operands, and what its forward pass saved."""
    generator = torch.Generator().manual_seed(turn)
    posed = given.with_example(family, turn).reshaped(batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len)
    inputs = replace(reference.random_inputs(posed, generator), operands=given.example(posed, turn))
    return posed, gradients.with_forward(posed, inputs, generator)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "spelling",
    [GRADIENTS[0], GRADIENTS[3], *(pytest.param(spelling, marks=pytest.mark.slow) for spelling in GRADIENTS[1:3])],
)
@pytest.mark.parametrize("mask", [name for name in MASKED if masks.get(name).arrays])
def test_gradients_of_masks_with_tensors(mask: str, spelling: str) -> None:
    """Memory that nobody wrote holds NaN: what is read of kept scores was written, of tiles that nobody sees too."""
    family = Problem.parse(f"{'fp16' if 'half' in spelling else 'fp32'}.d16.v8.{mask}.backward")
    variant = space.parse(spelling)
    kernel = triton.load(triton.build(variant, family), variant, family)
    torch.use_deterministic_algorithms(True)
    try:
        for turn in range(min(3, given.turns(family))):
            posed, inputs = posed_gradients(family, turn, *((37, 70) if turn % 2 else (70, 37)))
            error = check.gradient_error(kernel, posed, inputs)
            assert error.allowed, (turn, error)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "shape", [(2, 4, 37, 50), (1, 1, 37, 50), (2, 1, 37, 50), (1, 4, 1, 50), (2, 4, 37, 1), (2, 1, 1, 50), (1, 1, 1, 1)]
)
def test_what_shares_a_bias_adds_up(shape: tuple[int, ...]) -> None:
    """Beside a row's slopes and a mask that skips tiles, and twice the same bits; what is not asked for is None."""
    family = Problem.parse("fp32.d16.causal+columns.bias+softcap+alibi.backward")
    variant = space.parse("triton.serial.ieee.m32.n32.warps4.stages1")
    kernel = triton.load(triton.build(variant, family), variant, family)
    posed, inputs = posed_gradients(family, 0, 37, 50)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    operands = tuple(bias if one.name == "bias" else x for one, x in zip(posed.declared, inputs.operands, strict=True))
    generator = torch.Generator().manual_seed(0)
    inputs = gradients.with_forward(posed, replace(inputs, operands=operands), generator)
    assert inputs.forward is not None and check.gradient_error(kernel, posed, inputs).allowed
    call = *inputs.tensors, inputs.scale, inputs.operands, None
    found = [kernel(*call, asked) for asked in ((True,) * 5, (True,) * 5, (True, False, True, True))]  # type: ignore[operator]
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    assert [x is not None for x in found[2]] == [True, False, True, True, False] and found[0][3].shape == shape
    assert all(x is None or torch.equal(x, y) for x, y in zip(found[2], found[0], strict=True))


def test_kept_score_gradients_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has room for a few heads at a time, or for all: dQ is the same; dK and dV are what they are without it."""
    problem = Problem.parse("fp16.d16.causal.backward")
    found = []
    for products, scratch in ((7, None), (5, None), (5, 1)):
        variant = space.parse(f"triton.serial.half.m32.n32.warps4.stages1.products{products}")
        module = triton._module(triton.build(variant, problem).path)  # type: ignore[arg-type]
        if scratch:
            monkeypatch.setattr(module, "SCRATCH_BYTES", scratch)
        generator = torch.Generator().manual_seed(0)
        q, k, v, out, grad = (torch.randn(2, 2, 70, 16, generator=generator).half() for _ in range(5))
        found.append(module.gradients(q, k, v, out, torch.full((2, 2, 70), 3.0), grad))
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_counters_of_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches leave counters as they found them; streams and graphs do not share any."""
    problem = Problem.parse("fp32.d16")
    variant = space.parse("triton.blelloch.ieee.m16.n16.warps4.stages1.s2.last_block")
    module = triton._module(triton.build(variant, problem).path)  # type: ignore[arg-type]
    x = torch.randn(1, 2, 40, 16)
    assert torch.equal(module.attention(x, x, x), module.attention(x, x, x))
    [counters] = module._arrivals.values()
    assert counters.numel() == 8 and not counters.any(), "two heads of three tiles, in whole vectors, and all 0 again"

    def taken(stream: int, captured: bool, count: int = 6) -> torch.Tensor:
        monkeypatch.setattr(module, "place", lambda x: (x.device, stream, captured))
        found: torch.Tensor = module.arrivals_of(x, count)
        assert found.numel() >= count and not found.any()
        return found

    first, second = taken(1, False), taken(2, False)
    assert taken(1, False) is first and taken(1, False, 99) is taken(1, False, 6), "grown once, kept then"
    graphs = [taken(1, True), taken(1, True), taken(2, True), taken(2, True, module.ARRIVALS), taken(2, True)]
    memory = [range(t.data_ptr(), t.data_ptr() + 4 * t.numel(), 4) for t in (first, second, counters, *graphs)]
    assert len(set().union(*memory)) == sum(map(len, memory)), "nobody shares a counter"
    assert all(t.data_ptr() % 16 == 0 for t in graphs), "a launch would compile anew"


def test_offsets_outgrow_32_bits() -> None:
    """Keys whose distance in memory is more than 2^31 elements; only the touched pages of it exist."""
    problem, variant = Problem.parse("fp16.d16"), space.parse("triton.serial.half.m16.n16.warps4.stages1")
    kernel = triton.load(triton.build(variant, problem), variant, problem)
    memory, generator = torch.empty(2**31 + 2**21, dtype=torch.float16), torch.Generator().manual_seed(0)
    key, value = (memory.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1), start) for start in (0, 64))
    query = torch.randn(1, 1, 5, 16, generator=generator).half()
    for x in (key, value):
        x.copy_(torch.randn(1, 1, 3, 16, generator=generator))
    expected = kernel(query, key.clone(), value.clone())
    assert torch.equal(kernel(query, key, value), expected)

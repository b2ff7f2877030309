"""Triton: every scan, state and schedule under its interpreter, against float64, with the contracts of every language."""

from __future__ import annotations

import pytest
import torch
from contracts import kernels

from elsa_tune import check, reference, scan, space
from elsa_tune.backends import Kernel, triton
from elsa_tune.device import Device
from elsa_tune.problem import Problem

H200 = Device("cuda", "nvidia_h200", "sm_90", 132)
MI300 = Device("hip", "amd_instinct_mi300x", "gfx942", 304)
BIG = "@b1.h8.q4096.k4096"
INTERPRETED = 301
"""Keys of the long cases: the interpreter takes a millisecond for a leaf."""


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("state", ["running", "pair.apart"])
@pytest.mark.parametrize("network", networks())
def test_every_scan_state_and_schedule(network: str, state: str) -> None:
    problem = Problem.parse("fp32.d16.causal" if "hillis" in network else "fp32.d16")
    kernel = kernel_of(f"triton.{network}.{state}".replace(".running", ""), problem)
    kernels.obeys(kernel, problem, [], keys=150, longest=INTERPRETED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "spelling, problem",
    [
        ("triton.serial.half.m64.n64.warps4.stages1", "fp16.d32.causal"),
        ("triton.blelloch.fma.m16.n32.warps8.stages1.s2.two_kernels.apart", "bf16.d16.v24"),
        ("triton.serial.ieee.m64.n64.warps4.stages1.apart.masked.parts.longest", "fp32.d80.causal@b1.h6.kv2.q1.k1"),
        ("triton.serial.ieee.m64.n64.warps4.stages1.heads.persistent1", "fp32.d40.v72@b1.h6.kv2.q1.k1"),
        ("triton.blelloch.fma.m16.n64.warps8.stages1.s2.last_block.apart", "fp32.strict.d16.causal@b1.h8.kv2.q1.k1"),
        ("triton.serial.fma.m16.n64.warps8.stages1.apart.parts", "fp16.d24"),
    ],
)
def test_axes_and_families(spelling: str, problem: str) -> None:
    family = Problem.parse(problem)
    kernels.obeys(kernel_of(spelling, family), family, [], keys=150, longest=INTERPRETED)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
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
        ("triton.serial.ieee.m32.n64.warps4.stages1.parts", "fp32.d40.v24.causal.backward@b1.h6.kv2.q1.k1"),
        ("triton.serial.half.m64.n32.warps4.stages1", "fp16.d16.causal.backward"),
        ("triton.serial.fma.m16.n32.warps8.stages1.apart", "bf16.d16.backward"),
    ],
)
def test_gradients(spelling: str, problem: str) -> None:
    family = Problem.parse(problem)
    variant = space.parse(spelling)
    verdict = check.check_family(triton.load(triton.build(variant, family), variant, family), family, [])
    assert not verdict.reason and 0 < verdict.constant < 4, verdict


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

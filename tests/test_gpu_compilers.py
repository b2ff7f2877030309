"""Triton kernels for twelve targets that are not here: laws, compilers, and what their reports prove."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launched import launched

from elsa_tune.device import Device, host_cpu
from elsa_tune.generate import lawful, triton
from elsa_tune.generate.gpu import machine_code as _machine_code
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.tuning import contender, offline
from elsa_tune.tuning.worker import Worker, WorkerFailed
from elsa_tune.variant import Variant

H200 = Device("cuda", "nvidia_h200", "sm_90", 132, 140, "d580.159_t13.0", memory=140 << 30, caches=(60 << 20,))
SPACE = Space.read("triton")
TARGETS = (
    "sm_70",
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_120",
    "gfx90a",
    "gfx942",
    "gfx1100",
    "gfx1200",
)
RECORDED = Path(__file__).parent / "recorded" / "gpu_resources.json"


@pytest.mark.parametrize(
    "variant, problem, target, reason",
    [
        ("triton.serial.tf32x3.m64.n32.warps4.stages2", "fp32.strict.d64", "sm_90", "class strict allows ieee, fma"),
        ("triton.serial.tf32.m64.n32.warps4.stages2", "fp32.d64", "sm_90", "class fp32 allows"),
        ("triton.serial.tf32x3.m64.n32.warps4.stages2", "fp32.d64", "sm_75", "needs the matrix units of sm_80"),
        ("triton.serial.tf32x3.m64.n32.warps4.stages2", "fp32.d64", "gfx942", "not offered for gfx942"),
        ("triton.serial.half.m64.n32.warps4.stages2", "bf16.d64", "sm_75", "no bfloat16 products"),
        ("triton.serial.ieee.m8.n32.warps4.stages1", "fp32.d64", "sm_80", "at least 16 rows"),
        ("triton.serial.half.m64.n64.warps8.stages2", "fp16.d64", "sm_80", "share 64: they compute each 2 times"),
        ("triton.serial.half.m128.n64.warps8.stages2", "fp16.d64.backward", "sm_80", "16 rows share 64"),
        (
            "triton.serial.half.m64.n128.warps8.stages2",
            "fp16.d64",
            "sm_90",
            "16 rows share 64: they compute each 2 times",
        ),
        ("triton.serial.half.m16.n32.warps8.stages2", "fp16.d64", "sm_90", "8 columns share 32"),
        ("triton.serial.ieee.m32.n32.warps8.stages1.products5", "fp32.d64", "sm_80", "has two products"),
        ("triton.serial.fma.m64.n64.warps4.stages1.apart", "fp32.d64", "sm_80", "terms in each thread"),
        ("triton.serial.ieee.m128.n128.warps1.stages1", "fp32.d128", "sm_80", "registers of each thread"),
        ("triton.serial.ieee.m64.n128.warps2.stages1", "fp32.d64", "sm_89", "unroll into 16384"),
        ("triton.blelloch.tf32x3.m16.n64.warps2.stages4.w4", "fp32.d128", "sm_90", "leaves on their way take 768 KiB"),
        ("triton.blelloch.half.m64.n32.warps4.stages2.s4", "fp16.d64", "sm_80", "somebody must merge"),
        ("triton.serial.half.m64.n32.warps4.stages2.two_kernels", "fp16.d64", "sm_80", "nothing to merge"),
        ("triton.serial.half.m64.n32.warps4.stages2.pair", "fp16.d64", "sm_80", "takes a leaf in whole"),
        ("triton.serial.half.m64.n32.warps4.stages2.parts", "fp16.d64", "sm_80", "what padding makes"),
        ("triton.serial.half.m64.n32.warps4.stages2.longest", "fp16.d64", "sm_80", "equally long"),
        ("triton.serial.ieee.m32.n32.warps4.stages4", "fp32.d64", "sm_75", "no asynchronous copies"),
        ("triton.serial.half.m64.n32.warps4.stages2.masked", "fp16.d64.backward", "sm_80", "folded over tiles in one"),
        ("triton.hybrid.half.m64.n32.warps4.stages2.w2", "fp16.d64", "sm_80", "both levels"),
        (
            "triton.serial.half.m64.n32.warps4.stages2.products5",
            "fp16.d64.alibi+sinks.backward",
            "sm_80",
            "slopes receive what dS that is kept does not tell",
        ),
    ],
)
def test_laws_say_why(variant: str, problem: str, target: str, reason: str) -> None:
    posed = Problem.parse(f"{problem}@b1.h8.q4096.k4096")
    refused = lawful.refusal(SPACE.parse(variant), posed, offline.target(target).device)
    assert refused is not None and reason in refused


def test_few_rows_and_keys_and_much_scratch_are_refused() -> None:
    def refusal(variant: str, problem: str) -> str:
        return lawful.refusal(SPACE.parse(variant), Problem.parse(problem), H200) or ""

    assert "empty" in refusal("triton.serial.half.m64.n32.warps4.stages2", "fp16.d64@b1.h8.q1.k4096")
    many = "triton.blelloch.half.m16.n64.warps4.stages2.s32.two_kernels"
    assert "fewer than states" in refusal(many, "fp16.d64@b1.h8.q1.k512")
    assert "MiB, more than 256" in refusal(many, "fp16.d64@b1.h8.q65536.k65536")
    kept = "triton.serial.ieee.m32.n32.warps8.stages1.products5"
    assert "1024 MiB, more than 256" in refusal(kept, "fp32.d64.backward@b1.h8.q16384.k16384")


PROBLEMS = (
    "fp16.d64@b1.h16.q4096.k4096",
    "fp32.strict.d64@b1.h8.q4096.k4096",
    "fp32.d128@b1.h32.kv8.q1.k32768",
    "bf16.d128.causal.backward@b1.h16.q4096.k4096",
)
UNSERVED = {
    ("sm_70", "bf16.d128.causal.backward@b1.h16.q4096.k4096"),
    ("sm_75", "bf16.d128.causal.backward@b1.h16.q4096.k4096"),
    ("gfx1100", "bf16.d128.causal.backward@b1.h16.q4096.k4096"),
}
"""Where no starting variant compiles without spills: torch serves."""


@pytest.fixture(scope="module")
def builders() -> Iterator[Worker]:
    with Worker(count=host_cpu().cores) as found:
        yield found


USUAL = ("sm_70", "sm_80", "sm_90")
"""Targets of `make test`: others compile for minutes together, those of AMD alone."""
EACH = [pytest.param(t, marks=[] if t in USUAL else [pytest.mark.slow]) for t in TARGETS]


@pytest.mark.parametrize("target", EACH)
def test_every_target_compiles_and_no_default_spills(target: str, builders: Worker) -> None:
    goal = offline.target(target)

    def first(problem: Problem) -> Variant | None:
        """The default for a target: the first of the space's starting variants that compiles without a spill and fits."""
        for variant in lawful.starts(SPACE, problem, goal.device):
            built = builders.run(contender.build, variant, problem, goal.device, timeout=240.0)
            assert built.resources["registers"] > 0 and built.resources["loop_all"] > 0
            if problem.precision == "strict" and not built.flaw:
                assert built.resources["matrix"] == 0
            if (
                not built.flaw
                and not _machine_code.spills(built.resources)
                and offline.occupancy(built.resources, goal)
            ):
                return variant
        return None

    posed = [Problem.parse(text) for text in PROBLEMS]
    with ThreadPoolExecutor(host_cpu().cores) as pool:
        chosen = dict(zip(PROBLEMS, pool.map(first, posed), strict=True))
    assert {text for text, variant in chosen.items() if variant is None} == {p for t, p in UNSERVED if t == target}


@pytest.mark.parametrize("target", [*EACH, pytest.param("gfx942", id="gfx942 of make test")])
def test_a_sampled_space_compiles(target: str, builders: Worker) -> None:
    """Whatever the laws let through compiles, on every target; the compiler's report says whether it is any good."""
    goal, rng = offline.target(target), random.Random(target)
    problem = Problem.parse(rng.choice(PROBLEMS))
    variant = next(lawful.variants(SPACE, problem, goal.device, rng=rng))
    built = builders.run(contender.build, variant, problem, goal.device, timeout=240.0)
    assert built.resources["registers"] > 0, f"{variant} for {problem} on {target}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_a_launch_knows_spares_registers(target: str, builders: Worker) -> None:
    """One query head for each KV head and whole leaves are compiled for, and need fewer registers than any group and length."""
    goal = offline.target(target).device
    cases = [
        ("triton.serial.half.m128.n64.warps8.stages3", "bf16.d128"),
        ("triton.blelloch.half.m16.n64.warps4.stages2.s8.two_kernels", "fp16.d64.causal"),
    ]
    for spelling, family in cases:
        variant, whole = SPACE.parse(spelling), Problem.parse(f"{family}@b1.h16.q1024.k4096")
        ragged = whole.reshaped(kv_heads=4, kv_len=4095)
        assert triton.digest(variant, whole, goal) != triton.digest(variant, ragged, goal)
        knows, general = (
            builders.run(contender.build, variant, problem, goal, timeout=240.0).resources["registers"]
            for problem in (whole, ragged)
        )
        assert 0 < knows <= general
        if family == "bf16.d128":
            assert knows < general - 8


def test_which_tiles_repeat_products(builders: Worker) -> None:
    """A law refuses those whose warps issue more matrix instructions than the tile has, and no others."""
    problem = Problem.parse("fp16.d64@b1.h8.q4096.k4096")
    for target, tiles in {
        "sm_80": [(32, 32, 2), (32, 32, 4), (64, 32, 8), (16, 32, 4), (16, 32, 8), (128, 64, 8)],
        "sm_90": [(64, 64, 4), (64, 128, 8), (128, 64, 8), (32, 32, 4), (16, 64, 4)],
    }.items():
        goal = offline.target(target).device
        for m, n, warps in tiles:
            variant = SPACE.parse(f"triton.serial.half.m{m}.n{n}.warps{warps}.stages2")
            found = builders.run(contender.build, variant, problem, goal, timeout=240.0).resources["loop_matrix"]
            if target == "sm_90" and m % 64 == 0:  # wgmma: four warps take 64 rows, all columns, 16 terms
                issued, needed = found * warps // 4, m // 64 * (64 // 16 + n // 16)
            else:  # mma: a warp takes 16 rows, 8 columns, 16 terms
                issued, needed = found * warps, 2 * m * n * 64 // (16 * 8 * 16)
            refused = lawful.refusal(variant, problem, goal) or ""
            assert (issued > needed) == ("rows_are_computed_once" in refused), (variant, target, issued, needed)


LAUNCHED = [
    ("triton.serial.half.m64.n64.warps4.stages3", "fp16.d80@b1.h12.q197.k197", "sm_80", 2),
    ("triton.blelloch.half.m16.n64.warps4.stages2.s8.two_kernels", "bf16.d128@b1.h32.kv8.q1.k4096", "sm_90", 3),
    ("triton.blelloch.fma.m16.n16.warps4.stages2.s2.last_block.apart", "fp32.d40.v24@b1.h6.kv3.q9.k9", "sm_90", 2),
    ("triton.serial.half.m64.n64.warps4.stages2", "fp16.d64.causal@b1.h16.q99.k99", "gfx942", 1),
    ("triton.serial.half.m64.n64.warps4.stages2", "bf16.d64.lengths.softcap@b2.h8.q99.k99.softcap50", "sm_90", 1),
    ("triton.serial.half.m64.n64.warps4.stages2", "bf16.d72.causal.backward@b1.h8.kv2.q99.k99", "sm_90", 3),
    ("triton.serial.half.m64.n64.warps4.stages2.products5", "fp16.d64.backward@b1.h8.q128.k128", "sm_80", 3),
    ("triton.serial.half.m64.n32.warps4.stages2", "bf16.d64.lengths.bias+alibi.backward@b2.h8.q99.k99", "sm_90", 4),
]
"""Variants and problems for targets, and in how many kinds their modules' kernels are launched."""


@pytest.mark.slow
def test_no_launch_compiles(tmp_path: Path) -> None:
    """What was built is what launches ask for, whatever lengths, groups, strides and log-sum-exps calls have: in the process that
    times, nothing is left to compile."""

    def called(case: tuple[str, str, str, int]) -> tuple[list[str], list[str]]:
        spelling, problem, target, _ = case
        home = tmp_path / str(LAUNCHED.index(case))
        with Worker() as alone:
            goal = offline.target(target).device
            return alone.run(launched, spelling, problem, goal, str(home), timeout=240.0)

    with ThreadPoolExecutor(host_cpu().cores) as pool:
        for case, (compiled, found) in zip(LAUNCHED, pool.map(called, LAUNCHED), strict=True):
            assert not compiled and len(found) == case[3], (case, compiled, found)


def least(device: Device, problem: Problem) -> dict[str, int]:
    os.environ.pop("TRITON_INTERPRET", None)
    return triton.compile_report(triton._module(Path(__file__).parent / "least.py"), problem, device)


def test_hardly_more_than_the_least_kernel_takes(builders: Worker) -> None:
    """Groups, strides, ragged lengths and the log-sum-exp cost the hottest loop next to nothing, and no spill."""
    variant = SPACE.parse("triton.serial.half.m128.n64.warps4.stages3")
    problem = Problem.parse("bf16.d64@b1.h16.q4096.k4096")
    for target in ("sm_80", "sm_90"):
        goal = offline.target(target).device
        ours = builders.run(contender.build, variant, problem, goal, timeout=240.0).resources
        bare = builders.run(least, goal, problem, timeout=240.0)
        assert ours["loop_all"] <= 1.05 * bare["loop_all"] and ours["registers"] <= bare["registers"] + 20
        assert not _machine_code.spills(ours)


def test_strict_is_proven_by_the_assembly(builders: Worker) -> None:
    """The same float32 product that is plain on NVIDIA becomes mfma on AMD, and is then refused."""
    variant = SPACE.parse("triton.serial.ieee.m32.n32.warps4.stages1")
    problem = Problem.parse("fp32.strict.d64@b1.h8.q1024.k1024")
    plain = builders.run(contender.build, variant, problem, offline.target("sm_80").device, timeout=240.0)
    matrix = builders.run(contender.build, variant, problem, offline.target("gfx942").device, timeout=240.0)
    assert not plain.flaw and plain.resources["matrix"] == 0 and plain.resources["loop_fma"] > 500
    assert "strict means plain multiply-adds" in matrix.flaw and matrix.resources["matrix"] > 0


def test_a_compiler_that_crashes_takes_nobody_with_it(builders: Worker) -> None:
    """Triton aborts its process for a target that never was; the next build finds another process."""
    variant, problem = SPACE.parse("triton.serial.ieee.m32.n32.warps4.stages1"), Problem.parse("fp32.d64@b1.h8.q64.k64")
    with pytest.raises(WorkerFailed):
        builders.run(contender.build, variant, problem, Device("cuda", "nobody", "sm_42", 1), timeout=240.0)
    built = builders.run(contender.build, variant, problem, offline.target("sm_80").device, timeout=240.0)
    assert built.resources["registers"] > 0


def test_instructions_are_counted() -> None:
    sass = """
.L_x_1:
        /*0000*/                   FFMA R0, R1, R2, R0 ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/              @!P0 MUFU.EX2 R3, R3 ;
        /*0030*/                   LDS.128 R8, [R20] ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
        /*0050*/                   STL [R1], R2 ;
"""
    found = _machine_code.of_sass(sass)
    assert (found["matrix"], found["local"], found["loop_fma"], found["loop_exp"], found["loop_shared"]) == (
        1,
        1,
        1,
        1,
        1,
    )
    assert found["loop_all"] == 5
    waits = """
.L_x_1:
        /*0000*/              @P0  EXIT ;
        /*0010*/                   FFMA R0, R1, R2, R0 ;
.L_x_2:
        /*0020*/                   FFMA R0, R1, R2, R0 ;
        /*0030*/              @P1  BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   SYNCS.PHASECHK P0, [UR4] ;
        /*0060*/              @!P0 BRA `(.L_x_3) ;
        /*0070*/                   BRA `(.L_x_2) ;
"""
    assert _machine_code.of_sass(waits)["loop_all"] == 4, (
        "what waits beyond the end is no loop around what is before it"
    )
    ptx = "$L__BB0_1:\n\tfma.rn.f32 \t%f1, %f2, %f3, %f1;\n\twgmma.mma_async.sync x;\n\t@%p1 bra \t$L__BB0_1;\n"
    assert _machine_code.of_ptx(ptx)["matrix"] == 1 and _machine_code.of_ptx(ptx)["loop_fma"] == 1
    for name in (
        "mma.sync.aligned.m16n8k16",
        "wmma.mma.sync",
        "wgmma.mma_async.sync",
        "tcgen05.mma.cta_group",
        "UTCQMMA",
    ):
        assert _machine_code.MATRIX.match(name), name
    for name in ("fma.rn.f32", "tcgen05.ld.sync", "FFMA2"):
        assert not _machine_code.MATRIX.match(name), name
    for name in (
        "HMMA.16816.F32",
        "HGMMA.64x64x16.F32",
        "IMMA.8816",
        "UTCHMMA",
        "v_mfma_f32_32x32x2_f32",
        "v_wmma_f32",
    ):
        assert _machine_code.MATRIX.match(name), name
    for name in ("FFMA", "IMAD.MOV", "v_fma_f32", "HFMA2", "v_mul_f32"):
        assert not _machine_code.MATRIX.match(name), name


def test_reports_of_a_sampled_space_are_kept(builders: Worker, request: pytest.FixtureRequest) -> None:
    """What the compiler said of a few variants, for targets old and new; a newer Triton may say something else."""
    cases = [
        ("triton.serial.ieee.m32.n32.warps8.stages1", "fp32.strict.d64@b1.h8.q4096.k4096", t)
        for t in ("sm_70", "sm_90")
    ] + [("triton.serial.half.m64.n64.warps4.stages3", "fp16.d64@b1.h16.q4096.k4096", t) for t in ("sm_80", "gfx942")]
    found = {
        f"{v} {p} {t}": dict(
            builders.run(
                contender.build, SPACE.parse(v), Problem.parse(p), offline.target(t).device, timeout=240.0
            ).resources
        )
        for v, p, t in cases
    }
    if os.environ.get("ACCEPT_GOLDEN"):
        RECORDED.write_text(json.dumps({"triton": triton.version(), "reports": found}, indent=1, sort_keys=True) + "\n")
    stored = json.loads(RECORDED.read_text())
    assert stored["reports"].keys() == found.keys()
    if stored["triton"] == triton.version():
        assert stored["reports"] == found

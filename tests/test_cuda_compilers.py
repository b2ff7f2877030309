"""CUDA C and HIP compiled for devices that are not here, warnings as errors, and what the machine code proves."""

from __future__ import annotations

import ctypes.util
import json
import multiprocessing
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.errors import BuildFailed, CompilerMissing
from elsa_tune.generate import cuda, lawful
from elsa_tune.generate.cuda import rocm as _rocm
from elsa_tune.generate.cuda import rtc as _rtc
from elsa_tune.generate.gpu import machine_code as _machine_code
from elsa_tune.problem import Problem
from elsa_tune.space import Space
from elsa_tune.variant import Variant

SPACE = Space.read("cuda")
RECORDED = Path(__file__).parent / "recorded" / "cuda_resources.json"
CAPABILITIES = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 120)
SOME = (50, 62, 75, 90, 120)
"""The oldest, the newest, and one where each thing begins that laws let through: pairs of halves, matrix units, asynchronous copies."""
REST = tuple(n for n in CAPABILITIES if n not in SOME)
DEFAULTS = (50, 62, 70, 80, 90, 120)
BIG = "@b1.h8.q4096.k4096"
DECODE = "@b1.h32.kv8.q1.k4096"

needs_nvrtc = pytest.mark.skipif(not _rtc.nvrtcs(), reason="needs NVRTC: pip install 'elsa-tune[cuda]'")


def gpu(arch: str) -> Device:
    return Device("hip" if arch.startswith("gfx") else "cuda", "some", arch, 10)


def compiled(variant: Variant, family: str, device: Device, rtc: _rtc.Rtc) -> dict[str, int]:
    """Registers, spills and instructions; no warning is let through."""
    options = _rtc.options(device, 0)
    code, log = rtc.compile(cuda.source(variant, Problem.parse(family)).text, options, str(variant))
    warned = [line for line in log.splitlines() if "warning" in line and "are deprecated" not in line]
    assert not warned, warned
    return {**_rtc.of_log(log), **_rtc._loops(code)}


TEXTS = [
    ("cuda.serial.t64.x8.r4.k4.c32", "fp32.d128.causal"),
    ("cuda.hybrid.t64.x8.r2.k2.w2.s8.last_block.swizzled.native.apart", "bf16.d64.v96"),
    ("cuda.blelloch.t64.x16.r2.k2.w2.s4.two_kernels.v2.polynomial.stages2.shared.heads", "fp16.d40.causal"),
]
HALVES = [
    ("cuda.serial.half2.v8.t128.x8.r4.k4.c64.apart", "fp16.approx.d128.causal"),
    ("cuda.hybrid.half2.v2.t64.x8.r2.k2.w2.s8.last_block.swizzled.native.apart", "fp16.approx.d40.v24"),
]
ASYNC = [
    ("cuda.serial.half2.v8.t64.x8.r4.k4.stages2.async.apart", "fp16.approx.d64"),
    ("cuda.serial.t128.x8.r6.k6.stages2.async", "fp32.d64"),
    ("cuda.hillis_steele.t128.x8.r2.k2.c16.stages3.async.v2.w4.s4.last_block", "fp32.d80.v40.causal"),
]


@needs_nvrtc
@pytest.mark.parametrize(
    ("newest", "capabilities"),
    [(False, SOME), pytest.param(False, REST, marks=pytest.mark.slow), pytest.param(True, (), marks=pytest.mark.slow)],
)
def test_every_dialect_feature_compiles_for_every_capability(newest: bool, capabilities: tuple[int, ...]) -> None:
    """sm_50 to sm_120 with the compiler that serves each, and what the newest compiler lists."""
    rtc = _rtc.nvrtcs()[0]
    if newest and "sm_50" in rtc.archs:
        pytest.skip("no NVRTC newer than the one that serves sm_50 is installed")
    jobs = []
    for arch in rtc.archs if newest else [f"sm_{n}" for n in capabilities]:
        device = gpu(arch)
        chosen = (HALVES if device.capability >= 53 and not newest else []) + (ASYNC if device.capability >= 80 else [])
        for spelling, family in (TEXTS[:1] if newest else TEXTS) + chosen:
            jobs.append((space.parse(spelling), family, device, rtc if newest else _rtc.find(device)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for report in pool.map(lambda job: compiled(*job), jobs):
            assert report["registers"] > 0


@needs_nvrtc
def test_the_newest_compiler_that_still_serves_a_capability() -> None:
    served = {capability: _rtc.find(gpu(f"sm_{capability}")) for capability in CAPABILITIES}
    for capability, rtc in served.items():
        arch, newer = f"sm_{capability}", _rtc.nvrtcs()[: _rtc.nvrtcs().index(rtc)]
        assert arch in rtc.archs and all(arch not in other.archs for other in newer)
    with pytest.raises(CompilerMissing, match="no compiler for sm_35"):
        _rtc.find(gpu("sm_35"))


@needs_nvrtc
def test_broken_source_is_reported_with_the_compilers_words() -> None:
    with pytest.raises(BuildFailed, match="nonsense"):
        _rtc.compile_for(gpu("sm_80"), 'extern "C" __global__ void attend() { nonsense; }', 0, "a test")


@needs_nvrtc
@pytest.mark.parametrize("seed", range(2))
def test_a_sampled_space_compiles(seed: int) -> None:
    """What laws let through compiles, and a register cap reaches the compiler."""
    jobs = []
    for number, capability in enumerate((53, 62, 75, 86, 90)):
        family = ("fp32.d64", "fp16.d128.causal", "fp32.d256", "bf16.d80.causal", "fp32.d128")[(number + seed) % 5]
        problem, device = Problem.parse(family + BIG), gpu(f"sm_{capability}")
        variant = next(lawful.variants(SPACE, problem, device, rng=random.Random(seed * 10 + number)))
        jobs.append((variant, problem, device))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (variant, _, _), built in zip(jobs, pool.map(lambda job: cuda.build(*job), jobs), strict=True):
            cap = int(variant.axes["registers"])
            assert 0 < built.resources["registers"] <= (cap or 255), variant


def default(problem: Problem, device: Device) -> tuple[Variant, dict[str, int]]:
    """The first starting variant that keeps everything in registers: what a device begins with, untuned."""
    for spelling in SPACE.start:
        variant = SPACE.parse(spelling)
        if lawful.refusal(variant, problem, device):
            continue
        report = dict(cuda.build(variant, problem, device).resources)
        if not report["spills"] and not report["stack"]:
            return variant, report
    raise AssertionError(f"no starting variant serves {problem} on {device} without spills")


FAMILIES = tuple(
    f + BIG for f in ("fp32.d64", "fp32.d128", "fp32.strict.d64.causal", "fp16.approx.d64", "fp16.approx.d128.causal")
)
OTHERS = ("fp32.d256" + BIG, "fp16.d64" + BIG, "bf16.d128.causal" + BIG, "fp32.d128" + DECODE)


@needs_nvrtc
@pytest.mark.skipif(not _machine_code.disassemblers(), reason="needs nvdisasm; `make test` puts one in .venv")
@pytest.mark.parametrize(
    "capability", [n if n in (62, 90) else pytest.param(n, marks=pytest.mark.slow) for n in DEFAULTS]
)
def test_defaults_stay_in_registers_and_multiply_and_add(capability: int) -> None:
    """No spills, no matrix instruction; 85 % and more of what the hottest loop issues are multiply-adds at d = 64 and 128.

    The counts are kept in tests/recorded; refresh them with ACCEPT_GOLDEN=1.
    """
    device = gpu(f"sm_{capability}")
    jobs = [problem for problem in (*FAMILIES, *OTHERS) if not cuda.refusal(Problem.parse(problem), device)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda problem: default(Problem.parse(problem), device), jobs))
    lines = {}
    for problem, (variant, report) in zip(jobs, found, strict=True):
        assert report["matrix"] == report["local"] == 0
        share = report["loop_fma"] / report["loop_all"]
        if problem in FAMILIES:
            assert share >= 0.85, (capability, problem, str(variant), share)
        if capability <= 62:
            assert report["shared"] <= 48 << 10
        lines[f"sm_{capability} {problem}"] = f"{variant} registers {report['registers']} fma {share:.2f}"
    recorded = json.loads(RECORDED.read_text())
    if os.environ.get("ACCEPT_GOLDEN"):
        recorded = {k: v for k, v in recorded.items() if k.split()[0] != device.arch} | lines
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    kept = {k: v for k, v in recorded.items() if k.split()[0] == device.arch}
    assert {k: v.split()[0] for k, v in kept.items()} == {k: v.split()[0] for k, v in lines.items()}, "other defaults"
    for key, line in lines.items():  # compilers differ by an instruction
        assert abs(float(line.split()[-1]) - float(kept[key].split()[-1])) <= 0.02, (key, line, kept[key])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc; NVRTC compiles the same texts")
@pytest.mark.parametrize(("spelling", "family"), [*TEXTS[1:2], *HALVES[1:], *ASYNC[1:2]])
def test_nvcc_reads_the_same_text(spelling: str, family: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(cuda.source(space.parse(spelling), Problem.parse(family)).text)
    command = [
        "nvcc",
        "-std=c++14",
        "-arch=sm_80",
        "-cubin",
        "-Werror",
        "all-warnings",
        "-o",
        str(tmp_path / "k.cubin"),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


needs_hiprtc = pytest.mark.skipif(
    not any(map(ctypes.util.find_library, ("hiprtc", "amdhip64"))),
    reason="not checked: needs hiprtc: apt-get install libamdhip64-dev",
)
AMD = ("gfx906", "gfx90a", "gfx1030")
STARTING = ("cuda.hip.serial.t128.x8.r4.k4", "fp32.strict.d64" + BIG)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """Another process: ROCm's compiler and PoCL do not always bear each other."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def hip_report(spelling: str, family: str, device: Device, *options: str) -> tuple[dict[str, int], str]:
    """What the machine code holds, and the compiler's log."""
    variant, given = space.parse(spelling), [*_rtc.options(device, 0), *options]
    code, log = _rtc.find(device).compile(cuda.source(variant, Problem.parse(family)).text, given, spelling)
    return _rocm.report(code), log


@needs_hiprtc
@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize(("spelling", "family"), [*TEXTS, ("cuda.serial.t128.x8.r4.k4.b4.native", "fp32.d64")])
def test_hip_compiles_for_amd(spelling: str, family: str, arch: str, elsewhere: Executor) -> None:
    """Plain multiply-adds, no matrix instruction, warnings as errors; a starting variant does not spill."""
    spelled, device = spelling.replace("cuda.", "cuda.hip.", 1).replace(".shared", ""), gpu(arch)
    report, log = elsewhere.submit(hip_report, spelled, family, device, "-Wall", "-Wextra", "-Werror").result()
    assert not log.strip() and report["matrix"] == 0 and report["loop_fma"] > 0
    assert report["spills"] == 0 or (spelling, family) != TEXTS[0], "a starting variant spills"
    if (
        ".b4" in spelling
    ):  # four blocks are two waves of 64 threads, or four of 32, on each of a multiprocessor's four units
        waves, there = 4 * 128 // device.warp // 4, {"gfx906": 256, "gfx90a": 512, "gfx1030": 1024}[arch]
        assert report["registers"] <= there // waves
        assert waves == 4 or report["registers"] > there // 4, "four waves' bound, as if blocks were waves"


@needs_hiprtc
@pytest.mark.parametrize("arch", ["gfx906", "gfx1030"])
def test_hip_is_proven_as_cuda_is(arch: str, elsewhere: Executor) -> None:
    """What is built for AMD carries its registers and its proof, read from the machine code."""
    spelling, posed = STARTING
    built = elsewhere.submit(cuda.build, space.parse(spelling), Problem.parse(posed), gpu(arch)).result()
    assert built.resources["strict"] and built.resources["registers"] > 0 and not built.flaw
    assert built.resources["loop_fma"] / built.resources["loop_all"] >= 0.85


def matrix_instructions(arch: str) -> int:
    text = """extern "C" __global__ void attend(float* x) {
      typedef float f4 __attribute__((ext_vector_type(4)));
      *(f4*)x = __builtin_amdgcn_mfma_f32_4x4x1f32(x[0], x[1], *(f4*)x, 0, 0, 0);
    }"""
    return _rtc.compile_for(gpu(arch), text, 0, "a test")[1]["matrix"]


@needs_hiprtc
def test_amds_matrix_instructions_are_seen_and_unknown_targets_are_said(elsewhere: Executor) -> None:
    assert elsewhere.submit(matrix_instructions, "gfx90a").result() == 1
    with pytest.raises(CompilerMissing, match="no compiler for gfx9999 .*hiprtc"):
        elsewhere.submit(_rtc.compile_for, gpu("gfx9999"), "", 0, "a test").result()


def test_compilers_by_name() -> None:
    wanted = {rtc.prefix for rtc in _rtc.nvrtcs()[:1]}
    assert set(_rtc.versions()) >= wanted
    assert _rtc.of_log("Used 40 registers, 16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads") == {
        "registers": 40, "stack": 16, "spills": 3,
    }  # fmt: skip

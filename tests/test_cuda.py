"""CUDA C: the OpenCL rendering on a CPU device and the CUDA text under an emulator, against float64, with the contracts of
every language."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import simulated
import torch
from contracts import kernels
from emulated import launched

import elsa_tune
from elsa_tune import device as devices
from elsa_tune import space
from elsa_tune.device import Device
from elsa_tune.errors import BadDevice, BuildFailed, WrongArguments
from elsa_tune.generate import backends, cuda, lawful
from elsa_tune.generate.backends import Kernel
from elsa_tune.generate.cuda import call as _call
from elsa_tune.generate.cuda import wavefronts as _wavefronts
from elsa_tune.generate.cuda.tiling import Tiling
from elsa_tune.generate.gpu import counters as _counters
from elsa_tune.generate.gpu.counters import Counters
from elsa_tune.generate.gpu.limits import shared_bytes
from elsa_tune.parts import scan
from elsa_tune.problem import Problem
from elsa_tune.prove import check, reference
from elsa_tune.space import Space
from elsa_tune.tuning import offline
from elsa_tune.tuning import tune as tuning

H200 = Device("cuda", "nvidia_h200", "sm_90", 132)
TX2 = Device("cuda", "jetson_tx2", "sm_62", 2)
GTX_1080 = Device("cuda", "gtx_1080", "sm_61", 20)
GTX_980 = Device("cuda", "gtx_980", "sm_52", 16)
MI300 = Device("hip", "amd_instinct_mi300x", "gfx942", 304)
OPENCL = Device("opencl", "some_gpu", "shuffle8", 20)
SPACE = Space.read("cuda")
BIG = "@b1.h8.q4096.k4096"


@pytest.fixture
def opencl_cpu() -> Device:
    """The OpenCL device of this machine; Debian's pocl-opencl-icd makes the CPU one."""
    pytest.importorskip("pyopencl", reason="needs pyopencl: pip install 'elsa-tune[opencl]'")
    found = devices.opencl_devices()
    if not found:
        pytest.skip("needs an OpenCL device: apt-get install pocl-opencl-icd")
    return found[0]


def kernel_of(spelling: str, problem: Problem, device: Device) -> Kernel:
    variant = space.parse(spelling)
    return cuda.load(cuda.build(variant, problem, device), variant, problem)


def obeys(spelling: str, problem: Problem, device: Device) -> None:
    """The contract, with inputs as long as laws allow."""
    longest = check.longest(space.parse(spelling), problem, device)
    kernels.obeys(kernel_of(spelling, problem, device), problem, [], keys=500, longest=longest)


def networks() -> list[str]:
    """Every scan on every level where it has states, with every schedule that merges them."""
    found = ["serial.{}t64.x8.r4.k4.{}"]
    for name in scan.names():
        if name in ("hillis_steele", "blelloch"):
            found.append(f"{name}.{{}}t64.x8.r2.k2.w4.{{}}")
        if name != "serial":
            workers = ".w2" if name == "hybrid" else ""
            found += [f"{name}.{{}}t64.x8.r2.k2{workers}.s4.{s}.{{}}" for s in ("two_kernels", "last_block")]
    return found


FAMILIES = ("fp32.d64", "fp32.d40.v24.causal", "fp16.d64.causal", "fp16.d80", "bf16.d33.v17", "bf16.d64.causal")

MORE = [
    ("serial.{}t128.x16.r4.k2.c64.stages2.{}", "fp32.d96.v128.causal"),
    ("serial.{}t64.x8.r4.k4.c32.swizzled.polynomial.apart.{}", "fp32.d128"),
    ("serial.{}t32.x4.r1.k2.v1.native.heads.{}", "fp32.d1.v3.causal"),
    ("serial.{}t64.x8.r2.k2.v2.longest.apart.{}", "fp32.d33.v17.causal"),
    ("serial.{}t64.x16.r2.k2.c64.v2.{}", "fp32.d256"),
    ("serial.{}t64.x8.r2.k2.{}", "fp32.d16.causal+window"),
    ("hillis_steele.{}t64.x8.r2.k2.w4.{}", "fp16.d16.causal_lower_right+window"),
    ("hybrid.{}t64.x8.r2.k2.w2.s4.two_kernels.{}", "fp32.d16.prefix"),
    ("blelloch.{}t64.x8.r2.k2.w2.s2.last_block.{}", "fp32.d16.causal+lengths"),
    ("serial.{}t64.x8.r2.k2.v2.native.{}", "fp32.d40.softcap"),
    ("hybrid.{}t64.x8.r2.k2.w2.s4.two_kernels.{}", "fp32.d16.lengths.dropout"),
    ("hillis_steele.{}t64.x8.r2.k2.w4.{}", "fp16.d16.lengths+window.softcap"),
    ("hybrid.{}t128.x8.r2.k4.w4.s8.last_block.swizzled.c32.apart.polynomial.{}", "fp32.d96.causal"),
]


EVERY_NETWORK = [pytest.param(network, family, marks=pytest.mark.slow) for network in networks() for family in FAMILIES]


@pytest.mark.opencl
@pytest.mark.parametrize(("spelling", "family"), [*MORE, *EVERY_NETWORK])
def test_opencl_contract(spelling: str, family: str, opencl_cpu: Device) -> None:
    problem = Problem.parse(family).reshaped(heads=4, kv_heads=2, q_len=64, kv_len=64)
    obeys("cuda." + spelling.format("opencl.", "shared"), problem, opencl_cpu)


@pytest.mark.opencl
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_random_opencl_variants(seed: int, opencl_cpu: Device) -> None:
    family = FAMILIES[seed]
    problem = Problem.parse(f"{family}@b1.h4.kv2.q64.k256")
    variant = next(lawful.variants(SPACE, problem, opencl_cpu, rng=random.Random(seed)))
    obeys(str(variant), problem, opencl_cpu)


ASYNC = [
    ("serial.{}t128.x8.r8.k8.c32.stages2.async.native.apart.{}", "fp32.strict.d64.causal"),
    ("serial.{}t64.x8.r4.k4.stages2.async.{}", "fp32.d64"),
    ("serial.{}t64.x8.r2.k2.c32.stages3.async.v2.{}", "fp32.d80.v40.causal"),
    ("blelloch.{}t128.x8.r2.k2.c32.stages3.async.swizzled.w4.s4.last_block.{}", "fp32.d96.causal"),
]


HALVES = [
    ("serial.half2.v8.t64.x8.r4.k4.apart.{}", "fp16.approx.d64"),
    ("serial.half2.v2.swizzled.t64.x8.r2.k4.c32.stages2.apart.{}", "fp16.approx.d40.v24.causal"),
    ("blelloch.half2.t64.x8.r2.k4.w2.s4.two_kernels.apart.{}", "fp16.approx.d80.causal"),
    ("hybrid.half2.v8.t128.x8.r2.k4.w4.c64.s8.last_block.apart.{}", "fp16.approx.d128"),
    ("serial.half2.v8.t64.x8.r4.k4.apart.{}", "fp16.approx.d64.lengths.softcap"),
    ("serial.half2.v8.t64.x8.r4.k4.c64.stages2.async.apart.{}", "fp16.approx.d96.v128.causal"),
]


EMULATED = [
    *(
        pytest.param(network.format("", ""), FAMILIES[i % 6], marks=pytest.mark.slow)
        for i, network in enumerate(networks())
    ),
    *(
        (spelling.format("", "shared" if i % 2 else ""), family)
        for i, (spelling, family) in enumerate([*MORE, *ASYNC, *HALVES])
    ),
    ("hip.serial.t64.x16.r2.k2.native", "fp32.d40.v24.causal"),
    ("hip.hybrid.t128.x8.r2.k2.w2.s4.last_block", "fp16.d64"),
    ("hip.blelloch.t128.x32.r2.k2.w2.s2.two_kernels.polynomial", "fp32.d128.causal"),
]


@pytest.mark.parametrize(("spelling", "family"), EMULATED)
def test_cuda_text_under_an_emulator(spelling: str, family: str, tmp_path: Path) -> None:
    """The CUDA text itself, and HIP's, whatever order threads and blocks run in; shared memory begins as NaN."""
    problem = Problem.parse(family)
    kernel, runtime = emulated.kernel(space.parse("cuda." + spelling.rstrip(".")), problem, tmp_path)
    out, lse, error = kernels.compute(kernel, problem)
    assert error < 1
    for runtime.seed, aligned in ((1, True), (2, False), (3, True)):
        again, lse_again, _ = kernels.compute(kernel, problem, aligned)
        assert torch.equal(out, again) and torch.equal(lse, lse_again), (
            "the order of threads changes the answer: a race"
        )


@pytest.mark.parametrize(("spelling", "family"), [HALVES[0], pytest.param(*HALVES[2], marks=pytest.mark.slow)])
def test_sums_in_halves_obey_the_contract(spelling: str, family: str, tmp_path: Path) -> None:
    """Class approx, hostile inputs included; further from float64 than class fp16, or it would not need a name of its own."""
    problem = Problem.parse(f"{family}@b1.h4.kv2.q64.k64")
    kernel, _ = emulated.kernel(space.parse("cuda." + spelling.format("").rstrip(".")), problem, tmp_path)
    kernels.obeys(kernel, problem, [], keys=200, longest=2049)
    floats, _ = emulated.kernel(space.parse("cuda.serial.t64.x8.r4.k4"), problem, tmp_path / "floats")
    generator = torch.Generator().manual_seed(1)
    small = problem.reshaped(batch=1, heads=2, kv_heads=2, q_len=37, kv_len=131)
    inputs, rows = reference.random_inputs(small, generator), reference.every_row(small)
    truth = reference.attention_rows(small, inputs, rows)
    errors = [
        reference.measure_error(small, inputs, rows, k(inputs.query, inputs.key, inputs.value), truth).relative
        for k in (kernel, floats)
    ]
    assert errors[0] > errors[1]


def test_a_special_function_unit_that_errs_by_two_units_is_strict_enough(tmp_path: Path) -> None:
    """ex2.approx errs by 2 units in the last place at most, so a weight by 4 u, and an output by 8 u max|v|: what is allowed for two
    keys, and with one it cancels. Errors of that size, their signs drawn from the score's bits."""
    problem = Problem.parse("fp32.strict.d64@b1.h4.kv2.q64.k64")
    variant = space.parse("cuda.serial.t64.x8.r4.k4.native.apart")
    text, exact = cuda.source(variant, problem).text, "DEVICE float exp2_native(float x) { return exp2f(x); }"
    assert exact in text
    errs = """DEVICE float exp2_native(float x) {
  const float y = exp2f(x);
  return x == 0.0f || y < 1e-37f ? y : float_of(bits_of(y) + (bits_of(x) * 2654435761u >> 31) * 4u - 2u);
}"""
    runtime = emulated.EmulatedRuntime(variant, problem, text.replace(exact, errs), tmp_path)
    here = lawful.variants(Space.read("sdpa"), problem, devices.host_cpu())
    sdpa = backends.get("sdpa")
    peers = [sdpa.load(sdpa.build(v, problem), v, problem) for v in here]
    verdict = check.check_family(cuda.CudaKernel(runtime, variant, problem), problem, peers, longest=1025)
    assert not verdict.reason, verdict.reason


@pytest.mark.parametrize(
    ("barrier", "spelling"),
    [
        ("barrier_block();\n    add_values", "serial.t64.x16.r2.k2.stages1"),
        ("if (9u >> worker", "blelloch.t64.x8.r2.k2.w4"),
        ("copy_wait();\n    barrier_block();\n    slice_copy", "serial.t64.x8.r4.k4.stages2.async"),
    ],
)
def test_the_emulator_sees_a_missing_barrier(barrier: str, spelling: str, tmp_path: Path) -> None:
    problem, variant = Problem.parse("fp32.d64"), space.parse(f"cuda.{spelling}")
    text = cuda.source(variant, problem).text
    without = {
        "barrier_block();\n    add_values": text.replace("    barrier_block();\n", "    \n"),
        "if (9u >> worker": text.replace("  barrier_block();\n  if (", "  if ("),
        "copy_wait();\n    barrier_block();\n    slice_copy": text.replace("    copy_wait();\n", ""),
    }[barrier]
    assert without != text
    runtime = emulated.EmulatedRuntime(variant, problem, without, tmp_path)
    kernel = cuda.CudaKernel(runtime, variant, problem)
    answers = []
    for runtime.seed in range(4):
        out, _, error = kernels.compute(kernel, problem)
        answers.append((out, error))
    assert any(not error < 1 for _, error in answers) or any(not torch.equal(out, answers[0][0]) for out, _ in answers)


WIDTHS = [
    *(v for v in SPACE.start if not {"hip", "opencl", "half2"} & set(v.split("."))),
    "cuda.serial.half2.v8.t64.x8.r8.k4.apart",
    "cuda.serial.v2.t64.x4.r2.k4",
    "cuda.serial.t64.x32.r4.k2.swizzled",
    "cuda.blelloch.t64.x4.r2.k8.w4.swizzled",
]


@pytest.mark.parametrize("spelling", WIDTHS)
def test_the_model_counts_wavefronts_as_addresses_do(spelling: str, tmp_path: Path) -> None:
    """What every thread of the kernel's own text reads, warp by warp, takes as many wavefronts as the model says; of 128 bits at
    a time two, as few as there are, and no bank conflict more."""
    variant, family = space.parse(spelling), "fp16.approx.d128" if "half2" in spelling else "fp32.d128"
    tiling = Tiling.of(variant.axes, Problem.parse(family))
    leaves = tiling.workers * int(variant.axes["splits"])
    problem = Problem.parse(f"{family}@b1.h1.q{tiling.block_m}.k{tiling.block_n * leaves}")
    load = "DEVICE vec load_vec(const SHARED stored* from) { "
    text = cuda.source(variant, problem).text
    assert load in text
    runtime = emulated.EmulatedRuntime(
        variant, problem, text.replace(load, load + "emulated::keep_read(from); "), tmp_path
    )
    inputs = reference.random_inputs(problem, torch.Generator().manual_seed(1))
    [attend, *_] = (kernel := cuda.CudaKernel(runtime, variant, problem))._launches(
        inputs.query, inputs.key, inputs.value, None, kernel(inputs.query, inputs.key, inputs.value), None
    )
    runtime.run([attend])
    reads = runtime.reads(tiling.threads)
    for warp in range(0, tiling.threads, 32):
        accesses = list(zip(*reads[warp : warp + 32], strict=True))
        counted = [_wavefronts.of_access(access, tiling.vector_bytes) for access in accesses]
        assert sum(counted) == sum(_wavefronts.of_loads(tiling).values()), warp
        if tiling.abreast == 2:
            assert set(counted) == {max(1, tiling.words // 2)}


def test_the_model_lets_shared_memory_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes longer than multiply-adds do, by its wavefronts, not its instructions; 2^x is cheapest where it is one
    instruction."""
    problem, goal = Problem.parse("fp32.strict.d64" + BIG), offline.target("sm_90")
    resources = {"registers": 168, "shared": 34 << 10, "warps": 4, "loop_fma": 512, "loop_all": 566, "loop_exp": 0}
    resources |= {"loop_shared": 32, "loop_matrix": 0}

    def predicted(spelling: str, **change: int) -> float:
        return offline.predict(space.parse(f"cuda.serial.{spelling}"), problem, {**resources, **change}, goal) or 0.0

    plain = predicted("t128.x8.r4.k4")
    assert predicted("t128.x8.r4.k4", loop_shared=3200) == plain > predicted("t128.x8.r4.k4.native") > 0
    count = _wavefronts.of_iteration
    monkeypatch.setattr(_wavefronts, "of_iteration", lambda tiling: 2 * count(tiling))
    assert 1.3 * plain < predicted("t128.x8.r4.k4") < 2 * plain


@pytest.mark.parametrize(
    ("variant", "problem", "device", "reason"),
    [
        ("serial.t128.x8.r4.k4", "fp32.d64", MI300, "spoken to in hip"),
        ("serial.hip.t32.x8.r4.k4", "fp32.d64", MI300, "do not fill warps of 64"),
        ("serial.t32.x8.r1.k4.w8", "fp32.d64", H200, "fewer than 8 lanes"),
        ("serial.t32.x8.r1.k1.v1", "fp32.d64", H200, "single weights"),
        ("serial.t128.x8.r4.k4", "fp32.d64@b1.h8.q16384.k16384", H200, "running sum over 16384 keys"),
        ("serial.opencl.t64.x16.r4.k4", "fp32.d64", OPENCL, "no shuffles among 32"),
        ("serial.t128.x8.r4.k4.shared", "fp32.d64", H200, "faster than shared memory"),
        ("serial.t128.x8.r4.k4.stages2.async", "fp32.d64", TX2, "no asynchronous copies"),
        ("serial.t128.x8.r4.k4.stages2.async", "fp16.approx.d64", H200, "cannot make floats of fp16"),
        ("serial.t128.x8.r4.k4.async", "fp32.d64", H200, "a second place"),
        ("serial.half2.t64.x8.r4.k4.apart", "fp16.d64", TX2, "of class approx, not fp16"),
        ("serial.half2.t64.x8.r4.k4.apart", "fp16.approx.d64", GTX_980, "does not multiply pairs"),
        ("serial.half2.t64.x8.r4.k4.apart", "fp16.approx.d64", GTX_1080, "64th of the rate"),
        ("serial.half2.v1.t64.x8.r4.k4.apart", "fp16.approx.d64", TX2, "half is no pair"),
        ("serial.half2.t64.x8.r4.k4", "fp16.approx.d64", TX2, "running sum is of floats"),
        ("serial.v8.t64.x8.r4.k4", "fp16.approx.d64", TX2, "eight floats"),
        ("serial.t128.x8.r4.k4.stages3", "fp32.d64", H200, "registers hold one slice"),
        ("serial.t32.x4.r4.k2.swizzled", "fp32.d64", H200, "no multiple of 32"),
        ("serial.t128.x16.r4.k4.c32", "fp32.d64", H200, "no multiple of 64"),
        ("serial.t128.x8.r4.k4.c64", "fp32.d64", H200, "the whole row"),
        ("serial.t128.x32.r4.k4", "fp32.d64", H200, "leave most of 128 empty"),
        ("serial.t256.x8.r8.k4", "fp32.d64@b1.h8.q16.k4096", H200, "leave most of a tile of 256 empty"),
        ("serial.t128.x8.r4.k4.b2.regs128", "fp32.d64", H200, "cap registers already"),
        ("serial.opencl.t64.x8.r4.k4.regs64.shared", "fp32.d64", OPENCL, "no such cap"),
        ("serial.t128.x8.r8.k8", "fp32.d256", H200, "a thread keeps"),
        ("serial.t128.x8.r4.k4.c64", "fp32.d128", TX2, "sm_62 gives 48"),
        ("serial.t128.x8.r4.k4.c32.b4", "fp32.d64", GTX_980, "blocks of"),
        ("blelloch.t128.x8.r4.k4.s4", "fp32.d64", H200, "somebody must merge"),
        ("serial.t128.x8.r4.k4.longest", "fp32.d64", H200, "equally long"),
        ("blelloch.opencl.t64.x8.r2.k2.s4.last_block.shared", "fp32.d64", OPENCL, "between work-groups"),
        ("blelloch.t128.x8.r1.k4.s32.two_kernels", "fp32.d64@b1.h1.q64.k512", H200, "fewer than states"),
    ],
)
def test_laws_say_why(variant: str, problem: str, device: Device, reason: str) -> None:
    posed = Problem.parse(problem if "@" in problem else problem + BIG)
    refused = lawful.refusal(SPACE.parse("cuda." + variant), posed, device)
    assert refused is not None and reason in refused, refused


def test_halves_are_left_to_matrix_units_where_there_are_some() -> None:
    """Class approx, asked for by name, is served; so are devices whose matrix units Triton does not use."""
    for family in ("fp16.d64", "bf16.d128.causal"):
        problem = Problem.parse(family + BIG)
        assert "on a matrix unit, which multiply-adds alone do not reach" in str(cuda.refusal(problem, H200))
        assert not any(cuda.refusal(problem, device) for device in (TX2, GTX_980, MI300, OPENCL))
    assert not any(cuda.refusal(Problem.parse(f"{family}.d64{BIG}"), H200) for family in ("fp32", "fp16.approx"))


@pytest.mark.parametrize("capability", [50, 62, 70, 75, 80, 90])
def test_shared_memory_of_old_devices_is_kept_to(capability: int) -> None:
    """What a law lets through fits the device, and on sm_62 no block takes more than 48 KB."""
    device = Device("cuda", "some", f"sm_{capability}", 10)
    for seed, family in enumerate(("fp32.d64", "fp32.d128.causal", "fp16.d256")):
        problem = Problem.parse(family + BIG)
        for turn in range(5):
            variant = next(lawful.variants(SPACE, problem, device, rng=random.Random(10 * seed + turn)))
            size = Tiling.of(variant.axes, problem).shared_bytes
            assert size <= shared_bytes(device)
            assert capability > 62 or size <= 48 << 10


def test_splits_beyond_scratch_go_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the states of all heads would outgrow their budget, heads go in turns, and the answer is the same."""
    problem, variant = Problem.parse("fp32.d16"), space.parse("cuda.blelloch.t64.x8.r1.k2.v2.s4.two_kernels")
    kernel, runtime = emulated.kernel(variant, problem, tmp_path)
    starts: list[str] = []
    run = runtime.run
    monkeypatch.setattr(runtime, "run", lambda launches: (starts.extend(x.name for x in launches), run(launches)))
    out, _, error = kernels.compute(kernel, problem)
    assert starts == ["attend", "finish"]
    monkeypatch.setattr(_call, "SCRATCH_BYTES", 4 * 4 * 2 * 29 * 18 + 1)  # one pair of heads
    again, _, _ = kernels.compute(cuda.CudaKernel(runtime, variant, problem), problem)
    assert error < 1 and torch.equal(out, again) and starts[2:] == ["attend", "finish"] * 4


def test_a_kernel_refuses_tensors_of_another_family(tmp_path: Path) -> None:
    kernel, _ = emulated.kernel(space.parse("cuda.serial.t64.x8.r2.k2"), Problem.parse("fp32.d64"), tmp_path)
    with pytest.raises(WrongArguments, match="dimensions"):
        kernel(*(torch.zeros(1, 2, 3, 32) for _ in range(3)))


@pytest.mark.parametrize(
    ("spelling", "family", "api"),
    [
        ("cuda.blelloch.t128.x8.r4.k4.w1.s4.two_kernels", "fp32.d128", "cu"),
        ("cuda.hybrid.t64.x8.r2.k2.w2.s4.last_block", "fp16.d64.causal", "cu"),
        ("cuda.hip.blelloch.t128.x8.r2.k2.s4.two_kernels", "fp32.d40.v24", "hip"),
        ("cuda.hip.blelloch.t128.x8.r2.k2.s4.last_block", "bf16.d40.v24.causal", "hip"),
    ],
)
def test_launches_through_the_drivers(spelling: str, family: str, api: str, tmp_path: Path) -> None:
    """NVIDIA's own Python and AMD's interface hand over every argument: the emulated kernels answer right, on new threads and on
    a second device, too, where NVIDIA's driver has no context unless somebody binds one. A second call only starts kernels, on
    torch's stream; nothing is cleared or waited for. Errors carry the driver's words."""
    found = launched.report(spelling, family, tmp_path)
    tiling = Tiling.of(space.parse(spelling).axes, Problem.parse(family))
    raised = found.pop("of no blocks")["answer"]
    for name, step in found.items():
        assert isinstance(step["answer"], float) and step["answer"] < 1, (name, step["answer"])
    calls = {name: step["calls"] for name, step in found.items()}
    for name, first in calls.items():
        bound = [call for call in first if "Ctx" in call[0]]
        if api == "cu" and name in ("first", "again, on another thread", "on a thread that torch never sent anywhere"):
            assert first[: len(bound)] == bound == [
                ["cuDevicePrimaryCtxRetain", "-", "0", "0", "0", "0"], ["cuCtxSetCurrent", "-", "1", "0", "0", "0"],
            ]  # fmt: skip
        else:
            assert not bound, "a context where there was one"
        calls[name] = first[len(bound) :]
    for name in ("first", "on the second device"):
        assert calls[name][0][0] == f"{api}ModuleLoadData"
        raises = [call for call in calls[name] if call[0] == "cuFuncSetAttribute"]
        if api == "cu" and tiling.shared_bytes > 48 << 10:
            assert raises == [["cuFuncSetAttribute", "emulate_attend", "8", str(tiling.shared_bytes), "0", "0"]]
        else:
            assert not raises
    names = ["emulate_attend", "emulate_finish"] if "two_kernels" in spelling else ["emulate_attend"]
    start, words = {
        "cu": ("cuLaunchKernel", "CUDA error: invalid argument"),
        "hip": ("hipModuleLaunchKernel", "HIP error: hipModuleLaunchKernel answered 1"),
    }[api]
    blocks = 2 * 2 * -(-2 * 29 // tiling.block_m) * 4  # batch, KV heads, tiles, splits
    attend = [blocks, tiling.threads, tiling.shared_bytes]
    finish = [-(-2 * 4 * 29 * tiling.value_dim // 128), 128, 0]
    for name, second in calls.items():
        if name not in ("first", "on the second device"):
            assert [call[1] for call in second] == names, name
            later = list(found).index(name) >= list(found).index("on another stream")
            for call, expected in zip(second, (attend, finish), strict=False):
                assert call[0] == start and [int(n) for n in call[2:]] == [*expected, launched.STREAM + later]
    assert raised == words
    counts = {"first": (2, 2), "on another stream": (1, 1), "in the next capture": (1, 0), "after captures": (1, 1)}
    for name, step in found.items():  # a stream's own and a spare for a capture; where there is none, the graph clears
        expected = counts.get(name, (0, 0)) if "last_block" in spelling else (0, 0)
        assert (step["cleared"], step["waited"]) == expected, name


def test_counters_grow_and_captures_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's set grows; what a capture was given stays its own, whatever else is asked for, and is taken from no stream."""
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: waits.append(1)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    here, counters = torch.device("cpu"), Counters()
    first = counters.of(here, 0, 0, 10)
    assert counters.of(here, 0, 0, 7) is first and len(counters.of(here, 0, 0, 11)) == 20 and len(waits) == 4
    owned = counters.of(here, 3, 1, 20)
    assert counters.of(here, 3, 1, 5) is owned and counters.of(here, 0, 0, 20) is not owned
    other = counters.of(here, 3, 2, 20)
    assert other is not owned and counters.of(here, 3, 1, 20) is owned
    for capture in (1, 4):  # more than were made before it began: cleared in the graph, for one launch, each time
        cleared = counters.of(here, 3, capture, 30)
        assert len(cleared) == 30 and counters.of(here, 3, capture, 30) is not cleared
    monkeypatch.setattr(_counters, "MOST_GRAPHS", 2)
    counters.of(here, 0, 0, 40)
    assert counters.of(here, 3, 5, 40) is not counters.of(here, 3, 5, 40)


@pytest.mark.opencl
def test_tuning_and_loading_an_opencl_device(opencl_cpu: Device, home: Path) -> None:
    """From the command's own function to a kernel that runs; torch on the CPU is the incumbent. Nobody asked, nobody tunes
    a CPU twice."""
    assert opencl_cpu in devices.detect("opencl") and opencl_cpu.is_host and opencl_cpu not in devices.detect("auto")
    problem = Problem.parse("fp32.d32@b1.h2.q64.k64")
    report = tuning.tune([problem], device="opencl", budget=15)
    assert report.complete and report.outcomes[0].device == opencl_cpu
    chosen = elsa_tune.load(problem, device="opencl")
    q, k, v = (torch.randn(1, 2, 64, 32) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(chosen(q, k, v), expected, atol=2e-6)


@pytest.mark.opencl
def test_opencl_mistakes(opencl_cpu: Device) -> None:
    with pytest.raises(BadDevice, match="compiled where it runs"):
        cuda.build(space.parse("cuda.serial.opencl.t64.x8.r2.k2.shared"), Problem.parse("fp32.d16"), OPENCL)
    from elsa_tune.generate.cuda import opencl as _opencl

    with pytest.raises(BuildFailed, match="nonsense"):
        _opencl.compile_report("__kernel void attend() { nonsense; }", opencl_cpu, "a test")


needs_oclgrind = pytest.mark.skipif(not simulated.DRIVER.is_file(), reason="needs Oclgrind: apt-get install oclgrind")


@needs_oclgrind
@pytest.mark.opencl
def test_no_race_and_no_stray_access_on_a_simulated_device(tmp_path: Path) -> None:
    """Every scan with the schedules that the laws allow, a dtype or mask with each, and every other value that changes code."""
    chosen = [(n, FAMILIES[i % 6]) for i, n in enumerate(networks())] + MORE
    cases = [simulated.Case("cuda." + n.format("opencl.", "shared"), f) for n, f in chosen if "last_block" not in n]
    report = simulated.report(cases, tmp_path)
    assert not report.said, (cases[len(report.errors)], report.said[:2000])
    assert len(report.errors) == len(cases) and max(report.errors) < 1, report.errors


WORKERS = "cuda.blelloch.opencl.t32.x8.r1.k2.w2.shared"
LAST_BLOCK = "cuda.blelloch.opencl.t32.x8.r2.k2.s4.last_block.shared"


@needs_oclgrind
@pytest.mark.opencl
@pytest.mark.parametrize(
    ("spelling", "text", "other", "words"),
    [
        (WORKERS, "  barrier_block();\n  if (", "  if (", "data race at local memory"),
        ("cuda.serial.opencl.t32.x8.r2.k2.shared", "1 && row < rows", "1 && row < rows + 64", "Invalid write"),
        (LAST_BLOCK, "", "", "data race at global memory"),  # what a law refuses
    ],
)
def test_the_simulated_device_sees_faults(spelling: str, text: str, other: str, words: str, tmp_path: Path) -> None:
    assert words in simulated.report([simulated.Case(spelling, "fp32.d16", text, other)], tmp_path).said

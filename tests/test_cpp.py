"""The C++ backend: sampled variants against float64, errors of trees and folds, compilers, other processors."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import subprocess

import pytest
import torch
from contracts import kernels

from elsa_tune import space
from elsa_tune.device import host_cpu
from elsa_tune.errors import BuildFailed, CompilerMissing, KernelCacheUnsafe, WrongArguments
from elsa_tune.generate import backends, cpp, lawful
from elsa_tune.generate.backends import Kernel
from elsa_tune.generate.cpp import compiler as _compiler
from elsa_tune.generate.cpp import huge_pages
from elsa_tune.generate.cpp import pool as _pool
from elsa_tune.parts import element as elements
from elsa_tune.parts import mask as masks
from elsa_tune.parts import score as scores
from elsa_tune.parts.element import UNIT
from elsa_tune.parts.exp import polynomial
from elsa_tune.problem import Problem
from elsa_tune.prove import reference
from elsa_tune.space import Space

HERE = host_cpu()
NATIVE = HERE.isas[0]
LANES = cpp.ISAS[NATIVE].lanes


def kernel_of(spelling: str, problem: Problem) -> Kernel:
    variant = space.parse(spelling)
    return cpp.load(cpp.build(variant, problem), variant, problem)


def peers(problem: Problem) -> list[Kernel]:
    sdpa = backends.get("sdpa")
    return [sdpa.load(sdpa.build(v, problem), v, problem) for v in lawful.variants(Space.read("sdpa"), problem, HERE)]


def here(variant: str) -> str:
    """A spelling with this processor's instruction set and lanes filled in."""
    return variant.format(isa=f"{NATIVE}.l{LANES}", lanes=LANES)


# What the covering array of tests/contracts does not draw: large tiles and dimensions, chunks of decoding, many workers and splits.
SAMPLED = [
    ("cpp.serial.{isa}.q1.k6.v6.n24", "fp32.d64@b1.h2.q64.k64"),
    ("cpp.serial.{isa}.q3.k2.v2.n16.e6.p8", "fp32.d33.v17@b1.h2.q64.k64"),
    ("cpp.hillis_steele.{isa}.q2.k4.v3.n16.s8.packed", "fp32.d48.v72.causal@b1.h6.kv2.q64.k64"),
    ("cpp.blelloch.{isa}.q2.k4.v4.n16.w8", "fp32.d64.causal@b1.h2.q64.k64"),
    ("cpp.blelloch.{isa}.q1.k8.v8.n48.s16.p32", "fp32.d128@b1.h8.kv2.q64.k64"),
    ("cpp.hybrid.{isa}.q4.k2.v2.n16.w2.s16.packed.e6", "fp32.d1.v3@b1.h2.q64.k64"),
    ("cpp.serial.{isa}.q2.k4.v4.n16.d2", "fp32.d80@b1.h4.kv2.q64.k64"),
    ("cpp.serial.{isa}.c4.q2.k4.v4.n32.d4", "fp32.d256@b1.h8.kv2.q1.k64"),
    ("cpp.blelloch.{isa}.q1.k4.v4.n16.w4.head.p8", "fp32.d64.causal@b1.h6.kv2.q64.k64"),
    ("cpp.serial.{isa}.q2.k4.v4.n16.head", "fp32.d40.v24.causal+window@b1.h4.kv2.q64.k64.left9.right0"),
    ("cpp.serial.{isa}.c4.q2.k4.v4.n32", "fp32.d64@b1.h8.kv2.q1.k64"),
    ("cpp.serial.{isa}.c{lanes}.q4.k1.v4.n32", "fp32.d64@b1.h4.kv1.q1.k64"),
    ("cpp.blelloch.{isa}.c2.q2.k4.v4.n32.s4", "fp32.d256@b1.h4.kv2.q2.k64"),
    ("cpp.hybrid.{isa}.c4.q4.k2.v4.n32.w2.s2.packed.p8", "fp32.d80.causal@b1.h3.kv1.q2.k64"),
    ("cpp.serial.{isa}.q3.k4.v4.n16.pair", "fp32.d64@b1.h4.kv2.q64.k64"),
    ("cpp.hybrid.{isa}.q2.k4.v4.n16.w4.s4.pair.packed", "fp32.d80.v48.causal+window@b1.h4.kv1.q64.k64.left40.right0"),
    ("cpp.blelloch.{isa}.c4.q2.k4.v4.n32.s4.pair", "fp32.d64@b1.h4.kv2.q1.k64"),
    ("cpp.serial.{isa}.q1.k6.v6.n24.pair.head", "bf16.d48.v72@b1.h2.q64.k64"),
    ("cpp.serial.{isa}.q2.k5.v5.n120.packed", "bf16.d64.causal@b1.h4.kv2.q64.k64"),
    ("cpp.serial.{isa}.q1.k6.v6.n24.head", "fp16.d48.v72@b1.h2.q64.k64"),
    ("cpp.hybrid.{isa}.c4.q4.k2.v4.n32.w2.s2.packed.p8", "fp16.d80.causal+window@b1.h3.kv1.q2.k64.left9.right0"),
    ("cpp.serial.{isa}.q1.k6.v6.n24.e11", "fp64.d64@b1.h2.q64.k64"),
    ("cpp.serial.{isa}.q2.k5.v5.n120.e10.head", "fp64.d33.v17.causal@b1.h4.kv2.q64.k64"),
    ("cpp.serial.{isa}.c2.q4.k2.v4.n32.d2.e10.p8", "fp64.d80@b1.h4.kv2.q1.k64"),
    (
        "cpp.hybrid.{isa}.q2.k4.v4.n16.w4.s4.pair.e11.packed",
        "fp64.d40.v24.causal+window@b1.h4.kv1.q64.k64.left40.right0",
    ),
]

# Every mask and every two: sequential, and split over workers and memory.
HOW = [
    "cpp.serial.{isa}.q2.k4.v4.n24",
    "cpp.hybrid.{isa}.q2.k5.v5.n16.w4.s4.packed",
    "cpp.blelloch.{isa}.c4.q4.k1.v4.n32.w2",
]
ALONE = [name for name in masks.names() if name != masks.NONE]
MASKED = [*ALONE, *("+".join(pair) for pair in itertools.combinations(ALONE, 2))]
SCORED = [*(name for name in scores.names() if name != scores.NONE), "causal.softcap", "lengths+window.softcap"]
SAMPLED += [(HOW[(i + 1) % 3], f"fp32.d64.{name}") for i, name in enumerate(SCORED)]
SAMPLED += [("cpp.serial.{isa}.q2.k5.v5.n120.packed", "bf16.d64.lengths.softcap")]
DOUBLES = ["causal.softcap+bias", "dense.dropout", "lengths+starts.alibi", "window_lower_right.sinks"]
SAMPLED += [(f"{HOW[i % 2]}{'.pair' * (i % 2)}.e{10 + i % 2}", f"fp64.d64.{name}") for i, name in enumerate(DOUBLES)]
EVERY_MASK = [pytest.param(how, f"fp32.d40.v24.{name}", marks=pytest.mark.slow) for how in HOW for name in MASKED]


@pytest.mark.parametrize(("variant", "problem"), [*SAMPLED, *EVERY_MASK])
def test_contract(variant: str, problem: str) -> None:
    wanted = Problem.parse(problem)
    wanted = wanted if "@" in problem else wanted.reshaped(heads=4, kv_heads=2, q_len=64, kv_len=64)
    kernels.obeys(kernel_of(here(variant), wanted), wanted, peers(wanted))


@pytest.mark.parametrize("seed", range(6))
def test_contract_of_random_variants(seed: int) -> None:
    rng = random.Random(seed)
    problem = Problem.parse(
        rng.choice(["fp32.d64@b1.h4.kv2.q64.k64", "fp32.d96.causal@b1.h2.q64.k64", "fp32.d64@b1.h2.kv1.q1.k64"])
    )
    variant = next(lawful.variants(Space.read("cpp"), problem, HERE, rng=rng))
    kernels.obeys(kernel_of(str(variant), problem), problem, peers(problem))


@pytest.mark.parametrize("isa", [isa for isa in HERE.isas if isa != NATIVE])
def test_contract_of_other_instruction_sets(isa: str) -> None:
    problem = Problem.parse("fp32.d64.causal@b1.h4.kv2.q64.k64")
    kernels.obeys(
        kernel_of(f"cpp.hybrid.{isa}.l{cpp.ISAS[isa].lanes}.q2.k4.v4.n16.w2.s2", problem), problem, peers(problem)
    )


@pytest.mark.parametrize(
    "variant",
    ["cpp.serial.{isa}.q2.k4.v4.n16", "cpp.blelloch.{isa}.q2.k4.v4.n16.w8.s16", "cpp.hybrid.{isa}.q2.k4.v4.n16.w8.s16"],
)
@pytest.mark.parametrize("kv_len", [1 << 10, 1 << 14, 1 << 16])
def test_error_of_tree_and_fold_within_the_bound(variant: str, kv_len: int) -> None:
    """docs/how-it-works.md: |err| <= u [2 (c_exp + 2) L + c_leaf + 1] sum p|v|, for logits as given (equal ones are exact)."""
    problem = Problem(head_dim=16, heads=1, q_len=4, kv_len=kv_len)
    axes = space.parse(here(variant)).axes
    block_n, states = int(axes["block_n"]), int(axes["workers"]) * int(axes["splits"])
    made = reference.random_inputs(problem, torch.Generator().manual_seed(1))
    inputs = reference.Inputs("equal logits", made.query, made.key, made.value.abs(), scale=0.0)
    rows = reference.every_row(problem)
    truth = reference.attention_rows(problem, inputs, rows)
    out = kernel_of(here(variant), problem)(inputs.query, inputs.key, inputs.value, inputs.scale)
    error = float((out[rows.batch, rows.head, rows.position].double() - truth).abs().max())
    levels = kv_len / block_n / states + math.log2(states)
    exp_units = polynomial.relative_error(int(axes["exp_degree"])) / UNIT
    bound = UNIT * (2 * (exp_units + 2) * levels + block_n + 1) * float(inputs.value.mean(2).max())
    assert error <= bound
    if states > 1:  # a tree stays near the bound's unit where the fold's grows with its length
        assert error <= 8 * UNIT * (1 + math.log2(kv_len))


def test_scores_of_any_size_lose_nothing() -> None:
    """log2(e) is applied after the maximum is known: large equal shifts of all scores cancel."""
    problem = Problem(head_dim=8, heads=1, q_len=3, kv_len=200)
    generator = torch.Generator().manual_seed(2)
    base = reference._given_logits(problem, torch.randint(-8, 8, (200,), generator=generator).float(), generator, "")
    shifted = reference.Inputs("", base.query, base.key + torch.tensor([2.0**16, *[0.0] * 7]), base.value, base.scale)
    kernel = kernel_of(here("cpp.serial.{isa}.q2.k4.v4.n16"), problem)
    near, far = (kernel(x.query, x.key, x.value, x.scale) for x in (base, shifted))
    assert float((near - far).abs().max()) <= 4 * UNIT * float(base.value.abs().max())


@pytest.mark.parametrize("state", ["triple", "pair"])
def test_biases_of_any_size(state: str) -> None:
    """Up to the largest float, of rows as a whole too: what no product with log2(e) holds."""
    problem, generator = Problem.parse("fp32.d16.bias"), torch.Generator().manual_seed(0)
    kernel = kernel_of(here(f"cpp.hybrid.{{isa}}.q2.k4.v4.n24.w2.s2{'.pair' if state == 'pair' else ''}"), problem)
    query, key, value = (torch.randn(2, 3, 50, 16, generator=generator) for _ in range(3))
    largest, even = torch.finfo(torch.float32).max, torch.arange(50) % 2 == 0
    for one, other in (
        (3e38, 3e38),
        (largest, -largest),
        (-largest, -largest),
        (-3.4e38, -3e38),
        (-1e10, -1.2e10),
        (5.0, -largest),
    ):
        bias = torch.where(even, one, other).expand(50, 50)
        scores = (query @ key.mT / 4 + bias).double()  # beside such a bias nothing is left of them, in floats
        lse = torch.empty(2, 3, 50)
        out = kernel(query, key, value, None, None, lse, (bias[None, None],))
        truth = scores.softmax(-1) @ value.double()
        assert float((out - truth).abs().max()) < 2e-6
        known = scores.logsumexp(-1).clip(
            -largest * math.log(2), largest * math.log(2)
        )  # in base 2 they are floats too
        assert torch.allclose(lse.double(), known, rtol=1e-6, atol=1e-5)


def test_large_outputs_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones inside the output alone, and none for outputs that the allocator may have had before."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_advise", lambda: lambda start, length: asked.append((start, length)))
    problem = Problem.parse("fp32.d16")
    kernel = kernel_of(here("cpp.serial.{isa}.q2.k4.v4.n16"), problem)
    key, rows = torch.randn(1, 1, 3, 16), huge_pages.FRESH // (4 * 16)
    for q_len, times in ((rows - 1, 0), (rows + 5, 1)):
        out = kernel(torch.randn(1, 1, q_len, 16), key, key)
        assert len(asked) == times and bool(out.isfinite().all())
    ((start, length),) = asked
    assert start % huge_pages.HUGE == length % huge_pages.HUGE == 0 and length > huge_pages.FRESH // 2
    assert out.data_ptr() <= start and start + length <= out.data_ptr() + out.nbytes


def test_splits_are_bounded_by_bytes() -> None:
    """Where split states would outgrow their budget, fewer splits are used, and the answer stays right."""
    problem = Problem.parse("fp32.d16@b1.h64.q4096.k64")
    variant = space.parse(here("cpp.blelloch.{isa}.q1.k4.v4.n16.s16"))
    source = cpp.source(variant, problem)
    small = source.text.replace(f"SCRATCH_BYTES = {cpp.SCRATCH_BYTES}", "SCRATCH_BYTES = 4096")
    assert small != source.text
    built = cpp.build_text(small, "small-scratch", variant)
    inputs = reference.random_inputs(problem.reshaped(q_len=40), torch.Generator().manual_seed(1))
    out = cpp.load(built, variant, problem)(inputs.query, inputs.key, inputs.value)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (inputs.query, inputs.key, inputs.value))
    )
    assert float((out - expected).abs().max()) < 1e-5


def test_heads_too_large_to_be_packed_are_read_where_they_are() -> None:
    """Where copies of a head for every thread would outgrow their budget, or there are fewer heads than threads, or more, the
    answer is the same bits."""
    problem = Problem.parse("fp32.d16@b1.h2.q300.k200")
    variant = space.parse(here("cpp.serial.{isa}.q1.k4.v4.n16.head"))
    small = cpp.source(variant, problem).text.replace(f"SCRATCH_BYTES = {cpp.SCRATCH_BYTES}", "SCRATCH_BYTES = 4096")
    unpacked = cpp.load(cpp.build_text(small, "small-head", variant), variant, problem)
    packed = kernel_of(str(variant), problem)
    for heads in (1, 2, 7):
        x = reference.random_inputs(problem.reshaped(heads=heads, kv_heads=heads), torch.Generator().manual_seed(1))
        assert torch.equal(unpacked(*x.tensors), packed(*x.tensors))


def test_a_kernel_refuses_tensors_of_another_family() -> None:
    kernel = kernel_of(here(SAMPLED[0][0]), Problem.parse(SAMPLED[0][1]))
    with pytest.raises(WrongArguments, match="dimensions"):
        kernel(*(torch.zeros(1, 2, 3, 32) for _ in range(3)))


def test_one_openmp_runtime() -> None:
    """Calling a kernel loads no second runtime beside torch's."""
    import threadpoolctl

    kernel = kernel_of(here(SAMPLED[0][0]), Problem.parse(SAMPLED[0][1]))
    kernel(*(torch.zeros(1, 4, 300, 64) for _ in range(3)))
    runtimes = {pool["filepath"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"}
    assert len(runtimes) == 1 and _pool.openmp()[1]


def test_depth_and_merges_are_counted() -> None:
    problem = Problem.parse("fp32.d16")
    counts = {
        "cpp.serial.{isa}.q2.k4.v4.n16": (0, 0),
        "cpp.blelloch.{isa}.q2.k4.v4.n16.w8.s16": (3 + 4, 7 + 15),
        "cpp.hybrid.{isa}.q2.k4.v4.n16.w4.s4": (2 + 2, 5 + 3),
    }
    for spelling, (depth, merges) in counts.items():
        resources = cpp.build(space.parse(here(spelling)), problem).resources
        assert (resources["depth"], resources["merges"]) == (depth, merges)


def test_spills_are_seen() -> None:
    """Too many accumulators for the registers show as stores to the stack in hot loops."""
    variant, problem = space.parse("cpp.serial.avx2.l8.q6.k10.v10.n120"), Problem.parse("fp32.d64")
    if "avx2" not in HERE.isas:
        pytest.skip("this processor has no AVX2")
    assert cpp.build(variant, problem).flaw
    assert not cpp.build(space.parse("cpp.serial.avx2.l8.q2.k5.v5.n120"), problem).flaw


def test_generated_code_has_no_warnings() -> None:
    for spelling, problem in SAMPLED:
        variant, wanted = space.parse(here(spelling)), Problem.parse(problem)
        compiler = _compiler.find()
        command = [
            *compiler.command,
            *cpp.FLAGS,
            *cpp.WARNINGS,
            "-Werror",
            *cpp.ISAS[NATIVE].flags,
            "-fsyntax-only",
            "-x",
            "c++",
            "-",
        ]
        done = subprocess.run(
            command, input=cpp.source(variant, wanted).text, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[:2000]


def test_broken_source_is_reported_with_the_compilers_words() -> None:
    variant = space.parse(here("cpp.serial.{isa}.q2.k4.v4.n16"))
    with pytest.raises(BuildFailed, match="nonsense"):
        cpp.build_text("int main() { return nonsense; }", "broken", variant)
    assert cpp.find("broken") is None


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    _compiler.find.cache_clear()
    monkeypatch.setattr(_compiler, "_candidates", lambda: [("no-such-compiler",)])
    try:
        with pytest.raises(CompilerMissing, match="ziglang|elsa-tune\\[compiler\\]"):
            cpp.command(space.parse(here("cpp.serial.{isa}.q2.k4.v4.n16")))
    finally:
        _compiler.find.cache_clear()


def test_the_compiler_from_pypi(monkeypatch: pytest.MonkeyPatch, home: object) -> None:
    """zig's clang, found when no system compiler is, builds kernels that obey the contract, and its loops are read too."""
    pytest.importorskip("ziglang", reason="needs the compiler extra: pip install 'elsa-tune[compiler]'")
    only_zig = [command for command in _compiler._candidates() if "ziglang" in command]
    monkeypatch.setattr(_compiler, "_candidates", lambda: only_zig)
    _compiler.find.cache_clear()
    try:
        assert "clang" in _compiler.find().version
        problem = Problem.parse("fp32.d64.causal@b1.h4.kv2.q64.k64")
        variant = space.parse(here("cpp.hybrid.{isa}.q2.k4.v4.n16.w2.s2"))
        built = cpp.build(variant, problem)
        assert built.resources["hot_fmas"] > 0 and not built.flaw
        kernels.obeys(cpp.load(built, variant, problem), problem, peers(problem))
    finally:
        _compiler.find.cache_clear()


@pytest.mark.parametrize(("trouble", "remedy"), [("link", "put the thing itself there"), ("writable", "chmod go-w it")])
def test_kernels_that_others_could_have_written_are_refused(trouble: str, remedy: str, home: object) -> None:
    variant, problem = space.parse(here("cpp.serial.{isa}.q2.k4.v4.n16")), Problem.parse("fp32.d16")
    built = cpp.build(variant, problem)
    assert built.path is not None and cpp.find(built.digest)
    if trouble == "link":
        moved = built.path.with_name("moved.so")
        built.path.rename(moved)
        built.path.symlink_to(moved)
    else:
        built.path.chmod(0o777)
    with pytest.raises(KernelCacheUnsafe, match=remedy):
        cpp.find(built.digest)


def test_digests_cannot_leave_the_kernel_folder() -> None:
    assert cpp.find("../../etc") is None and cpp.find("") is None


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize(("number", "dtype", "more"), [("float", "fp32", ""), ("double", "fp64", ".e11")])
def test_neon_under_an_emulator(number: str, dtype: str, more: str, tmp_path: object) -> None:
    """The NEON rendering runs on an emulated Arm processor and agrees with the truth."""
    problem = Problem.parse(f"{dtype}.d40.v24.causal@b1.h4.kv2.q37.k53")
    variant = space.parse(f"cpp.hybrid.neon.l4.q4.k4.v4.n16.w2.s2{more}")
    inputs = reference.random_inputs(problem, torch.Generator().manual_seed(3))
    rows = reference.every_row(problem)
    truth = reference.attention_rows(problem, inputs, rows).double()

    def literal(x: torch.Tensor) -> str:
        return "{" + ",".join(float(v).hex() for v in x.flatten()) + "}"

    main = f"""
#include <cmath>
#include <cstdio>
const {number} q[] = {literal(inputs.query)}, k[] = {literal(inputs.key)}, v[] = {literal(inputs.value)};
const double truth[] = {{{",".join(repr(float(t)) for t in truth.flatten())}}};
{number} out[sizeof(truth) / 8];
int main() {{
  Call c{{q, k, v, out, nullptr,
         1, 4, 2, 37, 53, {{0, {37 * 40}, 40}}, {{0, {53 * 40}, 40}}, {{0, {53 * 24}, 24}}, {{0, {37 * 24}, 24}}, {40**-0.5!r}, 1, nullptr}};
  if (elsa_attention(&c)) return 2;
  double worst = 0;
  for (unsigned i = 0; i < sizeof(truth) / 8; ++i)
    if (!(std::fabs(out[i] - truth[i]) <= worst)) worst = std::fabs(out[i] - truth[i]);
  std::printf("%.3e\\n", worst);
}}
"""
    source = tmp_path / "neon.cpp"  # type: ignore[operator]
    source.write_text(cpp.source(variant, problem).text + main)
    program = tmp_path / "neon"  # type: ignore[operator]
    subprocess.run(
        ["aarch64-linux-gnu-g++", *cpp.FLAGS, "-Wno-psabi", "-static", str(source), "-o", str(program)],
        check=True,
    )
    shown = subprocess.run(["qemu-aarch64", str(program)], capture_output=True, text=True, check=True)
    assert float(shown.stdout) < 32 * elements.get(dtype).unit

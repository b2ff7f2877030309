# ruff: noqa: E501
"""Faults planted in rendered kernels, one at a time, in each language: the check must find every one.

A mutation that no longer changes the text is an error. One that survives must be explained here, or the check has a hole.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import emulated
import pytest

from elsa_tune import space
from elsa_tune.device import host_cpu, opencl_devices
from elsa_tune.generate import backends, cpp, cuda, lawful, triton
from elsa_tune.generate.backends import Built, Kernel
from elsa_tune.generate.cuda import opencl as _opencl
from elsa_tune.problem import Problem
from elsa_tune.prove import check
from elsa_tune.space import Space

slow = pytest.mark.slow
OF_CPUS, OF_GPUS = "fp32.d16.v8.causal@b1.h4.kv2.q64.k64", "fp32.d8.v4.causal@b1.h4.kv2.q64.k64"
BOUNDED = ".lengths+window.softcap"
"""What families have whose bounds, operands and scores are mutated: closed-form masks with integers and an array, and a score."""


class Mutation(NamedTuple):
    """What goes wrong, the text it replaces everywhere and by what; and why the kernel is right nevertheless, if it is."""

    fault: str
    old: str
    new: str
    harmless: str = ""


def posed(family: str) -> Problem:
    """A problem of the family, with groups."""
    return Problem.parse(family) if "@" in family else Problem.parse(family).reshaped(heads=4, kv_heads=2)


def judged(mutation: Mutation, text: str, kernel_of: object, problem: Problem, longest: int) -> None:
    """The mutation is caught, or survives for the reason that it names."""
    changed = text.replace(mutation.old, mutation.new)
    assert changed != text, f"{mutation.fault}: the rendering no longer has {mutation.old!r}"
    sdpa = backends.get("sdpa")
    here = lawful.variants(Space.read("sdpa"), problem, host_cpu())
    peers = [sdpa.load(sdpa.build(v, problem), v, problem) for v in here]
    verdict = check.check_family(kernel_of(changed), problem, peers, longest=longest)  # type: ignore[operator]
    if mutation.harmless:
        assert not verdict.reason, f"{mutation.fault} is caught by now ({verdict.reason}); it needs no excuse"
    else:
        assert verdict.reason, f"{mutation.fault} survives"
    print(f"{mutation.fault}: {verdict.reason or 'survives, ' + mutation.harmless}")


NATIVE = host_cpu().isas[0]
CPP = f"cpp.hybrid.{NATIVE}.l{cpp.ISAS[NATIVE].lanes}.q2.k4.v4.n16.w2.s4"
# fmt: off
OF_CPP = [
    Mutation("a coefficient is wrong in its 4th digit", "0.693147", "0.693847"),
    Mutation("the last coefficient is wrong in its 3rd digit", "0.00132647", "0.00138647"),
    Mutation("small weights are cut off", "(x < -126.0f)", "(x < -24.0f)"),
    Mutation("the log-sum-exp lacks ln 2", ")) / LOG2_E;", "));"),
    Mutation("the log-sum-exp lacks the maximum", "(state.m[r / ROWS][lane] + __builtin_log2f", "(__builtin_log2f"),
    Mutation("the log-sum-exp is of the next row", "+ position_of_row : nullptr", "+ position_of_row + 1 : nullptr"),
    Mutation("keep is not applied to S", "x.s[i] *= keep[i];", ""),
    Mutation("keep is not applied to W", "w[t][i] * keep[i] + acc", "w[t][i] + acc"),
    Mutation("keep is applied to W twice", "w[t][i] * keep[i] + acc", "w[t][i] * keep[i] * keep[i] + acc"),
    Mutation("the maximum is forgotten", "x.m[i] = m;\n", ""),
    Mutation("the maximum is the leaf's", "m = max(x.m[i], m);", ""),
    Mutation("the first maximum is 0", "m[i] = splat(-INF), s", "m[i] = splat(0.0f), s"),
    Mutation("merging swaps what is kept of S", "keep_a[i] * a.s[i] + keep_b[i] * b.s[i]", "keep_b[i] * a.s[i] + keep_a[i] * b.s[i]"),
    Mutation("merging swaps what is kept of W", "keep_a[i] * a.w[t][i] + keep_b[i] * b.w", "keep_b[i] * a.w[t][i] + keep_a[i] * b.w"),
    Mutation("merging forgets the maximum", "    b.m[i] = m;\n", ""),
    Mutation("merging loses a", "keep_a[i] * a.w[t][i] + ", ""),
    Mutation("rounds go upwards", "{3, 4, 2},  // round 2", "{2, 4, 2},  // round 2"),
    Mutation("a round is missing", "        {1, 2, 1},  // round 1 of 2: 2 merges\n", ""),
    Mutation("the mask is off by one", "(high[i] > key) ?", "(high[i] - 1 > key) ?"),
    Mutation("the mask is off by one, the other way", "static_cast<int32_t>(first_key + j)", "static_cast<int32_t>(first_key + j - 1)"),
    Mutation("leaves are masked too late", "first + n > unmasked", "first + n > unmasked + BLOCK_N"),
    Mutation("a tile sees one key too few", "limit = by_last.high,", "limit = by_last.high - 1,"),
    Mutation("scores are scaled twice", "x[r] * scale;", "x[r] * scale * scale;"),
    Mutation("a negative scale counts as positive", "static_cast<float>(c.scale)", "static_cast<float>(c.scale < 0 ? -c.scale : c.scale)"),
    Mutation("heads of a group are interleaved", "kv_head * group + row % group", "kv_head + row % group * c.kv_heads"),
    Mutation("positions of a group are mixed", "position_of_row = row / group", "position_of_row = row % c.q_len"),
    Mutation("K is read with the strides of V", "key + index * BLOCK_N * c.k.row", "key + index * BLOCK_N * c.v.row"),
    Mutation("V is read one row late", "value + index * BLOCK_N * c.v.row", "value + (index ? index * BLOCK_N - 1 : 0) * c.v.row"),
    Mutation("the rest of a leaf is counted twice", "for (; j + KT <= n; j += KT) dot_keys<QV, KT>(query, leaf", "for (; j + KT <= n + 1; j += KT) dot_keys<QV, KT>(query, leaf"),
    Mutation("the rest's maximum is left out", "        UNROLL for (int i = 0; i < QV; ++i) top[i] = max(top[i], score[j][i]);\n    }\n    if", "{}\n    }\n    if"),
    Mutation("the rest is not filled with zeros", "std::memset(rest", "if (false) std::memset(rest", "what it would hold is computed and never read"),
    Mutation("workers share a leaf", "(end - begin) * w / WORKERS, to", "(end - begin) * w / WORKERS - (w && end > begin), to"),
    Mutation("splits leave out a leaf", "leaves * split / splits, leaves * (split + 1)", "leaves * split / splits + (split > 1), leaves * (split + 1)"),
    Mutation("a split's state is another's", "mine[split] =", "mine[split ^ 1] =", "which slot a state lies in does not matter to a sum, up to the order of merging"),
    Mutation("the output is of the next row", "position_of_row * c.o.row : sink", "(position_of_row + 1) * c.o.row : sink"),
    Mutation("columns of V are off by one", "value + t * CHUNK, leaf.value_row, n", "value + t * CHUNK + 1, leaf.value_row, n"),
    Mutation("the reference is rounded to nearest", "const vec up = near < x ? near + 1.0f : near;", "const vec up = near;", "weights up to 2^(1/2) do no harm in float32"),
]


OF_PACKED_CPP = [
    Mutation("a head's first leaf alone is packed", "if (index == end) {", "if (index == 0) {"),
    Mutation("another head's copies are kept", "if (k != key || v != value) begin = end = 0;", ""),
    Mutation("the last leaf is cut short", "left < BLOCK_N ? left : BLOCK_N", "left < BLOCK_N ? left - 1 : BLOCK_N"),
    Mutation("values are packed over keys", "copy(to + BLOCK_N * HEAD_DIM, from.value", "copy(to, from.value"),
    Mutation("leaves overlap in the copy", "packed + index * LEAF_FLOATS", "packed + index * (LEAF_FLOATS - 1)"),
    Mutation("two threads share a copy", "packed_bytes * workers.fetch_add(1)", "packed_bytes * (workers.fetch_add(1) / 2)"),
    Mutation("a tile is left to nobody", "begun[group] < tiles &&", "begun[group] + 1 < tiles &&"),
    Mutation("parts of the columns overlap", "for (int d = HEAD_STEPS * 1 / 2;", "for (int d = HEAD_STEPS * 1 / 2 - 1;"),
    Mutation("the first part of the columns is lost", "sum_chunk(score[j][i] + acc[j][i])", "sum_chunk(acc[j][i])"),
]


OF_BOUNDS = [
    Mutation("the first key that is seen is not", "(position - left)", "(position - left + 1)"),
    Mutation("the key before the first is seen", "(position - left)", "(position - left - 1)"),
    Mutation("the window looks forwards", "(position - left)", "(position + left)"),
    Mutation("the last key that is seen is not", "((position + right) + 1)", "(position + right)"),
    Mutation("the key after the last is seen", "((position + right) + 1)", "((position + right) + 2)"),
    Mutation("the window's sides are swapped", "(position - left)", "(position - right)"),
    Mutation("both sides are as wide as the left one", "((position + right) + 1)", "((position + left) + 1)"),
]
"""Of the window's bounds, which every language prints alike."""


OF_BOUNDED_CPP = [
    *OF_BOUNDS,
    Mutation("the window has no end", "least(lengths, ((position + right) + 1))", "lengths"),
    Mutation("every sequence is as long as the first", "c.lengths_data[b * c.lengths_batch]", "c.lengths_data[0]"),
    Mutation("lengths are not looked at", "least(lengths, ((position + right) + 1))", "((position + right) + 1)"),
    Mutation("sequences have one key more", "const int64_t lengths = c.", "const int64_t lengths = 1 + c."),
    Mutation("a row that sees no key divides by 0", "state.s[i] == 0.0f ? vec{} : 1.0f", "1.0f"),
    Mutation("a maximum over no keys meets itself", "return m == -INF ? vec{} : m;", "return m;"),
    Mutation("the front of a tile is not masked", "first < after || first + n > unmasked", "first + n > unmasked"),
    Mutation("the front is masked too short", "first < after ||", "first + BLOCK_N < after ||"),
    Mutation("the first key of a row is hidden", "(low[i] <= key)", "(low[i] < key)"),
    Mutation("keys before a row's first are seen", "(low[i] <= key) & (high[i] > key)", "(high[i] > key)"),
    Mutation("a tile begins one leaf late", "before = by_first.low / BLOCK_N", "before = by_first.low / BLOCK_N + 1"),
    Mutation("a tile begins where its last row does", "before = by_first.low", "before = by_last.low"),
    Mutation("splits begin at the first leaf", "before + leaves * split / splits, before + ", "leaves * split / splits, "),
    Mutation("scores are not made small again", "score * (1.0f / softcap)", "score"),
    Mutation("scores stay below 1", "return y * over / under * softcap;", "return y * over / under;"),
    Mutation("the cap is reached too soon", "splat(9.0f)", "splat(2.0f)"),
    Mutation("there is no cap below", "y = y < -limit ? -limit : y;", ""),
    Mutation("a coefficient of the quotient is wrong in its 3rd digit", "0.467143148f", "0.468143148f"),
    Mutation("logarithms of 2 are capped", "softcap_score(x, ", "softcap_score(x * LOG2_E, "),
    Mutation("a capped leaf has no maximum", "      top[i] = max(top[i], x);\n", ""),
    Mutation("the cap is another operand", "static_cast<float>(c.softcap)", "static_cast<float>(c.right)"),
]


OF_PACKED = "fp32.d32.v8.causal@b1.h4.kv2.q64.k64"
PACKED_CPP = f"cpp.serial.{NATIVE}.l{cpp.ISAS[NATIVE].lanes}.q1.k4.v4.n16.d2.head"
BOUNDED_CPU, BOUNDED_GPU = (family.replace(".causal", BOUNDED).partition("@")[0] for family in (OF_CPUS, OF_GPUS))
CPP_CASES = [
    *(pytest.param(CPP, OF_CPUS, m, id=m.fault) for m in OF_CPP),
    *(pytest.param(CPP, BOUNDED_CPU, m, id=f"bounded: {m.fault}") for m in OF_BOUNDED_CPP),
    *(pytest.param(PACKED_CPP, OF_PACKED, m, id=f"packed: {m.fault}") for m in OF_PACKED_CPP),
]


@slow
@pytest.mark.parametrize(("spelling", "family", "mutation"), CPP_CASES)
def test_faults_in_cpp(spelling: str, family: str, mutation: Mutation, home: object) -> None:
    problem, variant = posed(family), space.parse(spelling)

    def kernel(text: str) -> Kernel:
        return cpp.load(cpp.build_text(text, "mutant", variant), variant, problem)

    judged(mutation, cpp.source(variant, problem).text, kernel, problem, 8193)


@slow
@pytest.mark.parametrize("family", ["fp32.d64", "fp32.d64.causal"])
def test_a_kernel_whose_2_to_0_is_not_1_is_caught_by_length(family: str, home: object) -> None:
    """The default decoding kernel of an earlier version, as it was; the short cases alone see nothing."""
    problem = Problem.parse(f"{family}@b1.h2.q64.k64")
    variant = space.parse(f"cpp.serial.{NATIVE}.l{cpp.ISAS[NATIVE].lanes}.q2.k4.v4.n48")
    text = cpp.source(variant, problem).text
    faulty = text.replace("p = p * f + 1.0f;", "p = p * f + 1.00000012f;")
    assert faulty != text
    kernel = cpp.load(cpp.build_text(faulty, "mutant", variant), variant, problem)
    assert "that drift" in check.check_family(kernel, problem, []).reason
    assert not check.check_family(kernel, problem, [], longest=50).reason


CUDA = "cuda.hybrid.t32.x4.r2.k4.w2.s4.last_block.polynomial.apart"
OF_CUDA = [
    Mutation("2^0 is not 1", "12583039.0f) << 23);", "12583039.0f) << 23 | 1u);"),
    Mutation("a coefficient is wrong in its 4th digit", "0.693147", "0.693847"),
    Mutation("states are cut off", "larger(n, -127.0f) +", "(n < -24.0f ? -127.0f : n) +"),
    Mutation("the log-sum-exp lacks ln 2", ") * 0.6931471805599453f;", ");"),
    Mutation("the log-sum-exp is in base 10", ") * 0.6931471805599453f;", ") * 0.30103f;"),
    Mutation("keep is not applied to S", "multiply_add(x->s[i], keep[i], sum)", "x->s[i] + sum"),
    Mutation("keep is not applied to W", "multiply_add(x->w[i][first + n], keep[i], sum[i][n])", "x->w[i][first + n] + sum[i][n]"),
    Mutation("the maximum is forgotten", "    x->m[i] = m;\n", ""),
    Mutation("the first maximum is 0", "x->m[i] = no_key();", "x->m[i] = 0.0f;"),
    Mutation("the weights lack the maximum's share", "exp2_of(multiply_add(score[i][j], c, -origin))", "exp2_of(score[i][j] * c)"),
    Mutation("workers' S are swapped", "keep_a * a[(i * (COLUMNS + 2) + 1) * TEAM + t] + keep_b * b->s[i]", "keep_b * a[(i * (COLUMNS + 2) + 1) * TEAM + t] + keep_a * b->s[i]"),
    Mutation("workers' W are swapped", "keep_a * a[(i * (COLUMNS + 2) + 2 + n) * TEAM + t] + keep_b *", "keep_b * a[(i * (COLUMNS + 2) + 2 + n) * TEAM + t] + keep_a *"),
    Mutation("merging workers forgets the maximum", "    b->m[i] = m;\n", ""),
    Mutation("splits' S are swapped", "s3 = keep_a * s2 + keep_b * s3", "s3 = keep_b * s2 + keep_a * s3"),
    Mutation("splits' W are swapped", "w3 = keep_a * w1 + keep_b * w3", "w3 = keep_b * w1 + keep_a * w3"),
    Mutation("merging splits forgets the maximum", "    m3 = m;\n", ""),
    Mutation("a round's merge is missing", "    w1 = keep_a * w0 + keep_b * w1;\n", ""),
    Mutation("splits overlap", "? split * each : seen, high", "? split * each - (split > 0) : seen, high"),
    Mutation("splits leave a key out", "low + each < seen ? low + each : seen", "low + each < seen ? low + each - 1 : seen"),
    Mutation("keys from the end on are seen", "if (key >= high || key", "if (key > high || key"),
    Mutation("the mask is off by one", "key >= rows[i].high", "key + 1 >= rows[i].high"),
    Mutation("the mask is off by one, the other way", "key >= rows[i].high", "key > rows[i].high"),
    Mutation("leaves are masked too late", "if (start >= whole)", "if (start > whole)"),
    Mutation("a tile sees one key too few", "const int seen = by_last.high;", "const int seen = by_last.high - 1;"),
    Mutation("rows past the end are not zero", "if (first + row < rows) x = fetch", "x = fetch", "rows past the end are read from memory behind the query and never written"),
    Mutation("rows of V past the end are not zero", "held[n] = zero_vec();", "", "their weights are 0: only what is no number would show"),
    Mutation("heads of a group are interleaved", "kv_head * group + row % group) * head_stride", "kv_head + row % group * 2) * head_stride"),
    Mutation("the sign is lost", "x.x * factor", "x.x"),
    Mutation("K is read with the strides of V", "keys.stride = stride_kn;", "keys.stride = stride_vn;"),
    Mutation("V is of the first KV head", "values.rows = value + batch * stride_vb + kv_head * stride_vh;", "values.rows = value + batch * stride_vb;"),
    Mutation("the output is of the next row", "const int row = first + i / VALUE_DIM;", "const int row = first + i / VALUE_DIM + 1;"),
    Mutation("lanes do not share their maximum", "  row_max(top, (SHARED float*)p, t, lane);\n", ""),
    Mutation("lanes do not share their sum", "  row_sum(x->s, (SHARED float*)p, t, lane);\n", ""),
    Mutation("half of the lanes share their maximum", "larger(x[i], lane_xor(x[i], 2))", "x[i]"),
    Mutation("threads side by side have the same row", "* ABREAST + t % ABREAST", "* ABREAST"),
    Mutation("counters are not set back", "(int)atomicInc((unsigned*)count, (unsigned)last)", "(int)atomicInc((unsigned*)count, 1u << 30)"),
]
OF_BOUNDED_CUDA = [
    *OF_BOUNDS,
    Mutation("every sequence is as long as the first", "lengths_data[batch * lengths_batch]", "lengths_data[0]"),
    Mutation("lengths are not looked at", "least(lengths, ((position + right) + 1))", "((position + right) + 1)"),
    Mutation("sequences have one key more", "lengths = lengths_data", "lengths = 1 + lengths_data"),
    Mutation("a row that sees no key divides by 0", "(s3 == 0.0f ? 1.0f : s3)", "s3"),
    Mutation("a maximum over no keys meets itself", "return m == no_key() ? 0.0f : m;", "return m;"),
    Mutation("the front of a tile is not masked", "start < after || start >= whole", "start >= whole"),
    Mutation("the front is masked too short", "start < after ||", "start + STEP < after ||"),
    Mutation("the first key of a row is hidden", "key < rows[i].low", "key <= rows[i].low"),
    Mutation("keys before a row's first are seen", "key < rows[i].low || ", ""),
    Mutation("a tile begins one key late", "begin = by_first.low,", "begin = by_first.low + 1,"),
    Mutation("a tile begins where its last row does", "begin = by_first.low,", "begin = by_last.low,"),
    Mutation("splits begin at the first key", "begin + split * each < seen ? begin + split * each", "split * each < seen ? split * each"),
    Mutation("what every row sees begins where the first row does", "by_last.low, whole", "by_first.low, whole"),
    Mutation("scores are not made small again", "score * (1.0f / softcap)", "score"),
    Mutation("scores stay below 1", "return y * over / under * softcap;", "return y * over / under;"),
    Mutation("the cap is reached too soon", "9.0f", "2.0f"),
    Mutation("there is no cap below", "y = y < -9.0f ? -9.0f : y;", ""),
    Mutation("a coefficient of the quotient is wrong in its 3rd digit", "0.467143148f", "0.468143148f"),
    Mutation("products are capped without the scale", "score[i][j] * from->factor", "score[i][j]"),
    Mutation("capped scores are of base e", "1.4426950408889634f", "1.0f"),
    Mutation("the cap is another operand", "scores.softcap = softcap;", "scores.softcap = (float)right;"),
]
HIP = "cuda.hip.hybrid.t64.x4.r2.k4.w2.s4.last_block.native"
OF_HIP = [
    Mutation("lanes exchange with the wrong ones", "return __shfl_xor(x, mask);", "return __shfl_xor(x, mask / 2);"),
    Mutation("counters are not set back", "(int)atomicInc((unsigned*)count, (unsigned)last)", "(int)atomicInc((unsigned*)count, 1u << 30)"),
    Mutation("weights are powers of e", "return __ocml_native_exp2_f32(x);", "return expf(x);"),
    Mutation("a log-sum-exp of e", "return log2f(x);", "return logf(x);"),
    Mutation("there are no barriers", "{ __syncthreads(); }", "{}"),
]
OPENCL = "cuda.hybrid.opencl.t32.x4.r2.k4.w2.s4.two_kernels.shared"
OF_OPENCL = [
    Mutation("multiply-adds subtract", "return fma(a, b, c);", "return fma(a, b, -c);"),
    Mutation("the larger is the smaller", "return fmax(a, b);", "return fmin(a, b);"),
    Mutation("weights are powers of e", "return exp2(x);", "return exp(x);"),
    Mutation("a log-sum-exp of e", "return log2(x);", "return log(x);"),
    Mutation("bits are numbers", "return as_float(bits);", "return (float)bits;"),
    Mutation("numbers are bits", "return as_uint(x);", "return (unsigned)(int)x;", "a whole number beyond 2^23 ends in the same bits as its float, and only those go into the exponent"),
    Mutation("bits are half of it", "return as_uint(x);", "return as_uint(x) >> 1;"),
    Mutation("there are no barriers", "barrier(CLK_LOCAL_MEM_FENCE);", ""),
    Mutation("pairs of blocks compute the same", "return (int)get_group_id(0);", "return (int)get_group_id(0) / 2;"),
    Mutation("threads side by side have the same row", "* ABREAST + t % ABREAST", "* ABREAST"),
    Mutation("lanes read their neighbours' maxima", "of_row[l * ABREAST]", "of_row[l]"),
    Mutation("the second kernel forgets the last threads", "if (state_row >= (index_t)slots * rows) return;", "if (state_row >= (index_t)slots * rows - 1) return;"),
]


def _emulated(spelling: str, family: str, mutation: Mutation, folder: Path) -> None:
    problem, variant = posed(family), space.parse(spelling)

    def kernel(text: str) -> Kernel:
        return cuda.CudaKernel(emulated.EmulatedRuntime(variant, problem, text, folder), variant, problem)

    judged(mutation, cuda.source(variant, problem).text, kernel, problem, 301)


CUDA_CASES = [
    *(pytest.param(OF_GPUS, m, id=m.fault) for m in OF_CUDA),
    *(pytest.param(BOUNDED_GPU, m, id=f"bounded: {m.fault}") for m in OF_BOUNDED_CUDA),
]


@slow
@pytest.mark.parametrize(("family", "mutation"), CUDA_CASES)
def test_faults_in_cuda(family: str, mutation: Mutation, tmp_path: Path) -> None:
    _emulated(CUDA, family, mutation, tmp_path)


@slow
@pytest.mark.parametrize("mutation", OF_HIP, ids=lambda m: m.fault)
def test_faults_in_hip(mutation: Mutation, tmp_path: Path) -> None:
    """Those of its dialect; the text below is CUDA's."""
    _emulated(HIP, OF_GPUS, mutation, tmp_path)


@slow
@pytest.mark.opencl
@pytest.mark.parametrize("mutation", OF_OPENCL, ids=lambda m: m.fault)
def test_faults_in_opencl(mutation: Mutation) -> None:
    """Those of its dialect, and of what no other dialect asks for: exchanges through memory, a second kernel."""
    pytest.importorskip("pyopencl", reason="needs pyopencl: pip install 'elsa-tune[opencl]'")
    if not opencl_devices():
        pytest.skip("needs an OpenCL device: apt-get install pocl-opencl-icd")
    problem, variant = Problem.parse(OF_GPUS), space.parse(OPENCL)

    def kernel(text: str) -> Kernel:
        return cuda.CudaKernel(_opencl.OpenClRuntime(text, opencl_devices()[0]), variant, problem)

    judged(mutation, cuda.source(variant, problem).text, kernel, problem, 301)


@slow
@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        ("", "", ""),
        (OF_CUDA[0].old, OF_CUDA[0].new, "that drift"),
        ("x < -126.0f ? 0.0f", "x < -24.0f ? 0.0f", "that outweighs"),
    ],
)
def test_what_a_long_fold_in_cuda_shows(old: str, new: str, case: str, tmp_path: Path) -> None:
    """2^0 that is not 1, and weights cut off at 2^-24."""
    problem, variant = Problem.parse("fp32.d4"), space.parse("cuda.serial.t32.x4.r1.k4.polynomial.apart")
    text = cuda.source(variant, problem).text
    assert old in text
    changed = text.replace(old, new) if old else text
    kernel = cuda.CudaKernel(emulated.EmulatedRuntime(variant, problem, changed, tmp_path), variant, problem)
    reason = check.check_family(kernel, problem, [], longest=8193).reason
    assert case in reason and bool(reason) == bool(case), reason


TRITON = "triton.hybrid.ieee.m16.n16.warps4.stages1.w2.s4.last_block"
OF_TRITON = [
    Mutation("2^0 is not 1", "shifted.to(tl.int32, bitcast=True) << 23)", "(shifted.to(tl.int32, bitcast=True) << 23) + 64)"),
    Mutation("states are cut off", "tl.maximum(n, -127.0)", "tl.where(n < -24.0, -127.0, n)"),
    Mutation("the log-sum-exp lacks ln 2", ") * LN_2", ")"),
    Mutation("the log-sum-exp lacks the maximum", "total = (x3_m + tl.log2(x3_s))", "total = tl.log2(x3_s)"),
    Mutation("keep is not applied to S", "x0_s = x0_s * keep + tl.sum(p, 1)", "x0_s = x0_s + tl.sum(p, 1)"),
    Mutation("keep is not applied to W", "x0_w0 = x0_w0 * keep[:, None]\n", "x0_w0 = x0_w0\n"),
    Mutation("the second worker's keep is not applied", "x1_w0 = x1_w0 * keep[:, None]\n", "x1_w0 = x1_w0\n"),
    Mutation("the maximum is forgotten", "x0_m = m\n", "x0_m = x0_m\n"),
    Mutation("the first maximum is 0", "x0_m = tl.full([BLOCK_M], NONE, tl.float32)", "x0_m = tl.full([BLOCK_M], 0.0, tl.float32)"),
    Mutation("merging swaps what is kept of S", "x1_s = keep_a * x0_s + keep_b * x1_s", "x1_s = keep_b * x0_s + keep_a * x1_s"),
    Mutation("merging swaps what is kept of W", "x3_w0 = keep_a[:, None] * x2_w0 + keep_b[:, None] * x3_w0", "x3_w0 = keep_b[:, None] * x2_w0 + keep_a[:, None] * x3_w0"),
    Mutation("merging forgets the maximum", "x3_m = m\n", "x3_m = x3_m\n"),
    Mutation("merging loses a", "x3_w0 = keep_a[:, None] * x1_w0 + keep_b[:, None] * x3_w0", "x3_w0 = keep_b[:, None] * x3_w0"),
    Mutation("rounds meet the wrong state", "x3_s = keep_a * x1_s", "x3_s = keep_a * x0_s"),
    Mutation("a merge meets itself without a guard", "origin = tl.where(m == NONE, 0.0, m)", "origin = m"),
    Mutation("keys from the end on are seen", "inside = start + keys < high", "inside = start + keys <= high"),
    Mutation("the mask is off by one", "(start + keys[None, :] < row_high[:, None])", "(start + keys[None, :] + 1 < row_high[:, None])"),
    Mutation("the mask is off by one, the other way", "(start + keys[None, :] < row_high[:, None])", "(start + keys[None, :] <= row_high[:, None])"),
    Mutation("leaves are masked too late", "for start in tl.range(low, whole, STEP)", "for start in tl.range(low, tl.minimum(whole + STEP, high) // STEP * STEP, STEP)"),
    Mutation("a tile sees one key too few", "q_len, kv_len)  # by some row", "q_len, kv_len) - 1  # by some row"),
    Mutation("every row sees one key more", "q_len, kv_len)  # seen by every", "q_len, kv_len) + STEP  # seen by every"),
    Mutation("splits overlap", "low = tl.minimum(split * each, seen)", "low = tl.minimum(tl.maximum(split * each - 1, 0), seen)"),
    Mutation("splits leave a key out", "high = tl.minimum(low + each, seen)", "high = tl.minimum(low + each - 1, seen)"),
    Mutation("the second worker reads the first one's leaf", "keys = tl.arange(0, BLOCK_N) + 16", "keys = tl.arange(0, BLOCK_N)"),
    Mutation("heads of a group are interleaved", "heads = kv_head * group + rows % group", "heads = kv_head + rows % group * kv_heads"),
    Mutation("positions of a group are mixed", "positions = rows // group", "positions = rows % q_len"),
    Mutation("V is of the first KV head", "values_of_head = value + batch * stride_vb + kv_head * stride_vh", "values_of_head = value + batch * stride_vb"),
    Mutation("K is read with the strides of V", "key_rows = keys_of_head + start * step_k + keys * step_k", "key_rows = keys_of_head + start * step_v + keys * step_v"),
    Mutation("the scale's sign is lost", "query = query * (-1.0 if scale else 0.0)", "query = query * (1.0 if scale else 0.0)"),
    Mutation("scores are scaled twice", "c = abs(scale) * LOG2_E or 1.0", "c = abs(scale) * abs(scale) * LOG2_E or 1.0"),
    Mutation("scores are in base e", "c = abs(scale) * LOG2_E or 1.0", "c = abs(scale) or 1.0"),
    Mutation("the output is not divided", "divisor = tl.where(x3_s == 0.0, 1.0, x3_s)", "divisor = tl.where(x3_s == 0.0, 1.0, 1.0)"),
    Mutation("counters stay as they are", "tl.store(arrived, 0)", "tl.store(arrived, SPLITS)"),
    Mutation("a split's state is written to another row", "* group * q_len + rows) * SPLITS + split", "* group * q_len + rows) * SPLITS + split - (rows > 0)"),
]


OF_BOUNDED_TRITON = [
    *OF_BOUNDS,
    Mutation("every sequence is as long as the first", "lengths_data + batch * lengths_batch", "lengths_data"),
    Mutation("lengths are not looked at", "tl.minimum(lengths, ((position + right) + 1))", "((position + right) + 1)"),
    Mutation("a row that sees no key divides by 0", "divisor = tl.where(x3_s == 0.0, 1.0, x3_s)", "divisor = x3_s"),
    Mutation("the front is not masked", "(start + keys[None, :] >= row_low[:, None])", "(start + keys[None, :] >= 0)"),
    Mutation("a tile begins where its last row does", "begin = keys_low(first_position", "begin = keys_low(last_position"),
    Mutation("what every row sees begins where the first row does", "after = keys_low(last_position", "after = keys_low(first_position"),
    Mutation("splits begin at the first key", "tl.minimum(begin + split * each, seen)", "tl.minimum(split * each, seen)"),
    Mutation("the front is left out", "for start in tl.range(low, tl.minimum(front, high), STEP):", "for start in tl.range(low + STEP, tl.minimum(front, high), STEP):"),
    Mutation("scores are not made small again", "score * (1.0 / softcap)", "score"),
    Mutation("scores stay below 1", "return y * over / under * softcap", "return y * over / under"),
    Mutation("there is no cap below", "tl.where(y < -9.0, -9.0, y)", "y"),
    Mutation("a coefficient of the quotient is wrong in its 3rd digit", "0.467143148", "0.468143148"),
    Mutation("capped scores are of base e", "LOG2_E = tl.constexpr(1.4426950408889634)", "LOG2_E = tl.constexpr(1.0)"),
    Mutation("the cap is another operand", "softcap_score(scores, softcap)", "softcap_score(scores, right)"),
]
TRITON_CASES = [
    *(pytest.param(OF_CPUS, m, id=m.fault) for m in OF_TRITON),
    *(pytest.param(BOUNDED_CPU, m, id=f"bounded: {m.fault}") for m in OF_BOUNDED_TRITON),
]


@slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("family", "mutation"), TRITON_CASES)
def test_faults_in_triton(family: str, mutation: Mutation, tmp_path: Path) -> None:
    problem, variant = posed(family), space.parse(TRITON)

    def kernel(text: str) -> Kernel:
        path = tmp_path / "mutant.py"
        path.write_text(text)
        found = triton.load(Built("mutant", path), variant, problem)
        return found  # type: ignore[return-value]

    judged(mutation, triton.source(variant, problem).text, kernel, problem, 301)


@pytest.mark.parametrize(
    ("backend", "spelling", "family", "mutations"),
    [
        (cpp, CPP, OF_CPUS, OF_CPP),
        (cpp, CPP, BOUNDED_CPU, OF_BOUNDED_CPP),
        (cpp, PACKED_CPP, OF_PACKED, OF_PACKED_CPP),
        (cuda, CUDA, OF_GPUS, OF_CUDA),
        (cuda, CUDA, BOUNDED_GPU, OF_BOUNDED_CUDA),
        (cuda, HIP, OF_GPUS, OF_HIP),
        (cuda, OPENCL, OF_GPUS, OF_OPENCL),
        (triton, TRITON, OF_CPUS, OF_TRITON),
        (triton, TRITON, BOUNDED_CPU, OF_BOUNDED_TRITON),
    ],
)
def test_every_mutation_still_finds_its_text(backend: object, spelling: str, family: str, mutations: list[Mutation]) -> None:
    """Asked of every change: whoever changes a template changes the mutation, which `make test-all` then judges."""
    text = backend.source(space.parse(spelling), Problem.parse(family)).text  # type: ignore[attr-defined]
    assert not [m.fault for m in mutations if m.old not in text]

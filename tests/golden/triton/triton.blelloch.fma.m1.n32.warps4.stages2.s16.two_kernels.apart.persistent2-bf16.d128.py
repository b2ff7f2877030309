"""elsa-tune: triton.blelloch.fma.m1.n32.warps4.stages2.s16.two_kernels.apart.persistent2 for bf16.d128.

Exact softmax attention as a scan over states (m, S, W): an up-sweep of pairs; the total needs no down-sweep.
    leaf   32 keys x 1 query rows -> scores, exp2, one state
    fold   a program folds its leaves, state in registers
    block  1 state of one program
    grid   16 splits of the key axis, states in memory merged by rounds (two_kernels)
A query row is one (position, head of the group) pair of a KV head, position-major, so all query heads that share K and V
read them together. Regenerate this text: elsa-tune show triton.blelloch.fma.m1.n32.warps4.stages2.s16.two_kernels.apart.persistent2 bf16.d128
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

# query, key, value and output are of tl.bfloat16, states of tl.float32

HEAD_DIM = tl.constexpr(128)
VALUE_DIM = tl.constexpr(128)
BLOCK_M = tl.constexpr(1)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a leaf
STEP = tl.constexpr(32)  # keys of one iteration of the loop: a leaf for each state
SPLITS = tl.constexpr(16)
NONE = tl.constexpr(float("-inf"))  # the maximum over no keys
LN_2 = tl.constexpr(0.6931471805599453)

@triton.jit
def power_of_2(n):
    """2^n for whole n up to 0, put together from its bits: exact whatever computes 2^x. Below -126, and for -inf, 0."""
    shifted = tl.maximum(n, -127.0) + 12583039.0  # 1.5 * 2^23 + 127: the low mantissa bits become the exponent
    return (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)

FINISH_M = tl.constexpr(2)  # query rows merged at once

@triton.jit
def finish_rows(
    pair, slot, first, slots, partial, output, lse, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, with_lse,
):  # fmt: skip
    """Merge the states of all splits for FINISH_M query rows: an up-sweep of pairs; the total needs no down-sweep.

    The merges are those of blelloch's 4 rounds, each state loaded when it is first needed, so that few are in registers.
    """
    rows = first + tl.arange(0, FINISH_M)
    valid = rows < group * q_len
    positions = rows // group
    size = slots.to(tl.int64) * group * q_len * SPLITS
    states = (slot.to(tl.int64) * group * q_len + rows) * SPLITS
    x0_m = tl.load(partial + states + 0, mask=valid, other=NONE, cache_modifier=".cg")
    x0_s = tl.load(partial + size + states + 0, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 0
    x0_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x1_m = tl.load(partial + states + 1, mask=valid, other=NONE, cache_modifier=".cg")
    x1_s = tl.load(partial + size + states + 1, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 128
    x1_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x0_m, x1_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x0_m - origin), power_of_2(x1_m - origin)
    x1_m = m
    x1_s = keep_a * x0_s + keep_b * x1_s
    x1_w0 = keep_a[:, None] * x0_w0 + keep_b[:, None] * x1_w0
    x2_m = tl.load(partial + states + 2, mask=valid, other=NONE, cache_modifier=".cg")
    x2_s = tl.load(partial + size + states + 2, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 256
    x2_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x3_m = tl.load(partial + states + 3, mask=valid, other=NONE, cache_modifier=".cg")
    x3_s = tl.load(partial + size + states + 3, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 384
    x3_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x2_m, x3_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x2_m - origin), power_of_2(x3_m - origin)
    x3_m = m
    x3_s = keep_a * x2_s + keep_b * x3_s
    x3_w0 = keep_a[:, None] * x2_w0 + keep_b[:, None] * x3_w0
    m = tl.maximum(x1_m, x3_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x1_m - origin), power_of_2(x3_m - origin)
    x3_m = m
    x3_s = keep_a * x1_s + keep_b * x3_s
    x3_w0 = keep_a[:, None] * x1_w0 + keep_b[:, None] * x3_w0
    x4_m = tl.load(partial + states + 4, mask=valid, other=NONE, cache_modifier=".cg")
    x4_s = tl.load(partial + size + states + 4, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 512
    x4_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x5_m = tl.load(partial + states + 5, mask=valid, other=NONE, cache_modifier=".cg")
    x5_s = tl.load(partial + size + states + 5, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 640
    x5_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x4_m, x5_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x4_m - origin), power_of_2(x5_m - origin)
    x5_m = m
    x5_s = keep_a * x4_s + keep_b * x5_s
    x5_w0 = keep_a[:, None] * x4_w0 + keep_b[:, None] * x5_w0
    x6_m = tl.load(partial + states + 6, mask=valid, other=NONE, cache_modifier=".cg")
    x6_s = tl.load(partial + size + states + 6, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 768
    x6_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x7_m = tl.load(partial + states + 7, mask=valid, other=NONE, cache_modifier=".cg")
    x7_s = tl.load(partial + size + states + 7, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 896
    x7_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x6_m, x7_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x6_m - origin), power_of_2(x7_m - origin)
    x7_m = m
    x7_s = keep_a * x6_s + keep_b * x7_s
    x7_w0 = keep_a[:, None] * x6_w0 + keep_b[:, None] * x7_w0
    m = tl.maximum(x5_m, x7_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x5_m - origin), power_of_2(x7_m - origin)
    x7_m = m
    x7_s = keep_a * x5_s + keep_b * x7_s
    x7_w0 = keep_a[:, None] * x5_w0 + keep_b[:, None] * x7_w0
    m = tl.maximum(x3_m, x7_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x3_m - origin), power_of_2(x7_m - origin)
    x7_m = m
    x7_s = keep_a * x3_s + keep_b * x7_s
    x7_w0 = keep_a[:, None] * x3_w0 + keep_b[:, None] * x7_w0
    x8_m = tl.load(partial + states + 8, mask=valid, other=NONE, cache_modifier=".cg")
    x8_s = tl.load(partial + size + states + 8, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1024
    x8_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x9_m = tl.load(partial + states + 9, mask=valid, other=NONE, cache_modifier=".cg")
    x9_s = tl.load(partial + size + states + 9, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1152
    x9_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x8_m, x9_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x8_m - origin), power_of_2(x9_m - origin)
    x9_m = m
    x9_s = keep_a * x8_s + keep_b * x9_s
    x9_w0 = keep_a[:, None] * x8_w0 + keep_b[:, None] * x9_w0
    x10_m = tl.load(partial + states + 10, mask=valid, other=NONE, cache_modifier=".cg")
    x10_s = tl.load(partial + size + states + 10, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1280
    x10_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x11_m = tl.load(partial + states + 11, mask=valid, other=NONE, cache_modifier=".cg")
    x11_s = tl.load(partial + size + states + 11, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1408
    x11_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x10_m, x11_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x10_m - origin), power_of_2(x11_m - origin)
    x11_m = m
    x11_s = keep_a * x10_s + keep_b * x11_s
    x11_w0 = keep_a[:, None] * x10_w0 + keep_b[:, None] * x11_w0
    m = tl.maximum(x9_m, x11_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x9_m - origin), power_of_2(x11_m - origin)
    x11_m = m
    x11_s = keep_a * x9_s + keep_b * x11_s
    x11_w0 = keep_a[:, None] * x9_w0 + keep_b[:, None] * x11_w0
    x12_m = tl.load(partial + states + 12, mask=valid, other=NONE, cache_modifier=".cg")
    x12_s = tl.load(partial + size + states + 12, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1536
    x12_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x13_m = tl.load(partial + states + 13, mask=valid, other=NONE, cache_modifier=".cg")
    x13_s = tl.load(partial + size + states + 13, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1664
    x13_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x12_m, x13_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x12_m - origin), power_of_2(x13_m - origin)
    x13_m = m
    x13_s = keep_a * x12_s + keep_b * x13_s
    x13_w0 = keep_a[:, None] * x12_w0 + keep_b[:, None] * x13_w0
    x14_m = tl.load(partial + states + 14, mask=valid, other=NONE, cache_modifier=".cg")
    x14_s = tl.load(partial + size + states + 14, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1792
    x14_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x15_m = tl.load(partial + states + 15, mask=valid, other=NONE, cache_modifier=".cg")
    x15_s = tl.load(partial + size + states + 15, mask=valid, other=0.0, cache_modifier=".cg")
    partial_rows = partial + 2 * size + states * VALUE_DIM + 1920
    x15_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    m = tl.maximum(x14_m, x15_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x14_m - origin), power_of_2(x15_m - origin)
    x15_m = m
    x15_s = keep_a * x14_s + keep_b * x15_s
    x15_w0 = keep_a[:, None] * x14_w0 + keep_b[:, None] * x15_w0
    m = tl.maximum(x13_m, x15_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x13_m - origin), power_of_2(x15_m - origin)
    x15_m = m
    x15_s = keep_a * x13_s + keep_b * x15_s
    x15_w0 = keep_a[:, None] * x13_w0 + keep_b[:, None] * x15_w0
    m = tl.maximum(x11_m, x15_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x11_m - origin), power_of_2(x15_m - origin)
    x15_m = m
    x15_s = keep_a * x11_s + keep_b * x15_s
    x15_w0 = keep_a[:, None] * x11_w0 + keep_b[:, None] * x15_w0
    m = tl.maximum(x7_m, x15_m)
    origin = tl.where(m == NONE, 0.0, m)
    keep_a, keep_b = power_of_2(x7_m - origin), power_of_2(x15_m - origin)
    x15_m = m
    x15_s = keep_a * x7_s + keep_b * x15_s
    x15_w0 = keep_a[:, None] * x7_w0 + keep_b[:, None] * x15_w0
    divisor = tl.where(x15_s == 0.0, 1.0, x15_s)
    x15_w0 = x15_w0 / divisor[:, None]
    total = (x15_m + tl.log2(x15_s)) * LN_2

    batch, heads = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64) * group + rows % group
    output_rows = output + batch * stride_ob + heads * stride_oh + positions.to(tl.int64) * stride_om
    tl.store(output_rows[:, None] + tl.arange(0, 128)[None, :], x15_w0.to(output.dtype.element_ty), mask=valid[:, None])
    if with_lse:
        tl.store(lse + (batch * kv_heads * group + heads) * q_len + positions, total, mask=valid)

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "first_pair", "slots"],
    do_not_specialize_on_alignment=["group"],
)
def finish(
    partial, output, lse, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, first_pair, slots, with_lse,
):  # fmt: skip
    """The second kernel: one program for FINISH_M query rows of a pair."""
    blocks = tl.cdiv(group * q_len, FINISH_M)
    slot, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    finish_rows(
        first_pair + slot, slot, block * FINISH_M, slots, partial, output, lse,
        stride_ob, stride_oh, stride_om, kv_heads, group, q_len, with_lse,
    )  # fmt: skip

@triton.jit
def attend_tile(
    pair, slot, tile, split, slots,
    query, key, value, output, lse, partial, arrivals, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, kv_len, with_lse, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of a (batch, KV head) pair against one split of its keys."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < group * q_len
    positions = rows // group
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    heads = kv_head * group + rows % group
    query_rows = query + batch * stride_qb + heads * stride_qh + positions.to(tl.int64) * stride_qm
    keys_of_head = key + batch * stride_kb + kv_head * stride_kh
    values_of_head = value + batch * stride_vb + kv_head * stride_vh
    step_k, step_v = kv_head * 0 + stride_kn, kv_head * 0 + stride_vn  # 64 bits: lengths times strides outgrow 32
    q0 = tl.load(query_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None], other=0.0)

    seen, unmasked = kv_len, kv_len
    each = tl.cdiv(tl.cdiv(seen, BLOCK_N), SPLITS) * BLOCK_N
    low = tl.minimum(split * each, seen)
    high = tl.minimum(low + each, seen)

    x0_m = tl.full([BLOCK_M], NONE, tl.float32)
    x0_s = tl.zeros([BLOCK_M], tl.float32)
    x0_w0 = tl.zeros([BLOCK_M, 128], tl.float32)
    whole = low + tl.maximum(tl.minimum(high, unmasked) - low, 0) // STEP * STEP
    for start in tl.range(low, whole, STEP, num_stages=2):
        keys = tl.arange(0, BLOCK_N)
        key_rows = keys_of_head + start * step_k + keys * step_k
        value_rows = values_of_head + start * step_v + keys * step_v
        k = tl.load(key_rows[:, None] + tl.arange(0, 128)[None, :])
        scores = tl.sum(q0.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        m = tl.maximum(x0_m, tl.ceil(tl.max(scores, 1) * c))
        p = tl.math.fma(scores, tl.zeros_like(scores) + c, -m[:, None] + tl.zeros_like(scores))
        p = tl.exp2(p)
        keep = power_of_2(x0_m - m)
        x0_m = m
        x0_s = x0_s * keep + tl.sum(p, 1)
        v = tl.load(value_rows[:, None] + tl.arange(0, 128)[None, :])
        x0_w0 = x0_w0 * keep[:, None] + tl.sum(p.to(v.dtype).to(tl.float32)[:, :, None] * v.to(tl.float32)[None, :, :], 1)
    if not EVEN:  # some leaf is not whole
        for start in tl.range(whole, high, STEP, num_stages=1):  # one at most
            keys = tl.arange(0, BLOCK_N)
            key_rows = keys_of_head + start * step_k + keys * step_k
            value_rows = values_of_head + start * step_v + keys * step_v
            inside = start + keys < high
            k = tl.load(key_rows[:, None] + tl.arange(0, 128)[None, :], mask=inside[:, None], other=0.0)
            scores = tl.sum(q0.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
            scores = tl.where(inside[None, :], scores, NONE)
            m = tl.maximum(x0_m, tl.ceil(tl.max(scores, 1) * c))
            origin = tl.where(m == NONE, 0.0, m)
            p = tl.math.fma(scores, tl.zeros_like(scores) + c, -origin[:, None] + tl.zeros_like(scores))
            p = tl.exp2(p)
            keep = power_of_2(x0_m - origin)
            x0_m = m
            x0_s = x0_s * keep + tl.sum(p, 1)
            v = tl.load(value_rows[:, None] + tl.arange(0, 128)[None, :], mask=inside[:, None], other=0.0)
            x0_w0 = x0_w0 * keep[:, None] + tl.sum(p.to(v.dtype).to(tl.float32)[:, :, None] * v.to(tl.float32)[None, :, :], 1)

    state_rows = (slot.to(tl.int64) * group * q_len + rows) * SPLITS + split  # all of a row side by side
    size = slots.to(tl.int64) * group * q_len * SPLITS
    tl.store(partial + state_rows, x0_m, mask=valid)
    tl.store(partial + size + state_rows, x0_s, mask=valid)
    partial_rows = partial + 2 * size + state_rows * VALUE_DIM
    tl.store(partial_rows[:, None] + tl.arange(0, 128)[None, :], x0_w0, mask=valid[:, None])

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len", "first_pair", "slots"],
    do_not_specialize_on_alignment=["group"],
)
def attend(
    query, key, value, output, lse, partial, arrivals, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, kv_len, first_pair, slots, with_lse, EVEN: tl.constexpr,
):  # fmt: skip
    """A program takes one tile after another; the order is tiles."""
    tiles = tl.cdiv(group * q_len, BLOCK_M)
    index = tl.program_id(0)
    while index < tiles * slots * SPLITS:
        split, tile, slot = index % SPLITS, index // SPLITS % tiles, index // SPLITS // tiles
        attend_tile(
            first_pair + slot, slot, tile, split, slots,
            query, key, value, output, lse, partial, arrivals, c,
            stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
            stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
            kv_heads, group, q_len, kv_len, with_lse, EVEN,
        )  # fmt: skip
        index += tl.num_programs(0)

LOG2_E = 1.4426950408889634
SCRATCH_BYTES = 268435456  # at most this much memory for the states of splits
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
SIDE_OPTIONS = {"num_warps": 4}  # of the second kernel

def attention(query, key, value, scale=None, out=None, lse=None):
    """Attention of [batch, heads, length, dim] tensors whose rows are contiguous.

    Writes into ``out`` [batch, heads, q_len, 128] and, if given, ``lse`` [batch, heads, q_len], float32 and
    contiguous: the logarithm of each row's sum of exponentials. Returns the output.
    """
    if out is None:
        out = query.new_empty((*query.shape[:3], 128))
    for kernel, grid, arguments, options in launches(query, key, value, scale, out, lse):
        kernel[grid](*arguments, **options)
    return out

def launches(query, key, value, scale, out, lse):
    """What to launch, one after the other: kernel, grid, arguments, options. Arguments alone decide what is compiled,
    whatever device the tensors are on."""
    batch, heads, q_len, _ = query.shape
    _, kv_heads, kv_len, _ = key.shape
    scale = 1 / math.sqrt(128) if scale is None else scale
    c = abs(scale) * LOG2_E or 1.0
    if scale <= 0:  # c S is largest where S is, for c > 0
        query = query * (-1.0 if scale else 0.0)
    group, pairs = heads // kv_heads, batch * kv_heads
    tiles = -(-group * q_len // 1)
    q, k, v, o = query.stride(), key.stride(), value.stride(), out.stride()
    floats = 16 * group * q_len * 130  # states of one pair
    slots = max(1, min(pairs, SCRATCH_BYTES // (4 * floats)))
    partial = query.new_empty(slots * floats, dtype=torch.float32)
    sums, with_lse = nowhere(query.device) if lse is None else lse, lse is not None
    for first in range(0, pairs, slots):
        now = min(slots, pairs - first)
        arrivals = query
        programs = now * tiles * 16
        programs = min(programs, 2 * processors(query.device))
        arguments = (
            query, key, value, out, sums, partial, arrivals, c,
            q[0], q[1], q[2], k[0], k[1], k[2], v[0], v[1], v[2], o[0], o[1], o[2],
            kv_heads, group, q_len, kv_len, first, now, with_lse, kv_len % 512 == 0,
        )  # fmt: skip
        yield attend, (programs,), arguments, OPTIONS
        arguments = partial, out, sums, o[0], o[1], o[2], kv_heads, group, q_len, first, now, with_lse
        yield finish, (now * -(-group * q_len // 2),), arguments, SIDE_OPTIONS

def cleared(device, count):
    """int32 zeros for every stream from now on. elsa_tune puts memory in its place that is in no caller's graph."""
    made = torch.zeros(count, dtype=torch.int32, device=device)
    if made.is_cuda:
        torch.cuda.current_stream(device).synchronize()
    return made

@cache
def nowhere(device):
    """What stands in for a log-sum-exp that nobody asks for: a pointer of the same type, never used."""
    return cleared(device, 4).view(torch.float32)

def processors(device):
    """Streaming multiprocessors or compute units of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

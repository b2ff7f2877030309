"""elsa-tune: triton.hybrid.ieee.m32.n32.warps4.stages1.w2.s4.last_block.pair.apart.parts.longest for fp32.strict.d80.causal.

Exact softmax attention as a scan over states (lambda, O): Hillis-Steele inside a block, Blelloch across blocks.
    leaf   32 keys x 32 query rows -> scores, exp2, one state
    fold   a program folds its leaves, state in registers
    block  2 states of one program merged by rounds
    grid   4 splits of the key axis, states in memory merged by rounds (last_block)
A query row is one (position, head of the group) pair of a KV head, position-major, so all query heads that share K and V
read them together. Regenerate this text: elsa-tune show triton.hybrid.ieee.m32.n32.warps4.stages1.w2.s4.last_block.pair.apart.parts.longest fp32.strict.d80.causal
"""

import math
from functools import cache
from threading import Lock

import torch
import triton
import triton.language as tl

# query, key, value and output are of tl.float32, states of tl.float32

HEAD_DIM = tl.constexpr(80)
VALUE_DIM = tl.constexpr(80)
BLOCK_M = tl.constexpr(32)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a leaf
STEP = tl.constexpr(64)  # keys of one iteration of the loop: a leaf for each state
SPLITS = tl.constexpr(4)
NONE = tl.constexpr(float("-inf"))  # the maximum over no keys
LN_2 = tl.constexpr(0.6931471805599453)

FINISH_M = tl.constexpr(16)  # query rows merged at once

@triton.jit
def finish_rows(
    pair, slot, first, slots, partial, output, lse, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, with_lse,
):  # fmt: skip
    """Merge the states of all splits for FINISH_M query rows: an up-sweep of pairs; the total needs no down-sweep.

    The merges are those of blelloch's 2 rounds, each state loaded when it is first needed, so that few are in registers.
    """
    rows = first + tl.arange(0, FINISH_M)
    valid = rows < group * q_len
    positions = rows // group
    size = slots.to(tl.int64) * group * q_len * SPLITS
    states = (slot.to(tl.int64) * group * q_len + rows) * SPLITS
    x0_m = tl.load(partial + states + 0, mask=valid, other=NONE, cache_modifier=".cg")
    x0_r = tl.zeros([FINISH_M], tl.float32)
    partial_rows = partial + size + states * VALUE_DIM + 0
    x0_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x0_w1 = tl.load(partial_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x1_m = tl.load(partial + states + 1, mask=valid, other=NONE, cache_modifier=".cg")
    x1_r = tl.zeros([FINISH_M], tl.float32)
    partial_rows = partial + size + states * VALUE_DIM + 80
    x1_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x1_w1 = tl.load(partial_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x = (x1_m - x0_m) + (x1_r - x0_r)
    share = tl.where(x1_m == NONE, 0.0, tl.where(x0_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
    more = tl.log2(1 + tl.exp2(-tl.abs(x)))
    m = tl.maximum(x0_m, x1_m)
    more = tl.where((x0_m == NONE) | (x1_m == NONE), 0.0, more)
    rest = tl.where(x > 0, x1_r, x0_r)
    x1_m = m + more
    x1_r = tl.where(m == NONE, 0.0, (m - x1_m) + more + rest)

    x1_w0 = x0_w0 + share[:, None] * (x1_w0 - x0_w0)
    x1_w1 = x0_w1 + share[:, None] * (x1_w1 - x0_w1)
    x2_m = tl.load(partial + states + 2, mask=valid, other=NONE, cache_modifier=".cg")
    x2_r = tl.zeros([FINISH_M], tl.float32)
    partial_rows = partial + size + states * VALUE_DIM + 160
    x2_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x2_w1 = tl.load(partial_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x3_m = tl.load(partial + states + 3, mask=valid, other=NONE, cache_modifier=".cg")
    x3_r = tl.zeros([FINISH_M], tl.float32)
    partial_rows = partial + size + states * VALUE_DIM + 240
    x3_w0 = tl.load(partial_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x3_w1 = tl.load(partial_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=valid[:, None], other=0.0, cache_modifier=".cg")
    x = (x3_m - x2_m) + (x3_r - x2_r)
    share = tl.where(x3_m == NONE, 0.0, tl.where(x2_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
    more = tl.log2(1 + tl.exp2(-tl.abs(x)))
    m = tl.maximum(x2_m, x3_m)
    more = tl.where((x2_m == NONE) | (x3_m == NONE), 0.0, more)
    rest = tl.where(x > 0, x3_r, x2_r)
    x3_m = m + more
    x3_r = tl.where(m == NONE, 0.0, (m - x3_m) + more + rest)

    x3_w0 = x2_w0 + share[:, None] * (x3_w0 - x2_w0)
    x3_w1 = x2_w1 + share[:, None] * (x3_w1 - x2_w1)
    x = (x3_m - x1_m) + (x3_r - x1_r)
    share = tl.where(x3_m == NONE, 0.0, tl.where(x1_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
    more = tl.log2(1 + tl.exp2(-tl.abs(x)))
    m = tl.maximum(x1_m, x3_m)
    more = tl.where((x1_m == NONE) | (x3_m == NONE), 0.0, more)
    rest = tl.where(x > 0, x3_r, x1_r)
    x3_m = m + more
    x3_r = tl.where(m == NONE, 0.0, (m - x3_m) + more + rest)

    x3_w0 = x1_w0 + share[:, None] * (x3_w0 - x1_w0)
    x3_w1 = x1_w1 + share[:, None] * (x3_w1 - x1_w1)
    total = (x3_m + x3_r) * LN_2

    batch, heads = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64) * group + rows % group
    output_rows = output + batch * stride_ob + heads * stride_oh + positions.to(tl.int64) * stride_om
    tl.store(output_rows[:, None] + tl.arange(0, 64)[None, :], x3_w0.to(output.dtype.element_ty), mask=valid[:, None])
    tl.store(output_rows[:, None] + (64 + tl.arange(0, 16))[None, :], x3_w1.to(output.dtype.element_ty), mask=valid[:, None])
    if with_lse:
        tl.store(lse + (batch * kv_heads * group + heads) * q_len + positions, total, mask=valid)

@triton.jit
def floor_divide(x, n):
    return (x - tl.where(x < 0, n - 1, 0)) // n

@triton.jit
def keys_low(position, q_len, kv_len):
    """Keys up to its own position: the first key that a position sees."""
    return tl.maximum(0, tl.minimum(0, kv_len))

@triton.jit
def keys_high(position, q_len, kv_len):
    """The first key that it no longer sees."""
    return tl.maximum(0, tl.minimum((position + 1), kv_len))

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
    q0 = tl.load(query_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
    q1 = tl.load(query_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=valid[:, None], other=0.0)

    first_position = tile * BLOCK_M // group
    last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, q_len - 1)
    seen = keys_high(last_position, q_len, kv_len)  # by some row
    unmasked = keys_high(first_position, q_len, kv_len)  # seen by every row
    row_high = keys_high(positions, q_len, kv_len)
    each = tl.cdiv(tl.cdiv(seen, BLOCK_N), SPLITS) * BLOCK_N
    low = tl.minimum(split * each, seen)
    high = tl.minimum(low + each, seen)

    x0_m = tl.full([BLOCK_M], NONE, tl.float32)
    x0_r = tl.zeros([BLOCK_M], tl.float32)
    x0_w0 = tl.zeros([BLOCK_M, 64], tl.float32)
    x0_w1 = tl.zeros([BLOCK_M, 16], tl.float32)
    x1_m = tl.full([BLOCK_M], NONE, tl.float32)
    x1_r = tl.zeros([BLOCK_M], tl.float32)
    x1_w0 = tl.zeros([BLOCK_M, 64], tl.float32)
    x1_w1 = tl.zeros([BLOCK_M, 16], tl.float32)
    whole = low + tl.maximum(tl.minimum(high, unmasked) - low, 0) // STEP * STEP
    for start in tl.range(low, whole, STEP):
        keys = tl.arange(0, BLOCK_N)
        key_rows = keys_of_head + start * step_k + keys * step_k
        value_rows = values_of_head + start * step_v + keys * step_v
        k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :])
        scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
        k = tl.load(key_rows[:, None] + (64 + tl.arange(0, 16))[None, :])
        scores = tl.dot(q1, tl.trans(k), scores, input_precision="ieee")
        leaf_m = tl.max(scores, 1) * c
        p = tl.math.fma(scores, tl.zeros_like(scores) + c, -leaf_m[:, None] + tl.zeros_like(scores))
        p = tl.exp2(p)
        leaf_s = tl.sum(p, 1)
        leaf_sum = leaf_m + tl.log2(leaf_s)
        leaf_r = tl.where(leaf_m == NONE, 0.0, (leaf_m - leaf_sum) + tl.log2(leaf_s))

        leaf_m = leaf_sum
        divisor = tl.where(leaf_s == 0.0, 1.0, leaf_s)
        v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :])
        leaf_w0 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
        v = tl.load(value_rows[:, None] + (64 + tl.arange(0, 16))[None, :])
        leaf_w1 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
        x = (leaf_m - x0_m) + (leaf_r - x0_r)
        share = tl.where(leaf_m == NONE, 0.0, tl.where(x0_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
        more = tl.log2(1 + tl.exp2(-tl.abs(x)))
        m = tl.maximum(x0_m, leaf_m)
        more = tl.where((x0_m == NONE) | (leaf_m == NONE), 0.0, more)
        rest = tl.where(x > 0, leaf_r, x0_r)
        leaf_m = m + more
        leaf_r = tl.where(m == NONE, 0.0, (m - leaf_m) + more + rest)

        leaf_w0 = x0_w0 + share[:, None] * (leaf_w0 - x0_w0)
        leaf_w1 = x0_w1 + share[:, None] * (leaf_w1 - x0_w1)

        x0_m, x0_r = leaf_m, leaf_r
        x0_w0 = leaf_w0
        x0_w1 = leaf_w1
        keys = tl.arange(0, BLOCK_N) + 32
        key_rows = keys_of_head + start * step_k + keys * step_k
        value_rows = values_of_head + start * step_v + keys * step_v
        k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :])
        scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
        k = tl.load(key_rows[:, None] + (64 + tl.arange(0, 16))[None, :])
        scores = tl.dot(q1, tl.trans(k), scores, input_precision="ieee")
        leaf_m = tl.max(scores, 1) * c
        p = tl.math.fma(scores, tl.zeros_like(scores) + c, -leaf_m[:, None] + tl.zeros_like(scores))
        p = tl.exp2(p)
        leaf_s = tl.sum(p, 1)
        leaf_sum = leaf_m + tl.log2(leaf_s)
        leaf_r = tl.where(leaf_m == NONE, 0.0, (leaf_m - leaf_sum) + tl.log2(leaf_s))

        leaf_m = leaf_sum
        divisor = tl.where(leaf_s == 0.0, 1.0, leaf_s)
        v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :])
        leaf_w0 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
        v = tl.load(value_rows[:, None] + (64 + tl.arange(0, 16))[None, :])
        leaf_w1 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
        x = (leaf_m - x1_m) + (leaf_r - x1_r)
        share = tl.where(leaf_m == NONE, 0.0, tl.where(x1_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
        more = tl.log2(1 + tl.exp2(-tl.abs(x)))
        m = tl.maximum(x1_m, leaf_m)
        more = tl.where((x1_m == NONE) | (leaf_m == NONE), 0.0, more)
        rest = tl.where(x > 0, leaf_r, x1_r)
        leaf_m = m + more
        leaf_r = tl.where(m == NONE, 0.0, (m - leaf_m) + more + rest)

        leaf_w0 = x1_w0 + share[:, None] * (leaf_w0 - x1_w0)
        leaf_w1 = x1_w1 + share[:, None] * (leaf_w1 - x1_w1)

        x1_m, x1_r = leaf_m, leaf_r
        x1_w0 = leaf_w0
        x1_w1 = leaf_w1
    if not EVEN:  # some leaf is not whole
        for start in tl.range(whole, high, STEP):
            keys = tl.arange(0, BLOCK_N)
            key_rows = keys_of_head + start * step_k + keys * step_k
            value_rows = values_of_head + start * step_v + keys * step_v
            inside = start + keys < high
            k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
            k = tl.load(key_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(q1, tl.trans(k), scores, input_precision="ieee")
            scores = tl.where(inside[None, :] & (start + keys[None, :] < row_high[:, None]), scores, NONE)
            leaf_m = tl.max(scores, 1) * c
            origin = tl.where(leaf_m == NONE, 0.0, leaf_m)
            p = tl.math.fma(scores, tl.zeros_like(scores) + c, -origin[:, None] + tl.zeros_like(scores))
            p = tl.exp2(p)
            leaf_s = tl.sum(p, 1)
            leaf_sum = leaf_m + tl.log2(leaf_s)
            leaf_r = tl.where(leaf_m == NONE, 0.0, (leaf_m - leaf_sum) + tl.log2(leaf_s))

            leaf_m = leaf_sum
            divisor = tl.where(leaf_s == 0.0, 1.0, leaf_s)
            v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            leaf_w0 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
            v = tl.load(value_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=inside[:, None], other=0.0)
            leaf_w1 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
            x = (leaf_m - x0_m) + (leaf_r - x0_r)
            share = tl.where(leaf_m == NONE, 0.0, tl.where(x0_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
            more = tl.log2(1 + tl.exp2(-tl.abs(x)))
            m = tl.maximum(x0_m, leaf_m)
            more = tl.where((x0_m == NONE) | (leaf_m == NONE), 0.0, more)
            rest = tl.where(x > 0, leaf_r, x0_r)
            leaf_m = m + more
            leaf_r = tl.where(m == NONE, 0.0, (m - leaf_m) + more + rest)

            leaf_w0 = x0_w0 + share[:, None] * (leaf_w0 - x0_w0)
            leaf_w1 = x0_w1 + share[:, None] * (leaf_w1 - x0_w1)

            x0_m, x0_r = leaf_m, leaf_r
            x0_w0 = leaf_w0
            x0_w1 = leaf_w1
            keys = tl.arange(0, BLOCK_N) + 32
            key_rows = keys_of_head + start * step_k + keys * step_k
            value_rows = values_of_head + start * step_v + keys * step_v
            inside = start + keys < high
            k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
            k = tl.load(key_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(q1, tl.trans(k), scores, input_precision="ieee")
            scores = tl.where(inside[None, :] & (start + keys[None, :] < row_high[:, None]), scores, NONE)
            leaf_m = tl.max(scores, 1) * c
            origin = tl.where(leaf_m == NONE, 0.0, leaf_m)
            p = tl.math.fma(scores, tl.zeros_like(scores) + c, -origin[:, None] + tl.zeros_like(scores))
            p = tl.exp2(p)
            leaf_s = tl.sum(p, 1)
            leaf_sum = leaf_m + tl.log2(leaf_s)
            leaf_r = tl.where(leaf_m == NONE, 0.0, (leaf_m - leaf_sum) + tl.log2(leaf_s))

            leaf_m = leaf_sum
            divisor = tl.where(leaf_s == 0.0, 1.0, leaf_s)
            v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            leaf_w0 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
            v = tl.load(value_rows[:, None] + (64 + tl.arange(0, 16))[None, :], mask=inside[:, None], other=0.0)
            leaf_w1 = tl.dot(p.to(v.dtype), v, input_precision="ieee") / divisor[:, None]
            x = (leaf_m - x1_m) + (leaf_r - x1_r)
            share = tl.where(leaf_m == NONE, 0.0, tl.where(x1_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
            more = tl.log2(1 + tl.exp2(-tl.abs(x)))
            m = tl.maximum(x1_m, leaf_m)
            more = tl.where((x1_m == NONE) | (leaf_m == NONE), 0.0, more)
            rest = tl.where(x > 0, leaf_r, x1_r)
            leaf_m = m + more
            leaf_r = tl.where(m == NONE, 0.0, (m - leaf_m) + more + rest)

            leaf_w0 = x1_w0 + share[:, None] * (leaf_w0 - x1_w0)
            leaf_w1 = x1_w1 + share[:, None] * (leaf_w1 - x1_w1)

            x1_m, x1_r = leaf_m, leaf_r
            x1_w0 = leaf_w0
            x1_w1 = leaf_w1
    # hillis_steele, round 1: 1 merge, reaching back 1
    x = (x1_m - x0_m) + (x1_r - x0_r)
    share = tl.where(x1_m == NONE, 0.0, tl.where(x0_m == NONE, 1.0, 1 / (1 + tl.exp2(-x))))
    more = tl.log2(1 + tl.exp2(-tl.abs(x)))
    m = tl.maximum(x0_m, x1_m)
    more = tl.where((x0_m == NONE) | (x1_m == NONE), 0.0, more)
    rest = tl.where(x > 0, x1_r, x0_r)
    x1_m = m + more
    x1_r = tl.where(m == NONE, 0.0, (m - x1_m) + more + rest)

    x1_w0 = x0_w0 + share[:, None] * (x1_w0 - x0_w0)
    x1_w1 = x0_w1 + share[:, None] * (x1_w1 - x0_w1)

    state_rows = (slot.to(tl.int64) * group * q_len + rows) * SPLITS + split  # all of a row side by side
    size = slots.to(tl.int64) * group * q_len * SPLITS
    tl.store(partial + state_rows, x1_m, mask=valid)
    partial_rows = partial + size + state_rows * VALUE_DIM
    tl.store(partial_rows[:, None] + tl.arange(0, 64)[None, :], x1_w0, mask=valid[:, None])
    tl.store(partial_rows[:, None] + (64 + tl.arange(0, 16))[None, :], x1_w1, mask=valid[:, None])

    tl.debug_barrier()  # every warp has stored before one thread says so
    tiles = tl.cdiv(group * q_len, BLOCK_M)
    arrived = arrivals + slot.to(tl.int64) * tiles + tile
    if tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        tl.store(arrived, 0)  # as the next launch finds it
        for first in range(0, BLOCK_M, FINISH_M):
            finish_rows(
                pair, slot, tile * BLOCK_M + first, slots, partial, output, lse,
                stride_ob, stride_oh, stride_om, kv_heads, group, q_len, with_lse,
            )  # fmt: skip

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
    """One program for each tile and split; the order is longest."""
    tiles = tl.cdiv(group * q_len, BLOCK_M)
    index = tl.program_id(0)
    split, slot, tile = index % SPLITS, index // SPLITS % slots, tiles - 1 - index // SPLITS // slots
    attend_tile(
        first_pair + slot, slot, tile, split, slots,
        query, key, value, output, lse, partial, arrivals, c,
        stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
        kv_heads, group, q_len, kv_len, with_lse, EVEN,
    )  # fmt: skip

LOG2_E = 1.4426950408889634
SCRATCH_BYTES = 268435456  # at most this much memory for the states of splits
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

def attention(query, key, value, scale=None, out=None, lse=None):
    """Attention of [batch, heads, length, dim] tensors whose rows are contiguous.

    Writes into ``out`` [batch, heads, q_len, 80] and, if given, ``lse`` [batch, heads, q_len], float32 and
    contiguous: the logarithm of each row's sum of exponentials. Returns the output.
    """
    if out is None:
        out = query.new_empty((*query.shape[:3], 80))
    for kernel, grid, arguments, options in launches(query, key, value, scale, out, lse):
        kernel[grid](*arguments, **options)
    return out

def launches(query, key, value, scale, out, lse):
    """What to launch, one after the other: kernel, grid, arguments, options. Arguments alone decide what is compiled,
    whatever device the tensors are on."""
    batch, heads, q_len, _ = query.shape
    _, kv_heads, kv_len, _ = key.shape
    scale = 1 / math.sqrt(80) if scale is None else scale
    c = abs(scale) * LOG2_E or 1.0
    if scale <= 0:  # c S is largest where S is, for c > 0
        query = query * (-1.0 if scale else 0.0)
    group, pairs = heads // kv_heads, batch * kv_heads
    tiles = -(-group * q_len // 32)
    q, k, v, o = query.stride(), key.stride(), value.stride(), out.stride()
    floats = 4 * group * q_len * 81  # states of one pair
    slots = max(1, min(pairs, SCRATCH_BYTES // (4 * floats)))
    partial = query.new_empty(slots * floats, dtype=torch.float32)
    sums, with_lse = nowhere(query.device) if lse is None else lse, lse is not None
    for first in range(0, pairs, slots):
        now = min(slots, pairs - first)
        arrivals = arrivals_of(query, now * tiles)
        programs = now * tiles * 4
        arguments = (
            query, key, value, out, sums, partial, arrivals, c,
            q[0], q[1], q[2], k[0], k[1], k[2], v[0], v[1], v[2], o[0], o[1], o[2],
            kv_heads, group, q_len, kv_len, first, now, with_lse, False,
        )  # fmt: skip
        yield attend, (programs,), arguments, OPTIONS

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

ARRIVALS = 1 << 16  # counters set aside on a device for what is captured in graphs
_arrivals = {}  # by device and stream
_outgrown = []  # launches under way may still count there
_spare = {}  # by device: all, and how many are given away
_lock = Lock()

def arrivals_of(query, count):
    """``count`` counters, all 0: the last program of a tile to arrive leaves its own so, and no launch clears them.

    Launches of one stream follow one another and share counters. What is captured in a CUDA graph has counters of its
    own for as long as this module lives, since the graph may be replayed beside anything; beyond ARRIVALS, the graph
    clears them.
    """
    count = -(-count // 4) * 4  # 16 bytes: as aligned as a launch was compiled for
    device, stream, captured = place(query)
    found = None if captured else _arrivals.get((device, stream))
    if found is not None and found.numel() >= count:
        return found
    with _lock:
        if captured:
            counters, given = _spare.get(device, (None, ARRIVALS))
            if given + count > ARRIVALS:
                return query.new_zeros(count, dtype=torch.int32)
            _spare[device] = counters, given + count
            return counters[given : given + count]
        if device not in _spare:
            _spare[device] = cleared(device, ARRIVALS), 0
        _outgrown.append(found)
        made = _arrivals[device, stream] = cleared(device, count)
        return made

def place(x):
    """Where a launch goes: device, stream, and whether a graph is captured there."""
    if not x.is_cuda:
        return x.device, 0, False
    return x.device, torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()

"""elsa-tune: triton.serial.half.m64.n64.warps4.stages2 for bf16.d64.lengths+window.softcap.

Exact softmax attention as a scan over states (m, S, W): one state, folded left to right.
    leaf   64 keys x 64 query rows -> scores, exp2, one state
    fold   a program folds its leaves, state in registers
    block  1 state of one program
    grid   1 split of the key axis
A query row is one (position, head of the group) pair of a KV head, position-major, so all query heads that share K and V
read them together. Regenerate this text: elsa-tune show triton.serial.half.m64.n64.warps4.stages2 bf16.d64.lengths+window.softcap
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

# query, key, value and output are of tl.bfloat16, states of tl.float32

HEAD_DIM = tl.constexpr(64)
VALUE_DIM = tl.constexpr(64)
BLOCK_M = tl.constexpr(64)  # query rows of a tile
BLOCK_N = tl.constexpr(64)  # keys of a leaf
STEP = tl.constexpr(64)  # keys of one iteration of the loop: a leaf for each state
SPLITS = tl.constexpr(1)
NONE = tl.constexpr(float("-inf"))  # the maximum over no keys
LN_2 = tl.constexpr(0.6931471805599453)

@triton.jit
def power_of_2(n):
    """2^n for whole n up to 0, put together from its bits: exact whatever computes 2^x. Below -126, and for -inf, 0."""
    shifted = tl.maximum(n, -127.0) + 12583039.0  # 1.5 * 2^23 + 127: the low mantissa bits become the exponent
    return (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)

@triton.jit
def limit(x, q_len, kv_len):
    """An integer of a call in 32 bits: beyond all lengths it cuts no more."""
    return tl.maximum(tl.minimum(x, q_len + kv_len), -q_len - kv_len).to(tl.int32)

@triton.jit
def floor_divide(x, n):
    return (x - tl.where(x < 0, n - 1, 0)) // n

@triton.jit
def keys_low(position, q_len, kv_len, left, right, lengths):
    """The first `lengths` keys of its own sequence; `left` keys before its own position and `right` after it: the first key that a position sees."""
    return tl.maximum(0, tl.minimum((position - left), kv_len))

@triton.jit
def keys_high(position, q_len, kv_len, left, right, lengths):
    """The first key that it no longer sees."""
    return tl.maximum(0, tl.minimum(tl.minimum(lengths, ((position + right) + 1)), kv_len))

LOG2_E = tl.constexpr(1.4426950408889634)

@triton.jit
def softcap_score(score, softcap):
    """`softcap` tanh(score / `softcap`), with tanh(y) = y P(y^2) / Q(y^2): elsa_tune/parts/tanh.py. NaN stays NaN."""
    y = score * (1.0 / softcap)
    y = tl.where(y > 9.0, 9.0, y)
    y = tl.where(y < -9.0, -9.0, y)
    z = y * y
    over = tl.zeros_like(z) + 1.33538274e-08
    over = over * z + 2.06085206e-05
    over = over * z + 0.00349555607
    over = over * z + 0.133809999
    over = over * z + 1.0
    under = tl.zeros_like(z) + 7.77622802e-07
    under = under * z + 0.00032855809
    under = under * z + 0.0258768629
    under = under * z + 0.467143148
    under = under * z + 1.0
    return y * over / under * softcap

@triton.jit
def attend_tile(
    pair, slot, tile, split, slots,
    query, key, value, output, lse, partial, arrivals, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, kv_len, with_lse, left, right, lengths_data, lengths_batch, softcap, EVEN: tl.constexpr,
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

    lengths = limit(tl.load(lengths_data + batch * lengths_batch), q_len, kv_len)
    first_position = tile * BLOCK_M // group
    last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, q_len - 1)
    seen = keys_high(last_position, q_len, kv_len, left, right, lengths)  # by some row
    unmasked = keys_high(first_position, q_len, kv_len, left, right, lengths)  # seen by every row
    begin = keys_low(first_position, q_len, kv_len, left, right, lengths)
    after = keys_low(last_position, q_len, kv_len, left, right, lengths)  # from here on, by every row
    seen = tl.maximum(seen, begin)
    row_low = keys_low(positions, q_len, kv_len, left, right, lengths)
    row_high = keys_high(positions, q_len, kv_len, left, right, lengths)
    low, high = begin, seen

    x0_m = tl.full([BLOCK_M], NONE, tl.float32)
    x0_s = tl.zeros([BLOCK_M], tl.float32)
    x0_w0 = tl.zeros([BLOCK_M, 64], tl.float32)
    front = low + tl.cdiv(tl.maximum(tl.minimum(after, high) - low, 0), STEP) * STEP
    for start in tl.range(low, tl.minimum(front, high), STEP):
        keys = tl.arange(0, BLOCK_N)
        key_rows = keys_of_head + start * step_k + keys * step_k
        value_rows = values_of_head + start * step_v + keys * step_v
        inside = start + keys < high
        k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
        scores = scores * c
        scores = softcap_score(scores, softcap)

        scores = tl.where(inside[None, :] & (start + keys[None, :] >= row_low[:, None]) & (start + keys[None, :] < row_high[:, None]), scores, NONE)
        m = tl.maximum(x0_m, tl.ceil(tl.max(scores, 1) * LOG2_E))
        origin = tl.where(m == NONE, 0.0, m)
        p = tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -origin[:, None] + tl.zeros_like(scores))
        p = tl.exp2(p)
        keep = power_of_2(x0_m - origin)
        x0_m = m
        x0_s = x0_s * keep + tl.sum(p, 1)
        v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
        x0_w0 = x0_w0 * keep[:, None]
        x0_w0 = tl.dot(p.to(v.dtype), v, x0_w0, input_precision="ieee")
    whole = front + tl.maximum(tl.minimum(high, unmasked) - front, 0) // STEP * STEP
    for start in tl.range(front, whole, STEP):
        keys = tl.arange(0, BLOCK_N)
        key_rows = keys_of_head + start * step_k + keys * step_k
        value_rows = values_of_head + start * step_v + keys * step_v
        k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :])
        scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
        scores = scores * c
        scores = softcap_score(scores, softcap)

        m = tl.maximum(x0_m, tl.ceil(tl.max(scores, 1) * LOG2_E))
        p = tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -m[:, None] + tl.zeros_like(scores))
        p = tl.exp2(p)
        keep = power_of_2(x0_m - m)
        x0_m = m
        x0_s = x0_s * keep + tl.sum(p, 1)
        v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :])
        x0_w0 = x0_w0 * keep[:, None]
        x0_w0 = tl.dot(p.to(v.dtype), v, x0_w0, input_precision="ieee")
    if not EVEN:  # some leaf is not whole
        for start in tl.range(whole, high, STEP):
            keys = tl.arange(0, BLOCK_N)
            key_rows = keys_of_head + start * step_k + keys * step_k
            value_rows = values_of_head + start * step_v + keys * step_v
            inside = start + keys < high
            k = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(q0, tl.trans(k), input_precision="ieee")
            scores = scores * c
            scores = softcap_score(scores, softcap)

            scores = tl.where(inside[None, :] & (start + keys[None, :] >= row_low[:, None]) & (start + keys[None, :] < row_high[:, None]), scores, NONE)
            m = tl.maximum(x0_m, tl.ceil(tl.max(scores, 1) * LOG2_E))
            origin = tl.where(m == NONE, 0.0, m)
            p = tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -origin[:, None] + tl.zeros_like(scores))
            p = tl.exp2(p)
            keep = power_of_2(x0_m - origin)
            x0_m = m
            x0_s = x0_s * keep + tl.sum(p, 1)
            v = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            x0_w0 = x0_w0 * keep[:, None]
            x0_w0 = tl.dot(p.to(v.dtype), v, x0_w0, input_precision="ieee")

    divisor = tl.where(x0_s == 0.0, 1.0, x0_s)
    x0_w0 = x0_w0 / divisor[:, None]
    total = (x0_m + tl.log2(x0_s)) * LN_2

    output_rows = output + batch * stride_ob + heads * stride_oh + positions.to(tl.int64) * stride_om
    tl.store(output_rows[:, None] + tl.arange(0, 64)[None, :], x0_w0.to(output.dtype.element_ty), mask=valid[:, None])
    if with_lse:
        tl.store(lse + (batch * kv_heads * group + heads) * q_len + positions, total, mask=valid)

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len", "first_pair", "slots", "left", "right", "lengths_data", "lengths_batch", "softcap"],
    do_not_specialize_on_alignment=["group"],
)
def attend(
    query, key, value, output, lse, partial, arrivals, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    kv_heads, group, q_len, kv_len, first_pair, slots, with_lse, left, right, lengths_data, lengths_batch, softcap, EVEN: tl.constexpr,
):  # fmt: skip
    """One program for each tile and split; the order is tiles."""
    tiles = tl.cdiv(group * q_len, BLOCK_M)
    index = tl.program_id(0)
    split, tile, slot = index % SPLITS, index // SPLITS % tiles, index // SPLITS // tiles
    attend_tile(
        first_pair + slot, slot, tile, split, slots,
        query, key, value, output, lse, partial, arrivals, c,
        stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
        kv_heads, group, q_len, kv_len, with_lse, left, right, lengths_data, lengths_batch, softcap, EVEN,
    )  # fmt: skip

SCRATCH_BYTES = 268435456  # at most this much memory for the states of splits
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}

def attention(query, key, value, scale=None, out=None, lse=None, operands=()):
    """Attention of [batch, heads, length, dim] tensors whose rows are contiguous.

    Writes into ``out`` [batch, heads, q_len, 64] and, if given, ``lse`` [batch, heads, q_len], float32 and
    contiguous: the logarithm of each row's sum of exponentials. Returns the output.
    """
    if out is None:
        out = query.new_empty((*query.shape[:3], 64))
    for kernel, grid, arguments, options in launches(query, key, value, scale, out, lse, operands):
        kernel[grid](*arguments, **options)
    return out

def launches(query, key, value, scale, out, lse, operands):
    """What to launch, one after the other: kernel, grid, arguments, options. Arguments alone decide what is compiled,
    whatever device the tensors are on."""
    batch, heads, q_len, _ = query.shape
    _, kv_heads, kv_len, _ = key.shape
    scale = 1 / math.sqrt(64) if scale is None else scale
    c = abs(scale) or 1.0
    if scale <= 0:  # c S is largest where S is, for c > 0
        query = query * (-1.0 if scale else 0.0)
    group, pairs = heads // kv_heads, batch * kv_heads
    tiles = -(-group * q_len // 64)
    q, k, v, o = query.stride(), key.stride(), value.stride(), out.stride()
    slots, partial = pairs, query
    within = [min(n, q_len + kv_len) for n in operands[:2]]  # of the mask: more cuts no more
    sums, with_lse = nowhere(query.device) if lse is None else lse, lse is not None
    for first in range(0, pairs, slots):
        now = min(slots, pairs - first)
        arrivals = query
        programs = now * tiles * 1
        arguments = (
            query, key, value, out, sums, partial, arrivals, c,
            q[0], q[1], q[2], k[0], k[1], k[2], v[0], v[1], v[2], o[0], o[1], o[2],
            kv_heads, group, q_len, kv_len, first, now, with_lse, *within, *operands[2:], False,
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


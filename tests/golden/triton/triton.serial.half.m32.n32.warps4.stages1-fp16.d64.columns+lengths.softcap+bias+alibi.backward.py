"""elsa-tune: triton.serial.half.m32.n32.warps4.stages1 for fp16.d64.columns+lengths.softcap+bias+alibi.backward.

Gradients of exact softmax attention from its output and log-sum-exp L alone, O(n) memory:
    P = 2^(c S - L log2(e))    D = rowsum(dO * O)    dS = P * (dO V^T - D)
    dV = P^T dO                dQ = scale dS K       dK = scale dS^T Q
One kernel gives a program 32 query rows and folds over keys, the other 32 keys and folds over the query rows of
all heads that share them, S^T and dP^T at once: seven products in all, and nothing is added atomically.
The same inputs give the same bits. Regenerate this text: elsa-tune show triton.serial.half.m32.n32.warps4.stages1 fp16.d64.columns+lengths.softcap+bias+alibi.backward
"""

import math

import torch
import triton
import triton.language as tl

# query, key, value and output are of tl.float16, states of tl.float32

HEAD_DIM = tl.constexpr(64)
VALUE_DIM = tl.constexpr(64)
BLOCK_M = tl.constexpr(32)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
NONE = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)

RELIABLE = tl.constexpr(1024.0)  # a log-sum-exp farther from 0 is not

@triton.jit
def softcap_slope_of(score, capped, softcap):
    """How what becomes of a score grows with it."""
    part = capped * (1.0 / softcap)
    return 1.0 - part * part

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
def bias_score(score, bias):
    """score + `bias`; far below, a power of 2: farthest() in elsa_tune/parts/score/_base.py."""
    x = score + bias
    return tl.where(x < -1073741824.0, (x.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True), x)

@triton.jit
def alibi_score(score, slope, batch, head, position, key, behind):
    """score - `slopes` |position - key|."""
    return score - slope * tl.abs(position - key).to(tl.float32)

@triton.jit
def alibi_rate_of_slopes(score, batch, head, position, key, behind):
    """How a score falls as slopes grow."""
    return -tl.abs(position - key).to(tl.float32)

@triton.jit
def columns_sees(first, end, batch, head, position, key):
    """keys but at positions from `hidefrom` to before `hideto`."""
    return (position < first) | (position >= end)

@triton.jit
def columns_of_tile(first_data, first_step, end_data, end_step, top, last, start, kv_len):
    """What rows at positions from top to last see of a leaf: nothing (0), some of it (1), all (2)."""
    keys = start + tl.arange(0, BLOCK_N)
    inside = keys < kv_len
    first = tl.load(first_data + keys.to(tl.int64) * first_step, mask=inside, other=0)
    end = tl.load(end_data + keys.to(tl.int64) * end_step, mask=inside, other=0)
    some = tl.max((((top < first) | (last >= end)) & inside).to(tl.int32), 0)
    touched = tl.max(((first <= last) & (top < end) & (first < end)).to(tl.int32), 0)
    return some * (2 - touched)

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len", "hidefrom_data", "hidefrom_batch", "hidefrom_kv_heads", "hidefrom_kv_len", "hideto_data", "hideto_batch", "hideto_kv_heads", "hideto_kv_len", "lengths_data", "lengths_batch", "softcap", "bias_data", "bias_batch", "bias_heads", "bias_q_len", "bias_kv_len", "slopes_data", "slopes_batch", "slopes_heads"],
    do_not_specialize_on_alignment=["group"],
)
def prepare(
    query, key, output, grad, lse, sums, rests, deltas, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, kv_heads, group, q_len, kv_len, hidefrom_data, hidefrom_batch, hidefrom_kv_heads, hidefrom_kv_len, hideto_data, hideto_batch, hideto_kv_heads, hideto_kv_len, lengths_data, lengths_batch, softcap, bias_data, bias_batch, bias_heads, bias_q_len, bias_kv_len, slopes_data, slopes_batch, slopes_heads,
):  # fmt: skip
    """D = rowsum(dO * O), and the log-sum-exp in base 2 with +inf where a row saw no key, so that its weights are 0; in
    two parts, the second 0 unless the first lies so far from 0 that it has lost digits of the sum of weights."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, head = pair // (kv_heads * group), pair % (kv_heads * group)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < q_len
    output_rows = output + batch * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_om
    grad_rows = grad + batch * stride_gb + head * stride_gh + rows.to(tl.int64) * stride_gm
    delta = tl.zeros([BLOCK_M], tl.float32)
    o = tl.load(output_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
    g = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
    delta += tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    total = tl.load(lse + pair * q_len + rows, mask=valid, other=0.0)
    origin, rest = tl.where(total == NONE, -NONE, total * LOG2_E), tl.zeros([BLOCK_M], tl.float32)
    far = (tl.abs(total) > RELIABLE) & (total != NONE)
    if tl.max(far.to(tl.int32), 0) > 0:
        kv_head = head // group
        query_rows = query + batch * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qm
        keys_of_head = key + batch * stride_kb + kv_head * stride_kh
        step_k = head * 0 + stride_kn
        q0 = tl.load(query_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
        lengths = limit(tl.load(lengths_data + batch * lengths_batch), q_len, kv_len)
        inside_positions = tl.minimum(rows, q_len - 1)
        last = tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1
        high = keys_high(last, q_len, kv_len, lengths)
        row_high = lengths + 0 * rows
        top, weight = tl.full([BLOCK_M], NONE, tl.float32), tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, high, BLOCK_N, num_stages=1):
            keys = start + tl.arange(0, BLOCK_N)
            inside = keys < kv_len
            key_rows = keys_of_head + keys * step_k
            k0 = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            sees = 1  # of which pairs are tested
            scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            scores = scores * c
            scores = softcap_score(scores, softcap)
            scores = bias_score(scores, tl.load(bias_data + (batch).to(tl.int64) * bias_batch + (head).to(tl.int64) * bias_heads + (inside_positions[:, None]).to(tl.int64) * bias_q_len + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * bias_kv_len))
            scores = alibi_score(scores, tl.load(slopes_data + (batch).to(tl.int64) * slopes_batch + (head).to(tl.int64) * slopes_heads), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :], kv_len - q_len)
            if sees < 2:
                scores = tl.where(columns_sees(tl.load(hidefrom_data + (batch).to(tl.int64) * hidefrom_batch + (kv_head).to(tl.int64) * hidefrom_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hidefrom_kv_len), tl.load(hideto_data + (batch).to(tl.int64) * hideto_batch + (kv_head).to(tl.int64) * hideto_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hideto_kv_len), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :]), scores, NONE)
            scores = tl.where(inside[None, :] & (keys[None, :] < row_high[:, None]), scores, NONE)
            above = tl.maximum(top, tl.max(scores, 1) * LOG2_E)
            near = tl.where(above == NONE, 0.0, above)
            p = tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -near[:, None] + tl.zeros_like(scores))
            p = tl.exp2(p)
            top, weight = above, weight * tl.exp2(top - near) + tl.sum(p, 1)
        near = tl.where(top == NONE, 0.0, top)
        origin = tl.where(far, tl.where(weight == 0.0, -NONE, near), origin)
        rest = tl.where(far & (weight > 0.0), tl.log2(weight), 0.0)
    tl.store(sums + pair * q_len + rows, origin, mask=valid)
    tl.store(rests + pair * q_len + rows, rest, mask=valid)
    tl.store(deltas + pair * q_len + rows, delta, mask=valid)

@triton.jit
def limit(x, q_len, kv_len):
    """An integer of a call in 32 bits: beyond all lengths it cuts no more."""
    return tl.maximum(tl.minimum(x, q_len + kv_len), -q_len - kv_len).to(tl.int32)

@triton.jit
def floor_divide(x, n):
    return (x - tl.where(x < 0, n - 1, 0)) // n

@triton.jit
def keys_low(position, q_len, kv_len, lengths):
    """Keys but at positions from `hidefrom` to before `hideto`; the first `lengths` keys of its own sequence: the first key that a position sees."""
    return tl.maximum(0, tl.minimum(0, kv_len))

@triton.jit
def keys_high(position, q_len, kv_len, lengths):
    """The first key that it no longer sees."""
    return tl.maximum(0, tl.minimum(lengths, kv_len))

@triton.jit
def first_position(key, q_len, kv_len, lengths):
    """The first position that sees a key or some key after it."""
    return tl.maximum(0, tl.minimum((tl.minimum(tl.maximum(((key - lengths) + 1), 0), 1) * q_len), q_len))

@triton.jit
def end_position(key, q_len, kv_len, lengths):
    """The first position that no longer sees a key."""
    return tl.maximum(0, tl.minimum((tl.minimum(tl.maximum(((key - 0) + 1), 0), 1) * q_len), q_len))

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len", "hidefrom_data", "hidefrom_batch", "hidefrom_kv_heads", "hidefrom_kv_len", "hideto_data", "hideto_batch", "hideto_kv_heads", "hideto_kv_len", "lengths_data", "lengths_batch", "softcap", "bias_data", "bias_batch", "bias_heads", "bias_q_len", "bias_kv_len", "slopes_data", "slopes_batch", "slopes_heads"],
    do_not_specialize_on_alignment=["group"],
)
def grad_query(
    query, key, value, grad, sums, rests, deltas, out, out_slopes, c, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om, kv_heads, group, q_len, kv_len, with_slopes, hidefrom_data, hidefrom_batch, hidefrom_kv_heads, hidefrom_kv_len, hideto_data, hideto_batch, hideto_kv_heads, hideto_kv_len, lengths_data, lengths_batch, softcap, bias_data, bias_batch, bias_heads, bias_q_len, bias_kv_len, slopes_data, slopes_batch, slopes_heads,
):  # fmt: skip
    """dQ of one tile of query rows of one head."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, head = pair // (kv_heads * group), pair % (kv_heads * group)
    kv_head = head // group
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < q_len
    keys_of_head = key + batch * stride_kb + (head // group) * stride_kh
    step_k = head * 0 + stride_kn  # 64 bits: lengths times strides outgrow 32
    dq0 = tl.zeros([BLOCK_M, 64], tl.float32)
    query_rows = query + batch * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qm
    grad_rows = grad + batch * stride_gb + head * stride_gh + rows.to(tl.int64) * stride_gm
    values_of_head = value + batch * stride_vb + (head // group) * stride_vh
    step_v = head * 0 + stride_vn
    q0 = tl.load(query_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
    g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
    sums = tl.load(sums + pair * q_len + rows, mask=valid, other=-NONE)
    rests = tl.load(rests + pair * q_len + rows, mask=valid, other=0.0)
    deltas = tl.load(deltas + pair * q_len + rows, mask=valid, other=0.0)
    grad_slopes = tl.zeros([BLOCK_M], tl.float32)
    lengths = limit(tl.load(lengths_data + batch * lengths_batch), q_len, kv_len)
    inside_positions = tl.minimum(rows, q_len - 1)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1
    high = keys_high(last, q_len, kv_len, lengths)
    row_high = lengths + 0 * rows
    every = keys_high(block * BLOCK_M, q_len, kv_len, lengths)
    whole = 0 + tl.maximum(every - 0, 0) // BLOCK_N * BLOCK_N  # seen by every row, in whole tiles
    for start in tl.range(0, whole, BLOCK_N):
        sees = columns_of_tile(hidefrom_data + batch * hidefrom_batch + kv_head * hidefrom_kv_heads, hidefrom_kv_len, hideto_data + batch * hideto_batch + kv_head * hideto_kv_heads, hideto_kv_len, block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1, start, kv_len)
        if sees > 0:
            keys = start + tl.arange(0, BLOCK_N)
            key_rows = keys_of_head + keys * step_k
            k0 = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :])
            value_rows = values_of_head + keys * step_v
            v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :])
            scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            scores = scores * c
            before_softcap = scores
            scores = softcap_score(scores, softcap)
            softcap_slope = softcap_slope_of(before_softcap, scores, softcap)
            scores = bias_score(scores, tl.load(bias_data + (batch).to(tl.int64) * bias_batch + (head).to(tl.int64) * bias_heads + (inside_positions[:, None]).to(tl.int64) * bias_q_len + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * bias_kv_len))
            before_alibi = scores
            scores = alibi_score(scores, tl.load(slopes_data + (batch).to(tl.int64) * slopes_batch + (head).to(tl.int64) * slopes_heads), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :], kv_len - q_len)
            if sees < 2:
                scores = tl.where(columns_sees(tl.load(hidefrom_data + (batch).to(tl.int64) * hidefrom_batch + (kv_head).to(tl.int64) * hidefrom_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hidefrom_kv_len), tl.load(hideto_data + (batch).to(tl.int64) * hideto_batch + (kv_head).to(tl.int64) * hideto_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hideto_kv_len), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :]), scores, NONE)
            p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -sums[:, None] + tl.zeros_like(scores)) - rests[:, None])
            weighted = tl.dot(g0, tl.trans(v0), input_precision="ieee")
            ds = p * (weighted - deltas[:, None])
            if with_slopes:
                grad_slopes += tl.sum(ds * alibi_rate_of_slopes(before_alibi, batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :], kv_len - q_len), 1)
            ds = ds * softcap_slope

            dq0 = tl.dot(ds.to(k0.dtype), k0, dq0, input_precision="ieee")

    for start in tl.range(whole, high, BLOCK_N):
        sees = columns_of_tile(hidefrom_data + batch * hidefrom_batch + kv_head * hidefrom_kv_heads, hidefrom_kv_len, hideto_data + batch * hideto_batch + kv_head * hideto_kv_heads, hideto_kv_len, block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1, start, kv_len)
        if sees > 0:
            keys = start + tl.arange(0, BLOCK_N)
            inside = keys < kv_len
            key_rows = keys_of_head + keys * step_k
            k0 = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            value_rows = values_of_head + keys * step_v
            v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            scores = scores * c
            before_softcap = scores
            scores = softcap_score(scores, softcap)
            softcap_slope = softcap_slope_of(before_softcap, scores, softcap)
            scores = bias_score(scores, tl.load(bias_data + (batch).to(tl.int64) * bias_batch + (head).to(tl.int64) * bias_heads + (inside_positions[:, None]).to(tl.int64) * bias_q_len + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * bias_kv_len))
            before_alibi = scores
            scores = alibi_score(scores, tl.load(slopes_data + (batch).to(tl.int64) * slopes_batch + (head).to(tl.int64) * slopes_heads), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :], kv_len - q_len)
            if sees < 2:
                scores = tl.where(columns_sees(tl.load(hidefrom_data + (batch).to(tl.int64) * hidefrom_batch + (kv_head).to(tl.int64) * hidefrom_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hidefrom_kv_len), tl.load(hideto_data + (batch).to(tl.int64) * hideto_batch + (kv_head).to(tl.int64) * hideto_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hideto_kv_len), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :]), scores, NONE)
            p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -sums[:, None] + tl.zeros_like(scores)) - rests[:, None])
            p = tl.where(inside[None, :] & (keys[None, :] < row_high[:, None]), p, 0.0)
            weighted = tl.dot(g0, tl.trans(v0), input_precision="ieee")
            ds = p * (weighted - deltas[:, None])
            if with_slopes:
                grad_slopes += tl.sum(ds * alibi_rate_of_slopes(before_alibi, batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :], kv_len - q_len), 1)
            ds = ds * softcap_slope

            dq0 = tl.dot(ds.to(k0.dtype), k0, dq0, input_precision="ieee")

    if with_slopes:
        tl.store(out_slopes + pair * q_len + rows, grad_slopes, mask=valid)
    out_rows = out + batch * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_om
    tl.store(out_rows[:, None] + tl.arange(0, 64)[None, :], (dq0 * scale).to(out.dtype.element_ty), mask=valid[:, None])

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len", "hidefrom_data", "hidefrom_batch", "hidefrom_kv_heads", "hidefrom_kv_len", "hideto_data", "hideto_batch", "hideto_kv_heads", "hideto_kv_len", "lengths_data", "lengths_batch", "softcap", "bias_data", "bias_batch", "bias_heads", "bias_q_len", "bias_kv_len", "slopes_data", "slopes_batch", "slopes_heads"],
    do_not_specialize_on_alignment=["group"],
)
def grad_key_value(
    query, key, value, grad, sums, rests, deltas, out_k, out_v, c, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn,
    kv_heads, group, q_len, kv_len, hidefrom_data, hidefrom_batch, hidefrom_kv_heads, hidefrom_kv_len, hideto_data, hideto_batch, hideto_kv_heads, hideto_kv_len, lengths_data, lengths_batch, softcap, bias_data, bias_batch, bias_heads, bias_q_len, bias_kv_len, slopes_data, slopes_batch, slopes_heads,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head, over the query rows of all heads that share it."""
    blocks = tl.cdiv(kv_len, BLOCK_N)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, kv_head = pair // kv_heads, pair % kv_heads
    lengths = limit(tl.load(lengths_data + batch * lengths_batch), q_len, kv_len)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < kv_len
    key_rows = key + batch * stride_kb + kv_head * stride_kh + keys.to(tl.int64) * stride_kn
    value_rows = value + batch * stride_vb + kv_head * stride_vh + keys.to(tl.int64) * stride_vn
    k0 = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
    dk0 = tl.zeros([BLOCK_N, 64], tl.float32)
    v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
    dv0 = tl.zeros([BLOCK_N, 64], tl.float32)
    first_key, last_key = block * BLOCK_N, tl.minimum(block * BLOCK_N + BLOCK_N, kv_len) - 1
    low = first_position(first_key, q_len, kv_len, lengths) // BLOCK_M * BLOCK_M  # rows before see none of the keys
    whole = tl.cdiv(first_position(last_key, q_len, kv_len, lengths), BLOCK_M) * BLOCK_M  # rows from here on see them all
    for shared in range(0, group):
        head = kv_head * group + shared
        queries_of_head = query + batch * stride_qb + head * stride_qh
        grads_of_head = grad + batch * stride_gb + head * stride_gh
        facts = (batch * kv_heads * group + head) * q_len
        for start in tl.range(low, tl.minimum(whole, q_len), BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            valid = rows < q_len
            inside_positions = tl.minimum(rows, q_len - 1)
            row_high = lengths + 0 * rows
            sees = columns_of_tile(hidefrom_data + batch * hidefrom_batch + kv_head * hidefrom_kv_heads, hidefrom_kv_len, hideto_data + batch * hideto_batch + kv_head * hideto_kv_heads, hideto_kv_len, start, tl.minimum(start + BLOCK_M, q_len) - 1, block * BLOCK_N, kv_len)
            if sees > 0:
                query_rows = queries_of_head + rows.to(tl.int64) * stride_qm
                grad_rows = grads_of_head + rows.to(tl.int64) * stride_gm
                q0 = tl.load(query_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
                g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
                total = tl.load(sums + facts + rows, mask=valid, other=-NONE)
                rest = tl.load(rests + facts + rows, mask=valid, other=0.0)
                delta = tl.load(deltas + facts + rows, mask=valid, other=0.0)
                scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")
                scores = scores * c
                before_softcap = scores
                scores = softcap_score(scores, softcap)
                softcap_slope = softcap_slope_of(before_softcap, scores, softcap)
                scores = bias_score(scores, tl.load(bias_data + (batch).to(tl.int64) * bias_batch + (head).to(tl.int64) * bias_heads + (inside_positions[None, :]).to(tl.int64) * bias_q_len + (tl.minimum(keys, kv_len - 1)[:, None]).to(tl.int64) * bias_kv_len))
                before_alibi = scores
                scores = alibi_score(scores, tl.load(slopes_data + (batch).to(tl.int64) * slopes_batch + (head).to(tl.int64) * slopes_heads), batch, head, inside_positions[None, :], tl.minimum(keys, kv_len - 1)[:, None], kv_len - q_len)
                if sees < 2:
                    scores = tl.where(columns_sees(tl.load(hidefrom_data + (batch).to(tl.int64) * hidefrom_batch + (kv_head).to(tl.int64) * hidefrom_kv_heads + (tl.minimum(keys, kv_len - 1)[:, None]).to(tl.int64) * hidefrom_kv_len), tl.load(hideto_data + (batch).to(tl.int64) * hideto_batch + (kv_head).to(tl.int64) * hideto_kv_heads + (tl.minimum(keys, kv_len - 1)[:, None]).to(tl.int64) * hideto_kv_len), batch, head, inside_positions[None, :], tl.minimum(keys, kv_len - 1)[:, None]), scores, NONE)
                p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -total[None, :] + tl.zeros_like(scores)) - rest[None, :])
                p = tl.where((keys[:, None] < row_high[None, :]), p, 0.0)
                weighted = tl.dot(v0, tl.trans(g0), input_precision="ieee")
                ds = p * (weighted - delta[None, :])
                ds = ds * softcap_slope

                dv0 = tl.dot(p.to(g0.dtype), g0, dv0, input_precision="ieee")
                dk0 = tl.dot(ds.to(q0.dtype), q0, dk0, input_precision="ieee")

        for start in tl.range(whole, q_len, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            valid = rows < q_len
            inside_positions = tl.minimum(rows, q_len - 1)
            sees = columns_of_tile(hidefrom_data + batch * hidefrom_batch + kv_head * hidefrom_kv_heads, hidefrom_kv_len, hideto_data + batch * hideto_batch + kv_head * hideto_kv_heads, hideto_kv_len, start, tl.minimum(start + BLOCK_M, q_len) - 1, block * BLOCK_N, kv_len)
            if sees > 0:
                query_rows = queries_of_head + rows.to(tl.int64) * stride_qm
                grad_rows = grads_of_head + rows.to(tl.int64) * stride_gm
                q0 = tl.load(query_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
                g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
                total = tl.load(sums + facts + rows, mask=valid, other=-NONE)
                rest = tl.load(rests + facts + rows, mask=valid, other=0.0)
                delta = tl.load(deltas + facts + rows, mask=valid, other=0.0)
                scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")
                scores = scores * c
                before_softcap = scores
                scores = softcap_score(scores, softcap)
                softcap_slope = softcap_slope_of(before_softcap, scores, softcap)
                scores = bias_score(scores, tl.load(bias_data + (batch).to(tl.int64) * bias_batch + (head).to(tl.int64) * bias_heads + (inside_positions[None, :]).to(tl.int64) * bias_q_len + (tl.minimum(keys, kv_len - 1)[:, None]).to(tl.int64) * bias_kv_len))
                before_alibi = scores
                scores = alibi_score(scores, tl.load(slopes_data + (batch).to(tl.int64) * slopes_batch + (head).to(tl.int64) * slopes_heads), batch, head, inside_positions[None, :], tl.minimum(keys, kv_len - 1)[:, None], kv_len - q_len)
                if sees < 2:
                    scores = tl.where(columns_sees(tl.load(hidefrom_data + (batch).to(tl.int64) * hidefrom_batch + (kv_head).to(tl.int64) * hidefrom_kv_heads + (tl.minimum(keys, kv_len - 1)[:, None]).to(tl.int64) * hidefrom_kv_len), tl.load(hideto_data + (batch).to(tl.int64) * hideto_batch + (kv_head).to(tl.int64) * hideto_kv_heads + (tl.minimum(keys, kv_len - 1)[:, None]).to(tl.int64) * hideto_kv_len), batch, head, inside_positions[None, :], tl.minimum(keys, kv_len - 1)[:, None]), scores, NONE)
                p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -total[None, :] + tl.zeros_like(scores)) - rest[None, :])
                weighted = tl.dot(v0, tl.trans(g0), input_precision="ieee")
                ds = p * (weighted - delta[None, :])
                ds = ds * softcap_slope

                dv0 = tl.dot(p.to(g0.dtype), g0, dv0, input_precision="ieee")
                dk0 = tl.dot(ds.to(q0.dtype), q0, dk0, input_precision="ieee")

    out_k_rows = out_k + batch * stride_xb + kv_head * stride_xh + keys.to(tl.int64) * stride_xn
    out_v_rows = out_v + batch * stride_yb + kv_head * stride_yh + keys.to(tl.int64) * stride_yn
    tl.store(out_k_rows[:, None] + tl.arange(0, 64)[None, :], (dk0 * scale).to(out_k.dtype.element_ty), mask=inside[:, None])
    tl.store(out_v_rows[:, None] + tl.arange(0, 64)[None, :], dv0.to(out_v.dtype.element_ty), mask=inside[:, None])

@triton.jit
def steps_of_bias(
    batch, head, block, start, query, key, value, grad, sums, rests, deltas, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, kv_heads, group, q_len, kv_len, hidefrom_data, hidefrom_batch, hidefrom_kv_heads, hidefrom_kv_len, hideto_data, hideto_batch, hideto_kv_heads, hideto_kv_len, lengths_data, lengths_batch, softcap, bias_data, bias_batch, bias_heads, bias_q_len, bias_kv_len, slopes_data, slopes_batch, slopes_heads,
):  # fmt: skip
    """dS of a tile of pairs of one head, where `bias` is added."""
    kv_head = head // group
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < q_len
    lengths = limit(tl.load(lengths_data + batch * lengths_batch), q_len, kv_len)
    inside_positions = tl.minimum(rows, q_len - 1)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1
    high = keys_high(last, q_len, kv_len, lengths)
    row_high = lengths + 0 * rows
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if (start >= 0) & (start < high):
        sees = columns_of_tile(hidefrom_data + batch * hidefrom_batch + kv_head * hidefrom_kv_heads, hidefrom_kv_len, hideto_data + batch * hideto_batch + kv_head * hideto_kv_heads, hideto_kv_len, block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1, start, kv_len)
        if sees > 0:
            keys = start + tl.arange(0, BLOCK_N)
            inside = keys < kv_len
            query_rows = query + batch * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qm
            grad_rows = grad + batch * stride_gb + head * stride_gh + rows.to(tl.int64) * stride_gm
            key_rows = key + batch * stride_kb + kv_head * stride_kh + keys.to(tl.int64) * stride_kn
            value_rows = value + batch * stride_vb + kv_head * stride_vh + keys.to(tl.int64) * stride_vn
            q0 = tl.load(query_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
            k0 = tl.load(key_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
            v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
            facts = (batch * kv_heads * group + head) * q_len + rows
            total = tl.load(sums + facts, mask=valid, other=-NONE)
            rest = tl.load(rests + facts, mask=valid, other=0.0)
            delta = tl.load(deltas + facts, mask=valid, other=0.0)
            scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            scores = scores * c
            before_softcap = scores
            scores = softcap_score(scores, softcap)
            softcap_slope = softcap_slope_of(before_softcap, scores, softcap)
            scores = bias_score(scores, tl.load(bias_data + (batch).to(tl.int64) * bias_batch + (head).to(tl.int64) * bias_heads + (inside_positions[:, None]).to(tl.int64) * bias_q_len + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * bias_kv_len))
            before_alibi = scores
            scores = alibi_score(scores, tl.load(slopes_data + (batch).to(tl.int64) * slopes_batch + (head).to(tl.int64) * slopes_heads), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :], kv_len - q_len)
            if sees < 2:
                scores = tl.where(columns_sees(tl.load(hidefrom_data + (batch).to(tl.int64) * hidefrom_batch + (kv_head).to(tl.int64) * hidefrom_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hidefrom_kv_len), tl.load(hideto_data + (batch).to(tl.int64) * hideto_batch + (kv_head).to(tl.int64) * hideto_kv_heads + (tl.minimum(keys, kv_len - 1)[None, :]).to(tl.int64) * hideto_kv_len), batch, head, inside_positions[:, None], tl.minimum(keys, kv_len - 1)[None, :]), scores, NONE)
            p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + LOG2_E, -total[:, None] + tl.zeros_like(scores)) - rest[:, None])
            p = tl.where(inside[None, :] & (keys[None, :] < row_high[:, None]), p, 0.0)
            weighted = tl.dot(g0, tl.trans(v0), input_precision="ieee")
            ds = p * (weighted - delta[:, None])
    return ds

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len", "batches", "own_batches", "own_heads", "own_rows", "own_keys", "by_row", "by_key", "hidefrom_data", "hidefrom_batch", "hidefrom_kv_heads", "hidefrom_kv_len", "hideto_data", "hideto_batch", "hideto_kv_heads", "hideto_kv_len", "lengths_data", "lengths_batch", "softcap", "bias_data", "bias_batch", "bias_heads", "bias_q_len", "bias_kv_len", "slopes_data", "slopes_batch", "slopes_heads"],
    do_not_specialize_on_alignment=["group"],
)
def gradient_of_bias(
    query, key, value, grad, sums, rests, deltas, out, c,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, kv_heads, group, q_len, kv_len,
    batches, own_batches, own_heads, own_rows, own_keys, by_row, by_key, hidefrom_data, hidefrom_batch, hidefrom_kv_heads, hidefrom_kv_len, hideto_data, hideto_batch, hideto_kv_heads, hideto_kv_len, lengths_data, lengths_batch, softcap, bias_data, bias_batch, bias_heads, bias_q_len, bias_kv_len, slopes_data, slopes_batch, slopes_heads,
):  # fmt: skip
    """What a tile of `bias` receives, of all that share it: there are own_batches x own_heads x own_rows x own_keys tiles,
    of several rows, by_row, and of several keys, by_key."""
    index = tl.program_id(0)
    column, line = index % own_keys, index // own_keys % own_rows
    of_head, of_batch = index // own_keys // own_rows % own_heads, index // own_keys // own_rows // own_heads
    shared_keys, shared_rows = tl.cdiv(kv_len, BLOCK_N) // own_keys, tl.cdiv(q_len, BLOCK_M) // own_rows
    shared_heads, shared_batches = kv_heads * group // own_heads, batches // own_batches
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, shared_keys * shared_rows * shared_heads * shared_batches):
        start, block = (column + i % shared_keys) * BLOCK_N, line + i // shared_keys % shared_rows
        each = i // shared_keys // shared_rows
        head, batch = (of_head + each % shared_heads).to(tl.int64), (of_batch + each // shared_heads).to(tl.int64)
        total += steps_of_bias(
            batch, head, block, start, query, key, value, grad, sums, rests, deltas, c,
            stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            stride_gb, stride_gh, stride_gm, kv_heads, group, q_len, kv_len, hidefrom_data, hidefrom_batch, hidefrom_kv_heads, hidefrom_kv_len, hideto_data, hideto_batch, hideto_kv_heads, hideto_kv_len, lengths_data, lengths_batch, softcap, bias_data, bias_batch, bias_heads, bias_q_len, bias_kv_len, slopes_data, slopes_batch, slopes_heads,
        )  # fmt: skip
    rows, keys = line * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    own = (of_batch * own_heads + of_head).to(tl.int64)
    if by_row > 0:
        if by_key > 0:
            places = ((own * q_len + rows) * kv_len)[:, None] + keys[None, :]
            tl.store(out + places, total, mask=(rows < q_len)[:, None] & (keys < kv_len)[None, :])
        else:
            tl.store(out + own * q_len + rows, tl.sum(total, 1), mask=rows < q_len)
    else:
        if by_key > 0:
            tl.store(out + own * kv_len + keys, tl.sum(total, 0), mask=keys < kv_len)
        else:
            tl.store(out + own, tl.sum(tl.sum(total, 1), 0))

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

def gradients(query, key, value, output, lse, grad, scale=None, operands=(), grad_lse=None, more=()):
    """dQ, dK, dV of attention(query, key, value) [batch, heads, length, dim], all with contiguous rows.

    ``output`` and ``lse`` [batch, heads, q_len] (float32, contiguous) are what the forward kernel gave, ``grad`` the
    gradient of the output, ``grad_lse`` that of the log-sum-exp where it is a result too.
    ``more``: where what bias, slopes receive is to be, None where nobody asks; of what rows share [batch, heads, q_len], not yet summed. float32.
    """
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for kernel, grid, arguments, options in launches(query, key, value, output, lse, grad, scale, *found, operands, grad_lse=grad_lse, more=more):
        kernel[grid](*arguments, **options)
    return found

def launches(query, key, value, output, lse, grad, scale, dq, dk, dv, operands, grad_lse=None, more=()):
    """What to launch, one after the other: kernel, grid, arguments, options. Arguments alone decide what is compiled,
    whatever device the tensors are on."""
    batch, heads, q_len, _ = query.shape
    _, kv_heads, kv_len, _ = key.shape
    scale = 1 / math.sqrt(64) if scale is None else scale
    c = abs(scale) or 1.0
    if scale <= 0:  # as the forward kernel does
        query = query * (-1.0 if scale else 0.0)
    group, pairs = heads // kv_heads, batch * kv_heads
    sums, deltas = torch.empty_like(lse), torch.empty_like(lse)
    rests = torch.empty_like(lse)
    (grad_bias, grad_slopes,) = more or (None,) * 2
    q, k, v, o, g = (x.stride()[:3] for x in (query, key, value, output, grad))
    row_tiles, key_tiles = -(-q_len // 32), -(-kv_len // 32)
    shape = kv_heads, group, q_len, kv_len
    arguments = query, key, output, grad, lse, sums, rests, deltas, c, *q, *k, *o, *g, *shape, *operands[0:]
    yield prepare, (batch * heads * row_tiles,), arguments, OPTIONS
    if grad_lse is not None:
        deltas -= grad_lse
    of_rows = (
        query, key, value, grad, sums, rests, deltas, dq, sums if grad_slopes is None else grad_slopes, c, scale,
        *q, *k, *v, *g, *dq.stride()[:3], *shape, grad_slopes is not None, *operands[0:],
    )  # fmt: skip
    of_keys = (
        query, key, value, grad, sums, rests, deltas, dk, dv, c, abs(scale),
        *q, *k, *v, *g, *dk.stride()[:3], *dv.stride()[:3], *shape, *operands[0:],
    )  # fmt: skip
    yield grad_query, (batch * heads * row_tiles,), of_rows, OPTIONS
    yield grad_key_value, (pairs * key_tiles,), of_keys, OPTIONS
    if grad_bias is not None:
        of_batch, of_head, by_row, by_key = grad_bias.shape[0] > 1, grad_bias.shape[1] > 1, grad_bias.shape[2] > 1, grad_bias.shape[3] > 1
        own = batch if of_batch else 1, heads if of_head else 1, row_tiles if by_row else 1, key_tiles if by_key else 1
        arguments = (
            query, key, value, grad, sums, rests, deltas, grad_bias, c, *q, *k, *v, *g, *shape,
            batch, *own, int(by_row), int(by_key), *operands[0:],
        )  # fmt: skip
        yield gradient_of_bias, (math.prod(own),), arguments, OPTIONS

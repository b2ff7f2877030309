"""elsa-tune: triton.serial.half.m32.n32.warps4.stages2 for bf16.d96.v64.causal.backward.

Gradients of exact softmax attention from its output and log-sum-exp L alone, O(n) memory:
    P = 2^(c S - L log2(e))    D = rowsum(dO * O)    dS = P * (dO V^T - D)
    dV = P^T dO                dQ = scale dS K       dK = scale dS^T Q
One kernel gives a program 32 query rows and folds over keys, the other 32 keys and folds over the query rows of
all heads that share them, S^T and dP^T at once: seven products in all, and nothing is added atomically.
The same inputs give the same bits. Regenerate this text: elsa-tune show triton.serial.half.m32.n32.warps4.stages2 bf16.d96.v64.causal.backward
"""

import math

import torch
import triton
import triton.language as tl

# query, key, value and output are of tl.bfloat16, states of tl.float32

HEAD_DIM = tl.constexpr(96)
VALUE_DIM = tl.constexpr(64)
BLOCK_M = tl.constexpr(32)  # query rows of a tile
BLOCK_N = tl.constexpr(32)  # keys of a tile
NONE = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)

@triton.jit(
    do_not_specialize=["kv_heads", "q_len"],
    do_not_specialize_on_alignment=["group"],
)
def prepare(
    output, grad, lse, sums, deltas,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, kv_heads, group, q_len,
):  # fmt: skip
    """D = rowsum(dO * O), and the log-sum-exp in base 2 with +inf where a row saw no key, so that its weights are 0."""
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
    tl.store(sums + pair * q_len + rows, tl.where(total == NONE, -NONE, total * LOG2_E), mask=valid)
    tl.store(deltas + pair * q_len + rows, delta, mask=valid)

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
def first_position(key, q_len, kv_len):
    """The first position that sees a key or some key after it."""
    return tl.maximum(0, tl.minimum(((key - 1) + 1), q_len))

@triton.jit
def end_position(key, q_len, kv_len):
    """The first position that no longer sees a key."""
    return tl.maximum(0, tl.minimum((tl.minimum(tl.maximum(((key - 0) + 1), 0), 1) * q_len), q_len))

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len"],
    do_not_specialize_on_alignment=["group"],
)
def grad_query(
    query, key, value, grad, sums, deltas, out, c, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om, kv_heads, group, q_len, kv_len,
):  # fmt: skip
    """dQ of one tile of query rows of one head."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, head = pair // (kv_heads * group), pair % (kv_heads * group)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < q_len
    keys_of_head = key + batch * stride_kb + (head // group) * stride_kh
    step_k = head * 0 + stride_kn  # 64 bits: lengths times strides outgrow 32
    dq0 = tl.zeros([BLOCK_M, 128], tl.float32)
    query_rows = query + batch * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_qm
    grad_rows = grad + batch * stride_gb + head * stride_gh + rows.to(tl.int64) * stride_gm
    values_of_head = value + batch * stride_vb + (head // group) * stride_vh
    step_v = head * 0 + stride_vn
    q0 = tl.load(query_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM), other=0.0)
    g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
    sums = tl.load(sums + pair * q_len + rows, mask=valid, other=-NONE)
    deltas = tl.load(deltas + pair * q_len + rows, mask=valid, other=0.0)
    last = tl.minimum(block * BLOCK_M + BLOCK_M, q_len) - 1
    high = keys_high(last, q_len, kv_len)
    row_high = (rows + 1)
    every = keys_high(block * BLOCK_M, q_len, kv_len)
    whole = 0 + tl.maximum(every - 0, 0) // BLOCK_N * BLOCK_N  # seen by every row, in whole tiles
    for start in tl.range(0, whole, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_rows = keys_of_head + keys * step_k
        k0 = tl.load(key_rows[:, None] + tl.arange(0, 128)[None, :], mask=(tl.arange(0, 128)[None, :] < HEAD_DIM), other=0.0)
        value_rows = values_of_head + keys * step_v
        v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :])
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + c, -sums[:, None] + tl.zeros_like(scores)))
        weighted = tl.dot(g0, tl.trans(v0), input_precision="ieee")
        ds = p * (weighted - deltas[:, None])

        dq0 = tl.dot(ds.to(k0.dtype), k0, dq0, input_precision="ieee")

    for start in tl.range(whole, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < kv_len
        key_rows = keys_of_head + keys * step_k
        k0 = tl.load(key_rows[:, None] + tl.arange(0, 128)[None, :], mask=inside[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM), other=0.0)
        value_rows = values_of_head + keys * step_v
        v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + c, -sums[:, None] + tl.zeros_like(scores)))
        p = tl.where(inside[None, :] & (keys[None, :] < row_high[:, None]), p, 0.0)
        weighted = tl.dot(g0, tl.trans(v0), input_precision="ieee")
        ds = p * (weighted - deltas[:, None])

        dq0 = tl.dot(ds.to(k0.dtype), k0, dq0, input_precision="ieee")

    out_rows = out + batch * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_om
    tl.store(out_rows[:, None] + tl.arange(0, 128)[None, :], (dq0 * scale).to(out.dtype.element_ty), mask=valid[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM))

@triton.jit(
    do_not_specialize=["kv_heads", "q_len", "kv_len"],
    do_not_specialize_on_alignment=["group"],
)
def grad_key_value(
    query, key, value, grad, sums, deltas, out_k, out_v, c, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_xb, stride_xh, stride_xn, stride_yb, stride_yh, stride_yn,
    kv_heads, group, q_len, kv_len,
):  # fmt: skip
    """dK and dV of one tile of keys of one KV head, over the query rows of all heads that share it."""
    blocks = tl.cdiv(kv_len, BLOCK_N)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, kv_head = pair // kv_heads, pair % kv_heads
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < kv_len
    key_rows = key + batch * stride_kb + kv_head * stride_kh + keys.to(tl.int64) * stride_kn
    value_rows = value + batch * stride_vb + kv_head * stride_vh + keys.to(tl.int64) * stride_vn
    k0 = tl.load(key_rows[:, None] + tl.arange(0, 128)[None, :], mask=inside[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM), other=0.0)
    dk0 = tl.zeros([BLOCK_N, 128], tl.float32)
    v0 = tl.load(value_rows[:, None] + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
    dv0 = tl.zeros([BLOCK_N, 64], tl.float32)
    first_key, last_key = block * BLOCK_N, tl.minimum(block * BLOCK_N + BLOCK_N, kv_len) - 1
    low = first_position(first_key, q_len, kv_len) // BLOCK_M * BLOCK_M  # rows before see none of the keys
    whole = tl.cdiv(first_position(last_key, q_len, kv_len), BLOCK_M) * BLOCK_M  # rows from here on see them all
    for shared in range(0, group):
        head = kv_head * group + shared
        queries_of_head = query + batch * stride_qb + head * stride_qh
        grads_of_head = grad + batch * stride_gb + head * stride_gh
        facts = (batch * kv_heads * group + head) * q_len
        for start in tl.range(low, tl.minimum(whole, q_len), BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            valid = rows < q_len
            row_high = (rows + 1)
            query_rows = queries_of_head + rows.to(tl.int64) * stride_qm
            grad_rows = grads_of_head + rows.to(tl.int64) * stride_gm
            q0 = tl.load(query_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM), other=0.0)
            g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
            total = tl.load(sums + facts + rows, mask=valid, other=-NONE)
            delta = tl.load(deltas + facts + rows, mask=valid, other=0.0)
            scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")
            p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + c, -total[None, :] + tl.zeros_like(scores)))
            p = tl.where((keys[:, None] < row_high[None, :]), p, 0.0)
            weighted = tl.dot(v0, tl.trans(g0), input_precision="ieee")
            ds = p * (weighted - delta[None, :])

            dv0 = tl.dot(p.to(g0.dtype), g0, dv0, input_precision="ieee")
            dk0 = tl.dot(ds.to(q0.dtype), q0, dk0, input_precision="ieee")

        for start in tl.range(whole, q_len, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            valid = rows < q_len
            query_rows = queries_of_head + rows.to(tl.int64) * stride_qm
            grad_rows = grads_of_head + rows.to(tl.int64) * stride_gm
            q0 = tl.load(query_rows[:, None] + tl.arange(0, 128)[None, :], mask=valid[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM), other=0.0)
            g0 = tl.load(grad_rows[:, None] + tl.arange(0, 64)[None, :], mask=valid[:, None], other=0.0)
            total = tl.load(sums + facts + rows, mask=valid, other=-NONE)
            delta = tl.load(deltas + facts + rows, mask=valid, other=0.0)
            scores = tl.dot(k0, tl.trans(q0), input_precision="ieee")
            p = tl.exp2(tl.math.fma(scores, tl.zeros_like(scores) + c, -total[None, :] + tl.zeros_like(scores)))
            weighted = tl.dot(v0, tl.trans(g0), input_precision="ieee")
            ds = p * (weighted - delta[None, :])

            dv0 = tl.dot(p.to(g0.dtype), g0, dv0, input_precision="ieee")
            dk0 = tl.dot(ds.to(q0.dtype), q0, dk0, input_precision="ieee")

    out_k_rows = out_k + batch * stride_xb + kv_head * stride_xh + keys.to(tl.int64) * stride_xn
    out_v_rows = out_v + batch * stride_yb + kv_head * stride_yh + keys.to(tl.int64) * stride_yn
    tl.store(out_k_rows[:, None] + tl.arange(0, 128)[None, :], (dk0 * scale).to(out_k.dtype.element_ty), mask=inside[:, None] & (tl.arange(0, 128)[None, :] < HEAD_DIM))
    tl.store(out_v_rows[:, None] + tl.arange(0, 64)[None, :], dv0.to(out_v.dtype.element_ty), mask=inside[:, None])

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
SIDE_OPTIONS = {"num_warps": 4}  # of the kernel that prepares

def gradients(query, key, value, output, lse, grad, scale=None, grad_lse=None):
    """dQ, dK, dV of attention(query, key, value) [batch, heads, length, dim], all with contiguous rows.

    ``output`` and ``lse`` [batch, heads, q_len] (float32, contiguous) are what the forward kernel gave, ``grad`` the
    gradient of the output, ``grad_lse`` that of the log-sum-exp where it is a result too.
    """
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for kernel, grid, arguments, options in launches(query, key, value, output, lse, grad, scale, *found, grad_lse=grad_lse):
        kernel[grid](*arguments, **options)
    return found

def launches(query, key, value, output, lse, grad, scale, dq, dk, dv, grad_lse=None):
    """What to launch, one after the other: kernel, grid, arguments, options. Arguments alone decide what is compiled,
    whatever device the tensors are on."""
    batch, heads, q_len, _ = query.shape
    _, kv_heads, kv_len, _ = key.shape
    scale = 1 / math.sqrt(96) if scale is None else scale
    c = abs(scale) * 1.4426950408889634 or 1.0
    if scale <= 0:  # as the forward kernel does
        query = query * (-1.0 if scale else 0.0)
    group, pairs = heads // kv_heads, batch * kv_heads
    sums, deltas = torch.empty_like(lse), torch.empty_like(lse)
    q, k, v, o, g = (x.stride()[:3] for x in (query, key, value, output, grad))
    row_tiles, key_tiles = -(-q_len // 32), -(-kv_len // 32)
    shape = kv_heads, group, q_len, kv_len
    arguments = output, grad, lse, sums, deltas, *o, *g, kv_heads, group, q_len
    yield prepare, (batch * heads * row_tiles,), arguments, SIDE_OPTIONS
    if grad_lse is not None:
        deltas -= grad_lse
    of_rows = query, key, value, grad, sums, deltas, dq, c, scale, *q, *k, *v, *g, *dq.stride()[:3], *shape
    of_keys = (
        query, key, value, grad, sums, deltas, dk, dv, c, abs(scale),
        *q, *k, *v, *g, *dk.stride()[:3], *dv.stride()[:3], *shape,
    )  # fmt: skip
    yield grad_query, (batch * heads * row_tiles,), of_rows, OPTIONS
    yield grad_key_value, (pairs * key_tiles,), of_keys, OPTIONS

"""The least Triton kernel that computes attention: no groups, no ragged lengths, no strides but of rows. What ours may be
compared with in registers and instructions."""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(64)
BLOCK_M = tl.constexpr(128)
BLOCK_N = tl.constexpr(64)
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["kv_len"])
def attend(query, key, value, output, c, stride_qm, stride_kn, stride_vn, stride_om, kv_len):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys, columns = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    q = tl.load(query + rows[:, None] * stride_qm + columns[None, :])
    key_tile = key + keys[:, None] * stride_kn + columns[None, :]
    value_tile = value + keys[:, None] * stride_vn + columns[None, :]
    m = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    s = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for _ in range(0, kv_len, BLOCK_N):
        scores = tl.dot(q, tl.trans(tl.load(key_tile)))
        larger = tl.maximum(m, tl.max(scores, 1) * c)
        p = tl.exp2(scores * c - larger[:, None])
        keep = tl.exp2(m - larger)
        m = larger
        s = s * keep + tl.sum(p, 1)
        w = tl.dot(p.to(value.dtype.element_ty), tl.load(value_tile), w * keep[:, None])
        key_tile += BLOCK_N * stride_kn
        value_tile += BLOCK_N * stride_vn
    tl.store(output + rows[:, None] * stride_om + columns[None, :], (w / s[:, None]).to(output.dtype.element_ty))


def launches(query, key, value, scale, out, lse):
    """As a generated module has it, for the first head alone."""
    strides = query.stride(2), key.stride(2), value.stride(2), out.stride(2)
    arguments = query, key, value, out, 1.0, *strides, key.shape[2]
    yield attend, (query.shape[2] // BLOCK_M,), arguments, OPTIONS

// elsa-tune: cuda.hybrid.hip.t128.x8.r2.k2.w2.c32.s4.last_block.native.apart for bf16.d96.causal
// Regenerate this text: elsa-tune show cuda.hybrid.hip.t128.x8.r2.k2.w2.c32.s4.last_block.native.apart bf16.d96.causal
//
// Exact softmax attention as a scan over states (m, S, W): Hillis-Steele inside a block, Blelloch across blocks.
//   leaf   16 keys x 16 query rows -> scores, exp2, one state; 2 x 2 scores in the registers of a thread
//   fold   a worker folds its leaves, state in registers
//   block  2 worker states of one block merged on chip by rounds
//   grid   4 splits of the key axis, states in memory merged by rounds (last_block)
// A query row is one (position, head of the group) pair of a KV head, position-major, so all query heads that share K
// and V read them together. Multiply-adds alone: no matrix unit. C++14 and OpenCL C 1.2 read the text below the
// dialect.
// HIP: hipcc, hiprtc.
#ifndef __HIPCC_RTC__
#include <hip/hip_runtime.h>
#endif
#if defined(__GFX9__)
#define WAVE 64
#else
#define WAVE 32
#endif
// HIP's second bound is waves on each of the four units of a multiprocessor, where CUDA's is blocks.
#define KERNEL(threads, blocks) extern "C" __global__ __launch_bounds__(threads) void
#define DEVICE __device__ __forceinline__
#define GLOBAL
#define SHARED
#define SHARED_MEMORY extern __shared__ float4 memory[]
#define UNROLL _Pragma("unroll")
#define UNROLL_PARTLY _Pragma("unroll 4")
typedef long long index_t;
DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE void barrier_block() { __syncthreads(); }
DEVICE float lane_xor(float x, int mask) { return __shfl_xor(x, mask); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float round_up(float x) { return ceilf(x); }
DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }
extern "C" __device__ float __ocml_native_exp2_f32(float);
DEVICE float exp2_native(float x) { return __ocml_native_exp2_f32(x); }

DEVICE float exp2_library(float x) { return exp2f(x); }
DEVICE float log2_library(float x) { return log2f(x); }
DEVICE void fence() { __threadfence(); }
DEVICE int arrive(int* count, int last) { return (int)atomicInc((unsigned*)count, (unsigned)last); }  // after `last` comes 0: the next launch finds it so

enum {
  HEAD_DIM = 96, VALUE_DIM = 96,
  THREADS = 128,       // of a block
  WORKERS = 2,         // that share a tile of query rows, each with its own leaves
  TEAM = 64,          // threads of a worker
  LANES = 8,           // threads that share query rows
  TEAM_ROWS = 8,
  ABREAST = 2,        // threads side by side that share keys and value columns
  ROWS = 2, KEYS = 2,  // of a thread: query rows, keys of a leaf
  BLOCK_M = 16, BLOCK_N = 16,
  STEP = 32,          // keys of one iteration of the loop: a leaf for each worker
  SPLITS = 4,
  STAGES = 1,          // slices of K or V that shared memory holds
  HEAD_COLUMNS = 96, VALUE_COLUMNS = 96,  // padded
  HEAD_SLICE = 32, VALUE_SLICE = 32,      // columns of a slice
  HEAD_SLICES = 3, VALUE_SLICES = 3,
  GROUPS = 1,          // vectors of value columns that a thread has of a slice
  COLUMNS = 12,         // value columns of a thread
  QUERY_STRIDE = 100, SLICE_STRIDE = 36, P_STRIDE = 20,  // values of a row in shared memory
  STAGE_SIZE = 576, P_SIZE = 320, STATE_FLOATS = 1792,
  SHARED_BYTES = 14336
};

// What memory holds (bf16) and what is computed with: float.
typedef unsigned short element;
DEVICE float float_from(element x) { return float_of((unsigned)x << 16); }
DEVICE element element_from(float x) {  // to nearest, ties to even; NaN stays NaN
  const unsigned b = bits_of(x);
  return (element)(x != x ? (b >> 16 | 64u) : (b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
DEVICE float no_key(void) { return float_of(0xff800000u); }  // the maximum over no keys: -infinity
DEVICE float exp2_of(float x) { return exp2_native(x); }

// What shared memory holds, 4 at once.
typedef float stored;
typedef float4 vec;
DEVICE vec load_vec(const SHARED stored* from) { return *(const SHARED vec*)from; }
DEVICE void store_vec(SHARED stored* to, vec x) { *(SHARED vec*)to = x; }
// A weight among others.
DEVICE stored stored_from(float weight) { return weight; }

// Where a row's column lies in shared memory: padded, so that lanes reading different rows meet different banks.
DEVICE int column_at(int row, int column) {
  (void)row;
  return column;
}
DEVICE int place(int row, int column, int stride) { return row * stride + column_at(row, column); }
// A vector of a row in memory as floats, zero from column `dim` on. `aligned`: every vector of every row is.
DEVICE vec fetch(const GLOBAL element* row, int column, int dim, int aligned) {
  vec x;
  if (aligned && column + 4 <= dim) {
    const uint2 pairs = *(const GLOBAL uint2*)(row + column);
    x.x = float_from((element)(pairs.x));
    x.y = float_from((element)(pairs.x >> 16));
    x.z = float_from((element)(pairs.y));
    x.w = float_from((element)(pairs.y >> 16));
  } else {
    x.x = column + 0 < dim ? float_from(row[column + 0]) : 0.0f;
    x.y = column + 1 < dim ? float_from(row[column + 1]) : 0.0f;
    x.z = column + 2 < dim ? float_from(row[column + 2]) : 0.0f;
    x.w = column + 3 < dim ? float_from(row[column + 3]) : 0.0f;
  }
  return x;
}

DEVICE vec zero_vec(void) {
  vec x;
  x.x = 0;
  x.y = 0;
  x.z = 0;
  x.w = 0;
  return x;
}

// Where a slice of K or V comes from: a head's rows.
typedef struct {
  const GLOBAL element* rows;
  index_t stride;
  int length, dim, aligned;
} Source;

// A slice on its way to shared memory, in registers: fetched before the slice before it is used, put down after.
enum { COPIES = 2 };
DEVICE void slice_fetch(vec* held, const Source from, int first_row, int first_column, const int columns, int t) {
  UNROLL for (int n = 0; n < COPIES; ++n) {
    const int i = t + n * TEAM, row = i / (columns / 4), column = i % (columns / 4) * 4;
    held[n] = zero_vec();
    if (row < BLOCK_N && first_row + row < from.length)
      held[n] = fetch(from.rows + (first_row + row) * from.stride, first_column + column, from.dim, from.aligned);
  }
}

DEVICE void slice_put(const vec* held, SHARED stored* to, const int columns, int t) {
  UNROLL for (int n = 0; n < COPIES; ++n) {
    const int i = t + n * TEAM, row = i / (columns / 4), column = i % (columns / 4) * 4;
    if (row < BLOCK_N) store_vec(to + place(row, column, SLICE_STRIDE), held[n]);
  }
}
// Threads side by side differ in their query row first, then in their lane: each address of a load of K and V, and of
// Q and the weights, is that of a pair of threads, and shared memory answers a load of 128 bits in half the time.
DEVICE int lane_of(int t) { return t / ABREAST % LANES; }
DEVICE int team_row_of(int t) { return t / (ABREAST * LANES) * ABREAST + t % ABREAST; }

// Query row r of a KV head is (position r / group, head r % group).
DEVICE index_t row_offset(int row, int group, int kv_head, index_t head_stride, index_t row_stride) {
  return (index_t)(kv_head * group + row % group) * head_stride + (index_t)(row / group) * row_stride;
}

// The tile's query rows, times the sign of the scale, into shared memory; rows past the end are zero.
DEVICE void load_query(SHARED stored* to, const GLOBAL element* query, index_t head_stride, index_t row_stride, int first, int rows, int group, int kv_head, float factor, int aligned, int t) {
  for (int i = t; i < BLOCK_M * (HEAD_COLUMNS / 4); i += THREADS) {
    const int row = i / (HEAD_COLUMNS / 4), column = i % (HEAD_COLUMNS / 4) * 4;
    vec x = zero_vec();
    if (first + row < rows) x = fetch(query + row_offset(first + row, group, kv_head, head_stride, row_stride), column, HEAD_DIM, aligned);
    x.x = x.x * factor;
    x.y = x.y * factor;
    x.z = x.z * factor;
    x.w = x.w * factor;
    store_vec(to + place(row, column, QUERY_STRIDE), x);
  }
}

// The largest of the values that the lanes of a row hold, for every row of the thread.
DEVICE void row_max(float* x, SHARED float* scratch, int t, int lane) {
  (void)scratch, (void)t, (void)lane;
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = larger(x[i], lane_xor(x[i], 8));
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = larger(x[i], lane_xor(x[i], 4));
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = larger(x[i], lane_xor(x[i], 2));
}

// Their sum.
DEVICE void row_sum(float* x, SHARED float* scratch, int t, int lane) {
  (void)scratch, (void)t, (void)lane;
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = x[i] + lane_xor(x[i], 8);
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = x[i] + lane_xor(x[i], 4);
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = x[i] + lane_xor(x[i], 2);
}

// The state of a thread's query rows over some set of keys, in base 2: m = max score c, rounded up, s = sum 2^(score
// c - m), and w = sum 2^(score c - m) v for the thread's value columns. While a worker folds, s is this lane's share
// of the sum. m is whole, so what scales a state when a larger score comes is a whole power of 2: nothing is rounded,
// however often.
typedef struct {
  float m[ROWS], s[ROWS], w[ROWS][COLUMNS];
} State;

DEVICE void set_identity(State* x) {
  UNROLL for (int i = 0; i < ROWS; ++i) {
    x->m[i] = no_key();
    x->s[i] = 0.0f;
    UNROLL for (int n = 0; n < COLUMNS; ++n) x->w[i][n] = 0.0f;
  }
}

// A maximum over no keys must not meet itself: -infinity - -infinity is NaN.
DEVICE float origin_of(float m) { return m == no_key() ? 0.0f : m; }

// 2^n for whole n up to 0, put together from its bits: exact whatever computes 2^x. Below -126, and for -infinity, 0.
DEVICE float power_of_2(float n) { return float_of(bits_of(larger(n, -127.0f) + 12583039.0f) << 23); }  // 1.5 * 2^23 + 127

// Keys up to its own position: the query at a position sees keys low <= key < high; both grow with the position, or stay.
DEVICE index_t least(index_t x, index_t y) { return x < y ? x : y; }
DEVICE index_t most(index_t x, index_t y) { return x > y ? x : y; }
DEVICE index_t floor_divide(index_t x, index_t n) { return (x - (x < 0 ? n - 1 : 0)) / n; }

typedef struct { int low, high; } Seen;

DEVICE Seen keys_seen(index_t position, index_t q_len, index_t kv_len) {
  Seen x;
  x.low = (int)most(0, least(0, kv_len));
  x.high = (int)most(0, least((position + 1), kv_len));
  (void)position, (void)q_len;
  return x;
}
// score[i][j] += Q row i . K row j over one slice of columns.
DEVICE void add_scores(float score[ROWS][KEYS], const SHARED stored* query, const SHARED stored* key, int first_column, int team_row, int lane) {
  const SHARED stored* const query_row = query + team_row * QUERY_STRIDE + first_column;
  const SHARED stored* const key_row = key + lane * SLICE_STRIDE;
  UNROLL_PARTLY for (int d = 0; d < HEAD_SLICE; d += 4) {
    vec q[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) q[i] = load_vec(query_row + i * (TEAM_ROWS * QUERY_STRIDE) + column_at(i * TEAM_ROWS + team_row, d));
    UNROLL for (int j = 0; j < KEYS; ++j) {
      const vec k = load_vec(key_row + j * (LANES * SLICE_STRIDE) + column_at(j * LANES + lane, d));
      UNROLL for (int i = 0; i < ROWS; ++i) score[i][j] = multiply_add(q[i].x, k.x, score[i][j]);
      UNROLL for (int i = 0; i < ROWS; ++i) score[i][j] = multiply_add(q[i].y, k.y, score[i][j]);
      UNROLL for (int i = 0; i < ROWS; ++i) score[i][j] = multiply_add(q[i].z, k.z, score[i][j]);
      UNROLL for (int i = 0; i < ROWS; ++i) score[i][j] = multiply_add(q[i].w, k.w, score[i][j]);
    }
  }
}

// Leave out keys from `high` on, and those that a row does not see.
DEVICE void apply_mask(float score[ROWS][KEYS], int first_key, int high, const Seen* rows, int lane) {
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int j = 0; j < KEYS; ++j) {
      const int key = first_key + j * LANES + lane;
      if (key >= high || key >= rows[i].high) score[i][j] = no_key();
    }
}

// The leaf's maximum and weights, which the lanes of a row share through shared memory; keep is what remains of the
// past.
DEVICE void weigh(float score[ROWS][KEYS], State* x, float* keep, SHARED stored* p, float c, int team_row, int lane, int t) {
  float top[ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    top[i] = score[i][0];
    UNROLL for (int j = 1; j < KEYS; ++j) top[i] = larger(top[i], score[i][j]);
  }
  row_max(top, (SHARED float*)p, t, lane);
  UNROLL for (int i = 0; i < ROWS; ++i) {
    const float m = larger(x->m[i], round_up(top[i] * c)), origin = origin_of(m);
    keep[i] = power_of_2(x->m[i] - origin);
    x->m[i] = m;
    float sum = 0.0f;
    UNROLL for (int j = 0; j < KEYS; ++j) {
      const float weight = exp2_of(multiply_add(score[i][j], c, -origin));
      sum += weight;
      p[place(i * TEAM_ROWS + team_row, j * LANES + lane, P_STRIDE)] = stored_from(weight);
    }
    x->s[i] = multiply_add(x->s[i], keep[i], sum);
  }
}

// w = w keep + P V for one slice of the value columns.
DEVICE void add_values(State* x, const float* keep, const SHARED stored* p, const SHARED stored* value, const int first, int team_row, int lane) {
  float sum[ROWS][GROUPS * 4];
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int n = 0; n < GROUPS * 4; ++n) sum[i][n] = 0.0f;
  const SHARED stored* const p_row = p + team_row * P_STRIDE;
  const SHARED stored* value_row = value + lane * 4;
  UNROLL_PARTLY for (int n = 0; n < BLOCK_N; n += 4, value_row += 4 * SLICE_STRIDE) {
    vec a[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) a[i] = load_vec(p_row + i * (TEAM_ROWS * P_STRIDE) + column_at(i * TEAM_ROWS + team_row, n));
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 0 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        sum[i][g * 4 + 0] = multiply_add(a[i].x, v.x, sum[i][g * 4 + 0]);
        sum[i][g * 4 + 1] = multiply_add(a[i].x, v.y, sum[i][g * 4 + 1]);
        sum[i][g * 4 + 2] = multiply_add(a[i].x, v.z, sum[i][g * 4 + 2]);
        sum[i][g * 4 + 3] = multiply_add(a[i].x, v.w, sum[i][g * 4 + 3]);
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 1 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        sum[i][g * 4 + 0] = multiply_add(a[i].y, v.x, sum[i][g * 4 + 0]);
        sum[i][g * 4 + 1] = multiply_add(a[i].y, v.y, sum[i][g * 4 + 1]);
        sum[i][g * 4 + 2] = multiply_add(a[i].y, v.z, sum[i][g * 4 + 2]);
        sum[i][g * 4 + 3] = multiply_add(a[i].y, v.w, sum[i][g * 4 + 3]);
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 2 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        sum[i][g * 4 + 0] = multiply_add(a[i].z, v.x, sum[i][g * 4 + 0]);
        sum[i][g * 4 + 1] = multiply_add(a[i].z, v.y, sum[i][g * 4 + 1]);
        sum[i][g * 4 + 2] = multiply_add(a[i].z, v.z, sum[i][g * 4 + 2]);
        sum[i][g * 4 + 3] = multiply_add(a[i].z, v.w, sum[i][g * 4 + 3]);
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 3 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        sum[i][g * 4 + 0] = multiply_add(a[i].w, v.x, sum[i][g * 4 + 0]);
        sum[i][g * 4 + 1] = multiply_add(a[i].w, v.y, sum[i][g * 4 + 1]);
        sum[i][g * 4 + 2] = multiply_add(a[i].w, v.z, sum[i][g * 4 + 2]);
        sum[i][g * 4 + 3] = multiply_add(a[i].w, v.w, sum[i][g * 4 + 3]);
      }
    }
  }
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int n = 0; n < GROUPS * 4; ++n) x->w[i][first + n] = multiply_add(x->w[i][first + n], keep[i], sum[i][n]);
}
// States of workers meet in shared memory: put down by one, merged in by another.
DEVICE void put_state(SHARED float* to, const State* x, int t) {
  UNROLL for (int i = 0; i < ROWS; ++i) {
    to[(i * (COLUMNS + 2)) * TEAM + t] = x->m[i];
    to[(i * (COLUMNS + 2) + 1) * TEAM + t] = x->s[i];
    UNROLL for (int n = 0; n < COLUMNS; ++n) to[(i * (COLUMNS + 2) + 2 + n) * TEAM + t] = x->w[i][n];
  }
}

// b := a merged with b, the associative operation of the scan.
DEVICE void merge_state(const SHARED float* a, State* b, int t) {
  UNROLL for (int i = 0; i < ROWS; ++i) {
    const float am = a[(i * (COLUMNS + 2)) * TEAM + t], m = larger(am, b->m[i]);
    const float keep_a = power_of_2(am - origin_of(m)), keep_b = power_of_2(b->m[i] - origin_of(m));
    b->m[i] = m;
    b->s[i] = keep_a * a[(i * (COLUMNS + 2) + 1) * TEAM + t] + keep_b * b->s[i];
    UNROLL for (int n = 0; n < COLUMNS; ++n) b->w[i][n] = keep_a * a[(i * (COLUMNS + 2) + 2 + n) * TEAM + t] + keep_b * b->w[i][n];
  }
}

// The total of all workers' states, left in the last worker.
DEVICE void merge_workers(SHARED float* slots, State* x, int worker, int t) {
  // hillis_steele, round 1: 1 merge, reaching back 1
  barrier_block();
  if (1u >> worker & 1u) put_state(slots + worker * STATE_FLOATS, x, t);
  barrier_block();
  if (2u >> worker & 1u) merge_state(slots + (worker - 1) * STATE_FLOATS, x, t);
}
// Merge the states that splits left in memory, by rounds: an up-sweep of pairs; the total needs no down-sweep. One query row and value column.
DEVICE void finish_value(const GLOBAL float* partial, GLOBAL element* output, GLOBAL float* lse, index_t size, index_t state_row, index_t output_row, index_t lse_row, int column) {
  float m0 = partial[0 * size + state_row], s0 = partial[(4 + 0) * size + state_row], w0 = partial[8 * size + (0 * size + state_row) * VALUE_DIM + column];
  float m1 = partial[1 * size + state_row], s1 = partial[(4 + 1) * size + state_row], w1 = partial[8 * size + (1 * size + state_row) * VALUE_DIM + column];
  float m2 = partial[2 * size + state_row], s2 = partial[(4 + 2) * size + state_row], w2 = partial[8 * size + (2 * size + state_row) * VALUE_DIM + column];
  float m3 = partial[3 * size + state_row], s3 = partial[(4 + 3) * size + state_row], w3 = partial[8 * size + (3 * size + state_row) * VALUE_DIM + column];
  // blelloch, round 1: 2 merges, reaching back 1
  {
    const float m = larger(m2, m3), keep_a = power_of_2(m2 - origin_of(m)), keep_b = power_of_2(m3 - origin_of(m));
    m3 = m;
    s3 = keep_a * s2 + keep_b * s3;
    w3 = keep_a * w2 + keep_b * w3;
  }
  {
    const float m = larger(m0, m1), keep_a = power_of_2(m0 - origin_of(m)), keep_b = power_of_2(m1 - origin_of(m));
    m1 = m;
    s1 = keep_a * s0 + keep_b * s1;
    w1 = keep_a * w0 + keep_b * w1;
  }
  // blelloch, round 2: 1 merge, reaching back 2
  {
    const float m = larger(m1, m3), keep_a = power_of_2(m1 - origin_of(m)), keep_b = power_of_2(m3 - origin_of(m));
    m3 = m;
    s3 = keep_a * s1 + keep_b * s3;
    w3 = keep_a * w1 + keep_b * w3;
  }
  output[output_row + column] = element_from(w3 / (s3 == 0.0f ? 1.0f : s3));
  if (lse && column == 0) lse[lse_row] = (m3 + log2_library(s3)) * 0.6931471805599453f;
}

// Fold the keys low <= key < high of a head into x: slices of K, then of V, pass through shared memory, the next ones
// on their way while one is used. From key `whole` on leaves need the mask.
DEVICE void fold(State* x, const SHARED stored* query, SHARED stored* stages, SHARED stored* p, const Source keys, const Source values, int low, int whole, int high, const Seen* rows, float c, int worker, int t) {
  const int lane = lane_of(t), team_row = team_row_of(t);
  float score[ROWS][KEYS], keep[ROWS];
  int slot = 0;
  vec held[COPIES];
  if (low < high) {
    slice_fetch(held, keys, low + worker * BLOCK_N, 0, HEAD_SLICE, t);
    slice_put(held, stages, HEAD_SLICE, t);
  }
  for (int start = low; start < high; start += STEP) {
    const int first_key = start + worker * BLOCK_N;

    // K, columns from 0
    barrier_block();
    slice_fetch(held, keys, first_key, 32, HEAD_SLICE, t);
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int j = 0; j < KEYS; ++j) score[i][j] = 0.0f;
    add_scores(score, query, stages + slot * STAGE_SIZE, 0, team_row, lane);
    barrier_block();
    slice_put(held, stages + slot * STAGE_SIZE, HEAD_SLICE, t);

    // K, columns from 32
    barrier_block();
    slice_fetch(held, keys, first_key, 64, HEAD_SLICE, t);
    add_scores(score, query, stages + slot * STAGE_SIZE, 32, team_row, lane);
    barrier_block();
    slice_put(held, stages + slot * STAGE_SIZE, HEAD_SLICE, t);

    // K, columns from 64
    barrier_block();
    slice_fetch(held, values, first_key, 0, VALUE_SLICE, t);
    add_scores(score, query, stages + slot * STAGE_SIZE, 64, team_row, lane);
    if (start >= whole) apply_mask(score, first_key, high, rows, lane);
    weigh(score, x, keep, p, c, team_row, lane, t);
    barrier_block();
    slice_put(held, stages + slot * STAGE_SIZE, VALUE_SLICE, t);

    // V, columns from 0
    barrier_block();
    slice_fetch(held, values, first_key, 32, VALUE_SLICE, t);
    add_values(x, keep, p, stages + slot * STAGE_SIZE, 0, team_row, lane);
    barrier_block();
    slice_put(held, stages + slot * STAGE_SIZE, VALUE_SLICE, t);

    // V, columns from 32
    barrier_block();
    slice_fetch(held, values, first_key, 64, VALUE_SLICE, t);
    add_values(x, keep, p, stages + slot * STAGE_SIZE, 4, team_row, lane);
    barrier_block();
    slice_put(held, stages + slot * STAGE_SIZE, VALUE_SLICE, t);

    // V, columns from 64
    barrier_block();
    if (start + STEP < high) slice_fetch(held, keys, first_key + STEP, 0, HEAD_SLICE, t);
    add_values(x, keep, p, stages + slot * STAGE_SIZE, 8, team_row, lane);
    barrier_block();
    if (start + STEP < high) slice_put(held, stages + slot * STAGE_SIZE, HEAD_SLICE, t);
  }
  row_sum(x->s, (SHARED float*)p, t, lane);
}
// One block for each tile of query rows and split of its keys; the order is tiles.
KERNEL(THREADS, 1) attend(const GLOBAL element* query, const GLOBAL element* key, const GLOBAL element* value, GLOBAL element* output, GLOBAL float* lse, GLOBAL float* partial, GLOBAL int* arrivals, float c, float sign,
    index_t stride_qb, index_t stride_qh, index_t stride_qm, index_t stride_kb, index_t stride_kh, index_t stride_kn,
    index_t stride_vb, index_t stride_vh, index_t stride_vn, index_t stride_ob, index_t stride_oh, index_t stride_om,
    int kv_heads, int group, int q_len, int kv_len, int first_pair, int slots, int aligned_query, int aligned_key, int aligned_value) {
  SHARED_MEMORY;
  SHARED stored* const shared = (SHARED stored*)memory;
  SHARED stored* const stages = shared + BLOCK_M * QUERY_STRIDE;
  const int rows = group * q_len, tiles = (rows + BLOCK_M - 1) / BLOCK_M, index = block_index();
  const int split = index % SPLITS, tile = index / SPLITS % tiles, slot = index / SPLITS / tiles;
  const int pair = first_pair + slot, batch = pair / kv_heads, kv_head = pair % kv_heads, first = tile * BLOCK_M;
  const int thread = thread_index(), worker = thread / TEAM, t = thread % TEAM, lane = lane_of(t), team_row = team_row_of(t);

  const int last_row = first + BLOCK_M < rows ? first + BLOCK_M - 1 : rows - 1;
  const Seen by_first = keys_seen(first / group, q_len, kv_len), by_last = keys_seen(last_row / group, q_len, kv_len);
  const int seen = by_last.high;      // keys that some row sees
  const int unmasked = by_first.high;  // that every row sees
  const int each = ((seen + BLOCK_N - 1) / BLOCK_N + SPLITS - 1) / SPLITS * BLOCK_N;
  const int low = split * each < seen ? split * each : seen, high = low + each < seen ? low + each : seen;
  const int common = high < unmasked ? high : unmasked, whole = low + (common > low ? (common - low) / STEP * STEP : 0);

  Source keys, values;
  keys.rows = key + batch * stride_kb + kv_head * stride_kh;
  keys.stride = stride_kn;
  keys.length = kv_len;
  keys.dim = HEAD_DIM;
  keys.aligned = aligned_key;
  values.rows = value + batch * stride_vb + kv_head * stride_vh;
  values.stride = stride_vn;
  values.length = kv_len;
  values.dim = VALUE_DIM;
  values.aligned = aligned_value;
  Seen by_row[ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) by_row[i] = keys_seen((first + i * TEAM_ROWS + team_row) / group, q_len, kv_len);

  load_query(shared, query + batch * stride_qb, stride_qh, stride_qm, first, rows, group, kv_head, sign, aligned_query, thread);
  State x;
  set_identity(&x);
  fold(&x, shared, stages + worker * (STAGES * STAGE_SIZE), stages + WORKERS * (STAGES * STAGE_SIZE) + worker * P_SIZE, keys, values, low, whole, high, by_row, c, worker, t);
  merge_workers((SHARED float*)shared, &x, worker, t);

  UNROLL for (int i = 0; i < ROWS; ++i) {
    const int row = first + i * TEAM_ROWS + team_row;
    if (worker == WORKERS - 1 && row < rows) {
      const index_t size = (index_t)slots * rows, state_row = (index_t)slot * rows + row;
      if (lane == 0) {
        partial[split * size + state_row] = x.m[i];
        partial[(SPLITS + split) * size + state_row] = x.s[i];
      }
      GLOBAL float* const to = partial + 2 * SPLITS * size + (split * size + state_row) * VALUE_DIM;
      UNROLL for (int n = 0; n < COLUMNS; ++n) {
        const int g = n / 4 % GROUPS, column = n / (GROUPS * 4) * VALUE_SLICE + (g * LANES + lane) * 4 + n % 4;
        if (column < VALUE_DIM) to[column] = x.w[i][n];
      }
    }
  }

  fence();  // what this block stored is seen before its arrival is
  barrier_block();
  SHARED int* const last = (SHARED int*)shared;
  if (thread == 0) *last = arrive(arrivals + (index_t)slot * tiles + tile, SPLITS - 1) == SPLITS - 1;
  barrier_block();
  if (*last) {
    fence();
    for (int i = thread; i < BLOCK_M * VALUE_DIM; i += THREADS) {
      const int row = first + i / VALUE_DIM;
      if (row < rows) finish_value(partial, output, lse, (index_t)slots * rows, (index_t)slot * rows + row, batch * stride_ob + row_offset(row, group, kv_head, stride_oh, stride_om), ((index_t)batch * kv_heads * group + kv_head * group + row % group) * q_len + row / group, i % VALUE_DIM);
    }
  }
}

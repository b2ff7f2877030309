// elsa-tune: cuda.serial.t128.x8.r6.k6.stages2.async for fp32.d64
// Regenerate this text: elsa-tune show cuda.serial.t128.x8.r6.k6.stages2.async fp32.d64
//
// Exact softmax attention as a scan over states (m, S, W): one state, folded left to right.
//   leaf   48 keys x 96 query rows -> scores, exp2, one state; 6 x 6 scores in the registers of a thread
//   fold   a worker folds its leaves, state in registers
//   block  1 worker state of one block
//   grid   1 split of the key axis
// A query row is one (position, head of the group) pair of a KV head, position-major, so all query heads that share K
// and V read them together. Multiply-adds alone: no matrix unit. C++14 and OpenCL C 1.2 read the text below the
// dialect.
// CUDA: nvcc 10.2 and later, NVRTC.
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
DEVICE float lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float round_up(float x) { return ceilf(x); }
DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }

DEVICE float exp2_library(float x) { return exp2f(x); }
DEVICE float log2_library(float x) { return log2f(x); }

#ifndef ELSA_EMULATED
// Bytes beyond `valid` become zero.
DEVICE void copy_async(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(valid) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
#endif

enum {
  HEAD_DIM = 64, VALUE_DIM = 64,
  THREADS = 128,       // of a block
  WORKERS = 1,         // that share a tile of query rows, each with its own leaves
  TEAM = 128,          // threads of a worker
  LANES = 8,           // threads that share query rows
  TEAM_ROWS = 16,
  ABREAST = 2,        // threads side by side that share keys and value columns
  ROWS = 6, KEYS = 6,  // of a thread: query rows, keys of a leaf
  BLOCK_M = 96, BLOCK_N = 48,
  STEP = 48,          // keys of one iteration of the loop: a leaf for each worker
  SPLITS = 1,
  STAGES = 2,          // slices of K or V that shared memory holds
  HEAD_COLUMNS = 64, VALUE_COLUMNS = 64,  // padded
  HEAD_SLICE = 64, VALUE_SLICE = 64,      // columns of a slice
  HEAD_SLICES = 1, VALUE_SLICES = 1,
  GROUPS = 2,          // vectors of value columns that a thread has of a slice
  COLUMNS = 8,         // value columns of a thread
  QUERY_STRIDE = 68, SLICE_STRIDE = 68, P_STRIDE = 52,  // values of a row in shared memory
  STAGE_SIZE = 3264, P_SIZE = 4992, STATE_FLOATS = 7680,
  SHARED_BYTES = 72192
};

// What memory holds (fp32) and what is computed with: float.
typedef float element;
DEVICE float float_from(element x) { return x; }
DEVICE element element_from(float x) { return x; }
DEVICE float no_key(void) { return float_of(0xff800000u); }  // the maximum over no keys: -infinity
DEVICE float exp2_of(float x) { return exp2_library(x); }

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
    x = *(const GLOBAL vec*)(row + column);
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

// A slice on its way to shared memory, past the registers.
DEVICE void slice_copy(SHARED stored* to, const Source from, int first_row, int first_column, const int columns, int t) {
  for (int i = t; i < BLOCK_N * (columns / 4); i += TEAM) {
    const int row = i / (columns / 4), column = i % (columns / 4) * 4;
    const int inside = first_row + row < from.length, left = from.dim - first_column - column;
    const GLOBAL element* const origin = from.rows + (inside ? (first_row + row) * from.stride : 0);
    SHARED stored* const place_of = to + place(row, column, SLICE_STRIDE);
    if (from.aligned)
      copy_async(place_of, origin + (left > 0 ? first_column + column : 0), !inside || left < 0 ? 0 : left < 4 ? 4 * left : 16);
    else
      store_vec(place_of, inside ? fetch(origin, first_column + column, from.dim, 0) : zero_vec());
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

// Leave out keys from `high` on.
DEVICE void apply_mask(float score[ROWS][KEYS], int first_key, int high, int lane) {
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int j = 0; j < KEYS; ++j) {
      const int key = first_key + j * LANES + lane;
      if (key >= high) score[i][j] = no_key();
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
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int n = 0; n < GROUPS * 4; ++n) x->w[i][first + n] *= keep[i];
  const SHARED stored* const p_row = p + team_row * P_STRIDE;
  const SHARED stored* value_row = value + lane * 4;
  UNROLL_PARTLY for (int n = 0; n < BLOCK_N; n += 4, value_row += 4 * SLICE_STRIDE) {
    vec a[ROWS];
    UNROLL for (int i = 0; i < ROWS; ++i) a[i] = load_vec(p_row + i * (TEAM_ROWS * P_STRIDE) + column_at(i * TEAM_ROWS + team_row, n));
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 0 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        x->w[i][first + g * 4 + 0] = multiply_add(a[i].x, v.x, x->w[i][first + g * 4 + 0]);
        x->w[i][first + g * 4 + 1] = multiply_add(a[i].x, v.y, x->w[i][first + g * 4 + 1]);
        x->w[i][first + g * 4 + 2] = multiply_add(a[i].x, v.z, x->w[i][first + g * 4 + 2]);
        x->w[i][first + g * 4 + 3] = multiply_add(a[i].x, v.w, x->w[i][first + g * 4 + 3]);
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 1 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        x->w[i][first + g * 4 + 0] = multiply_add(a[i].y, v.x, x->w[i][first + g * 4 + 0]);
        x->w[i][first + g * 4 + 1] = multiply_add(a[i].y, v.y, x->w[i][first + g * 4 + 1]);
        x->w[i][first + g * 4 + 2] = multiply_add(a[i].y, v.z, x->w[i][first + g * 4 + 2]);
        x->w[i][first + g * 4 + 3] = multiply_add(a[i].y, v.w, x->w[i][first + g * 4 + 3]);
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 2 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        x->w[i][first + g * 4 + 0] = multiply_add(a[i].z, v.x, x->w[i][first + g * 4 + 0]);
        x->w[i][first + g * 4 + 1] = multiply_add(a[i].z, v.y, x->w[i][first + g * 4 + 1]);
        x->w[i][first + g * 4 + 2] = multiply_add(a[i].z, v.z, x->w[i][first + g * 4 + 2]);
        x->w[i][first + g * 4 + 3] = multiply_add(a[i].z, v.w, x->w[i][first + g * 4 + 3]);
      }
    }
    UNROLL for (int g = 0; g < GROUPS; ++g) {
      const vec v = load_vec(value_row + 3 * SLICE_STRIDE + g * (LANES * 4));
      UNROLL for (int i = 0; i < ROWS; ++i) {
        x->w[i][first + g * 4 + 0] = multiply_add(a[i].w, v.x, x->w[i][first + g * 4 + 0]);
        x->w[i][first + g * 4 + 1] = multiply_add(a[i].w, v.y, x->w[i][first + g * 4 + 1]);
        x->w[i][first + g * 4 + 2] = multiply_add(a[i].w, v.z, x->w[i][first + g * 4 + 2]);
        x->w[i][first + g * 4 + 3] = multiply_add(a[i].w, v.w, x->w[i][first + g * 4 + 3]);
      }
    }
  }
}
// Fold the keys low <= key < high of a head into x: slices of K, then of V, pass through shared memory, the next ones
// on their way while one is used. From key `whole` on leaves need the mask.
DEVICE void fold(State* x, const SHARED stored* query, SHARED stored* stages, SHARED stored* p, const Source keys, const Source values, int low, int whole, int high, float c, int worker, int t) {
  const int lane = lane_of(t), team_row = team_row_of(t);
  float score[ROWS][KEYS], keep[ROWS];
  int slot = 0;
  if (low + 0 * STEP < high) slice_copy(stages + 0 * STAGE_SIZE, keys, low + 0 * STEP + worker * BLOCK_N, 0, HEAD_SLICE, t);
  copy_commit();
  for (int start = low; start < high; start += STEP) {
    const int first_key = start + worker * BLOCK_N;

    // K, columns from 0
    copy_wait();
    barrier_block();
    slice_copy(stages + (slot + 1) % STAGES * STAGE_SIZE, values, first_key, 0, VALUE_SLICE, t);
    copy_commit();
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int j = 0; j < KEYS; ++j) score[i][j] = 0.0f;
    add_scores(score, query, stages + slot * STAGE_SIZE, 0, team_row, lane);
    if (start >= whole) apply_mask(score, first_key, high, lane);
    weigh(score, x, keep, p, c, team_row, lane, t);
    slot = slot + 1 == STAGES ? 0 : slot + 1;

    // V, columns from 0
    copy_wait();
    barrier_block();
    if (start + 1 * STEP < high) slice_copy(stages + (slot + 1) % STAGES * STAGE_SIZE, keys, first_key + 1 * STEP, 0, HEAD_SLICE, t);
    copy_commit();
    add_values(x, keep, p, stages + slot * STAGE_SIZE, 0, team_row, lane);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
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

  const int seen = kv_len, unmasked = kv_len;
  const int low = 0, high = seen;
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

  load_query(shared, query + batch * stride_qb, stride_qh, stride_qm, first, rows, group, kv_head, sign, aligned_query, thread);
  State x;
  set_identity(&x);
  fold(&x, shared, stages + worker * (STAGES * STAGE_SIZE), stages + WORKERS * (STAGES * STAGE_SIZE) + worker * P_SIZE, keys, values, low, whole, high, c, worker, t);

  UNROLL for (int i = 0; i < ROWS; ++i) {
    const int row = first + i * TEAM_ROWS + team_row;
    if (worker == WORKERS - 1 && row < rows) {
      const float divisor = x.s[i] == 0.0f ? 1.0f : x.s[i];
      if (lse && lane == 0) lse[((index_t)batch * kv_heads * group + kv_head * group + row % group) * q_len + row / group] = (x.m[i] + log2_library(x.s[i])) * 0.6931471805599453f;
      GLOBAL element* const to = output + batch * stride_ob + row_offset(row, group, kv_head, stride_oh, stride_om);
      UNROLL for (int n = 0; n < COLUMNS; ++n) {
        const int g = n / 4 % GROUPS, column = n / (GROUPS * 4) * VALUE_SLICE + (g * LANES + lane) * 4 + n % 4;
        if (column < VALUE_DIM) to[column] = element_from(x.w[i][n] / divisor);
      }
    }
  }
  (void)partial, (void)arrivals, (void)slots, (void)split, (void)tiles;
}

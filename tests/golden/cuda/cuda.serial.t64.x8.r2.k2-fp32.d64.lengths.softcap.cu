// elsa-tune: cuda.serial.t64.x8.r2.k2 for fp32.d64.lengths.softcap
// Regenerate this text: elsa-tune show cuda.serial.t64.x8.r2.k2 fp32.d64.lengths.softcap
//
// Exact softmax attention as a scan over states (m, S, W): one state, folded left to right.
//   leaf   16 keys x 16 query rows -> scores, exp2, one state; 2 x 2 scores in the registers of a thread
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

enum {
  HEAD_DIM = 64, VALUE_DIM = 64,
  THREADS = 64,       // of a block
  WORKERS = 1,         // that share a tile of query rows, each with its own leaves
  TEAM = 64,          // threads of a worker
  LANES = 8,           // threads that share query rows
  TEAM_ROWS = 8,
  ABREAST = 2,        // threads side by side that share keys and value columns
  ROWS = 2, KEYS = 2,  // of a thread: query rows, keys of a leaf
  BLOCK_M = 16, BLOCK_N = 16,
  STEP = 16,          // keys of one iteration of the loop: a leaf for each worker
  SPLITS = 1,
  STAGES = 1,          // slices of K or V that shared memory holds
  HEAD_COLUMNS = 64, VALUE_COLUMNS = 64,  // padded
  HEAD_SLICE = 64, VALUE_SLICE = 64,      // columns of a slice
  HEAD_SLICES = 1, VALUE_SLICES = 1,
  GROUPS = 2,          // vectors of value columns that a thread has of a slice
  COLUMNS = 8,         // value columns of a thread
  QUERY_STRIDE = 68, SLICE_STRIDE = 68, P_STRIDE = 20,  // values of a row in shared memory
  STAGE_SIZE = 1088, P_SIZE = 320, STATE_FLOATS = 1280,
  SHARED_BYTES = 9984
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

// A slice on its way to shared memory, in registers: fetched before the slice before it is used, put down after.
enum { COPIES = 4 };
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

// The first `lengths` keys of its own sequence: the query at a position sees keys low <= key < high; both grow with the position, or stay.
DEVICE index_t least(index_t x, index_t y) { return x < y ? x : y; }
DEVICE index_t most(index_t x, index_t y) { return x > y ? x : y; }
DEVICE index_t floor_divide(index_t x, index_t n) { return (x - (x < 0 ? n - 1 : 0)) / n; }

typedef struct { int low, high; } Seen;

DEVICE Seen keys_seen(index_t position, index_t q_len, index_t kv_len, index_t lengths) {
  Seen x;
  x.low = (int)most(0, least(0, kv_len));
  x.high = (int)most(0, least(lengths, kv_len));
  (void)position, (void)q_len;
  return x;
}
// `softcap` tanh(score / `softcap`), with tanh(y) = y P(y^2) / Q(y^2): elsa_tune/parts/tanh.py. NaN stays NaN.
DEVICE float softcap_score(float score, float softcap) {
  float y = score * (1.0f / softcap);
  y = y > 9.0f ? 9.0f : y;
  y = y < -9.0f ? -9.0f : y;
  const float z = y * y;
  float over = 1.33538274e-08f;
  over = multiply_add(over, z, 2.06085206e-05f);
  over = multiply_add(over, z, 0.00349555607f);
  over = multiply_add(over, z, 0.133809999f);
  over = multiply_add(over, z, 1.0f);
  float under = 7.77622802e-07f;
  under = multiply_add(under, z, 0.00032855809f);
  under = multiply_add(under, z, 0.0258768629f);
  under = multiply_add(under, z, 0.467143148f);
  under = multiply_add(under, z, 1.0f);
  return y * over / under * softcap;
}

// What they ask for.
typedef struct {
  float factor;  // makes scores of products
  const GLOBAL index_t* lengths_data;
  index_t lengths_batch;
  float softcap;
} Scores;

// Products become `softcap` tanh(score / `softcap`).
DEVICE void apply_scores(float score[ROWS][KEYS], const Scores* from, int first_key, int lane) {
  UNROLL for (int i = 0; i < ROWS; ++i)
    UNROLL for (int j = 0; j < KEYS; ++j) {
      float x = score[i][j] * from->factor;
      x = softcap_score(x, from->softcap);
      score[i][j] = x;
    }
  (void)first_key, (void)lane;
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
DEVICE void fold(State* x, const SHARED stored* query, SHARED stored* stages, SHARED stored* p, const Source keys, const Source values, int low, int whole, int high, const Seen* rows, const Scores* scores, float c, int worker, int t) {
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
    slice_fetch(held, values, first_key, 0, VALUE_SLICE, t);
    UNROLL for (int i = 0; i < ROWS; ++i)
      UNROLL for (int j = 0; j < KEYS; ++j) score[i][j] = 0.0f;
    add_scores(score, query, stages + slot * STAGE_SIZE, 0, team_row, lane);
    apply_scores(score, scores, first_key, lane);
    if (start >= whole) apply_mask(score, first_key, high, rows, lane);
    weigh(score, x, keep, p, c, team_row, lane, t);
    barrier_block();
    slice_put(held, stages + slot * STAGE_SIZE, VALUE_SLICE, t);

    // V, columns from 0
    barrier_block();
    if (start + STEP < high) slice_fetch(held, keys, first_key + STEP, 0, HEAD_SLICE, t);
    add_values(x, keep, p, stages + slot * STAGE_SIZE, 0, team_row, lane);
    barrier_block();
    if (start + STEP < high) slice_put(held, stages + slot * STAGE_SIZE, HEAD_SLICE, t);
  }
  row_sum(x->s, (SHARED float*)p, t, lane);
}
// One block for each tile of query rows and split of its keys; the order is tiles.
KERNEL(THREADS, 1) attend(const GLOBAL element* query, const GLOBAL element* key, const GLOBAL element* value, GLOBAL element* output, GLOBAL float* lse, GLOBAL float* partial, GLOBAL int* arrivals, float c, float sign,
    index_t stride_qb, index_t stride_qh, index_t stride_qm, index_t stride_kb, index_t stride_kh, index_t stride_kn,
    index_t stride_vb, index_t stride_vh, index_t stride_vn, index_t stride_ob, index_t stride_oh, index_t stride_om,
    int kv_heads, int group, int q_len, int kv_len, int first_pair, int slots, int aligned_query, int aligned_key, int aligned_value, const GLOBAL index_t* lengths_data, index_t lengths_batch, float softcap) {
  SHARED_MEMORY;
  SHARED stored* const shared = (SHARED stored*)memory;
  SHARED stored* const stages = shared + BLOCK_M * QUERY_STRIDE;
  const int rows = group * q_len, tiles = (rows + BLOCK_M - 1) / BLOCK_M, index = block_index();
  const int split = index % SPLITS, tile = index / SPLITS % tiles, slot = index / SPLITS / tiles;
  const int pair = first_pair + slot, batch = pair / kv_heads, kv_head = pair % kv_heads, first = tile * BLOCK_M;
  const int thread = thread_index(), worker = thread / TEAM, t = thread % TEAM, lane = lane_of(t), team_row = team_row_of(t);

  const index_t lengths = lengths_data[batch * lengths_batch];
  const int last_row = first + BLOCK_M < rows ? first + BLOCK_M - 1 : rows - 1;
  const Seen by_first = keys_seen(first / group, q_len, kv_len, lengths), by_last = keys_seen(last_row / group, q_len, kv_len, lengths);
  const int seen = by_last.high;      // keys that some row sees
  const int unmasked = by_first.high;  // that every row sees
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
  Seen by_row[ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) by_row[i] = keys_seen((first + i * TEAM_ROWS + team_row) / group, q_len, kv_len, lengths);

  Scores scores;
  scores.factor = c;
  scores.lengths_data = lengths_data;
  scores.lengths_batch = lengths_batch;
  scores.softcap = softcap;
  load_query(shared, query + batch * stride_qb, stride_qh, stride_qm, first, rows, group, kv_head, sign, aligned_query, thread);
  State x;
  set_identity(&x);
  fold(&x, shared, stages + worker * (STAGES * STAGE_SIZE), stages + WORKERS * (STAGES * STAGE_SIZE) + worker * P_SIZE, keys, values, low, whole, high, by_row, &scores, 1.4426950408889634f, worker, t);

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

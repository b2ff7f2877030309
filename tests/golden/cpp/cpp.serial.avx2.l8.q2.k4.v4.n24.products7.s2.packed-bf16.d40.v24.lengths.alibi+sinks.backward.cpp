// elsa-tune: cpp.serial.avx2.l8.q2.k4.v4.n24.products7.s2.packed for bf16.d40.v24.lengths.alibi+sinks.backward
// Compiled for avx2. Regenerate this text: elsa-tune show cpp.serial.avx2.l8.q2.k4.v4.n24.products7.s2.packed bf16.d40.v24.lengths.alibi+sinks.backward
//
// Gradients of exact softmax attention from its output and log-sum-exp L alone:
//   P = exp(S - L)   D = rowsum(dO * O) - dL   dS = P * (dO V^T - D)
//   dV = P^T dO      dQ = scale dS K           dK = scale dS^T Q
// dQ is folded over keys by tiles of 16 query rows, and dK and dV over query rows by 2 parts of the keys, of 24 at a
// time: seven products.
// Nothing is added atomically: the same inputs give the same bits, whatever the number of threads.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

constexpr int HEAD_DIM = 40;
constexpr int VALUE_DIM = 24;
constexpr int LANES = 8;             // floats in a vector, query rows too
constexpr int CHUNK = 1, ROWS = LANES;
constexpr int QUERY_VECTORS = 2;
constexpr int KEY_TILE = 4;         // keys in registers while products with keys and values are formed
constexpr int VALUE_TILE = 4;       // columns in registers while dQ is
constexpr int GRAD_TILE = 6;        // keys in registers while dK and dV are
constexpr int QUERY_COLUMNS = 2, VALUE_COLUMNS = 2;  // and their vectors of columns
constexpr int BLOCK_N = 24;
constexpr int SPLITS = 2;
constexpr int PREFETCH = 0;        // keys
constexpr int64_t SCRATCH_BYTES = 67108864;  // at most this much memory for sums of splits

// What the caller passes: 8-byte slots, packed by elsa_tune/generate/cpp in this order.
// Shapes are [batch, heads, length, dim]; strides are in elements; the last stride is 1.
using Launch = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Strides { int64_t batch, head, row; };

struct Call {
  const uint16_t* query;
  const uint16_t* key;
  const uint16_t* value;
  const uint16_t* output;
  const float* lse;       // [batch, heads, q_len]: log of each row's sum of exponentials
  const uint16_t* grad;     // of the output
  const float* grad_lse;  // of the log-sum-exp; null where that is no result
  uint16_t* grad_query;     // each of these three is null where nobody asks
  uint16_t* grad_key;
  uint16_t* grad_value;
  int64_t batch, heads, kv_heads, q_len, kv_len;
  Strides q, k, v, o, g, dq, dk, dv;
  double scale;
  int64_t threads;
  Launch launch;  // the OpenMP runtime's GOMP_parallel; null runs on the calling thread
  const int64_t* lengths_data;
  int64_t lengths_batch;
  const float* slopes_data;
  int64_t slopes_batch;
  int64_t slopes_heads;
  const float* sinks_data;
  int64_t sinks_heads;
  float* grad_slopes;  // [batch, heads, q_len], what each row adds to the gradient; null where nobody asks
  float* grad_sinks;  // [batch, heads, q_len], what each row adds to the gradient; null where nobody asks
};
// Vectors by compiler extension: the same text is AVX-512, AVX2, NEON or plain code.
typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), may_alias));
typedef float loose_vec __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));

INLINE vec splat(float x) { return x - vec{}; }
INLINE vec max(vec a, vec b) { return a > b ? a : b; }
INLINE vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<loose_vec*>(p) = x; }

constexpr float INF = __builtin_inff();

// One value for every query row.
INLINE vec spread(const float* p) { return splat(*p); }
INLINE vec sum_chunk(vec x) { return x; }

// Transpose LANES x LANES floats in registers, log2(LANES) stages of pairwise exchanges.
INLINE void transpose(vec* x) {
  UNROLL for (int i = 0; i < LANES; ++i) {
    if (i & 1) continue;
    const vec a = x[i], b = x[i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    x[i + 1] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  UNROLL for (int i = 0; i < LANES; ++i) {
    if (i & 2) continue;
    const vec a = x[i], b = x[i + 2];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  UNROLL for (int i = 0; i < LANES; ++i) {
    if (i & 4) continue;
    const vec a = x[i], b = x[i + 4];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
template <class To, class From>
INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

INLINE float widened(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }

// To the nearest, ties to even; a NaN stays one.
INLINE uint16_t narrowed(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return static_cast<uint16_t>((x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE void widen(float* to, const uint16_t* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = widened(from[i]);
}

INLINE void narrow(uint16_t* to, const float* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = narrowed(from[i]);
}

INLINE vec load_widened(const uint16_t* from) {
  alignas(vec) float x[LANES];
  widen(x, from, LANES);
  return load(x);
}

INLINE void store_narrowed(uint16_t* to, vec from) {
  alignas(vec) float x[LANES];
  store(x, from);
  narrow(to, x, LANES);
}
// 2^x: split x into an integer, placed in the exponent, and f in [-1/2, 1/2],
// a polynomial of degree 5 that is 1 at 0, so whole powers of 2 are exact. Below 2^-126 the answer is exactly 0; NaN stays NaN.
INLINE vec exp2(vec x) {
  const vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits become the integer
  const vec f = x - (shifted - 12582912.0f);
  vec p = splat(0.00132647273f);
  p = p * f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.0f;
  const ivec bits = reinterpret_cast<ivec>(p) + (reinterpret_cast<ivec>(shifted) << 23);
  return reinterpret_cast<vec>((x < -126.0f) ? ivec{} : bits);
}
constexpr float LOG2_E = 1.44269504f;
constexpr float RELIABLE = 1024.0f;  // a log-sum-exp farther from 0 is not
constexpr int HEAD_STEPS = HEAD_DIM, VALUE_STEPS = VALUE_DIM;

// The reference point of exponents: -inf (no key yet) must not meet itself, inf - inf is NaN.
INLINE vec reference(vec m) { return m == -INF ? vec{} : m; }

// Keys held in registers: fewer query vectors leave room for more keys.
template <int QV>
constexpr int key_tile() {
  return BLOCK_N % (KEY_TILE * (QUERY_VECTORS / QV)) == 0 ? KEY_TILE * (QUERY_VECTORS / QV) : KEY_TILE;
}

template <int QV, int KT>
INLINE void dot_keys(const vec (*query)[QV], const float* key, int64_t stride, vec (*score)[QV]) {
  vec acc[KT][QV];
  UNROLL for (int j = 0; j < KT; ++j)
    UNROLL for (int i = 0; i < QV; ++i) acc[j][i] = vec{};
  for (int d = 0; d < HEAD_STEPS; ++d) {
    UNROLL for (int j = 0; j < KT; ++j) {
      const vec k = spread(key + j * stride + d * CHUNK);
      UNROLL for (int i = 0; i < QV; ++i) acc[j][i] += query[d][i] * k;
    }
  }
  UNROLL for (int j = 0; j < KT; ++j)
    UNROLL for (int i = 0; i < QV; ++i) {
      const vec x = sum_chunk(acc[j][i]);
      score[j][i] = x;
    }
}

template <int QV, int KT>
INLINE void dot_steps(const vec (*query)[QV], const float* key, int64_t stride, vec (*score)[QV]) {
  vec acc[KT][QV];
  UNROLL for (int j = 0; j < KT; ++j)
    UNROLL for (int i = 0; i < QV; ++i) acc[j][i] = vec{};
  for (int d = 0; d < VALUE_STEPS; ++d) {
    UNROLL for (int j = 0; j < KT; ++j) {
      const vec k = spread(key + j * stride + d * CHUNK);
      UNROLL for (int i = 0; i < QV; ++i) acc[j][i] += query[d][i] * k;
    }
  }
  UNROLL for (int j = 0; j < KT; ++j)
    UNROLL for (int i = 0; i < QV; ++i) {
      const vec x = sum_chunk(acc[j][i]);
      score[j][i] = x;
    }
}

// Onto w[t], the sum over n keys of p_j v_j[t], VT value columns in registers.
// The tile's sum is formed apart and added once: a long serial sum would cost accuracy.
template <int QV, int VT>
INLINE void dot_values(const vec (*p)[QV], const float* value, int64_t stride, int n, vec (*w)[QV]) {
  vec acc[VT][QV];
  UNROLL for (int t = 0; t < VT; ++t)
    UNROLL for (int i = 0; i < QV; ++i) acc[t][i] = vec{};
  for (int j = 0; j < n; ++j, value += stride) {
    UNROLL for (int t = 0; t < VT; ++t) {
      const vec v = spread(value + t * CHUNK);
      UNROLL for (int i = 0; i < QV; ++i) acc[t][i] += p[j][i] * v;
    }
  }
  UNROLL for (int t = 0; t < VT; ++t)
    UNROLL for (int i = 0; i < QV; ++i) w[t][i] = w[t][i] + acc[t][i];
}

// Rows of floats in a tile are filled up with zeros to whole vectors.
constexpr int vectors(int dim) { return (dim + LANES - 1) / LANES; }
constexpr int QUERY_PITCH = vectors(HEAD_DIM) * LANES, VALUE_PITCH = vectors(VALUE_DIM) * LANES;

// Some numbers as the caller has them, in a tile's floats, and the way back.
INLINE void take(float* to, const uint16_t* from, int n) { widen(to, from, n); }
INLINE void put(uint16_t* to, const float* from, int n) { narrow(to, from, n); }

// steps[d] = element d of every row.
template <int QV, int PITCH>
INLINE void turn(const float* rows, vec (*steps)[QV]) {
  for (int i = 0; i < QV; ++i)
    for (int d = 0; d < PITCH; d += LANES) {
      vec x[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) x[r] = load(rows + (i * LANES + r) * PITCH + d);
      transpose(x);
      UNROLL for (int r = 0; r < LANES; ++r) steps[d + r][i] = x[r];
    }
}

// The way back.
template <int QV, int PITCH>
INLINE void turn_back(const vec (*steps)[QV], float* rows) {
  for (int i = 0; i < QV; ++i)
    for (int d = 0; d < PITCH; d += LANES) {
      vec x[LANES];
      UNROLL for (int r = 0; r < LANES; ++r) x[r] = steps[d + r][i];
      transpose(x);
      UNROLL for (int r = 0; r < LANES; ++r) store(rows + (i * LANES + r) * PITCH + d, x[r]);
    }
}

// Onto to[j], for KT keys, the sum over a tile's rows r of weight[j][r] x[r], CV vectors of columns in registers.
template <int QV, int KT, int CV>
INLINE void dot_rows(const vec (*weight)[QV], const float* x, int pitch, float* to, int64_t to_row) {
  const float* const w = reinterpret_cast<const float*>(weight);
  vec acc[KT][CV];
  UNROLL for (int j = 0; j < KT; ++j)
    UNROLL for (int c = 0; c < CV; ++c) acc[j][c] = vec{};
  for (int r = 0; r < QV * LANES; ++r, x += pitch) {
    vec column[CV];
    UNROLL for (int c = 0; c < CV; ++c) column[c] = load(x + c * LANES);
    UNROLL for (int j = 0; j < KT; ++j) {
      const vec one = splat(w[j * QV * LANES + r]);
      UNROLL for (int c = 0; c < CV; ++c) acc[j][c] += one * column[c];
    }
  }
  UNROLL for (int j = 0; j < KT; ++j)
    UNROLL for (int c = 0; c < CV; ++c) {
      float* const there = to + j * to_row + c * LANES;
      store(there, load(there) + acc[j][c]);
    }
}

// The same for n keys and all columns.
template <int QV, int PITCH, int CV>
INLINE void dot_all_rows(const vec (*weight)[QV], const float* x, int n, float* to, int64_t to_row) {
  constexpr int REST = PITCH / LANES % CV;
  int j = 0;
  for (; j + GRAD_TILE <= n; j += GRAD_TILE) {
    int c = 0;
    for (; c + CV * LANES <= PITCH; c += CV * LANES) dot_rows<QV, GRAD_TILE, CV>(weight + j, x + c, PITCH, to + j * to_row + c, to_row);
    if (REST > 0) dot_rows<QV, GRAD_TILE, REST ? REST : 1>(weight + j, x + c, PITCH, to + j * to_row + c, to_row);
  }
  for (; j < n; ++j) {
    int c = 0;
    for (; c + CV * LANES <= PITCH; c += CV * LANES) dot_rows<QV, 1, CV>(weight + j, x + c, PITCH, to + j * to_row + c, to_row);
    if (REST > 0) dot_rows<QV, 1, REST ? REST : 1>(weight + j, x + c, PITCH, to + j * to_row + c, to_row);
  }
}
// The first `lengths` keys of its own sequence: the query at a position sees keys low <= key < high; both grow with the position, or stay.
INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
[[maybe_unused]] INLINE int64_t floor_divide(int64_t x, int64_t n) { return (x - (x < 0 ? n - 1 : 0)) / n; }

struct Seen { int64_t low, high; };

INLINE Seen seen(const Call& c, int64_t b, [[maybe_unused]] int64_t position) {
  [[maybe_unused]] const int64_t q_len = c.q_len, kv_len = c.kv_len;
  const int64_t lengths = c.lengths_data[b * c.lengths_batch];
  return {most(0, least(0, kv_len)), most(0, least(lengths, kv_len))};
}

// top is taken anew, hidden scores left out.
template <int QV>
INLINE void apply_mask(vec (*score)[QV], const ivec* high, int64_t first_key, int n, vec* top) {
  for (int i = 0; i < QV; ++i) top[i] = splat(-INF);
  for (int j = 0; j < n; ++j) {
    const int32_t key = static_cast<int32_t>(first_key + j);
    UNROLL for (int i = 0; i < QV; ++i) {
      score[j][i] = (high[i] > key) ? score[j][i] : splat(-INF);
      top[i] = max(top[i], score[j][i]);
    }
  }
}
// The query rows of one tile: row r of a KV head is position r / group, query head r % group.
// Rows past the end read the tile's first row, and a gradient of zeros, which weighs nothing.
template <int QV>
struct Rows {
  const uint16_t* query[QV * ROWS];
  const uint16_t* output[QV * ROWS];
  const uint16_t* grad[QV * ROWS];  // null past the end
  uint16_t* grad_query[QV * ROWS];  // null past the end, and where nobody asks
  int64_t place[QV * ROWS];  // in arrays of [batch, heads, q_len]
  ivec high[QV];  // the first that it no longer sees
  const Call& c;
  int64_t batch;
  ivec head[QV], position[QV];  // of each lane
  int32_t first_position, last_position;
  vec slopes_row[QV];  // what each lane reads
  vec sinks_row[QV];  // what each lane reads

  Rows(const Call& call, int64_t b, int64_t first_head, int64_t first, int64_t group) : c(call), batch(b) {
    const int64_t rows = c.q_len * group;
    [[maybe_unused]] const int64_t kv_head = first_head / (c.heads / c.kv_heads);
    first_position = static_cast<int32_t>(first / group);
    last_position = static_cast<int32_t>(((first + QV * ROWS < rows ? first + QV * ROWS : rows) - 1) / group);
    for (int r = 0; r < QV * ROWS; ++r) {
      const bool inside = first + r < rows;
      const int64_t row = inside ? first + r : first;
      const int64_t position_of_row = row / group, head = first_head + row % group;
      query[r] = c.query + b * c.q.batch + head * c.q.head + position_of_row * c.q.row;
      place[r] = (b * c.heads + head) * c.q_len + position_of_row;
      output[r] = c.output + b * c.o.batch + head * c.o.head + position_of_row * c.o.row;
      grad[r] = inside ? c.grad + b * c.g.batch + head * c.g.head + position_of_row * c.g.row : nullptr;
      grad_query[r] = inside && c.grad_query ? c.grad_query + b * c.dq.batch + head * c.dq.head + position_of_row * c.dq.row : nullptr;
      const float* const slopes = c.slopes_data + b * c.slopes_batch + head * c.slopes_heads;
      for (int lane = r % ROWS * CHUNK; lane < (r % ROWS + 1) * CHUNK; ++lane) reinterpret_cast<float*>(&slopes_row[r / ROWS])[lane] = *slopes;
      const float* const sinks = c.sinks_data + head * c.sinks_heads;
      for (int lane = r % ROWS * CHUNK; lane < (r % ROWS + 1) * CHUNK; ++lane) reinterpret_cast<float*>(&sinks_row[r / ROWS])[lane] = *sinks;
      for (int lane = r % ROWS * CHUNK; lane < (r % ROWS + 1) * CHUNK; ++lane) {
        reinterpret_cast<int32_t*>(&this->head[r / ROWS])[lane] = static_cast<int32_t>(head);
        reinterpret_cast<int32_t*>(&position[r / ROWS])[lane] = static_cast<int32_t>(position_of_row);
      }
      const Seen keys = seen(c, b, position_of_row);
      for (int lane = r % ROWS * CHUNK; lane < (r % ROWS + 1) * CHUNK; ++lane) {
        reinterpret_cast<int32_t*>(&high[r / ROWS])[lane] = static_cast<int32_t>(keys.high);
      }
    }
  }

};
// score - `slopes` |position - key|
INLINE vec alibi_score(vec score, vec slope, int64_t, ivec, ivec position, int64_t key, int64_t) {
  const vec x = __builtin_convertvector(position - static_cast<int32_t>(key), vec);
  return score - slope * (x < 0.0f ? -x : x);
}
// How a score falls as slopes grow.
INLINE vec alibi_rate_of_slopes(int64_t, ivec, ivec position, int64_t key, int64_t) {
  const vec x = __builtin_convertvector(position - static_cast<int32_t>(key), vec);
  return x < 0.0f ? x : -x;
}

// Scores become score - `slopes` |position - key|, then the score itself, beside a key of score `sinks` and value 0; top is taken anew.
template <int QV>
INLINE void apply_scores(const Rows<QV>& rows, vec (*score)[QV], [[maybe_unused]] int64_t first_key, int n, vec* top) {
  [[maybe_unused]] const Call& c = rows.c;
  UNROLL for (int i = 0; i < QV; ++i) {
    top[i] = splat(-INF);
    for (int from = 0; from < n; from += LANES) {
      const auto apply = [&](int j) __attribute__((always_inline)) {
        vec x = score[from + j][i];
        x = alibi_score(x, rows.slopes_row[i], rows.batch, rows.head[i], rows.position[i], first_key + from + j, c.kv_len - c.q_len);
        score[from + j][i] = x;
        top[i] = max(top[i], x);
      };
      if (n - from >= LANES)
        UNROLL for (int j = 0; j < LANES; ++j) apply(j);
      else
        for (int j = 0; j < n - from; ++j) apply(j);
    }
  }
}
// Where a thread reads the keys and values of a leaf.
struct Leaf {
  const float* key;
  const float* value;
  int64_t key_row, value_row;  // floats from one key to the next

  // From its key n on.
  INLINE Leaf from(int64_t n) const { return {key + n * key_row, value + n * value_row, key_row, value_row}; }
};

// The same leaf as the caller has it.
struct Narrow {
  const uint16_t* key;
  const uint16_t* value;
  int64_t key_row, value_row;
};

struct Keys {
  const Call& c;
  float* const packed;  // this thread's copies; null: leaves are read where the caller has them
  const uint16_t* key = nullptr;
  const uint16_t* value = nullptr;

  Keys(const Call& call, float* memory) : c(call), packed(memory) {}

  // The head that is read from now on.
  void head(const uint16_t* k, const uint16_t* v) {
    key = k, value = v;
  }

  INLINE Leaf leaf(int64_t index) {
    const Narrow there{key + index * BLOCK_N * c.k.row, value + index * BLOCK_N * c.v.row, c.k.row, c.v.row};
    float* const here = packed;
    pack(here, there, index);
    return {here, here + BLOCK_N * HEAD_DIM, HEAD_DIM, VALUE_DIM};
  }

  static constexpr int64_t LEAF_FLOATS = BLOCK_N * (HEAD_DIM + VALUE_DIM);

  // What a thread's copies take.
  static int64_t bytes([[maybe_unused]] int64_t kv_len) {
    return LEAF_FLOATS * sizeof(float);
  }

  INLINE void pack(float* to, const Narrow& from, int64_t index) const {
    const int64_t left = c.kv_len - index * BLOCK_N;
    const int n = static_cast<int>(left < BLOCK_N ? left : BLOCK_N);
    copy(to, from.key, from.key_row, n, HEAD_DIM);
    copy(to + BLOCK_N * HEAD_DIM, from.value, from.value_row, n, VALUE_DIM);
  }

  INLINE static void copy(float* to, const uint16_t* from, int64_t row, int n, int size) {
    for (int j = 0; j < n; ++j, to += size, from += row) {
      widen(to, from, size);
    }
  }
};
// Sums over query rows of what keys and values receive, from one key on.
struct Sums {
  float* key;    // null where nobody asks
  float* value;  // null where nobody asks
  int64_t key_row, value_row;
};

// What is computed of a leaf.
enum Pass { QUERY = 1, KEYS = 2, OPERANDS = 4 };

// One tile of QV vectors of query rows against a range of leaves.
template <int QV>
struct Tile {
  static constexpr int KT = key_tile<QV>(), VT = VALUE_TILE * (QUERY_VECTORS / QV);
  static constexpr int PADDED_N = (BLOCK_N + KT - 1) / KT * KT;

  vec query[QUERY_PITCH][QV], grad[VALUE_PITCH][QV];  // query times the scale, grad divided by the sum of weights
  vec score[PADDED_N][QV], step[PADDED_N][QV];
  vec sum[QUERY_PITCH][QV];  // of what query receives
  alignas(64) float query_rows[QV * LANES * QUERY_PITCH], grad_rows[QV * LANES * VALUE_PITCH];
  alignas(64) float rest[KT * (HEAD_DIM > VALUE_DIM ? HEAD_DIM : VALUE_DIM)];  // keys that do not fill a tile
  vec m[QV], delta[QV];  // in base 2, where weights are of; D, divided by the sum of weights
  vec base[QV];          // of rows whose log-sum-exp is no help: their largest score
  bool lost;             // whether there are such
  vec grad_slopes[QV];

  // Of a range of leaves: keys below limit, of which every row sees those below unmasked.
  struct Range { int64_t begin, end, limit, unmasked; };

  static Range range(const Call& c, [[maybe_unused]] int64_t b, [[maybe_unused]] int64_t first, [[maybe_unused]] int64_t group) {
    const int64_t end = least(first + QV * ROWS, c.q_len * group);
    const Seen by_first = seen(c, b, first / group), by_last = seen(c, b, (end - 1) / group);
    return {0, (by_last.high + BLOCK_N - 1) / BLOCK_N, by_last.high, by_first.high};
  }

  // Products with keys, KT at a time, by `tile`; fewer remain at the end: zeros fill the tile, for stale bits may be
  // denormal: slow.
  template <int DIM, class Dot>
  INLINE void products(const float* from, int64_t row, int n, const Dot& tile) {
    int j = 0;
    for (; j + KT <= n; j += KT) tile(j, from + j * row, row);
    if (j < n) {
      for (int r = j; r < n; ++r) std::memcpy(rest + (r - j) * DIM, from + r * row, DIM * sizeof(float));
      std::memset(rest + (n - j) * DIM, 0, (KT - (n - j)) * DIM * sizeof(float));
      tile(j, rest, DIM);
    }
  }

  // Scores of a leaf, keys [first, first + n).
  INLINE void scores([[maybe_unused]] const Rows<QV>& rows, const Leaf& leaf, [[maybe_unused]] int64_t first, int n,
                     [[maybe_unused]] bool masked) {
    [[maybe_unused]] vec top[QV];
    products<HEAD_DIM>(leaf.key, leaf.key_row, n, [&](int j, const float* key, int64_t row) __attribute__((always_inline)) { dot_keys<QV, KT>(query, key, row, score + j); });
    apply_scores<QV>(rows, score, first, n, top);
    if (masked) apply_mask<QV>(score, rows.high, first, n, top);
  }

  // Every leaf of a range that somebody of the tile sees: fold(leaf, first key, keys, whether bounds cut).
  template <class Fold>
  INLINE void leaves([[maybe_unused]] const Rows<QV>& rows, Keys& keys, const Range& range, const Fold& fold) {
    for (int64_t leaf = range.begin; leaf < range.end; ++leaf) {
      const int64_t first = leaf * BLOCK_N, n = range.limit - first < BLOCK_N ? range.limit - first : BLOCK_N;
      fold(keys.leaf(leaf), first, static_cast<int>(n), first + n > range.unmasked);
    }
  }

  // Query and the gradient of the output, where weights of every row begin, and D.
  INLINE void begin(const Rows<QV>& rows, Keys& keys, const Call& c, [[maybe_unused]] const Range& whole) {
    lost = false;
    alignas(vec) float power[QV * LANES], inverse[QV * LANES], deltas[QV * LANES];
    std::memset(query_rows, 0, sizeof query_rows);
    std::memset(grad_rows, 0, sizeof grad_rows);
    for (int r = 0; r < QV * LANES; ++r) {
      float* const q = query_rows + r * QUERY_PITCH;
      take(q, rows.query[r], HEAD_DIM);
      for (int d = 0; d < QUERY_PITCH; ++d) q[d] *= static_cast<float>(c.scale);
      const float lse = c.lse[rows.place[r]];
      lost |= lse > RELIABLE || (lse < -RELIABLE && lse > -INF);
      const double total = lse * 1.4426950408889634, whole = __builtin_ceil(total);
      power[r] = static_cast<float>(lse == -INF ? 0.0 : whole);
      inverse[r] = static_cast<float>(lse == -INF ? 0.0 : __builtin_exp2(whole - total));
      deltas[r] = 0.0f;
      if (!rows.grad[r]) continue;
      float* const g = grad_rows + r * VALUE_PITCH;
      alignas(vec) float o[VALUE_PITCH] = {};
      take(g, rows.grad[r], VALUE_DIM);
      take(o, rows.output[r], VALUE_DIM);
      vec both = vec{};
      for (int t = 0; t < VALUE_PITCH; t += LANES) both += load(g + t) * load(o + t);
      for (int lane = 0; lane < LANES; ++lane) deltas[r] += both[lane];
      if (c.grad_lse) deltas[r] -= c.grad_lse[rows.place[r]];
    }
    turn<QV, QUERY_PITCH>(query_rows, query);
    for (int i = 0; i < QV; ++i) m[i] = load(power + i * LANES), base[i] = vec{};
    if (__builtin_expect(lost, 0)) anew(rows, keys, whole, inverse);
    for (int r = 0; r < QV * LANES; ++r) {
      deltas[r] *= inverse[r];
      for (int t = 0; t < VALUE_PITCH; ++t) grad_rows[r * VALUE_PITCH + t] *= inverse[r];
    }
    turn<QV, VALUE_PITCH>(grad_rows, grad);
    for (int i = 0; i < QV; ++i) delta[i] = load(deltas + i * LANES);
    for (int d = 0; d < QUERY_PITCH; ++d)
      for (int i = 0; i < QV; ++i) sum[d][i] = vec{};
    for (int i = 0; i < QV; ++i) grad_slopes[i] = vec{};
  }

  // A log-sum-exp far from 0 has lost digits of the sum of weights: from the largest score of each row both are
  // computed again.
  __attribute__((noinline, cold)) void anew(const Rows<QV>& rows, Keys& keys, const Range& whole, float* inverse) {
    vec top[QV], total[QV];
    for (int i = 0; i < QV; ++i) {
      top[i] = splat(-INF), total[i] = vec{}, m[i] = vec{};
      top[i] = max(top[i], rows.sinks_row[i]);
    }
    leaves(rows, keys, whole, [&](const Leaf& leaf, int64_t first, int n, bool masked) {
      scores(rows, leaf, first, n, masked);
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < QV; ++i) top[i] = score[j][i] == score[j][i] ? max(top[i], score[j][i]) : score[j][i];
    });
    for (int i = 0; i < QV; ++i) {
      base[i] = reference(top[i]);
      total[i] += exp2((rows.sinks_row[i] - base[i]) * LOG2_E);
    }
    leaves(rows, keys, whole, [&](const Leaf& leaf, int64_t first, int n, bool masked) {
      scores(rows, leaf, first, n, masked);
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < QV; ++i) total[i] += exp2((score[j][i] - base[i]) * LOG2_E);
    });
    for (int i = 0; i < QV; ++i)
      for (int lane = 0; lane < LANES; ++lane) inverse[i * LANES + lane] = total[i][lane] == 0.0f ? 0.0f : 1.0f / total[i][lane];
  }

  // What a leaf adds to gradients; sums are those of its first key.
  template <int PASS>
  INLINE void fold([[maybe_unused]] const Rows<QV>& rows, const Leaf& leaf, [[maybe_unused]] int64_t first, int n,
                   bool masked, [[maybe_unused]] const Sums& sums) {
    scores(rows, leaf, first, n, masked);
    products<VALUE_DIM>(leaf.value, leaf.value_row, n, [&](int j, const float* value, int64_t row) __attribute__((always_inline)) { dot_steps<QV, KT>(grad, value, row, step + j); });
    if (__builtin_expect(lost, 0))
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < QV; ++i) score[j][i] -= base[i];
    for (int j = 0; j < n; ++j)
      UNROLL for (int i = 0; i < QV; ++i) {
        const vec p = exp2(score[j][i] * LOG2_E - m[i]);
        score[j][i] = p;
        step[j][i] = p * (step[j][i] - delta[i]);
      }
    if (PASS & KEYS && sums.value) dot_all_rows<QV, VALUE_PITCH, VALUE_COLUMNS>(score, grad_rows, n, sums.value, sums.value_row);
    if (PASS & QUERY && rows.c.grad_slopes)
      for (int j = 0; j < n; ++j)
        UNROLL for (int i = 0; i < QV; ++i) grad_slopes[i] += step[j][i] * alibi_rate_of_slopes(rows.batch, rows.head[i], rows.position[i], first + j, rows.c.kv_len - rows.c.q_len);
    if (PASS & KEYS && sums.key) dot_all_rows<QV, QUERY_PITCH, QUERY_COLUMNS>(step, query_rows, n, sums.key, sums.key_row);
    if (PASS & QUERY) {
      int d = 0;
      for (; d + VT <= HEAD_DIM; d += VT) dot_values<QV, VT>(step, leaf.key + d, leaf.key_row, n, sum + d);
      constexpr int REST = HEAD_DIM % VT;
      if (REST > 0) dot_values<QV, REST ? REST : 1>(step, leaf.key + d, leaf.key_row, n, sum + d);
    }
  }

  // What query receives, and what rows add to gradients of operands.
  INLINE void end(const Rows<QV>& rows, [[maybe_unused]] const Call& c) {
    if (c.grad_slopes)
      for (int r = 0; r < QV * LANES; ++r)
        if (rows.grad[r]) c.grad_slopes[rows.place[r]] = grad_slopes[r / LANES][r % LANES];
    if (c.grad_sinks)
      for (int r = 0; r < QV * LANES; ++r)
        if (rows.grad[r]) c.grad_sinks[rows.place[r]] = -of_term(rows.sinks_row[r / LANES], r / LANES)[r % LANES];
    if (!c.grad_query) return;
    turn_back<QV, QUERY_PITCH>(sum, query_rows);
    for (int r = 0; r < QV * LANES; ++r) {
      if (!rows.grad_query[r]) continue;
      float* const x = query_rows + r * QUERY_PITCH;
      for (int d = 0; d < QUERY_PITCH; ++d) x[d] *= static_cast<float>(c.scale);
      put(rows.grad_query[r], x, HEAD_DIM);
    }
  }

  // The weight of one more key, of that score in each row and of value 0, times D.
  INLINE vec of_term(vec term, int i) const { return exp2((term - base[i]) * LOG2_E - m[i]) * delta[i]; }
};
// Scratch of one call; none is asked for where size is 0.
struct Memory {
  char* const bytes;
  const bool ok;

  explicit Memory(int64_t size)
      : bytes(size ? static_cast<char*>(aligned_alloc(64, (size + 63) / 64 * 64)) : nullptr), ok(bytes || !size) {}
  Memory(const Memory&) = delete;
  ~Memory() { std::free(bytes); }
};

// The whole problem: tasks are (batch, query heads that tiles take together, tile of query rows) and (batch, KV head,
// part of the keys), taken in turn by the threads. Nobody else adds to what a task adds to.
struct Grid {
  const Call& c;
  int64_t per_tile, teams, tiles;  // query heads that tiles take together; of a batch entry, and their tiles
  int64_t splits = 1;
  bool in_place = false;  // whether sums of keys and values are gathered where the caller wants them
  char* sums = nullptr;
  int64_t sums_size = 0;  // floats, of one task's sums
  char* packed = nullptr;  // the threads' copies of keys; null where they are too large
  int64_t packed_bytes = 0;  // of one thread
  std::atomic<int64_t> workers{0}, next{0};

  // A tile of query rows of heads [head, head + group), over leaves [begin, end) of those that it sees.
  template <int QV, int PASS>
  void tile(Keys& keys, int64_t b, int64_t head, int64_t group, int64_t first, int64_t begin, int64_t end, const Sums& sums, int64_t first_key) {
    using Tile = ::Tile<QV>;
    const auto whole = Tile::range(c, b, first, group);
    auto range = whole;
    if (range.begin < begin) range.begin = begin;
    if (range.end > end) range.end = end;
    if (!(PASS & QUERY) && range.begin >= range.end) return;
    const int64_t kv_head = head / (c.heads / c.kv_heads);
    keys.head(c.key + b * c.k.batch + kv_head * c.k.head, c.value + b * c.v.batch + kv_head * c.v.head);
    const Rows<QV> rows(c, b, head, first, group);
    Tile work;
    work.begin(rows, keys, c, whole);
    work.leaves(rows, keys, range, [&](const Leaf& leaf, int64_t key, int n, bool masked) __attribute__((always_inline)) {
      const Sums here{sums.key ? sums.key + (key - first_key) * sums.key_row : nullptr, sums.value ? sums.value + (key - first_key) * sums.value_row : nullptr, sums.key_row, sums.value_row};
      work.template fold<PASS>(rows, leaf, key, n, masked, here);
    });
    if (PASS & QUERY) work.end(rows, c);
  }

  template <int PASS>
  void some_rows(Keys& keys, int64_t b, int64_t head, int64_t group, int64_t first, int64_t begin, int64_t end, const Sums& sums, int64_t first_key) {
    switch ((c.q_len * group - first + LANES - 1) / LANES) {
      case 1: tile<1, PASS>(keys, b, head, group, first, begin, end, sums, first_key); break;
      default: tile<QUERY_VECTORS, PASS>(keys, b, head, group, first, begin, end, sums, first_key);
    }
  }

  static constexpr int64_t TILE_ROWS = QUERY_VECTORS * LANES, EVERY_LEAF = INT64_MAX;

  // Where a task adds up what keys [first, first + n) of a KV head receive: zeros.
  Sums begin_sums(int64_t b, int64_t kv_head, int64_t first, int64_t n, int64_t slot) {
    const Sums x = in_place ? Sums{at<float>(c.grad_key, c.dk, b, kv_head, first), at<float>(c.grad_value, c.dv, b, kv_head, first), c.dk.row, c.dv.row}
                            : scratch(slot, n);
    for (int64_t j = 0; j < n; ++j) {
      if (x.key) std::memset(x.key + j * x.key_row, 0, QUERY_PITCH * sizeof(float));
      if (x.value) std::memset(x.value + j * x.value_row, 0, VALUE_PITCH * sizeof(float));
    }
    return x;
  }

  // Where a tensor [batch, kv_heads, kv_len, dim] has what belongs to a key; null where there is none.
  template <class To, class From>
  static To* at(From* x, const Strides& s, int64_t b, int64_t kv_head, int64_t key) {
    return x ? reinterpret_cast<To*>(x) + b * s.batch + kv_head * s.head + key * s.row : nullptr;
  }

  // A task's own sums of n keys.
  Sums scratch(int64_t slot, int64_t n) const {
    float* const own = reinterpret_cast<float*>(sums) + slot * sums_size;
    return {c.grad_key ? own : nullptr, c.grad_value ? own + (c.grad_key ? n * QUERY_PITCH : 0) : nullptr, QUERY_PITCH, VALUE_PITCH};
  }

  // The sums of n keys from first on, where the caller wants them.
  void end_sums(const Sums& x, int64_t b, int64_t kv_head, int64_t first, int64_t n) {
    if (in_place) return;
    uint16_t* const key = at<uint16_t>(c.grad_key, c.dk, b, kv_head, first);
    uint16_t* const value = at<uint16_t>(c.grad_value, c.dv, b, kv_head, first);
    for (int64_t j = 0; j < n; ++j) {
      if (key) put(key + j * c.dk.row, x.key + j * x.key_row, HEAD_DIM);
      if (value) put(value + j * c.dv.row, x.value + j * x.value_row, VALUE_DIM);
    }
  }

  // Tiles split, split + splits ... of all query heads that share a KV head, over leaves [begin, end).
  template <int PASS>
  void rows_of_head(Keys& keys, int64_t b, int64_t kv_head, int64_t split, int64_t step, int64_t begin, int64_t end, const Sums& sums, int64_t first_key) {
    const int64_t group = c.heads / c.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head += per_tile)
      for (int64_t i = split; i < tiles; i += step) some_rows<PASS>(keys, b, head, per_tile, i * TILE_ROWS, begin, end, sums, first_key);
  }

  // Whether rows add to something, and keys.
  bool has_rows() const { return c.grad_query || c.grad_slopes || c.grad_sinks; }
  bool has_keys() const { return c.grad_key || c.grad_value; }

  int64_t of_queries() const { return has_rows() ? c.batch * teams * tiles : 0; }
  int64_t of_keys() const { return has_keys() ? c.batch * c.kv_heads * splits : 0; }
  int64_t tasks() const { return of_queries() + of_keys(); }

  void task(Keys& keys, int64_t i, int64_t worker) {
    if (i >= of_keys()) {
      i -= of_keys();
      const int64_t team = i / tiles, b = team / teams, head = team % teams * per_tile;
      some_rows<QUERY>(keys, b, head, per_tile, (tiles - 1 - i % tiles) * TILE_ROWS, 0, EVERY_LEAF, {}, 0);
      return;
    }
    const int64_t leaves = (c.kv_len + BLOCK_N - 1) / BLOCK_N, pair = i / splits, b = pair / c.kv_heads, kv_head = pair % c.kv_heads, begin = leaves * (i % splits) / splits, end = leaves * (i % splits + 1) / splits;
    const int64_t first = begin * BLOCK_N, n = (end * BLOCK_N < c.kv_len ? end * BLOCK_N : c.kv_len) - first;
    const Sums x = begin_sums(b, kv_head, first, n, worker);
    rows_of_head<KEYS>(keys, b, kv_head, 0, 1, begin, end, x, first);
    end_sums(x, b, kv_head, first, n);
  }

  void work() {
    const int64_t worker = workers.fetch_add(1);
    Keys keys(c, packed ? reinterpret_cast<float*>(packed + packed_bytes * worker) : nullptr);
    const int64_t first = tasks();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < all_tasks();) {
      if (i < first) {
        task(keys, i, worker);
        continue;
      }
    }
  }

  int64_t all_tasks() const { return tasks(); }
};

int run(const Call& c) {
  const int64_t per_tile = c.heads / c.kv_heads;
  Grid grid{c, per_tile, c.heads / per_tile, (c.q_len * per_tile + Grid::TILE_ROWS - 1) / Grid::TILE_ROWS};
  const int64_t each = (c.grad_key ? QUERY_PITCH : 0) + (c.grad_value ? VALUE_PITCH : 0);
  grid.splits = SPLITS;
  const int64_t leaves = (c.kv_len + BLOCK_N - 1) / BLOCK_N;
  while (grid.splits > 1 && grid.splits > leaves) grid.splits /= 2;
  grid.in_place = false;
  grid.sums_size = (leaves / grid.splits + 1) * BLOCK_N * each;
  const int64_t tasks = grid.all_tasks(), threads = c.launch && c.threads < tasks ? c.threads : c.launch && tasks ? tasks : 1;
  Memory sums(grid.in_place ? 0 : threads * grid.sums_size * sizeof(float));
  if (!sums.ok) return 1;
  grid.sums = sums.bytes;
  grid.packed_bytes = Keys::bytes(c.kv_len);
  Memory packed(threads * grid.packed_bytes <= SCRATCH_BYTES ? threads * grid.packed_bytes : 0);
  grid.packed = packed.bytes;
  if (!grid.packed) return 1;
  const auto body = [](void* data) { static_cast<Grid*>(data)->work(); };
  if (threads > 1)
    c.launch(body, &grid, static_cast<unsigned>(threads), 0);
  else
    body(&grid);
  return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int elsa_gradients(const Call* call) { return run(*call); }

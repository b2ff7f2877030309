// elsa-tune: cpp.serial.avx512.l16.q3.k8.v8.n96.e10 for fp64.d64.causal.softcap
// Compiled for avx512. Regenerate this text: elsa-tune show cpp.serial.avx512.l16.q3.k8.v8.n96.e10 fp64.d64.causal.softcap
//
// Exact softmax attention as a scan over states (m, S, W): one state, folded left to right.
//   leaf   96 keys x 24 query rows -> scores, exp2, one state
//   fold   a worker folds its consecutive leaves, state in registers and L1
//   block  1 worker state of one core
//   grid   1 split of the key axis
// A query row is one (head of the group, position) pair of a KV head, position-major,
// so all query heads that share K and V read them together.
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

constexpr int HEAD_DIM = 64;
constexpr int VALUE_DIM = 64;
constexpr int LANES = 8;                    // doubles in a vector
constexpr int CHUNK = 1;                     // lanes that share a query row (1: lanes are rows)
constexpr int ROWS = LANES / CHUNK;           // query rows in a vector
constexpr int QUERY_VECTORS = 3;
constexpr int KEY_TILE = 8;              // keys in registers while Q K^T is formed
constexpr int VALUE_TILE = 8;            // value columns in registers while P V is formed
constexpr int BLOCK_N = 96;
constexpr int WORKERS = 1;
constexpr int SPLITS = 1;
constexpr int PREFETCH = 0;               // keys
constexpr int64_t SCRATCH_BYTES = 67108864;  // at most this much memory for split states

// What the caller passes: 8-byte slots, packed by elsa_tune/generate/cpp in this order.
// Shapes are [batch, heads, length, dim]; strides are in elements; the last stride is 1.
using Launch = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Strides { int64_t batch, head, row; };

struct Call {
  const double* query;
  const double* key;
  const double* value;
  double* output;
  double* lse;  // [batch, heads, q_len]: log of each row's sum of exponentials; null if nobody asks
  int64_t batch, heads, kv_heads, q_len, kv_len;
  Strides q, k, v, o;
  double scale;
  int64_t threads;
  Launch launch;  // the OpenMP runtime's GOMP_parallel; null runs on the calling thread
  double softcap;
};
// Vectors by compiler extension: the same text is AVX-512, AVX2, NEON or plain code.
typedef double vec __attribute__((vector_size(LANES * 8), may_alias));
typedef int64_t ivec __attribute__((vector_size(LANES * 8), may_alias));
typedef double loose_vec __attribute__((vector_size(LANES * 8), may_alias, aligned(8)));

INLINE vec splat(double x) { return x - vec{}; }
INLINE vec max(vec a, vec b) { return a > b ? a : b; }
INLINE vec load(const double* p) { return *reinterpret_cast<const loose_vec*>(p); }
INLINE void store(double* p, vec x) { *reinterpret_cast<loose_vec*>(p) = x; }

constexpr double INF = __builtin_inf();

// One value for every query row.
INLINE vec spread(const double* p) { return splat(*p); }
INLINE vec sum_chunk(vec x) { return x; }

// Transpose LANES x LANES doubles in registers, log2(LANES) stages of pairwise exchanges.
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
// 2^x: split x into an integer, placed in the exponent, and f in [-1/2, 1/2],
// a polynomial of degree 10 that is 1 at 0, so whole powers of 2 are exact. Below 2^-1022 the answer is exactly 0; NaN stays NaN.
INLINE vec exp2(vec x) {
  const vec shifted = x + 6755399441055744.0;  // 1.5 * 2^52: the low mantissa bits become the integer
  const vec f = x - (shifted - 6755399441055744.0);
  vec p = splat(7.038183177272391e-09);
  p = p * f + 1.0208323077598024e-07;
  p = p * f + 1.3215653574139295e-06;
  p = p * f + 1.5252659427253973e-05;
  p = p * f + 0.00015403529994287692;
  p = p * f + 0.0013333558225801067;
  p = p * f + 0.009618129107983103;
  p = p * f + 0.05550410866448181;
  p = p * f + 0.240226506959091;
  p = p * f + 0.6931471805599492;
  p = p * f + 1.0;
  const ivec bits = reinterpret_cast<ivec>(p) + (reinterpret_cast<ivec>(shifted) << 52);
  return reinterpret_cast<vec>((x < -1022.0) ? ivec{} : bits);
}
// What a state is of, the state, and the merge of two.
constexpr double LOG2_E = 1.4426950408889634;
constexpr int HEAD_STEPS = HEAD_DIM / CHUNK;
constexpr int VALUE_STEPS = VALUE_DIM / CHUNK;

// The state of QV vectors of query rows over some set of keys, in base 2:
//   m = max score log2(e), rounded up,  S = sum 2^(score log2(e) - m),  W = sum 2^(score log2(e) - m) v;  output = W
//   / S. m is whole, so what scales a state when a larger score comes is a whole power of 2: nothing is rounded,
//   however often.
template <int QV>
struct State {
  vec m[QV], s[QV], w[VALUE_STEPS][QV];

  INLINE void identity() {
    for (int i = 0; i < QV; ++i) m[i] = splat(-INF), s[i] = vec{};
    for (int t = 0; t < VALUE_STEPS; ++t)
      for (int i = 0; i < QV; ++i) w[t][i] = vec{};
  }
};

// The reference point of exponents: -inf (no key yet) must not meet itself, inf - inf is NaN.
INLINE vec reference(vec m) { return m == -INF ? vec{} : m; }

// Products of log2(e) and scores beyond FAR are rounded by whole numbers: weights would be off by powers of 2.
constexpr double FAR = 9007199254740992.0, MOST = 1.7976931348623157e+308;

INLINE ivec is_far(vec x) {
  const vec size = max(x, -x);
  return (size >= FAR) & (size < INF);
}

template <int QV>
INLINE bool any_far(const vec* top) {
  ivec any = is_far(top[0]);
  UNROLL for (int i = 1; i < QV; ++i) any |= is_far(top[i]);
  any |= __builtin_shufflevector(any, any, 1, 0, 3, 2, 5, 4, 7, 6);
  any |= __builtin_shufflevector(any, any, 2, 3, 0, 1, 6, 7, 4, 5);
  any |= __builtin_shufflevector(any, any, 4, 5, 6, 7, 0, 1, 2, 3);
  return any[0] != 0;
}

// Scores of rows whose largest is so far away become differences from it; base is where it lies in base 2, and whole.
template <int QV>
inline void subtract_far(vec (*score)[QV], int n, vec* top, vec* base) {
  for (int i = 0; i < QV; ++i) {
    const vec from = is_far(top[i]) ? top[i] : vec{}, scaled = from * LOG2_E;
    base[i] = scaled > MOST ? splat(MOST) : scaled < -MOST ? splat(-MOST) : scaled;
    for (int j = 0; j < n; ++j) score[j][i] -= from;
    top[i] -= from;
  }
}

// The smallest whole number that is not below x; what is too large to have a fraction that matters stays as it is.
INLINE vec whole(vec x) {
  const vec near = (x + 6755399441055744.0) - 6755399441055744.0;
  const vec up = near < x ? near + 1.0 : near;
  return (x < 2251799813685248.0) & (x > -2251799813685248.0) ? up : x;
}

// b := a merged with b, the associative operation of the scan.
template <int QV>
inline void merge(const State<QV>& a, State<QV>& b) {
  vec keep_a[QV], keep_b[QV];
  for (int i = 0; i < QV; ++i) {
    const vec m = max(a.m[i], b.m[i]);
    keep_a[i] = exp2(a.m[i] - reference(m));
    keep_b[i] = exp2(b.m[i] - reference(m));
    b.m[i] = m;
    b.s[i] = keep_a[i] * a.s[i] + keep_b[i] * b.s[i];
  }
  for (int t = 0; t < VALUE_STEPS; ++t)
    for (int i = 0; i < QV; ++i) b.w[t][i] = keep_a[i] * a.w[t][i] + keep_b[i] * b.w[t][i];
}

// Keys held in registers: fewer query vectors leave room for more keys.
template <int QV>
constexpr int key_tile() {
  return BLOCK_N % (KEY_TILE * (QUERY_VECTORS / QV)) == 0 ? KEY_TILE * (QUERY_VECTORS / QV) : KEY_TILE;
}

// scores[j] = Q k_j for KT keys at once; top = the largest seen.
template <int QV, int KT>
INLINE void dot_keys(const vec (*query)[QV], const double* key, int64_t stride, vec (*score)[QV], vec* top) {
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
      top[i] = max(top[i], x);
    }
}

// Onto w[t], the sum over n keys of p_j v_j[t], VT value columns in registers.
// The tile's sum is formed apart and added once: a long serial sum would cost accuracy.
template <int QV, int VT>
INLINE void dot_values(const vec (*p)[QV], const double* value, int64_t stride, int n, const vec* keep, vec (*w)[QV]) {
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
    UNROLL for (int i = 0; i < QV; ++i) w[t][i] = w[t][i] * keep[i] + acc[t][i];
}

// Keys up to its own position: the query at a position sees keys low <= key < high; both grow with the position, or stay.
INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
[[maybe_unused]] INLINE int64_t floor_divide(int64_t x, int64_t n) { return (x - (x < 0 ? n - 1 : 0)) / n; }

struct Seen { int64_t low, high; };

INLINE Seen seen(const Call& c, [[maybe_unused]] int64_t position) {
  [[maybe_unused]] const int64_t q_len = c.q_len, kv_len = c.kv_len;
  return {most(0, least(0, kv_len)), most(0, least((position + 1), kv_len))};
}

// top is taken anew, hidden scores left out.
template <int QV>
INLINE void apply_mask(vec (*score)[QV], const ivec* high, int64_t first_key, int n, vec* top) {
  for (int i = 0; i < QV; ++i) top[i] = splat(-INF);
  for (int j = 0; j < n; ++j) {
    const int64_t key = static_cast<int64_t>(first_key + j);
    UNROLL for (int i = 0; i < QV; ++i) {
      score[j][i] = (high[i] > key) ? score[j][i] : splat(-INF);
      top[i] = max(top[i], score[j][i]);
    }
  }
}
// The query rows of one tile: row r of a KV head is position r / group, query head r % group.
// Rows past the end read the tile's first row and write to a sink, so nothing branches on them.
template <int QV>
struct Rows {
  const double* query[QV * ROWS];
  double* output[QV * ROWS];
  double* lse[QV * ROWS];  // null if nobody asks
  ivec high[QV];  // the first that it no longer sees
  const Call& c;

  Rows(const Call& call, int64_t b, int64_t kv_head, int64_t first, double* sink) : c(call) {
    const int64_t group = c.heads / c.kv_heads, rows = c.q_len * group;
    for (int r = 0; r < QV * ROWS; ++r) {
      const bool inside = first + r < rows;
      const int64_t row = inside ? first + r : first;
      const int64_t position_of_row = row / group, head = kv_head * group + row % group;
      query[r] = c.query + b * c.q.batch + head * c.q.head + position_of_row * c.q.row;
      lse[r] = inside && c.lse ? c.lse + (b * c.heads + head) * c.q_len + position_of_row : nullptr;
      output[r] = inside ? c.output + b * c.o.batch + head * c.o.head + position_of_row * c.o.row : sink;
      const Seen keys = seen(c, position_of_row);
      for (int lane = r % ROWS * CHUNK; lane < (r % ROWS + 1) * CHUNK; ++lane) {
        reinterpret_cast<int64_t*>(&high[r / ROWS])[lane] = static_cast<int64_t>(keys.high);
      }
    }
  }

  // steps[d] = element d (or chunk d) of every row, times the scale.
  INLINE void load_query(vec (*steps)[QV], double scale) const {
    for (int i = 0; i < QV; ++i) {
      const double* const* row = query + i * ROWS;
      int d = 0;
      for (; d + LANES <= HEAD_STEPS; d += LANES) {
        vec x[LANES];
        UNROLL for (int r = 0; r < LANES; ++r) x[r] = load(row[r] + d);
        transpose(x);
        UNROLL for (int r = 0; r < LANES; ++r) steps[d + r][i] = x[r] * scale;
      }
      for (; d < HEAD_STEPS; ++d) {
        alignas(vec) double x[LANES];
        for (int r = 0; r < ROWS; ++r) std::memcpy(x + r * CHUNK, row[r] + d * CHUNK, CHUNK * sizeof(double));
        steps[d][i] = load(x) * scale;
      }
    }
  }

  // The state's output; a row that saw no key is 0, and its log-sum-exp -inf.
  INLINE void store_output(const State<QV>& state) const {
    for (int r = 0; r < QV * ROWS; ++r) {
      const int lane = r % ROWS * CHUNK;
      if (lse[r]) *lse[r] = (state.m[r / ROWS][lane] + __builtin_log2(state.s[r / ROWS][lane])) / LOG2_E;
    }
    for (int i = 0; i < QV; ++i) {
      double* const* row = output + i * ROWS;
      const vec inverse = state.s[i] == 0.0 ? vec{} : 1.0 / state.s[i];
      int t = 0;
      for (; t + LANES <= VALUE_STEPS; t += LANES) {
        vec x[LANES];
        UNROLL for (int r = 0; r < LANES; ++r) x[r] = state.w[t + r][i] * inverse;
        transpose(x);
        UNROLL for (int r = 0; r < LANES; ++r) store(row[r] + t, x[r]);
      }
      for (; t < VALUE_STEPS; ++t) {
        alignas(vec) double x[LANES];
        store(x, state.w[t][i] * inverse);
        for (int r = 0; r < ROWS; ++r) std::memcpy(row[r] + t * CHUNK, x + r * CHUNK, CHUNK * sizeof(double));
      }
    }
  }
};
// `softcap` tanh(score / `softcap`), with tanh |y| = -x / (2 + x), x = e^(-2 |y|) - 1: elsa_tune/parts/tanh.py. NaN stays NaN.
INLINE vec softcap_score(vec score, double softcap) {
  const vec y = score * (1.0 / softcap), far = (y < 0.0 ? y : -y) * (2 * LOG2_E);
  const vec within = far < -64.0 ? splat(-64.0) : far;  // below, 2^far adds nothing to 1
  const vec shifted = within + 6755399441055744.0, f = within - (shifted - 6755399441055744.0);
  vec q = splat(4.434771161313258e-10);
  q = q * f + 7.0737832505786415e-09;
  q = q * f + 1.0178199572710636e-07;
  q = q * f + 1.3215435282293565e-06;
  q = q * f + 1.5252733493125527e-05;
  q = q * f + 0.00015403530457112126;
  q = q * f + 0.0013333558146774623;
  q = q * f + 0.00961812910759412;
  q = q * f + 0.055504108664820084;
  q = q * f + 0.2402265069591013;
  q = q * f + 0.6931471805599453;
  const vec power = reinterpret_cast<vec>(reinterpret_cast<ivec>(splat(1.0)) + (reinterpret_cast<ivec>(shifted) << 52));
  const vec x = power * (f * q) + (power - 1.0), capped = x / (x + 2.0) * softcap;
  return y < 0.0 ? capped : -capped;
}

// Scores become `softcap` tanh(score / `softcap`); top is taken anew.
template <int QV>
INLINE void apply_scores(const Rows<QV>& rows, vec (*score)[QV], [[maybe_unused]] int64_t first_key, int n, vec* top) {
  [[maybe_unused]] const Call& c = rows.c;
  UNROLL for (int i = 0; i < QV; ++i) {
    top[i] = splat(-INF);
    for (int from = 0; from < n; from += LANES) {
      const auto apply = [&](int j) __attribute__((always_inline)) {
        vec x = score[from + j][i];
        x = softcap_score(x, static_cast<double>(c.softcap));
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
  const double* key;
  const double* value;
  int64_t key_row, value_row;  // doubles from one key to the next
};

struct Keys {
  const Call& c;
  double* const packed;  // this thread's copies; null: leaves are read where the caller has them
  const double* key = nullptr;
  const double* value = nullptr;

  Keys(const Call& call, double* memory) : c(call), packed(memory) {}

  // The head that is read from now on.
  void head(const double* k, const double* v) {
    key = k, value = v;
  }

  INLINE Leaf leaf(int64_t index) {
    const Leaf there{key + index * BLOCK_N * c.k.row, value + index * BLOCK_N * c.v.row, c.k.row, c.v.row};
    return there;
  }
};
// One tile of QV vectors of query rows against a range of leaves.
template <int QV>
struct Tile {
  static constexpr int KT = key_tile<QV>(), VT = VALUE_TILE * (QUERY_VECTORS / QV);
  static constexpr int PADDED_N = (BLOCK_N + KT - 1) / KT * KT;

  vec query[HEAD_STEPS][QV];
  vec score[PADDED_N][QV];
  State<QV> worker[WORKERS];
  alignas(64) double rest[KT * HEAD_DIM];  // the last keys of a leaf, where they do not fill a tile

  // Fold one leaf, keys [first, first + n), into a state.
  INLINE void fold([[maybe_unused]] const Rows<QV>& rows, const Leaf& leaf, [[maybe_unused]] int64_t first, int n,
                   [[maybe_unused]] bool masked, State<QV>& x) {
    vec top[QV];
    for (int i = 0; i < QV; ++i) top[i] = splat(-INF);

    // Scores.
    int j = 0;
    for (; j + KT <= n; j += KT) dot_keys<QV, KT>(query, leaf.key + j * leaf.key_row, leaf.key_row, score + j, top);
    if (j < n) {  // fewer than KT keys remain: zeros fill the tile. Stale bits may be denormal: slow.
      for (int r = j; r < n; ++r) std::memcpy(rest + (r - j) * HEAD_DIM, leaf.key + r * leaf.key_row, HEAD_DIM * sizeof(double));
      std::memset(rest + (n - j) * HEAD_DIM, 0, (KT - (n - j)) * HEAD_DIM * sizeof(double));
      vec unused[QV];
      for (int i = 0; i < QV; ++i) unused[i] = vec{};
      dot_keys<QV, KT>(query, rest, HEAD_DIM, score + j, unused);
      for (; j < n; ++j)
        UNROLL for (int i = 0; i < QV; ++i) top[i] = max(top[i], score[j][i]);
    }
    apply_scores<QV>(rows, score, first, n, top);
    if (masked) apply_mask<QV>(score, rows.high, first, n, top);

    if (__builtin_expect(any_far<QV>(top), 0)) {
      vec met[QV];
      for (int i = 0; i < QV; ++i) met[i] = top[i];
      weigh_far(leaf, n, met, x);
    } else {
      weigh<false>(leaf, n, top, nullptr, x);
    }
  }

  // Fold scores of a leaf, of which top are the largest, and its values into a state.
  template <bool IS_FAR>
  INLINE void weigh(const Leaf& leaf, int n, vec* top, [[maybe_unused]] const vec* base, State<QV>& x) {
    vec keep[QV];
    // Weights: 2^(score log2(e) - m), one multiply-add and one exp2, and the running sum. m is met in
    // differences only, so large scores lose nothing to its rounding.
    for (int i = 0; i < QV; ++i) {
      vec m = whole(top[i] * LOG2_E);
      if (IS_FAR) m += base[i];
      m = max(x.m[i], m);
      keep[i] = exp2(x.m[i] - reference(m));
      x.m[i] = m;
      x.s[i] *= keep[i];
      top[i] = reference(m);
      if (IS_FAR) top[i] -= base[i];
    }
    vec sum[QV];
    UNROLL for (int i = 0; i < QV; ++i) sum[i] = vec{};
    for (int j = 0; j < n; ++j)
      UNROLL for (int i = 0; i < QV; ++i) {
        const vec p = exp2(score[j][i] * LOG2_E - top[i]);
        score[j][i] = p;
        sum[i] += p;
      }

    UNROLL for (int i = 0; i < QV; ++i) x.s[i] += sum[i];

    // Weighted values.
    int t = 0;
    for (; t + VT <= VALUE_STEPS; t += VT) dot_values<QV, VT>(score, leaf.value + t * CHUNK, leaf.value_row, n, keep, x.w + t);
    constexpr int REST = VALUE_STEPS % VT;
    if (REST > 0) dot_values<QV, REST ? REST : 1>(score, leaf.value + t * CHUNK, leaf.value_row, n, keep, x.w + t);
  }

  // The same of scores so large that they are met in differences.
  __attribute__((noinline, cold)) void weigh_far(const Leaf& leaf, int n, vec* top, State<QV>& x) {
    vec base[QV];
    subtract_far<QV>(score, n, top, base);
    weigh<true>(leaf, n, top, base, x);
  }

  // The total over leaves [begin, end) of the key axis, keys below limit, into worker[WORKERS - 1]. Every row of the
  // tile sees keys below unmasked.
  INLINE void total(const Rows<QV>& rows, Keys& keys, int64_t begin, int64_t end, int64_t limit, int64_t unmasked) {
    for (int w = 0; w < WORKERS; ++w) {
      worker[w].identity();
      const int64_t from = begin + (end - begin) * w / WORKERS, to = begin + (end - begin) * (w + 1) / WORKERS;
      for (int64_t leaf = from; leaf < to; ++leaf) {
        const int64_t first = leaf * BLOCK_N, n = limit - first < BLOCK_N ? limit - first : BLOCK_N;
        fold(rows, keys.leaf(leaf), first, static_cast<int>(n), first + n > unmasked, worker[w]);
      }
    }
  }
};
// The whole problem: tasks are (batch, KV head, tile of query rows, split of the key axis),
// taken in turn by the threads.
struct Grid {
  const Call& c;
  int64_t rows, tiles, groups;  // query rows and tiles of a KV head; (batch, KV head) pairs
  int splits = 1;
  std::atomic<int64_t> next{0};

  template <int QV>
  void task(Keys& keys, int64_t group, int64_t tile, int split) {
    const int64_t b = group / c.kv_heads, head = group % c.kv_heads, first = tile * QUERY_VECTORS * ROWS;
    alignas(64) double sink[VALUE_DIM];
    const Rows<QV> query_rows(c, b, head, first, sink);
    keys.head(c.key + b * c.k.batch + head * c.k.head, c.value + b * c.v.batch + head * c.v.head);
    const int64_t per_position = c.heads / c.kv_heads, end = least(first + QV * ROWS, rows);
    const Seen by_first = seen(c, first / per_position), by_last = seen(c, (end - 1) / per_position);
    const int64_t limit = by_last.high, unmasked = by_first.high;
    const int64_t leaves = (limit + BLOCK_N - 1) / BLOCK_N;
    Tile<QV> work;
    query_rows.load_query(work.query, static_cast<double>(c.scale));
    work.total(query_rows, keys, leaves * split / splits, leaves * (split + 1) / splits, limit, unmasked);
    query_rows.store_output(work.worker[WORKERS - 1]);
  }

  void tile_task(Keys& keys, int64_t group, int64_t tile, int split) {
    const int64_t vectors = (rows - tile * QUERY_VECTORS * ROWS + ROWS - 1) / ROWS;
    switch (vectors) {
      case 1: task<1>(keys, group, tile, split); break;
      case 2: task<2>(keys, group, tile, split); break;
      default: task<QUERY_VECTORS>(keys, group, tile, split);
    }
  }

  void work() {
    Keys keys(c, nullptr);
    const int64_t tasks = groups * tiles * splits;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      tile_task(keys, i / splits / tiles, tiles - 1 - i / splits % tiles, static_cast<int>(i % splits));
  }
};

int run(const Call& c) {
  const int64_t rows = c.q_len * (c.heads / c.kv_heads), tile_rows = QUERY_VECTORS * ROWS;
  Grid grid{c, rows, (rows + tile_rows - 1) / tile_rows, c.batch * c.kv_heads};
  const int64_t tasks = grid.groups * grid.tiles * grid.splits, threads = c.launch && c.threads < tasks ? c.threads : c.launch ? tasks : 1;
  const auto body = [](void* data) { static_cast<Grid*>(data)->work(); };
  if (threads > 1)
    c.launch(body, &grid, static_cast<unsigned>(threads), 0);
  else
    body(&grid);
  return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int elsa_attention(const Call* call) { return run(*call); }

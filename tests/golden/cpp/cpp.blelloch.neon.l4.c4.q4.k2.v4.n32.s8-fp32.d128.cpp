// elsa-tune: cpp.blelloch.neon.l4.c4.q4.k2.v4.n32.s8 for fp32.d128
// Compiled for neon. Regenerate this text: elsa-tune show cpp.blelloch.neon.l4.c4.q4.k2.v4.n32.s8 fp32.d128
//
// Exact softmax attention as a scan over states (m, S, W): an up-sweep of pairs; the total needs no down-sweep.
//   leaf   32 keys x 4 query rows -> scores, exp2, one state
//   fold   a worker folds its consecutive leaves, state in registers and L1
//   block  1 worker state of one core
//   grid   8 splits of the key axis, states in memory merged by rounds
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

constexpr int HEAD_DIM = 128;
constexpr int VALUE_DIM = 128;
constexpr int LANES = 4;                    // floats in a vector
constexpr int CHUNK = 4;                     // lanes that share a query row (1: lanes are rows)
constexpr int ROWS = LANES / CHUNK;           // query rows in a vector
constexpr int QUERY_VECTORS = 4;
constexpr int KEY_TILE = 2;              // keys in registers while Q K^T is formed
constexpr int VALUE_TILE = 4;            // value columns in registers while P V is formed
constexpr int BLOCK_N = 32;
constexpr int WORKERS = 1;
constexpr int SPLITS = 8;
constexpr int PREFETCH = 0;               // keys
constexpr int64_t SCRATCH_BYTES = 67108864;  // at most this much memory for split states

// What the caller passes: 8-byte slots, packed by elsa_tune/generate/cpp in this order.
// Shapes are [batch, heads, length, dim]; strides are in elements; the last stride is 1.
using Launch = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Strides { int64_t batch, head, row; };

struct Call {
  const float* query;
  const float* key;
  const float* value;
  float* output;
  float* lse;  // [batch, heads, q_len]: log of each row's sum of exponentials; null if nobody asks
  int64_t batch, heads, kv_heads, q_len, kv_len;
  Strides q, k, v, o;
  double scale;
  int64_t threads;
  Launch launch;  // the OpenMP runtime's GOMP_parallel; null runs on the calling thread
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

// The vector holds one query row: consecutive values.
INLINE vec spread(const float* p) { return load(p); }
// Every lane of a row receives the sum over the row's 4 lanes.
INLINE vec sum_chunk(vec x) {
  x += __builtin_shufflevector(x, x, 1, 0, 3, 2);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
  return x;
}

// Transpose LANES x LANES floats in registers, log2(LANES) stages of pairwise exchanges.
INLINE void transpose(vec* x) {
  UNROLL for (int i = 0; i < LANES; ++i) {
    if (i & 1) continue;
    const vec a = x[i], b = x[i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 4, 2, 6);
    x[i + 1] = __builtin_shufflevector(a, b, 1, 5, 3, 7);
  }
  UNROLL for (int i = 0; i < LANES; ++i) {
    if (i & 2) continue;
    const vec a = x[i], b = x[i + 2];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }
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
// What a state is of, the state, and the merge of two.
constexpr float LOG2_E = 1.44269504f;
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
constexpr float FAR = 16777216.0f, MOST = 3.40282347e+38f;

INLINE ivec is_far(vec x) {
  const vec size = max(x, -x);
  return (size >= FAR) & (size < INF);
}

template <int QV>
INLINE bool any_far(const vec* top) {
  ivec any = is_far(top[0]);
  UNROLL for (int i = 1; i < QV; ++i) any |= is_far(top[i]);
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
  const vec near = (x + 12582912.0f) - 12582912.0f;
  const vec up = near < x ? near + 1.0f : near;
  return (x < 4194304.0f) & (x > -4194304.0f) ? up : x;
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

// an up-sweep of pairs; the total needs no down-sweep: the total of n states ends in x[n - 1]. Cells run downwards, so
// a cell is read before this round overwrites it and no second buffer is needed.
template <int QV>
INLINE void merge_splits(State<QV>* x, int n) {
  struct Round { int first, stride, step; };
  if (n == 8) {
    static constexpr Round rounds[] = {
        {1, 2, 1},  // round 1 of 3: 4 merges
        {3, 4, 2},  // round 2 of 3: 2 merges
        {7, 8, 4},  // round 3 of 3: 1 merge
    };
    for (const Round& r : rounds)
      for (int i = r.first + (n - 1 - r.first) / r.stride * r.stride; i >= r.first; i -= r.stride) merge(x[i - r.step], x[i]);
  }
  if (n == 4) {
    static constexpr Round rounds[] = {
        {1, 2, 1},  // round 1 of 2: 2 merges
        {3, 4, 2},  // round 2 of 2: 1 merge
    };
    for (const Round& r : rounds)
      for (int i = r.first + (n - 1 - r.first) / r.stride * r.stride; i >= r.first; i -= r.stride) merge(x[i - r.step], x[i]);
  }
  if (n == 2) {
    static constexpr Round rounds[] = {
        {1, 2, 1},  // round 1 of 1: 1 merge
    };
    for (const Round& r : rounds)
      for (int i = r.first + (n - 1 - r.first) / r.stride * r.stride; i >= r.first; i -= r.stride) merge(x[i - r.step], x[i]);
  }
}

// Keys held in registers: fewer query vectors leave room for more keys.
template <int QV>
constexpr int key_tile() {
  return BLOCK_N % (KEY_TILE * (QUERY_VECTORS / QV)) == 0 ? KEY_TILE * (QUERY_VECTORS / QV) : KEY_TILE;
}

// scores[j] = Q k_j for KT keys at once; top = the largest seen.
template <int QV, int KT>
INLINE void dot_keys(const vec (*query)[QV], const float* key, int64_t stride, vec (*score)[QV], vec* top) {
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
INLINE void dot_values(const vec (*p)[QV], const float* value, int64_t stride, int n, const vec* keep, vec (*w)[QV]) {
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

// The query rows of one tile: row r of a KV head is position r / group, query head r % group.
// Rows past the end read the tile's first row and write to a sink, so nothing branches on them.
template <int QV>
struct Rows {
  const float* query[QV * ROWS];
  float* output[QV * ROWS];
  float* lse[QV * ROWS];  // null if nobody asks

  Rows(const Call& c, int64_t b, int64_t kv_head, int64_t first, float* sink) {
    const int64_t group = c.heads / c.kv_heads, rows = c.q_len * group;
    for (int r = 0; r < QV * ROWS; ++r) {
      const bool inside = first + r < rows;
      const int64_t row = inside ? first + r : first;
      const int64_t position_of_row = row / group, head = kv_head * group + row % group;
      query[r] = c.query + b * c.q.batch + head * c.q.head + position_of_row * c.q.row;
      lse[r] = inside && c.lse ? c.lse + (b * c.heads + head) * c.q_len + position_of_row : nullptr;
      output[r] = inside ? c.output + b * c.o.batch + head * c.o.head + position_of_row * c.o.row : sink;
    }
  }

  // steps[d] = element d (or chunk d) of every row, times the scale.
  INLINE void load_query(vec (*steps)[QV], float scale) const {
    for (int i = 0; i < QV; ++i) {
      const float* const* row = query + i * ROWS;
      int d = 0;
      for (; d < HEAD_STEPS; ++d) {
        alignas(vec) float x[LANES];
        for (int r = 0; r < ROWS; ++r) std::memcpy(x + r * CHUNK, row[r] + d * CHUNK, CHUNK * sizeof(float));
        steps[d][i] = load(x) * scale;
      }
    }
  }

  // The state's output; a row that saw no key is 0, and its log-sum-exp -inf.
  INLINE void store_output(const State<QV>& state) const {
    for (int r = 0; r < QV * ROWS; ++r) {
      const int lane = r % ROWS * CHUNK;
      if (lse[r]) *lse[r] = (state.m[r / ROWS][lane] + __builtin_log2f(state.s[r / ROWS][lane])) / LOG2_E;
    }
    for (int i = 0; i < QV; ++i) {
      float* const* row = output + i * ROWS;
      const vec inverse = state.s[i] == 0.0f ? vec{} : 1.0f / state.s[i];
      int t = 0;
      for (; t < VALUE_STEPS; ++t) {
        alignas(vec) float x[LANES];
        store(x, state.w[t][i] * inverse);
        for (int r = 0; r < ROWS; ++r) std::memcpy(row[r] + t * CHUNK, x + r * CHUNK, CHUNK * sizeof(float));
      }
    }
  }
};
// Where a thread reads the keys and values of a leaf.
struct Leaf {
  const float* key;
  const float* value;
  int64_t key_row, value_row;  // floats from one key to the next
};

struct Keys {
  const Call& c;
  float* const packed;  // this thread's copies; null: leaves are read where the caller has them
  const float* key = nullptr;
  const float* value = nullptr;

  Keys(const Call& call, float* memory) : c(call), packed(memory) {}

  // The head that is read from now on.
  void head(const float* k, const float* v) {
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
  alignas(64) float rest[KT * HEAD_DIM];  // the last keys of a leaf, where they do not fill a tile

  // Fold one leaf, keys [first, first + n), into a state.
  INLINE void fold([[maybe_unused]] const Rows<QV>& rows, const Leaf& leaf, [[maybe_unused]] int64_t first, int n,
                   [[maybe_unused]] bool masked, State<QV>& x) {
    vec top[QV];
    for (int i = 0; i < QV; ++i) top[i] = splat(-INF);

    // Scores.
    int j = 0;
    for (; j + KT <= n; j += KT) dot_keys<QV, KT>(query, leaf.key + j * leaf.key_row, leaf.key_row, score + j, top);
    if (j < n) {  // fewer than KT keys remain: zeros fill the tile. Stale bits may be denormal: slow.
      for (int r = j; r < n; ++r) std::memcpy(rest + (r - j) * HEAD_DIM, leaf.key + r * leaf.key_row, HEAD_DIM * sizeof(float));
      std::memset(rest + (n - j) * HEAD_DIM, 0, (KT - (n - j)) * HEAD_DIM * sizeof(float));
      vec unused[QV];
      for (int i = 0; i < QV; ++i) unused[i] = vec{};
      dot_keys<QV, KT>(query, rest, HEAD_DIM, score + j, unused);
      for (; j < n; ++j)
        UNROLL for (int i = 0; i < QV; ++i) top[i] = max(top[i], score[j][i]);
    }

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
// Scratch of one call; none is asked for where size is 0.
struct Memory {
  char* const bytes;
  const bool ok;

  explicit Memory(int64_t size)
      : bytes(size ? static_cast<char*>(aligned_alloc(64, (size + 63) / 64 * 64)) : nullptr), ok(bytes || !size) {}
  Memory(const Memory&) = delete;
  ~Memory() { std::free(bytes); }
};

// The whole problem: tasks are (batch, KV head, tile of query rows, split of the key axis),
// taken in turn by the threads.
struct Grid {
  const Call& c;
  int64_t rows, tiles, groups;  // query rows and tiles of a KV head; (batch, KV head) pairs
  int splits = 1;
  State<QUERY_VECTORS>* states = nullptr;  // [groups * tiles][splits]
  std::atomic<int32_t>* unfinished = nullptr;  // [groups * tiles]: splits that are still at work
  std::atomic<int64_t> next{0};

  template <int QV>
  void task(Keys& keys, int64_t group, int64_t tile, int split) {
    const int64_t b = group / c.kv_heads, head = group % c.kv_heads, first = tile * QUERY_VECTORS * ROWS;
    alignas(64) float sink[VALUE_DIM];
    const Rows<QV> query_rows(c, b, head, first, sink);
    keys.head(c.key + b * c.k.batch + head * c.k.head, c.value + b * c.v.batch + head * c.v.head);
    const int64_t limit = c.kv_len, unmasked = limit;
    const int64_t leaves = (limit + BLOCK_N - 1) / BLOCK_N;
    Tile<QV> work;
    query_rows.load_query(work.query, static_cast<float>(c.scale));
    work.total(query_rows, keys, leaves * split / splits, leaves * (split + 1) / splits, limit, unmasked);
    if (splits > 1) {
      State<QUERY_VECTORS>* const slots = states + (group * tiles + tile) * splits;
      State<QV>* const mine = reinterpret_cast<State<QV>*>(slots);  // QV <= QUERY_VECTORS: they fit
      mine[split] = work.worker[WORKERS - 1];
      if (unfinished[group * tiles + tile].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      merge_splits(mine, splits);  // the last to finish merges; the order is fixed by the rounds
      query_rows.store_output(mine[splits - 1]);
      return;
    }
    query_rows.store_output(work.worker[WORKERS - 1]);
  }

  void tile_task(Keys& keys, int64_t group, int64_t tile, int split) {
    const int64_t vectors = (rows - tile * QUERY_VECTORS * ROWS + ROWS - 1) / ROWS;
    switch (vectors) {
      case 1: task<1>(keys, group, tile, split); break;
      case 2: task<2>(keys, group, tile, split); break;
      case 3: task<3>(keys, group, tile, split); break;
      default: task<QUERY_VECTORS>(keys, group, tile, split);
    }
  }

  void work() {
    Keys keys(c, nullptr);
    const int64_t tasks = groups * tiles * splits;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      tile_task(keys, i / splits / tiles, i / splits % tiles, static_cast<int>(i % splits));
  }
};

int run(const Call& c) {
  const int64_t rows = c.q_len * (c.heads / c.kv_heads), tile_rows = QUERY_VECTORS * ROWS;
  Grid grid{c, rows, (rows + tile_rows - 1) / tile_rows, c.batch * c.kv_heads};
  const int64_t cells = grid.groups * grid.tiles, leaves = (c.kv_len + BLOCK_N - 1) / BLOCK_N;
  const int64_t cell_bytes = sizeof(State<QUERY_VECTORS>);
  grid.splits = SPLITS;
  while (grid.splits > 1 && (grid.splits > leaves || grid.splits * cells * cell_bytes > SCRATCH_BYTES)) grid.splits /= 2;
  Memory states(grid.splits > 1 ? grid.splits * cells * cell_bytes : 0), unfinished(cells * sizeof(std::atomic<int32_t>));
  if (!states.ok || !unfinished.ok) return 1;
  grid.states = reinterpret_cast<State<QUERY_VECTORS>*>(states.bytes);
  grid.unfinished = reinterpret_cast<std::atomic<int32_t>*>(unfinished.bytes);
  for (int64_t i = 0; i < cells; ++i) new (grid.unfinished + i) std::atomic<int32_t>(grid.splits);
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

// torch's CPU operator for attention, answered without Python: a table from what a call's tensors look like to who answers.
//
// Registered by torch's stable C interface (2.10 and later). Everything that the table does not know goes to the operator
// elsa_tune::decide, which is Python's: it answers, and writes into the table who answers such tensors from then on.
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr int64_t AXES = 4;
constexpr int64_t OUTPUT = 3, LSE = 4, SCALE = 22, THREADS = 23;  // words of a kernel's call (templates/cpp/call.j2)
constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr size_t MOST = 4096;  // layouts before the table starts anew: a growing key cache makes a new one at every step

using Handle = AtenTensorHandle;
using Kernel = int (*)(const char* call);

/// What a call's tensors look like: dtype, is_causal, the mask's dtype or -1, then sizes and strides of query, key, value, mask.
struct Layout {
  std::array<int64_t, 3 + 8 * AXES> words{};

  bool operator==(const Layout& other) const { return words == other.words; }
};

struct Hash {
  size_t operator()(const Layout& layout) const {
    uint64_t mixed = 0;
    for (int64_t word : layout.words) mixed = (mixed ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u + (mixed >> 29);
    return mixed ^ (mixed >> 32);
  }
};

/// Calls that a row of the table has answered, and their time.
struct Row {
  std::atomic<int64_t> calls{0}, nanoseconds{0};
};

/// Who answers: a kernel of ours, or torch's own where there is none.
struct Entry {
  Kernel kernel = nullptr;
  std::vector<int64_t> call;  // a kernel's call but for pointers, scale and threads
  std::array<int64_t, AXES> out_strides{}, lse_strides{};
  double scale = 0;   // where a call gives none
  int64_t mask = -1;  // the word that is the mask's address
  bool fresh = false; // whether outputs are so large that huge pages are asked for
  Row* row = nullptr;
};

std::shared_mutex guard;
std::unordered_map<Layout, std::shared_ptr<const Entry>, Hash> table;
std::deque<Row> rows;
TorchLibraryHandle of_torch = nullptr, of_ours = nullptr;  // registrations of `attend`
std::atomic<bool> asks{false};  // whether each call is Python's to decide
std::atomic<bool> roughly{false};  // whether lengths of keys that are served alike are counted together
std::atomic<bool> passive{true};   // whether torch's own kernel answers everybody
thread_local int aside = 0;
thread_local std::string failure;  // why elsa_tune::decide failed

struct Tensor {  // owned
  Handle handle = nullptr;
  Tensor() = default;
  explicit Tensor(Handle given) : handle(given) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  Handle release() { return std::exchange(handle, nullptr); }
};

bool look(Handle x, int64_t* sizes, int64_t* strides) {
  int64_t dims = 0, *of_size = nullptr, *of_stride = nullptr;
  if (aoti_torch_get_dim(x, &dims) || dims > AXES || aoti_torch_get_sizes(x, &of_size) || aoti_torch_get_strides(x, &of_stride))
    return false;
  for (int64_t i = 0; i < AXES; ++i) {
    int64_t from = i - (AXES - dims);
    sizes[i] = from < 0 ? 1 : of_size[from];
    strides[i] = from < 0 ? 0 : of_stride[from];
  }
  return true;
}

int64_t dtype_of(Handle x) {
  int32_t dtype = -1;
  aoti_torch_get_dtype(x, &dtype);
  return dtype;
}

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
}

void ask_for_huge_pages(char* begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  auto from = (reinterpret_cast<uintptr_t>(begin) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  auto to = (reinterpret_cast<uintptr_t>(begin) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

/// [batch, heads, q_len], contiguous, into a tensor of other strides. A row that sees no key has 0, as torch's own kernel leaves it:
/// its backward pass takes exp(-inf - lse).
template <typename Real>
void lay_out(const Real* sums, Real* to, const int64_t* sizes, const int64_t* strides) {
  const Real none = -std::numeric_limits<Real>::infinity();
  for (int64_t b = 0; b < sizes[0]; ++b)
    for (int64_t h = 0; h < sizes[1]; ++h, sums += sizes[2]) {
      Real* there = to + b * strides[0] + h * strides[1];
      for (int64_t i = 0; i < sizes[2]; ++i) there[i * strides[2]] = sums[i] == none ? Real(0) : sums[i];
    }
}

/// The least length of keys that is served as `length` is, as Problem.nearby has it.
int64_t least_nearby(int64_t length) {
  int64_t step = 1;
  while (length / step >= 16) step *= 2;
  return length / step * step;
}

/// With the least length of keys that is served alike, and without the strides that a problem does not tell.
Layout nearby(const Layout& layout) {
  Layout found = layout;
  int64_t *key = &found.words[3 + 2 * AXES], *value = key + 2 * AXES, *mask = value + 2 * AXES;
  const int64_t length = key[2], least = length > 0 ? least_nearby(length) : length;
  for (int64_t* x : {key, value}) {
    int64_t* strides = x + AXES;
    strides[0] = 0;
    if (strides[1] == length * x[3]) strides[1] = least * x[3];
    if (x[2] == length) x[2] = least;
  }
  if (mask[3] == length) mask[3] = least;
  std::fill_n(mask + AXES, AXES, 0);
  return found;
}

struct Arguments {
  Tensor query, key, value, mask;
  double dropout;
  bool is_causal;
  std::optional<double> scale;

  explicit Arguments(const StableIValue* stack)
      : query(torch::stable::detail::to<Handle>(stack[0])),
        key(torch::stable::detail::to<Handle>(stack[1])),
        value(torch::stable::detail::to<Handle>(stack[2])),
        mask(torch::stable::detail::to<std::optional<Handle>>(stack[5]).value_or(nullptr)),
        dropout(torch::stable::detail::to<double>(stack[3])),
        is_causal(torch::stable::detail::to<bool>(stack[4])),
        scale(torch::stable::detail::to<std::optional<double>>(stack[6])) {}

  bool look_alike(Layout& layout) const {
    auto* words = layout.words.data();
    const int64_t dtype = dtype_of(query.handle);
    if (dtype_of(key.handle) != dtype || dtype_of(value.handle) != dtype) return false;
    words[0] = dtype;
    words[1] = is_causal;
    words[2] = mask.handle ? dtype_of(mask.handle) : -1;
    words += 3;
    for (Handle x : {query.handle, key.handle, value.handle, mask.handle}) {
      if (x && !look(x, words, words + AXES)) return false;
      words += 2 * AXES;
    }
    return true;
  }
};

bool by_torch(Arguments& given, Handle* results) {
  double scale = given.scale.value_or(0);
  return aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
             given.query.handle, given.key.handle, given.value.handle, given.dropout, given.is_causal,
             given.mask.handle ? &given.mask.handle : nullptr, given.scale ? &scale : nullptr, &results[0], &results[1]) ==
         AOTI_TORCH_SUCCESS;
}

bool by_kernel(const Entry& entry, const Layout& layout, Arguments& given, Handle* results) {
  const int64_t* sizes = &layout.words[3];
  const int64_t value_dim = layout.words[3 + 4 * AXES + 3];
  const int64_t out_sizes[AXES] = {sizes[0], sizes[1], sizes[2], value_dim};
  const int32_t dtype = static_cast<int32_t>(layout.words[0]), cpu = aoti_torch_device_type_cpu();
  const bool wide = dtype == aoti_torch_dtype_float64();
  const int32_t lse_dtype = wide ? dtype : aoti_torch_dtype_float32();
  Tensor out, lse;
  if (aoti_torch_empty_strided(AXES, out_sizes, entry.out_strides.data(), dtype, cpu, 0, &out.handle) ||
      aoti_torch_empty_strided(AXES - 1, sizes, entry.lse_strides.data(), lse_dtype, cpu, 0, &lse.handle))
    return false;

  const int64_t count = sizes[0] * sizes[1] * sizes[2];
  const std::unique_ptr<double[]> scratch(new double[wide ? count : (count + 1) / 2]);

  thread_local std::vector<int64_t> call;
  call = entry.call;
  void *of_out = nullptr, *of_lse = nullptr, *pointer = nullptr;
  aoti_torch_get_data_ptr(out.handle, &of_out);
  aoti_torch_get_data_ptr(lse.handle, &of_lse);
  const Handle read[] = {given.query.handle, given.key.handle, given.value.handle};
  for (int i = 0; i < 3; ++i) {
    aoti_torch_get_data_ptr(read[i], &pointer);
    call[i] = reinterpret_cast<int64_t>(pointer);
  }
  call[OUTPUT] = reinterpret_cast<int64_t>(of_out);
  call[LSE] = reinterpret_cast<int64_t>(scratch.get());
  const double scale = given.scale.value_or(entry.scale);
  std::memcpy(&call[SCALE], &scale, sizeof scale);
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  call[THREADS] = threads;
  if (entry.mask >= 0) {
    aoti_torch_get_data_ptr(given.mask.handle, &pointer);
    call[entry.mask] = reinterpret_cast<int64_t>(pointer);
  }
  if (entry.fresh) ask_for_huge_pages(static_cast<char*>(of_out), count * value_dim * aoti_torch_dtype_element_size(dtype));
  if (entry.kernel(reinterpret_cast<const char*>(call.data()))) return false;
  if (wide)
    lay_out(scratch.get(), static_cast<double*>(of_lse), sizes, entry.lse_strides.data());
  else
    lay_out(reinterpret_cast<const float*>(scratch.get()), static_cast<float*>(of_lse), sizes, entry.lse_strides.data());
  results[0] = out.release();
  results[1] = lse.release();
  return true;
}

bool answered(Arguments& given, Handle* results) {
  if (aside) return by_torch(given, results);
  Layout layout;
  if (passive || asks || given.dropout != 0 || !given.look_alike(layout)) return false;
  std::shared_lock lock(guard);
  auto found = table.find(layout);
  const bool is_new = found == table.end();
  if (is_new && roughly) found = table.find(nearby(layout));
  if (found == table.end()) return false;
  const std::shared_ptr<const Entry> entry = found->second;
  lock.unlock();
  if (is_new) {  // from now on it is known itself
    std::unique_lock more(guard);
    if (table.size() < MOST) table.emplace(layout, entry);
  }
  const int64_t begin = nanoseconds();
  if (!(entry->kernel ? by_kernel(*entry, layout, given, results) : by_torch(given, results))) return false;
  ++entry->row->calls;
  entry->row->nanoseconds += nanoseconds() - begin;
  return true;
}

/// aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal, *,
/// Tensor? attn_mask, float? scale) -> (Tensor output, Tensor logsumexp)
template <bool IN_TORCHS_PLACE>
void attend(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Handle results[2];
  if (!(IN_TORCHS_PLACE && passive ? by_torch(given, results) : answered(given, results))) {
    StableIValue passed[7] = {
        torch::stable::detail::from(given.query.release()),
        torch::stable::detail::from(given.key.release()),
        torch::stable::detail::from(given.value.release()),
        torch::stable::detail::from(given.dropout),
        torch::stable::detail::from(given.is_causal),
        torch::stable::detail::from(given.mask.handle ? std::optional<Handle>(given.mask.release()) : std::nullopt),
        torch::stable::detail::from(given.scale)};
    failure = "torch's kernel refuses these arguments";
    const char* asked = aside || (IN_TORCHS_PLACE && passive) ? "elsa_tune::torchs" : "elsa_tune::decide";
    if (torch_call_dispatcher(asked, "", passed, TORCH_ABI_VERSION)) throw std::runtime_error(failure);
    results[0] = torch::stable::detail::to<Handle>(passed[0]);
    results[1] = torch::stable::detail::to<Handle>(passed[1]);
  }
  stack[0] = torch::stable::detail::from(results[0]);
  stack[1] = torch::stable::detail::from(results[1]);
}

/// In a child: nobody holds the lock, which knows threads by numbers that are others' now; and what was bound starts threads.
void after_fork() {
  new (&guard) std::shared_mutex;
  table.clear();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

/// Put `attend` in the place of torch's kernel, for good: torch reads its table of kernels without a lock, so that none may go while
/// threads call. 0, or nothing has changed.
EXPORT int elsa_enable(const char* file) {
  static const int failed = [file] {
    auto take_away = [](TorchLibraryHandle& library) {
      if (library) aoti_torch_delete_library_object(std::exchange(library, nullptr));
    };
    const bool done =
        !pthread_atfork([] { guard.lock(); }, [] { guard.unlock(); }, after_fork) &&
        !aoti_torch_library_init_impl("elsa_tune", "CPU", file, 1, &of_ours) &&
        !torch_library_impl(of_ours, "attend", &attend<false>, TORCH_ABI_VERSION) &&
        !aoti_torch_library_init_impl("aten", "CPU", file, 1, &of_torch) &&
        !torch_library_impl(of_torch, "_scaled_dot_product_flash_attention_for_cpu", &attend<true>, TORCH_ABI_VERSION);
    if (!done) take_away(of_torch), take_away(of_ours);
    return !done;
  }();
  passive = failed != 0;
  return failed;
}

/// Let torch's own kernel answer everybody.
EXPORT void elsa_disable() { passive = true; }

/// From now on torch's own kernel answers this thread, `by` times more or less.
EXPORT void elsa_aside(int by) { aside += by; }

EXPORT void elsa_fail(const char* why) { failure = why; }

/// Whether from now on each call is elsa_tune::decide's.
EXPORT void elsa_ask(int always) { asks = always != 0; }

/// Room for one more who answers; its number.
EXPORT int64_t elsa_row() {
  std::unique_lock lock(guard);
  rows.emplace_back();
  return static_cast<int64_t>(rows.size()) - 1;
}

EXPORT void elsa_counts(int64_t row, int64_t* calls, int64_t* spent) {
  std::shared_lock lock(guard);
  *calls = rows[row].calls;
  *spent = rows[row].nanoseconds;
}

/// `call` of `words` words answers tensors of this layout; of 0 words torch's own kernel.
EXPORT void elsa_bind(const int64_t* layout, Kernel kernel, const char* call, int64_t words, const int64_t* out_strides,
                      const int64_t* lse_strides, double scale, int64_t mask, int fresh, int64_t row) {
  Layout key;
  std::memcpy(key.words.data(), layout, sizeof key.words);
  auto entry = std::make_shared<Entry>();
  entry->kernel = kernel;
  if (kernel) {
    entry->call.resize(words);
    std::memcpy(entry->call.data(), call, words * sizeof(int64_t));
    std::memcpy(entry->out_strides.data(), out_strides, AXES * sizeof(int64_t));
    std::memcpy(entry->lse_strides.data(), lse_strides, (AXES - 1) * sizeof(int64_t));
  }
  entry->scale = scale;
  entry->mask = mask;
  entry->fresh = fresh != 0;
  std::unique_lock lock(guard);
  entry->row = &rows[row];
  if (table.size() >= MOST) table.clear();
  table[key] = std::move(entry);
}

/// From now on torch's own kernel answers tensors whose layout is not known too, where one that is served alike is known, and `row` counts them.
EXPORT void elsa_bind_roughly(const int64_t* layout, int64_t row) {
  Layout key;
  std::memcpy(key.words.data(), layout, sizeof key.words);
  auto entry = std::make_shared<Entry>();
  std::unique_lock lock(guard);
  entry->row = &rows[row];
  table.emplace(nearby(key), std::move(entry));
  roughly = true;
}

EXPORT void elsa_forget() {
  std::unique_lock lock(guard);
  table.clear();
}

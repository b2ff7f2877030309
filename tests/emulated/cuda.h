// Runs CUDA C text on a CPU, and HIP's for a GPU whose wavefronts have 64 threads. Every thread is a fiber, blocks run one
// after another. Between barriers, threads run in an order drawn
// from a seed, so that a race changes the answer; shared memory starts as NaN; asynchronous copies land when waited for.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <utility>
#include <vector>

#define ELSA_EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
alignas(16) float4 memory[1 << 14];

namespace emulated {

#ifdef __GFX9__
constexpr int WARP = 64;
#else
constexpr int WARP = 32;
#endif

struct Copy { void* to; const void* from; int valid; };
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int block_waits = 0, warp_waits = 0;  // barriers reached
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  std::vector<unsigned> reads;  // where it read shared memory, in bytes, if asked to keep that
};

inline std::vector<Thread> threads;
inline std::vector<float> slots;  // of a shuffle, one for each thread
inline ucontext_t scheduler;
inline int running = 0;
inline unsigned current_block = 0;
inline const char* fault = nullptr;

inline void keep_read(const void* from) {
  threads[running].reads.push_back(static_cast<unsigned>(static_cast<const char*>(from) - reinterpret_cast<const char*>(memory)));
}

inline void yield() { swapcontext(&threads[running].context, &scheduler); }

inline bool passed(int thread, bool of_warp) {
  const int first = of_warp ? thread / WARP * WARP : 0, last = of_warp ? std::min<int>(first + WARP, threads.size()) : threads.size();
  for (int i = first; i < last; ++i) {
    const Thread& other = threads[i];
    const int reached = of_warp ? other.warp_waits : other.block_waits, mine = of_warp ? threads[thread].warp_waits : threads[thread].block_waits;
    if (reached < mine) {
      if (other.done) fault = "a thread ended before a barrier that others wait at";
      return false;
    }
  }
  return true;
}

inline void wait(bool of_warp) {
  const int me = running;
  ++(of_warp ? threads[me].warp_waits : threads[me].block_waits);
  while (!passed(me, of_warp) && !fault) yield();
}

template <class Body>
void run(unsigned blocks, int count, unsigned seed, const Body& body) {
  static const Body* entry;
  entry = &body;
  std::mt19937 random(seed);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    current_block = block;
    std::fill_n(reinterpret_cast<float*>(memory), sizeof(memory) / 4, NAN);
    threads.resize(count);
    slots.assign(count, NAN);
    for (Thread& thread : threads) {
      thread.done = false;
      thread.block_waits = thread.warp_waits = 0;
      thread.groups.clear();
      thread.open.clear();
      thread.reads.clear();
      thread.stack.resize(1 << 17);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, static_cast<void (*)()>([] { (*entry)(); threads[running].done = true; }), 0);
    }
    std::vector<int> turn(count);
    for (int i = 0; i < count; ++i) turn[i] = i;
    for (bool alive = true; alive && !fault;) {
      if (seed) std::shuffle(turn.begin(), turn.end(), random);
      alive = false;
      for (const int i : turn)
        if (!threads[i].done) {
          alive = true;
          running = i;
          swapcontext(&scheduler, &threads[i].context);
        }
    }
    if (fault) return;
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
void launch(void (*kernel)(A...), unsigned blocks, int count, unsigned seed, void** arguments) {
  run(blocks, count, seed, [&] { call(kernel, arguments, std::index_sequence_for<A...>{}); });
}

}  // namespace emulated

#define threadIdx (Index{static_cast<unsigned>(emulated::running)})
#define blockIdx (Index{emulated::current_block})
inline void __syncthreads() { emulated::wait(false); }
inline void __syncwarp() { emulated::wait(true); }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned last) { const unsigned old = *at; *at = old >= last ? 0 : old + 1; return old; }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const int me = emulated::running;
  emulated::slots[me] = x;
  __syncwarp();
  const float y = emulated::slots[me ^ mask];
  __syncwarp();
  return y;
}
inline float __shfl_xor(float x, int mask) { return __shfl_xor_sync(0, x, mask); }
inline int __any_sync(unsigned, int x) {
  const int me = emulated::running, first = me / emulated::WARP * emulated::WARP;
  emulated::slots[me] = x != 0;
  __syncwarp();
  bool some = false;
  for (size_t i = first; i < emulated::slots.size() && i < size_t(first + emulated::WARP); ++i) some |= emulated::slots[i] != 0;
  __syncwarp();
  return some;
}
inline int __any(int x) { return __any_sync(0, x); }
extern "C" inline float __ocml_native_exp2_f32(float x) { return exp2f(x); }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }

inline void copy_async(void* to, const void* from, int valid) { emulated::threads[emulated::running].open.push_back({to, from, valid}); }
inline void copy_commit() {
  emulated::Thread& me = emulated::threads[emulated::running];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
inline void copy_wait() {  // all but the newest ASYNC_AHEAD groups have landed
  emulated::Thread& me = emulated::threads[emulated::running];
  for (; me.groups.size() > ASYNC_AHEAD; me.groups.pop_front())
    for (const emulated::Copy& copy : me.groups.front()) {
      std::memset(copy.to, 0, COPY_BYTES);
      std::memcpy(copy.to, copy.from, copy.valid);
    }
}

extern "C" inline __attribute__((used)) const unsigned* emulated_reads(int thread, size_t* count) {  // of the last block
  *count = emulated::threads[thread].reads.size();
  return emulated::threads[thread].reads.data();
}

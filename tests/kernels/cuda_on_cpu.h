// CUDA's vocabulary on the CPU, as far as vq_attention_mma asks for it: one block at a time, a fiber for each thread.
// A thread runs until it meets others (__syncthreads, a warp's collective), which wait for the last of them.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) alignas(n)

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
  operator float() const { return static_cast<float>(value); }
};
struct __half2 { __half x, y; };
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }

template <typename To, typename From> To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const unsigned u = bits_as<unsigned>(x);
    bits = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return bits_as<float>(static_cast<unsigned>(bits) << 16); }
};
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::lrintf(x)); }
inline int __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) { return (*p += x) - x; }
using std::max;
using std::min;

struct Index { int x, y, z; };
constexpr int kNumThreads = 256;
static Index blockIdx, gridDim, threadIdx;
static ucontext_t scheduler, fibers[kNumThreads];
static bool finished[kNumThreads];

// Where `of` threads wait for each other.
struct Meeting {
  int waiting = 0, rounds = 0;
  void join(int of) {
    const int round = rounds, me = threadIdx.x;
    if (++waiting == of) {
      waiting = 0;
      rounds++;
    }
    while (rounds == round) {
      swapcontext(&fibers[me], &scheduler);
      threadIdx.x = me;
    }
  }
};
static Meeting block_meeting, warp_meetings[kNumThreads / 32];
inline void __syncthreads() { block_meeting.join(kNumThreads); }

// What a lane brings to a collective; two sets, so that nobody overwrites what others still read.
struct Words { unsigned a[4], b[2]; };
static Words brought[kNumThreads / 32][2][32];
inline const Words* exchange(const Words& mine) {
  Meeting& meeting = warp_meetings[threadIdx.x / 32];
  Words* all = brought[threadIdx.x / 32][meeting.rounds & 1];
  all[threadIdx.x % 32] = mine;
  meeting.join(32);
  return all;
}
template <typename T> T __shfl_sync(unsigned, T x, int lane) {
  return bits_as<T>(exchange({{bits_as<unsigned>(x)}, {}})[lane & 31].a[0]);
}
template <typename T> T __shfl_xor_sync(unsigned all, T x, int off) { return __shfl_sync(all, x, threadIdx.x % 32 ^ off); }
inline bool __any_sync(unsigned, bool x) {
  const Words* all = exchange({{x}, {}});
  return std::any_of(all, all + 32, [](const Words& w) { return w.a[0]; });
}

// Row r (0: g, 1: g + 8) of a times column 2t + k of b, for mma.m16n8k16 of halves and m16n8k32 of bytes.
template <typename Sum, typename F> void multiply(Sum (&c)[4], const Words& mine, F dot) {
  const Words* all = exchange(mine);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; i++)
    for (int q = 0; q < 4; q++)
      for (int h = 0; h < 2; h++)
        c[i] += dot(all[4 * g + q].a[i / 2 + 2 * h], all[4 * (2 * t + i % 2) + q].b[h]);
}
inline float dot_halves(unsigned a, unsigned b) {
  const auto at = [](unsigned w, int i) { return static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(w >> 16 * i))); };
  return at(a, 0) * at(b, 0) + at(a, 1) * at(b, 1);
}
template <bool b_unsigned> int dot_bytes(unsigned a, unsigned b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * (b_unsigned ? static_cast<int>(b >> i & 255) : static_cast<int8_t>(b >> i));
  return sum;
}
inline unsigned transposed(unsigned a) {
  const Words* all = exchange({{a}, {}});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto at = [&](int row) { return all[4 * row + g / 2].a[0] >> 16 * (g % 2) & 0xffff; };
  return at(2 * t) | at(2 * t + 1) << 16;
}

namespace vecinfer_mma {
alignas(1024) static unsigned char smem[1 << 17];
}
inline unsigned __cvta_generic_to_shared(const void* p) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(p) - vecinfer_mma::smem) + 1024;
}

// Runs thread() for every thread of every block, blocks in order.
template <typename F> void launch_grid(int blocks_x, int blocks_y, int blocks_z, F thread) {
  constexpr int kStack = 1 << 17;
  static std::vector<char> stacks(kNumThreads * kStack);
  static F run = thread;
  gridDim = {blocks_x, blocks_y, blocks_z};
  for (int block = 0; block < blocks_x * blocks_y * blocks_z; block++) {
    blockIdx = {block % blocks_x, block / blocks_x % blocks_y, block / blocks_x / blocks_y};
    std::memset(vecinfer_mma::smem, 0xff, sizeof(vecinfer_mma::smem));  // NaN wherever nobody wrote
    for (int i = 0; i < kNumThreads; i++) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks.data() + i * kStack;
      fibers[i].uc_stack.ss_size = kStack;
      finished[i] = false;
      makecontext(&fibers[i], +[] {
        const int me = threadIdx.x;
        run();
        finished[me] = true;
        swapcontext(&fibers[me], &scheduler);
      }, 0);
    }
    while (!std::all_of(finished, finished + kNumThreads, [](bool f) { return f; }))
      for (int i = 0; i < kNumThreads; i++)
        if (!finished[i]) {
          threadIdx = {i, 0, 0};
          swapcontext(&scheduler, &fibers[i]);
        }
  }
}

// mma/device: constants, and the instructions that CUDA C++ has no words for.
//
// What     one function an instruction or two, without state: products, transposes, loads and exp2 as the other files of
//          this folder use them. tests/kernels/cuda_on_cpu.py replaces those written in PTX.
// Memory   kTableBytes of tables at kSharedBase, where CUDA puts a block's dynamic shared memory.
// Numerics mma: float16 products, float32 sums; ex2 flushes denormals.
// Limits   a page of 64 tokens; blocks of 256 threads, two on a multiprocessor (128 registers a thread).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// MLX writes the kernel's signature; the register budget of two blocks per multiprocessor can only be set here.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)

namespace vecinfer_mma {

static_assert(VQ_PAGE_SIZE == 64, "a warp's scores and the 16-byte units of codes are those of 64 tokens");

constexpr int kWarps = 8, kThreads = 256, kPage = VQ_PAGE_SIZE, kQueryCols = 80, kMaxSlots = 20;
// Where CUDA puts a block's dynamic shared memory (the first KB is the system's); checked at run time.
constexpr int kSharedBase = 1024;
constexpr int kTableBytes = 256 * 256, kMaxSplits = 512;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kMasked = -1e30f, kNothingYet = -1e20f, kHeadroom = 6.f;

// n / d for n < 2^32 / d, given magic = ceil(2^32 / d), 0 for d = 1.
__device__ __forceinline__ int divide(int n, unsigned magic) { return magic ? __umulhi(n, magic) : n; }

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The whole block asks for `bytes` bytes.
template <int bytes> __device__ __forceinline__ void fetch_lines(const void* p) {
#pragma unroll
  for (int i = 0; i < bytes; i += kThreads * 128) {
    const int at = i + threadIdx.x * 128;
    if (i + kThreads * 128 <= bytes || at < bytes) prefetch(static_cast<const char*>(p) + at);
  }
}

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned transpose8x8(unsigned a) {
  unsigned d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

__device__ __forceinline__ unsigned pack(float a, float b) {
  __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<unsigned*>(&h);
}

__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// *p, of a multiple of 16 bytes, by loads that stay where they stand: others may sink below what waits for memory.
template <typename T> __device__ __forceinline__ T load_now(const T* p) {
  union {
    T value;
    uint4 part[sizeof(T) / 16];
  } v;
#pragma unroll
  for (int i = 0; i < sizeof(T) / 16; i++)
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(v.part[i].x), "=r"(v.part[i].y), "=r"(v.part[i].z), "=r"(v.part[i].w)
                 : "l"(reinterpret_cast<const uint4*>(p) + i));
  return v.value;
}

__device__ __forceinline__ unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ int reverse3(int g) { return ((g & 1) << 2) | (g & 2) | (g >> 2); }

template <typename T> __device__ __forceinline__ float to_float(T x) { return static_cast<float>(x); }
template <typename T> __device__ __forceinline__ T from_float(float x) { return static_cast<T>(x); }

// o += values . p for two dims of four tokens (a, b, c, e: tokens 2t, 2t+1, 2t+8, 2t+9).
__device__ __forceinline__ void add_values(float (&o)[4], unsigned a, unsigned b, unsigned c, unsigned e,
                                           const unsigned (&p)[2]) {
  mma(o, __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, e, 0x5410), __byte_perm(c, e, 0x7632), p[0],
      p[1]);
}

}  // namespace vecinfer_mma

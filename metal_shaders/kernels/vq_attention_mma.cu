// vq_attention_mma: decode attention over packed pages and exact tokens on NVIDIA tensor cores, in one launch.
//
// What     out = softmax(q . k) v for up to 8 query columns (heads of a KV head's group x new positions) at a time. Keys
//          are read as codes, bucket by bucket, with q~_b = T^-T R(-b) q (made here, on tensor cores, per block) and the
//          mean term q'_b . mean as the scores' starting value; sinks and ring are exact vectors in code space. The last
//          block of a (row, KV head, column group) merges the splits and applies the values' inverse and mean.
// Inputs   queries [B, Hq, L, D] T; pool, page_table [B, max_pages] int32, codes in pack_block's order (page_layout.h);
//          ring_* [B, Hkv, R, D], sink_* [B, Hkv, S, D] float16; key_tables, value_tables [Hkv, G, 256, d] float16;
//          steps: see vq_attention_mma_int8.cu;
//          query_frags [Hkv, D/16, D/16, 32, 8] float16 (the keys' inverse, see attention_mma.py), key_mean [Hkv, D]
//          float32, channels int32 [D] (rotary pairs as (i, i + D/2)), trig [buckets, 2, D/2] float32 (cos, sin);
//          value_inverse [Hkv, D, D] float16, value_mean [Hkv, D] float32; rows (struct Row), params (struct Params) int32;
//          tickets int32, zero before and after every launch.
// Outputs  out [B, Hq, L, D] T; partial [pairs, splits, NC, D] and stats [pairs, splits, NC, 2] float32, scratch.
// Launch   grid (splits, Hkv x column groups, B) blocks of 256 threads; a row's split is `pages_per_split` pages, the
//          exact tokens (counted as `exact_pages` pages) go to its last split; blocks beyond a row's splits return.
// Template T, D 64 | 128, KD, VD sub-vector sizes 2 | 4 | 8, KG, VG tables 1 | 2 | 4 (VD 8: 1 | 2), HKV KV heads, GQA query
//          heads of each, L new positions, PERM 1 when `channels` is not the identity; MathOf: HalfMath, or Int8Math of
//          vq_attention_mma_int8.cu, which takes its place where tables and columns allow.
// Memory   64 KB tables (row c of 256 bytes: entry c of the keys, once per lane that may ask for it, so that no two lanes
//          share a bank; then of the values) + 2 x 80 columns of D halves: two blocks per multiprocessor.
// Bytes    per page and head 64 (key_bytes + value_bytes), each read once per column group, 16 bytes a load.
// Numerics scores and sums float32; queries, both inverses and all operands float16; weights p are
//          float16 with at most 2^6 of headroom over the running maximum. Relative error about 1e-3.
// Limits   one section per codec; pool below 256 GiB in units of 64 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// MLX writes the kernel's signature; the register budget of two blocks per multiprocessor can only be set here.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)

#ifndef VQ_IN_FLIGHT
#define VQ_IN_FLIGHT 6
#endif

namespace vecinfer_mma {

static_assert(VQ_PAGE_SIZE == 64, "a warp's scores and the 16-byte units of codes are those of 64 tokens");

constexpr int kWarps = 8, kThreads = 256, kPage = VQ_PAGE_SIZE, kQueryCols = 80, kMaxSlots = 20;
// Where CUDA puts a block's dynamic shared memory (the first KB is the system's); checked at run time.
constexpr int kSharedBase = 1024;
constexpr int kInFlight = VQ_IN_FLIGHT;
constexpr int kTableBytes = 256 * 256, kMaxSplits = 512;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kMasked = -1e30f, kNothingYet = -1e20f, kHeadroom = 6.f;

struct __align__(16) Params {
  int window, num_sinks, ring_slots, pages_per_split, max_pages, bucket_pages;
  unsigned bucket_magic, slab_magic, pages_per_slab, slab_units, page_units, layer_units;  // units of 64 bytes
  float scale;  // softmax scale x log2(e)
  int unused[3];
};

// What the host knows of a row: np of its first and last query, its splits, the ring's first bucket and the buckets of
// the exact tokens (the sinks' counted once).
struct __align__(16) Row {
  int start, min_pages, num_pages, splits, exact_bucket, exact_slots, unused[2];
};

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

// Entries of one table row as seen by a lane: `column` is the lane's byte offset in the row.
template <int d> struct Entry;
template <> struct Entry<2> { using type = unsigned; };
template <> struct Entry<4> { using type = uint2; };
template <> struct Entry<8> { using type = uint4; };

// Table entry of byte k of w, `offset` bytes into its row: rows of 256 bytes, so one PRMT makes the address, and the base
// is an immediate.
template <int d, int offset = 0>
__device__ __forceinline__ typename Entry<d>::type look_up(unsigned column, unsigned w, int k) {
  const unsigned at = __byte_perm(w, column, 0x5504 | (k << 4));
  typename Entry<d>::type e;
  if constexpr (d == 2) {
    asm("ld.shared.u32 %0,[%1+%2];" : "=r"(e) : "r"(at), "n"(kSharedBase + offset));
  } else if constexpr (d == 4) {
    asm("ld.shared.v2.u32 {%0,%1},[%2+%3];" : "=r"(e.x), "=r"(e.y) : "r"(at), "n"(kSharedBase + offset));
  } else {
    asm("ld.shared.v4.u32 {%0,%1,%2,%3},[%4+%5];"
        : "=r"(e.x), "=r"(e.y), "=r"(e.z), "=r"(e.w)
        : "r"(at), "n"(kSharedBase + offset));
  }
  return e;
}

// s[tile] += keys . queries for unit u of the lane: two sub-vectors of tokens tile*16 + half*8 + g.
template <int D, int d>
__device__ __forceinline__ void score_unit(float (&s)[4][4], const uint4& w, int u, const unsigned (&q)[D / 16][2], unsigned column) {
#pragma unroll
  for (int tile = 0; tile < 4; tile++) {
    const int k = (tile & 1) * 2;
    if constexpr (d == 2) {
      const unsigned a = word(w, tile / 2), b = word(w, 2 + tile / 2);
      mma(s[tile], look_up<2>(column, a, k), look_up<2>(column, a, k + 1), look_up<2>(column, b, k),
          look_up<2>(column, b, k + 1), q[u][0], q[u][1]);
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const unsigned a = word(w, 2 * j + tile / 2);
        const auto e = look_up<d>(column, a, k), f = look_up<d>(column, a, k + 1);
        if constexpr (d == 4) {
          mma(s[tile], e.x, f.x, e.y, f.y, q[2 * u + j][0], q[2 * u + j][1]);
        } else {
          mma(s[tile], e.x, f.x, e.y, f.y, q[4 * u + 2 * j][0], q[4 * u + 2 * j][1]);
          mma(s[tile], e.z, f.z, e.w, f.w, q[4 * u + 2 * j + 1][0], q[4 * u + 2 * j + 1][1]);
        }
      }
    }
  }
}

// The same for up to 4 columns, without moves: an entry (d 8), or the entries of two sub-vectors (d 4), are one operand
// as they come, rows g holding one half of a token's dims and rows g + 8 the other; columns 0-3 multiply the first half,
// columns 4-7 the second (see Queries). c[o] belongs to the 8 tokens o*8 + g.
template <int D, int d>
__device__ __forceinline__ void score_halves(float (&c)[8][4], const uint4& w, int u, const unsigned (&q)[D / 32][2],
                                             unsigned column) {
#pragma unroll
  for (int o = 0; o < 8; o++) {
    const auto e = look_up<d>(column, word(w, o / 4), o % 4), f = look_up<d>(column, word(w, 2 + o / 4), o % 4);
    if constexpr (d == 4) {
      mma(c[o], e.x, e.y, f.x, f.y, q[u][0], q[u][1]);
    } else {
      mma(c[o], e.x, e.y, e.z, e.w, q[2 * u][0], q[2 * u][1]);
      mma(c[o], f.x, f.y, f.z, f.w, q[2 * u + 1][0], q[2 * u + 1][1]);
    }
  }
}

// Adds the halves: lanes t < 2 keep tokens g of a, lanes t >= 2 tokens g of b, both columns 2 (t % 2) and the next.
__device__ __forceinline__ void join_halves(float (&s)[2], const float (&a)[4], const float (&b)[4]) {
  const bool low = threadIdx.x % 4 < 2;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const float other = __shfl_xor_sync(kAll, low ? b[k] : a[k + 2], 2);
    s[k] = (low ? a[k] : b[k + 2]) + other;
  }
}

// o += values . p for two dims of four tokens (a, b, c, e: tokens 2t, 2t+1, 2t+8, 2t+9).
__device__ __forceinline__ void add_values(float (&o)[4], unsigned a, unsigned b, unsigned c, unsigned e,
                                           const unsigned (&p)[2]) {
  mma(o, __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, e, 0x5410), __byte_perm(c, e, 0x7632), p[0],
      p[1]);
}

// o += values . p for unit u of the lane: one sub-vector of tokens tile*16 + hi*8 + 2t + lo.
template <int D, int d>
__device__ __forceinline__ void value_unit(float (&o)[D / 16][4], const uint4& w, int u, const unsigned (&p)[4][2], unsigned column) {
#pragma unroll
  for (int tile = 0; tile < 4; tile++) {
    const unsigned c = word(w, tile);
    const auto e0 = look_up<d>(column, c, 0), e1 = look_up<d>(column, c, 1),
               e2 = look_up<d>(column, c, 2), e3 = look_up<d>(column, c, 3);
    if constexpr (d == 2) {
      add_values(o[u], e0, e1, e2, e3, p[tile]);
    } else {
      add_values(o[d / 2 * u], e0.x, e1.x, e2.x, e3.x, p[tile]);
      add_values(o[d / 2 * u + 1], e0.y, e1.y, e2.y, e3.y, p[tile]);
      if constexpr (d == 8) {
        add_values(o[4 * u + 2], e0.z, e1.z, e2.z, e3.z, p[tile]);
        add_values(o[4 * u + 3], e0.w, e1.w, e2.w, e3.w, p[tile]);
      }
    }
  }
}

// 16-byte chunk x (of 8) of a row's keys or values: the entries of the lanes whose columns lie in it.
template <int d, int G, bool values>
__device__ __forceinline__ uint4 table_chunk(const typename Entry<d>::type (&e)[G], int x) {
  auto pick = [&](int quarter) {  // quarter: which quarter of the sub-vectors the lane reads
    const int table = quarter * G / 4;
    auto r = e[0];
#pragma unroll
    for (int i = 1; i < G; i++)
      if (table == i) r = e[i];
    return r;
  };
  // A lane's quarter: its t for keys; the two high bits of reverse3(g) for values.
  if constexpr (d == 2) {
    if constexpr (values) {
      const unsigned r = pick(reverse3(x) >> 1);
      return make_uint4(r, r, r, r);
    } else {
      return make_uint4(pick(0), pick(1), pick(2), pick(3));
    }
  } else if constexpr (d == 4) {
    const uint2 a = pick(values ? reverse3((x >> 1) & 3) >> 1 : (2 * x) & 3);
    const uint2 b = values ? a : pick((2 * x + 1) & 3);
    return make_uint4(a.x, a.y, b.x, b.y);
  } else {
    return pick(values ? reverse3(x >> 2) >> 1 : x & 3);
  }
}

// Row threadIdx.x of the tables: entries of one code from all G tables, loaded early and spread over the row later.
template <int d, int G, bool values> struct TableRow {
  static constexpr int kBytes = G * 256 * d * 2;  // of one head's tables
  typename Entry<d>::type e[G];

  __device__ __forceinline__ void load(const unsigned char* source) {
#pragma unroll
    for (int i = 0; i < G; i++) e[i] = reinterpret_cast<const typename Entry<d>::type*>(source)[i * 256 + threadIdx.x];
  }
  __device__ __forceinline__ void spread(unsigned char* tables) const {
    const int row = threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int x = (i + row) & 7;  // lanes start at different chunks: no bank conflicts
      *reinterpret_cast<uint4*>(tables + row * 256 + (values ? 128 : 0) + x * 16) = table_chunk<d, G, values>(e, x);
    }
  }
};

// Online softmax state of a warp: lane (g, t) holds columns 2t and 2t+1 (halves: 2 (t % 2) and the next), output dims of
// run reverse3(g).
template <int D, bool halves> struct State {
  float o[D / 16][4];
  float max0, max1, sum0, sum1;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < D / 16; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    max0 = max1 = kNothingYet;
    sum0 = sum1 = 0.f;
  }

  // Raise the maxima when the scores exceed them by more than float16 weights can carry.
  template <int N, int K> __device__ __forceinline__ void raise(const float (&s)[N][K]) {
    float a = s[0][0], b = s[0][1];
#pragma unroll
    for (int i = 0; i < N; i++) {
      a = fmaxf(a, fmaxf(s[i][0], s[i][K - 2]));
      b = fmaxf(b, fmaxf(s[i][1], s[i][K - 1]));
    }
    if (!__any_sync(kAll, a > max0 + kHeadroom || b > max1 + kHeadroom)) return;
#pragma unroll
    for (int off = halves ? 2 : 4; off < 32; off <<= 1) {
      a = fmaxf(a, __shfl_xor_sync(kAll, a, off));
      b = fmaxf(b, __shfl_xor_sync(kAll, b, off));
    }
    a = fmaxf(a, max0);
    b = fmaxf(b, max1);
    const float r0 = ex2(max0 - a), r1 = ex2(max1 - b);
    max0 = a;
    max1 = b;
    sum0 *= r0;
    sum1 *= r1;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      o[i][0] *= r0;
      o[i][1] *= r1;
      o[i][2] *= r0;
      o[i][3] *= r1;
    }
  }

  // Weights of 16 tokens as the second operand of value_unit.
  __device__ __forceinline__ void weigh(const float (&s)[4], unsigned (&p)[2]) {
    const float e0 = ex2(s[0] - max0), e1 = ex2(s[1] - max1), e2 = ex2(s[2] - max0), e3 = ex2(s[3] - max1);
    sum0 += e0 + e2;
    sum1 += e1 + e3;
    p[0] = transpose8x8(pack(e0, e1));
    p[1] = transpose8x8(pack(e2, e3));
  }
  __device__ __forceinline__ void weigh(const float (&s)[2], unsigned (&p)[2]) {
    const float e0 = ex2(s[0] - max0), e1 = ex2(s[1] - max1);
    sum0 += e0;
    sum1 += e1;
    p[0] = transpose8x8(pack(e0, e1));
    p[1] = __shfl_xor_sync(kAll, p[0], 16);
  }
};

// Shared memory behind the tables.
template <int D> struct Scratch {
  __half made[kQueryCols * D];    // q~ as operands of score_unit, [slot][D/32][column, t][8]
  __half turned[kQueryCols * D];  // q' as operands of make_queries, [tile of 8 columns][D/32][column, t][8]
  float mean_score[kQueryCols];
  float unit[8];      // of each column's queries and scores, where they are whole multiples of it
  float per_unit[8];  // 1 / unit
  int pages_seen[8];  // np(i) of each column
  int flag;
};

// Which bucket a query slot belongs to: buckets of the round's pages, then those of the exact tokens.
struct Slots {
  int first_bucket, num_page_slots, num_slots, exact_bucket;
  __device__ __forceinline__ int bucket(int slot) const {
    const int i = slot - num_page_slots;
    return i < 0 ? first_bucket + slot : i == 0 ? 0 : exact_bucket + i - 1;
  }
};

// q' = R(-b) q and q' . mean of every slot and column. A thread turns 4 rotary pairs of one column in every slot.
template <typename T, int D, int NC, bool PERM> struct Turner {
  static constexpr int kLanes = D / 8, kStep = kThreads / kLanes / NC;
  static constexpr int kSlots = kQueryCols / NC < kMaxSlots ? kQueryCols / NC : kMaxSlots;
  static constexpr int kPasses = (kSlots + kStep - 1) / kStep;
  float a[4], b[4], mean_a[4], mean_b[4];
  static constexpr int kEarly = kPasses < 5 ? kPasses : 5;
  float4 c[kEarly], s[kEarly];
  int x, column, first_slot;

  __device__ __forceinline__ Turner(const T* q, const float* mean, const int* channels, int num_columns) {
    x = threadIdx.x % kLanes;
    column = threadIdx.x / kLanes % NC;
    first_slot = threadIdx.x / kLanes / NC;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int i = 4 * x + k, ca = PERM ? channels[i] : i, cb = PERM ? channels[i + D / 2] : i + D / 2;
      a[k] = column < num_columns ? to_float(q[column * D + ca]) : 0.f;
      b[k] = column < num_columns ? to_float(q[column * D + cb]) : 0.f;
    }
    const float4 u = *reinterpret_cast<const float4*>(mean + 4 * x), v = *reinterpret_cast<const float4*>(mean + D / 2 + 4 * x);
    mean_a[0] = u.x, mean_a[1] = u.y, mean_a[2] = u.z, mean_a[3] = u.w;
    mean_b[0] = v.x, mean_b[1] = v.y, mean_b[2] = v.z, mean_b[3] = v.w;
  }

  // cos and sin for the slots of passes first ... first + kEarly - 1
  __device__ __forceinline__ void load(const Slots& slots, const float* trig, int first) {
#pragma unroll
    for (int i = 0; i < kEarly; i++) {
      const int slot = first_slot + (first + i) * kStep;
      if (slot < slots.num_slots) {
        const float* at = trig + (size_t)slots.bucket(slot) * D + 4 * x;
        c[i] = __ldg(reinterpret_cast<const float4*>(at));
        s[i] = __ldg(reinterpret_cast<const float4*>(at + D / 2));
      }
    }
  }

  // The first lanes of a column leave ||q'|| x bound as its unit.
  __device__ __forceinline__ void set_unit(Scratch<D>& sh, float bound) const {
    float norm = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++) norm += a[k] * a[k] + b[k] * b[k];
#pragma unroll
    for (int off = 1; off < kLanes; off <<= 1) norm += __shfl_xor_sync(kAll, norm, off);
    if (x == 0 && first_slot == 0) {
      const float unit = fmaxf(sqrtf(norm) * bound, 1e-30f);
      sh.unit[column] = unit;
      sh.per_unit[column] = 1.f / unit;
    }
  }

  __device__ __forceinline__ void turn(Scratch<D>& sh, const Slots& slots, const float* trig, float scale) {
#pragma unroll
    for (int first = 0; first < kPasses; first += kEarly) {
      if (first * kStep >= slots.num_slots) break;
      if (first) load(slots, trig, first);
#pragma unroll
      for (int i = 0; i < kEarly; i++) {
        const int slot = first_slot + (first + i) * kStep;
        const float cc[4] = {c[i].x, c[i].y, c[i].z, c[i].w}, ss[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
        float ra[4], rb[4], dot = 0.f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          ra[k] = (a[k] * cc[k] + b[k] * ss[k]) * scale;
          rb[k] = (b[k] * cc[k] - a[k] * ss[k]) * scale;
          dot += ra[k] * mean_a[k] + rb[k] * mean_b[k];
        }
#pragma unroll
        for (int off = 1; off < kLanes; off <<= 1) dot += __shfl_xor_sync(kAll, dot, off);
        if (slot < slots.num_slots && first_slot < kStep) {
          const int f = slot * NC + column;
          if (x == 0) sh.mean_score[f] = dot;
          store(sh, f, x, ra);
          store(sh, f, D / 8 + x, rb);
        }
      }
    }
  }

  // Four channels are one thread's operand: group i belongs to t = i % 4 of step i / 4.
  static __device__ __forceinline__ void store(Scratch<D>& sh, int f, int i, const float (&v)[4]) {
    const int step = i / 4, at = (((f / 8) * (D / 32) + step / 2) * 32 + (f % 8) * 4 + i % 4) * 8 + step % 2 * 4;
    *reinterpret_cast<uint2*>(sh.turned + at) = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
  }
};

// q~ = inverse . q' for every slot and column; a warp makes 16 dims of them. store(slot, column, quarter, rest, a, b)
// keeps dims `rest` and the next of a quarter.
template <int D, int NC> struct Maker {
  static constexpr int kTiles = D / 16;
  uint4 a[kTiles];

  __device__ __forceinline__ void load(const uint4* frags) {
    const int lane = threadIdx.x % 32, tile = threadIdx.x / 32 % kTiles;
#pragma unroll
    for (int i = 0; i < kTiles; i++) a[i] = load_once(frags + (tile * kTiles + i) * 32 + lane);
  }

  template <typename F> __device__ __forceinline__ void make(const Scratch<D>& sh, int num_slots, F store) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, tile = warp % kTiles;
    const int num_columns = num_slots * NC, dim = 16 * tile + 2 * g, quarter = dim / (D / 4), rest = dim % (D / 4);
#pragma unroll 2
    for (int n = warp / kTiles; n * 8 < num_columns; n += kWarps / kTiles) {
      float c[2][4] = {};
#pragma unroll
      for (int u = 0; u < D / 32; u++) {
        const uint4 b = *reinterpret_cast<const uint4*>(sh.turned + ((n * (D / 32) + u) * 32 + lane) * 8);
        mma(c[0], a[2 * u].x, a[2 * u].y, a[2 * u].z, a[2 * u].w, b.x, b.y);
        mma(c[1], a[2 * u + 1].x, a[2 * u + 1].y, a[2 * u + 1].z, a[2 * u + 1].w, b.z, b.w);
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int f = n * 8 + 2 * t + k;
        if (f < num_columns) store(f / NC, f % NC, quarter, rest, c[0][k] + c[1][k], c[0][k + 2] + c[1][k + 2]);
      }
    }
  }
};

// How Maker leaves queries for Queries.
template <int D, int NC>
__device__ __forceinline__ void store_halves(Scratch<D>& sh, int slot, int column, int quarter, int rest, float a, float b) {
  const int at = slot * (NC * D) + (rest / 8 * (NC * 4) + column * 4 + quarter) * 8 + rest % 8;
  *reinterpret_cast<unsigned*>(sh.made + at) = pack(a, b);
}

// One slot's queries in registers, for score_unit or score_halves, and what the scores start from.
template <int D, int NC, bool halves> struct Queries {
  unsigned q[halves ? D / 32 : D / 16][2];
  float mean0, mean1;

  __device__ __forceinline__ void load(const Scratch<D>& sh, int slot) {
    const int lane = threadIdx.x % 32, t = lane % 4, from = halves ? lane % 16 : lane;
#pragma unroll
    for (int u = 0; u < D / 32; u++) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (from < NC * 4) v = *reinterpret_cast<const uint4*>(sh.made + slot * NC * D + (u * NC * 4 + from) * 8);
      if constexpr (halves) {
        q[u][0] = lane < 16 ? v.x : v.y;
        q[u][1] = lane < 16 ? v.z : v.w;
      } else {
        q[2 * u][0] = v.x;
        q[2 * u][1] = v.y;
        q[2 * u + 1][0] = v.z;
        q[2 * u + 1][1] = v.w;
      }
    }
    mean0 = 2 * t < NC ? sh.mean_score[slot * NC + 2 * t] : 0.f;
    mean1 = 2 * t + 1 < NC ? sh.mean_score[slot * NC + 2 * t + 1] : 0.f;
  }
};

// A warp's share of a round's pages, and where they lie: lane i knows page first + i.
struct Share {
  int first, count;
  unsigned units;

  __device__ __forceinline__ Share(const Params& p, const int* table, int head_units, int begin, int end) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = end - begin;
    first = begin + n * warp / kWarps;
    count = begin + n * (warp + 1) / kWarps - first;
    units = 0;
    if (lane < count) {
      const unsigned page = table[first + lane], slab = divide(page, p.slab_magic);
      units = slab * p.slab_units + (page - slab * p.pages_per_slab) * p.page_units + p.layer_units + head_units;
    }
  }
  __device__ __forceinline__ const uint4* page(const unsigned char* pool, int i) const {
    return reinterpret_cast<const uint4*>(pool + (size_t)__shfl_sync(kAll, units, i) * 64) + threadIdx.x % 32;
  }
  // Ask for the first pages early, without holding registers for them.
  __device__ __forceinline__ void fetch(const unsigned char* pool, int head_bytes) const {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < min(count, 2); i++) {
      const unsigned char* at = pool + (size_t)__shfl_sync(kAll, units, i) * 64;
#pragma unroll 1
      for (int byte = lane * 128; byte < head_bytes; byte += 32 * 128) prefetch(at + byte);
    }
  }
};

// Largest divisor of n up to limit.
constexpr int divisor(int n, int limit) {
  while (n % limit) limit--;
  return limit;
}

// Codes in flight: a page is `units` loads of 16 bytes a lane, keys first; the next kRing of them are under way.
template <int units> struct Stream {
  static constexpr int kRing = divisor(units, kInFlight);
  uint4 unit[kRing];

  __device__ __forceinline__ void start(const uint4* page) {
#pragma unroll
    for (int i = 0; i < kRing; i++) unit[i] = load_once(page + i * 32);
  }
  __device__ __forceinline__ uint4 take(int n, const uint4* page, const uint4* next) {
    const uint4 v = unit[n % kRing];
    unit[n % kRing] = load_once((n + kRing < units ? page : next - units * 32) + (n + kRing) * 32);
    return v;
  }
};

// Shared memory of the merge, where the tables were.
template <int D, int NC> struct Merge {
  // Every warp's sums [warp][column][D]; then sums over parts of the splits [part][column][D]; then the products of
  // write_out [part][column][D], 4 a thread and column.
  float parts[kThreads * 4 * NC];
  float warp_stats[kWarps * NC * 2];  // (max, sum) [warp][column]
  float sums[NC * D];                 // [column][D]
  float stats[NC * 2];                // (max, sum) [column]
  float weights[kMaxSplits * NC];     // [split][column]
};

// Where dim i of a warp's sums lies: the 16-byte chunks of a run are turned by its g, so that lanes do not share banks.
template <int D> __device__ __forceinline__ int turned_dim(int i) {
  constexpr int kChunks = D / 32;
  const int run = i / (D / 8), chunk = i / 4 % kChunks;
  return run * (D / 8) + (chunk + reverse3(run)) % kChunks * 4 + i % 4;
}

// Leaves a lane's share of a column: dims 2i, 2i + 1 of its run are o[i][k], o[i][k + K / 2].
template <int D, int NC, int N, int K>
__device__ __forceinline__ void leave_column(Merge<D, NC>& sh, int column, const float (&o)[N][K], int k, float max, float sum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, run = reverse3(g), at = warp * NC + column;
#pragma unroll
  for (int i = 0; i < N; i += 2)
    *reinterpret_cast<float4*>(sh.parts + at * D + turned_dim<D>(run * (D / 8) + 2 * i)) =
        make_float4(o[i][k], o[i][k + K / 2], o[i + 1][k], o[i + 1][k + K / 2]);
  if (g == 0) {
    sh.warp_stats[at * 2] = max;
    sh.warp_stats[at * 2 + 1] = sum;
  }
}

// The arithmetic of a warp: tables, queries, scores and values as float16, and its softmax state. Lane (g, t) holds
// kScores scores of each tile of 16 tokens: token_of and column_of say whose.
template <int D, int KD, int VD, int KG, int VG, int NC> struct HalfMath {
  static constexpr bool kHalves = NC <= 4 && KD != 2;
  static constexpr int kScores = kHalves ? 2 : 4, kKeyUnits = D / KD / 8, kValueUnits = D / VD / 8;
  static constexpr bool kWhole = false;  // queries are whole multiples of a unit
  using KeyRow = TableRow<KD, KG, false>;
  using ValueRow = TableRow<VD, VG, true>;
  State<D, kHalves> state;
  Queries<D, NC, kHalves> q;
  unsigned key_column, value_column;

  static __device__ __forceinline__ int token_of(int g, int t, int i) { return g + 8 * (kHalves ? t / 2 : i / 2); }
  static __device__ __forceinline__ int column_of(int t, int i) { return kHalves ? 2 * (t % 2) + i : 2 * t + i % 2; }


  __device__ __forceinline__ void load(const float*) {}
  __device__ __forceinline__ void start() {
    const int lane = threadIdx.x % 32;
    key_column = (lane * KD * 2) & 127;
    value_column = ((lane * VD * 2) & 127) | 128;
    state.clear();
  }
  static __device__ __forceinline__ void store(Scratch<D>& sh, const Slots&, int slot, int column, int quarter, int rest,
                                               float a, float b) {
    store_halves<D, NC>(sh, slot, column, quarter, rest, a, b);
  }
  __device__ __forceinline__ void load(const Scratch<D>& sh, int slot) { q.load(sh, slot); }
  __device__ __forceinline__ void load_exact(const Scratch<D>& sh, int slot) { q.load(sh, slot); }

  // Scores of a page. take(n) gives unit n of its codes.
  template <typename F>
  __device__ __forceinline__ void score(float (&s)[4][kScores], const Scratch<D>&, F take) const {
    if constexpr (kHalves) {
      float c[8][4];
#pragma unroll
      for (int o = 0; o < 8; o++) {
        c[o][0] = q.mean0;
        c[o][1] = q.mean1;
        c[o][2] = c[o][3] = 0.f;
      }
#pragma unroll
      for (int u = 0; u < kKeyUnits; u++) score_halves<D, KD>(c, take(u), u, q.q, key_column);
#pragma unroll
      for (int tile = 0; tile < 4; tile++) join_halves(s[tile], c[2 * tile], c[2 * tile + 1]);
    } else {
#pragma unroll
      for (int tile = 0; tile < 4; tile++) {
        s[tile][0] = s[tile][2] = q.mean0;
        s[tile][1] = s[tile][3] = q.mean1;
      }
#pragma unroll
      for (int u = 0; u < kKeyUnits; u++) score_unit<D, KD>(s, take(u), u, q.q, key_column);
    }
  }

  // Takes the page's values into the state.
  template <typename F> __device__ __forceinline__ void add(const float (&s)[4][kScores], F take) {
    state.raise(s);
    unsigned w[4][2];
#pragma unroll
    for (int tile = 0; tile < 4; tile++) state.weigh(s[tile], w[tile]);
#pragma unroll
    for (int u = 0; u < kValueUnits; u++) value_unit<D, VD>(state.o, take(kKeyUnits + u), u, w, value_column);
  }

  // The same for 16 exact tokens: k0 and k1 are the lane's quarters of keys g and g + 8; values are two dims of tokens
  // 2t, 2t + 1, 2t + 8, 2t + 9.
  __device__ __forceinline__ void score_exact(float (&s)[kScores], const uint4* k0, const uint4* k1) const {
    if constexpr (kHalves) {
      float c0[4] = {q.mean0, q.mean1, 0.f, 0.f}, c1[4] = {q.mean0, q.mean1, 0.f, 0.f};
#pragma unroll
      for (int u = 0; u < D / 32; u++) {
        const uint4 a = k0[u], b = k1[u];
        mma(c0, a.x, a.y, a.z, a.w, q.q[u][0], q.q[u][1]);
        mma(c1, b.x, b.y, b.z, b.w, q.q[u][0], q.q[u][1]);
      }
      join_halves(s, c0, c1);
    } else {
      s[0] = s[2] = q.mean0;
      s[1] = s[3] = q.mean1;
#pragma unroll
      for (int u = 0; u < D / 32; u++) {
        const uint4 a = k0[u], b = k1[u];
        mma(s, a.x, b.x, a.y, b.y, q.q[2 * u][0], q.q[2 * u][1]);
        mma(s, a.z, b.z, a.w, b.w, q.q[2 * u + 1][0], q.q[2 * u + 1][1]);
      }
    }
  }
  __device__ __forceinline__ void weigh_exact(const float (&s)[1][kScores], unsigned (&w)[2]) {
    state.raise(s);
    state.weigh(s[0], w);
  }
  __device__ __forceinline__ void add_exact(int i, unsigned a, unsigned b, unsigned c, unsigned e, const unsigned (&w)[2]) {
    add_values(state.o[i], a, b, c, e, w);
  }

  __device__ __forceinline__ void total_sums() {
#pragma unroll
    for (int off = kHalves ? 2 : 4; off < 32; off <<= 1) {
      state.sum0 += __shfl_xor_sync(kAll, state.sum0, off);
      state.sum1 += __shfl_xor_sync(kAll, state.sum1, off);
    }
  }
  __device__ __forceinline__ void leave(Merge<D, NC>& sh) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; k++)
      if (2 * t + k < NC) leave_column<D, NC>(sh, 2 * t + k, state.o, k, k ? state.max1 : state.max0, k ? state.sum1 : state.sum0);
  }
};

// Attention over the 16 exact tokens from position `first` on: sinks, or the ring.
template <int D, int L, typename Math>
__device__ __forceinline__ void exact_tile(Math& math, const Params& p, const Row& row, int first_column, int first,
                                           bool sinks, const __half* keys, const __half* values) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, run = reverse3(g);
  const int first_slot = first % p.ring_slots, last = row.start + L - 1;
  auto slot = [&](int i) {  // of token first + i
    if (sinks) return min(first + i, p.num_sinks - 1);
    const int s = first_slot + min(i, last - first);
    return s >= p.ring_slots ? s - p.ring_slots : s;
  };
  float s[1][Math::kScores];
  math.score_exact(s[0], reinterpret_cast<const uint4*>(keys + slot(g) * D + t * (D / 4)),
                   reinterpret_cast<const uint4*>(keys + slot(g + 8) * D + t * (D / 4)));
#pragma unroll
  for (int i = 0; i < Math::kScores; i++) {
    const int j = first + Math::token_of(g, t, i), end = row.start + (first_column + Math::column_of(t, i)) % L;
    const int begin = max(p.num_sinks, num_code_pages(end, p.window) * kPage);
    if (j > end || (sinks ? j >= p.num_sinks : j < begin)) s[0][i] = kMasked;
  }
  unsigned w[2];
  math.weigh_exact(s, w);
  const int at = run * (D / 8);
  const uint4* v0 = reinterpret_cast<const uint4*>(values + slot(2 * t) * D + at);
  const uint4* v1 = reinterpret_cast<const uint4*>(values + slot(2 * t + 1) * D + at);
  const uint4* v2 = reinterpret_cast<const uint4*>(values + slot(2 * t + 8) * D + at);
  const uint4* v3 = reinterpret_cast<const uint4*>(values + slot(2 * t + 9) * D + at);
#pragma unroll
  for (int u = 0; u < D / 64; u++) {
    const uint4 a = v0[u], b = v1[u], c = v2[u], e = v3[u];
#pragma unroll
    for (int i = 0; i < 4; i++) math.add_exact(4 * u + i, word(a, i), word(b, i), word(c, i), word(e, i), w);
  }
}

// Merges the warps' states, left in sh.parts and sh.warp_stats, into sh.sums and sh.stats.
template <int D, int NC> __device__ __forceinline__ void merge_warps(Merge<D, NC>& sh) {
  for (int i = threadIdx.x; i < NC * D; i += kThreads) {
    const int c = i / D;
    float top = kNothingYet, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) top = fmaxf(top, sh.warp_stats[(w * NC + c) * 2]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float r = ex2(sh.warp_stats[(w * NC + c) * 2] - top);
      total += r * sh.warp_stats[(w * NC + c) * 2 + 1];
      value += r * sh.parts[(w * NC + c) * D + turned_dim<D>(i % D)];
    }
    sh.sums[i] = value;
    if (i % D == 0) {
      sh.stats[c * 2] = top;
      sh.stats[c * 2 + 1] = total;
    }
  }
  __syncthreads();
}

// Merges a pair's splits into sh.sums and sh.stats.
template <int D, int NC>
__device__ __forceinline__ void merge_splits(Merge<D, NC>& sh, const float* partial, const float2* split_stats, int splits) {
  constexpr int kQuads = NC * D / 4, kParts = kThreads / kQuads, kEarly = 16;
  const int c = threadIdx.x / 32, lane = threadIdx.x % 32, quad = threadIdx.x % kQuads, part = threadIdx.x / kQuads;
  const float4* quads = reinterpret_cast<const float4*>(partial) + quad;
  float4 early[kEarly];
#pragma unroll
  for (int i = 0; i < kEarly; i++)
    if (part < kParts && part + i * kParts < splits) early[i] = __ldcg(quads + (size_t)(part + i * kParts) * kQuads);
  float2 mine = make_float2(kNothingYet, 0.f);
  if (c < NC && lane < splits) mine = __ldcg(split_stats + lane * NC + c);
  if (c < NC) {
    float top = mine.x;
    for (int s = lane + 32; s < splits; s += 32) top = fmaxf(top, __ldcg(split_stats + s * NC + c).x);
#pragma unroll
    for (int off = 1; off < 32; off <<= 1) top = fmaxf(top, __shfl_xor_sync(kAll, top, off));
    float total = 0.f;
    for (int s = lane; s < splits; s += 32) {
      const float2 v = s == lane ? mine : __ldcg(split_stats + s * NC + c);
      const float r = ex2(v.x - top);
      total += r * v.y;
      sh.weights[s * NC + c] = r;
    }
#pragma unroll
    for (int off = 1; off < 32; off <<= 1) total += __shfl_xor_sync(kAll, total, off);
    if (lane == 0) sh.stats[c * 2 + 1] = total;
  }
  __syncthreads();
  if (part < kParts) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](const float4& v, int split) {
      const float r = sh.weights[split * NC + quad / (D / 4)];
      sum.x += r * v.x;
      sum.y += r * v.y;
      sum.z += r * v.z;
      sum.w += r * v.w;
    };
#pragma unroll
    for (int i = 0; i < kEarly; i++)
      if (part + i * kParts < splits) add(early[i], part + i * kParts);
#pragma unroll 8
    for (int s = part + kEarly * kParts; s < splits; s += kParts) add(__ldcg(quads + (size_t)s * kQuads), s);
    *reinterpret_cast<float4*>(sh.parts + (part * kQuads + quad) * 4) = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < NC * D; i += kThreads) {
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < kParts; k++) v += sh.parts[k * NC * D + i];
    sh.sums[i] = v;
  }
  __syncthreads();
}

// Copies the values' inverse, D x D halves, to shared memory; complete after wait_for_copy and a barrier.
template <int D> __device__ __forceinline__ void copy_inverse(void* to, const __half* inverse) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
#pragma unroll
  for (int i = threadIdx.x; i < D * D / 8; i += kThreads)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at + i * 16), "l"(inverse + i * 8));
}
__device__ __forceinline__ void wait_for_copy() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// out = sums / total . inverse + mean. A thread multiplies 4 output dims with its part of the rows.
template <typename T, int D, int NC>
__device__ __forceinline__ void write_out(T* out, Merge<D, NC>& sh, const void* inverse, const float* mean, int num_columns) {
  constexpr int kLanes = D / 4, kParts = kThreads / kLanes, kRows = D / kParts;
  const int x = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  const uint2* rows = static_cast<const uint2*>(inverse) + part * kRows * kLanes + x;
  float acc[NC][4] = {};
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const uint2 h = rows[i * kLanes];
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&h.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&h.y));
#pragma unroll
    for (int c = 0; c < NC; c++) {
      const float v = sh.sums[c * D + part * kRows + i];
      acc[c][0] += v * a.x;
      acc[c][1] += v * a.y;
      acc[c][2] += v * b.x;
      acc[c][3] += v * b.y;
    }
  }
#pragma unroll
  for (int c = 0; c < NC; c++)
    *reinterpret_cast<float4*>(sh.parts + (part * NC + c) * D + 4 * x) =
        make_float4(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
  __syncthreads();
  for (int i = threadIdx.x; i < num_columns * D; i += kThreads) {
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < kParts; k++) v += sh.parts[k * NC * D + i];
    out[i] = from_float<T>(v / sh.stats[i / D * 2 + 1] + mean[i % D]);
  }
}

template <typename T, int D, int KD, int VD, int KG, int VG, int HKV, int GQA, int L, bool PERM,
          template <int, int, int, int, int, int> class MathOf>
__device__ __forceinline__ void attend(const T* queries, const unsigned char* pool, const int* page_table,
                                       const __half* ring_keys, const __half* ring_values, const __half* sink_keys,
                                       const __half* sink_values, const void* key_tables, const void* value_tables,
                                       const float* steps, const __half* query_frags, const float* key_mean, const int* channels,
                                       const float* trig, const __half* value_inverse, const float* value_mean,
                                       const int* rows, const int* params, int* tickets, T* out, float* partial,
                                       float* split_stats) {
  constexpr int kColumns = GQA * L, NC = kColumns < 8 ? kColumns : 8;
  constexpr int kHeadUnits = D / KD + D / VD;
  using Math = MathOf<D, KD, VD, KG, VG, NC>;
  using KeyRow = typename Math::KeyRow;
  using ValueRow = typename Math::ValueRow;
  extern __shared__ __align__(1024) unsigned char smem[];
  Scratch<D>& sh = *reinterpret_cast<Scratch<D>*>(smem + kTableBytes);
  const int head = blockIdx.y % HKV;
  const uint4* frags = reinterpret_cast<const uint4*>(query_frags) + (size_t)head * (D / 16) * (D / 16) * 32;
  const unsigned char* head_keys = static_cast<const unsigned char*>(key_tables) + (size_t)head * KeyRow::kBytes;
  const unsigned char* head_values = static_cast<const unsigned char*>(value_tables) + (size_t)head * ValueRow::kBytes;
  const int first_column = blockIdx.y / HKV * 8, num_columns = min(NC, kColumns - first_column);
  const size_t row_head = (size_t)blockIdx.z * HKV + head, query_offset = (row_head * kColumns + first_column) * D;
  // None of these waits for what the host knows of the row.
  fetch_lines<D * D * 2>(frags);
  fetch_lines<KeyRow::kBytes>(head_keys);
  fetch_lines<ValueRow::kBytes>(head_values);
  if (threadIdx.x * 128 < num_columns * D * sizeof(T)) prefetch(queries + query_offset + threadIdx.x * (128 / sizeof(T)));
  const Params p = load_now(reinterpret_cast<const Params*>(params));
  const Row row = load_now(reinterpret_cast<const Row*>(rows) + blockIdx.z);
  Turner<T, D, NC, PERM> turner(queries + query_offset, key_mean + head * D, channels, num_columns);
  Math math;
  math.load(steps + head * (KG + VG + 1));
  KeyRow key_row;
  ValueRow value_row;
  key_row.load(head_keys);
  value_row.load(head_values);
  const int split = blockIdx.x;
  if (__cvta_generic_to_shared(smem) != kSharedBase) return;  // outputs stay unwritten: the self-test sees it
  if (split >= row.splits) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int num_sinks = p.num_sinks, bucket_pages = p.bucket_pages;
  const bool has_exact = split == row.splits - 1;
  const int begin = min(split * p.pages_per_split, row.num_pages);
  const int end = has_exact ? row.num_pages : min(begin + p.pages_per_split, row.num_pages);
  const int bucket0 = divide(begin, p.bucket_magic), first_exact = row.min_pages * kPage;
  // Buckets whose queries fit at once; no warp's share of their pages may exceed 32.
  const int page_slots = min(Turner<T, D, NC, PERM>::kSlots - row.exact_slots, bucket_pages > 8 ? 256 / bucket_pages : 32);
  const int* table = page_table + (size_t)blockIdx.z * p.max_pages;
  const auto round_end = [&](int round) { return min(end, (bucket0 + (round + 1) * page_slots) * bucket_pages); };

  const auto slots_of = [&](int round, int from, int to) {
    Slots slots;
    slots.first_bucket = bucket0 + round * page_slots;
    slots.num_page_slots = to > from ? divide(to + bucket_pages - 1, p.bucket_magic) - slots.first_bucket : 0;
    slots.num_slots = slots.num_page_slots + (to == end && has_exact ? row.exact_slots : 0);
    slots.exact_bucket = row.exact_bucket;
    return slots;
  };

  // Ask for the rest of what the start needs; then for the first pages, which would stand in its way.
  int from = begin, to = round_end(0);
  Slots slots = slots_of(0, from, to);
  Maker<D, NC> maker;
  turner.load(slots, trig, 0);
  Share share(p, table, head * kHeadUnits, from, to);
  share.fetch(pool, kHeadUnits * 64);
  if (has_exact) {  // the last split is the slowest to start: ask for what only it reads
    const int num_lines = (row.start + L - first_exact) * (D / 64), first_slot = first_exact % p.ring_slots;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_lines; i += kThreads) {
      const int slot = first_slot + i / (D / 64);
      const size_t at = (row_head * p.ring_slots + (slot < p.ring_slots ? slot : slot - p.ring_slots)) * D + i % (D / 64) * 64;
      prefetch(ring_keys + at);
      prefetch(ring_values + at);
    }
  }
  if constexpr (Math::kWhole) turner.set_unit(sh, math.bound * p.scale);
  turner.turn(sh, slots, trig, p.scale);
  maker.load(frags);
  key_row.spread(smem);
  value_row.spread(smem);
  if (threadIdx.x < 8) sh.pages_seen[threadIdx.x] = num_code_pages(row.start + (first_column + threadIdx.x) % L, p.window);
  const auto store = [&](int slot, int column, int quarter, int rest, float a, float b) {
    math.store(sh, slots, slot, column, quarter, rest, a, b);
  };
  __syncthreads();
  maker.make(sh, slots.num_slots, store);
  __syncthreads();

  math.start();
  for (int round = 0;;) {
    Stream<Math::kKeyUnits + Math::kValueUnits> codes;
    if (to == end && has_exact) {
      const int sink_tiles = (num_sinks + 15) / 16, ring_tiles = (row.start + L - 1 - first_exact) / 16 + 1;
      for (int i = warp; i < sink_tiles + ring_tiles; i += kWarps) {
        const bool sinks = i < sink_tiles;
        const int first = sinks ? i * 16 : first_exact + (i - sink_tiles) * 16;
        math.load_exact(sh, slots.num_page_slots +
                                (sinks ? 0 : 1 + divide(first / kPage, p.bucket_magic) - row.exact_bucket));
        exact_tile<D, L>(math, p, row, first_column, first, sinks,
                         sinks ? sink_keys + row_head * num_sinks * D : ring_keys + row_head * p.ring_slots * D,
                         sinks ? sink_values + row_head * num_sinks * D : ring_values + row_head * p.ring_slots * D);
      }
    }
    const uint4* page = share.page(pool, 0);
    int slot = divide(share.first, p.bucket_magic) - slots.first_bucket;
    int in_bucket = (slot + slots.first_bucket + 1) * bucket_pages - share.first;  // pages left in the bucket
    if (share.count > 0) {
      codes.start(page);
      math.load(sh, slot);
    }
    for (int i = 0; i < share.count; i++) {
      if (in_bucket-- == 0) {
        math.load(sh, ++slot);
        in_bucket = bucket_pages - 1;
      }
      // Past the last page the loads repeat it; nobody reads them.
      const uint4* next = share.page(pool, min(i + 1, share.count - 1));
      const auto take = [&](int n) { return codes.take(n, page, next); };
      float s[4][Math::kScores];
      math.score(s, sh, take);
      const int at = share.first + i;
      if (at == 0 || at >= row.min_pages) {
        const int first = at == 0 ? num_sinks : 0;
#pragma unroll
        for (int k = 0; k < Math::kScores; k++) {
          const bool seen = at < sh.pages_seen[Math::column_of(t, k)];
#pragma unroll
          for (int tile = 0; tile < 4; tile++)
            s[tile][k] = (tile * 16 + Math::token_of(g, t, k) >= first) & seen ? s[tile][k] : kMasked;
        }
      }
      math.add(s, take);
      page = next;
    }
    if (to == end) break;
    round++;
    from = to;
    to = round_end(round);
    slots = slots_of(round, from, to);
    share = Share(p, table, head * kHeadUnits, from, to);
    share.fetch(pool, kHeadUnits * 64);
    {
      Turner<T, D, NC, PERM> next_turner(queries + query_offset, key_mean + head * D, channels, num_columns);
      next_turner.load(slots, trig, 0);
      Maker<D, NC> next_maker;
      __syncthreads();  // nobody reads the last round's queries any more
      next_turner.turn(sh, slots, trig, p.scale);
      next_maker.load(frags);
      __syncthreads();
      next_maker.make(sh, slots.num_slots, store);
      __syncthreads();
    }
  }
  if (split == 0) fetch_lines<D * D * 2>(value_inverse + (size_t)head * D * D);

  Merge<D, NC>& merged = *reinterpret_cast<Merge<D, NC>*>(smem);
  static_assert(sizeof(merged) <= kTableBytes);
  const __half* inverse = value_inverse + (size_t)head * D * D;
  math.total_sums();
  __syncthreads();  // nobody reads tables or queries any more
  if (row.splits == 1) copy_inverse<D>(&sh, inverse);
  math.leave(merged);
  __syncthreads();
  merge_warps(merged);
  if (row.splits > 1) {
    const int pair = blockIdx.z * gridDim.y + blockIdx.y;
    const size_t base = (size_t)pair * gridDim.x;
    if (threadIdx.x < NC * D / 4)
      reinterpret_cast<float4*>(partial + (base + split) * NC * D)[threadIdx.x] =
          reinterpret_cast<const float4*>(merged.sums)[threadIdx.x];
    if (threadIdx.x < NC * 2) split_stats[(base + split) * NC * 2 + threadIdx.x] = merged.stats[threadIdx.x];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) sh.flag = atomicAdd(tickets + pair, 1) == row.splits - 1;
    __syncthreads();
    if (!sh.flag) return;
    __threadfence();
    if (threadIdx.x == 0) tickets[pair] = 0;
    copy_inverse<D>(&sh, inverse);
    merge_splits<D, NC>(merged, partial + base * NC * D, reinterpret_cast<const float2*>(split_stats) + base * NC, row.splits);
  }
  wait_for_copy();
  __syncthreads();
  write_out<T, D, NC>(out + query_offset, merged, &sh, value_mean + head * D, num_columns);
}

}  // namespace vecinfer_mma

// mma/start: the queries of every bucket, q~_b = T^-T R(-b) q, before a round's pages are read.
//
// What     Turner turns a block's queries back by every bucket of the round and leaves q' = R(-b) q and q' . mean; Maker
//          multiplies with the keys' inverse on the tensor cores; the arithmetic (mma/half, mma/int8) stores the result.
// Inputs   queries, key_mean, channels, trig [buckets, 2, D/2] float32 (cos, sin), query_frags: see mma/attend.
// Memory   Scratch: 2 x 80 columns of D halves behind the tables.
// Bytes    the inverse (2 D D) once a round, cos and sin 4 D a bucket.
// Numerics angles and q' float32, rounded to float16 before the product and after it.
// Limits   80 columns a round: 80 / NC buckets, at most 20.
namespace vecinfer_mma {

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
    const float4 u = *reinterpret_cast<const float4*>(mean + 4 * x);
    const float4 v = *reinterpret_cast<const float4*>(mean + D / 2 + 4 * x);
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

template <typename C> using TurnerOf = Turner<typename C::T, C::D, C::NC, C::PERM>;

template <typename C>
__device__ __forceinline__ TurnerOf<C> turner_of(const Arguments<typename C::T>& in, const Block<C>& block) {
  return TurnerOf<C>(in.queries + block.query_offset, in.key_mean + block.head * C::D, in.channels, block.num_columns);
}

// q~ of every slot, in the arithmetic's own form. Complete after a barrier.
template <typename C>
__device__ __forceinline__ void make_queries(const Maker<C::D, C::NC>& maker, const typename C::Math& math,
                                             Scratch<C::D>& sh, const Slots& slots) {
  maker.make(sh, slots.num_slots, [&](int slot, int column, int quarter, int rest, float a, float b) {
    math.store(sh, slots, slot, column, quarter, rest, a, b);
  });
}

// The queries of a later round, in the place of the last one's.
template <typename C>
__device__ __forceinline__ void next_queries(const Arguments<typename C::T>& in, const Block<C>& block, const Slots& slots,
                                             const uint4* frags, float scale, const typename C::Math& math,
                                             Scratch<C::D>& sh) {
  TurnerOf<C> turner = turner_of<C>(in, block);
  turner.load(slots, in.trig, 0);
  Maker<C::D, C::NC> maker;
  __syncthreads();  // nobody reads the last round's queries any more
  turner.turn(sh, slots, in.trig, scale);
  maker.load(frags);
  __syncthreads();
  make_queries<C>(maker, math, sh, slots);
  __syncthreads();
}

}  // namespace vecinfer_mma

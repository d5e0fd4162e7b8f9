// mma/half: the arithmetic of a warp in float16, for every geometry.
//
// What     scores of a page's 64 tokens from key codes and q~, the online softmax, and o += p . values, as products of
//          m16n8k16; the same for 16 exact tokens.
// Inputs   Scratch::made, tables in shared memory, codes a unit of 16 bytes a lane at a time (mma/pages).
// Template D 64 | 128, KD, VD 2 | 4 | 8, KG, VG 1 | 2 | 4 (VD 8: 1 | 2), NC 1-8 query columns.
// Numerics scores, sums and o float32; q~ and centroids float16; weights float16 with at most 2^6 of headroom over the
//          running maximum.
// Limits   a page of 64 tokens: four tiles of 16.
namespace vecinfer_mma {

// s[tile] += keys . queries for unit u of the lane: two sub-vectors of tokens tile*16 + half*8 + g.
template <int D, int d>
__device__ __forceinline__ void score_unit(float (&s)[4][4], const uint4& w, int u, const unsigned (&q)[D / 16][2],
                                           unsigned column) {
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

// o += values . p for unit u of the lane: one sub-vector of tokens tile*16 + hi*8 + 2t + lo.
template <int D, int d>
__device__ __forceinline__ void value_unit(float (&o)[D / 16][4], const uint4& w, int u, const unsigned (&p)[4][2],
                                           unsigned column) {
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
      if (2 * t + k < NC)
        leave_column<D, NC>(sh, 2 * t + k, state.o, k, k ? state.max1 : state.max0, k ? state.sum1 : state.sum0);
  }
};

}  // namespace vecinfer_mma

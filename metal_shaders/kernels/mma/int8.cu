// mma/int8: the arithmetic of a warp for tables whose entries are whole multiples of a step
// (quant_core/codec/table_grid.py), on the integer tensor cores. It takes the place of mma/half where it fits.
//
// What     A column of queries or weights is a 16-bit whole number, 256 hi + lo, and takes two of the operand's 8 columns:
//          2h its hi, 2h + 1 its lo. So lane (g, t) finds both sums of column t, and adds them. The tables take half the
//          look-up's bytes.
// Inputs   key_tables, value_tables [Hkv, G, 256, d] int8; steps [Hkv, KG + VG + 1] float32: of the tables, then what
//          ||q'|| is multiplied with to give the unit of a column's queries (tensor_core.py: _int8_tables).
// Template D 64 | 128, KD, VD 4 | 8, KG, VG 1 | 2 | 4 (VD 8: 1 | 2), NC 1-4 query columns.
// Memory   as mma/tables; entry c of the keys once for each lane (d 4) or for every second one (d 8).
// Numerics queries are rounded to 1 / 32512 of a bound of the largest (all rotations of a column share it), weights to
//          1 / 65535 of the page's largest; products and sums of a page are exact. Sinks and ring in float16 as mma/half.
// Limits   a page of 64 tokens; 4 query columns.
namespace vecinfer_mma {

// 1.5 x 2^23: an int32 sum that starts at its bits is, read as a float, that number plus the sum, up to 2^22.
constexpr int kFloatBits = 0x4B400000;
constexpr float kFloatZero = 12582912.f;
constexpr float kMaxQuery = 32512.f, kMaxWeight = 65535.f, kPageHeadroom = 20.f;

// c = start + a . b, with b signed (queries) or not (weights).
template <bool weights>
__device__ __forceinline__ void mma8(int (&c)[4], bool start, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                     unsigned b0, unsigned b1) {
  const int c0 = start ? kFloatBits : c[0], c1 = start ? kFloatBits : c[1], c2 = start ? kFloatBits : c[2],
            c3 = start ? kFloatBits : c[3];
  if constexpr (weights) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
  }
}

// Bytes 0 ... 3 of four tokens (2t, 2t + 1, 2t + 8, 2t + 9) as d[byte], tokens in order 2t, 2t + 8, 2t + 1, 2t + 9.
__device__ __forceinline__ void transpose4x4(unsigned (&d)[4], unsigned a, unsigned b, unsigned c, unsigned e) {
  const unsigned x0 = __byte_perm(a, c, 0x5140), x1 = __byte_perm(a, c, 0x7362);
  const unsigned y0 = __byte_perm(b, e, 0x5140), y1 = __byte_perm(b, e, 0x7362);
  d[0] = __byte_perm(x0, y0, 0x5410);
  d[1] = __byte_perm(x0, y0, 0x7632);
  d[2] = __byte_perm(x1, y1, 0x5410);
  d[3] = __byte_perm(x1, y1, 0x7632);
}

// The sum of a column, from its two parts.
__device__ __forceinline__ float join_parts(int hi, int lo) {
  return fmaf(__int_as_float(hi) - kFloatZero, 256.f, __int_as_float(lo) - kFloatZero);
}

// The interface of HalfMath. Lane (g, t) holds column t.
template <int D, int KD, int VD, int KG, int VG, int NC> struct Int8Math {
  static_assert(NC <= 4 && KD != 2 && VD != 2);
  static constexpr int kScores = 2, kKeyUnits = D / KD / 8, kValueUnits = D / VD / 8;
  static constexpr bool kWhole = true;
  using KeyRow = TableRow<KD / 2, KG, false>;
  using ValueRow = TableRow<VD / 2, VG, true>;
  float o[D / 16][2];  // dims 2i, 2i + 1 of run reverse3(g)
  float max, sum;
  unsigned exact_q[D / 16][2];
  float mean, bound, key_step, value_step;  // steps: of the thread's dims in Maker, and of its dims in o
  int slot;  // of the page's queries, which stay in shared memory
  unsigned key_column, value_column;

  static __device__ __forceinline__ int token_of(int g, int, int i) { return g + 8 * i; }
  static __device__ __forceinline__ int column_of(int t, int) { return t; }

  // steps of a head: of its key tables, of its value tables, and the bound.
  __device__ __forceinline__ void load(const float* steps) {
    const int lane = threadIdx.x % 32, tile = threadIdx.x / 32 % (D / 16);
    key_step = steps[(16 * tile + lane / 4 * 2) / (D / KG)];
    value_step = steps[KG + reverse3(lane / 4) * VG / 8];
    bound = steps[KG + VG];
  }
  __device__ __forceinline__ void start() {
    const int lane = threadIdx.x % 32;
    key_column = (lane * KD) & 127;
    value_column = (lane * VD) & 127;
    value_step *= 1.f / kMaxWeight;
#pragma unroll
    for (int i = 0; i < D / 16; i++) o[i][0] = o[i][1] = 0.f;
    max = kNothingYet;
    sum = 0.f;
  }

  // Page slots as bytes [D/32][column, part, t][8], exact slots as halves.
  __device__ __forceinline__ void store(Scratch<D>& sh, const Slots& slots, int slot, int column, int quarter, int rest,
                                        float a, float b) const {
    if (slot >= slots.num_page_slots) {
      store_halves<D, NC>(sh, slot, column, quarter, rest, a, b);
      return;
    }
    const float step = key_step * sh.per_unit[column];
    const int x = __float2int_rn(a * step), y = __float2int_rn(b * step);
    unsigned char* at = reinterpret_cast<unsigned char*>(sh.made + slot * (NC * D)) +
                        (rest / 8 * (NC * 8) + column * 8 + quarter) * 8 + rest % 8;
    *reinterpret_cast<unsigned short*>(at) = __byte_perm(x + 128, y + 128, 0x0051);
    *reinterpret_cast<unsigned short*>(at + 32) = __byte_perm(x, y, 0x0040);
  }

  __device__ __forceinline__ void load(const Scratch<D>&, int new_slot) { slot = new_slot; }
  __device__ __forceinline__ void load_exact(const Scratch<D>& sh, int slot) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int u = 0; u < D / 32; u++) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (g % 2 == 0 && g / 2 < NC)
        v = *reinterpret_cast<const uint4*>(sh.made + slot * NC * D + (u * NC * 4 + g / 2 * 4 + t) * 8);
      exact_q[2 * u][0] = v.x;
      exact_q[2 * u][1] = v.y;
      exact_q[2 * u + 1][0] = v.z;
      exact_q[2 * u + 1][1] = v.w;
    }
    mean = t < NC ? sh.mean_score[slot * NC + t] : 0.f;
  }

  template <typename F>
  __device__ __forceinline__ void score(float (&s)[4][2], const Scratch<D>& sh, F take) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
    const auto query = [&](int i) {
      const uint2* at = reinterpret_cast<const uint2*>(sh.made + slot * NC * D) + lane;
      return lane < NC * 8 ? at[i * NC * 8] : make_uint2(0, 0);
    };
    int c[4][4];
#pragma unroll
    for (int u = 0; u < kKeyUnits; u++) {
      const uint4 w = take(u);
      const uint2 q0 = query(KD / 4 * u), q1 = KD == 8 ? query(2 * u + 1) : q0;
#pragma unroll
      for (int tile = 0; tile < 4; tile++) {
        const unsigned v0 = word(w, tile / 2), v1 = word(w, 2 + tile / 2);
        const int k = tile % 2 * 2;
        const auto e0 = look_up<KD / 2>(key_column, v0, k), f0 = look_up<KD / 2>(key_column, v0, k + 1);
        const auto e1 = look_up<KD / 2>(key_column, v1, k), f1 = look_up<KD / 2>(key_column, v1, k + 1);
        if constexpr (KD == 4) {
          mma8<false>(c[tile], u == 0, e0, f0, e1, f1, q0.x, q0.y);
        } else {
          mma8<false>(c[tile], u == 0, e0.x, f0.x, e0.y, f0.y, q0.x, q0.y);
          mma8<false>(c[tile], false, e1.x, f1.x, e1.y, f1.y, q1.x, q1.y);
        }
      }
    }
    const float unit = t < NC ? sh.unit[t] : 0.f, unit256 = 256.f * unit;
    const float first = t < NC ? sh.mean_score[slot * NC + t] - kFloatZero * unit : 0.f;
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
      for (int k = 0; k < 2; k++)
        s[tile][k] = fmaf(__int_as_float(c[tile][2 * k]) - kFloatZero, unit256,
                          fmaf(__int_as_float(c[tile][2 * k + 1]), unit, first));
  }

  // Raises the maximum to a column's largest score if that exceeds it by more than `headroom`.
  __device__ __forceinline__ void raise(float top, float headroom) {
    if (!__any_sync(kAll, top > max + headroom)) return;
    top = fmaxf(top, max);
    const float r = ex2(max - top);
    max = top;
    sum *= r;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      o[i][0] *= r;
      o[i][1] *= r;
    }
  }
  static __device__ __forceinline__ float largest(float top) {
#pragma unroll
    for (int off = 4; off < 32; off <<= 1) top = fmaxf(top, __shfl_xor_sync(kAll, top, off));
    return top;
  }

  template <typename F> __device__ __forceinline__ void add(const float (&s)[4][2], F take) {
    float top = fmaxf(s[0][0], s[0][1]);
#pragma unroll
    for (int tile = 1; tile < 4; tile++) top = fmaxf(top, fmaxf(s[tile][0], s[tile][1]));
    top = largest(top);
    raise(top, kPageHeadroom);
    const float factor = ex2(top - max);
    // Weights are the low 16 bits of floats from 2^23 on.
    constexpr unsigned kBits = 0x4B000000;
    unsigned w[4], total = kBits - 8 * kBits;
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
      const unsigned a = __float_as_uint(fmaf(ex2(s[tile][0] - top), kMaxWeight, 8388608.f));
      const unsigned b = __float_as_uint(fmaf(ex2(s[tile][1] - top), kMaxWeight, 8388608.f));
      total += a + b;
      w[tile] = transpose8x8(__byte_perm(a, b, 0x4051));
    }
    sum = fmaf(__uint_as_float(total) - 8388608.f, factor * (1.f / kMaxWeight), sum);
    const float step = factor * value_step;
#pragma unroll
    for (int u = 0; u < kValueUnits; u++) {
      const uint4 codes = take(kKeyUnits + u);
      int c[VD / 2][4];
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        unsigned d[2][VD];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const unsigned v = word(codes, 2 * pair + i);
          const auto e0 = look_up<VD / 2, 128>(value_column, v, 0), e1 = look_up<VD / 2, 128>(value_column, v, 1),
                     e2 = look_up<VD / 2, 128>(value_column, v, 2), e3 = look_up<VD / 2, 128>(value_column, v, 3);
          unsigned (*to)[4] = reinterpret_cast<unsigned (*)[4]>(d[i]);
          if constexpr (VD == 4) {
            transpose4x4(to[0], e0, e1, e2, e3);
          } else {
            transpose4x4(to[0], e0.x, e1.x, e2.x, e3.x);
            transpose4x4(to[1], e0.y, e1.y, e2.y, e3.y);
          }
        }
#pragma unroll
        for (int i = 0; i < VD / 2; i++)
          mma8<true>(c[i], pair == 0, d[0][2 * i], d[0][2 * i + 1], d[1][2 * i], d[1][2 * i + 1], w[2 * pair],
                     w[2 * pair + 1]);
      }
#pragma unroll
      for (int i = 0; i < VD / 2; i++) {
        float (&to)[2] = o[VD / 2 * u + i];
        to[0] = fmaf(join_parts(c[i][0], c[i][1]), step, to[0]);
        to[1] = fmaf(join_parts(c[i][2], c[i][3]), step, to[1]);
      }
    }
  }

  // Exact tokens: column t is column 2t of the operands, the others are zero.
  __device__ __forceinline__ void score_exact(float (&s)[2], const uint4* k0, const uint4* k1) const {
    float c[4] = {mean, 0.f, mean, 0.f};
#pragma unroll
    for (int u = 0; u < D / 32; u++) {
      const uint4 a = k0[u], b = k1[u];
      mma(c, a.x, b.x, a.y, b.y, exact_q[2 * u][0], exact_q[2 * u][1]);
      mma(c, a.z, b.z, a.w, b.w, exact_q[2 * u + 1][0], exact_q[2 * u + 1][1]);
    }
    s[0] = c[0];
    s[1] = c[2];
  }
  __device__ __forceinline__ void weigh_exact(const float (&s)[1][2], unsigned (&w)[2]) {
    raise(largest(fmaxf(s[0][0], s[0][1])), kHeadroom);
    const float a = ex2(s[0][0] - max), b = ex2(s[0][1] - max);
    sum += a + b;
    w[0] = transpose8x8(pack(a, 0.f));
    w[1] = transpose8x8(pack(b, 0.f));
  }
  __device__ __forceinline__ void add_exact(int i, unsigned a, unsigned b, unsigned c, unsigned e, const unsigned (&w)[2]) {
    float d[4] = {o[i][0], 0.f, o[i][1], 0.f};
    add_values(d, a, b, c, e, w);
    o[i][0] = d[0];
    o[i][1] = d[2];
  }

  __device__ __forceinline__ void total_sums() {
#pragma unroll
    for (int off = 4; off < 32; off <<= 1) sum += __shfl_xor_sync(kAll, sum, off);
  }
  __device__ __forceinline__ void leave(Merge<D, NC>& sh) const {
    const int t = threadIdx.x % 4;
    if (t < NC) leave_column<D, NC>(sh, t, o, 0, max, sum);
  }
};

}  // namespace vecinfer_mma

// mma/tables: a head's centroids in shared memory, and how a lane looks a code up.
//
// What     row c of 256 bytes: entry c of the keys, once per lane that may ask for it, so that no two lanes share a bank;
//          then of the values.
// Inputs   key_tables, value_tables [Hkv, G, 256, d] of 2-byte numbers (Int8Math: pairs of int8 as one of them).
// Template d 2 | 4 | 8 numbers of 2 bytes an entry, G 1 | 2 | 4.
// Memory   64 KB, written once a block.
// Bytes    the head's tables once a block.
// Limits   shared memory starts at kSharedBase: the base is an immediate of every look-up.
namespace vecinfer_mma {

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

}  // namespace vecinfer_mma

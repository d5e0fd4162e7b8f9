// mma/exact: attention over the sinks and the ring, which are vectors in code space, 16 tokens a tile.
//
// What     a warp takes every 8th tile; masks hide what a query reads as codes, and what lies behind it.
// Inputs   ring_* [B, Hkv, R, D], sink_* [B, Hkv, S, D] float16, the token at position i in slot i % R.
// Bytes    4 D a token, once per column group.
// Numerics as Math::score_exact and add_exact: float16 products, float32 sums.
// Limits   the ring holds every exact token a query of the row sees.
namespace vecinfer_mma {

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

// Asks for what only a row's last split reads: it is the slowest to start.
template <typename C>
__device__ __forceinline__ void ask_for_ring(const Arguments<typename C::T>& in, const Params& p, const Row& row,
                                             size_t row_head, int first_exact) {
  const int num_lines = (row.start + C::L - first_exact) * (C::D / 64), first_slot = first_exact % p.ring_slots;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_lines; i += kThreads) {
    const int slot = first_slot + i / (C::D / 64);
    const size_t at =
        (row_head * p.ring_slots + (slot < p.ring_slots ? slot : slot - p.ring_slots)) * C::D + i % (C::D / 64) * 64;
    prefetch(in.ring_keys + at);
    prefetch(in.ring_values + at);
  }
}

// All sinks, and the ring from `first_exact` on.
template <typename C>
__device__ __forceinline__ void add_exact_tokens(typename C::Math& math, const Scratch<C::D>& sh, const Slots& slots,
                                                 const Arguments<typename C::T>& in, const Params& p, const Row& row,
                                                 const Block<C>& block, int first_exact) {
  const int sink_tiles = (p.num_sinks + 15) / 16, ring_tiles = (row.start + C::L - 1 - first_exact) / 16 + 1;
  for (int i = threadIdx.x / 32; i < sink_tiles + ring_tiles; i += kWarps) {
    const bool sinks = i < sink_tiles;
    const int first = sinks ? i * 16 : first_exact + (i - sink_tiles) * 16;
    math.load_exact(
        sh, slots.num_page_slots + (sinks ? 0 : 1 + divide(first / kPage, p.bucket_magic) - row.exact_bucket));
    const size_t sink = block.row_head * p.num_sinks * C::D, slot = block.row_head * p.ring_slots * C::D;
    exact_tile<C::D, C::L>(math, p, row, block.first_column, first, sinks, sinks ? in.sink_keys + sink : in.ring_keys + slot,
                           sinks ? in.sink_values + sink : in.ring_values + slot);
  }
}

}  // namespace vecinfer_mma

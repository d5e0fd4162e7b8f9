// Codes as the kernels read them: page_layout.h's order, with the lane's part worked out at compile time.

constexpr int power_of_two_divisor(int n, int limit) { return n % limit == 0 ? limit : power_of_two_divisor(n, limit / 2); }
// Keys: lanes t that share a token's sub-vectors, and sub-vectors per unit of two (or one) runs.
constexpr int key_lanes(int num_subvecs) { return power_of_two_divisor(num_subvecs, 4); }
constexpr int key_run(int num_subvecs) { return num_subvecs / key_lanes(num_subvecs); }
constexpr int key_unit(int num_subvecs) { return power_of_two_divisor(key_run(num_subvecs), 2); }
// Values: sub-vectors lie in slots of VQ_PAGE_SIZE bytes, dealt in bit-reversed order to this many runs.
constexpr int value_runs(int num_subvecs) { return power_of_two_divisor(num_subvecs, 8); }
// Lanes that hold the slots of one token in the value pass, and slots per lane.
constexpr int value_lanes(int num_subvecs) { return num_subvecs > 16 ? 32 : num_subvecs > 8 ? 16 : 8; }
constexpr int value_steps(int num_subvecs) {
  return (num_subvecs + value_lanes(num_subvecs) - 1) / value_lanes(num_subvecs);
}

// First byte of page `page`: slabs hold whole pages of one geometry.
METAL_FUNC ulong page_start(int page, int pages_per_slab, int page_bytes, int slab_bytes) {
  const int slab = page / pages_per_slab;
  return ulong(slab) * ulong(slab_bytes) + ulong(page - slab * pages_per_slab) * ulong(page_bytes);
}

// Codes of the tokens o * 8 + g of sub-vector t * key_run + i lie in VQ_KEY_RUN bytes from here, o = 0 first.
template <int M>
METAL_FUNC int key_codes_at(int g, int t, int i) {
  constexpr int P = key_unit(M);
  return (((i / P * 8 + g) * key_lanes(M) + t) * P + i % P) * VQ_KEY_RUN;
}

// The sub-vector whose codes lie in the VQ_PAGE_SIZE bytes of a value section's `slot`. Inside a slot token
// tile * 16 + hi * 8 + t * 2 + lo is byte t * VQ_VALUE_RUN + tile * 4 + hi * 2 + lo.
template <int M>
METAL_FUNC int value_subvec(int slot) {
  constexpr int RUNS = value_runs(M);
  return int(page_reverse(uint(slot % RUNS), uint(RUNS))) * (M / RUNS) + slot / RUNS;
}

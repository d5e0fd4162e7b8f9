// mma/pages: attention over a warp's share of the packed pages, their codes streamed from the pool.
//
// What     a warp reads whole pages, keys before values, 16 bytes a lane and load, several loads ahead; the arithmetic
//          scores them and adds their values. Only pages that some query does not see as codes, and the sinks', are masked.
// Inputs   pool, page_table [B, max_pages] int32: codes in pack_block's order (include/page_layout.h).
// Bytes    per page and head 64 (key_bytes + value_bytes), each read once per column group.
// Limits   a share of at most 32 pages a warp and round: lane i knows where page i lies.
#ifndef VQ_IN_FLIGHT
#define VQ_IN_FLIGHT 6
#endif

namespace vecinfer_mma {

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

constexpr int kInFlight = VQ_IN_FLIGHT;  // loads of codes at most

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

// Hides the sinks, and pages that a query reads as exact tokens.
template <typename Math, int D>
__device__ __forceinline__ void mask_page(float (&s)[4][Math::kScores], const Scratch<D>& sh, int page, int num_sinks) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = page == 0 ? num_sinks : 0;
#pragma unroll
  for (int k = 0; k < Math::kScores; k++) {
    const bool seen = page < sh.pages_seen[Math::column_of(t, k)];
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
      s[tile][k] = (tile * 16 + Math::token_of(g, t, k) >= first) & seen ? s[tile][k] : kMasked;
  }
}

// A warp's share of a round.
template <typename C>
__device__ __forceinline__ void add_pages(typename C::Math& math, const Scratch<C::D>& sh, const Slots& slots,
                                          const Share& share, const unsigned char* pool, const Params& p, int min_pages) {
  using Math = typename C::Math;
  Stream<Math::kKeyUnits + Math::kValueUnits> codes;
  const uint4* page = share.page(pool, 0);
  int slot = divide(share.first, p.bucket_magic) - slots.first_bucket;
  int in_bucket = (slot + slots.first_bucket + 1) * p.bucket_pages - share.first;  // pages left in the bucket
  codes.start(page);
  math.load(sh, slot);
  int i = 0;
  do {
    if (in_bucket-- == 0) {
      math.load(sh, ++slot);
      in_bucket = p.bucket_pages - 1;
    }
    // Past the last page the loads repeat it; nobody reads them.
    const uint4* next = share.page(pool, min(i + 1, share.count - 1));
    const auto take = [&](int n) { return codes.take(n, page, next); };
    float s[4][Math::kScores];
    math.score(s, sh, take);
    const int at = share.first + i;
    if (at == 0 || at >= min_pages) mask_page<Math>(s, sh, at, p.num_sinks);
    math.add(s, take);
    page = next;
  } while (++i < share.count);
}

}  // namespace vecinfer_mma

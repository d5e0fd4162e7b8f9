// mma/launch: what a launch hands to a block, and which part of it is the block's.
//
// What     Config, the template's values under one name; Arguments, the buffers; Params and Row, what the host knows;
//          Block, the KV head, query columns and split; Split, its pages, cut into rounds whose queries fit at once.
// Inputs   params (struct Params), rows (struct Row) int32, as tensor_core.py writes them.
// Launch   see mma/attend.
// Limits   pool offsets in units of 64 bytes, below 2^32 of them.
namespace vecinfer_mma {

// The template's values: T, head size, sub-vector sizes, tables, KV heads, query heads of each, new positions, whether
// `channels` is not the identity, whether the layer has learned sinks, and the arithmetic.
template <typename T_, int D_, int KD, int VD, int KG, int VG, int HKV, int GQA_, int L_, bool PERM_, bool SINKS_,
          template <int, int, int, int, int, int> class MathOf>
struct Config {
  using T = T_;
  static constexpr int D = D_, L = L_, GQA = GQA_, kHeads = HKV, kColumns = GQA * L, NC = kColumns < 8 ? kColumns : 8;
  static constexpr int kHeadUnits = D / KD + D / VD;  // of 64 bytes: a head's codes in a page
  static constexpr int kSteps = KG + VG + 1;
  static constexpr bool PERM = PERM_, SINKS = SINKS_;
  using Math = MathOf<D, KD, VD, KG, VG, NC>;
};

template <typename T> struct Arguments {
  const T* queries;
  const unsigned char* pool;
  const int* page_table;
  const __half *ring_keys, *ring_values, *sink_keys, *sink_values;
  const void *key_tables, *value_tables;
  const float* steps;
  const __half* query_frags;
  const float* key_mean;
  const int* channels;
  const float* trig;
  const __half* value_inverse;
  const float* value_mean;
  const float* sink_logits;
  const int *rows, *params;
  int* tickets;
  T* out;
  float *partial, *split_stats;
};

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

// A block's part: split blockIdx.x of row blockIdx.z, one KV head, up to 8 of its query columns.
template <typename C> struct Block {
  int head, first_column, num_columns, split;
  size_t row_head, query_offset;  // of row and head; where its first column lies in queries and out

  __device__ __forceinline__ Block() {
    head = blockIdx.y % C::kHeads;
    first_column = blockIdx.y / C::kHeads * 8;
    num_columns = min(C::NC, C::kColumns - first_column);
    split = blockIdx.x;
    row_head = (size_t)blockIdx.z * C::kHeads + head;
    query_offset = (row_head * C::kColumns + first_column) * C::D;
  }
};

// Which bucket a query slot belongs to: buckets of the round's pages, then those of the exact tokens.
struct Slots {
  int first_bucket, num_page_slots, num_slots, exact_bucket;
  __device__ __forceinline__ int bucket(int slot) const {
    const int i = slot - num_page_slots;
    return i < 0 ? first_bucket + slot : i == 0 ? 0 : exact_bucket + i - 1;
  }
};

// Pages from ... to - 1, and the buckets whose queries they need.
struct Round {
  int index, from, to;
  Slots slots;
};

// Pages begin ... end - 1 of a split, in rounds; the exact tokens belong to a row's last split and its last round.
template <int max_slots> struct Split {
  int begin, end, first_bucket, page_slots, bucket_pages, first_exact, exact_bucket, exact_slots;
  unsigned bucket_magic;
  bool has_exact;

  __device__ __forceinline__ Split(const Params& p, const Row& row, int split) {
    bucket_pages = p.bucket_pages;
    bucket_magic = p.bucket_magic;
    exact_bucket = row.exact_bucket;
    exact_slots = row.exact_slots;
    has_exact = split == row.splits - 1;
    begin = min(split * p.pages_per_split, row.num_pages);
    end = has_exact ? row.num_pages : min(begin + p.pages_per_split, row.num_pages);
    first_bucket = divide(begin, bucket_magic);
    first_exact = row.min_pages * kPage;
    // Buckets whose queries fit at once; no warp's share of their pages may exceed 32.
    page_slots = min(max_slots - exact_slots, bucket_pages > 8 ? 256 / bucket_pages : 32);
  }
  __device__ __forceinline__ Round round(int index, int from) const {
    const int to = min(end, (first_bucket + (index + 1) * page_slots) * bucket_pages);
    Slots slots;
    slots.first_bucket = first_bucket + index * page_slots;
    slots.num_page_slots = to > from ? divide(to + bucket_pages - 1, bucket_magic) - slots.first_bucket : 0;
    slots.num_slots = slots.num_page_slots + (to == end && has_exact ? exact_slots : 0);
    slots.exact_bucket = exact_bucket;
    return {index, from, to, slots};
  }
  __device__ __forceinline__ bool is_last(const Round& round) const { return round.to == end; }
};

}  // namespace vecinfer_mma

// mma/attend: decode attention over packed pages and exact tokens on NVIDIA tensor cores, in one launch.
//
// What     out = softmax(q . k) v for up to 8 query columns (heads of a KV head's group x new positions) at a time. Keys
//          are read as codes, bucket by bucket, with q~_b = T^-T R(-b) q (made here, on tensor cores, per block) and the
//          mean term q'_b . mean as the scores' starting value; sinks and ring are exact vectors in code space. The last
//          block of a (row, KV head, column group) merges the splits and applies the values' inverse and mean.
//          Steps: mma/start, then per round mma/exact and mma/pages with the arithmetic of mma/half or mma/int8, mma/merge.
// Inputs   queries [B, Hq, L, D] T; pool, page_table [B, max_pages] int32, codes in pack_block's order (page_layout.h);
//          ring_* [B, Hkv, R, D], sink_* [B, Hkv, S, D] float16; key_tables, value_tables [Hkv, G, 256, d] float16;
//          steps: see mma/int8; query_frags [Hkv, D/16, D/16, 32, 8] float16 (the keys' inverse, tensor_core.py: _prepare),
//          key_mean [Hkv, D] float32, channels int32 [D] (rotary pairs as (i, i + D/2)), trig [buckets, 2, D/2] float32
//          (cos, sin); value_inverse [Hkv, D, D] float16, value_mean [Hkv, D] float32; sink_logits [Hq] float32
//          (read with SINKS only); rows (struct Row), params (struct Params) int32; tickets int32, zero before and after
//          every launch.
// Outputs  out [B, Hq, L, D] T; partial [pairs, splits, NC, D] and split_stats [pairs, splits, NC, 2] float32, scratch.
// Launch   grid (splits, Hkv x column groups, B) blocks of 256 threads; a row's split is `pages_per_split` pages, the
//          exact tokens (counted as `exact_pages` pages) go to its last split; blocks beyond a row's splits return.
// Template T, D 64 | 128, KD, VD sub-vector sizes 2 | 4 | 8, KG, VG tables 1 | 2 | 4 (VD 8: 1 | 2), HKV KV heads, GQA query
//          heads of each, L new positions, PERM 1 when `channels` is not the identity, SINKS 1 with learned sinks; MathOf:
//          HalfMath, or Int8Math, which takes its place where tables and columns allow.
// Memory   64 KB tables (mma/tables) + 2 x 80 columns of D halves: two blocks per multiprocessor.
// Bytes    per page and head 64 (key_bytes + value_bytes), each read once per column group, 16 bytes a load.
// Numerics scores and sums float32; queries, both inverses and all operands float16; weights p are
//          float16 with at most 2^6 of headroom over the running maximum. Relative error about 1e-3.
// Limits   one section per codec; pages of 64 tokens; pool below 256 GiB in units of 64 bytes.
namespace vecinfer_mma {

template <typename C> __device__ __forceinline__ void attend(const Arguments<typename C::T>& in) {
  using Math = typename C::Math;
  using KeyRow = typename Math::KeyRow;
  using ValueRow = typename Math::ValueRow;
  constexpr int D = C::D, kHeadUnits = C::kHeadUnits;
  extern __shared__ __align__(1024) unsigned char smem[];
  Scratch<D>& sh = *reinterpret_cast<Scratch<D>*>(smem + kTableBytes);

  // 1. which part is this block's. What waits for nothing is asked for before what the host knows of the row
  const Block<C> block;
  const uint4* frags = reinterpret_cast<const uint4*>(in.query_frags) + (size_t)block.head * (D / 16) * (D / 16) * 32;
  const unsigned char* keys = static_cast<const unsigned char*>(in.key_tables) + (size_t)block.head * KeyRow::kBytes;
  const unsigned char* values = static_cast<const unsigned char*>(in.value_tables) + (size_t)block.head * ValueRow::kBytes;
  fetch_lines<D * D * 2>(frags);
  fetch_lines<KeyRow::kBytes>(keys);
  fetch_lines<ValueRow::kBytes>(values);
  if (threadIdx.x * 128 < block.num_columns * D * sizeof(typename C::T))
    prefetch(in.queries + block.query_offset + threadIdx.x * (128 / sizeof(typename C::T)));
  const Params p = load_now(reinterpret_cast<const Params*>(in.params));
  const Row row = load_now(reinterpret_cast<const Row*>(in.rows) + blockIdx.z);
  TurnerOf<C> turner = turner_of<C>(in, block);
  Math math;
  math.load(in.steps + block.head * C::kSteps);
  KeyRow key_row;
  ValueRow value_row;
  key_row.load(keys);
  value_row.load(values);
  if (__cvta_generic_to_shared(smem) != kSharedBase) return;  // outputs stay unwritten: the self-test sees it
  if (block.split >= row.splits) return;

  // 2. start: ask for the rest of what it needs, then for the first pages, which would stand in its way
  const Split<TurnerOf<C>::kSlots> split(p, row, block.split);
  const int* table = in.page_table + (size_t)blockIdx.z * p.max_pages;
  Round round = split.round(0, split.begin);
  Maker<D, C::NC> maker;
  turner.load(round.slots, in.trig, 0);
  Share share(p, table, block.head * kHeadUnits, round.from, round.to);
  share.fetch(in.pool, kHeadUnits * 64);
  if (split.has_exact) ask_for_ring<C>(in, p, row, block.row_head, split.first_exact);
  if constexpr (Math::kWhole) turner.set_unit(sh, math.bound * p.scale);
  turner.turn(sh, round.slots, in.trig, p.scale);
  maker.load(frags);
  key_row.spread(smem);
  value_row.spread(smem);
  if (threadIdx.x < 8)
    sh.pages_seen[threadIdx.x] = num_code_pages(row.start + (block.first_column + threadIdx.x) % C::L, p.window);
  __syncthreads();
  make_queries<C>(maker, math, sh, round.slots);
  __syncthreads();
  math.start();

  // 3. exact tokens and pages, a round at a time
  for (;;) {
    if (split.is_last(round) && split.has_exact)
      add_exact_tokens<C>(math, sh, round.slots, in, p, row, block, split.first_exact);
    if (share.count > 0) add_pages<C>(math, sh, round.slots, share, in.pool, p, row.min_pages);
    if (split.is_last(round)) break;
    round = split.round(round.index + 1, round.to);
    share = Share(p, table, block.head * kHeadUnits, round.from, round.to);
    share.fetch(in.pool, kHeadUnits * 64);
    next_queries<C>(in, block, round.slots, frags, p.scale, math, sh);
  }

  // 4. merge
  if (block.split == 0) fetch_lines<D * D * 2>(in.value_inverse + (size_t)block.head * D * D);
  merge<C>(math, smem, sh, in, block, row.splits);
}

}  // namespace vecinfer_mma

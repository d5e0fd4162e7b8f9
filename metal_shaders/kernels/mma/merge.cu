// mma/merge: from the warps' sums to the output: over the warps, over a row's splits, through the values' inverse.
//
// What     out = (sum_w 2^(max_w - max) o_w / sum) . T_v^-1 + mean. The last block of a (row, KV head, column group) to
//          arrive merges the splits, which lie in `partial`; `tickets` tell which one that is.
//          A learned sink of score s leaves the tokens their share of out, sum / (sum + 2^(s log2(e) - max)).
// Inputs   value_inverse [Hkv, D, D] float16, value_mean [Hkv, D] float32, sink_logits [Hq] float32, tickets int32: zero
//          before and after.
// Outputs  out [B, Hq, L, D] T; partial [pairs, splits, NC, D], split_stats [pairs, splits, NC, 2] float32, scratch.
// Memory   Merge, where the tables were; the inverse where the queries were.
// Bytes    a split's sums 4 NC D out and in, the inverse 2 D D once an output.
// Numerics float32; the inverse float16.
// Limits   512 splits.
namespace vecinfer_mma {

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
__device__ __forceinline__ void leave_column(Merge<D, NC>& sh, int column, const float (&o)[N][K], int k, float max,
                                             float sum) {
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
    if (lane == 0) sh.stats[c * 2] = top, sh.stats[c * 2 + 1] = total;
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

// out = sums / total . inverse + mean, times share(column). A thread multiplies 4 output dims with its part of the rows.
template <typename T, int D, int NC, typename F>
__device__ __forceinline__ void write_out(T* out, Merge<D, NC>& sh, const void* inverse, const float* mean,
                                          int num_columns, F share) {
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
    out[i] = from_float<T>((v / sh.stats[i / D * 2 + 1] + mean[i % D]) * share(i / D));
  }
}

// Leaves a split's sums where the block that merges them finds them; true in that one, the last to arrive.
template <int D, int NC>
__device__ __forceinline__ bool leave_split(const Merge<D, NC>& merged, Scratch<D>& sh, float* partial,
                                            float* split_stats, int split, int* ticket, int splits) {
  if (threadIdx.x < NC * D / 4)
    reinterpret_cast<float4*>(partial + split * NC * D)[threadIdx.x] =
        reinterpret_cast<const float4*>(merged.sums)[threadIdx.x];
  if (threadIdx.x < NC * 2) split_stats[split * NC * 2 + threadIdx.x] = merged.stats[threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) sh.flag = atomicAdd(ticket, 1) == splits - 1;
  __syncthreads();
  if (!sh.flag) return false;
  __threadfence();
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

// The end of every block: merges its warps, then, in a row's last block, its splits, and writes the output.
template <typename C>
__device__ __forceinline__ void merge(typename C::Math& math, unsigned char* smem, Scratch<C::D>& sh,
                                      const Arguments<typename C::T>& in, const Block<C>& block, int splits) {
  constexpr int D = C::D, NC = C::NC;
  Merge<D, NC>& merged = *reinterpret_cast<Merge<D, NC>*>(smem);
  static_assert(sizeof(merged) <= kTableBytes);
  const __half* inverse = in.value_inverse + (size_t)block.head * D * D;
  math.total_sums();
  __syncthreads();  // nobody reads tables or queries any more
  if (splits == 1) copy_inverse<D>(&sh, inverse);
  math.leave(merged);
  __syncthreads();
  merge_warps(merged);
  if (splits > 1) {
    const int pair = blockIdx.z * gridDim.y + blockIdx.y;
    const size_t base = (size_t)pair * gridDim.x;
    float *partial = in.partial + base * NC * D, *stats = in.split_stats + base * NC * 2;
    if (!leave_split(merged, sh, partial, stats, block.split, in.tickets + pair, splits)) return;
    copy_inverse<D>(&sh, inverse);
    merge_splits<D, NC>(merged, partial, reinterpret_cast<const float2*>(stats), splits);
  }
  wait_for_copy();
  __syncthreads();
  const auto share = [&](int column) {
    if constexpr (!C::SINKS) return 1.f;
    const float sink = in.sink_logits[block.head * C::GQA + (block.first_column + column) / C::L] * 1.44269504088896f;
    const float total = merged.stats[column * 2 + 1];
    return total / (total + ex2(sink - merged.stats[column * 2]));
  };
  write_out<typename C::T, D, NC>(in.out + block.query_offset, merged, &sh, in.value_mean + block.head * D,
                                  block.num_columns, share);
}

}  // namespace vecinfer_mma

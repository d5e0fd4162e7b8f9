// vq_attention_merge: joins the partial softmaxes of one query and takes the output out of code space.
//
// What       o~ = sum_w exp2(max_w - max) o~_w / sum_w exp2(max_w - max) sum_w;  out = o~ T^-1 + mean.
//            A learned sink of score s, one more term of the denominator, leaves the tokens their share of out:
//            sum / (sum + exp2(s log2(e) - max)).
// Inputs     partial_out [W, Hkv, N, D] f32, partial_max, partial_sum [W, Hkv, N] f32, inverse [Hkv, D, D] f32,
//            mean [Hkv, D] f32, sink_logits [Hq] any float (read with SINKS only), runs [B, 2] i32: first work item
//            of the row, how many; sizes [2] i32: Hkv, L
// Outputs    out [B, Hq, L, D] OUT
// Launch     grid (PARTS * WIDTH, Hkv * N, B), threadgroup (PARTS * WIDTH, 1, 1); WIDTH = D rounded up to 32
// Template   OUT | HEAD_DIM | PARTS 2,4: threads that share a channel | SINKS 0,1: the layer has learned sinks
// Memory     threadgroup: (MAX_RUNS + (PARTS + 1) * HEAD_DIM) f32
// Bytes      reads (D + 2) * 4 per work item and query, and D * D * 4 per query
// Numerics   f32; every row has at least one visible token
// Limits     at most 1,024 work items a row
constexpr int WIDTH = (HEAD_DIM + 31) / 32 * 32;
constexpr int MAX_RUNS = 1024;
threadgroup float factors[MAX_RUNS];
threadgroup float joined[HEAD_DIM];
threadgroup float shares[PARTS * HEAD_DIM];

const int thread_id = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int channel = thread_id % WIDTH;
const int part = thread_id / WIDTH;
const int row = int(threadgroup_position_in_grid.z);
const size_t query = size_t(threadgroup_position_in_grid.y);
const size_t num_queries = size_t(threadgroups_per_grid.y);
const int first = runs[row * 2];
const int count = runs[row * 2 + 1];

// 1. weight of every run; each simdgroup finds the maximum and sum for itself
float top = -1e30f;
for (int i = lane; i < count; i += 32) {
  top = metal::max(top, partial_max[size_t(first + i) * num_queries + query]);
}
top = simd_max(top);
float sum = 0.0f;
for (int i = lane; i < count; i += 32) {
  const size_t at = size_t(first + i) * num_queries + query;
  const float factor = metal::fast::exp2(partial_max[at] - top);
  sum += factor * partial_sum[at];
  if (thread_id < 32) {
    factors[i] = factor;
  }
}
sum = simd_sum(sum);
threadgroup_barrier(mem_flags::mem_threadgroup);

// 2. o~
if (channel < HEAD_DIM) {
  float total = 0.0f;
  for (int i = part; i < count; i += PARTS) {
    total += factors[i] * partial_out[(size_t(first + i) * num_queries + query) * HEAD_DIM + size_t(channel)];
  }
  shares[part * HEAD_DIM + channel] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_id < HEAD_DIM) {
  float total = 0.0f;
  for (int p = 0; p < PARTS; ++p) {
    total += shares[p * HEAD_DIM + thread_id];
  }
  joined[thread_id] = total / sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// 3. times T^-1, plus the mean
const int kv_head = int(threadgroup_position_in_grid.y) / (int(threadgroups_per_grid.y) / sizes[0]);
if (channel < HEAD_DIM) {
  float total = 0.0f;
  const device float* column = inverse + size_t(kv_head) * (HEAD_DIM * HEAD_DIM) + channel;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / PARTS; ++i) {
    const int r = i * PARTS + part;
    total += joined[r] * column[r * HEAD_DIM];
  }
  shares[part * HEAD_DIM + channel] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_id < HEAD_DIM) {
  float total = mean[kv_head * HEAD_DIM + thread_id];
  for (int p = 0; p < PARTS; ++p) {
    total += shares[p * HEAD_DIM + thread_id];
  }
  if (SINKS) {
    const float sink = float(sink_logits[int(threadgroup_position_in_grid.y) / sizes[1]]) * 1.44269504088896f;
    total *= sum / (sum + metal::fast::exp2(sink - top));
  }
  out[(size_t(row) * num_queries + query) * HEAD_DIM + size_t(thread_id)] = OUT(total);
}

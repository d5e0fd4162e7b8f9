// vq_attention_queries: decode queries turned back by every bucket they read, with the keys' mean term.
//
// What       rotated_b = R(-b) q * factor, mean_scores_b = <rotated_b, mean>; one matmul by T^-T follows
//            (code_space.py: queries_in). factor = scale * log2(e).
// Inputs     queries [B, Hq, L, D] f16|bf16|f32, mean [Hkv, D] f32, cosines, sines [buckets, dims / 2] f32
//            entries [E, 2] i32: row, bucket      sizes [4] i32: E, N, 0, 0      factor [1] f32
// Outputs    rotated [Hkv, E * N, D] A, mean_scores [Hkv, E * N] f32
// Launch     grid (ceil(E / 8) * 256, Hkv, N), threadgroup (256, 1, 1): one simdgroup per (entry, KV head, query)
// Template   T | A f16 | f32 | HEAD_DIM | ROTARY_DIMS (0: keys are position-blind) | TRADITIONAL 0,1
// Memory     threadgroup: none
// Bytes      reads N * D, writes E * N * (D of A + 4) per KV head
// Numerics   f32; `rotated` is rounded once
// Limits     E * N * Hkv * D < 2^62
const int lane = int(thread_index_in_simdgroup);
const int num_entries = sizes[0];
const int num_queries = sizes[1];
const int entry = int(threadgroup_position_in_grid.x) * 8 + int(simdgroup_index_in_threadgroup);
const int kv_head = int(threadgroup_position_in_grid.y);
const int num_kv_heads = int(threadgroups_per_grid.y);
const int n = int(threadgroup_position_in_grid.z);
if (entry < num_entries) {
  const int row = entries[entry * 2];
  const int bucket = entries[entry * 2 + 1];
  const device T* query =
      queries + ((size_t(row) * size_t(num_kv_heads) + size_t(kv_head)) * size_t(num_queries) + size_t(n)) * HEAD_DIM;
  const size_t out = (size_t(kv_head) * size_t(num_entries) + size_t(entry)) * size_t(num_queries) + size_t(n);
  float dot = 0.0f;
  for (int c = lane; c < HEAD_DIM; c += 32) {
    const float x = factor[0] * turned_back<T, ROTARY_DIMS, TRADITIONAL>(query, c, cosines + bucket * (ROTARY_DIMS / 2),
                                                                         sines + bucket * (ROTARY_DIMS / 2));
    rotated[out * HEAD_DIM + size_t(c)] = A(x);
    dot += x * mean[kv_head * HEAD_DIM + c];
  }
  dot = simd_sum(dot);
  if (lane == 0) {
    mean_scores[out] = dot;
  }
}

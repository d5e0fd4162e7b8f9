// vecinfer_encode_decode: raw vectors as they come back out of their codes, in one launch.
//
// What       reconstructed[t] = centroids(code[t]) T^-1 + mean, code as in vecinfer_quantize
// Inputs     vectors [A, Hkv, T, D] f16|bf16|f32, mean [Hkv, D] f32, transform, inverse [Hkv, D, D] f32
//            tables [Hkv, entries] f16: sections one after another, each [G, 256, d]; sizes [2] i32: T, Hkv
// Outputs    reconstructed [A, Hkv, T, D] T
// Launch     grid (256 * ceil(T / 8), A * Hkv, 1), threadgroup (256, 1, 1): 8 vectors of one head
// Template   T | M0 D0 G0 M1 D1 G1 (M1 0: one section)
// Memory     threadgroup: 2 * 8 * D f32, at most 16,384 B
// Bytes      each vector once in and once out; the matrices and the tables through the cache
// Numerics   f32, (x - mean) T rounded to f16, the result to T once
// Limits     T < 2^31 - 8
constexpr int HEAD_DIM = M0 * D0 + M1 * D1;
threadgroup float centred[8 * HEAD_DIM];
threadgroup float inside[8 * HEAD_DIM];
const int thread_id = int(thread_index_in_threadgroup);
const int first_row = int(threadgroup_position_in_grid.x) * 8;
const size_t head = size_t(threadgroup_position_in_grid.y);
const size_t kv_head = head % size_t(sizes[1]);
const size_t first = head * size_t(sizes[0]) * HEAD_DIM;
const device half* head_tables = tables + kv_head * (NUM_CENTROIDS * (G0 * D0 + (M1 ? G1 * D1 : 0)));
const device float* head_mean = mean + kv_head * HEAD_DIM;
load_centred<T, HEAD_DIM, 8>(vectors + first, head_mean, first_row, sizes[0], thread_id, 256, centred);
threadgroup_barrier(mem_flags::mem_threadgroup);
times_matrix<HEAD_DIM, 8>(centred, transform + kv_head * HEAD_DIM * HEAD_DIM, thread_id, 256, inside);
threadgroup_barrier(mem_flags::mem_threadgroup);
snap_tile<HEAD_DIM, 8, M0, D0, G0>(inside, head_tables, thread_id, 256);
if (M1) {
  snap_tile<HEAD_DIM, 8, M1 ? M1 : 8, D1, G1>(inside + M0 * D0, head_tables + NUM_CENTROIDS * G0 * D0, thread_id, 256);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
times_matrix<HEAD_DIM, 8>(inside, inverse + kv_head * HEAD_DIM * HEAD_DIM, thread_id, 256, centred);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_id; i < 8 * HEAD_DIM; i += 256) {
  if (first_row + i / HEAD_DIM < sizes[0]) {
    reconstructed[first + size_t(first_row) * HEAD_DIM + size_t(i)] = T(centred[i] + head_mean[i % HEAD_DIM]);
  }
}

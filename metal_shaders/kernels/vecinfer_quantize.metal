// vecinfer_quantize: a raw vector's whole way into its codes, in one launch.
//
// What       code[t, j] = argmin_c || ((x[t] - mean) T)[j] - tables[table(j), c] ||^2    VecInfer (arXiv:2510.06175)
// Inputs     vectors [A, Hkv, T, D] f16|bf16|f32, mean [Hkv, D] f32, transform [Hkv, D, D] f32
//            tables [Hkv, entries] f16: sections one after another, each [G, 256, d]; sizes [2] i32: T, Hkv
// Outputs    codes [A, Hkv, T, M0 + M1] u8
// Launch     grid (256 * ceil(T / 8), A * Hkv, 1), threadgroup (256, 1, 1): 8 vectors of one head
// Template   T | M0 D0 G0 M1 D1 G1 (M1 0: one section)
// Memory     threadgroup: 2 * 8 * D f32, at most 16,384 B
// Bytes      each vector once, each code once; the matrix and the tables through the cache
// Numerics   f32, (x - mean) T rounded to f16, squared differences; ties go to the lower code
// Limits     T < 2^31 - 8
constexpr int HEAD_DIM = M0 * D0 + M1 * D1;
threadgroup float centred[8 * HEAD_DIM];
threadgroup float inside[8 * HEAD_DIM];
const int thread_id = int(thread_index_in_threadgroup);
const int first_row = int(threadgroup_position_in_grid.x) * 8;
const size_t head = size_t(threadgroup_position_in_grid.y);
const size_t kv_head = head % size_t(sizes[1]);
const size_t num_tokens = size_t(sizes[0]);
const device half* head_tables = tables + kv_head * (NUM_CENTROIDS * (G0 * D0 + (M1 ? G1 * D1 : 0)));
device uchar* head_codes = codes + (head * num_tokens + size_t(first_row)) * (M0 + M1);
load_centred<T, HEAD_DIM, 8>(vectors + head * num_tokens * HEAD_DIM, mean + kv_head * HEAD_DIM, first_row, sizes[0],
                             thread_id, 256, centred);
threadgroup_barrier(mem_flags::mem_threadgroup);
times_matrix<HEAD_DIM, 8>(centred, transform + kv_head * HEAD_DIM * HEAD_DIM, thread_id, 256, inside);
threadgroup_barrier(mem_flags::mem_threadgroup);
encode_tile<HEAD_DIM, 8, M0, D0, G0, M0 + M1>(inside, head_tables, sizes[0] - first_row, thread_id, 256, head_codes);
if (M1) {
  encode_tile<HEAD_DIM, 8, M1 ? M1 : 8, D1, G1, M0 + M1>(inside + M0 * D0, head_tables + NUM_CENTROIDS * G0 * D0,
                                                         sizes[0] - first_row, thread_id, 256, head_codes + M0);
}

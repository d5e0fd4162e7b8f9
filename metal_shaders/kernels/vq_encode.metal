// vq_encode: code-space vectors to codes, one byte per sub-vector.
//
// What       code[t, j] = argmin_c || x~[t, j] - codebook[table(j), c] ||^2     VecInfer (arXiv:2510.06175), product VQ
// Inputs     vectors [A, Hkv, T, D] f16|f32, tables [Hkv, entries] f16: sections one after another, each [G, 256, d]
//            sizes [2] i32: T, Hkv
// Outputs    codes [A, Hkv, T, M0 + M1] u8
// Launch     grid (128 * tiles, G0 + G1, A * Hkv), threadgroup (128, 1, 1), tiles = ceil(T * sub-vectors of a table / 512)
//            threadgroup = 512 items (token, sub-vector) of one table of one head; a thread has 4 items
// Template   T | M0 D0 G0 M1 D1 G1 (M1 0: one section)
// Memory     threadgroup: one table, 256 (d + 1) f32 = 9,216 B at d 8
// Bytes      reads each vector once, writes each code once
// Numerics   f32; ||c||^2 - 2 <x, c>; ties go to the lower code
// Limits     T < 2^24
constexpr int HEAD_DIM = M0 * D0 + M1 * D1;
constexpr int BYTES = M0 + M1;
threadgroup float centroids[NUM_CENTROIDS * ((D0 > D1 ? D0 : D1) + 1)];

const int thread_id = int(thread_index_in_threadgroup);
const int tile = int(threadgroup_position_in_grid.x);
const int table = int(threadgroup_position_in_grid.y);
const size_t head = size_t(threadgroup_position_in_grid.z);
const size_t num_tokens = size_t(sizes[0]);
const device T* head_vectors = vectors + head * num_tokens * HEAD_DIM;
device uchar* head_codes = codes + head * num_tokens * BYTES;
const device half* head_tables =
    tables + size_t(int(threadgroup_position_in_grid.z) % sizes[1]) *
                 (NUM_CENTROIDS * (G0 * D0 + (M1 ? G1 * D1 : 0)));
if (table < G0) {
  encode_section<T, M0, D0, G0, HEAD_DIM, BYTES, 4>(head_vectors, head_tables, table, sizes[0], tile, thread_id, 128,
                                                    centroids, head_codes);
} else if (M1) {
  encode_section<T, M1 ? M1 : 8, D1, G1, HEAD_DIM, BYTES, 4>(
      head_vectors + M0 * D0, head_tables + NUM_CENTROIDS * G0 * D0, table - G0, sizes[0], tile, thread_id, 128,
      centroids, head_codes + M0);
}

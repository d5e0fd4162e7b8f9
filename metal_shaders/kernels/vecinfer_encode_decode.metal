// vecinfer_encode_decode: codes of the smooth + Hadamard key path and what they stand for, in one launch.
//
// What       code as in vecinfer_quantize; reconstructed[t] = (centroids(code[t]) H^T) * lambda
// Inputs     vectors [T, D] f16|bf16|f32, smooth_factors [D] f32, hadamard [D, D] f32 (orthogonal)
//            codebook [G, C, d] f32, sizes [2] i32: T, 0
// Outputs    codes [T, D / d] u8, reconstructed [T, D] T
// Launch     grid (256 * ceil(T / 8), 1, 1), threadgroup (256, 1, 1): 8 vectors
// Template   T | HEAD_DIM | SUBVEC_DIM | NUM_CODES C <= 256 | NUM_TABLES G
// Memory     threadgroup: 2 * 8 * HEAD_DIM f32, at most 16,384 B
// Bytes      each vector once in and once out, each code once
// Numerics   f32, rounded to T once
// Limits     T < 2^31
threadgroup float smoothed[8 * HEAD_DIM];
threadgroup float rotated[8 * HEAD_DIM];
const int thread_id = int(thread_index_in_threadgroup);
const int first_row = int(threadgroup_position_in_grid.x) * 8;
load_smoothed<T, HEAD_DIM, 8>(vectors, smooth_factors, first_row, sizes[0], thread_id, 256, smoothed);
threadgroup_barrier(mem_flags::mem_threadgroup);
times_matrix<HEAD_DIM, 8>(smoothed, hadamard, HEAD_DIM, 1, thread_id, 256, rotated);
threadgroup_barrier(mem_flags::mem_threadgroup);
encode_tile<HEAD_DIM, 8, NUM_CODES, SUBVEC_DIM, NUM_TABLES>(codebook, first_row, sizes[0], thread_id, 256, rotated,
                                                            codes);
threadgroup_barrier(mem_flags::mem_threadgroup);
times_matrix<HEAD_DIM, 8>(rotated, hadamard, 1, HEAD_DIM, thread_id, 256, smoothed);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_id; i < 8 * HEAD_DIM; i += 256) {
  if (first_row + i / HEAD_DIM < sizes[0]) {
    reconstructed[size_t(first_row) * HEAD_DIM + size_t(i)] = T(smoothed[i] * smooth_factors[i % HEAD_DIM]);
  }
}

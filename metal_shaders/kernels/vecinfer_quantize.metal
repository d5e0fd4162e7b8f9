// vecinfer_quantize: the whole key path of the smooth + Hadamard transform in one launch.
//
// What       code[t, j] = argmin_c || (x[t] / lambda H)[j] - codebook[table(j), c] ||^2    VecInfer (arXiv:2510.06175)
// Inputs     vectors [T, D] f16|bf16|f32, smooth_factors [D] f32, hadamard [D, D] f32 (orthogonal)
//            codebook [G, C, d] f32, sizes [2] i32: T, 0
// Outputs    codes [T, D / d] u8
// Launch     grid (256 * ceil(T / 8), 1, 1), threadgroup (256, 1, 1): 8 vectors
// Template   T | HEAD_DIM | SUBVEC_DIM | NUM_CODES C <= 256 | NUM_TABLES G
// Memory     threadgroup: 2 * 8 * HEAD_DIM f32, at most 16,384 B
// Bytes      each vector once, each code once; the matrix and the tables through the cache
// Numerics   f32, squared differences; ties go to the lower code
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

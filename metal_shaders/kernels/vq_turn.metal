// vq_turn: the columns' keys out of code space, after the product with T^-1: raw keys.
//
// What       k = R(b) (y + mean), y = k~ T^-1, b the start of the column's bucket
// Inputs     vectors [B, Hkv, C, D] f16: y, mean [Hkv, D] f32, cosines, sines [buckets, dims / 2] f32
//            rows [B, 8] i32: see vq_columns, sizes [2] i32: C, bucket_len
// Outputs    keys [B, Hkv, C, D] f16
// Launch     grid (256, Hkv, B * C / P), threadgroup (256, 1, 1); threadgroup = one block of P columns of a head of a row
// Template   HEAD_DIM | ROTARY_DIMS | TRADITIONAL 0,1
// Memory     none
// Bytes      each vector in and out once
// Numerics   f32, rounded to f16 once
// Limits     C a multiple of P
const int thread_id = int(thread_index_in_threadgroup);
const int num_kv_heads = int(threadgroups_per_grid.y);
const int kv_head = int(threadgroup_position_in_grid.y);
const int blocks = sizes[0] / VQ_PAGE_SIZE;
const int row = int(threadgroup_position_in_grid.z) / blocks;
const int block = int(threadgroup_position_in_grid.z) % blocks;
const int num_coded = rows[row * 8 + 1];
const int base = block < num_coded ? block * VQ_PAGE_SIZE : rows[row * 8 + 3] + (block - num_coded) * VQ_PAGE_SIZE;
const int count = block < num_coded ? VQ_PAGE_SIZE : min(VQ_PAGE_SIZE, rows[row * 8 + 4] - base);
const size_t at = ((size_t(row) * size_t(num_kv_heads) + size_t(kv_head)) * size_t(sizes[0]) +
                   size_t(block) * VQ_PAGE_SIZE) * HEAD_DIM;
const device half* source = vectors + at;
device half* out = keys + at;
const device float* key_mean = mean + kv_head * HEAD_DIM;
// A block lies in one bucket; behind the last position there is nothing to turn, and perhaps no such bucket.
const int bucket = count > 0 ? base / sizes[1] : 0;
for (int i = thread_id; i < VQ_PAGE_SIZE * HEAD_DIM; i += 256) {
  const int token = i / HEAD_DIM;
  out[i] = token < count ? half(turned_on<ROTARY_DIMS, TRADITIONAL>(source + token * HEAD_DIM, key_mean, i % HEAD_DIM,
                                                                   cosines + bucket * (ROTARY_DIMS / 2),
                                                                   sines + bucket * (ROTARY_DIMS / 2)))
                         : half(0);
}

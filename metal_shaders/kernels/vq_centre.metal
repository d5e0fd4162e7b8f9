// vq_centre: a prompt chunk's raw keys turned back and centred, its values centred: what T is multiplied with.
//
// What       k' = R(-b) k - mean, v' = v - mean (code_space.py: keys_in, values_in, before the product)
// Inputs     keys, values [B, L, Hkv, D] f16|bf16|f32, as a model's projections leave them
//            key_mean, value_mean [Hkv, D] f32
//            cosines, sines [buckets, dims / 2] f32, starts [B] i32, sizes [2] i32: L, bucket_len
// Outputs    centred [2, B, Hkv, L, D] f16: keys, then values
// Launch     grid (256, 2 * Hkv, B * ceil(L / 32)), threadgroup (256, 1, 1)
//            threadgroup = 32 tokens of the keys (even y) or values (odd y) of one head of one row
// Template   T | HEAD_DIM | ROTARY_DIMS | TRADITIONAL 0,1
// Memory     none
// Bytes      each vector in and out once (keys twice in, through the cache)
// Numerics   f32, rounded to f16 once
// Limits     keys and values of one head size
const int thread_id = int(thread_index_in_threadgroup);
const int num_kv_heads = int(threadgroups_per_grid.y) / 2;
const int kv_head = int(threadgroup_position_in_grid.y) / 2;
const bool is_key = int(threadgroup_position_in_grid.y) % 2 == 0;
const int length = sizes[0];
const int tiles = (length + 31) / 32;
const int row = int(threadgroup_position_in_grid.z) / tiles;
const int first = int(threadgroup_position_in_grid.z) % tiles * 32;
const int batch = int(threadgroups_per_grid.z) / tiles;
const size_t at = ((size_t(row) * size_t(num_kv_heads) + size_t(kv_head)) * size_t(length) + size_t(first)) * HEAD_DIM;
const size_t half_size = size_t(batch) * size_t(num_kv_heads) * size_t(length) * HEAD_DIM;
const size_t pitch = size_t(num_kv_heads) * HEAD_DIM;
const device T* source = (is_key ? keys : values) + (size_t(row) * size_t(length) + size_t(first)) * pitch +
                         size_t(kv_head) * HEAD_DIM;
device half* out = centred + (is_key ? at : half_size + at);
const device float* mean = (is_key ? key_mean : value_mean) + kv_head * HEAD_DIM;
const int start = starts[row] + first;
for (int i = thread_id; i < min(32, length - first) * HEAD_DIM; i += 256) {
  const int token = i / HEAD_DIM;
  const int c = i % HEAD_DIM;
  const int bucket = (start + token) / sizes[1];
  const float x = is_key ? turned_back<T, ROTARY_DIMS, TRADITIONAL>(source + size_t(token) * pitch, c,
                                                                    cosines + bucket * (ROTARY_DIMS / 2),
                                                                    sines + bucket * (ROTARY_DIMS / 2))
                         : float(source[size_t(token) * pitch + size_t(c)]);
  out[i] = half(x - mean[c]);
}

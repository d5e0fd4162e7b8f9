// vq_append: up to 8 new keys and values per row into code space and into their ring slots; the ring's new contents.
//
// What       k~ = (R(-b) k - mean) T, v~ = (v - mean) T (code_space.py: keys_in, values_in); the token at position p goes
//            to slot p % RING, the other slots are copied
// Inputs     keys, values [B, Hkv, LEN, D] f16|bf16|f32, old_keys, old_values [B, Hkv, RING, D] f16
//            key_mean, value_mean [Hkv, D] f32, key_transform, value_transform [Hkv, D, D] f32
//            cosines, sines [buckets, dims / 2] f32, spans [B, 2] i32: start, length <= LEN
//            sizes [2] i32: RING, bucket_len
// Outputs    ring_keys, ring_values [B, Hkv, RING, D] f16
// Launch     grid (PARTS * WIDTH, 2 * Hkv, B), threadgroup (PARTS * WIDTH, 1, 1); WIDTH = D rounded up to 32
//            threadgroup = the keys (even y) or values (odd y) of one head of one row
// Template   T | HEAD_DIM | LEN 1-8 | PARTS 2,4 | ROTARY_DIMS | TRADITIONAL 0,1
// Memory     threadgroup: (PARTS + 1) * LEN * HEAD_DIM f32, at most 24,576 B
// Bytes      per head: T once (4 D D), the ring once in and once out
// Numerics   f32, rounded to f16 once
// Limits     HEAD_DIM a multiple of 4; keys and values of one head size; LEN <= RING
constexpr int WIDTH = (HEAD_DIM + 31) / 32 * 32;
constexpr int THREADS = PARTS * WIDTH;
threadgroup float centred[LEN * HEAD_DIM];
threadgroup float shares[PARTS * LEN * HEAD_DIM];

const int thread_id = int(thread_index_in_threadgroup);
const int channel = thread_id % WIDTH;
const int part = thread_id / WIDTH;
const int num_kv_heads = int(threadgroups_per_grid.y) / 2;
const int kv_head = int(threadgroup_position_in_grid.y) / 2;
const bool is_key = int(threadgroup_position_in_grid.y) % 2 == 0;
const int row = int(threadgroup_position_in_grid.z);
const int start = spans[row * 2];
const int length = spans[row * 2 + 1];
const int ring_slots = sizes[0];
const size_t head_row = size_t(row) * size_t(num_kv_heads) + size_t(kv_head);
const device T* source = (is_key ? keys : values) + head_row * (LEN * HEAD_DIM);
const device half* old = (is_key ? old_keys : old_values) + head_row * size_t(ring_slots) * HEAD_DIM;
device half* ring = (is_key ? ring_keys : ring_values) + head_row * size_t(ring_slots) * HEAD_DIM;
const device float* mean = (is_key ? key_mean : value_mean) + kv_head * HEAD_DIM;
const device float* transform = (is_key ? key_transform : value_transform) + size_t(kv_head) * (HEAD_DIM * HEAD_DIM);

// 1. turned back and centred
for (int i = thread_id; i < LEN * HEAD_DIM; i += THREADS) {
  const int token = i / HEAD_DIM;
  const int c = i % HEAD_DIM;
  const int bucket = (start + min(token, max(length - 1, 0))) / sizes[1];
  const float x = is_key ? turned_back<T, ROTARY_DIMS, TRADITIONAL>(source + token * HEAD_DIM, c,
                                                                    cosines + bucket * (ROTARY_DIMS / 2),
                                                                    sines + bucket * (ROTARY_DIMS / 2))
                         : float(source[i]);
  centred[i] = x - mean[c];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// 2. times T: PARTS threads share a column
if (channel < HEAD_DIM) {
  float total[LEN];
  for (int l = 0; l < LEN; ++l) {
    total[l] = 0.0f;
  }
  for (int r = part; r < HEAD_DIM; r += PARTS) {
    const float t = transform[r * HEAD_DIM + channel];
    for (int l = 0; l < LEN; ++l) {
      total[l] += centred[l * HEAD_DIM + r] * t;
    }
  }
  for (int l = 0; l < LEN; ++l) {
    shares[(part * LEN + l) * HEAD_DIM + channel] = total[l];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// 3. new slots
for (int i = thread_id; i < length * HEAD_DIM; i += THREADS) {
  float total = 0.0f;
  for (int p = 0; p < PARTS; ++p) {
    total += shares[p * LEN * HEAD_DIM + i];
  }
  ring[(start + i / HEAD_DIM) % ring_slots * HEAD_DIM + i % HEAD_DIM] = half(total);
}

// 4. the other slots
for (int i = thread_id; i < ring_slots * (HEAD_DIM / 4); i += THREADS) {
  const int slot = i / (HEAD_DIM / 4);
  if ((slot - start % ring_slots + ring_slots) % ring_slots >= length) {
    ((device half4*)ring)[i] = ((const device half4*)old)[i];
  }
}

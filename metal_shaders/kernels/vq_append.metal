// vq_append: up to 8 new keys and values per row into code space and into their ring slots; the ring's new contents.
//
// What       k~ = (R(-b) k - mean) T, v~ = (v - mean) T (code_space.py: keys_in, values_in); the token at position p goes
//            to slot p % RING, the other slots are copied
// Inputs     keys, values [B, Hkv, LEN, D] f16|bf16|f32, old_keys, old_values [B, Hkv, RING, D] f16
//            key_mean, value_mean [Hkv, D] f32, key_transform, value_transform [Hkv, D, D] f32
//            cosines, sines [buckets, dims / 2] f32, spans [B, 2] i32: start, length <= LEN
//            sizes [2] i32: RING, bucket_len
// Outputs    ring_keys, ring_values [B, Hkv, RING, D] f16
// Launch     grid (256, 8 * Hkv, B), threadgroup (256, 1, 1)
//            threadgroup = a quarter of the channels of the keys (y / 4 even) or values (odd) of one head of one row, and
//            a quarter of the slots that are copied
// Template   T | HEAD_DIM | LEN 1-8 | ROTARY_DIMS | TRADITIONAL 0,1
// Memory     threadgroup: LEN * (HEAD_DIM + 256) f32, at most 16,384 B
// Bytes      per head: T once (4 D D), the ring once in and once out, the new vectors four times
// Numerics   f32, rounded to f16 once
// Limits     HEAD_DIM a multiple of 4; keys and values of one head size; LEN <= RING
constexpr int CHANNELS = HEAD_DIM / 4;
constexpr int PARTS = 256 / CHANNELS;  // threads that share a channel
threadgroup float centred[LEN * HEAD_DIM];
threadgroup float shares[PARTS * LEN * CHANNELS];

const int thread_id = int(thread_index_in_threadgroup);
const int channel = thread_id % CHANNELS;
const int part = thread_id / CHANNELS;
const int quarter = int(threadgroup_position_in_grid.y) % 4;
const int num_kv_heads = int(threadgroups_per_grid.y) / 8;
const int kv_head = int(threadgroup_position_in_grid.y) / 8;
const bool is_key = int(threadgroup_position_in_grid.y) / 4 % 2 == 0;
const int row = int(threadgroup_position_in_grid.z);
const int start = spans[row * 2];
const int length = spans[row * 2 + 1];
const int ring_slots = sizes[0];
const size_t head_row = size_t(row) * size_t(num_kv_heads) + size_t(kv_head);
const device T* source = (is_key ? keys : values) + head_row * (LEN * HEAD_DIM);
const device half* old = (is_key ? old_keys : old_values) + head_row * size_t(ring_slots) * HEAD_DIM;
device half* ring = (is_key ? ring_keys : ring_values) + head_row * size_t(ring_slots) * HEAD_DIM;
const device float* mean = (is_key ? key_mean : value_mean) + kv_head * HEAD_DIM;
const device float* transform =
    (is_key ? key_transform : value_transform) + size_t(kv_head) * (HEAD_DIM * HEAD_DIM) + quarter * CHANNELS;

// 1. slots that stay; first, since nothing waits for them
const int num_slots = (ring_slots + 3) / 4;
const int last_slot = min(ring_slots, (quarter + 1) * num_slots);
for (int i = quarter * num_slots * (HEAD_DIM / 4) + thread_id; i < last_slot * (HEAD_DIM / 4); i += 256) {
  const int slot = i / (HEAD_DIM / 4);
  if ((slot - start % ring_slots + ring_slots) % ring_slots >= length) {
    ((device half4*)ring)[i] = ((const device half4*)old)[i];
  }
}

// 2. turned back and centred
for (int i = thread_id; i < LEN * HEAD_DIM; i += 256) {
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

// 3. times T: PARTS threads share a column
if (part < PARTS) {
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
    shares[(part * LEN + l) * CHANNELS + channel] = total[l];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// 4. new slots
for (int i = thread_id; i < length * CHANNELS; i += 256) {
  float total = 0.0f;
  for (int p = 0; p < PARTS; ++p) {
    total += shares[p * LEN * CHANNELS + i];
  }
  ring[(start + i / CHANNELS) % ring_slots * HEAD_DIM + quarter * CHANNELS + i % CHANNELS] = half(total);
}

// vq_extend: a prompt chunk's exact vectors to where they are read: rings and sinks, and the chunk behind what went before.
//
// What       ring slot s: the youngest position p with p % R = s, from the chunk or the old ring; sink i: position i
//            exact: positions begin ... end - 1, begin = P np(start), from the ring or the chunk; zero behind them
// Inputs     vectors [2, B, Hkv, L, D] f16: k~, then v~; old_keys, old_values [B, Hkv, R, D] f16
//            old_sink_keys, old_sink_values [B, Hkv, S, D] f16, rows [B, 4] i32: begin, start, end, 0
//            sizes [4] i32: L, E, R, S
// Outputs    exact [2, B, Hkv, E, D] f16, ring_keys, ring_values [B, Hkv, R, D] f16
//            sink_keys, sink_values [B, Hkv, S, D] f16
// Launch     grid (256, 2 * Hkv, B * ceil((E + R + S) / 64)), threadgroup (256, 1, 1)
//            threadgroup = 64 slots of exact, ring and sinks, of the keys (even y) or values (odd y) of a head of a row
// Template   HEAD_DIM
// Memory     none
// Bytes      the chunk twice in, once out; rings and sinks once in and out
// Numerics   exact
// Limits     HEAD_DIM a multiple of 4; begin >= start - R; without sinks their arrays are [8]
const int thread_id = int(thread_index_in_threadgroup);
const int num_kv_heads = int(threadgroups_per_grid.y) / 2;
const int kv_head = int(threadgroup_position_in_grid.y) / 2;
const bool is_key = int(threadgroup_position_in_grid.y) % 2 == 0;
const int length = sizes[0];
const int num_exact = sizes[1];
const int num_ring = sizes[2];
const int num_sinks = sizes[3];
const int tiles = (num_exact + num_ring + num_sinks + 63) / 64;
const int row = int(threadgroup_position_in_grid.z) / tiles;
const int first = int(threadgroup_position_in_grid.z) % tiles * 64;
const int batch = int(threadgroups_per_grid.z) / tiles;
const int begin = rows[row * 4];
const int start = rows[row * 4 + 1];
const int end = rows[row * 4 + 2];
const size_t head = size_t(row) * size_t(num_kv_heads) + size_t(kv_head);
const size_t heads = size_t(batch) * size_t(num_kv_heads);
const device half* fresh = vectors + ((is_key ? 0 : heads) + head) * size_t(length) * HEAD_DIM;
const device half* ring = (is_key ? old_keys : old_values) + head * size_t(num_ring) * HEAD_DIM;
const device half* sinks = (is_key ? old_sink_keys : old_sink_values) + head * size_t(num_sinks) * HEAD_DIM;
device half* out_exact = exact + ((is_key ? 0 : heads) + head) * size_t(num_exact) * HEAD_DIM;
device half* out_ring = (is_key ? ring_keys : ring_values) + head * size_t(num_ring) * HEAD_DIM;
device half* out_sinks = (is_key ? sink_keys : sink_values) + head * size_t(num_sinks) * HEAD_DIM;
if (num_sinks == 0 && first == 0 && head == 0 && thread_id < 8) {
  out_sinks[thread_id] = half(0);  // an output cannot be empty, nor be left unwritten
}
for (int i = thread_id; i < 64 * (HEAD_DIM / 4); i += 256) {
  const int index = first + i / (HEAD_DIM / 4);
  const int channel = i % (HEAD_DIM / 4) * 4;
  if (index < num_exact) {
    const int position = begin + index;
    half4 x = {half(0), half(0), half(0), half(0)};
    if (position >= start && position < end) {
      x = *(const device half4*)(fresh + size_t(position - start) * HEAD_DIM + channel);
    } else if (position < start) {
      x = *(const device half4*)(ring + size_t(position % num_ring) * HEAD_DIM + channel);
    }
    *(device half4*)(out_exact + size_t(index) * HEAD_DIM + channel) = x;
  } else if (index < num_exact + num_ring) {
    const int slot = index - num_exact;
    // end - 1 - slot may be negative: then no position of the row belongs here yet.
    const int position = end - 1 - (end - 1 - slot + num_ring) % num_ring;
    const bool is_new = position >= start;
    const device half* from = is_new ? fresh + size_t(position - start) * HEAD_DIM : ring + size_t(slot) * HEAD_DIM;
    *(device half4*)(out_ring + size_t(slot) * HEAD_DIM + channel) = *(const device half4*)(from + channel);
  } else if (index < num_exact + num_ring + num_sinks) {
    const int sink = index - num_exact - num_ring;
    const bool is_new = sink >= start && sink < end;
    const device half* from = is_new ? fresh + size_t(sink - start) * HEAD_DIM : sinks + size_t(sink) * HEAD_DIM;
    *(device half4*)(out_sinks + size_t(sink) * HEAD_DIM + channel) = *(const device half4*)(from + channel);
  }
}

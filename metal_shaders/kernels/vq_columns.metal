// vq_columns: everything a prompt chunk attends to, one column a token, in code space; a block is P columns, a page.
//
// What       blocks 0 ... n - 1: the pages read as codes, out of the pool or, the last of them, not written yet; the first
//            S tokens exact. From block e on: exact tokens begin ... end - 1, each at its position. The rest is zero.
// Inputs     pool [slabs, slab_bytes] u8, page_table [B, max_pages] i32, key_tables, value_tables [Hkv, entries] f16
//            pending_keys [Hkv, N, key bytes] u8, pending_values [Hkv, N, value bytes] u8: pages from index w on, unpacked
//            ring_keys [B, Hkv, R, Dk] f16, ring_values [B, Hkv, R, Dv] f16, sink_keys, sink_values [B, Hkv, S, D] f16
//            new_keys [Hkv, L, Dk] f16, new_values [Hkv, L, Dv] f16: positions start ... end - 1
//            sizes [12] i32: row's first entry of page_table, n, w, N, e, position of block e, begin, start, end, row, R, S
//            layer [8] i32: pages_per_slab, page_bytes, slab_bytes, layer offset, 0 ... (the same for every chunk)
// Outputs    keys [Hkv, C, Dk] f16, values [Hkv, C, Dv] f16
// Launch     grid (256, Hkv, C / P), threadgroup (256, 1, 1)
// Template   K_M0 K_D0 K_G0 K_M1 K_D1 K_G1 (M1 0: one section), V_ likewise
// Memory     threadgroup: the page's codes of the head, at most 16 KB; tables through the cache
// Bytes      each code and exact vector once, each output once
// Numerics   exact
// Limits     pool offsets 64-bit; begin >= start - R
constexpr int K_DIM = K_M0 * K_D0 + K_M1 * K_D1;
constexpr int V_DIM = V_M0 * V_D0 + V_M1 * V_D1;
constexpr int K_BYTES = K_M0 + K_M1;
constexpr int V_BYTES = V_M0 + V_M1;
constexpr int K_ENTRIES = NUM_CENTROIDS * (K_G0 * K_D0 + (K_M1 ? K_G1 * K_D1 : 0));
constexpr int V_ENTRIES = NUM_CENTROIDS * (V_G0 * V_D0 + (V_M1 ? V_G1 * V_D1 : 0));
threadgroup uint staged[VQ_PAGE_SIZE * (K_BYTES + V_BYTES) / 4];

const int thread_id = int(thread_index_in_threadgroup);
const int kv_head = int(threadgroup_position_in_grid.y);
const int num_heads = int(threadgroups_per_grid.y);
const int index = int(threadgroup_position_in_grid.z);
const size_t column = (size_t(kv_head) * size_t(threadgroups_per_grid.z) + size_t(index)) * VQ_PAGE_SIZE;
device half* out_keys = keys + column * K_DIM;
device half* out_values = values + column * V_DIM;
const bool is_coded = index < sizes[1];

// Exact columns: all of a block, or the sinks of the first page.
const int num_exact = is_coded ? (index == 0 ? sizes[11] : 0) : VQ_PAGE_SIZE;
const int base = is_coded ? 0 : index >= sizes[4] ? sizes[5] + (index - sizes[4]) * VQ_PAGE_SIZE : -VQ_PAGE_SIZE;
const ChunkSource source = {is_coded ? 0 : sizes[6], sizes[7], sizes[8], is_coded ? sizes[11] : sizes[10]};
const size_t old = (size_t(sizes[9]) * size_t(num_heads) + size_t(kv_head)) * size_t(source.num_slots);
const size_t fresh = size_t(kv_head) * size_t(sizes[8] - sizes[7]);
copy_exact<K_DIM>(source, base, num_exact, thread_id, 256, (is_coded ? sink_keys : ring_keys) + old * K_DIM,
                  new_keys + fresh * K_DIM, out_keys);
copy_exact<V_DIM>(source, base, num_exact, thread_id, 256, (is_coded ? sink_values : ring_values) + old * V_DIM,
                  new_values + fresh * V_DIM, out_values);
if (is_coded) {
  const device half* key_table = key_tables + size_t(kv_head) * K_ENTRIES;
  const device half* value_table = value_tables + size_t(kv_head) * V_ENTRIES;
  if (index < sizes[2]) {
    const device uchar* block =
        pool + (page_start(page_table[sizes[0] + index], layer[0], layer[1], layer[2]) + ulong(layer[3]) +
                ulong(kv_head) * ulong(VQ_PAGE_SIZE * (K_BYTES + V_BYTES)));
    stage_codes<K_BYTES + V_BYTES>(block, thread_id, 256, staged);
    const threadgroup uchar* key_codes = (const threadgroup uchar*)staged;
    const threadgroup uchar* value_codes = key_codes + VQ_PAGE_SIZE * K_BYTES;
    reconstruct_keys<K_M0, K_D0, K_G0, K_DIM>(key_codes, key_table, thread_id, 256, num_exact, out_keys);
    reconstruct_values<V_M0, V_D0, V_G0, V_DIM>(value_codes, value_table, thread_id, 256, num_exact, out_values);
    if (K_M1) {
      reconstruct_keys<K_M1 ? K_M1 : 8, K_D1, K_G1, K_DIM>(key_codes + VQ_PAGE_SIZE * K_M0,
                                                           key_table + NUM_CENTROIDS * K_G0 * K_D0, thread_id, 256,
                                                           num_exact, out_keys + K_M0 * K_D0);
    }
    if (V_M1) {
      reconstruct_values<V_M1 ? V_M1 : 8, V_D1, V_G1, V_DIM>(value_codes + VQ_PAGE_SIZE * V_M0,
                                                             value_table + NUM_CENTROIDS * V_G0 * V_D0, thread_id, 256,
                                                             num_exact, out_values + V_M0 * V_D0);
    }
  } else {
    const size_t token = size_t(kv_head) * size_t(sizes[3]) + size_t(index - sizes[2]) * VQ_PAGE_SIZE;
    const device uchar* key_codes = pending_keys + token * K_BYTES;
    const device uchar* value_codes = pending_values + token * V_BYTES;
    reconstruct_plain<K_M0, K_D0, K_G0, K_DIM, K_BYTES>(key_codes, key_table, thread_id, 256, num_exact, out_keys);
    reconstruct_plain<V_M0, V_D0, V_G0, V_DIM, V_BYTES>(value_codes, value_table, thread_id, 256, num_exact,
                                                        out_values);
    if (K_M1) {
      reconstruct_plain<K_M1 ? K_M1 : 8, K_D1, K_G1, K_DIM, K_BYTES>(key_codes + K_M0,
                                                                     key_table + NUM_CENTROIDS * K_G0 * K_D0, thread_id,
                                                                     256, num_exact, out_keys + K_M0 * K_D0);
    }
    if (V_M1) {
      reconstruct_plain<V_M1 ? V_M1 : 8, V_D1, V_G1, V_DIM, V_BYTES>(
          value_codes + V_M0, value_table + NUM_CENTROIDS * V_G0 * V_D0, thread_id, 256, num_exact,
          out_values + V_M0 * V_D0);
    }
  }
}

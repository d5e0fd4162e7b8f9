// vq_columns: everything a prompt chunk attends to, one column a token, in code space; a block is P columns, a page.
//
// What       of each row, blocks 0 ... n - 1: the pages read as codes, out of the pool or, the last of them, not written
//            yet; the first S tokens exact. Then the exact tokens from `begin` on. The rest is zero.
// Inputs     pool [slabs, slab_bytes] u8, page_table [., max_pages] i32, key_tables, value_tables [Hkv, entries] f16
//            pending_keys [., Hkv, E, key bytes] u8, pending_values [., Hkv, E, value bytes] u8: codes of `exact`
//            exact [2, A, Hkv, E, D] f16: keys, values of positions begin ... end - 1, sink_keys, sink_values [A, Hkv, S, D]
//            rows [B, 8] i32: index in those arrays, n, first page that is not in the pool, begin, end, 0 0 0
//            sizes [8] i32: A, E, S, max_pages, pages_per_slab, page_bytes, slab_bytes, layer offset
// Outputs    keys, values [B, Hkv, C, D] f16
// Launch     grid (256, Hkv, B * C / P), threadgroup (256, 1, 1); blocks [2] i32: C / P
// Template   K_M0 K_D0 K_G0 K_M1 K_D1 K_G1 (M1 0: one section), V_ likewise
// Memory     threadgroup: the page's codes of the head, at most 16 KB; tables through the cache
// Bytes      each code and exact vector once, each output once
// Numerics   exact
// Limits     pool offsets 64-bit; keys and values of one head size; begin a multiple of P
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
const int band_row = int(threadgroup_position_in_grid.z) / blocks[0];
const int index = int(threadgroup_position_in_grid.z) % blocks[0];
const int row = rows[band_row * 8];
const int num_coded = rows[band_row * 8 + 1];
const int num_pooled = rows[band_row * 8 + 2];
const int begin = rows[band_row * 8 + 3];
const int num_tokens = rows[band_row * 8 + 4] - begin;
const size_t column = ((size_t(band_row) * size_t(num_heads) + size_t(kv_head)) * size_t(blocks[0]) + size_t(index)) *
                      VQ_PAGE_SIZE;
device half* out_keys = keys + column * K_DIM;
device half* out_values = values + column * V_DIM;
const bool is_coded = index < num_coded;
const size_t head = size_t(row) * size_t(num_heads) + size_t(kv_head);
const size_t other_half = size_t(sizes[0]) * size_t(num_heads) * size_t(sizes[1]);

// Exact columns: all of a block, or the sinks of the first page.
const int num_exact = is_coded ? (index == 0 ? sizes[2] : 0) : VQ_PAGE_SIZE;
const int token = is_coded ? 0 : (index - num_coded) * VQ_PAGE_SIZE;
const int count = is_coded ? num_exact : num_tokens - token;
const size_t from = is_coded ? head * size_t(sizes[2]) : head * size_t(sizes[1]) + size_t(token);
copy_exact<K_DIM>(num_exact, count, thread_id, 256, (is_coded ? sink_keys : exact) + from * K_DIM, out_keys);
copy_exact<V_DIM>(num_exact, count, thread_id, 256,
                  is_coded ? sink_values + from * V_DIM : exact + (other_half + from) * V_DIM, out_values);
if (is_coded) {
  const device half* key_table = key_tables + size_t(kv_head) * K_ENTRIES;
  const device half* value_table = value_tables + size_t(kv_head) * V_ENTRIES;
  if (index < num_pooled) {
    const device uchar* block =
        pool + (page_start(page_table[row * sizes[3] + index], sizes[4], sizes[5], sizes[6]) + ulong(sizes[7]) +
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
    const size_t pending = head * size_t(sizes[1]) + size_t(index * VQ_PAGE_SIZE - begin);
    const device uchar* key_codes = pending_keys + pending * K_BYTES;
    const device uchar* value_codes = pending_values + pending * V_BYTES;
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

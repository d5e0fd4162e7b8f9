// vq_reconstruct: pages of one row back to code-space vectors, for prefill.
//
// What       x~[t, j] = codebook[table(j), code[t, j]]
// Inputs     pool [slabs, slab_bytes] u8, page_table [B, max_pages] i32, key_tables, value_tables [Hkv, entries] f16
//            sizes [8] i32: first entry of page_table, tokens (P n), pages_per_slab, page_bytes, slab_bytes,
//            layer offset, 0, 0
// Outputs    keys [Hkv, P n, Dk] f16, values [Hkv, P n, Dv] f16; P tokens a page
// Launch     grid (256, Hkv, n), threadgroup (256, 1, 1): one page of one head
// Template   K_M0 K_D0 K_G0 K_M1 K_D1 K_G1 (M1 0: one section), V_ likewise
// Memory     threadgroup: the page's codes of the head, at most 16 KB; tables through the cache
// Bytes      each code once, each output once
// Numerics   exact
// Limits     pool offsets 64-bit
constexpr int K_DIM = K_M0 * K_D0 + K_M1 * K_D1;
constexpr int V_DIM = V_M0 * V_D0 + V_M1 * V_D1;
constexpr int K_BYTES = K_M0 + K_M1;
constexpr int V_BYTES = V_M0 + V_M1;
constexpr int K_ENTRIES = NUM_CENTROIDS * (K_G0 * K_D0 + (K_M1 ? K_G1 * K_D1 : 0));
constexpr int V_ENTRIES = NUM_CENTROIDS * (V_G0 * V_D0 + (V_M1 ? V_G1 * V_D1 : 0));
threadgroup uint staged[VQ_PAGE_SIZE * (K_BYTES + V_BYTES) / 4];

const int thread_id = int(thread_index_in_threadgroup);
const int kv_head = int(threadgroup_position_in_grid.y);
const int page = page_table[sizes[0] + int(threadgroup_position_in_grid.z)];
const device uchar* block = pool + (page_start(page, sizes[2], sizes[3], sizes[4]) + ulong(sizes[5]) +
                                    ulong(kv_head) * ulong(VQ_PAGE_SIZE * (K_BYTES + V_BYTES)));
const size_t first = size_t(kv_head) * size_t(sizes[1]) + size_t(threadgroup_position_in_grid.z) * VQ_PAGE_SIZE;
const device half* key_table = key_tables + size_t(kv_head) * K_ENTRIES;
const device half* value_table = value_tables + size_t(kv_head) * V_ENTRIES;
device half* out_keys = keys + first * K_DIM;
device half* out_values = values + first * V_DIM;
stage_codes<K_BYTES + V_BYTES>(block, thread_id, 256, staged);
const threadgroup uchar* key_codes = (const threadgroup uchar*)staged;
const threadgroup uchar* value_codes = key_codes + VQ_PAGE_SIZE * K_BYTES;

reconstruct_keys<K_M0, K_D0, K_G0, K_DIM>(key_codes, key_table, thread_id, 256, 0, out_keys);
reconstruct_values<V_M0, V_D0, V_G0, V_DIM>(value_codes, value_table, thread_id, 256, 0, out_values);
if (K_M1) {
  reconstruct_keys<K_M1 ? K_M1 : 8, K_D1, K_G1, K_DIM>(key_codes + VQ_PAGE_SIZE * K_M0,
                                                       key_table + NUM_CENTROIDS * K_G0 * K_D0, thread_id, 256, 0,
                                                       out_keys + K_M0 * K_D0);
}
if (V_M1) {
  reconstruct_values<V_M1 ? V_M1 : 8, V_D1, V_G1, V_DIM>(value_codes + VQ_PAGE_SIZE * V_M0,
                                                         value_table + NUM_CENTROIDS * V_G0 * V_D0, thread_id, 256, 0,
                                                         out_values + V_M0 * V_D0);
}

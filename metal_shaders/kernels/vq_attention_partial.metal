// vq_attention_partial: online softmax of one run of page-long units of one row, straight from codes and exact vectors.
//
// What       s_t = <q~_b, k~_t> + mean_b, o~ = sum_t exp2(s_t - max) v~_t, over code pages, sinks and ring slots
//            (reference.py: vq_attention). queries and mean_scores come times scale * log2(e), so exp2 is used.
// Inputs     queries [Hkv, R, D] A, mean_scores [Hkv, R] f32: R = one row per (batch row, bucket, query),
//            channels in attention.h's order
//            pool [slabs, slab_bytes] u8, page_table [B, max_pages] i32
//            key_tables, value_tables [Hkv, entries] f16: sections one after another, each [G, 256, d]
//            ring_keys, ring_values [B, Hkv, RING, D] f16, sink_keys, sink_values [B, Hkv, S, D] f16 (S 0: unread)
//            work [W, 4] i32: row, first unit, end unit, 0      rows [B, 8] i32: start, code units, units every query
//            sees as codes, first exact group, 1 if the sinks are a unit, first row of queries, pages in pool, 0
//            geometry [16] i32: L, N, R, S, RING, window, bucket_len, pages_per_slab, page_bytes, slab_bytes,
//            layer offset, max_pages, Hkv, 0, 0, 0
// Outputs    partial_out [W, Hkv, N, Dv] f32, partial_max, partial_sum [W, Hkv, N] f32
// Launch     grid (W * 32 * NUM_SIMDGROUPS, Hkv * ceil(N / NQ), 1), threadgroup (32 * NUM_SIMDGROUPS, 1, 1)
//            threadgroup = one work item of one KV head, NQ queries; simdgroup = every NUM_SIMDGROUPS-th unit
// Template   A f16 | f32: products and their first sums (attention.h) | NQ 1-16 | TPL 1,2 tokens per lane |
//            NUM_SIMDGROUPS 2,4,8 | K_M0 K_D0 K_G0 K_M1 K_D1 K_G1 (M1 0: one section), V_ likewise |
//            K_SHARED V_SHARED: tables in threadgroup memory
// Memory     threadgroup: tables + NUM_SIMDGROUPS * max(32 TPL * stride A, Dv f32) + 2 NUM_SIMDGROUPS NQ f32 (<= 32,768 B)
// Bytes      per token and KV head: key and value codes once per NQ queries
// Numerics   A f32: f32 throughout. A f16: queries and weights rounded to f16, sums of up to 16 products in f16, then f32.
//            A run in which a query sees no token has max -1e30 and a finite sum: the merge drops it
// Limits     positions < 2^31; pool offsets 64-bit; slab_bytes a multiple of 16
constexpr int K_DIM = K_M0 * K_D0 + K_M1 * K_D1;
constexpr int V_DIM = V_M0 * V_D0 + V_M1 * V_D1;
constexpr int K_BYTES = K_M0 + K_M1;
constexpr int V_BYTES = V_M0 + V_M1;
constexpr int K_ENTRIES0 = K_G0 * NUM_CENTROIDS * K_D0;
constexpr int V_ENTRIES0 = V_G0 * NUM_CENTROIDS * V_D0;
constexpr int K_ENTRIES = K_ENTRIES0 + (K_M1 ? K_G1 * NUM_CENTROIDS * K_D1 : 0);
constexpr int V_ENTRIES = V_ENTRIES0 + (V_M1 ? V_G1 * NUM_CENTROIDS * V_D1 : 0);
constexpr int TILE = 32 * TPL;
constexpr int STRIDE = NQ < 3 ? NQ : (NQ + 3) / 4 * 4;
constexpr int WEIGHTS = TILE * STRIDE * int(sizeof(A)) / 4;
constexpr int SCRATCH = WEIGHTS > V_DIM ? WEIGHTS : V_DIM;
constexpr int ACC0 = value_steps(V_M0) * NQ * V_D0;
constexpr int ACC1 = V_M1 ? value_steps(V_M1) * NQ * V_D1 : 1;
constexpr float MASKED = -1e30f;

threadgroup half4 shared_keys[K_SHARED ? K_ENTRIES / 4 : 1];
threadgroup half4 shared_values[V_SHARED ? V_ENTRIES / 4 : 1];
threadgroup float4 scratch[NUM_SIMDGROUPS * SCRATCH / 4];
threadgroup float group_max[NUM_SIMDGROUPS * NQ];
threadgroup float group_sum[NUM_SIMDGROUPS * NQ];

const int lane = int(thread_index_in_simdgroup);
const int simd_id = int(simdgroup_index_in_threadgroup);
const int thread_id = int(thread_index_in_threadgroup);

// 1. what this threadgroup works on
const int item = int(threadgroup_position_in_grid.x);
const int num_queries = geometry[1];
const int num_tiles = (num_queries + NQ - 1) / NQ;
const int kv_head = int(threadgroup_position_in_grid.y) / num_tiles;
const int tile_query = int(threadgroup_position_in_grid.y) % num_tiles * NQ;
// The last tile overlaps the one before it instead of reading past the queries; NQ <= N.
const int first_query = min(tile_query, num_queries - NQ);
const int query_len = geometry[0];
const int num_sinks = geometry[3];
const int ring_slots = geometry[4];
const int num_kv_heads = geometry[12];
const int row = work[item * 4];
const int start = rows[row * 8];
const int code_units = rows[row * 8 + 1];
const int fully_seen = rows[row * 8 + 2];
const int first_exact = rows[row * 8 + 3];
const int sink_units = rows[row * 8 + 4];
const int first_query_row = rows[row * 8 + 5];
const int last = start + query_len - 1;
const size_t head_row = size_t(row) * size_t(num_kv_heads) + size_t(kv_head);
const device half* ring_key = ring_keys + head_row * size_t(ring_slots) * K_DIM;
const device half* ring_value = ring_values + head_row * size_t(ring_slots) * V_DIM;
const device half* sink_key = sink_keys + head_row * size_t(num_sinks) * K_DIM;
const device half* sink_value = sink_values + head_row * size_t(num_sinks) * V_DIM;
const device half* key_table = key_tables + size_t(kv_head) * K_ENTRIES;
const device half* value_table = value_tables + size_t(kv_head) * V_ENTRIES;
const ulong head_offset = ulong(geometry[10]) + ulong(kv_head) * ulong(VQ_PAGE_SIZE * (K_BYTES + V_BYTES));

// 2. tables into threadgroup memory
if (K_SHARED) {
  share_tables<K_D0, K_G0>(key_table, thread_id, 32 * NUM_SIMDGROUPS, (threadgroup half*)shared_keys);
  if (K_M1) {
    share_tables<K_D1, K_G1>(key_table + K_ENTRIES0, thread_id, 32 * NUM_SIMDGROUPS,
                             (threadgroup half*)shared_keys + K_ENTRIES0);
  }
}
if (V_SHARED) {
  share_tables<V_D0, V_G0>(value_table, thread_id, 32 * NUM_SIMDGROUPS, (threadgroup half*)shared_values);
  if (V_M1) {
    share_tables<V_D1, V_G1>(value_table + V_ENTRIES0, thread_id, 32 * NUM_SIMDGROUPS,
                             (threadgroup half*)shared_values + V_ENTRIES0);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const threadgroup half* shared_key = (const threadgroup half*)shared_keys;
const threadgroup half* shared_value = (const threadgroup half*)shared_values;
threadgroup float* own_scratch = (threadgroup float*)scratch + simd_id * SCRATCH;
threadgroup A* weights = (threadgroup A*)own_scratch;

float running_max[NQ];
float lane_sum[NQ];
float acc0[ACC0];
float acc1[ACC1];
for (int n = 0; n < NQ; ++n) {
  running_max[n] = MASKED;
  lane_sum[n] = 0.0f;
}
for (int i = 0; i < ACC0; ++i) {
  acc0[i] = 0.0f;
}
for (int i = 0; i < ACC1; ++i) {
  acc1[i] = 0.0f;
}

for (int unit = work[item * 4 + 1] + simd_id; unit < work[item * 4 + 2]; unit += NUM_SIMDGROUPS) {
  // 3. the unit's positions: a code page, the sinks alone, or exact vectors
  const bool is_coded = unit < code_units;
  const bool is_sinks = !is_coded && sink_units != 0 && unit == code_units;
  const int exact_group = first_exact + unit - code_units - sink_units;
  const int base = (is_coded ? unit : is_sinks ? 0 : exact_group) * VQ_PAGE_SIZE;
  const int end = is_sinks ? num_sinks : min(base + VQ_PAGE_SIZE, last + 1);
  const bool is_masked = !is_coded || unit >= fully_seen || base < num_sinks;
  const int query_row = first_query_row + base / geometry[6] * num_queries + first_query;
  const device A* unit_queries = queries + (size_t(kv_head) * size_t(geometry[2]) + size_t(query_row)) * K_DIM;
  float mean[NQ];
  for (int n = 0; n < NQ; ++n) {
    mean[n] = mean_scores[size_t(kv_head) * size_t(geometry[2]) + size_t(query_row + n)];
  }
  const device uchar* key_block = pool;
  if (is_coded) {
    const int page = page_table[row * geometry[11] + unit];
    key_block = pool + (page_start(page, geometry[7], geometry[8], geometry[9]) + head_offset);
  }
  const device uchar* value_block = key_block + (is_coded ? VQ_PAGE_SIZE * K_BYTES : 0);

  for (int first = 0; first < VQ_PAGE_SIZE; first += TILE) {
    const int num_tokens = min(TILE, end - base - first);
    if (num_tokens <= 0) {
      break;
    }
    // 4. scores: a lane keeps those of TPL tokens. The mean term enters once per token, by the lanes with t = 0
    float score[4 * TPL * NQ];
    for (int n = 0; n < NQ; ++n) {
      for (int i = 0; i < 4 * TPL; ++i) {
        score[i * NQ + n] = lane % 4 != 0 ? 0.0f : mean[n];
      }
    }
    if (is_coded) {
      score_codes<A, NQ, TPL, K_DIM, K_M0, K_D0, K_G0, K_SHARED>(
          key_block, unit_queries, shared_key, key_table, first, lane, score);
      if (K_M1) {
        score_codes<A, NQ, TPL, K_DIM, K_M1 ? K_M1 : 8, K_D1, K_G1, K_SHARED>(
            key_block + VQ_PAGE_SIZE * K_M0, unit_queries + K_M0 * K_D0, shared_key + K_ENTRIES0,
            key_table + K_ENTRIES0, first, lane, score);
      }
    } else {
      score_exact<A, NQ, TPL, K_DIM, K_M0, K_D0>(
          sink_key, ring_key, unit_queries, base + first, end - 1, num_sinks, ring_slots, lane, score);
      if (K_M1) {
        score_exact<A, NQ, TPL, K_DIM, K_M1 ? K_M1 : 8, K_D1>(
            sink_key + K_M0 * K_D0, ring_key + K_M0 * K_D0, unit_queries + K_M0 * K_D0, base + first, end - 1, num_sinks,
            ring_slots, lane, score);
      }
    }
    share_scores<NQ, TPL>(lane, score);
    // 5. masks, only where some query does not see some token
    if (is_masked) {
      for (int n = 0; n < NQ; ++n) {
        const int position = start + (first_query + n) % query_len;
        const int code_end = num_code_pages(position, geometry[5]) * VQ_PAGE_SIZE;
        for (int u = 0; u < TPL; ++u) {
          const int token = base + first + kept_token<TPL>(lane, u);
          const bool is_visible =
              is_coded ? token >= num_sinks && token < code_end
                       : token <= position && (token < num_sinks || token >= code_end);
          if (!is_visible) {
            score[u * NQ + n] = MASKED;
          }
        }
      }
    }
    // 6. online softmax; the maximum seldom grows, so look before reducing it over the lanes
    bool grows = false;
    for (int i = 0; i < TPL * NQ; ++i) {
      grows = grows || score[i] > running_max[i % NQ];
    }
    if (simd_any(grows)) {
      for (int n = 0; n < NQ; ++n) {
        float top = running_max[n];
        for (int u = 0; u < TPL; ++u) {
          top = metal::max(top, score[u * NQ + n]);
        }
        top = simd_max(top);
        const float factor = metal::fast::exp2(running_max[n] - top);
        running_max[n] = top;
        lane_sum[n] *= factor;
        rescale<NQ, V_M0, V_D0>(acc0, n, factor);
        if (V_M1) {
          rescale<NQ, V_M1 ? V_M1 : 8, V_D1>(acc1, n, factor);
        }
      }
    }
    for (int u = 0; u < TPL; ++u) {
      for (int n = 0; n < NQ; ++n) {
        const float w = metal::fast::exp2(score[u * NQ + n] - running_max[n]);
        lane_sum[n] += w;
        weights[kept_token<TPL>(lane, u) * STRIDE + n] = A(w);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    // 7. weighted values, a lane owning sub-vectors
    if (is_coded) {
      add_codes<A, NQ, TPL, STRIDE, V_M0, V_D0, V_G0, V_SHARED>(
          value_block, shared_value, value_table, weights, first, lane, acc0);
      if (V_M1) {
        add_codes<A, NQ, TPL, STRIDE, V_M1 ? V_M1 : 8, V_D1, V_G1, V_SHARED>(
            value_block + VQ_PAGE_SIZE * V_M0, shared_value + V_ENTRIES0, value_table + V_ENTRIES0, weights, first, lane,
            acc1);
      }
    } else {
      add_exact<A, NQ, TPL, STRIDE, V_DIM, V_M0, V_D0>(
          sink_value, ring_value, base + first, num_tokens, num_sinks, ring_slots, weights, lane, acc0);
      if (V_M1) {
        add_exact<A, NQ, TPL, STRIDE, V_DIM, V_M1 ? V_M1 : 8, V_D1>(
            sink_value + V_M0 * V_D0, ring_value + V_M0 * V_D0, base + first, num_tokens, num_sinks, ring_slots,
            weights, lane, acc1);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// 8. merge the simdgroups, one query at a time
join_token_groups<NQ, V_M0, V_D0>(acc0);
if (V_M1) {
  join_token_groups<NQ, V_M1 ? V_M1 : 8, V_D1>(acc1);
}
for (int n = 0; n < NQ; ++n) {
  const float sum = simd_sum(lane_sum[n]);
  if (lane == 0) {
    group_max[simd_id * NQ + n] = running_max[n];
    group_sum[simd_id * NQ + n] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int n = 0; n < NQ; ++n) {
  float top = MASKED;
  for (int i = 0; i < NUM_SIMDGROUPS; ++i) {
    top = metal::max(top, group_max[i * NQ + n]);
  }
  const float factor = metal::fast::exp2(running_max[n] - top);
  store_section<NQ, V_M0, V_D0>(acc0, n, factor, lane, own_scratch);
  if (V_M1) {
    store_section<NQ, V_M1 ? V_M1 : 8, V_D1>(acc1, n, factor, lane, own_scratch + V_M0 * V_D0);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (first_query + n >= tile_query) {
    const size_t out = (size_t(item) * size_t(num_kv_heads) + size_t(kv_head)) * size_t(num_queries) +
                       size_t(first_query + n);
    for (int c = thread_id; c < V_DIM; c += 32 * NUM_SIMDGROUPS) {
      float total = 0.0f;
      for (int i = 0; i < NUM_SIMDGROUPS; ++i) {
        total += ((const threadgroup float*)scratch)[i * SCRATCH + c];
      }
      partial_out[out * V_DIM + c] = total;
    }
    if (thread_id == 0) {
      float total = 0.0f;
      for (int i = 0; i < NUM_SIMDGROUPS; ++i) {
        total += group_sum[i * NQ + n] * metal::fast::exp2(group_max[i * NQ + n] - top);
      }
      partial_max[out] = top;
      partial_sum[out] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

"""Bugs planted in the kernels, one text edit each. Each has to be found: by a report, a refusal or wrong numbers."""

from __future__ import annotations

from dataclasses import dataclass

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutant:
    """Replace the `nth` occurrence of `old` in a file of metal_shaders by `new`."""

    file: str
    old: str
    new: str
    nth: int = 1

    def apply(self, text: str) -> str:
        """The text with the bug in it."""
        at = -1
        for _ in range(self.nth):
            at = text.index(self.old, at + 1)
        return text[:at] + self.new + text[at + len(self.old) :]


PARTIAL, MERGE = "kernels/vq_attention_partial.metal", "kernels/vq_attention_merge.metal"
QUERIES, APPEND, ENCODE = (f"kernels/{n}.metal" for n in ("vq_attention_queries", "vq_append", "vq_encode"))
RECONSTRUCT, ATTENTION, BLOCK = "kernels/vq_reconstruct.metal", "include/attention.h", "include/code_block.h"
COLUMNS, PAGE = "kernels/vq_columns.metal", "include/page.h"
CENTRE, EXTEND, TURN = (f"kernels/{n}.metal" for n in ("vq_centre", "vq_extend", "vq_turn"))
NEAREST, ROTARY, CODEBOOK = "include/nearest.h", "include/rotary.h", "include/codebook.h"

ATTENTION_MUTANTS = [
    *(Mutant(PARTIAL, BARRIER, "", n) for n in (1, 2, 3, 4)),
    *(Mutant(PARTIAL, BARRIER, SIMD_BARRIER, n) for n in (1, 2, 3, 4)),
    *(Mutant(PARTIAL, BARRIER, "threadgroup_barrier(mem_flags::mem_device);", n) for n in (1, 3)),
    *(Mutant(PARTIAL, SIMD_BARRIER, "", n) for n in (1, 2)),
    Mutant(PARTIAL, "token >= num_sinks && token < code_end", "token < code_end"),
    Mutant(PARTIAL, "token >= num_sinks && token < code_end", "token >= num_sinks"),
    Mutant(PARTIAL, "token <= position && (", "("),
    Mutant(PARTIAL, "(token < num_sinks || token >= code_end)", "token >= code_end"),
    Mutant(PARTIAL, "|| base < num_sinks", ""),
    Mutant(PARTIAL, "unit >= fully_seen ||", ""),
    Mutant(PAGE, "position + 1 - window", "position - window"),
    Mutant(PARTIAL, "base / geometry[6] * num_queries", "0 * num_queries"),
    Mutant(PARTIAL, "lane % 4 != 0 ? 0.0f : mean[n]", "mean[n]"),
    Mutant(PARTIAL, "int token = base + first + kept_token<TPL>(lane, u);", "int token = base + first + lane;"),
    Mutant(PARTIAL, "base + first, end - 1, num_sinks", "base, end - 1, num_sinks"),
    Mutant(PARTIAL, "is_sinks ? 0 : exact_group", "exact_group"),
    Mutant(PARTIAL, "top = simd_max(top);", ""),
    Mutant(PARTIAL, "lane_sum[n] *= factor;", ""),
    Mutant(PARTIAL, "if (simd_any(grows)) {", "if (grows) {"),
    Mutant(PARTIAL, "running_max[n] = MASKED;", ""),
    Mutant(PARTIAL, "acc0[i] = 0.0f;", ""),
    Mutant(PARTIAL, "top = metal::max(top, group_max[i * NQ + n]);", "top = group_max[i * NQ + n];"),
    Mutant(PARTIAL, "if (first_query + n >= tile_query) {", "{"),
    Mutant(PARTIAL, "min(tile_query, num_queries - NQ)", "tile_query"),
    Mutant(PARTIAL, "ulong(VQ_PAGE_SIZE * (K_BYTES + V_BYTES))", "ulong(VQ_PAGE_SIZE * K_BYTES)"),
    Mutant(PARTIAL, "(is_coded ? VQ_PAGE_SIZE * K_BYTES : 0)", "(is_coded ? VQ_PAGE_SIZE : 0)"),
    Mutant(PARTIAL, "if (thread_id == 0) {", "if (lane == 0) {"),
    Mutant(PARTIAL, "if (thread_id == 0) {", "if (thread_id == 0 && n == 0) {"),
    Mutant(PARTIAL, "scratch[NUM_SIMDGROUPS * SCRATCH / 4]", "scratch[NUM_SIMDGROUPS * SCRATCH / 4 - 1]"),
    Mutant(PARTIAL, "const device half* ring_key =", "const half* ring_key ="),
    Mutant(PARTIAL, "float lane_sum[NQ];", "double lane_sum[NQ];"),
    Mutant(PARTIAL, "threadgroup A* weights =", "device A* weights ="),
    Mutant(ATTENTION, "bit = 2; bit > 0", "bit = 1; bit > 0"),
    Mutant(ATTENTION, "const float sent = is_upper ? score[i] : score[i + count];", "const float sent = score[i];"),
    Mutant(ATTENTION, "i / 2 * 8 + t * 2 + i % 2", "i / 2 * 8 + t * 2"),
    Mutant(ATTENTION, "first_token / 4;", "first_token;"),
    Mutant(ATTENTION, "first_token / 8;", "first_token;"),
    Mutant(ATTENTION, "token % ring_slots * DIM", "token * DIM"),
    Mutant(ATTENTION, "((i + p) * key_lanes(M) + t) * d, q", "(t * RUN + i + p) * d, q"),
    Mutant(ATTENTION, "((i + p) * key_lanes(M) + t) * d, q", "(t * RUN + i + p) * d, q", 2),
    Mutant(ATTENTION, "load_device<d>(keys[o] + (i + p) * d,", "load_device<d>(keys[o] + i * d,"),
    Mutant(ATTENTION, "first_token + o * 8 + lane / 4, last_token)", "first_token + o + lane / 4 * 8, last_token)"),
    Mutant(ATTENTION, "begin += CHUNK) {", "begin += 2 * CHUNK) {"),
    Mutant(ATTENTION, "begin += CHUNK) {", "begin += 2 * CHUNK) {", 2),
    Mutant(ATTENTION, "add_to(acc + s * NQ * d + i * W, sums[i]);", "add_to(acc + i * W, sums[i]);"),
    Mutant(CODEBOOK, "out[i / 2 + 1] = half2(v.z, v.w);", "out[i / 2 + 1] = half2(v.w, v.z);"),
    Mutant(CODEBOOK, "out[i / 2 + 1] = half2(v.z, v.w);", "out[i / 2 + 1] = half2(v.w, v.z);", 2),
    Mutant(ATTENTION, "first += STEP * (32 / LANES)", "first += STEP"),
    Mutant(ATTENTION, "weights[(first + j * (32 / LANES)) * STRIDE + n]", "weights[first * STRIDE + n]"),
    Mutant(ATTENTION, "acc[i] += simd_shuffle_xor(acc[i], ushort(offset));", ""),
    Mutant(ATTENTION, "if (t >= key_lanes(M)) {", "if (t > key_lanes(M)) {"),
    Mutant(BLOCK, "page - slab * pages_per_slab", "page"),
    Mutant(BLOCK, "ulong(slab) * ulong(slab_bytes)", "ulong(slab) * ulong(page_bytes)"),
    Mutant(BLOCK, "* (M / RUNS) + slot / RUNS", "* (M / RUNS)"),
    Mutant(CODEBOOK, "(255u << uint(SHIFT))", "(127u << uint(SHIFT))"),
    Mutant(CODEBOOK, "i % NUM_CENTROIDS * G + i / NUM_CENTROIDS", "i"),
    Mutant(CODEBOOK, "G == 2 ? 1 : 2", "G == 2 ? 1 : 1"),
    Mutant(ATTENTION, "out[UNIT * TPL - 2] = v.z;", "out[UNIT * TPL - 2] = v.x;"),
    Mutant(ATTENTION, "out[n + 3] = v.w;", "out[n + 3] = v.z;"),
    Mutant(MERGE, BARRIER, "", 1),
    Mutant(MERGE, BARRIER, "", 2),
    Mutant(MERGE, BARRIER, "", 3),
    Mutant(MERGE, BARRIER, "", 4),
    Mutant(MERGE, "top = simd_max(top);", ""),
    Mutant(MERGE, "sum = simd_sum(sum);", ""),
    Mutant(MERGE, "float total = mean[kv_head * HEAD_DIM + thread_id];", "float total = 0.0f;"),
    Mutant(MERGE, "if (thread_id < 32) {", "{"),
    Mutant(MERGE, "total *= sum / (sum + ", "total *= sum / ("),
    Mutant(MERGE, "(sink - top)", "(sink)"),
    Mutant(MERGE, "int(threadgroup_position_in_grid.y) / sizes[1]]", "int(threadgroup_position_in_grid.y)]"),
    Mutant(QUERIES, "dot = simd_sum(dot);", ""),
    Mutant(QUERIES, "if (entry < num_entries) {", "if (entry <= num_entries) {"),
    Mutant(ROTARY, "other * sines[pair] : -other * sines[pair]", "-other * sines[pair] : other * sines[pair]"),
    Mutant(ROTARY, "if (c >= DIMS) {", "if (c > DIMS) {"),
]  # fmt: skip
APPEND_MUTANTS = [
    Mutant(APPEND, BARRIER, "", 1),
    Mutant(APPEND, BARRIER, "", 2),
    Mutant(APPEND, "centred[i] = x - mean[c];", "centred[i] = x;"),
    Mutant(APPEND, "% ring_slots * HEAD_DIM + i % HEAD_DIM", "* HEAD_DIM + i % HEAD_DIM"),
    Mutant(APPEND, ">= length) {", "> length) {"),
    Mutant(APPEND, ">= length) {", ">= 0) {"),
    Mutant(APPEND, "(start + min(token, max(length - 1, 0))) / sizes[1]", "start / sizes[1]"),
    Mutant(APPEND, "i < length * HEAD_DIM", "i < LEN * HEAD_DIM"),
    Mutant(APPEND, "is_key ? ring_keys : ring_values", "is_key ? ring_values : ring_keys"),
]
CODE_MUTANTS = [
    Mutant(NEAREST, "if (distance < best[i])", "if (distance <= best[i])"),
    Mutant(NEAREST, "float distance = norm;", "float distance = 0.0f;"),
    Mutant(NEAREST, "-2.0f * x[k]", "-x[k]"),
    Mutant(NEAREST, "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    Mutant(NEAREST, "(table * M + G - 1) / G", "table * M / G"),
    Mutant(NEAREST, "min(item / width, num_tokens - 1)", "item / width"),
    Mutant(NEAREST, "if (item / width < num_tokens) {", "{"),
    Mutant(ENCODE, "centroids[NUM_CENTROIDS * ((D0 > D1 ? D0 : D1) + 1)]", "centroids[NUM_CENTROIDS * D0]"),
    Mutant(ENCODE, "table - G0, sizes[0]", "0, sizes[0]"),
    Mutant("include/reconstruct.h", "j * G / M * NUM_CENTROIDS", "0 * NUM_CENTROIDS"),
    Mutant("include/reconstruct.h", "key_code_index", "value_code_index"),
    Mutant(RECONSTRUCT, "page_table[sizes[0] +", "page_table["),
    Mutant(RECONSTRUCT, "+ ulong(sizes[5])", ""),
    Mutant(RECONSTRUCT, "value_codes + VQ_PAGE_SIZE * V_M0", "value_codes"),
    Mutant("include/reconstruct.h", BARRIER, ""),
    Mutant(COLUMNS, "index < num_coded;", "index <= num_coded;"),
    Mutant(COLUMNS, "index < num_pooled", "index <= num_pooled"),
    Mutant(COLUMNS, "index == 0 ? sizes[2] : 0", "0"),
    Mutant(COLUMNS, "num_exact, out_keys);", "0, out_keys);"),
    Mutant(COLUMNS, "size_t(index * VQ_PAGE_SIZE - begin)", "size_t(index * VQ_PAGE_SIZE)"),
    Mutant(COLUMNS, "pending = head *", "pending = size_t(kv_head) *"),
    Mutant(COLUMNS, "num_tokens - token;", "num_tokens;"),
    Mutant(COLUMNS, "exact + (other_half + from)", "exact + (from)"),
    Mutant(COLUMNS, "page_table[row * sizes[3] + index]", "page_table[index]"),
    Mutant(COLUMNS, "const int row = rows[band_row * 8];", "const int row = band_row;"),
    Mutant(COLUMNS, "key_codes + K_M0", "key_codes"),
]
PROMPT_MUTANTS = [
    Mutant(CENTRE, "x - mean[c]", "x"),
    Mutant(CENTRE, "starts[row] + first", "starts[row]"),
    Mutant(CENTRE, "is_key ? at : half_size + at", "at"),
    Mutant(CENTRE, "min(32, length - first)", "32"),
    Mutant(CENTRE, "is_key ? turned_back", "!is_key ? turned_back"),
    Mutant(EXTEND, "position % num_ring", "position"),
    Mutant(EXTEND, "position >= start && position < end", "position >= start"),
    Mutant(EXTEND, "is_new = position >= start;", "is_new = position > start;"),
    Mutant(EXTEND, "end - 1 - slot + num_ring", "end - slot + num_ring"),
    Mutant(EXTEND, "sink >= start && sink < end", "sink < end"),
    Mutant(EXTEND, "sink >= start && sink < end", "sink >= start"),
    Mutant(EXTEND, "(is_key ? 0 : heads) + head) * size_t(num_exact)", "head) * size_t(num_exact)"),
    Mutant(TURN, "rows[row * 8 + 3] +", ""),
    Mutant(TURN, "count > 0 ? base / sizes[1] : 0", "0"),
    Mutant(TURN, "block < num_coded ? block *", "true ? block *"),
    Mutant(TURN, "mean + kv_head * HEAD_DIM", "mean"),
    Mutant(ROTARY, "-other * sines[pair] : other * sines[pair]", "other * sines[pair] : -other * sines[pair]"),
    Mutant(ROTARY, "float(at[partner]) + mean[partner]", "float(at[partner])"),
]

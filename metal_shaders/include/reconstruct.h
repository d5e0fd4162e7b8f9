// One section of one page of one head, from codes to code-space vectors with a row pitch of DIM.

template <int d>
METAL_FUNC void copy_centroid(const device half* from, device half* to) {
  if (d == 2) {
    *(device half2*)to = *(const device half2*)from;
    return;
  }
  for (int i = 0; i + 4 <= d; i += 4) {
    *(device half4*)(to + i) = *(const device half4*)(from + i);
  }
}

// A page's codes of one head to threadgroup memory, in order: a code is one byte, and lanes that write neighbouring
// channels read bytes that lie far apart.
template <int BYTES>
METAL_FUNC void stage_codes(const device uchar* block, int thread_id, int num_threads, threadgroup uint* staged) {
  for (int i = thread_id; i < VQ_PAGE_SIZE * BYTES / 4; i += num_threads) {
    staged[i] = ((const device uint*)block)[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Tokens from `first_token` on.
template <int M, int d, int G, int DIM>
METAL_FUNC void reconstruct_keys(const threadgroup uchar* section, const device half* tables, int thread_id,
                                 int num_threads, int first_token, device half* out) {
  for (int i = first_token * M + thread_id; i < VQ_PAGE_SIZE * M; i += num_threads) {
    const int token = i / M;
    const int j = i % M;
    const int code = int(section[key_code_index(uint(token), uint(j), uint(M))]);
    copy_centroid<d>(tables + (j * G / M * NUM_CENTROIDS + code) * d, out + token * DIM + j * d);
  }
}

template <int M, int d, int G, int DIM>
METAL_FUNC void reconstruct_values(const threadgroup uchar* section, const device half* tables, int thread_id,
                                   int num_threads, int first_token, device half* out) {
  for (int i = first_token * M + thread_id; i < VQ_PAGE_SIZE * M; i += num_threads) {
    const int token = i / M;
    const int j = i % M;
    const int code = int(section[value_code_index(uint(token), uint(j), uint(M))]);
    copy_centroid<d>(tables + (j * G / M * NUM_CENTROIDS + code) * d, out + token * DIM + j * d);
  }
}

// The same of codes that are not packed yet: BYTES a token, this section's first.
template <int M, int d, int G, int DIM, int BYTES>
METAL_FUNC void reconstruct_plain(const device uchar* codes, const device half* tables, int thread_id, int num_threads,
                                  int first_token, device half* out) {
  for (int i = first_token * M + thread_id; i < VQ_PAGE_SIZE * M; i += num_threads) {
    const int token = i / M;
    const int j = i % M;
    const int code = int(codes[token * BYTES + j]);
    copy_centroid<d>(tables + (j * G / M * NUM_CENTROIDS + code) * d, out + token * DIM + j * d);
  }
}

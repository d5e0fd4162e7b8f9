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

template <int M, int d, int G, int DIM>
METAL_FUNC void reconstruct_keys(const device uchar* section, const device half* tables, int thread_id, int num_threads,
                                 device half* out) {
  for (int i = thread_id; i < PAGE_SIZE * M; i += num_threads) {
    const int token = i / M;
    const int j = i % M;
    const int code = int(section[key_code_index(uint(token), uint(j), uint(M))]);
    copy_centroid<d>(tables + (j * G / M * NUM_CENTROIDS + code) * d, out + token * DIM + j * d);
  }
}

template <int M, int d, int G, int DIM>
METAL_FUNC void reconstruct_values(const device uchar* section, const device half* tables, int thread_id,
                                   int num_threads, device half* out) {
  for (int i = thread_id; i < PAGE_SIZE * M; i += num_threads) {
    const int token = i / M;
    const int j = i % M;
    const int code = int(section[value_code_index(uint(token), uint(j), uint(M))]);
    copy_centroid<d>(tables + (j * G / M * NUM_CENTROIDS + code) * d, out + token * DIM + j * d);
  }
}

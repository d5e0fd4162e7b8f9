// Nearest centroids by ||c||^2 - 2 <x, c>, which differs from the squared distance by a constant of x only.

// Table -> `centroids [256][d + 1]` float: the channels times -2, then the squared norm.
template <int d>
METAL_FUNC void load_table(const device half* table, int thread_id, int num_threads, threadgroup float* centroids) {
  for (int c = thread_id; c < NUM_CENTROIDS; c += num_threads) {
    float x[d];
    load_device<d>(table + c * d, x);
    float norm = 0.0f;
    for (int k = 0; k < d; ++k) {
      centroids[c * (d + 1) + k] = -2.0f * x[k];
      norm += x[k] * x[k];
    }
    centroids[c * (d + 1) + d] = norm;
  }
}

// Codes of COUNT sub-vectors `x [COUNT][d]`; ties go to the lower code.
template <int d, int COUNT>
METAL_FUNC void find_nearest(const threadgroup float* centroids, const thread float* x, thread int* code) {
  float best[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    best[i] = 3.0e38f;
    code[i] = 0;
  }
  for (int c = 0; c < NUM_CENTROIDS; ++c) {
    float y[d];
    for (int k = 0; k < d; ++k) {
      y[k] = centroids[c * (d + 1) + k];
    }
    const float norm = centroids[c * (d + 1) + d];
    for (int i = 0; i < COUNT; ++i) {
      float distance = norm;
      for (int k = 0; k < d; ++k) {
        distance += x[i * d + k] * y[k];
      }
      if (distance < best[i]) {
        best[i] = distance;
        code[i] = c;
      }
    }
  }
}

// Encodes the sub-vectors that use table `table` of a section, for a run of items (token, sub-vector) of one head.
template <typename T, int M, int d, int G, int DIM, int BYTES, int COUNT>
METAL_FUNC void encode_section(const device T* vectors, const device half* tables, int table, int num_tokens, int tile,
                               int thread_id, int num_threads, threadgroup float* centroids, device uchar* codes) {
  load_table<d>(tables + table * (NUM_CENTROIDS * d), thread_id, num_threads, centroids);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int first_subvec = (table * M + G - 1) / G;
  const int width = ((table + 1) * M + G - 1) / G - first_subvec;
  float x[COUNT * d];
  for (int i = 0; i < COUNT; ++i) {
    const int item = (tile * COUNT + i) * num_threads + thread_id;
    const int token = min(item / width, num_tokens - 1);
    const device T* at = vectors + size_t(token) * DIM + (first_subvec + item % width) * d;
    for (int k = 0; k < d; ++k) {
      x[i * d + k] = float(at[k]);
    }
  }
  int code[COUNT];
  find_nearest<d, COUNT>(centroids, x, code);
  for (int i = 0; i < COUNT; ++i) {
    const int item = (tile * COUNT + i) * num_threads + thread_id;
    if (item / width < num_tokens) {
      codes[size_t(item / width) * BYTES + size_t(first_subvec + item % width)] = uchar(code[i]);
    }
  }
}

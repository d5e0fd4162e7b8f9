// A vector's whole way into its codes, for a tile of ROWS vectors of one head: mean, transform, nearest centroids.

// tile [ROWS][DIM] = vectors - mean; rows behind the end repeat the last one.
template <typename T, int DIM, int ROWS>
METAL_FUNC void load_centred(const device T* vectors, const device float* mean, int first_row, int num_rows,
                             int thread_id, int num_threads, threadgroup float* tile) {
  for (int i = thread_id; i < ROWS * DIM; i += num_threads) {
    const size_t row = size_t(min(first_row + i / DIM, num_rows - 1));
    tile[i] = float(vectors[row * DIM + size_t(i % DIM)]) - mean[i % DIM];
  }
}

// out [ROWS][DIM] = tile @ matrix [DIM][DIM].
template <int DIM, int ROWS>
METAL_FUNC void times_matrix(const threadgroup float* tile, const device float* matrix, int thread_id, int num_threads,
                             threadgroup float* out) {
  for (int c = thread_id; c < DIM; c += num_threads) {
    float total[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      total[i] = 0.0f;
    }
    for (int r = 0; r < DIM; ++r) {
      const float m = matrix[r * DIM + c];
      for (int i = 0; i < ROWS; ++i) {
        total[i] += tile[i * DIM + r] * m;
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      out[i * DIM + c] = total[i];
    }
  }
}

// The centroid of `table [256][d]` nearest to x, which is rounded to half as a cache holds it; ties to the lower code.
template <int d>
METAL_FUNC int nearest_code(const threadgroup float* x, const device half* table) {
  float best = 3.0e38f;
  int code = 0;
  for (int c = 0; c < NUM_CENTROIDS; ++c) {
    float distance = 0.0f;
    for (int k = 0; k < d; ++k) {
      const float difference = float(half(x[k])) - float(table[c * d + k]);
      distance += difference * difference;
    }
    if (distance < best) {
      best = distance;
      code = c;
    }
  }
  return code;
}

// Codes of a section of the tile, whose channels start at `tile`, to `codes`, BYTES a row.
template <int DIM, int ROWS, int M, int d, int G, int BYTES>
METAL_FUNC void encode_tile(const threadgroup float* tile, const device half* tables, int num_rows, int thread_id,
                            int num_threads, device uchar* codes) {
  for (int i = thread_id; i < min(ROWS, num_rows) * M; i += num_threads) {
    const int j = i % M;
    const device half* table = tables + j * G / M * (NUM_CENTROIDS * d);
    codes[i / M * BYTES + j] = uchar(nearest_code<d>(tile + i / M * DIM + j * d, table));
  }
}

// Puts the nearest centroids in the place of a section's channels.
template <int DIM, int ROWS, int M, int d, int G>
METAL_FUNC void snap_tile(threadgroup float* tile, const device half* tables, int thread_id, int num_threads) {
  for (int i = thread_id; i < ROWS * M; i += num_threads) {
    const int j = i % M;
    threadgroup float* x = tile + i / M * DIM + j * d;
    const device half* table = tables + j * G / M * (NUM_CENTROIDS * d);
    const device half* centroid = table + nearest_code<d>(x, table) * d;
    for (int k = 0; k < d; ++k) {
      x[k] = float(centroid[k]);
    }
  }
}

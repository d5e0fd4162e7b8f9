// The paper's key path for a tile of ROWS vectors: smooth division, Hadamard transform, nearest centroids.

// tile [ROWS][DIM] = vectors / smooth_factors; rows behind the end repeat the last one.
template <typename T, int DIM, int ROWS>
METAL_FUNC void load_smoothed(const device T* vectors, const device float* smooth_factors, int first_row, int num_rows,
                              int thread_id, int num_threads, threadgroup float* tile) {
  for (int i = thread_id; i < ROWS * DIM; i += num_threads) {
    const size_t row = size_t(min(first_row + i / DIM, num_rows - 1));
    tile[i] = float(vectors[row * DIM + size_t(i % DIM)]) / smooth_factors[i % DIM];
  }
}

// out [ROWS][DIM] = tile @ matrix, whose row r and column c lie at matrix[r * row_pitch + c * column_pitch].
template <int DIM, int ROWS>
METAL_FUNC void times_matrix(const threadgroup float* tile, const device float* matrix, int row_pitch, int column_pitch,
                             int thread_id, int num_threads, threadgroup float* out) {
  for (int c = thread_id; c < DIM; c += num_threads) {
    float total[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      total[i] = 0.0f;
    }
    for (int r = 0; r < DIM; ++r) {
      const float m = matrix[r * row_pitch + c * column_pitch];
      for (int i = 0; i < ROWS; ++i) {
        total[i] += tile[i * DIM + r] * m;
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      out[i * DIM + c] = total[i];
    }
  }
}

// Nearest of C centroids per sub-vector of the tile; ties to the lower code. Leaves the centroids in the tile.
template <int DIM, int ROWS, int C, int d, int G>
METAL_FUNC void encode_tile(const device float* codebook, int first_row, int num_rows, int thread_id, int num_threads,
                            threadgroup float* tile, device uchar* codes) {
  constexpr int M = DIM / d;
  for (int i = thread_id; i < ROWS * M; i += num_threads) {
    threadgroup float* x = tile + i * d;
    const device float* table = codebook + i % M * G / M * (C * d);
    float best = 3.0e38f;
    int code = 0;
    for (int c = 0; c < C; ++c) {
      float distance = 0.0f;
      for (int k = 0; k < d; ++k) {
        const float difference = x[k] - table[c * d + k];
        distance += difference * difference;
      }
      if (distance < best) {
        best = distance;
        code = c;
      }
    }
    for (int k = 0; k < d; ++k) {
      x[k] = table[code * d + k];
    }
    if (first_row + i / M < num_rows) {
      codes[size_t(first_row + i / M) * M + size_t(i % M)] = uchar(code);
    }
  }
}

// Exact vectors of a prompt chunk's columns.

// `num_columns` columns to `out`: the first `count` of them from `from`, zeros behind.
template <int DIM>
METAL_FUNC void copy_exact(int num_columns, int count, int thread_id, int num_threads, const device half* from,
                           device half* out) {
  for (int i = thread_id; i < num_columns * (DIM / 4); i += num_threads) {
    half4 x = {half(0), half(0), half(0), half(0)};
    if (i < count * (DIM / 4)) {
      x = *(const device half4*)(from + size_t(i) * 4);
    }
    *(device half4*)(out + size_t(i) * 4) = x;
  }
}

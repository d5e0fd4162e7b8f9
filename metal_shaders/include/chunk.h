// Exact vectors of a prompt chunk's columns: from the chunk itself, or from the slots of those before it.

// Positions start ... end - 1 are the chunk's; begin ... start - 1 lie in slot p % num_slots.
struct ChunkSource {
  int begin, start, end, num_slots;
};

// Columns base ... base + count - 1 to `out [count][DIM]`; zero where a position is neither.
template <int DIM>
METAL_FUNC void copy_exact(ChunkSource source, int base, int count, int thread_id, int num_threads,
                           const device half* slots, const device half* fresh, device half* out) {
  for (int i = thread_id; i < count * (DIM / 4); i += num_threads) {
    const int position = base + i / (DIM / 4);
    const int channel = i % (DIM / 4) * 4;
    half4 x = {half(0), half(0), half(0), half(0)};
    if (position >= source.start && position < source.end) {
      x = *(const device half4*)(fresh + size_t(position - source.start) * DIM + channel);
    } else if (position >= source.begin && position < source.start) {
      x = *(const device half4*)(slots + size_t(position % source.num_slots) * DIM + channel);
    }
    *(device half4*)(out + size_t(i / (DIM / 4)) * DIM + channel) = x;
  }
}

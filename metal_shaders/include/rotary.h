// R(-b): a vector turned back by the start of its bucket.

// Channel `c` of R(-b) x, where x(i) = `at[i]` and cosines, sines are the bucket's row of the tables.
template <typename T, int DIMS, bool TRADITIONAL>
METAL_FUNC float turned_back(const device T* at, int c, const device float* cosines, const device float* sines) {
  const float x = float(at[c]);
  if (c >= DIMS) {
    return x;
  }
  const int pair = TRADITIONAL ? c / 2 : c % (DIMS > 1 ? DIMS / 2 : 1);
  const bool is_first = TRADITIONAL ? c % 2 == 0 : c < DIMS / 2;
  const float other = float(at[TRADITIONAL ? c ^ 1 : is_first ? c + DIMS / 2 : c - DIMS / 2]);
  const float turn = is_first ? other * sines[pair] : -other * sines[pair];
  return x * cosines[pair] + turn;
}

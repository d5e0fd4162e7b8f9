// R(-b) and R(b): a vector turned by the start of its bucket, back and on.

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

// Channel `c` of R(b) (x + mean), the turn the other way.
template <int DIMS, bool TRADITIONAL>
METAL_FUNC float turned_on(const device half* at, const device float* mean, int c, const device float* cosines,
                           const device float* sines) {
  const float x = float(at[c]) + mean[c];
  if (c >= DIMS) {
    return x;
  }
  const int pair = TRADITIONAL ? c / 2 : c % (DIMS > 1 ? DIMS / 2 : 1);
  const bool is_first = TRADITIONAL ? c % 2 == 0 : c < DIMS / 2;
  const int partner = TRADITIONAL ? c ^ 1 : is_first ? c + DIMS / 2 : c - DIMS / 2;
  const float other = float(at[partner]) + mean[partner];
  return x * cosines[pair] + (is_first ? -other * sines[pair] : other * sines[pair]);
}

// msl_simd.h - barriers and SIMD-group operations, carried out by the fiber runtime.
#pragma once
#include "msl_math.h"

namespace metal {
// ---- barriers -----------------------------------------------------------------------------
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
#define MSL_SITE const char *f_ = __builtin_FILE(), int l_ = __builtin_LINE()
inline void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_barrier(1, int(f), f_, l_); }
inline void simdgroup_barrier(mem_flags f, MSL_SITE) { msl_barrier(0, int(f), f_, l_); }

#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))), apply_to = function)
// ---- SIMD-group operations ------------------------------------------------------------------
namespace detail {
enum { OP_RED = 1, OP_SHUF = 2, OP_SCAN = 3 };
// butterfly (xor-tree) reduction over the active lanes
template <typename T, typename F>
inline void reduce(const void* in, void* out, uint mask, F f) {
  const T* a = (const T*)in;
  T v[32];
  bool on[32];
  T* o = (T*)out;
  for (int i = 0; i < 32; ++i) {
    on[i] = mask >> i & 1;
    v[i] = a[i];
  }
  for (int d = 1; d < 32; d <<= 1) {
    T w[32];
    bool n[32];
    for (int i = 0; i < 32; ++i) {
      int j = i ^ d;
      int lo = i < j ? i : j, hi = i < j ? j : i;
      n[i] = on[i] || on[j];
      w[i] = on[lo] && on[hi] ? f(v[lo], v[hi]) : on[i] ? v[i] : v[j];
    }
    for (int i = 0; i < 32; ++i) {
      v[i] = w[i];
      on[i] = n[i];
    }
  }
  for (int i = 0; i < 32; ++i) o[i] = v[i];
}
template <typename T>
void c_sum(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return T(a + b); });
}
template <typename T>
void c_prod(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return T(a * b); });
}
template <typename T>
void c_max(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return metal::max(a, b); });
}
template <typename T>
void c_min(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return metal::min(a, b); });
}
template <typename T>
void c_and(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return T(a & b); });
}
template <typename T>
void c_or(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return T(a | b); });
}
template <typename T>
void c_xor(const void* i, void* o, uint m, int) {
  reduce<T>(i, o, m, [](T a, T b) { return T(a ^ b); });
}
template <typename T>
void c_copy(const void* i, void* o, uint, int) {
  __builtin_memcpy(o, i, 32 * sizeof(T));
}
template <typename T>
void c_scan_incl(const void* i, void* o, uint m, int) {
  T s = 0;
  for (int k = 0; k < 32; ++k) {
    if (m >> k & 1) s = T(s + ((const T*)i)[k]);
    ((T*)o)[k] = s;
  }
}
template <typename T>
void c_scan_excl(const void* i, void* o, uint m, int) {
  T s = 0;
  for (int k = 0; k < 32; ++k) {
    ((T*)o)[k] = s;
    if (m >> k & 1) s = T(s + ((const T*)i)[k]);
  }
}
}  // namespace detail
#define MSL_SIMD(T, v, op, comb) ((const T*)msl_simd(&v, sizeof(T), detail::op, detail::comb<T>, 0, f_, l_))
template <typename T>
inline T simd_sum(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_sum)[msl_lane()];
}
template <typename T>
inline T simd_product(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_prod)[msl_lane()];
}
template <typename T>
inline T simd_max(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_max)[msl_lane()];
}
template <typename T>
inline T simd_min(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_min)[msl_lane()];
}
template <typename T>
inline T simd_and(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_and)[msl_lane()];
}
template <typename T>
inline T simd_or(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_or)[msl_lane()];
}
template <typename T>
inline T simd_xor(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_RED, c_xor)[msl_lane()];
}
inline bool simd_any(bool b, MSL_SITE) {
  int v = b;
  return MSL_SIMD(int, v, OP_RED, c_or)[msl_lane()];
}
inline bool simd_all(bool b, MSL_SITE) {
  int v = b;
  return MSL_SIMD(int, v, OP_RED, c_and)[msl_lane()];
}
template <typename T>
inline T simd_prefix_inclusive_sum(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_SCAN, c_scan_incl)[msl_lane()];
}
template <typename T>
inline T simd_prefix_exclusive_sum(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_SCAN, c_scan_excl)[msl_lane()];
}
template <typename T>
inline T simd_shuffle(T v, ushort l, MSL_SITE) {
  return MSL_SIMD(T, v, OP_SHUF, c_copy)[l & 31];
}
template <typename T>
inline T simd_broadcast(T v, ushort l, MSL_SITE) {
  return MSL_SIMD(T, v, OP_SHUF, c_copy)[l & 31];
}
template <typename T>
inline T simd_broadcast_first(T v, MSL_SITE) {
  return MSL_SIMD(T, v, OP_SHUF, c_copy)[0];
}
template <typename T>
inline T simd_shuffle_xor(T v, ushort m, MSL_SITE) {
  return MSL_SIMD(T, v, OP_SHUF, c_copy)[(msl_lane() ^ m) & 31];
}
// out-of-range lanes: MSL leaves *_up/_down undefined there -> hand back the own value's complement to make
// use visible
template <typename T>
inline T msl_poison(T v) {
  T r;
  __builtin_memset(&r, 0xA5, sizeof(T));
  return r;
}
template <typename T>
inline T simd_shuffle_down(T v, ushort d, MSL_SITE) {
  const T* a = MSL_SIMD(T, v, OP_SHUF, c_copy);
  uint j = msl_lane() + d;
  return j < 32 ? a[j] : msl_poison(v);
}
template <typename T>
inline T simd_shuffle_up(T v, ushort d, MSL_SITE) {
  const T* a = MSL_SIMD(T, v, OP_SHUF, c_copy);
  int j = int(msl_lane()) - d;
  return j >= 0 ? a[j] : msl_poison(v);
}
template <typename T>
inline T simd_shuffle_and_fill_up(T v, T fill, ushort d, MSL_SITE) {
  const T* a = MSL_SIMD(T, v, OP_SHUF, c_copy);
  int j = int(msl_lane()) - d;
  T r = j >= 0 ? a[j] : a[0];
  const T* b = (const T*)msl_simd(&fill, sizeof(T), detail::OP_SHUF, detail::c_copy<T>, 0, f_, l_);
  return j >= 0 ? r : b[32 + j];
}

#pragma clang attribute pop
}  // namespace metal

// msl_math.h - the mathematics of <metal_stdlib>, computed in float and rounded once.
#pragma once
#include "msl_types.h"

namespace metal {
// ---- math ---------------------------------------------------------------------------------
// MSL computes half in half; we compute through float and round once (correctly rounded).
#define MSL_M1(name, expr)                                \
  inline float name(float x) { return expr; }             \
  inline half name(half h) {                              \
    float x = h;                                          \
    return half(expr);                                    \
  }                                                       \
  inline bfloat name(bfloat h) {                          \
    float x = float(h);                                   \
    return bfloat(expr);                                  \
  }                                                       \
  template <int N>                                        \
  inline vec<float, N> name(vec<float, N> v) {            \
    vec<float, N> r;                                      \
    for (int i = 0; i < N; ++i) r[i] = name(float(v[i])); \
    return r;                                             \
  }                                                       \
  template <int N>                                        \
  inline vec<half, N> name(vec<half, N> v) {              \
    vec<half, N> r;                                       \
    for (int i = 0; i < N; ++i) r[i] = name(half(v[i]));  \
    return r;                                             \
  }
#define MSL_ALL_M1                                                                                           \
  MSL_M1(exp, __builtin_expf(x))                                                                             \
  MSL_M1(exp2, __builtin_exp2f(x)) MSL_M1(log, __builtin_logf(x)) MSL_M1(log2, __builtin_log2f(x))           \
      MSL_M1(log10, __builtin_log10f(x)) MSL_M1(sqrt, __builtin_sqrtf(x))                                    \
          MSL_M1(rsqrt, 1.0f / __builtin_sqrtf(x)) MSL_M1(sin, __builtin_sinf(x))                            \
              MSL_M1(cos, __builtin_cosf(x)) MSL_M1(tan, __builtin_tanf(x)) MSL_M1(tanh, __builtin_tanhf(x)) \
                  MSL_M1(fabs, __builtin_fabsf(x))
MSL_ALL_M1
MSL_M1(floor, __builtin_floorf(x))
MSL_M1(ceil, __builtin_ceilf(x)) MSL_M1(round, __builtin_roundf(x)) MSL_M1(rint, __builtin_rintf(x))
    MSL_M1(trunc, __builtin_truncf(x)) MSL_M1(sinh, __builtin_sinhf(x)) MSL_M1(cosh, __builtin_coshf(x))
#ifdef MSL_PERTURB  // fast:: functions are a few ulp off on the GPU; -DMSL_PERTURB=8 makes them up to 8 ulp
                    // wrong, in a fixed pattern
        inline float msl_p(float r, float x) {
  uint h = as_type<uint>(x) * 2654435761u;
  float e = float(int(h >> 16) - 32768) / 32768.0f;
  return r + r * e * (MSL_PERTURB * 5.96e-8f);
}
namespace fast {
MSL_M1(exp, msl_p(__builtin_expf(x), x))
MSL_M1(exp2, msl_p(__builtin_exp2f(x), x)) MSL_M1(log, msl_p(__builtin_logf(x), x))
    MSL_M1(log2, msl_p(__builtin_log2f(x), x)) MSL_M1(sqrt, msl_p(__builtin_sqrtf(x), x))
        MSL_M1(rsqrt, msl_p(1.0f / __builtin_sqrtf(x), x)) MSL_M1(sin, msl_p(__builtin_sinf(x), x))
            MSL_M1(cos, msl_p(__builtin_cosf(x), x)) MSL_M1(tanh, msl_p(__builtin_tanhf(x), x))
                MSL_M1(fabs, __builtin_fabsf(x)) MSL_M1(log10, msl_p(__builtin_log10f(x), x))
                    MSL_M1(tan, msl_p(__builtin_tanf(x), x))
}
#else
        namespace fast {
  MSL_ALL_M1
}
#endif
namespace precise {
MSL_ALL_M1
}
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float atan2(float x, float y) { return __builtin_atan2f(x, y); }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(__builtin_fmaf(a, b, c)); }
template <typename T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; ++i) r[i] = fma(T(a[i]), T(b[i]), T(c[i]));
  return r;
}
template <typename T>
inline bool isnan(T x) {
  return x != x;
}
template <typename T>
inline bool isinf(T x) {
  return __builtin_isinf(float(x));
}
template <typename T>
inline bool isfinite(T x) {
  return __builtin_isfinite(float(x));
}
template <typename T>
inline bool signbit(T x) {
  return __builtin_signbit(float(x));
}
// MSL: min/max take two arguments of ONE type; mixed arguments are ambiguous there and here
#define MSL_MM(T)                                  \
  inline T max(T a, T b) { return a < b ? b : a; } \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_MM(char)
MSL_MM(signed char) MSL_MM(uchar) MSL_MM(short) MSL_MM(ushort) MSL_MM(int) MSL_MM(uint) MSL_MM(long)
    MSL_MM(ulong)
#define MSL_MMF(T)                                                                 \
  inline T max(T a, T b) { return isnan(a) ? b : isnan(b) ? a : (a < b ? b : a); } \
  inline T min(T a, T b) { return isnan(a) ? b : isnan(b) ? a : (b < a ? b : a); } \
  inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }                  \
  inline T fmax(T a, T b) { return max(a, b); }                                    \
  inline T fmin(T a, T b) { return min(a, b); }
        MSL_MMF(float) MSL_MMF(half) MSL_MMF(bfloat)
#define MSL_MMV(T)                                            \
  template <int N>                                            \
  inline vec<T, N> max(vec<T, N> a, vec<T, N> b) {            \
    for (int i = 0; i < N; ++i) a[i] = max(T(a[i]), T(b[i])); \
    return a;                                                 \
  }                                                           \
  template <int N>                                            \
  inline vec<T, N> min(vec<T, N> a, vec<T, N> b) {            \
    for (int i = 0; i < N; ++i) a[i] = min(T(a[i]), T(b[i])); \
    return a;                                                 \
  }
            MSL_MMV(float) MSL_MMV(half) MSL_MMV(int) MSL_MMV(uint) template <typename T>
            inline T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
template <typename T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; ++i) s += a[i] * b[i];
  return s;
}
template <typename T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
inline uint extract_bits(uint x, uint off, uint n) {
  return n == 0 ? 0 : n >= 32 ? x >> off : (x >> off) & ((1u << n) - 1);
}
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }

#ifdef MSL_CHECK
#define MSL_D1(n)                 \
  float n(float);                 \
  half n(half);                   \
  template <int N>                \
  vec<float, N> n(vec<float, N>); \
  template <int N>                \
  vec<half, N> n(vec<half, N>);
MSL_D1(sign)
MSL_D1(saturate) MSL_D1(fract) MSL_D1(exp10) MSL_D1(sinpi) MSL_D1(cospi) MSL_D1(asin) MSL_D1(acos)
    MSL_D1(atan) MSL_D1(asinh) MSL_D1(acosh) MSL_D1(atanh) MSL_D1(normalize)
#define MSL_D2(n)        \
  float n(float, float); \
  half n(half, half);
        MSL_D2(step) MSL_D2(fmod) MSL_D2(powr) MSL_D2(fdim) MSL_D2(nextafter)
#define MSL_D3(n)               \
  float n(float, float, float); \
  half n(half, half, half);
            MSL_D3(mix) MSL_D3(smoothstep) MSL_D3(fmax3) MSL_D3(fmin3) MSL_D3(fmedian3) MSL_D3(max3)
                MSL_D3(min3) MSL_D3(median3) template <int N>
                float length(vec<float, N>);
template <int N>
float distance(vec<float, N>, vec<float, N>);
float3 cross(float3, float3);
#define MSL_I2(n)  \
  int n(int, int); \
  uint n(uint, uint);
MSL_I2(absdiff)
MSL_I2(addsat) MSL_I2(subsat) MSL_I2(hadd) MSL_I2(rhadd) MSL_I2(mulhi) MSL_I2(mul24)
    MSL_I2(rotate) int madhi(int, int, int);
int mad24(int, int, int);
uint insert_bits(uint, uint, uint, uint);
#endif
}  // namespace metal

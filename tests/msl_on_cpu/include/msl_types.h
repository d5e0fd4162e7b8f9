// msl_types.h - scalar and vector types, address spaces, type traits of <metal_stdlib>.
// Two passes over the same kernel text: -DMSL_CHECK makes address spaces clang attributes (type check only);
// otherwise they vanish, and SIMD operations and barriers call the fiber runtime (execution).
//   otherwise   : address spaces vanish, SIMD ops/barriers call the fiber runtime (execute)
#pragma once
#include <stdint.h>
#include <stddef.h>

#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif
#define METAL_FUNC inline __attribute__((__always_inline__))

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

// ---- vector types -----------------------------------------------------------------
#define MSL_VEC(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VEC(char)
MSL_VEC(uchar) MSL_VEC(short) MSL_VEC(ushort) MSL_VEC(int) MSL_VEC(uint) MSL_VEC(long) MSL_VEC(ulong)
    MSL_VEC(half) MSL_VEC(float) MSL_VEC(bfloat)

        namespace msl_detail {
  template <typename V>
  struct vt;  // vector traits
  template <typename T, int N>
  struct vt<T __attribute__((ext_vector_type(N)))> {
    typedef T elem;
    static constexpr int n = N;
  };
  template <typename T>
  struct is_vec {
    static constexpr bool value = false;
  };
  template <typename T, int N>
  struct is_vec<T __attribute__((ext_vector_type(N)))> {
    static constexpr bool value = true;
  };
  template <typename E, typename A>
  constexpr int put(E * d, int i, A a) {
    if constexpr (is_vec<A>::value) {
      for (int k = 0; k < vt<A>::n; ++k) d[i + k] = E(a[k]);
      return i + vt<A>::n;
    } else {
      d[i] = E(a);
      return i + 1;
    }
  }
  template <typename A>
  constexpr int width() {
    if constexpr (is_vec<A>::value) return vt<A>::n;
    else return 1;
  }
  template <typename V, typename... A>
  inline V make(A... a) {
    typedef typename vt<V>::elem E;
    constexpr int total = (0 + ... + width<A>());
    if constexpr (sizeof...(A) == 1 && total == 1) {
      V v;
      for (int k = 0; k < vt<V>::n; ++k) v[k] = E((a, ...));
      return v;
    } else {
      static_assert(total == vt<V>::n, "vector constructor: wrong number of components");
      E tmp[vt<V>::n];
      int i = 0;
      ((i = put(tmp, i, a)), ...);
      V v;
      for (int k = 0; k < vt<V>::n; ++k) v[k] = tmp[k];
      return v;
    }
  }
}
// MSL writes float4(a,b,c,d); clang's ext vectors do not, so a function-like macro builds them
#define MSL_CT(T)
#define char2(...) msl_detail::make<char2>(__VA_ARGS__)
#define char4(...) msl_detail::make<char4>(__VA_ARGS__)
#define uchar2(...) msl_detail::make<uchar2>(__VA_ARGS__)
#define uchar4(...) msl_detail::make<uchar4>(__VA_ARGS__)
#define short2(...) msl_detail::make<short2>(__VA_ARGS__)
#define short4(...) msl_detail::make<short4>(__VA_ARGS__)
#define ushort2(...) msl_detail::make<ushort2>(__VA_ARGS__)
#define ushort4(...) msl_detail::make<ushort4>(__VA_ARGS__)
#define int2(...) msl_detail::make<int2>(__VA_ARGS__)
#define int3(...) msl_detail::make<int3>(__VA_ARGS__)
#define int4(...) msl_detail::make<int4>(__VA_ARGS__)
#define uint2(...) msl_detail::make<uint2>(__VA_ARGS__)
#define uint3(...) msl_detail::make<uint3>(__VA_ARGS__)
#define uint4(...) msl_detail::make<uint4>(__VA_ARGS__)
#define half2(...) msl_detail::make<half2>(__VA_ARGS__)
#define half3(...) msl_detail::make<half3>(__VA_ARGS__)
#define half4(...) msl_detail::make<half4>(__VA_ARGS__)
#define float2(...) msl_detail::make<float2>(__VA_ARGS__)
#define float3(...) msl_detail::make<float3>(__VA_ARGS__)
#define float4(...) msl_detail::make<float4>(__VA_ARGS__)
#define long2(...) msl_detail::make<long2>(__VA_ARGS__)
#define long3(...) msl_detail::make<long3>(__VA_ARGS__)
#define long4(...) msl_detail::make<long4>(__VA_ARGS__)
#define ulong2(...) msl_detail::make<ulong2>(__VA_ARGS__)
#define ulong3(...) msl_detail::make<ulong3>(__VA_ARGS__)
#define ulong4(...) msl_detail::make<ulong4>(__VA_ARGS__)
#define short3(...) msl_detail::make<short3>(__VA_ARGS__)
#define ushort3(...) msl_detail::make<ushort3>(__VA_ARGS__)
#define uchar3(...) msl_detail::make<uchar3>(__VA_ARGS__)
#define char3(...) msl_detail::make<char3>(__VA_ARGS__)
#define bfloat2(...) msl_detail::make<bfloat2>(__VA_ARGS__)
#define bfloat4(...) msl_detail::make<bfloat4>(__VA_ARGS__)

constexpr half operator""h(long double v) { return half(v); }

// ---- address spaces -----------------------------------------------------------------
#ifdef MSL_CHECK
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define MSL_TGVAR static __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#define thread
#define MSL_TGVAR static __attribute__((section("msl_tg"), aligned(16)))
#endif
#define kernel

// ---- runtime entry points ----------------------------------------------------------
extern "C" {
struct msl_attrs {
  uint tid[3], gid[3], tgp[3], tpt[3], tpg[3], grid[3];
  uint lane, sg, lin, nsg;
};
extern msl_attrs* msl_cur;
void msl_barrier(int scope, int flags, const char* file, int line);
void* msl_simd(const void* in, int size, int op, void (*combine)(const void*, void*, uint, int), int arg,
               const char* file, int line);
void msl_atomic_note(const volatile void* p, int size, int write);
uint msl_lane();
}

struct msl_arg_p {
  void* p;
  template <typename T>
  operator T*() const {
    return (T*)p;
  }
};
struct msl_arg_r {
  void* p;
  template <typename T>
  operator const T&() const {
    return *(const T*)p;
  }
};

namespace metal {
using ::bfloat;
using ::half;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;
template <typename T, int N>
using vec __attribute__((ext_vector_type(N))) = T;

// ---- type traits / limits -------------------------------------------------------------
template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
  typedef T value_type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F>
struct conditional {
  typedef T type;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
template <typename T, typename U>
constexpr bool is_same_v = __is_same(T, U);
template <typename T, typename U>
struct is_same : bool_constant<__is_same(T, U)> {};
template <typename T, typename U>
constexpr bool is_convertible_v = __is_convertible(T, U);
template <typename T>
constexpr bool is_integral_v = __is_integral(T);
template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
constexpr bool is_floating_point_v = __is_floating_point(T) || __is_same(T, half) || __is_same(T, bfloat);
template <typename T>
constexpr bool is_signed_v = T(-1) < T(0);
template <typename T>
struct remove_cv {
  typedef __remove_cv(T) type;
};
template <typename T>
using remove_cv_t = __remove_cv(T);
template <typename T>
using remove_addrspace_t = T;
template <typename T>
using remove_reference_t = __remove_reference_t(T);

template <typename T>
struct numeric_limits;
#define MSL_INT_LIM(T, LO, HI)                 \
  template <>                                  \
  struct numeric_limits<T> {                   \
    static constexpr T max() { return HI; }    \
    static constexpr T min() { return LO; }    \
    static constexpr T lowest() { return LO; } \
  };
MSL_INT_LIM(bool, false, true)
MSL_INT_LIM(int8_t, INT8_MIN, INT8_MAX)
MSL_INT_LIM(uint8_t, 0, UINT8_MAX) MSL_INT_LIM(int16_t, INT16_MIN, INT16_MAX)
    MSL_INT_LIM(uint16_t, 0, UINT16_MAX) MSL_INT_LIM(int32_t, INT32_MIN, INT32_MAX)
        MSL_INT_LIM(uint32_t, 0, UINT32_MAX) MSL_INT_LIM(int64_t, INT64_MIN, INT64_MAX)
            MSL_INT_LIM(uint64_t, 0, UINT64_MAX)
#define MSL_FLT_LIM(T, MAXV, MINV, EPS)                              \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr T max() { return T(MAXV); }                     \
    static constexpr T min() { return T(MINV); }                     \
    static constexpr T lowest() { return T(-(MAXV)); }               \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
    static constexpr T epsilon() { return T(EPS); }                  \
  };
                MSL_FLT_LIM(float, 3.402823466e38f, 1.175494351e-38f, 1.1920929e-7f)
                    MSL_FLT_LIM(half, 65504.0f, 6.103515625e-05f, 9.765625e-4f)
                        MSL_FLT_LIM(bfloat, 3.38953139e38f, 1.175494351e-38f, 7.8125e-3f)

// ---- as_type ------------------------------------------------------------------------------
}  // namespace metal
template <typename To, typename From>
inline To as_type(From v) {
  static_assert(sizeof(To) == sizeof(From), "as_type: size mismatch");
  return __builtin_bit_cast(To, v);
}
namespace metal {
using ::as_type;
}  // namespace metal

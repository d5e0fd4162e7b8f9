// msl_atomic.h - relaxed atomics on device and threadgroup memory.
#pragma once
#include "msl_simd.h"

namespace metal {
// ---- atomics -----------------------------------------------------------------------------
enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T v_;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
#ifdef MSL_CHECK
#define MSL_ATOMIC(AS)                                                                     \
  template <typename T>                                                                    \
  T atomic_load_explicit(const volatile AS atomic<T>*, memory_order);                      \
  template <typename T>                                                                    \
  void atomic_store_explicit(volatile AS atomic<T>*, __type_identity_t<T>, memory_order);  \
  template <typename T>                                                                    \
  T atomic_exchange_explicit(volatile AS atomic<T>*, __type_identity_t<T>, memory_order);  \
  template <typename T>                                                                    \
  T atomic_fetch_add_explicit(volatile AS atomic<T>*, __type_identity_t<T>, memory_order); \
  template <typename T>                                                                    \
  T atomic_fetch_max_explicit(volatile AS atomic<T>*, __type_identity_t<T>, memory_order); \
  template <typename T>                                                                    \
  T atomic_fetch_min_explicit(volatile AS atomic<T>*, __type_identity_t<T>, memory_order); \
  template <typename T>                                                                    \
  T atomic_fetch_or_explicit(volatile AS atomic<T>*, __type_identity_t<T>, memory_order);
template <typename T>
struct type_identity {
  typedef T type;
};
#define __type_identity_t typename type_identity
#undef MSL_ATOMIC
#define MSL_TI(T) typename type_identity<T>::type
#define MSL_ATOMIC(AS)                                                          \
  template <typename T>                                                         \
  T atomic_load_explicit(const volatile AS atomic<T>*, memory_order);           \
  template <typename T>                                                         \
  void atomic_store_explicit(volatile AS atomic<T>*, MSL_TI(T), memory_order);  \
  template <typename T>                                                         \
  T atomic_exchange_explicit(volatile AS atomic<T>*, MSL_TI(T), memory_order);  \
  template <typename T>                                                         \
  T atomic_fetch_add_explicit(volatile AS atomic<T>*, MSL_TI(T), memory_order); \
  template <typename T>                                                         \
  T atomic_fetch_max_explicit(volatile AS atomic<T>*, MSL_TI(T), memory_order); \
  template <typename T>                                                         \
  T atomic_fetch_min_explicit(volatile AS atomic<T>*, MSL_TI(T), memory_order); \
  template <typename T>                                                         \
  T atomic_fetch_or_explicit(volatile AS atomic<T>*, MSL_TI(T), memory_order);
MSL_ATOMIC(device) MSL_ATOMIC(threadgroup)
#else
template <typename T>
struct type_identity {
  typedef T type;
};
#define MSL_TI(T) typename type_identity<T>::type
#define MSL_RMW(name, expr)                                                                                \
  template <typename T>                                                                                    \
  __attribute__((no_sanitize("thread"))) inline T name(volatile atomic<T>* p, MSL_TI(T) x, memory_order) { \
    msl_atomic_note(p, sizeof(T), 1);                                                                      \
    T o = p->v_;                                                                                           \
    p->v_ = (expr);                                                                                        \
    return o;                                                                                              \
  }
MSL_RMW(atomic_exchange_explicit, x)
MSL_RMW(atomic_fetch_add_explicit, T(o + x)) MSL_RMW(atomic_fetch_sub_explicit, T(o - x))
    MSL_RMW(atomic_fetch_max_explicit, metal::max(o, x)) MSL_RMW(atomic_fetch_min_explicit, metal::min(o, x))
        MSL_RMW(atomic_fetch_or_explicit, T(o | x))
            MSL_RMW(atomic_fetch_and_explicit, T(o& x)) template <typename T>
            __attribute__((no_sanitize("thread"))) inline T
    atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  msl_atomic_note(p, sizeof(T), 0);
  return p->v_;
}
template <typename T>
__attribute__((no_sanitize("thread"))) inline void atomic_store_explicit(volatile atomic<T>* p, MSL_TI(T) x,
                                                                         memory_order) {
  msl_atomic_note(p, sizeof(T), 1);
  p->v_ = x;
}
#endif
}  // namespace metal

// The functions that clang's -fsanitize=thread and -fsanitize=undefined instrumentation calls.
#include <cstdlib>
#include <cstring>

#include "state.h"

#define PC __builtin_return_address(0)
#define ACCESS(n)                                                            \
  void __tsan_read##n(void* p) { access(p, n, false, false, PC); }           \
  void __tsan_write##n(void* p) { access(p, n, true, false, PC); }           \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false, false, PC); } \
  void __tsan_unaligned_write##n(void* p) { access(p, n, true, false, PC); } \
  void __tsan_volatile_read##n(void* p) { access(p, n, false, false, PC); }  \
  void __tsan_volatile_write##n(void* p) { access(p, n, true, false, PC); }  \
  void __tsan_read_write##n(void* p) {                                       \
    access(p, n, false, false, PC);                                          \
    access(p, n, true, false, PC);                                           \
  }

struct Location {
  const char* file;
  u32 line, column;
};

#define UNDEFINED(name, what)                                                        \
  void __ubsan_handle_##name(Location* at, u64 a, u64 b) {                           \
    if (L.current)                                                                   \
      say("UB " what " at line %u:%u#thread %u, values %llu %llu", at->line, at->column, \
          L.current->at.lin, (unsigned long long)a, (unsigned long long)b);          \
  }                                                                                  \
  void __ubsan_handle_##name##_abort(Location* at, u64 a, u64 b) {                   \
    __ubsan_handle_##name(at, a, b);                                                 \
    if (L.current) die();                                                            \
    abort();                                                                         \
  }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, false, false, PC); }
void __tsan_write_range(void* p, size_t n) { access(p, n, true, false, PC); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access(from, n, false, false, PC);
  access(to, n, true, false, PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access(from, n, false, false, PC);
  access(to, n, true, false, PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  access(to, n, true, false, PC);
  return memset(to, value, n);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

UNDEFINED(out_of_bounds, "array index out of bounds")
UNDEFINED(shift_out_of_bounds, "shift out of range")
UNDEFINED(add_overflow, "signed overflow in +")
UNDEFINED(sub_overflow, "signed overflow in -")
UNDEFINED(mul_overflow, "signed overflow in *")
UNDEFINED(negate_overflow, "signed overflow in negation")
void __ubsan_handle_divrem_overflow(Location* at, u64 a, u64 b) {
  say("UB division by zero or overflow at line %u:%u#values %llu %llu", at->line, at->column, (unsigned long long)a,
      (unsigned long long)b);
  die();  // going on would trap
}
UNDEFINED(type_mismatch_v1, "misaligned or null access")
UNDEFINED(float_cast_overflow, "float to int conversion out of range")
UNDEFINED(load_invalid_value, "invalid bool value")
UNDEFINED(pointer_overflow, "pointer arithmetic overflow")
UNDEFINED(builtin_unreachable, "unreachable reached")
UNDEFINED(missing_return, "missing return")
UNDEFINED(alignment_assumption, "alignment assumption")
UNDEFINED(invalid_builtin, "invalid builtin argument")
}

// The structures shared with Python (launch.py mirrors them field by field) and with the compiled kernels.
#pragma once
#include <cstdint>

typedef unsigned int uint;
typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;

enum BufferKind : u32 { CONST_INPUT = 0, OUTPUT = 1, THREADGROUP = 2 };
enum ThreadOrder : u32 { FORWARD = 0, REVERSE = 1, RANDOM = 2 };

extern "C" {
// What a thread's Metal attributes return. Field names are used in generated entry code.
struct msl_attrs {
  uint tid[3], gid[3], tgp[3], tpt[3], tpg[3], grid[3];
  uint lane, sg, lin, nsg;
};
extern msl_attrs* msl_cur;

struct msl_buf {
  void* base;
  u64 size;
  u32 kind;
  u32 init;  // contents are defined before the launch
  const char* name;
  u64 read_bytes, written_bytes;    // summed over accesses
  u64 read_unique, written_unique;  // distinct bytes
};

struct msl_cfg {
  uint grid[3], tg[3];
  u32 seed, order, strict_simd, check, max_reports;
  void* tg_base;
  u64 tg_size;
  u64 pc_base;
  const u64* rodata;  // pairs (address, size) of the kernel's own constant tables
  u64 num_rodata;
};

struct msl_stats {
  u64 barriers, simd_ops, switches, accesses, reports, groups;
  char* text;
};
}

// State of the launch under way. One launch at a time, on one OS thread.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "abi.h"

const size_t STACK_BYTES = 256 * 1024;

enum FiberState { READY, AT_THREADGROUP_BARRIER, AT_SIMDGROUP_BARRIER, AT_SIMD_OP, DONE };

// One GPU thread.
struct Fiber {
  void* sp;
  u8* stack;
  int state;
  const char* wait_file;
  int wait_line;
  int wait_flags;
  msl_attrs at;
  u32 simdgroup;
  void* result;  // of the last SIMD operation
  alignas(16) u8 operand[128];
};

typedef void (*Combine)(const void*, void*, uint, int);

struct Simdgroup {
  u64 epoch[2];  // barriers passed, by memory class: 0 device, 1 threadgroup
  int arrived, parity, num_lanes;
  Combine combine;
  int size, arg;
  alignas(64) u8 in[32 * 128];
  alignas(64) u8 out[2][32 * 128];
};

// One remembered access: by whom, and after how many barriers.
struct Access {
  u32 group;  // 1-based; 0: none
  uint16_t thread;
  uint16_t atomic;
  u32 group_epoch, simd_epoch;
  u32 pc;
};

// Shadow of one byte: last writer, last two readers.
struct Cell {
  Access write, read1, read2;
  u8 init, was_read, was_written;
};

struct Launch {
  msl_cfg cfg;
  msl_stats* stats;
  void (*entry)(void**);
  void** args;
  std::vector<msl_buf*> buffers;
  std::vector<Cell*> shadow;
  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  std::vector<std::string> seen;
  std::string log;
  u64 group_epoch[2];
  u32 group;  // 1-based
  u64 rng;
  bool fatal;
  Fiber* current;
  void* scheduler_sp;
};
extern Launch L;
extern u8* stacks;
extern size_t num_stacks;

u32 next_random();
// Make the fibers of a threadgroup, ready to run.
void set_up_threads(const uint group[3], const uint num_groups[3]);
// Run them to their end.
void run_group(std::vector<int>& ready);
// Record a report; text before '#' identifies it, repeats are only counted.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Leave the current fiber for good and end the launch.
[[noreturn]] void die();
// Check and record one memory access of the current fiber.
void access(const void* address, int size, bool write, bool atomic, void* pc);
extern "C" void msl_switch(void** save, void* to);

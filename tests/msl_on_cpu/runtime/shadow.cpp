// Shadow memory: bounds, writes to inputs, uninitialised reads, races, bytes of traffic.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

void say(const char* format, ...) {
  char buffer[600];
  va_list args;
  va_start(args, format);
  vsnprintf(buffer, sizeof buffer, format, args);
  va_end(args);
  std::string text = buffer, key = text.substr(0, text.find('#'));
  L.stats->reports++;
  for (auto& known : L.seen)
    if (known == key) return;
  L.seen.push_back(key);
  if (L.seen.size() > L.cfg.max_reports) return;
  for (char& c : text)
    if (c == '#') c = ' ';
  L.log += text + "\n";
}

void die() {
  L.fatal = true;
  void* dropped;
  msl_switch(&dropped, L.scheduler_sp);
  abort();
}

static int find_buffer(u64 address) {
  static int last = 0;
  int count = (int)L.buffers.size();
  if (last < count && address - (u64)L.buffers[last]->base < L.buffers[last]->size) return last;
  for (int i = 0; i < count; ++i)
    if (address - (u64)L.buffers[i]->base < L.buffers[i]->size) return last = i;
  return -1;
}

// Is the earlier access unordered with respect to the current fiber?
static bool conflicts(const Access& earlier, u32 kind) {
  if (!earlier.group) return false;
  if (earlier.group != L.group) return kind != THREADGROUP;  // threadgroups of one dispatch are never ordered
  if (earlier.thread == L.current->at.lin) return false;
  int memory = kind == THREADGROUP;
  if (earlier.group_epoch != (u32)L.group_epoch[memory]) return false;
  bool same_simdgroup = earlier.thread / 32 == L.current->simdgroup;
  return !(same_simdgroup && earlier.simd_epoch != (u32)L.simdgroups[L.current->simdgroup].epoch[memory]);
}

static void outside_all_buffers(u64 a, int n, bool write, u32 pc) {
  const char* verb = write ? "write" : "read";
  if (!write)
    for (u64 i = 0; i < L.cfg.num_rodata; ++i)
      if (a - L.cfg.rodata[2 * i] < L.cfg.rodata[2 * i + 1]) return;
  if (a - (u64)stacks < num_stacks * STACK_BYTES) {
    say("ERROR thread-space memory of another thread: %s @pc=%x#", verb, pc);
    die();
  }
  for (auto* b : L.buffers)
    if (a >= (u64)b->base - 65536 && a < (u64)b->base + b->size + 65536) {
      say("ERROR out-of-bounds %s of %d bytes at %s @pc=%x#offset %lld of %llu, thread %u group %u", verb, n, b->name,
          pc, (long long)(a - (u64)b->base), (unsigned long long)b->size, L.current->at.lin, L.group - 1);
      die();
    }
  if (!write) return;  // read-only data of the runtime
  say("ERROR wild write @pc=%x#", pc);
  die();
}

static void check_byte(Cell& cell, const msl_buf& b, const Access& me, bool write, u64 offset, bool& raced) {
  if (b.kind == THREADGROUP && cell.write.group && cell.write.group != L.group) {
    // A new threadgroup: its memory is undefined again.
    cell.init = 0;
    cell.write.group = cell.read1.group = cell.read2.group = 0;
  }
  if (!raced && !(me.atomic && cell.write.atomic) && conflicts(cell.write, b.kind)) {
    raced = true;
    say("RACE on %s: %s @pc=%x after unordered write @pc=%x#threads %u and %u, offset %llu, groups %u/%u", b.name,
        write ? "write" : "read", me.pc, cell.write.pc, me.thread, cell.write.thread, (unsigned long long)offset,
        L.group - 1, cell.write.group - 1);
  }
  if (!write) {
    if (!cell.init)
      say("UNINITIALISED read of %s @pc=%x#offset %llu thread %u group %u", b.name, me.pc, (unsigned long long)offset,
          me.thread, L.group - 1);
    cell.init = 1;
    if (cell.read1.group && cell.read1.thread != me.thread) cell.read2 = cell.read1;
    cell.read1 = me;
    cell.was_read = 1;
    return;
  }
  for (Access* r : {&cell.read1, &cell.read2})
    if (!raced && !(me.atomic && r->atomic) && conflicts(*r, b.kind)) {
      raced = true;
      say("RACE on %s: write @pc=%x after unordered read @pc=%x#threads %u and %u, offset %llu", b.name, me.pc, r->pc,
          me.thread, r->thread, (unsigned long long)offset);
    }
  cell.write = me;
  cell.init = cell.was_written = 1;
}

void access(const void* address, int n, bool write, bool atomic, void* pc) {
  if (!L.current || !L.cfg.check) return;
  L.stats->accesses++;
  u64 a = (u64)address;
  if (a - (u64)L.current->stack < STACK_BYTES) return;
  int index = find_buffer(a);
  u32 where = u32((u64)pc - L.cfg.pc_base);
  if (index < 0) return outside_all_buffers(a, n, write, where);
  msl_buf& b = *L.buffers[index];
  u64 offset = a - (u64)b.base;
  if (offset + n > b.size) {
    say("ERROR out-of-bounds %s of %d bytes at %s @pc=%x#offset %llu of %llu, thread %u group %u",
        write ? "write" : "read", n, b.name, where, (unsigned long long)offset, (unsigned long long)b.size,
        L.current->at.lin, L.group - 1);
    die();
  }
  (write ? b.written_bytes : b.read_bytes) += n;
  Cell* cells = L.shadow[index] + offset;
  if (b.kind == CONST_INPUT) {
    if (write) {
      say("ERROR write to input %s @pc=%x#", b.name, where);
      die();
    }
    for (int i = 0; i < n; ++i) cells[i].was_read = 1;
    return;
  }
  int memory = b.kind == THREADGROUP;
  Access me{L.group, (uint16_t)L.current->at.lin, (uint16_t)atomic, (u32)L.group_epoch[memory],
            (u32)L.simdgroups[L.current->simdgroup].epoch[memory], where};
  bool raced = false;
  for (int i = 0; i < n; ++i) check_byte(cells[i], b, me, write, offset + i, raced);
}

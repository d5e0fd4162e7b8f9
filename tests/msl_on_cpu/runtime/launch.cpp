// One launch: shadow memory, stacks, all threadgroups one after another, the verdict.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "state.h"

u8* stacks;
size_t num_stacks;

static void reserve_stacks(size_t count) {
  if (num_stacks >= count) return;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (stacks) munmap(stacks, num_stacks * STACK_BYTES);
  num_stacks = count;
  stacks = (u8*)mmap(nullptr, num_stacks * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
  for (size_t i = 0; i < num_stacks; ++i) mprotect(stacks + i * STACK_BYTES, 4096, PROT_NONE);
}

static void run_all_groups() {
  uint num[3];
  for (int i = 0; i < 3; ++i) num[i] = (L.cfg.grid[i] + L.cfg.tg[i] - 1) / L.cfg.tg[i];
  u32 total = num[0] * num[1] * num[2];
  std::vector<u32> order(total);
  for (u32 i = 0; i < total; ++i) order[i] = i;
  if (L.cfg.order == RANDOM)
    for (u32 i = total; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  std::vector<int> ready;
  for (u32 i = 0; i < total && !L.fatal; ++i) {
    uint group[3] = {order[i] % num[0], order[i] / num[0] % num[1], order[i] / num[0] / num[1]};
    L.group = i + 1;
    L.stats->groups++;
    L.group_epoch[0] = L.group_epoch[1] = 1;
    if (L.cfg.tg_size) memset(L.cfg.tg_base, 0xFF, L.cfg.tg_size);  // NaN patterns
    set_up_threads(group, num);
    run_group(ready);
  }
}

static void make_shadow() {
  for (auto* b : L.buffers) {
    b->read_bytes = b->written_bytes = 0;
    Cell* cells = nullptr;
    if (L.cfg.check) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      cells = (Cell*)mmap(nullptr, (b->size + 1) * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0);
      if (b->init && b->kind != CONST_INPUT)
        for (u64 i = 0; i < b->size; ++i) cells[i].init = 1;
    }
    L.shadow.push_back(cells);
  }
}

static void collect_shadow() {
  for (size_t i = 0; i < L.buffers.size() && L.cfg.check; ++i) {
    msl_buf* b = L.buffers[i];
    u64 read = 0, written = 0;
    for (u64 k = 0; k < b->size; ++k) {
      read += L.shadow[i][k].was_read;
      written += L.shadow[i][k].was_written;
    }
    b->read_unique = read;
    b->written_unique = written;
    if (b->kind == OUTPUT && !b->init && written < b->size && !L.fatal)
      say("OUTPUT %s: only %llu of %llu bytes written (the rest is garbage on a GPU)#", b->name,
          (unsigned long long)written, (unsigned long long)b->size);
    munmap(L.shadow[i], (b->size + 1) * sizeof(Cell));
  }
}

extern "C" {
// Returns 0: clean, 1: reports, 2: stopped at an error.
int msl_launch(void (*entry)(void**), void** args, const msl_cfg* cfg, msl_buf* bufs, int num_bufs, msl_stats* stats) {
  unsigned mode = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(mode | 0x8040);  // Apple GPUs flush float32 denormals
  memset(stats, 0, sizeof *stats);
  L = Launch{};
  L.cfg = *cfg;
  L.stats = stats;
  L.entry = entry;
  L.args = args;
  L.rng = cfg->seed * 2654435761u + 88172645463325252ull;
  for (int i = 0; i < num_bufs; ++i) L.buffers.push_back(&bufs[i]);
  make_shadow();
  reserve_stacks((size_t)cfg->tg[0] * cfg->tg[1] * cfg->tg[2]);
  run_all_groups();
  collect_shadow();
  static std::string text;
  text = L.log;
  stats->text = (char*)text.c_str();
  __builtin_ia32_ldmxcsr(mode);
  return L.fatal ? 2 : stats->reports ? 1 : 0;
}
}

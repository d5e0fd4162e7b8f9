// Fibers: one per GPU thread of a threadgroup, switched only at barriers and SIMD operations.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

Launch L;
msl_attrs* msl_cur = nullptr;

#if !defined(__x86_64__)
#error "the context switch below is written for x86-64"
#endif
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

u32 next_random() {
  L.rng ^= L.rng << 13;
  L.rng ^= L.rng >> 7;
  L.rng ^= L.rng << 17;
  return u32(L.rng >> 16);
}

static void yield_fiber() {
  L.stats->switches++;
  msl_switch(&L.current->sp, L.scheduler_sp);
}

static void fiber_main() {
  L.entry(L.args);
  L.current->state = DONE;
  yield_fiber();
  abort();
}

static void start_fiber(Fiber& f) {
  u64* sp = (u64*)(f.stack + STACK_BYTES);
  *--sp = 0;
  *--sp = (u64)&fiber_main;
  for (int i = 0; i < 6; ++i) *--sp = 0;
  f.sp = sp;
  f.state = READY;
}

static void finish_simd(int s, uint mask) {
  Simdgroup& g = L.simdgroups[s];
  memset(g.in, 0xA5, 32 * g.size);  // lanes that are not here: poison
  for (int l = 0; l < g.num_lanes; ++l)
    if (mask >> l & 1) memcpy(g.in + l * g.size, L.fibers[s * 32 + l].operand, g.size);
  g.combine(g.in, g.out[g.parity], mask, g.arg);
  L.stats->simd_ops++;
  for (int l = 0; l < g.num_lanes; ++l)
    if (mask >> l & 1) {
      L.fibers[s * 32 + l].state = READY;
      L.fibers[s * 32 + l].result = g.out[g.parity];
      g.arrived--;
    }
  g.parity ^= 1;
}

static bool same_site(const Fiber& a, const Fiber& b) {
  return a.wait_line == b.wait_line && !strcmp(a.wait_file, b.wait_file);
}

// Let a simdgroup pass the SIMD operation or simdgroup barrier its lanes wait at. False: no lane waits at one.
static bool release_simdgroup(int s) {
  Simdgroup& g = L.simdgroups[s];
  int at_op = 0, at_barrier = 0, done = 0, flags = 0;
  Fiber* first = nullptr;
  bool same = true;
  uint mask = 0;
  for (int l = 0; l < g.num_lanes; ++l) {
    Fiber& f = L.fibers[s * 32 + l];
    if (f.state == DONE) done++;
    if (f.state != AT_SIMD_OP && f.state != AT_SIMDGROUP_BARRIER) continue;
    if (!first) first = &f;
    same = same && same_site(*first, f);
    (f.state == AT_SIMD_OP ? at_op : at_barrier)++;
    flags |= f.wait_flags;
    if (same_site(*first, f)) mask |= 1u << l;
  }
  if (!first) return false;
  int elsewhere = g.num_lanes - done - at_op - at_barrier;
  if ((elsewhere || done || !same) && L.cfg.strict_simd)
    say("DIVERGENT %s at line %d: %d lanes here, %d exited, %d at a threadgroup barrier%s#",
        at_op ? "SIMD operation" : "simdgroup_barrier", first->wait_line, at_op + at_barrier, done, elsewhere,
        same ? "" : ", others at another SIMD operation");
  if (at_op && at_barrier) {
    say("ERROR simdgroup split between a SIMD operation and a simdgroup_barrier#");
    L.fatal = true;
    return false;
  }
  if (at_op) {
    finish_simd(s, mask);
    return true;
  }
  for (int m = 0; m < 2; ++m)
    if (flags & (1 << m)) g.epoch[m]++;
  for (int l = 0; l < g.num_lanes; ++l)
    if (mask >> l & 1) L.fibers[s * 32 + l].state = READY;
  return true;
}

static void release_threadgroup() {
  int waiting = 0, done = 0, flags = 0;
  Fiber* first = nullptr;
  bool same = true;
  for (auto& f : L.fibers) {
    if (f.state == DONE) {
      done++;
      continue;
    }
    if (!first) first = &f;
    same = same && same_site(*first, f);
    waiting++;
    flags |= f.wait_flags;
  }
  if (!waiting) return;
  if (done)
    say("BARRIER at line %d reached by %d threads, %d already returned (undefined in MSL and CUDA)#",
        first->wait_line, waiting, done);
  if (!same)
    say("BARRIER DIVERGENCE: threads wait at different threadgroup_barrier calls (line %d and others)#",
        first->wait_line);
  L.stats->barriers++;
  for (int m = 0; m < 2; ++m)
    if (flags & (1 << m)) L.group_epoch[m]++;
  for (auto& f : L.fibers)
    if (f.state != DONE) f.state = READY;
}

// Called when no fiber is ready: pass whatever they wait at.
static void release() {
  bool any = false;
  for (size_t s = 0; s < L.simdgroups.size() && !L.fatal; ++s) any = release_simdgroup((int)s) || any;
  if (!any && !L.fatal) release_threadgroup();
}

void set_up_threads(const uint group[3], const uint num_groups[3]) {
  uint size[3];  // smaller at the edge, as dispatchThreads makes them
  for (int i = 0; i < 3; ++i) size[i] = std::min(L.cfg.tg[i], L.cfg.grid[i] - group[i] * L.cfg.tg[i]);
  int count = size[0] * size[1] * size[2];
  L.fibers.assign(count, Fiber{});
  L.simdgroups.resize((count + 31) / 32);
  for (size_t s = 0; s < L.simdgroups.size(); ++s) {
    Simdgroup& g = L.simdgroups[s];
    g.epoch[0] = g.epoch[1] = 1;
    g.arrived = g.parity = 0;
    g.num_lanes = std::min(32, count - (int)s * 32);
  }
  for (int t = 0; t < count; ++t) {
    Fiber& f = L.fibers[t];
    f.stack = stacks + (size_t)t * STACK_BYTES;
    f.simdgroup = t / 32;
    msl_attrs& a = f.at;
    a.tid[0] = t % size[0];
    a.tid[1] = t / size[0] % size[1];
    a.tid[2] = t / size[0] / size[1];
    for (int i = 0; i < 3; ++i) {
      a.tgp[i] = group[i];
      a.tpt[i] = size[i];
      a.tpg[i] = num_groups[i];
      a.grid[i] = L.cfg.grid[i];
      a.gid[i] = group[i] * L.cfg.tg[i] + a.tid[i];
    }
    a.lin = t;
    a.lane = t % 32;
    a.sg = t / 32;
    a.nsg = L.simdgroups.size();
    start_fiber(f);
  }
}

void run_group(std::vector<int>& ready) {
  while (!L.fatal) {
    ready.clear();
    bool unfinished = false;
    for (size_t t = 0; t < L.fibers.size(); ++t) {
      if (L.fibers[t].state == READY) ready.push_back((int)t);
      unfinished = unfinished || L.fibers[t].state != DONE;
    }
    if (!unfinished) break;
    if (ready.empty()) release();
    if (L.cfg.order == REVERSE) std::reverse(ready.begin(), ready.end());
    if (L.cfg.order == RANDOM)
      for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[next_random() % i]);
    for (int t : ready) {
      L.current = &L.fibers[t];
      if (L.current->state != READY) continue;
      msl_cur = &L.current->at;
      msl_switch(&L.scheduler_sp, L.current->sp);
      if (L.fatal) break;
    }
  }
  L.current = nullptr;
}

extern "C" {
void msl_barrier(int scope, int flags, const char* file, int line) {
  Fiber& f = *L.current;
  f.state = scope ? AT_THREADGROUP_BARRIER : AT_SIMDGROUP_BARRIER;
  f.wait_file = file;
  f.wait_line = line;
  f.wait_flags = flags;
  yield_fiber();
}

void* msl_simd(const void* in, int size, int, Combine combine, int arg, const char* file, int line) {
  Fiber& f = *L.current;
  Simdgroup& g = L.simdgroups[f.simdgroup];
  if (size > 128) {
    say("ERROR SIMD operand too large#");
    die();
  }
  memcpy(f.operand, in, size);
  g.combine = combine;
  g.size = size;
  g.arg = arg;
  f.state = AT_SIMD_OP;
  f.wait_file = file;
  f.wait_line = line;
  f.wait_flags = 0;
  if (++g.arrived == g.num_lanes) {  // fast path: the whole simdgroup is here
    bool same = true;
    for (int l = 0; l < g.num_lanes; ++l) {
      Fiber& other = L.fibers[f.simdgroup * 32 + l];
      same = same && other.state == AT_SIMD_OP && other.wait_line == line && other.wait_file == file;
    }
    if (same) {
      finish_simd(f.simdgroup, g.num_lanes == 32 ? ~0u : (1u << g.num_lanes) - 1);
      return f.result;
    }
  }
  yield_fiber();
  return f.result;
}

uint msl_lane() { return L.current->at.lane; }

void msl_atomic_note(const volatile void* p, int size, int write) {
  access((const void*)p, size, write, true, __builtin_return_address(0));
}
}

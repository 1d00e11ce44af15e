#undef _FORTIFY_SOURCE  // its longjmp does not know of fibers
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/sm80/ptx.h"
#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

DeviceModel device = kAmpere;

namespace {

constexpr size_t kStackBytes = 128 * 1024, kExchangeBytes = 32;

struct Thread;

struct Barrier {
  int members = 0, arrived = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
};

// A phase ends when its bytes have been announced and have come.
struct ByteBarrier {
  Barrier barrier;
  bool announced = false;
  int64_t missing = 0;
};

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;   // that are copied; the others of
  int filled;  // these become zero
};

struct Warp {
  Barrier barrier;
  unsigned rank = 0;
  alignas(16) unsigned char values[2][kWarpSize][kExchangeBytes];
  unsigned exchange[2][kWarpSize] = {};  // to which they belong, from 1 on
};

struct Block {
  dim3 index;
  int rank = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

struct Thread {
  dim3 index;
  int lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned exchanges = 0, cluster_phase = 0;
  const void* received[kWarpSize];
  std::deque<std::vector<Copy>> copies{{}};  // groups under way; the last is still open
  bool started = false, finished = false;
  ucontext_t start;
  jmp_buf context;
};

// The cluster that runs.
struct Machine {
  std::vector<Block> blocks;
  Barrier cluster;
  std::map<const void*, ByteBarrier> byte_barriers;
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept for the next cluster
  std::vector<Thread*> ready;
  Thread* running = nullptr;
  jmp_buf scheduler;
  std::mt19937 random{1};
};
Machine machine;

void release(Barrier& b) {
  b.arrived = 0;
  ++b.phase;
  machine.ready.insert(machine.ready.end(), b.waiting.begin(), b.waiting.end());
  b.waiting.clear();
}

unsigned arrive(Barrier& b) {
  const unsigned phase = b.phase;
  if (++b.arrived == b.members) release(b);
  return phase;
}

void wait(Barrier& b, unsigned phase) {
  if (b.phase != phase) return;
  Thread* self = machine.running;
  b.waiting.push_back(self);
  if (!_setjmp(self->context)) _longjmp(machine.scheduler, 1);
}

// Whoever leaves is waited for no longer.
void leave(Barrier& b) {
  if (--b.members > 0 && b.arrived == b.members) release(b);
}

void thread_main() {
  (*machine.kernel)();
  Thread& self = *machine.running;
  self.finished = true;
  leave(self.warp->barrier);
  leave(self.block->barrier);
  leave(machine.cluster);
  _longjmp(machine.scheduler, 1);
}

__attribute__((noinline)) void resume(Thread* t) {
  machine.running = t;
  threadIdx = t->index;
  blockIdx = t->block->index;
  if (_setjmp(machine.scheduler)) return;
  if (t->started) _longjmp(t->context, 1);
  t->started = true;
  setcontext(&t->start);
}

void complete(const Copy& c) {
  if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
  std::memset(c.to + c.bytes, 0, c.filled - c.bytes);
}

void prepare(Thread& t, unsigned char* stack) {
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = stack;
  t.start.uc_stack.ss_size = kStackBytes;
  makecontext(&t.start, thread_main, 0);
}

void run_cluster(size_t shared_bytes) {
  Machine& m = machine;
  const int size = int(blockDim.x), warps = (size + kWarpSize - 1) / kWarpSize;
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  m.threads.clear();
  m.ready.clear();
  m.cluster = {};
  m.byte_barriers.clear();
  m.cluster.members = int(m.blocks.size()) * size;
  for (Block& b : m.blocks) {
    memory.emplace_back(new unsigned char[shared_bytes + 1024]);
    std::memset(memory.back().get(), 0xff, shared_bytes + 1024);
    b.shared =
        reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.back().get()) + 1023) & ~uintptr_t(1023));
    b.barrier = {};
    b.barrier.members = size;
    b.warps.assign(warps, Warp{});
    for (Warp& w : b.warps) w.rank = unsigned(m.random());
    for (int i = 0; i < size; ++i) {
      m.threads.emplace_back(new Thread);
      Thread& t = *m.threads.back();
      t.index.x = unsigned(i);
      t.lane = i % kWarpSize;
      t.block = &b;
      t.warp = &b.warps[i / kWarpSize];
      ++t.warp->barrier.members;
      const size_t n = m.threads.size();
      if (m.stacks.size() < n) m.stacks.emplace_back(new unsigned char[kStackBytes]);
      prepare(t, m.stacks[n - 1].get());
      m.ready.push_back(&t);
    }
  }
  // Chance alone decides who goes on, or the higher rank of some, so that warps fall behind.
  const int candidates = m.random() % 2 ? 1 : 12;
  while (!m.ready.empty()) {
    size_t best = m.random() % m.ready.size();
    for (int i = 1; i < candidates; ++i) {
      const size_t other = m.random() % m.ready.size();
      if (m.ready[other]->warp->rank > m.ready[best]->warp->rank) best = other;
    }
    std::swap(m.ready[best], m.ready.back());
    Thread* next = m.ready.back();
    m.ready.pop_back();
    resume(next);
  }
  for (const auto& t : m.threads)
    if (!t->finished) {
      std::fprintf(stderr, "deadlock: block %u, thread %u waits at a barrier that never completes\n", t->block->index.x,
                   t->index.x);
      std::abort();
    }
}

}  // namespace

int lane() { return machine.running->lane; }
unsigned char* dynamic_shared(int rank) { return machine.blocks[rank].shared; }
int cluster_rank() { return machine.running->block->rank; }
int cluster_size() { return int(machine.blocks.size()); }

void sync_warp() {
  Barrier& b = machine.running->warp->barrier;
  wait(b, arrive(b));
}
void sync_block() {
  Barrier& b = machine.running->block->barrier;
  wait(b, arrive(b));
}
void arrive_cluster() { machine.running->cluster_phase = arrive(machine.cluster); }
void wait_cluster() { wait(machine.cluster, machine.running->cluster_phase); }

void settle(ByteBarrier& b) {
  if (!b.announced || b.missing != 0) return;
  b.announced = false;
  release(b.barrier);
}
void expect_bytes(const void* barrier, int bytes) {
  ByteBarrier& b = machine.byte_barriers[barrier];
  if (b.announced) std::abort();
  b.announced = true;
  b.missing += bytes;
  settle(b);
}
void receive_bytes(const void* barrier, int bytes) {
  ByteBarrier& b = machine.byte_barriers[barrier];
  b.missing -= bytes;
  settle(b);
}
void wait_for_bytes(const void* barrier, unsigned parity) {
  Barrier& b = machine.byte_barriers[barrier].barrier;
  if (b.phase % 2 == parity) wait(b, b.phase);
}

const void* const* exchange(const void* mine, size_t bytes) {
  Thread& self = *machine.running;
  Warp& w = *self.warp;
  const unsigned number = ++self.exchanges, turn = number % 2;  // nobody is two exchanges ahead
  if (bytes > kExchangeBytes) std::abort();
  std::memcpy(w.values[turn][self.lane], mine, bytes);
  w.exchange[turn][self.lane] = number;
  sync_warp();
  for (int l = 0; l < kWarpSize; ++l) self.received[l] = w.exchange[turn][l] == number ? w.values[turn][l] : nullptr;
  return self.received;
}

void run_grid(dim3 grid, dim3 block, int cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.y != 1 || block.z != 1) std::abort();
  gridDim = grid;
  blockDim = block;
  machine.kernel = &kernel;
  std::vector<unsigned> order(size_t(grid.x) / cluster * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
  for (unsigned n : order) {
    machine.blocks.assign(cluster, Block{});
    const unsigned clusters = grid.x / cluster;
    for (int r = 0; r < cluster; ++r) {
      machine.blocks[r].rank = r;
      machine.blocks[r].index = {n % clusters * cluster + r, n / clusters % grid.y, n / clusters / grid.y};
    }
    run_cluster(shared_bytes);
  }
}

}  // namespace simt

namespace flux::cuda::sm80 {

// A copy may arrive at once, or not before it is waited for.
void start(const simt::Copy& copy) {
  if (simt::machine.random() % 2)
    simt::complete(copy);
  else
    simt::machine.running->copies.back().push_back(copy);
}
void cp_async16(uint32_t shared, const void* global, int bytes) { start({shared_pointer(shared), global, bytes, 16}); }
void cp_async4(uint32_t shared, const void* global) { start({shared_pointer(shared), global, 4, 4}); }
void cp_async_commit() { simt::machine.running->copies.emplace_back(); }
void cp_async_wait_for(int pending) {
  auto& copies = simt::machine.running->copies;
  for (; int(copies.size()) > pending + 1; copies.pop_front())
    for (const simt::Copy& c : copies.front()) simt::complete(c);
}

}  // namespace flux::cuda::sm80

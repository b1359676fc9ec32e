// The engine of the emulator: fibres, the scheduler, the rules of the collectives, and what the sanitizers are told.
// Always compile this file without sanitizers, then link it with kernels compiled with or without them.
#undef _FORTIFY_SOURCE  // its longjmp refuses to jump to another stack
#include "cuda_emulator.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

// There when a sanitizer is linked in, null otherwise.
#define WEAK __attribute__((weak))
extern "C" {
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* token);
WEAK void __tsan_release(void* token);
WEAK void __asan_init();
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {

Observer* observer = nullptr;
const std::vector<unsigned>* chosen = nullptr;

namespace internal {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 64 << 10;  // a multiple of every page size
// The thread sanitizer knows about 250 fibres well.
constexpr size_t kMaxTsanFibers = 250;
constexpr unsigned kNoOrder = 1;  // flag of __tsan_switch_to_fiber: the switch orders no memory

const bool tsan = __tsan_create_fiber != nullptr;
const bool asan = __asan_init != nullptr && __sanitizer_start_switch_fiber != nullptr;

struct Context {
  ucontext_t start;  // entry of the fibre; under the address sanitizer the place of every switch
  jmp_buf place;     // of later switches: swapcontext takes two system calls
  bool started = false;
  void* tsan_fiber = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};

enum class State { kReady, kAtBarrier, kAtWarpOp, kDone };
const char* const kOpNames[] = {"__syncwarp",  "__ballot_sync",   "__any_sync",       "__all_sync",
                                "__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};

struct PendingCopy {
  Copy copy;
  int group;
};

struct Block;
struct Thread {
  Block* block = nullptr;
  unsigned index = 0;
  uint3 thread_idx{};
  Context context;
  State state = State::kReady;
  Site site;  // of the collective it waits in, and the rest of it
  WarpOp op{};
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;
  Scope fence = Scope::kNone;       // since the last barrier
  std::set<const void*> observed;   // atomics since the last fence, for the thread sanitizer
  std::vector<PendingCopy> copies;  // oldest first; no deque: it frees in a fibre what the scheduler allocated
  int groups = 0;                   // committed
};

struct WarpState {
  unsigned waiting = 0, alive = 0;  // lanes
  uint64_t tokens[32];              // their addresses name clocks of the thread sanitizer; one per lowest lane
};

struct SharedMemory {
  unsigned char* data;
  size_t bytes;
};

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<WarpState> warps;
  SharedMemory dynamic{};
  std::map<const void*, SharedMemory> statics;
  unsigned at_barrier = 0, done = 0;
  uint64_t barrier_token = 0;
};

struct LaunchState {
  const std::function<void()>* body;
  size_t shared_bytes;
  std::vector<std::unique_ptr<Block>> live, finished;
  std::deque<void*> finished_fibers;  // of the thread sanitizer, oldest first
  std::vector<SharedMemory> pages;
  size_t page_bytes_left = 0;
  uint64_t start_token = 0, end_token = 0;
};

enum class Order { kForward, kReverse, kRandom } order;
std::mt19937 generator;
std::mutex launch_mutex;
std::map<const void*, size_t> allowed_shared;
std::vector<char*> free_stacks;
std::deque<void*> idle_fibers;  // of the thread sanitizer; making one takes it half a millisecond
LaunchState* launch;
Thread* current;
Context scheduler;

// ---- Errors

void Describe(const Thread& t, const char* op, Site site) {
  const uint3 b = t.block->index;
  fprintf(stderr, "block (%u,%u,%u) thread %u (%u,%u,%u): %s:%d: %s: ", b.x, b.y, b.z, t.index, t.thread_idx.x,
          t.thread_idx.y, t.thread_idx.z, site.file, site.line, op);
}

[[noreturn]] void Exit() {
  fputc('\n', stderr);
  fflush(nullptr);
  _exit(66);
}

[[noreturn]] __attribute__((format(printf, 4, 5))) void Fail(const Thread& t, const char* op, Site site,
                                                             const char* format, ...) {
  fprintf(stderr, "cuda_emulator: ERROR: ");
  Describe(t, op, site);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  Exit();
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void FailLaunch(const char* format, ...) {
  fprintf(stderr, "cuda_emulator: ERROR: launch: ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  Exit();
}

const char* OpName(const Thread& t) {
  return t.state == State::kAtBarrier ? "__syncthreads" : kOpNames[static_cast<int>(t.op)];
}

[[noreturn]] void FailDeadlock() {
  std::map<std::tuple<std::string, int, unsigned>, int> seen;  // places and masks: one line each
  for (const auto& block : launch->live) {
    for (const Thread& t : block->threads) {
      if (t.state == State::kDone || seen[{t.site.file, t.site.line, t.mask}]++ > 0) continue;
      fprintf(stderr, seen.size() == 1 ? "cuda_emulator: ERROR: " : "\n  ");
      Describe(t, OpName(t), t.site);
      fprintf(stderr, "%swaits", seen.size() == 1 ? "deadlock: " : "");
      if (t.state == State::kAtWarpOp) fprintf(stderr, " for mask 0x%08x", t.mask);
    }
  }
  Exit();
}

bool SamePlace(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// ---- Memory

// Shared memory, filled with NaN. A heap block each, so that the address sanitizer has red zones around it. The thread
// sanitizer takes malloc and memset for accesses by the calling thread; it gets pages that it has not heard of.
SharedMemory NewShared(size_t bytes) {
  unsigned char* data;
  if (!tsan) {
    data = static_cast<unsigned char*>(memset(malloc(bytes), 0xff, bytes));
  } else {
    const size_t rounded = (bytes / 64 + 1) * 64;
    if (launch->page_bytes_left < rounded) {
      launch->page_bytes_left = 1 << 20;
      void* const pages = reinterpret_cast<void*>(syscall(SYS_mmap, nullptr, launch->page_bytes_left,
                                                          PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (pages == MAP_FAILED) FailLaunch("no memory");
      launch->pages.push_back({static_cast<unsigned char*>(pages), launch->page_bytes_left});
    }
    const SharedMemory& page = launch->pages.back();
    data = page.data + page.bytes - launch->page_bytes_left;
    launch->page_bytes_left -= rounded;
    for (size_t i = 0; i < rounded; ++i) static_cast<volatile unsigned char*>(data)[i] = 0xff;  // not memset
  }
  return {data, bytes};
}

bool IsShared(const Block& block, const void* address) {
  const auto contains = [=](const SharedMemory& s) { return address >= s.data && address < s.data + s.bytes; };
  return contains(block.dynamic) || std::any_of(block.statics.begin(), block.statics.end(),
                                                [&](const auto& entry) { return contains(entry.second); });
}

char* NewStack() {
  const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (free_stacks.empty()) {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, protection, flags, -1, 0);
    if (memory == MAP_FAILED) FailLaunch("no memory for stacks");
    mprotect(memory, kGuardBytes, PROT_NONE);
    free_stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  char* const stack = free_stacks.back();
  free_stacks.pop_back();
  // Fresh pages: the thread sanitizer is to forget the accesses of the stack's last user.
  if (tsan) mmap(stack, kStackBytes, protection, flags | MAP_FIXED, -1, 0);
  return stack;
}

// ---- Fibres

void Switch(Context* from, Context* to, bool from_ends = false) {
  if (asan) {
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from->fake_stack, to->stack_bottom, to->stack_size);
    swapcontext(&from->start, &to->start);
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
  } else if (_setjmp(from->place) == 0) {  // the thread sanitizer wants setjmp before and longjmp after its switch
    if (tsan) __tsan_switch_to_fiber(to->tsan_fiber, kNoOrder);
    if (to->started) _longjmp(to->place, 1);
    to->started = true;
    setcontext(&to->start);
  }
}

void Resume(Thread* t) {
  current = t;
  threadIdx = t->thread_idx;
  blockIdx = t->block->index;
  Switch(&scheduler, &t->context);
  current = nullptr;
}

void Yield() { Switch(&current->context, &scheduler); }

void LeaveThread();

void Entry() {
  if (asan) __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
  (*launch->body)();
  LeaveThread();
  Switch(&current->context, &scheduler, true);
}

// ---- Collectives

// For the thread sanitizer: what the named threads did so far happens before all that they do from here on. `token`
// must not hold the clock of a thread that is not ordered before these already.
void OrderMemory(Block* block, unsigned begin, unsigned end, unsigned mask, void* token) {
  if (!tsan) return;
  for (void (*const step)(void*) : {__tsan_release, __tsan_acquire}) {
    for (unsigned i = begin; i < end; ++i) {
      Thread& t = block->threads[i];
      if (t.state == State::kDone || !(mask >> (i % 32) & 1)) continue;
      __tsan_switch_to_fiber(t.context.tsan_fiber, kNoOrder);
      step(token);
      t.fence = Scope::kNone;  // what others did, joined in here, has not been fenced
    }
  }
  __tsan_switch_to_fiber(current->context.tsan_fiber, kNoOrder);
}

void CheckBarrier(Block* block) {
  const unsigned size = static_cast<unsigned>(block->threads.size());
  if (block->at_barrier == 0) return;
  const Thread* first = nullptr;
  for (const Thread& t : block->threads) {
    if (t.state != State::kAtBarrier) continue;
    if (first == nullptr) first = &t;
    if (!SamePlace(first->site, t.site)) {
      Fail(*first, "__syncthreads", first->site, "thread %u waits at another barrier: %s:%d", t.index, t.site.file,
           t.site.line);
    }
  }
  if (block->done > 0) Fail(*first, "__syncthreads", first->site, "%u threads of the block returned", block->done);
  if (block->at_barrier < size) return;
  OrderMemory(block, 0, size, ~0u, &block->barrier_token);
  for (Thread& t : block->threads) t.state = State::kReady;
  block->at_barrier = 0;
}

void CheckSameOp(const Thread& a, const Thread& b) {
  if (a.mask == b.mask && a.op == b.op && (a.op != WarpOp::kSync || SamePlace(a.site, b.site))) return;
  Fail(a, OpName(a), a.site, "mask 0x%08x meets %s with mask 0x%08x of thread %u at %s:%d", a.mask, OpName(b), b.mask,
       b.index, b.site.file, b.site.line);
}

// Carries out the operation that `mask` names if all of its lanes are there. Lanes that returned do not count.
void CheckWarp(Block* block, unsigned warp_index, unsigned mask) {
  WarpState& warp = block->warps[warp_index];
  const unsigned here = warp.waiting & mask, needed = warp.alive & mask;
  Thread* const lanes = &block->threads[warp_index * 32];
  if (here == 0) return;
  Thread& first = lanes[__builtin_ctz(here)];
  if (here != needed) {
    if (current->state == State::kAtWarpOp) CheckSameOp(first, *current);
    return;
  }
  unsigned votes = 0;
  for (unsigned rest = needed; rest != 0; rest &= rest - 1) {
    const Thread& t = lanes[__builtin_ctz(rest)];
    CheckSameOp(first, t);
    if (t.value & 1) votes |= 1u << (t.index % 32);
    if (t.op >= WarpOp::kShfl && !(needed >> t.source & 1)) {
      Fail(t, OpName(t), t.site, "reads lane %u, which does not take part (mask 0x%08x)", t.source, mask);
    }
  }
  for (unsigned rest = needed; rest != 0; rest &= rest - 1) {
    Thread& t = lanes[__builtin_ctz(rest)];
    switch (t.op) {
      case WarpOp::kSync:
        break;
      case WarpOp::kBallot:
        t.result = votes;
        break;
      case WarpOp::kAny:
        t.result = votes != 0;
        break;
      case WarpOp::kAll:
        t.result = votes == needed;
        break;
      default:
        t.result = lanes[t.source].value;
    }
    t.state = State::kReady;
  }
  // Shuffles and votes order no memory. Groups that run at the same time have different lowest lanes, hence tokens.
  if (first.op == WarpOp::kSync) {
    const unsigned begin = warp_index * 32, size = static_cast<unsigned>(block->threads.size());
    OrderMemory(block, begin, std::min(begin + 32, size), needed, &warp.tokens[__builtin_ctz(needed)]);
  }
  warp.waiting &= ~needed;
}

// The lane that a shuffle reads; one outside of the lane's segment of `width` lanes leaves the value as it is.
unsigned SourceLane(WarpOp op, unsigned lane, int argument, int width) {
  const unsigned size = static_cast<unsigned>(width), begin = lane & ~(size - 1),
                 delta = static_cast<unsigned>(argument);
  unsigned source = lane;
  if (op == WarpOp::kShfl) source = begin | (delta & (size - 1));
  if (op == WarpOp::kShflXor && (lane ^ delta) < begin + size) source = lane ^ delta;
  if (op == WarpOp::kShflDown && delta < begin + size - lane) source = lane + delta;
  if (op == WarpOp::kShflUp && delta <= lane - begin) source = lane - delta;
  return source;
}

void LeaveThread() {
  Thread& t = *current;
  if (tsan) __tsan_release(&launch->end_token);
  t.state = State::kDone;
  t.block->done++;
  WarpState& warp = t.block->warps[t.index / 32];
  warp.alive &= ~(1u << (t.index % 32));
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (warp.waiting >> lane & 1) CheckWarp(t.block, t.index / 32, t.block->threads[t.index / 32 * 32 + lane].mask);
  }
  CheckBarrier(t.block);
}

// ---- Scheduler

uint3 Unravel(unsigned index, dim3 shape) {
  return {index % shape.x, index / shape.x % shape.y, index / shape.x / shape.y};
}

void NewContext(Context* context) {
  context->stack_bottom = NewStack();
  context->stack_size = kStackBytes;
  getcontext(&context->start);
  context->start.uc_stack.ss_sp = const_cast<void*>(context->stack_bottom);
  context->start.uc_stack.ss_size = kStackBytes;
  makecontext(&context->start, Entry, 0);
  context->start.uc_stack.ss_size = 0;  // or the address sanitizer forgets a stack's red zones at every switch
}

// A fibre that is ordered after the start of the launch, and not with other fibres of it. `alive` are in use. When
// there are as many as the thread sanitizer knows well, the one that ended first goes on as another thread: what it did
// before is still compared with what all others do.
void* NewTsanFiber(unsigned block, unsigned thread, size_t alive) {
  void* fiber;
  std::deque<void*>* const ended = idle_fibers.empty() ? &launch->finished_fibers : &idle_fibers;
  if (ended->empty() || (ended != &idle_fibers && ended->size() + alive < kMaxTsanFibers)) {
    fiber = __tsan_create_fiber(0);
  } else {
    fiber = ended->front();
    ended->pop_front();
    __tsan_release(&launch->start_token);  // what the scheduler has done for it
    __tsan_switch_to_fiber(fiber, kNoOrder);
    __tsan_acquire(&launch->start_token);
    __tsan_switch_to_fiber(scheduler.tsan_fiber, kNoOrder);
  }
  const std::string name = "block " + std::to_string(block) + " thread " + std::to_string(thread);
  __tsan_set_fiber_name(fiber, name.c_str());
  return fiber;
}

std::unique_ptr<Block> NewBlock(unsigned number, unsigned size) {
  auto block = std::make_unique<Block>();
  block->index = Unravel(number, gridDim);
  block->threads = std::vector<Thread>(size);
  block->warps.resize((size + 31) / 32);
  block->dynamic = NewShared(launch->shared_bytes);
  for (unsigned i = 0; i < size; ++i) {
    Thread& t = block->threads[i];
    t.block = block.get();
    t.index = i;
    t.thread_idx = Unravel(i, blockDim);
    block->warps[i / 32].alive |= 1u << (i % 32);
    NewContext(&t.context);
    if (tsan) t.context.tsan_fiber = NewTsanFiber(number, i, launch->live.size() * size + i);
  }
  return block;
}

// Gives every thread that is ready a turn; in random order some of them. False when there was none.
bool RunThreads() {
  std::vector<Thread*> ready;
  for (const auto& block : launch->live) {
    for (Thread& t : block->threads) {
      if (t.state == State::kReady) ready.push_back(&t);
    }
  }
  if (ready.empty()) return false;
  if (order == Order::kReverse) std::reverse(ready.begin(), ready.end());
  if (order == Order::kRandom) {
    std::shuffle(ready.begin(), ready.end(), generator);
    ready.resize(1 + generator() % ready.size());
  }
  for (Thread* t : ready) Resume(t);
  return true;
}

long Environment(const char* name, long otherwise) {
  const char* const value = getenv(name);
  return value ? atol(value) : otherwise;
}

}  // namespace

void AllowShared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  allowed_shared[kernel] = bytes;
}

void Run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  if (observer) return observer->Launch(kernel, grid, block, shared_bytes);
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || blocks > 0x7fffffff) FailLaunch("grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  if (threads == 0 || threads > 1024) FailLaunch("block of %u x %u x %u threads", block.x, block.y, block.z);
  if (shared_bytes > kMaxSharedBytes) FailLaunch("%zu bytes of shared memory", shared_bytes);
  if (shared_bytes > kDefaultSharedBytes && shared_bytes > allowed_shared[kernel]) {
    FailLaunch("%zu bytes of shared memory without cudaFuncSetAttribute", shared_bytes);
  }

  const char* const name = getenv("CUDA_EMULATOR_ORDER");
  const std::string order_name = name ? name : "forward";
  order = order_name == "random" ? Order::kRandom : order_name == "reverse" ? Order::kReverse : Order::kForward;
  if (order == Order::kForward && order_name != "forward") FailLaunch("CUDA_EMULATOR_ORDER=%s", name);
  generator.seed(static_cast<unsigned>(Environment("CUDA_EMULATOR_SEED", 1)));
  size_t resident = order == Order::kRandom ? std::max(1L, Environment("CUDA_EMULATOR_RESIDENT", 4)) : 1;
  if (tsan) resident = std::max<size_t>(1, std::min<size_t>(resident, kMaxTsanFibers / threads));
  std::vector<unsigned> numbers(chosen ? 0 : blocks);
  for (unsigned i = 0; i < numbers.size(); ++i) numbers[i] = i;
  if (chosen) numbers = *chosen;
  if (std::any_of(numbers.begin(), numbers.end(), [=](unsigned i) { return i >= blocks; })) FailLaunch("no such block");
  if (order == Order::kReverse) std::reverse(numbers.begin(), numbers.end());
  if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), generator);

  LaunchState state{};
  state.body = &body;
  state.shared_bytes = shared_bytes;
  launch = &state;
  gridDim = grid;
  blockDim = block;
  if (tsan) {
    scheduler.tsan_fiber = __tsan_get_current_fiber();
    __tsan_release(&state.start_token);
  }
  scheduler.started = true;
  for (size_t next = 0; next < numbers.size() || !state.live.empty();) {
    while (next < numbers.size() && state.live.size() < resident) {
      state.live.push_back(NewBlock(numbers[next++], static_cast<unsigned>(threads)));
    }
    if (!RunThreads()) FailDeadlock();
    for (size_t i = 0; i < state.live.size();) {
      if (state.live[i]->done < threads) {
        ++i;
        continue;
      }
      for (const Thread& t : state.live[i]->threads) {
        free_stacks.push_back(static_cast<char*>(const_cast<void*>(t.context.stack_bottom)));
        if (tsan) state.finished_fibers.push_back(t.context.tsan_fiber);
      }
      // The thread sanitizer takes free for an access: it has to wait for the end.
      if (tsan) state.finished.push_back(std::move(state.live[i]));
      if (!tsan) {
        free(state.live[i]->dynamic.data);
        for (const auto& entry : state.live[i]->statics) free(entry.second.data);
      }
      state.live.erase(state.live.begin() + i);
    }
  }
  if (tsan) __tsan_acquire(&state.end_token);
  // All of them are ordered before the next launch now.
  idle_fibers.insert(idle_fibers.end(), state.finished_fibers.begin(), state.finished_fibers.end());
  for (const SharedMemory& page : state.pages) syscall(SYS_munmap, page.data, page.bytes);
  launch = nullptr;
}

// ---- What kernels call

void Barrier(Site site) {
  Thread& t = *current;
  t.site = site;
  t.mask = 0;
  t.state = State::kAtBarrier;
  t.block->at_barrier++;
  CheckBarrier(t.block);
  Yield();
}

uint64_t Warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site) {
  Thread& t = *current;
  const unsigned lane = t.index % 32;
  const char* const name = kOpNames[static_cast<int>(op)];
  if (!(mask >> lane & 1)) Fail(t, name, site, "lane %u is not in its own mask 0x%08x", lane, mask);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) Fail(t, name, site, "width %d", width);
  t.site = site;
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.source = SourceLane(op, lane, argument, width);
  t.state = State::kAtWarpOp;
  t.block->warps[t.index / 32].waiting |= 1u << lane;
  CheckWarp(t.block, t.index / 32, mask);
  Yield();
  return t.result;
}

unsigned ActiveMask() { return current->block->warps[current->index / 32].alive; }

void YieldInRandomOrder() {
  if (order == Order::kRandom) Yield();
}

// In CUDA an atomic followed by a fence acquires, and a fence followed by an atomic releases.
void Fence(Scope scope) {
  Thread& t = *current;
  if (tsan) {
    for (auto i = t.observed.begin(); i != t.observed.end();) {
      const bool ordered = scope == Scope::kDevice || IsShared(*t.block, *i);
      if (ordered) __tsan_acquire(const_cast<void*>(*i));
      i = ordered ? t.observed.erase(i) : std::next(i);
    }
  }
  t.fence = std::max(t.fence, scope);
  YieldInRandomOrder();
}

void BeforeAtomic() { YieldInRandomOrder(); }

void AfterAtomic(const void* address) {
  if (!tsan) return;
  Thread& t = *current;
  t.observed.insert(address);
  if (t.fence == Scope::kDevice || (t.fence == Scope::kBlock && IsShared(*t.block, address))) {
    __tsan_release(const_cast<void*>(address));
  }
}

void* StaticShared(const void* key, size_t bytes) {
  std::map<const void*, SharedMemory>& statics = current->block->statics;
  const auto found = statics.find(key);
  return (found != statics.end() ? found : statics.emplace(key, NewShared(bytes)).first)->second.data;
}

void QueueCopy(void* to, const void* from, int bytes, Site site) {
  Thread& t = *current;
  const char* const name = "CopyAsync";
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0)
    Fail(t, name, site, "destination %p is not aligned to %d bytes", to, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0)
    Fail(t, name, site, "source %p is not aligned to %d bytes", from, bytes);
  if (!IsShared(*t.block, to)) Fail(t, name, site, "destination %p is not in the block's shared memory", to);
  t.copies.push_back({{to, from, bytes}, t.groups});
}

void CommitCopies() { current->groups++; }

bool NextCopy(int groups_to_keep, Copy* copy) {
  Thread& t = *current;
  if (t.copies.empty()) return false;
  if (groups_to_keep != kAll && t.copies.front().group >= t.groups - groups_to_keep) return false;
  *copy = t.copies.front().copy;
  t.copies.erase(t.copies.begin());
  return true;
}

}  // namespace internal

void* DynamicShared() { return internal::current->block->dynamic.data; }

}  // namespace cuda_emulator

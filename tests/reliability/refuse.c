// Refuses memory and threads to some libraries of a process, one request after the other, and counts the blocks of
// memory that they hold. For LD_PRELOAD; test_faults.py compiles it and steers it by ctypes.
//
// A request belongs to the library that made it, though it be made through the C or C++ runtime, as by std::string or
// std::thread. What Python, NumPy or TensorFlow ask for is granted, so that each failure is one that our code must
// bear.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unwind.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

// --- whose request it is ----------------------------------------------------------------------------------

struct Range {
  uintptr_t begin, end;
};
enum { kMostRanges = 32 };
struct Ranges {
  struct Range all[kMostRanges];
  int count;
};
static struct Ranges ours, runtimes;
static const char* folder;  // the libraries in it are ours

static int Holds(const struct Ranges* ranges, uintptr_t at) {
  for (int i = 0; i < ranges->count; ++i) {
    if (at >= ranges->all[i].begin && at < ranges->all[i].end) return 1;
  }
  return 0;
}

static int Sort(struct dl_phdr_info* library, size_t size, void* unused) {
  (void)size, (void)unused;
  static const char* const kRuntimes[] = {"/libstdc++.so", "/libgcc_s.so", "/libc.so", "/refuse.so"};
  struct Ranges* to = strncmp(library->dlpi_name, folder, strlen(folder)) == 0 ? &ours : NULL;
  for (size_t i = 0; i < sizeof(kRuntimes) / sizeof(*kRuntimes); ++i) {
    if (strstr(library->dlpi_name, kRuntimes[i])) to = &runtimes;
  }
  for (int i = 0; to && i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr)* part = &library->dlpi_phdr[i];
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    if (to->count == kMostRanges) abort();
    const uintptr_t begin = library->dlpi_addr + part->p_vaddr;
    to->all[to->count++] = (struct Range){begin, begin + part->p_memsz};
  }
  return 0;
}

static _Unwind_Reason_Code Look(struct _Unwind_Context* frame, void* is_ours) {
  const uintptr_t at = _Unwind_GetIP(frame);
  if (Holds(&runtimes, at)) return _URC_NO_REASON;
  *(int*)is_ours = Holds(&ours, at);
  return _URC_END_OF_STACK;
}

static _Unwind_Reason_Code LookFurther(struct _Unwind_Context* frame, void* is_ours) {
  *(int*)is_ours = Holds(&ours, _Unwind_GetIP(frame));
  return *(int*)is_ours ? _URC_END_OF_STACK : _URC_NO_REASON;
}

static __thread int looking __attribute__((tls_model("initial-exec")));

static int Search(_Unwind_Trace_Fn look) {
  int is_ours = 0;
  looking = 1;
  _Unwind_Backtrace(look, &is_ours);
  looking = 0;
  return is_ours;
}

static int IsOurs(void* caller) {
  if (ours.count == 0 || looking) return 0;
  if (Holds(&ours, (uintptr_t)caller)) return 1;
  return Holds(&runtimes, (uintptr_t)caller) && Search(Look);
}

// Whether a function of ours has called, through whichever others.
static int IsWithinOurs(void) { return ours.count > 0 && !looking && Search(LookFurther); }

// --- the blocks that we hold ------------------------------------------------------------------------------

enum { kSlots = 1 << 16 };
static _Atomic uintptr_t held[kSlots];  // a hash table; 0: an empty slot
static long live;
static atomic_flag busy = ATOMIC_FLAG_INIT;

static void Lock(void) {
  while (atomic_flag_test_and_set(&busy)) {
  }
}
static void Unlock(void) { atomic_flag_clear(&busy); }
static size_t SlotOf(uintptr_t block) { return (block >> 4) * 0x9E3779B97F4A7C15u >> 48; }

static void Hold(void* block) {
  if (!block) return;
  Lock();
  if (++live == kSlots) abort();
  size_t slot = SlotOf((uintptr_t)block);
  while (held[slot]) slot = (slot + 1) % kSlots;
  held[slot] = (uintptr_t)block;
  Unlock();
}

static void LetGo(void* block) {
  size_t slot = SlotOf((uintptr_t)block);
  if (!held[slot]) return;  // so it is not there
  Lock();
  while (held[slot] && held[slot] != (uintptr_t)block) slot = (slot + 1) % kSlots;
  if (held[slot]) {
    --live;
    // Those behind it move up, as long as each stays at its own slot or behind that.
    for (size_t next = (slot + 1) % kSlots; held[next]; next = (next + 1) % kSlots) {
      if ((next - SlotOf(held[next])) % kSlots < (next - slot) % kSlots) continue;
      held[slot] = held[next];
      slot = next;
    }
    held[slot] = 0;
  }
  Unlock();
}

// --- what is refused --------------------------------------------------------------------------------------

static atomic_long requests, refused;
static atomic_long first;          // the number of the request that is refused, or 0
static atomic_int all_after;       // whether those after it are refused too
static atomic_int aligned_within;  // whether aligned memory is refused to what we call too: TensorFlow's allocator

static int Refuse(void) {
  const long wanted = first;
  if (!wanted) return 0;
  const long number = ++requests;
  if (number != wanted && !(all_after && number > wanted)) return 0;
  ++refused;
  return 1;
}

static void* Grant(void* block, int is_ours) {
  if (is_ours) Hold(block);
  return block;
}

static void* Refusal(void) {
  errno = ENOMEM;
  return NULL;
}

// --- the functions that a program calls -------------------------------------------------------------------

#define CALLER __builtin_return_address(0)

void* malloc(size_t bytes) {
  const int is_ours = IsOurs(CALLER);
  return is_ours && Refuse() ? Refusal() : Grant(__libc_malloc(bytes), is_ours);
}
void* calloc(size_t count, size_t bytes) {
  const int is_ours = IsOurs(CALLER);
  return is_ours && Refuse() ? Refusal() : Grant(__libc_calloc(count, bytes), is_ours);
}
void* realloc(void* block, size_t bytes) {
  const int is_ours = IsOurs(CALLER);
  if (is_ours && Refuse()) return Refusal();
  if (block) LetGo(block);
  return Grant(__libc_realloc(block, bytes), is_ours);
}
static void* Aligned(size_t alignment, size_t bytes, void* caller) {
  const int is_ours = IsOurs(caller);
  return (is_ours || (aligned_within && first && IsWithinOurs())) && Refuse()
             ? Refusal()
             : Grant(__libc_memalign(alignment, bytes), is_ours);
}
void* memalign(size_t alignment, size_t bytes) { return Aligned(alignment, bytes, CALLER); }
void* aligned_alloc(size_t alignment, size_t bytes) { return Aligned(alignment, bytes, CALLER); }
int posix_memalign(void** block, size_t alignment, size_t bytes) {
  void* const found = Aligned(alignment, bytes, CALLER);
  if (!found) return ENOMEM;
  *block = found;
  return 0;
}
void free(void* block) {
  if (!block) return;
  LetGo(block);
  __libc_free(block);
}
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
  static int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  if (!real) *(void**)&real = dlsym(RTLD_NEXT, "pthread_create");
  return IsOurs(CALLER) && Refuse() ? EAGAIN : real(thread, attributes, run, argument);
}

// --- how a test steers it ---------------------------------------------------------------------------------

// Libraries in this folder are ours, of those that are loaded. Returns their number of executable segments.
int refuse_watch(const char* path) {
  folder = path;
  ours.count = runtimes.count = 0;
  dl_iterate_phdr(Sort, NULL);
  return ours.count;
}
void refuse_from(long number, int and_all_after, int aligned_memory_within) {
  requests = refused = 0;
  all_after = and_all_after;
  aligned_within = aligned_memory_within;
  first = number;
}
long refuse_end(void) {
  first = 0;
  return refused;
}
long refuse_live(void) { return live; }

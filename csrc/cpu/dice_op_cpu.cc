// Cuts a call into fixed blocks, runs them on the caller's threads, and adds the blocks' sums in order. So the bits of
// the result depend neither on the number of threads nor on their timing.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(DICE_OP_X86_LEVELS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "core/dice_op.h"
#include "core/dtype.h"
#include "core/problem.h"
#include "cpu/kernels.h"

namespace dice_op {
namespace cpu {
namespace {

// A block has about 64 K logits. That is enough to make its overhead negligible, and few enough to share out evenly.
constexpr int64_t kBlockElements = 1 << 16;
constexpr int64_t kBlockVoxelsMin = 64;

struct Blocks {
  int64_t voxels;      // per block
  int64_t per_sample;  // blocks
  int64_t count;       // in all

  explicit Blocks(const Problem& problem)
      : voxels(std::max(kBlockVoxelsMin,
                        kBlockElements / std::max<int64_t>(1, problem.classes) / kBlockVoxelsMin * kBlockVoxelsMin)),
        per_sample((problem.voxels + voxels - 1) / voxels),
        count(problem.batch * per_sample) {}

  // Calls fn(block, sample, begin, end) for blocks [first, last).
  template <class Fn>
  void ForEach(const Problem& problem, int64_t first, int64_t last, Fn&& fn) const {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block % per_sample * voxels;
      fn(block, block / per_sample, begin, std::min(begin + voxels, problem.voxels));
    }
  }
  // The nanoseconds per block, for the thread pool. A logit with its exponential takes about one.
  int64_t Cost(const Problem& problem) const { return voxels * (problem.classes + 1); }
};

#if defined(DICE_OP_X86_LEVELS)
// GCC before 11 and Clang 14 know no __builtin_cpu_supports("f16c").
bool HasF16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Whether the processor has every instruction set that the compiler was allowed to use. CMakeLists.txt lists them too,
// and a test checks that the two lists agree.
bool Supported(const Kernels& kernels) {
#if defined(DICE_OP_X86_LEVELS)
  if (&kernels == &kX86V3) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && HasF16c() &&
           __builtin_cpu_supports("fma");
  }
  if (&kernels == &kX86V4) {
    return Supported(kX86V3) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return &kernels == &kPortable;
}

// The levels, with the best first.
const Kernels* const kLevels[] = {
#if defined(DICE_OP_X86_LEVELS)
    &kX86V4, &kX86V3,
#endif
    &kPortable};

const Kernels& Active() {
  static const Kernels* const active = [] {
    const char* wanted = std::getenv("DICE_OP_SIMD");
    const Kernels* best = nullptr;
    for (const Kernels* level : kLevels) {
      if (!Supported(*level)) continue;
      if (!best) best = level;
      if (wanted && std::strcmp(wanted, level->level) == 0) return level;
    }
    return best;  // an unknown or unsupported level is ignored; SimdLevel() tells which one runs
  }();
  return *active;
}

// The kernels for a problem.
const Kernels& KernelsFor([[maybe_unused]] const Problem& problem) {
#if defined(DICE_OP_X86_LEVELS)
  if (&Active() == &kX86V4 && problem.in_double()) return kX86V3;  // v4 has none for double
#endif
  return Active();
}

// Adds the blocks' sums in order and writes them in the type R.
template <class R>
void Combine(const Problem& problem, const Blocks& blocks, const double* partials, const Sums& sums) {
  const int64_t classes = problem.classes, row = RowLength(classes);
  for (int64_t n = 0; n < problem.batch; ++n) {
    const double* const first = partials + n * blocks.per_sample * row;
    int64_t place = 0;  // the index in a row
    for (const SumInfo& info : kSums) {
      const int64_t count = info.per_class ? classes : 1;
      R* const output = static_cast<R*>(sums[info.sum]);
      for (int64_t c = 0; output && c < count; ++c) {
        double total = 0;
        for (int64_t block = 0; block < blocks.per_sample; ++block) total += first[block * row + place + c];
        output[n * count + c] = static_cast<R>(total);
      }
      place += count;
    }
  }
}

// The system gives new pages to a large array each time, and the first write to each page costs more than all of the
// arithmetic. With huge pages there are fewer of them, but many systems use them only if a program asks.
void AskForHugePages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = 4 << 20;  // as in NumPy
  if (bytes < kLarge) return;
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, end = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // only advice, so a failure does not matter
#endif
}

}  // namespace

size_t DiceSumsWorkspace(const Problem& problem) {
  const Blocks blocks(problem);
  return blocks.count * (RowLength(problem.classes) * sizeof(double) + sizeof(int64_t));
}

Error DiceSums(const Problem& problem, const Sums& sums, void* workspace, const ParallelFor& parallel) {
  const Blocks blocks(problem);
  const int64_t row = RowLength(problem.classes);
  double* const partials = static_cast<double*>(workspace);
  int64_t* const bad = reinterpret_cast<int64_t*>(partials + blocks.count * row);
  const Kernels& kernels = KernelsFor(problem);
  parallel.ForRanges(blocks.count, blocks.Cost(problem), [&](int64_t first, int64_t last) {
    const std::unique_ptr<char[]> scratch(new char[kernels.scratch_bytes(problem)]);
    std::fill(partials + first * row, partials + last * row, 0.0);
    blocks.ForEach(problem, first, last, [&](int64_t block, int64_t sample, int64_t begin, int64_t end) {
      bad[block] = kernels.sums(problem, sample, begin, end, partials + block * row, scratch.get());
    });
  });
  for (int64_t block = 0; block < blocks.count; ++block) {
    if (bad[block] >= 0) return ErrorOf({block / blocks.per_sample, bad[block] / 2, bad[block] % 2 == 1}, problem);
  }
  if (problem.sums_dtype() == DType::kDouble) {
    Combine<double>(problem, blocks, partials, sums);
  } else {
    Combine<float>(problem, blocks, partials, sums);
  }
  return {};
}

void DiceSumsGrad(const Problem& problem, const SumsGrad& grad, const ParallelFor& parallel) {
  if (grad.d_logits != problem.logits) AskForHugePages(grad.d_logits, LogitsBytes(problem));
  const Blocks blocks(problem);
  const Kernels& kernels = KernelsFor(problem);
  parallel.ForRanges(blocks.count, blocks.Cost(problem), [&](int64_t first, int64_t last) {
    const std::unique_ptr<char[]> scratch(new char[kernels.scratch_bytes(problem)]);
    blocks.ForEach(problem, first, last, [&](int64_t, int64_t sample, int64_t begin, int64_t end) {
      kernels.grad(problem, grad, sample, begin, end, scratch.get());
    });
  });
}

const char* SimdLevels() {
#if defined(DICE_OP_X86_LEVELS)
  return "portable,x86-64-v3,x86-64-v4";
#else
  return "portable";
#endif
}

const char* SimdLevel() { return Active().level; }

}  // namespace cpu
}  // namespace dice_op

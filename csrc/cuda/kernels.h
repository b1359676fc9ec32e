// The kernels that compute the sums and the gradient.
#pragma once

#include "cuda/direct.h"
#include "cuda/general.h"
#include "cuda/rows.h"
#include "cuda/staged.h"

namespace dice_op {
namespace {

using cuda::Variant;

// A thread adds this many voxels in its own precision before the warp's sum is added to a double. The error then stays
// below that of a few hundred additions, for volumes of any size.
constexpr int kFlush = 64;

// The number of warps in a block. The sums of many classes take much shared memory, and the smallest GPUs have only
// 64 KB for a block.
template <class VoxelAccess>
constexpr int kWarps = VoxelAccess::kLanes < 8 ? 4 : 2;
template <class VoxelAccess>
constexpr int kThreads = kWarps<VoxelAccess> * kWarp;

// The number of blocks for which a multiprocessor has enough registers.
template <class VoxelAccess>
constexpr int kBlocks = (1 << 16) / (VoxelAccess::kRegisters * kThreads<VoxelAccess>);

// The sums of a thread, and the totals of its warp. If a voxel has one label and many classes, the terms of the label's
// class are added to a bin in shared memory that belongs to this thread alone. It is then cheap to ask at run time
// whether cross-entropy is wanted.
template <class VoxelAccess, class Activation, bool kCrossEntropy>
struct Accumulators {
  using R = typename VoxelAccess::Number;
  static constexpr int kItems = VoxelAccess::kItems, kLanes = VoxelAccess::kLanes;
  static constexpr bool kBins = VoxelAccess::kSingle;
  static constexpr bool kCrossEntropyBins = kBins && !Activation::kBinary;  // they hold it too
  static constexpr bool kCrossEntropyRows = !kCrossEntropyBins && kCrossEntropy;
  static constexpr bool kNegativeRows = kCrossEntropyRows && Activation::kBinary;
  // Bins for one sum that needs a table: unknown_sum or distance_sum. They are there only if the call asks for it.
  static constexpr bool kTableBins = VoxelAccess::kTables;
  // The sums per class that the kernel computes: this many of the first.
  static constexpr int kSums = static_cast<int>(kTableBins            ? Sum::kDistanceSum
                                                : Activation::kBinary ? Sum::kNegativeCrossEntropy
                                                                      : Sum::kCrossEntropy) +
                               1;
  // The warp's totals: first one for each sum, item and lane that shares a voxel, then the weight and the bad labels.
  static constexpr int kWeight = kSums * kItems * kLanes, kBad = kWeight + kSampleSumCount, kTotals = kBad + 1;

  R pred_sum[kItems], intersection[kBins ? 1 : kItems], label_sum[kBins ? 1 : kItems];
  R cross_entropy[kCrossEntropyRows ? kItems : 1], negative_cross_entropy[kNegativeRows ? kItems : 1];
  R weight_sum = R(0);
  double* const totals;
  R* const bins;  // this thread's [kind][item], kWarp apart
  const bool wants_cross_entropy, has_table, is_distance;
  int added = 0;

  static int Bytes(const Problem& problem) {
    const int bins = kTableBins ? problem.has_label_sets() || problem.has_distances()
                     : !kBins   ? 0
                     : kCrossEntropyBins && problem.options.cross_entropy ? 3
                                                                          : 2;
    return (kTotals * 8 + bins * kItems * kWarp * static_cast<int>(sizeof(R)) + 15) / 16 * 16;
  }

  DICE_OP_DEVICE Accumulators(const Call& call, char* memory)
      : totals(reinterpret_cast<double*>(memory)),
        bins(reinterpret_cast<R*>(totals + kTotals) + Lane()),
        wants_cross_entropy(call.terms.cross_entropy),
        has_table(call.terms.sets || call.terms.distances),
        is_distance(kHasDistance<Activation, typename VoxelAccess::Label> && call.terms.distances) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      pred_sum[i] = R(0);
      if constexpr (!kBins) intersection[i] = label_sum[i] = R(0);
      if constexpr (kCrossEntropyRows) cross_entropy[i] = R(0);
      if constexpr (kNegativeRows) negative_cross_entropy[i] = R(0);
    }
    if constexpr (kBins || kTableBins) {
#pragma unroll 1
      for (int i = 0; i < Kinds() * kItems; ++i) bins[i * kWarp] = R(0);
    }
#pragma unroll 1
    for (int i = Lane(); i < kTotals; i += kWarp) totals[i] = 0;
    __syncwarp();
  }
  DICE_OP_DEVICE int Kinds() const {  // of bins
    return kTableBins ? (has_table ? 1 : 0) : kCrossEntropyBins && wants_cross_entropy ? 3 : 2;
  }

  template <class Term>
  DICE_OP_DEVICE void AddLabel(int item, R pred, R label, const Term& loss) {
    R* const bin = bins + item * kWarp;
    bin[0] += pred;
    bin[kItems * kWarp] += label;
    if (kCrossEntropyBins && wants_cross_entropy) bin[2 * kItems * kWarp] += loss();
  }

  DICE_OP_DEVICE void AddToTable(int item, R m) { bins[item * kWarp] += m; }

  DICE_OP_DEVICE void Done(int voxels, bool last) {
    added += voxels;
    if (added >= kFlush || last) Flush();
  }

 private:
  DICE_OP_DEVICE void Flush() {
    constexpr int kPred = static_cast<int>(Sum::kPredSum), kCrossEntropySum = static_cast<int>(Sum::kCrossEntropy),
                  kNegative = static_cast<int>(Sum::kNegativeCrossEntropy);
    if constexpr (kBins) {
      using Shares = LaneSums<kLanes, kItems>;
#pragma unroll 1
      for (int sum = 0; sum < (kCrossEntropyRows ? kSums : Kinds() + 1); ++sum) {
        R values[Shares::kPadded] = {};
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (sum == kPred) {
            values[i] = Take(&pred_sum[i]);
          } else if (kCrossEntropyRows && sum == kCrossEntropySum) {
            values[i] = Take(&cross_entropy[kCrossEntropyRows ? i : 0]);
          } else if (kNegativeRows && sum == kNegative) {
            values[i] = Take(&negative_cross_entropy[kNegativeRows ? i : 0]);
          } else {  // the bins are in the order of the sums
            values[i] = Take(&bins[((sum < kPred ? sum : sum - 1) * kItems + i) * kWarp]);
          }
        }
        AddToTotals<Shares, kItems>(sum * kItems, values);
      }
    } else {
      constexpr int kRows = kNegativeRows ? kNegative + 1 : kCrossEntropyRows ? kCrossEntropySum + 1 : kCrossEntropySum;
      constexpr int kCount = kRows * kItems;
      using Shares = LaneSums<kLanes, kCount>;
      R values[Shares::kPadded] = {};
      const auto at = [&](Sum sum, int i) -> R& { return values[static_cast<int>(sum) * kItems + i]; };
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        at(Sum::kIntersection, i) = Take(&intersection[i]);
        at(Sum::kPredSum, i) = Take(&pred_sum[i]);
        at(Sum::kLabelSum, i) = Take(&label_sum[i]);
        if constexpr (kCrossEntropyRows) at(Sum::kCrossEntropy, i) = Take(&cross_entropy[i]);
        if constexpr (kNegativeRows) at(Sum::kNegativeCrossEntropy, i) = Take(&negative_cross_entropy[i]);
      }
      AddToTotals<Shares, kCount>(0, values);
    }
    if constexpr (kTableBins) {
      if (has_table) {
        using Shares = LaneSums<kLanes, kItems>;
        R values[Shares::kPadded] = {};
#pragma unroll
        for (int i = 0; i < kItems; ++i) values[i] = Take(&bins[i * kWarp]);
        AddToTotals<Shares, kItems>(static_cast<int>(is_distance ? Sum::kDistanceSum : Sum::kUnknownSum) * kItems,
                                    values);
      }
    }
    if constexpr (VoxelAccess::kWeighted) {
      R value = Take(&weight_sum);
      LaneSums<kLanes, 1>::Add(&value);
      if (Lane() == 0) totals[kWeight] += static_cast<double>(value);
    }
    added = 0;
  }
  // `first` is the row of totals that values[0] belongs to. Only one lane adds to each total, so that none has to wait.
  template <class Shares, int kCount>
  DICE_OP_DEVICE void AddToTotals(int first, R* values) {
    Shares::Add(values);
    double* const mine = totals + (first + Shares::First()) * kLanes + Lane() % kLanes;
#pragma unroll
    for (int i = 0; i < Shares::kHeld; ++i) {
      if (Shares::IsOwner() && Shares::First() + i < kCount) mine[i * kLanes] += static_cast<double>(values[i]);
    }
  }
  DICE_OP_DEVICE static R Take(R* from) {
    const R value = *from;
    *from = R(0);
    return value;
  }
};

// Whether the cross-entropy is computed is fixed at compile time if a few instructions matter, else asked at run time.
enum class CrossEntropyMode { kWithout, kWith, kAtRunTime };
template <CrossEntropyMode kMode, class R>
DICE_OP_DEVICE Terms<R> WithMode(Terms<R> terms) {
  if constexpr (kMode != CrossEntropyMode::kAtRunTime) terms.cross_entropy = kMode == CrossEntropyMode::kWith;
  return terms;
}

template <class VoxelAccess, class Activation, CrossEntropyMode kMode>
__global__ void __launch_bounds__(kThreads<VoxelAccess>, kBlocks<VoxelAccess>)
    SumsKernel(const __grid_constant__ typename VoxelAccess::Parameter call) {
  using R = typename VoxelAccess::Number;
  constexpr bool kCrossEntropy = kMode != CrossEntropyMode::kWithout;
  using Sums = Accumulators<VoxelAccess, Activation, kCrossEntropy>;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);  // the compiler sees that lanes agree
  const int64_t sample = blockIdx.x;
  char* const memory = SharedMemory();

  VoxelAccess access(call, sample, memory + warp * call.shared_per_warp);
  Sums sums(call, memory + warp * call.shared_per_warp + call.access_bytes);
  bool no_probability = false;
  access.template Run<false>(
      blockIdx.y * kWarps<VoxelAccess> + warp, call.blocks_per_sample * kWarps<VoxelAccess>,
      [&](const auto& classes, R* z, const auto& label, R m, const Terms<R>& terms) {
        R p[VoxelAccess::kItems];
        if constexpr (std::is_same_v<Activation, Identity>) {
#pragma unroll
          for (int i = 0; i < VoxelAccess::kItems; ++i) {
            no_probability |= classes.Class(i) < call.classes && m != R(0) && !IsProbability(z[i]);
          }
        }
        AddVoxel<Activation, kCrossEntropy>(classes, z, p, label, m, WithMode<kMode>(terms), sums);
        if constexpr (VoxelAccess::kWeighted) sums.weight_sum += m;
      },
      [&](int voxels, bool last) { sums.Done(voxels, last); });
  const bool bad = __any_sync(0xffffffffu, access.bad() || no_probability);
  if (bad && Lane() == 0) sums.totals[Sums::kBad] = 1;
  __syncthreads();

  // Write the block's row of sums, and behind it the number of warps that saw a bad value.
  const int length = cuda::PartialLength(call.classes, Sums::kSums);
  double* const partials = call.partials + (sample * call.blocks_per_sample + blockIdx.y) * length;
#pragma unroll 1
  for (int entry = threadIdx.x, sum = 0, c = entry; entry < length;
       entry += kThreads<VoxelAccess>, c += kThreads<VoxelAccess>) {
    while (sum < Sums::kSums && c >= call.classes) c -= call.classes, ++sum;
    using Classes = StridedClasses<VoxelAccess::kItems, VoxelAccess::kLanes, VoxelAccess::kTogether>;
    const int row = sum * VoxelAccess::kItems + Classes::Item(c);
    const int at = sum < Sums::kSums ? row * VoxelAccess::kLanes + Classes::LaneOf(c) : Sums::kWeight + c;
    double total = 0;
#pragma unroll
    for (int w = 0; w < kWarps<VoxelAccess>; ++w) {
      total += reinterpret_cast<const double*>(memory + w * call.shared_per_warp + call.access_bytes)[at];
    }
    partials[entry] = total;
  }
}

template <class VoxelAccess, class Activation, CrossEntropyMode kMode>
__global__ void __launch_bounds__(kThreads<VoxelAccess>, kBlocks<VoxelAccess>)
    GradKernel(const __grid_constant__ typename VoxelAccess::Parameter call) {
  using R = typename VoxelAccess::Number;
  constexpr int kItems = VoxelAccess::kItems;
  constexpr bool kCrossEntropy = kMode != CrossEntropyMode::kWithout;
  constexpr bool kCrossEntropyOfHeld = kCrossEntropy && (Activation::kBinary || !VoxelAccess::kSingle);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);  // the compiler sees that lanes agree
  const int64_t sample = blockIdx.x;
  const auto of_sample = [&](Sum sum) {
    return call.d_sums[sum] ? static_cast<const R*>(call.d_sums[sum]) + sample * call.classes : nullptr;
  };

  VoxelAccess access(call, sample, SharedMemory() + warp * call.shared_per_warp);
  const R *const d_intersection = of_sample(Sum::kIntersection), *const d_pred_sum = of_sample(Sum::kPredSum),
                 *const d_cross_entropy = of_sample(Sum::kCrossEntropy);
  const R* const d_distance = VoxelAccess::kTables ? of_sample(Sum::kDistanceSum) : nullptr;
  const R* const d_negative = Activation::kBinary ? of_sample(Sum::kNegativeCrossEntropy) : nullptr;
  constexpr bool kNegative = kCrossEntropy && Activation::kBinary;
  R a[VoxelAccess::kSingle ? 1 : kItems], b[kItems], e[kCrossEntropyOfHeld ? kItems : 1],
      n[kNegative ? kItems : 1];  // for the classes held
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int c = StridedClasses<kItems, VoxelAccess::kLanes, VoxelAccess::kTogether>::Class(i);
    const bool there = c < call.classes;
    b[i] = there ? d_pred_sum[c] : R(0);
    if constexpr (!VoxelAccess::kSingle) a[i] = there ? d_intersection[c] : R(0);
    if constexpr (kCrossEntropyOfHeld) e[i] = there && d_cross_entropy ? d_cross_entropy[c] : R(0);
    if constexpr (kNegative) n[i] = there && d_negative ? d_negative[c] : R(0);
  }
  access.template Run<true>(
      blockIdx.y * kWarps<VoxelAccess> + warp, call.blocks_per_sample * kWarps<VoxelAccess>,
      [&](const auto& classes, R* z, const auto& label, R m, const Terms<R>& terms) {
        R p[kItems], h[kCrossEntropyOfHeld ? kItems : 1];
        // The gradient may overwrite z, because z is read for the last time before.
        VoxelGrad<Activation, kCrossEntropy>(classes, z, p, h, z, label, m, WithMode<kMode>(terms),
                                             VoxelAccess::kSingle ? d_intersection : a, b,
                                             kCrossEntropyOfHeld ? e : d_cross_entropy, n, d_distance);
      },
      [](int, bool) {});
}

// --- what a launch of them needs ----------------------------------------------------------------------

// Returns how many lanes of a warp read the same bank of shared memory at once, if each lane reads one run of classes
// of a row and the rows start `row` bytes apart.
template <class VoxelAccess>
int BankConflicts(int row) {
  constexpr int kRun = VoxelAccess::kTogether * sizeof(typename VoxelAccess::Storage);
  int words[kWarp], conflicts = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    words[lane] = (lane / VoxelAccess::kLanes * row + lane % VoxelAccess::kLanes * kRun) / 4;
  }
  for (int bank = 0; bank < kWarp; ++bank) {
    int different = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      different += words[lane] % kWarp == bank && (lane == 0 || words[lane] != words[lane - 1]);
    }
    conflicts = different > conflicts ? different : conflicts;
  }
  return conflicts;
}

template <class VoxelAccess, class Activation, CrossEntropyMode kRequested = CrossEntropyMode::kAtRunTime>
Variant VariantOf(const Problem& problem, bool grad) {
  constexpr CrossEntropyMode kMode = Activation::kHard                                ? CrossEntropyMode::kWithout
                                     : VoxelAccess::kSingle || VoxelAccess::kWeighted ? CrossEntropyMode::kAtRunTime
                                                                                      : kRequested;
  constexpr int kElement = sizeof(typename VoxelAccess::Storage);
  const int classes = static_cast<int>(problem.classes), row = classes * kElement;
  Variant variant;
  variant.warps = kWarps<VoxelAccess>;
  variant.tile = VoxelAccess::kTile;
  if (std::is_same_v<typename VoxelAccess::Parameter, GeneralCall>) {
    variant.row_magic = (1u << 20) / classes + 1;
  } else if (VoxelAccess::kLanes > 1 && row % 16 == 0 && kWarp % (row / 16) == 0) {
    variant.row_words = row / 16;
    if (BankConflicts<VoxelAccess>(row + 16) < BankConflicts<VoxelAccess>(row)) variant.row_padding = 16;
  }
  variant.access_bytes = VoxelAccess::Bytes(classes, variant.row_padding);
  if (VoxelAccess::kTables && problem.dense_labels) variant.access_bytes *= 2;
  variant.shared_per_warp = variant.access_bytes;
  const auto set_kernel = [&](auto* kernel) {
    if constexpr (std::is_same_v<typename VoxelAccess::Parameter, Call>) {
      variant.plain = kernel;
    } else {
      variant.general = kernel;
    }
  };
  if constexpr (!Activation::kHard) {
    if (grad) set_kernel(&GradKernel<VoxelAccess, Activation, kMode>);
  }
  if (!grad) {
    set_kernel(&SumsKernel<VoxelAccess, Activation, kMode>);
    using Sums = Accumulators<VoxelAccess, Activation, kMode != CrossEntropyMode::kWithout>;
    variant.class_sums = Sums::kSums;
    variant.shared_per_warp += Sums::Bytes(problem);
  }
  return variant;
}

// Whether the problem has class indices and no options, as most training runs have. Words must be aligned too. With
// `masked`, voxels may have weights, and a label may be ignored.
template <class T>
bool IsPlain(const Problem& problem, const void* d_logits, bool masked = false) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  const int64_t run = (problem.channels_last() ? problem.classes : 1) * sizeof(T);
  const bool rows_aligned = problem.voxels * run % 16 == 0;
  const bool one_run = problem.batch == 1 && run == static_cast<int64_t>(problem.classes * sizeof(T));
  Terms<double> terms = TermsOf(problem);
  if (masked) {
    if (problem.voxel_weight && problem.weight_dtype != DType::kFloat) return false;
    // A kernel sees the lower 32 bits of wide labels.
    const IgnoreLabel ignore = problem.options.ignore_label;
    const bool seen = ignore.value >= 0 && ignore.value < UINT32_MAX;
    if (ignore.given && SizeOf(problem.labels_dtype) == 8 && !seen) return false;
    terms.masked = false;
  }
  return !problem.labels_per_class() && problem.labels_dtype <= DType::kInt64 && terms.plain() && !problem.hard() &&
         aligned(problem.logits) && aligned(problem.labels) && aligned(d_logits) && (rows_aligned || one_run);
}

}  // namespace
}  // namespace dice_op

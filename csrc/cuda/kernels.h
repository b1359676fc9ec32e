// The kernels: sums, and gradient.
#pragma once

#include "cuda/source.h"

namespace dice_op {
namespace {

using cuda::Variant;

// A thread adds this many voxels in its own precision before the warp's sum goes to a double. The
// error then stays below that of some hundred additions, whatever the volume.
constexpr int kFlush = 64;

// Warps of a block. The sums of many classes take much shared memory, of which the smallest GPUs have
// 64 KB for a block.
template <class Source>
constexpr int kWarps = Source::kLanes < 8 ? 4 : 2;
template <class Source>
constexpr int kThreads = kWarps<Source> * kWarp;

// So many blocks fit on a multiprocessor, by their registers.
template <class Source>
constexpr int kBlocks = (1 << 16) / (Source::kRegisters * kThreads<Source>);

// The sums of a thread, and under them those of its warp. Where a voxel has one label and many
// classes, what goes to the label's class goes to a bin in shared memory that is this thread's own;
// whether cross-entropy is wanted then costs nothing but a question, and is asked at run time.
template <class Source, class Activation, bool kCrossEntropy>
struct Accumulators {
  using R = typename Source::Number;
  static constexpr int kItems = Source::kItems, kLanes = Source::kLanes;
  static constexpr bool kBins = Source::kSingle;
  static constexpr bool kLossBins = kBins && !Activation::kBinary;  // of the cross-entropy
  static constexpr bool kLossRows = !kLossBins && kCrossEntropy;
  // The warp's totals: per kind, item and lane that shares a voxel; then the weight, and bad labels.
  static constexpr int kWeight = 4 * kItems * kLanes, kBad = kWeight + 1, kTotals = kBad + 1;

  R pred_sum[kItems], intersection[kBins ? 1 : kItems], label_sum[kBins ? 1 : kItems];
  R cross_entropy[kLossRows ? kItems : 1];
  R weight_sum = R(0);
  double* const totals;
  R* const bins;  // [kind][item] of this thread, kWarp apart
  const bool wants_loss;
  int added = 0;

  static int Bytes(bool cross_entropy) {
    const int bins = !kBins ? 0 : kLossBins && cross_entropy ? 3 : 2;
    return (kTotals * 8 + bins * kItems * kWarp * static_cast<int>(sizeof(R)) + 15) / 16 * 16;
  }

  DICE_OP_DEVICE Accumulators(const Call& call, char* memory)
      : totals(reinterpret_cast<double*>(memory)),
        bins(reinterpret_cast<R*>(totals + kTotals) + Lane()),
        wants_loss(call.cross_entropy) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      pred_sum[i] = R(0);
      if constexpr (!kBins) intersection[i] = label_sum[i] = R(0);
      if constexpr (kLossRows) cross_entropy[i] = R(0);
    }
    if constexpr (kBins) {
      for (int i = 0; i < Kinds() * kItems; ++i) bins[i * kWarp] = R(0);
    }
    for (int i = Lane(); i < kTotals; i += kWarp) totals[i] = 0;
    __syncwarp();
  }
  DICE_OP_DEVICE int Kinds() const { return kLossBins && wants_loss ? 3 : 2; }  // of bins

  template <class Loss>
  DICE_OP_DEVICE void AddLabel(int item, R pred, R label, const Loss& loss) {
    R* const bin = bins + item * kWarp;
    bin[0] += pred;
    bin[kItems * kWarp] += label;
    if (kLossBins && wants_loss) bin[2 * kItems * kWarp] += loss();
  }

  DICE_OP_DEVICE void Done(int voxels, bool last) {
    added += voxels;
    if (added >= kFlush || last) Flush();
  }

 private:
  // Kinds 0 to 3 are intersection, label_sum, cross_entropy, pred_sum.
  DICE_OP_DEVICE void Flush() {
    if constexpr (kBins) {
#pragma unroll 1
      for (int kind = 0; kind < Kinds(); ++kind) {
        R values[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) values[i] = Take(&bins[(kind * kItems + i) * kWarp]);
        AddToTotals<kItems>(kind, values);
      }
    } else {
      AddToTotals<kItems>(0, intersection);
      AddToTotals<kItems>(1, label_sum);
    }
    if constexpr (kLossRows) AddToTotals<kItems>(2, cross_entropy);
    AddToTotals<kItems>(3, pred_sum);
    if constexpr (Source::kWeighted) AddToTotals<1>(4, &weight_sum);
    added = 0;
  }
  template <int kCount>
  DICE_OP_DEVICE void AddToTotals(int kind, R* values) {
    R taken[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) taken[i] = Take(&values[i]);
    const Share share = AddOverLanes<kLanes, kWarp / 2, kCount>(taken);
    constexpr int kShare = (kCount + kWarp / kLanes - 1) / (kWarp / kLanes);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {  // always the same lane for the same total: no other waits for it
      const int value = share.first + i;
      if (value < share.end && (kCount > 1 || Lane() == 0)) {
        totals[(kind * kItems + value) * kLanes + Lane() % kLanes] += static_cast<double>(taken[i]);
      }
    }
  }
  DICE_OP_DEVICE static R Take(R* from) {
    const R value = *from;
    *from = R(0);
    return value;
  }
};

template <class Source, class Activation, bool kCrossEntropy>
__global__ void __launch_bounds__(kThreads<Source>, kBlocks<Source>) SumsKernel(const __grid_constant__ Call call) {
  using R = typename Source::Number;
  using Sums = Accumulators<Source, Activation, kCrossEntropy>;
  const int warp = threadIdx.x / kWarp;
  const int64_t sample = blockIdx.x / call.blocks_per_sample;
  const int64_t block = blockIdx.x % call.blocks_per_sample;
  char* const memory = SharedMemory();

  Source source(call, sample, memory + warp * call.shared_per_warp);
  Sums sums(call, memory + warp * call.shared_per_warp + call.source_bytes);
  source.template Run<false>(
      block * kWarps<Source> + warp, static_cast<int64_t>(call.blocks_per_sample) * kWarps<Source>,
      [&](const auto& classes, R* z, const auto& label, R m, const Terms<R>& terms) {
        R p[Source::kItems];
        AddVoxel<Activation, kCrossEntropy>(classes, z, p, label, m, terms, sums);
        if constexpr (Source::kWeighted) sums.weight_sum += m;
      },
      [&](int voxels, bool last) { sums.Done(voxels, last); });
  const bool bad = __any_sync(0xffffffffu, source.bad());
  if (bad && Lane() == 0) sums.totals[Sums::kBad] = 1;
  __syncthreads();

  // The block's sums, in the order that cuda::PartialWidth tells.
  const int width = cuda::PartialWidth(call.classes);
  for (int entry = threadIdx.x; entry < width; entry += kThreads<Source>) {
    const int kind = entry / call.classes, c = entry % call.classes;
    const int at = kind < 4 ? (kind * Source::kItems + c / Source::kLanes) * Source::kLanes + c % Source::kLanes
                            : Sums::kWeight + entry - 4 * call.classes;
    double total = 0;
    for (int w = 0; w < kWarps<Source>; ++w) {
      total += reinterpret_cast<const double*>(memory + w * call.shared_per_warp + call.source_bytes)[at];
    }
    call.partials[blockIdx.x * static_cast<int64_t>(width) + entry] = total;
  }
}

template <class Source, class Activation, bool kCrossEntropy>
__global__ void __launch_bounds__(kThreads<Source>, kBlocks<Source>) GradKernel(const __grid_constant__ Call call) {
  using R = typename Source::Number;
  constexpr int kItems = Source::kItems;
  constexpr bool kLossOfHeld = kCrossEntropy && (Activation::kBinary || !Source::kSingle);
  const int warp = threadIdx.x / kWarp;
  const int64_t sample = blockIdx.x / call.blocks_per_sample;
  const int64_t block = blockIdx.x % call.blocks_per_sample;
  const auto of_sample = [&](int which) {
    return call.d_sums[which] ? static_cast<const R*>(call.d_sums[which]) + sample * call.classes : nullptr;
  };

  Source source(call, sample, SharedMemory() + warp * call.shared_per_warp);
  const R *const d_intersection = of_sample(0), *const d_pred_sum = of_sample(1), *const d_loss = of_sample(2);
  R a[Source::kSingle ? 1 : kItems], b[kItems], e[kLossOfHeld ? kItems : 1];  // of the classes held
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int c = Dealt<kItems, Source::kLanes>::Class(i);
    const bool there = c < call.classes;
    b[i] = there ? d_pred_sum[c] : R(0);
    if constexpr (!Source::kSingle) a[i] = there ? d_intersection[c] : R(0);
    if constexpr (kLossOfHeld) e[i] = there && d_loss ? d_loss[c] : R(0);
  }
  source.template Run<true>(
      block * kWarps<Source> + warp, static_cast<int64_t>(call.blocks_per_sample) * kWarps<Source>,
      [&](const auto& classes, R* z, const auto& label, R m, const Terms<R>& terms) {
        R p[kItems], h[kLossOfHeld ? kItems : 1];
        // z is read for the last time before the gradient takes its place
        VoxelGrad<Activation, kCrossEntropy>(classes, z, p, h, z, label, m, terms, Source::kSingle ? d_intersection : a,
                                             b, kLossOfHeld ? e : d_loss);
      },
      [](int, bool) {});
}

// --- what a launch of them needs ----------------------------------------------------------------------

// Lanes of a warp that read the same bank of shared memory at once, where each reads one element of a
// row that starts `row` bytes after its neighbour's.
template <class Source>
int BankConflicts(int row) {
  constexpr int kElement = sizeof(typename Source::Storage);
  int words[kWarp], conflicts = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    words[lane] = (lane / Source::kLanes * row + lane % Source::kLanes * kElement) / 4;
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

template <class Source, class Activation, bool kCrossEntropy_>
Variant VariantOf(const Problem& problem, bool grad) {
  // one kernel does with and without
  constexpr bool kCrossEntropy = kCrossEntropy_ || (Source::kSingle && !Activation::kBinary);
  constexpr int kElement = sizeof(typename Source::Storage);
  const int classes = static_cast<int>(problem.classes), row = classes * kElement;
  Variant variant;
  variant.warps = kWarps<Source>;
  variant.tile = Source::kTile;
  if (Source::kLanes > 1 && row % 16 == 0) {
    variant.row_magic = (1u << 20) / (row / 16) + 1;
    if (BankConflicts<Source>(row + 16) < BankConflicts<Source>(row)) variant.row_padding = 16;
  }
  variant.source_bytes = Source::Bytes(classes, variant.row_padding);
  variant.shared_per_warp = variant.source_bytes;
  if constexpr (!Activation::kHard) {
    if (grad) variant.kernel = GradKernel<Source, Activation, kCrossEntropy>;
  }
  if (!grad) {
    variant.kernel = SumsKernel<Source, Activation, kCrossEntropy>;
    variant.shared_per_warp += Accumulators<Source, Activation, kCrossEntropy>::Bytes(problem.options.cross_entropy);
  }
  return variant;
}

// Class indices and no options: what most training runs do. Words must be aligned.
template <class T>
bool IsPlain(const Problem& problem, const void* d_logits) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  const int64_t run = (problem.options.data_format == DataFormat::kChannelsFirst ? 1 : problem.classes) * sizeof(T);
  const bool rows_aligned = problem.voxels * run % 16 == 0;
  const bool one_run = problem.batch == 1 && run == static_cast<int64_t>(problem.classes * sizeof(T));
  return !problem.labels_per_class() && problem.labels_dtype <= DType::kInt64 && !problem.voxel_weight &&
         !problem.options.has_ignore_label && !problem.options.squared_pred && !problem.hard() &&
         (!problem.options.cross_entropy ||
          (problem.options.focal_gamma == 0 && problem.options.label_smoothing == 0)) &&
         aligned(problem.logits) && aligned(problem.labels) && aligned(d_logits) && (rows_aligned || one_run);
}

}  // namespace
}  // namespace dice_op

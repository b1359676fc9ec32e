// What a kernel needs to know about its launch.
#pragma once

#include <cstdint>

#include "core/dice_op.h"
#include "core/dtype.h"
#include "core/terms.h"

namespace dice_op {
namespace cuda {

struct Call {
  const void* logits;
  const void* labels;
  const void* weight;          // or null
  PerSum<const void*> d_sums;  // [N, C] each; gradient only
  void* d_logits;              // gradient only
  double* partials;            // [N, blocks_per_sample, PartialLength]; sums only
  int64_t voxels;              // V
  Terms<double> terms;
  IgnoreLabel ignore_label;
  int blocks_per_sample;
  int tiles;        // per sample
  int last_voxels;  // in the last tile, which may not be full
  int classes;      // C
  int first_class;
  int label_limit;  // labels below it are classes; no more than the labels' type can hold
  int label_bytes;
  uint32_t ignored;  // the label that counts for nothing, as ReadLabel gives it; only in the specialised kernels
  bool has_ignored;
  int row_padding;                    // bytes between the rows of a staged tile, so that they start in other banks
  int row_words;                      // words of 16 bytes in a row that is padded; a divisor of 32
  uint32_t row_magic;                 // (x * row_magic) >> 20 is the row of a tile's element x, in the general kernels
  int access_bytes, shared_per_warp;  // shared memory per warp: first the access's, then the sums'
  DType logits_dtype, labels_dtype, weight_dtype;
  bool planar;  // channels first
  bool dense_labels;
};

// What only the general kernels need: the options that are tables.
struct GeneralCall : Call {
  bool has_regions, has_label_sets, has_gammas;
  union {                                                                  // no call has both
    LabelSets sets;                                                        // or the regions'
    float distances[kMaxClassesWithDistances * kMaxClassesWithDistances];  // dist_matrix
  };
  FocalGammas focal_gammas;

  GeneralCall() : Call(), has_regions(), has_label_sets(), has_gammas(), sets() {}
};
static_assert(sizeof(GeneralCall) <= 4096, "older drivers take no more as a kernel's parameter");

// The numbers that a block writes: a row with the first `class_sums` of the sums per class and the others, and the
// number of warps that saw a label that is not a class.
DICE_OP_INLINE constexpr int PartialLength(int classes, int class_sums) {
  return static_cast<int>(RowLength(classes, class_sums)) + 1;
}

// A kernel (`plain` or `general`; the other is null), and what is needed to launch it.
struct Variant {
  void (*plain)(Call) = nullptr;
  void (*general)(GeneralCall) = nullptr;
  int class_sums = 0;  // that it computes: this many of the first
  int access_bytes = 0, shared_per_warp = 0;
  int warps = 0;  // per block; they work independently until the block's sums are added
  int tile = 0;   // voxels that a warp takes at a time
  int row_padding = 0, row_words = 1;
  uint32_t row_magic = 0;
};

// These return the kernel for the gradient, or for the sums if d_logits is null. FindPlain returns a specialised kernel
// if there is one for the problem; FindGeneral returns one that can do everything. FindPortable returns the same for a
// GPU that this build has no machine code for.
Variant FindPlain(const Problem& problem, const void* d_logits);
Variant FindGeneral(const Problem& problem, const void* d_logits);
Variant FindPortable(const Problem& problem, const void* d_logits);  // if DICE_OP_WITH_PTX is defined

}  // namespace cuda
}  // namespace dice_op

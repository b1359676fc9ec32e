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
  Options options;
  Terms<double> terms;
  int blocks_per_sample;
  int tiles;        // per sample
  int last_voxels;  // in the last tile, which may not be full
  int classes;      // C
  int first_class;
  int label_limit;  // labels below it are classes; no more than the labels' type can hold
  int label_bytes;
  int row_padding;                    // bytes between the rows of a staged tile, so that they start in other banks
  uint32_t row_magic;                 // (x * row_magic) >> 20 is the row of a tile's 16-byte word x, or element x
  int access_bytes, shared_per_warp;  // shared memory per warp: first the access's, then the sums'
  DType logits_dtype, labels_dtype, weight_dtype;
  bool planar;  // channels first
  bool dense_labels;
};

// The numbers that a block writes: its row of sums, and the number of warps that saw a label that is not a class.
DICE_OP_INLINE constexpr int PartialLength(int classes) { return static_cast<int>(RowLength(classes)) + 1; }

// A kernel and what is needed to launch it.
struct Variant {
  void (*kernel)(Call) = nullptr;
  int access_bytes = 0, shared_per_warp = 0;
  int warps = 0;  // per block; they work independently until the block's sums are added
  int tile = 0;   // voxels that a warp takes at a time
  int row_padding = 0;
  uint32_t row_magic = 0;
};

// These return the kernel for the gradient, or for the sums if d_logits is null. FindPlain returns a specialised kernel
// if there is one for the problem; FindGeneral returns one that can do everything.
Variant FindPlain(const Problem& problem, const void* d_logits);
Variant FindGeneral(const Problem& problem, const void* d_logits);

}  // namespace cuda
}  // namespace dice_op

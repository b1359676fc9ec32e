// What one instruction set offers: the loops over a block of voxels, compiled once per level from
// kernels.cc.
#pragma once

#include <cstdint>

#include "core/dice_op.h"

namespace dice_op {
namespace cpu {

struct Kernels {
  const char* level;
  // Adds up voxels [begin, end) of a sample, to what stands in `partial` [RowLength(C)]. Returns the first voxel with a
  // bad value as 2 * voxel, and one more if the value is a prediction; or -1.
  int64_t (*sums)(const Problem& problem, int64_t sample, int64_t begin, int64_t end, double* partial);
  void (*grad)(const Problem& problem, const SumsGrad& grad, int64_t sample, int64_t begin, int64_t end);
};

extern const Kernels kPortable;
extern const Kernels kX86V3, kX86V4;  // where DICE_OP_X86_LEVELS is defined

}  // namespace cpu
}  // namespace dice_op

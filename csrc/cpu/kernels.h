// The loops over a block of voxels. kernels.cc is compiled once for each instruction set to make them. They allocate
// nothing, because no exception can pass through them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dice_op.h"

namespace dice_op {
namespace cpu {

struct Kernels {
  const char* level;
  // The number of bytes of scratch memory that each call of the other two needs for itself.
  size_t (*scratch_bytes)(const Problem& problem);
  // Adds voxels [begin, end) of a sample to the sums in `partial` [RowLength(C)]. Returns -1 if there is no bad value.
  // Otherwise it returns 2 * voxel for the first voxel with a bad label, or 2 * voxel + 1 if its prediction is bad.
  int64_t (*sums)(const Problem& problem, int64_t sample, int64_t begin, int64_t end, double* partial, void* scratch);
  void (*grad)(const Problem& problem, const SumsGrad& grad, int64_t sample, int64_t begin, int64_t end, void* scratch);
};

extern const Kernels kPortable;
extern const Kernels kX86V3, kX86V4;  // if DICE_OP_X86_LEVELS is defined

}  // namespace cpu
}  // namespace dice_op

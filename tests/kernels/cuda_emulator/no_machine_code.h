// What the launch code asks of a library's machine code, for programs that have none. One file of each such program
// includes it.
#ifndef DICE_OP_CUDA_EMULATOR_NO_MACHINE_CODE_H_
#define DICE_OP_CUDA_EMULATOR_NO_MACHINE_CODE_H_

#include "cuda/call.h"

namespace dice_op {
namespace cuda {
#ifndef DICE_OP_CUDA_ARCHS  // else the launch code has it
const char* Archs() { return "emulated"; }
#endif
// Both kinds of code are the same here.
Variant FindPortable(const Problem& problem, const void* d_logits) { return FindGeneral(problem, d_logits); }
}  // namespace cuda
}  // namespace dice_op

#endif  // DICE_OP_CUDA_EMULATOR_NO_MACHINE_CODE_H_

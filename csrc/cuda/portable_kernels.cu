// The general kernels once more, as portable code (PTX) for GPUs that are later than this build. Their driver compiles
// it. The specialised kernels are left out, because they would make every wheel larger.
#include "cuda/find_general.h"

namespace dice_op {
namespace cuda {

Variant FindPortable(const Problem& problem, const void* d_logits) { return GeneralVariant(problem, d_logits); }

}  // namespace cuda
}  // namespace dice_op

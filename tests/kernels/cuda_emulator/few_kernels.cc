// One kernel of each sort: compiles in seconds where all take a minute. Stands in for kernels.cu.
#include "cuda/kernels.h"

namespace dice_op {
namespace {

template <class VoxelAccess, class Activation = Softmax>
cuda::Variant Of(const Problem& problem, const void* d_logits) {
  const bool grad = d_logits != nullptr;
  return problem.options.cross_entropy ? VariantOf<VoxelAccess, Activation, CrossEntropyMode::kWith>(problem, grad)
                                       : VariantOf<VoxelAccess, Activation, CrossEntropyMode::kWithout>(problem, grad);
}

}  // namespace

namespace cuda {

Variant FindPlain(const Problem& problem, const void* d_logits) {
  if (problem.logits_dtype == DType::kBFloat16) {
    if (!IsPlain<BFloat16>(problem, d_logits) || problem.classes != 5 || !problem.channels_last()) return {};
    return Of<Rows<AnyFloat16, 5>>(problem, d_logits);
  }
  if (problem.logits_dtype != DType::kFloat) return {};
  if (problem.masked()) {
    if (!IsPlain<float>(problem, d_logits, true) || !problem.channels_last()) return {};
    if (problem.classes == 3) return Of<Rows<float, 3, true>>(problem, d_logits);
    return problem.classes == 6 ? Of<Staged<float, 8, 1, 4, true>>(problem, d_logits) : Variant{};
  }
  if (!IsPlain<float>(problem, d_logits)) return {};
  const bool planar = !problem.channels_last();
  if (planar) return problem.classes == 2 ? Of<Direct<float, 2, true>>(problem, d_logits) : Variant{};
  if (problem.classes == 3) return Of<Rows<float, 3>>(problem, d_logits);
  if (problem.classes == 4) return Of<Direct<float, 4, false>>(problem, d_logits);
  if (problem.classes == 16) return Of<Rows<float, 16>>(problem, d_logits);
  if (problem.classes == 64) return Of<Staged<float, 16, 4, 12>>(problem, d_logits);
  if (problem.classes == 104) return Of<Staged<float, 14, 8, 12>>(problem, d_logits);
  return {};
}

Variant FindGeneral(const Problem& problem, const void* d_logits) {
  using PerClass = General<float, true, 4, 1>;
  const bool sigmoid = problem.options.activation == Activation::kSigmoid, few = problem.classes <= 4;
  if (problem.in_double()) return {};
  if (!few && (problem.hard() || sigmoid || problem.labels_per_class())) return {};
  if (problem.hard()) return Of<PerClass, Argmax>(problem, d_logits);
  if (sigmoid) return Of<PerClass, Sigmoid>(problem, d_logits);
  if (problem.labels_per_class()) return Of<PerClass>(problem, d_logits);
  return few ? Of<General<float, false, 4, 1>>(problem, d_logits) : Of<General<float, false, 8, 32>>(problem, d_logits);
}

}  // namespace cuda
}  // namespace dice_op

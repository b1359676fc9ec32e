// Chooses the kernel for a problem. The machine code of all kernels that read voxels comes from this one file: a wheel
// compresses the code of an architecture as a whole, and kernels have much code in common. (portable_kernels.cu has the
// general ones once more, as PTX.)
#include "core/dispatch.h"
#include "cuda/find_general.h"
#include "cuda/kernels.h"

namespace dice_op {
namespace {

// --- class indices and no options: a kernel for each number of classes ----------------------------------

// Chooses the smallest tile for more than 16 classes.
template <class T, class Activation>
Variant ManyClasses(const Problem& problem, bool grad) {
  const auto of = [&](auto source) { return VariantOf<typename decltype(source)::type, Activation>(problem, grad); };
  const int64_t c = problem.classes;
  if (c <= 24) return of(Type<Staged<T, 12, 2, 8>>{});
  if (c <= 32) return of(Type<Staged<T, 16, 2, 12>>{});
  if (c <= 48) return of(Type<Staged<T, 12, 4, 8>>{});
  if (c <= 64) return of(Type<Staged<T, 16, 4, 12>>{});
  if (c <= 96) return of(Type<Staged<T, 12, 8, 8>>{});
  if (c <= 112) return of(Type<Staged<T, 14, 8, 12>>{});  // the organs and bones of a body
  if (c <= 128) return of(Type<Staged<T, 16, 8, 14>>{});
  if (c <= cuda::kMaxClasses) return of(Type<Staged<T, 16, 16, 8>>{});
  return {};
}

template <class T, class Activation>
Variant Plain(const Problem& problem, bool grad) {
  constexpr bool kSoftmax = std::is_same_v<Activation, Softmax>;
  constexpr int kMost = kSoftmax ? 16 : std::is_same_v<Activation, Sigmoid> ? 1 : 4;
  constexpr int kMostPlanar = kSoftmax ? 4 : 0;
  const bool planar = !problem.channels_last() && problem.classes > 1;
  return WithCount<kMost>(problem.classes, [&](auto count) -> Variant {
    constexpr int kCount = count.value;
    const auto of = [&](auto source) {
      using VoxelAccess = typename decltype(source)::type;
      // The most frequent calls of all have kernels that need not ask.
      if constexpr (kSoftmax && kCount > 1 && kCount <= 4 && !VoxelAccess::kPlanar) {
        return problem.options.cross_entropy
                   ? VariantOf<VoxelAccess, Activation, CrossEntropyMode::kWith>(problem, grad)
                   : VariantOf<VoxelAccess, Activation, CrossEntropyMode::kWithout>(problem, grad);
      } else {
        return VariantOf<VoxelAccess, Activation>(problem, grad);
      }
    };
    if (planar) {
      if constexpr (kCount > 1 && kCount <= kMostPlanar) return of(Type<Direct<T, kCount, true>>{});
    } else if constexpr (kCount == 0) {
      if constexpr (kSoftmax) return ManyClasses<T, Activation>(problem, grad);
    } else if constexpr (kCount == 1 && kSoftmax) {  // p = 1 everywhere
    } else if constexpr (kCount == 1 || kCount == 2 || kCount == 4) {
      return of(Type<Direct<T, kCount, false>>{});
    } else if constexpr (kCount > 8 && kCount % 2 == 1) {  // rare, so these four share one kernel
      return of(Type<Staged<T, 16, 1, 8>>{});
    } else {
      return of(Type<Rows<T, kCount>>{});
    }
    return {};
  });
}

// The same with weights or an ignored label, for a softmax over the last axis.
template <class T>
Variant MaskedOf(const Problem& problem, const void* d_logits) {
  if (!IsPlain<T>(problem, d_logits, true) || !problem.channels_last()) return {};
  if (problem.options.activation != Activation::kSoftmax) return {};
  const bool grad = d_logits != nullptr;
  const auto of = [&](auto source) { return VariantOf<typename decltype(source)::type, Softmax>(problem, grad); };
  const int64_t c = problem.classes;
  if (c == 1) return {};
  if (c == 2) return of(Type<Rows<T, 2, true>>{});
  if (c == 3) return of(Type<Rows<T, 3, true>>{});
  if (c == 4) return of(Type<Rows<T, 4, true>>{});
  if (c <= 8) return of(Type<Staged<T, 8, 1, 4, true>>{});
  if (c <= 16) return of(Type<Staged<T, 16, 1, 8, true>>{});
  return {};
}

template <class T>
Variant PlainOf(const Problem& problem, const void* d_logits) {
  if (problem.masked()) return MaskedOf<T>(problem, d_logits);
  if (!IsPlain<T>(problem, d_logits)) return {};
  const bool grad = d_logits != nullptr;
  const Activation activation = problem.options.activation;
  if (activation == Activation::kSigmoid) return Plain<T, Sigmoid>(problem, grad);
  if constexpr (sizeof(T) == 4) {  // a softmax layer in the model gives floats
    if (activation == Activation::kNone) return Plain<T, Identity>(problem, grad);
  }
  if (activation != Activation::kSoftmax) return {};
  return Plain<T, Softmax>(problem, grad);
}

}  // namespace

namespace cuda {

Variant FindPlain(const Problem& problem, const void* d_logits) {
  if (problem.logits_dtype == DType::kDouble) return {};
  return problem.logits_dtype == DType::kFloat ? PlainOf<float>(problem, d_logits)
                                               : PlainOf<AnyFloat16>(problem, d_logits);
}

Variant FindGeneral(const Problem& problem, const void* d_logits) { return GeneralVariant(problem, d_logits); }

}  // namespace cuda
}  // namespace dice_op

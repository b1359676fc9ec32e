// Chooses the general kernel for a problem, and so decides which of them are compiled.
#pragma once

#include "core/dispatch.h"
#include "cuda/kernels.h"

namespace dice_op {
namespace {

// Every kernel here works with and without cross-entropy. Kernels for one label value per class can also take indices,
// so scores, and double, which is mostly for tests, have no separate kernels for indices.
template <class R, class Activation, bool kPerClass>
Variant OfAnyCount(const Problem& problem, bool grad) {
  constexpr bool kDouble = std::is_same_v<R, double>;
  constexpr bool kDense = kPerClass || kDouble || Activation::kHard;
  const auto of = [&](auto source) { return VariantOf<typename decltype(source)::type, Activation>(problem, grad); };
  if constexpr (!kDouble) {
    if (problem.classes <= 4) return of(Type<General<R, kDense, 4, 1>>{});
    if constexpr (!Activation::kHard) {
      if (problem.classes <= 16) return of(Type<General<R, kDense, 4, 4>>{});
    }
  }
  if (problem.classes <= cuda::kMaxClasses) return of(Type<General<R, kDense, 8, 32>>{});
  return {};
}

// d_logits is null for the sums.
Variant GeneralVariant(const Problem& problem, const void* d_logits) {
  const bool grad = d_logits != nullptr;
  const auto find = [&](auto activation) {
    using A = decltype(activation);
    return WithBool(problem.labels_per_class(), [&](auto per_class) {
      return problem.in_double() ? OfAnyCount<double, A, per_class.value>(problem, grad)
                                 : OfAnyCount<float, A, per_class.value>(problem, grad);
    });
  };
  const Activation activation = problem.options.activation;
  return grad ? WithActivation(activation, find) : WithAnyActivation(activation, find);
}

}  // namespace
}  // namespace dice_op

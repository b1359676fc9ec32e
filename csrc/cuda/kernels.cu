// Which kernel a problem gets. CMake compiles this file once per family: one for each
// DICE_OP_CUDA_STORAGE, and the general one without.
#include "cuda/kernels.h"
// dispatch.h needs what kernels.h brings
#include "core/dispatch.h"

namespace dice_op {
namespace {

#ifdef DICE_OP_CUDA_STORAGE

using T = DICE_OP_CUDA_STORAGE;

// More than 16 classes: the smallest tile that holds them.
template <class Activation>
Variant Shared(const Problem& problem, bool grad) {
  const auto of = [&](auto source) {
    return VariantOf<typename decltype(source)::type, Activation, true>(problem, grad);
  };
  const int64_t c = problem.classes;
  if (c <= 24) return of(Type<Staged<T, 12, 2, 8>>{});
  if (c <= 32) return of(Type<Staged<T, 16, 2, 12>>{});
  if (c <= 48) return of(Type<Staged<T, 12, 4, 8>>{});
  if (c <= 64) return of(Type<Staged<T, 16, 4, 12>>{});
  if (c <= 96) return of(Type<Staged<T, 12, 8, 8>>{});
  if (c <= 112) return of(Type<Staged<T, 14, 8, 12>>{});  // a body's organs and bones
  if (c <= 128) return of(Type<Staged<T, 16, 8, 14>>{});
  if (c <= cuda::kMaxClasses) return of(Type<Staged<T, 16, 16, 8>>{});
  return {};
}

template <class Activation, bool kCrossEntropy>
Variant Plain(const Problem& problem, bool grad) {
  constexpr bool kSoftmax = std::is_same_v<Activation, Softmax>;
  constexpr bool kNone = std::is_same_v<Activation, Identity>;  // a model's own softmax gives floats
  if constexpr (kNone && sizeof(T) == 2) return {};
  constexpr int kMostPlanar = kSoftmax ? 4 : kNone ? 0 : 3;
  const bool planar = problem.options.data_format == DataFormat::kChannelsFirst && problem.classes > 1;
  return WithCount<kSoftmax ? 16 : 4>(problem.classes, [&](auto count) -> Variant {
    constexpr int kCount = count.value;
    const auto of = [&](auto source) {
      return VariantOf<typename decltype(source)::type, Activation, kCrossEntropy>(problem, grad);
    };
    if (planar) {
      if constexpr (kCount > 1 && kCount <= kMostPlanar) return of(Type<Direct<T, kCount, true>>{});
    } else if constexpr (kCount == 0) {
      if constexpr (kSoftmax) return Shared<Activation>(problem, grad);
    } else if constexpr (kCount == 1 && kSoftmax) {  // p = 1 everywhere
    } else if constexpr (kCount == 1 || kCount == 2 || kCount == 4) {
      return of(Type<Direct<T, kCount, false>>{});
    } else if constexpr (kCount > 8 && kCount % 2 == 1) {  // rare: one kernel for the four
      return of(Type<Staged<T, 8, 2, 4>>{});
    } else {
      return of(Type<Staged<T, kCount, 1, kCount>>{});
    }
    return {};
  });
}

Variant Find(const Problem& problem, const void* d_logits) {
  if (!IsPlain<T>(problem, d_logits)) return {};
  return WithActivation(problem.options.activation, [&](auto activation) {
    return WithBool(problem.options.cross_entropy, [&](auto cross_entropy) {
      return Plain<decltype(activation), cross_entropy.value>(problem, d_logits != nullptr);
    });
  });
}

#else

// Every kernel here does with and without cross-entropy. Where a label stands for each class, so may an index: double,
// for tests mostly, and scores do without kernels for indices alone.
template <class R, class Activation, bool kPerClass>
Variant OfAnyCount(const Problem& problem, bool grad) {
  constexpr bool kDouble = std::is_same_v<R, double>;
  constexpr bool kDense = kPerClass || kDouble || Activation::kHard;
  const auto of = [&](auto source) {
    return VariantOf<typename decltype(source)::type, Activation, !Activation::kHard>(problem, grad);
  };
  if constexpr (!kDouble) {
    if (problem.classes <= 4) return of(Type<General<R, kDense, 4, 1>>{});
    if (problem.classes <= 16) return of(Type<General<R, kDense, 4, 4>>{});
  }
  if (problem.classes <= cuda::kMaxClasses) return of(Type<General<R, kDense, 8, 32>>{});
  return {};
}

Variant Find(const Problem& problem, const void* d_logits) {
  const bool grad = d_logits != nullptr;
  const auto find = [&](auto activation) {
    using A = decltype(activation);
    return WithBool(problem.labels_per_class(), [&](auto per_class) {
      return problem.logits_dtype == DType::kDouble ? OfAnyCount<double, A, per_class.value>(problem, grad)
                                                    : OfAnyCount<float, A, per_class.value>(problem, grad);
    });
  };
  const Activation activation = problem.options.activation;
  return grad ? WithActivation(activation, find) : WithAnyActivation(activation, find);
}

#endif

}  // namespace

namespace cuda {
Variant DICE_OP_CUDA_FIND(const Problem& problem, const void* d_logits) { return Find(problem, d_logits); }
}  // namespace cuda
}  // namespace dice_op

// Only this file turns run-time options into template arguments. voxel.h says why the namespace is unnamed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/voxel.h"

namespace dice_op {
namespace {

// Takes the activations that have a gradient. CheckGradient has refused the others before.
template <class Fn>
auto WithActivation(Activation activation, Fn&& fn) {
  if (activation == Activation::kSigmoid) return fn(Sigmoid{});
  if (activation == Activation::kNone) return fn(Identity{});
  return fn(Softmax{});
}

// Takes every activation, for the sums.
template <class Fn>
auto WithAnyActivation(Activation activation, Fn&& fn) {
  if (activation == Activation::kArgmax) return fn(Argmax{});
  if (activation == Activation::kThreshold) return fn(Threshold{});
  return WithActivation(activation, fn);
}

template <class Fn>
auto WithBool(bool value, Fn&& fn) {
  return value ? fn(std::true_type{}) : fn(std::false_type{});
}

// Calls fn with the count if it is at most kMax, else with 0, which means that the count is known only at run time.
template <int kMax, class Fn>
auto WithCount(int64_t count, Fn&& fn) {
  if constexpr (kMax == 0) {
    return fn(std::integral_constant<int, 0>{});
  } else {
    return count == kMax ? fn(std::integral_constant<int, kMax>{}) : WithCount<kMax - 1>(count, fn);
  }
}

}  // namespace
}  // namespace dice_op

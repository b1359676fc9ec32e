// The one place where run-time options become template arguments. Unnamed namespace: see voxel.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/voxel.h"

namespace dice_op {
namespace {

// Those that have a gradient; a call that wants one of another is refused before (CheckGradient).
template <class Fn>
auto WithActivation(Activation activation, Fn&& fn) {
  if (activation == Activation::kSigmoid) return fn(Sigmoid{});
  if (activation == Activation::kNone) return fn(Identity{});
  return fn(Softmax{});
}

// All, for sums.
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

// fn of the count where it is at most kMax, else of 0: "known when running".
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

// The one place where run-time options become template arguments. Unnamed namespace: see voxel.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/voxel.h"

namespace dice_op {
namespace {

template <class Fn>
auto WithActivation(Activation activation, Fn&& fn) {
  switch (activation) {
    case Activation::kSigmoid:
      return fn(Sigmoid{});
    case Activation::kNone:
      return fn(Identity{});
    case Activation::kSoftmax:
      break;
  }
  return fn(Softmax{});
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

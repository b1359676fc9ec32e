// The element types in memory, what they hold, and the one place where a DType becomes a template
// argument.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dice_op.h"

namespace dice_op {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#define DICE_OP_INLINE inline __attribute__((always_inline))

namespace {  // see core/voxel.h

template <class To, class From>
DICE_OP_INLINE To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// By integer arithmetic: independent of whether the thread flushes subnormal numbers, as TensorFlow's
// do.
DICE_OP_INLINE float ToFloat(Half half) {
  const uint32_t magnitude = half.bits & 0x7fff;
  const uint32_t exponent = magnitude & 0x7c00;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // infinity, NaN
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  const uint32_t bits = exponent == 0x7c00 ? special : exponent == 0 ? BitCast<uint32_t>(subnormal) : normal;
  return BitCast<float>(bits | (static_cast<uint32_t>(half.bits & 0x8000) << 16));
}
DICE_OP_INLINE float ToFloat(BFloat16 value) { return BitCast<float>(static_cast<uint32_t>(value.bits) << 16); }

template <class T, class R>
DICE_OP_INLINE R FromStorage(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<R>(value);
  } else {
    return static_cast<R>(ToFloat(value));
  }
}

}  // namespace

template <class T>
struct Type {
  using type = T;
};

// Calls fn(Type<T>{}) with the C++ type of `dtype`.
template <class Fn>
auto WithType(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kBool:
    case DType::kUint8:
      return fn(Type<uint8_t>{});
    case DType::kInt8:
      return fn(Type<int8_t>{});
    case DType::kUint16:
      return fn(Type<uint16_t>{});
    case DType::kInt16:
      return fn(Type<int16_t>{});
    case DType::kInt32:
      return fn(Type<int32_t>{});
    case DType::kInt64:
      return fn(Type<int64_t>{});
    case DType::kHalf:
      return fn(Type<Half>{});
    case DType::kBFloat16:
      return fn(Type<BFloat16>{});
    case DType::kFloat:
      return fn(Type<float>{});
    case DType::kDouble:
      break;
  }
  return fn(Type<double>{});
}

}  // namespace dice_op

// The element types in memory and the values they may hold. Only this file turns a DType into a template argument.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dice_op.h"
#include "core/inline.h"

namespace dice_op {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace {  // see core/voxel.h

template <class To, class From>
DICE_OP_INLINE To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// These use integer arithmetic, so that the result is the same in threads that flush subnormal numbers, as TensorFlow's
// threads do.
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

// These round to nearest even, and use integer arithmetic for the same reason.
DICE_OP_INLINE Half ToHalf(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t odd = (magnitude >> 13) & 1;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  // Adding 0.5 shifts the 24 bits so that the last bit kept is the smallest step of a half.
  const uint32_t subnormal = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - (126u << 23);
  const uint32_t result = magnitude > 0x7f800000   ? 0x7e00
                          : magnitude > 0x477fefff ? 0x7c00
                          : magnitude < 0x38800000 ? subnormal
                                                   : normal;
  return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000))};
}
DICE_OP_INLINE BFloat16 ToBFloat16(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

template <class T, class R>
DICE_OP_INLINE R FromStorage(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<R>(value);
  } else {
    return static_cast<R>(ToFloat(value));
  }
}
template <class T, class R>
DICE_OP_INLINE T ToStorage(R value) {
  if constexpr (std::is_same_v<T, Half>) {
    return ToHalf(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return ToBFloat16(value);
  } else {
    return static_cast<T>(value);
  }
}

// Whether a label is the index of one of `limit` classes, a whole number from 0 on. There are no branches, so that
// compilers can vectorise loops over it.
template <class T>
DICE_OP_INLINE bool IsClass(T label, T limit) {
  const bool inside = (label >= T(0)) & (label < limit);
  if constexpr (std::is_integral_v<T>) return inside;
  return inside & (static_cast<T>(static_cast<int32_t>(inside ? label : T(0))) == label);
}

// Whether t is a legal dense label. Interpolation may overshoot a little, so there is some slack. NaN is not legal.
template <class R>
DICE_OP_INLINE bool IsSoftLabel(R t, bool soft) {
  constexpr R kSlack = R(1e-3);
  return soft ? (t >= -kSlack) & (t <= 1 + kSlack) : (t == R(0)) | (t == R(1));
}

// Whether a prediction may be a probability, with the same slack. NaN is accepted, because it shows in the sums.
template <class R>
DICE_OP_INLINE bool IsProbability(R p) {
  return (p != p) | IsSoftLabel(p, true);
}

}  // namespace

template <class T>
struct Type {
  using type = T;
};

// Calls fn(Type<T>{}) with the C++ type of `dtype`.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // fn may be a host or a device function
#endif
template <class Fn>
DICE_OP_INLINE auto WithType(DType dtype, Fn&& fn) {
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

namespace {
// The number of bytes of an element.
DICE_OP_INLINE int SizeOf(DType dtype) {
  return WithType(dtype, [](auto type) { return static_cast<int>(sizeof(typename decltype(type)::type)); });
}
// The index in the logits of class c of a voxel.
DICE_OP_INLINE int64_t PlaceInLogits(int64_t sample, int64_t voxel, int64_t c, int64_t voxels, int64_t classes,
                                     bool channels_last) {
  return sample * voxels * classes + (channels_last ? voxel * classes + c : c * voxels + voxel);
}
inline int64_t PlaceInLogits(const Problem& problem, int64_t sample, int64_t voxel, int64_t c) {
  return PlaceInLogits(sample, voxel, c, problem.voxels, problem.classes, problem.channels_last());
}
inline int64_t LogitsBytes(const Problem& problem) { return problem.logits_count() * SizeOf(problem.logits_dtype); }
}  // namespace

}  // namespace dice_op

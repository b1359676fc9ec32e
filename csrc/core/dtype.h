// The element types in memory, and the one place where a DType becomes a template argument.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dice_op.h"

namespace dice_op {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

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

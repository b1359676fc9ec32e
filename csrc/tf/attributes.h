// Converts the ops' attributes and tensors to the core's types, for shape functions and kernels.
#pragma once

#include <algorithm>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "core/problem.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/status.h"

namespace dice_op {

inline DType FromTensorFlow(tensorflow::DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_BOOL:
      return DType::kBool;
    case tensorflow::DT_UINT8:
      return DType::kUint8;
    case tensorflow::DT_INT8:
      return DType::kInt8;
    case tensorflow::DT_UINT16:
      return DType::kUint16;
    case tensorflow::DT_INT16:
      return DType::kInt16;
    case tensorflow::DT_INT32:
      return DType::kInt32;
    case tensorflow::DT_INT64:
      return DType::kInt64;
    case tensorflow::DT_HALF:
      return DType::kHalf;
    case tensorflow::DT_BFLOAT16:
      return DType::kBFloat16;
    case tensorflow::DT_DOUBLE:
      return DType::kDouble;
    default:
      return DType::kFloat;  // the schema allows no other
  }
}

// Only this function turns our errors into TensorFlow's.
inline absl::Status ToStatus(const Error& error) {
  switch (error.kind) {
    case ErrorKind::kNone:
      return absl::OkStatus();
    case ErrorKind::kInvalidArgument:
      return absl::InvalidArgumentError(error.message);
    case ErrorKind::kUnsupported:
      return absl::UnimplementedError(error.message);
    case ErrorKind::kDevice:
      break;
  }
  return absl::InternalError(error.message);
}

// Returns what fn returns. No exception may pass through TensorFlow, so a refusal of memory becomes a status.
template <class Fn>
absl::Status Guarded(const Fn& fn) {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("dice_op got no memory from the system");
  }
}

// Reads the options. `Context` is an InferenceContext or an OpKernelConstruction: both have GetAttr.
template <class Context>
absl::Status ReadOptions(Context* context, Options* options) {
  // An op's attribute cannot be a double. `remainders` holds two floats for each number, which are added to the float
  // attribute to get the double. A graph that was saved before a number existed has no remainders for it.
  std::vector<float> remainders;
  TF_RETURN_IF_ERROR(context->GetAttr("remainders", &remainders));
  size_t numbers = 0;
  absl::Status status;
  ForEachOption([&](const auto& option) {
    if (!status.ok()) return;
    auto& value = options->*option.value;
    using Value = std::remove_reference_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, double>) {
      float rounded = 0;
      status = context->GetAttr(option.attribute, &rounded);
      value = rounded;
      for (size_t i = 2 * numbers; i < std::min(2 * numbers + 2, remainders.size()); ++i) value += remainders[i];
      ++numbers;
    } else {
      AttributeOf<Value> attribute;
      status = context->GetAttr(option.attribute, &attribute);
      if (status.ok()) status = ToStatus(FromAttribute(attribute, &value));
    }
  });
  TF_RETURN_IF_ERROR(status);
  if (remainders.size() % 2 || remainders.size() > 2 * numbers) {
    return absl::InvalidArgumentError("remainders must be two numbers for each attribute that is one, or none");
  }
  return absl::OkStatus();
}

// Sets the options and dtypes of `problem`.
template <class Context>
absl::Status ReadAttributes(Context* context, Problem* problem) {
  tensorflow::DataType logits, labels, sums;
  std::vector<tensorflow::DataType> weights;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &logits));
  TF_RETURN_IF_ERROR(context->GetAttr("Tlabels", &labels));
  TF_RETURN_IF_ERROR(context->GetAttr("Tweight", &weights));
  TF_RETURN_IF_ERROR(context->GetAttr("Tsums", &sums));
  TF_RETURN_IF_ERROR(ReadOptions(context, &problem->options));
  problem->logits_dtype = FromTensorFlow(logits);
  problem->labels_dtype = FromTensorFlow(labels);
  if (!weights.empty()) problem->weight_dtype = FromTensorFlow(weights[0]);
  if (weights.size() > 1) return absl::InvalidArgumentError("voxel_weight must be given once or not at all");
  if (FromTensorFlow(sums) != problem->sums_dtype()) {
    return absl::InvalidArgumentError(
        "Tsums must be double for double logits and for the activations 'argmax' and 'threshold', else float");
  }
  return absl::OkStatus();
}

}  // namespace dice_op

// The ops' attributes and tensors as the core's types, for shape functions and kernels alike.
#pragma once

#include <string>
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
      return DType::kFloat;  // the schema admits no other
  }
}

// `Context` is an InferenceContext or an OpKernelConstruction: both answer GetAttr. Sets the
// options and dtypes of `problem`.
template <class Context>
absl::Status ReadAttributes(Context* context, Problem* problem) {
  tensorflow::DataType logits, labels, sums;
  std::vector<tensorflow::DataType> weights;
  std::string activation, data_format;
  std::vector<int64_t> ignore_label, regions;
  float focal_gamma, label_smoothing, threshold;
  std::vector<float> remainders;
  Options& options = problem->options;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &logits));
  TF_RETURN_IF_ERROR(context->GetAttr("Tlabels", &labels));
  TF_RETURN_IF_ERROR(context->GetAttr("Tweight", &weights));
  TF_RETURN_IF_ERROR(context->GetAttr("Tsums", &sums));
  TF_RETURN_IF_ERROR(context->GetAttr("activation", &activation));
  TF_RETURN_IF_ERROR(context->GetAttr("data_format", &data_format));
  TF_RETURN_IF_ERROR(context->GetAttr("squared_pred", &options.squared_pred));
  TF_RETURN_IF_ERROR(context->GetAttr("with_cross_entropy", &options.cross_entropy));
  TF_RETURN_IF_ERROR(context->GetAttr("focal_gamma", &focal_gamma));
  TF_RETURN_IF_ERROR(context->GetAttr("label_smoothing", &label_smoothing));
  TF_RETURN_IF_ERROR(context->GetAttr("threshold", &threshold));
  TF_RETURN_IF_ERROR(context->GetAttr("remainders", &remainders));
  TF_RETURN_IF_ERROR(context->GetAttr("ignore_label", &ignore_label));
  TF_RETURN_IF_ERROR(context->GetAttr("regions", &regions));
  for (const std::string& error : {Parse(activation, &options.activation), Parse(data_format, &options.data_format),
                                   SetRegions(regions, &options)}) {
    if (!error.empty()) return absl::InvalidArgumentError(error);
  }
  // No attribute of an op is a double: `remainders` has what each of the three lacks of one, as two floats to be added.
  if (remainders.empty()) remainders.resize(6);
  if (remainders.size() != 6) return absl::InvalidArgumentError("remainders must be 6 numbers, or none");
  const auto whole = [&](float number, int at) { return double{number} + remainders[at] + remainders[at + 1]; };
  options.focal_gamma = whole(focal_gamma, 0);
  options.label_smoothing = whole(label_smoothing, 2);
  options.threshold = whole(threshold, 4);
  options.has_ignore_label = !ignore_label.empty();
  options.ignore_label = ignore_label.empty() ? 0 : ignore_label[0];
  problem->logits_dtype = FromTensorFlow(logits);
  problem->labels_dtype = FromTensorFlow(labels);
  if (!weights.empty()) problem->weight_dtype = FromTensorFlow(weights[0]);
  if (weights.size() > 1 || ignore_label.size() > 1) {
    return absl::InvalidArgumentError("voxel_weight and ignore_label must be given once or not at all");
  }
  if (FromTensorFlow(sums) != problem->sums_dtype()) {
    return absl::InvalidArgumentError(
        "Tsums must be double for double logits and for the activations 'argmax' and 'threshold', else float");
  }
  return absl::OkStatus();
}

}  // namespace dice_op

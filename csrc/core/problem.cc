#include "core/problem.h"

#include <cmath>
#include <cstdio>

#include "core/dtype.h"

namespace dice_op {
namespace {

bool Match(int64_t a, int64_t b) { return a == b || a < 0 || b < 0; }

bool Match(const Dims& a, const Dims& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!Match(a[i], b[i])) return false;
  }
  return true;
}

int64_t Product(const Dims& dims) {
  int64_t product = 1;
  for (int64_t d : dims) product = (d < 0 || product < 0) ? -1 : product * d;
  return product;
}

// `dims` without its axis of length one where `axis` is the channels', or as it is.
Dims WithoutUnitAxis(Dims dims, size_t rank, size_t axis) {
  if (dims.size() == rank && Match(dims[axis], 1)) dims.erase(dims.begin() + axis);
  return dims;
}

constexpr const char* kActivations[] = {"softmax", "sigmoid", "none"};
constexpr const char* kDataFormats[] = {"channels_last", "channels_first"};

template <class E, size_t kCount>
std::string ParseOne(const char* argument, const std::string& name, const char* const (&names)[kCount], E* value) {
  std::string allowed;
  for (size_t i = 0; i < kCount; ++i) {
    *value = static_cast<E>(i);
    if (name == names[i]) return "";
    allowed += (i ? ", '" : "'") + std::string(names[i]) + "'";
  }
  return std::string(argument) + " is '" + name + "', but must be one of " + allowed;
}

}  // namespace

std::string Parse(const std::string& name, Activation* activation) {
  return ParseOne("activation", name, kActivations, activation);
}
std::string Parse(const std::string& name, DataFormat* data_format) {
  return ParseOne("data_format", name, kDataFormats, data_format);
}
const char* Name(Activation activation) { return kActivations[static_cast<int>(activation)]; }
const char* Name(DataFormat data_format) { return kDataFormats[static_cast<int>(data_format)]; }

std::string Show(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i ? ", " : "") + (dims[i] < 0 ? std::string("?") : std::to_string(dims[i]));
  }
  return text + "]";
}

DType SumsType(const Problem& problem) {
  return problem.logits_dtype == DType::kDouble ? DType::kDouble : DType::kFloat;
}

bool IsFloat(DType dtype) { return dtype >= DType::kHalf; }

const char* Name(DType dtype) {
  static constexpr const char* kNames[] = {"bool",  "uint8", "int8",     "uint16",  "int16",  "int32",
                                           "int64", "half",  "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}

std::string MakeProblem(const Dims& logits, const Dims& labels, const std::optional<Dims>& weight, Problem* problem) {
  const Options& options = problem->options;
  const bool last = options.data_format == DataFormat::kChannelsLast;
  const std::string layout = last ? "[batch, spatial..., classes]" : "[batch, classes, spatial...]";
  if (!IsFloat(problem->logits_dtype)) {
    return std::string("logits (y_pred) have dtype ") + Name(problem->logits_dtype) +
           ", but must be half, bfloat16, float32 or float64";
  }
  if (logits.size() < 2) {
    return "logits (y_pred) have shape " + Show(logits) + ", but must be at least of rank 2: " + layout;
  }
  if (!(options.focal_gamma >= 0) || std::isinf(options.focal_gamma)) {
    return "focal_gamma is " + std::to_string(options.focal_gamma) + ", but must be finite and at least 0";
  }
  const size_t rank = logits.size();
  const size_t axis = last ? rank - 1 : 1;
  Dims spatial = logits;  // [N, spatial...]
  spatial.erase(spatial.begin() + axis);
  const int64_t classes = logits[axis];

  // The shape says which kind the labels are. One channel is both: a mask of floats is t itself, and
  // reading one of integers as class indices checks its values as well.
  const bool one_channel = Match(WithoutUnitAxis(labels, rank, axis), spatial);
  const bool mask = Match(classes, 1) && IsFloat(problem->labels_dtype) && !options.has_ignore_label;
  const bool indices = one_channel && !mask;
  if (!one_channel && !Match(labels, logits)) {
    return "labels (y_true) have shape " + Show(labels) + ", but for logits (y_pred) of shape " + Show(logits) + " (" +
           (last ? "channels_last" : "channels_first") + ") they must be class indices of shape " + Show(spatial) +
           ", or one-hot or soft labels of shape " + Show(logits);
  }
  problem->dense_labels = !indices;
  if (options.has_ignore_label && problem->dense_labels) {
    return "ignore_label is " + std::to_string(options.ignore_label) +
           ", which needs class indices, but labels (y_true) hold one value per class: pass a "
           "voxel_weight (sample_weight) that is 0 where voxels are to be ignored";
  }
  if (weight && !Match(WithoutUnitAxis(*weight, rank, axis), spatial)) {
    return "voxel_weight (sample_weight) has shape " + Show(*weight) + ", but for logits (y_pred) of shape " +
           Show(logits) + " must have shape " + Show(spatial);
  }
  problem->batch = logits[0];
  problem->classes = classes;
  problem->voxels = Product(Dims(spatial.begin() + 1, spatial.end()));
  return "";
}

std::string DescribeBadLabel(const Problem& problem, const Dims& logits, const BadLabel& bad, const void* copy) {
  const bool last = problem.options.data_format == DataFormat::kChannelsLast;
  Dims spatial(logits.begin() + (last ? 1 : 2), logits.end() - (last ? 1 : 0));
  Dims position(spatial.size());
  int64_t rest = bad.voxel;
  for (size_t i = spatial.size(); i-- > 0; rest /= spatial[i]) position[i] = rest % spatial[i];
  position.insert(position.begin(), bad.sample);

  const std::string where = "labels (y_true) at voxel " + Show(position);
  if (problem.dense_labels) {
    return where + ": " + (IsFloat(problem.labels_dtype) ? "soft" : "one-hot") + " labels of dtype " +
           Name(problem.labels_dtype) + " must be " + (IsFloat(problem.labels_dtype) ? "in [0, 1]" : "0 or 1") +
           " for every class, but another value stands there; scale the masks (255 is common) or pass class "
           "indices";
  }
  bool whole = true;
  const std::string value = WithType(problem.labels_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T label = copy ? *static_cast<const T*>(copy)
                         : static_cast<const T*>(problem.labels)[bad.sample * problem.voxels + bad.voxel];
    if constexpr (std::is_integral_v<T>) {
      return std::to_string(label);
    } else {
      const double number = FromStorage<T, double>(label);
      whole = number == std::trunc(number) && std::abs(number) < 1e15;
      char text[32];
      std::snprintf(text, sizeof(text), "%.15g", number);
      return std::string(text);
    }
  });
  const std::string text = where + " have the value " + value + ", but must be " + (whole ? "" : "whole numbers ") +
                           "in [0, " + std::to_string(problem.label_limit()) + ")";
  if (problem.options.has_ignore_label) {
    return text + " or the ignore_label " + std::to_string(problem.options.ignore_label);
  }
  if (problem.classes == 1) return text + ": with one class they are a foreground mask; scale it (255 is common)";
  if (!whole) return text + "; soft labels have one value per class, as the logits have";
  return text + "; to leave such voxels out, pass ignore_label=" + value;
}

}  // namespace dice_op

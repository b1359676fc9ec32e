#include "core/problem.h"

#include <algorithm>
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

constexpr const char* kActivations[] = {"softmax", "sigmoid", "none", "argmax", "threshold"};
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

// [sample, spatial...] of a voxel.
std::string Place(const Problem& problem, const Dims& logits, const BadLabel& bad) {
  const bool last = problem.options.data_format == DataFormat::kChannelsLast;
  const Dims spatial(logits.begin() + (last ? 1 : 2), logits.end() - (last ? 1 : 0));
  Dims position(spatial.size());
  int64_t rest = bad.voxel;
  for (size_t i = spatial.size(); i-- > 0; rest /= spatial[i]) position[i] = rest % spatial[i];
  position.insert(position.begin(), bad.sample);
  return Show(position);
}

// What stands in a label map where no class does.
struct Found {
  std::string value;
  bool whole = true;
};
Found Find(DType dtype, const void* map, int64_t at) {
  return WithType(dtype, [&](auto type) -> Found {
    using T = typename decltype(type)::type;
    const T label = static_cast<const T*>(map)[at];
    if constexpr (std::is_integral_v<T>) {
      return {std::to_string(label)};
    } else {
      const double number = FromStorage<T, double>(label);
      char text[32];
      std::snprintf(text, sizeof(text), "%.15g", number);
      return {text, number == std::trunc(number) && std::abs(number) < 1e15};
    }
  });
}
std::string NoClass(const Problem& problem, const Found& found) {
  return " have the value " + found.value + ", but must be " + (found.whole ? "" : "whole numbers ") + "in [0, " +
         std::to_string(problem.label_limit()) + ")";
}

}  // namespace

std::string Parse(const std::string& name, Activation* activation) {
  return ParseOne("activation", name, kActivations, activation);
}
std::string Parse(const std::string& name, DataFormat* data_format) {
  return ParseOne("data_format", name, kDataFormats, data_format);
}
std::string RegionMasks(const std::vector<std::vector<int64_t>>& regions, std::vector<int64_t>* masks) {
  bool legal = regions.size() <= Options::kMaxRegions;
  masks->clear();
  for (size_t c = 0; legal && c < regions.size(); ++c) {
    legal = !regions[c].empty();
    for (int64_t label : regions[c]) {
      legal = legal && label >= 0 && label < Options::kMaxRegions;
      if (!legal) break;
      masks->resize(std::max<size_t>(masks->size(), label + 1));
      (*masks)[label] |= int64_t{1} << c;
    }
  }
  if (legal) return "";
  const std::string most = std::to_string(Options::kMaxRegions);
  return "regions must be the label values of each class: at least one, from 0 to " +
         std::to_string(Options::kMaxRegions - 1) + ", of at most " + most + " classes";
}
std::string SetRegions(const std::vector<int64_t>& masks, Options* options) {
  const auto outside = [](int64_t mask) { return mask < 0 || mask >> Options::kMaxRegions; };
  if (masks.size() > Options::kMaxRegions || std::any_of(masks.begin(), masks.end(), outside)) {
    const std::string most = std::to_string(Options::kMaxRegions);
    return "regions must be masks of at most " + most + " classes, of at most " + most + " label values";
  }
  options->region_labels = static_cast<int>(masks.size());
  std::copy(masks.begin(), masks.end(), options->regions);
  return "";
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
  const bool mask =
      Match(classes, 1) && IsFloat(problem->labels_dtype) && !options.has_ignore_label && !options.region_labels;
  const bool indices = one_channel && !mask;
  if (!one_channel && !Match(labels, logits)) {
    return "labels (y_true) have shape " + Show(labels) + ", but for logits (y_pred) of shape " + Show(logits) + " (" +
           (last ? "channels_last" : "channels_first") + ") they must be class indices of shape " + Show(spatial) +
           ", or one-hot or soft labels of shape " + Show(logits);
  }
  problem->dense_labels = !indices;
  if (problem->hard() && options.cross_entropy) {
    return std::string("activation '") + Name(options.activation) +
           "' gives zeros and ones, which have no cross-entropy: use 'softmax', 'sigmoid' or 'none'";
  }
  if (std::isnan(options.threshold)) return "threshold is NaN";
  if (!(options.label_smoothing >= 0 && options.label_smoothing <= 1)) {
    return "label_smoothing is " + std::to_string(options.label_smoothing) + ", but must be in [0, 1]";
  }
  if (options.region_labels) {
    uint64_t any = 0;  // the classes that have a label
    for (uint32_t classes_of_label : options.regions) any |= classes_of_label;
    int64_t regions = 0;
    while (any >> regions & 1) ++regions;
    if (any >> regions) return "class " + std::to_string(regions) + " of the regions has no label value";
    if (problem->dense_labels) {
      return "regions are sets of class indices, but labels (y_true) have shape " + Show(labels) +
             ": they must have shape " + Show(spatial);
    }
    if (!Match(classes, regions)) {
      return "there are " + std::to_string(regions) + " regions, but logits (y_pred) of shape " + Show(logits) + " (" +
             (last ? "channels_last" : "channels_first") + ") have " + std::to_string(classes) + " classes";
    }
    if (options.activation == Activation::kSoftmax || options.activation == Activation::kArgmax) {
      return std::string("activation is '") + Name(options.activation) +
             "', which gives a voxel one class, but regions overlap: use 'sigmoid' ('threshold' for scores)";
    }
  }
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

std::string CheckGradient(const Problem& problem) {
  if (!problem.hard()) return "";
  return std::string("activation '") + Name(problem.options.activation) + "' has no gradient: it gives zeros and ones";
}

std::string DescribeBadLabel(const Problem& problem, const Dims& logits, const BadLabel& bad, const void* copy) {
  const std::string where = "labels (y_true) at voxel " + Place(problem, logits, bad);
  if (problem.dense_labels) {
    return where + ": " + (IsFloat(problem.labels_dtype) ? "soft" : "one-hot") + " labels of dtype " +
           Name(problem.labels_dtype) + " must be " + (IsFloat(problem.labels_dtype) ? "in [0, 1]" : "0 or 1") +
           " for every class, but another value stands there; scale the masks (255 is common) or pass class "
           "indices";
  }
  const Found found = copy ? Find(problem.labels_dtype, copy, 0)
                           : Find(problem.labels_dtype, problem.labels, bad.sample * problem.voxels + bad.voxel);
  const std::string text = where + NoClass(problem, found);
  if (problem.options.has_ignore_label) {
    return text + " or the ignore_label " + std::to_string(problem.options.ignore_label);
  }
  if (problem.classes == 1 && !problem.options.region_labels)
    return text + ": with one class they are a foreground mask; scale it (255 is common)";
  if (!found.whole) return text + "; soft labels have one value per class, as the logits have";
  return text + "; to leave such voxels out, pass ignore_label=" + found.value;
}

std::string DescribeBadPrediction(const Problem& problem, const Dims& logits, const void* prediction, DType dtype,
                                  const BadLabel& bad) {
  const Found found = Find(dtype, prediction, bad.sample * problem.voxels + bad.voxel);
  return "predictions (y_pred) at voxel " + Place(problem, logits, bad) + NoClass(problem, found) +
         (found.whole ? "" : "; logits have a class axis, which labels that are class indices do not have");
}

}  // namespace dice_op

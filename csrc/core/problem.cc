#include "core/problem.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>

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

size_t ClassAxis(size_t rank, DataFormat data_format) {
  return data_format == DataFormat::kChannelsLast ? rank - 1 : 1;
}

// [N, spatial...] of the logits.
Dims WithoutClasses(Dims logits, DataFormat data_format) {
  logits.erase(logits.begin() + ClassAxis(logits.size(), data_format));
  return logits;
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
std::string Place(const Problem& problem, const Dims& logits, const BadValue& bad) {
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

// What a label map on the host holds.
struct Contents {
  std::set<double> strange;      // the first values that are no class, in order
  bool several_classes = false;  // class 0 and another
};
Contents Survey(const Problem& problem) {
  constexpr size_t kMost = 8;
  Contents contents;
  WithType(problem.labels_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const labels = static_cast<const T*>(problem.labels);
    bool background = false, foreground = false;
    for (int64_t i = 0; i < problem.batch * problem.voxels; ++i) {
      const double label = FromStorage<T, double>(labels[i]);
      if (!IsClass(label, static_cast<double>(problem.label_limit()))) {
        if (contents.strange.size() < kMost && label == label) contents.strange.insert(label);
      } else {
        (label == 0 ? background : foreground) = true;
      }
    }
    contents.several_classes = background && foreground;
  });
  return contents;
}

// What to do about a label that is a whole number, but no class. One strange value beside the classes marks voxels to
// be left out, as 255 often does; several, or the number after the last class, are classes that are numbered otherwise.
// A map that holds one class and one strange value may be either.
std::string AdviceFor(const Problem& problem, const std::string& value, bool on_host) {
  const std::string limit = std::to_string(problem.label_limit());
  const std::string ignore = "to leave such voxels out, pass ignore_label=" + value;
  if (problem.options.region_labels) return "; name the value in the regions that it belongs to, or, " + ignore;
  const std::string map = "; map the values to 0.." + std::to_string(problem.label_limit() - 1);
  if (!on_host) return map + ", or, " + ignore;
  const Contents contents = Survey(problem);
  if (contents.strange.size() == 1 && value != limit) {
    if (contents.several_classes) return "; " + ignore;
    if (problem.label_limit() > 2) return map + ", or, " + ignore;
  }
  std::string list;
  for (const double strange : contents.strange) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.15g", strange);
    list += (list.empty() ? "" : ", ") + std::string(text);
  }
  return map + (contents.strange.size() > 1 ? " (" + list + " are no classes)" : "") +
         (value == limit ? ", or give the model more than " + limit + " classes" : "");
}

// The place in the logits of a class of a voxel.
int64_t PlaceOf(const Problem& problem, const BadValue& bad, int64_t c) {
  const bool last = problem.options.data_format == DataFormat::kChannelsLast;
  return bad.sample * problem.voxels * problem.classes +
         (last ? bad.voxel * problem.classes + c : c * problem.voxels + bad.voxel);
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

bool HaveOneValuePerVoxel(const Dims& labels, const Dims& logits, DataFormat data_format) {
  const size_t rank = logits.size();
  return Match(WithoutUnitAxis(labels, rank, ClassAxis(rank, data_format)), WithoutClasses(logits, data_format));
}

std::string MakeProblem(const Dims& logits, const Dims& labels, const std::optional<Dims>& weight, Problem* problem) {
  const Options& options = problem->options;
  const bool last = options.data_format == DataFormat::kChannelsLast;
  const DataFormat other = last ? DataFormat::kChannelsFirst : DataFormat::kChannelsLast;
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
  const size_t rank = logits.size(), axis = ClassAxis(rank, options.data_format);
  const Dims spatial = WithoutClasses(logits, options.data_format);
  const int64_t classes = logits[axis];

  // The shape says which kind the labels are. One channel is both: a mask of floats is t itself, and
  // reading one of integers as class indices checks its values as well.
  const bool one_channel = HaveOneValuePerVoxel(labels, logits, options.data_format);
  const bool mask =
      Match(classes, 1) && IsFloat(problem->labels_dtype) && !options.has_ignore_label && !options.region_labels;
  const bool indices = one_channel && !mask;
  if (!one_channel && !Match(labels, logits)) {
    return "labels (y_true) have shape " + Show(labels) + ", but for logits (y_pred) of shape " + Show(logits) + " (" +
           Name(options.data_format) + ") they must be class indices of shape " + Show(spatial) +
           ", or one-hot or soft labels of shape " + Show(logits) +
           (HaveOneValuePerVoxel(labels, logits, other) ? std::string("; they fit data_format='") + Name(other) + "'"
                                                        : "");
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
             Name(options.data_format) + ") have " + std::to_string(classes) + " classes";
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

std::string DescribeBadValue(const Problem& problem, const Dims& logits, const BadValue& bad, const void* copy) {
  const std::string place = Place(problem, logits, bad);
  if (bad.in_prediction) {
    Found found;
    if (copy) found = Find(problem.logits_dtype, copy, 0);
    for (int64_t c = 0; !copy && c < problem.classes; ++c) {
      const int64_t at = PlaceOf(problem, bad, c);
      const bool probability = WithType(problem.logits_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return IsProbability(FromStorage<T, double>(static_cast<const T*>(problem.logits)[at]));
      });
      if (!probability) {
        found = Find(problem.logits_dtype, problem.logits, at);
        break;
      }
    }
    return "predictions (y_pred) at voxel " + place + " hold the value " + found.value +
           ", but activation='none' takes probabilities, in [0, 1]: if they are logits, pass activation='softmax' or "
           "'sigmoid'";
  }
  const std::string where = "labels (y_true) at voxel " + place;
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
  return text + AdviceFor(problem, found.value, !copy);
}

std::string DescribeBadPrediction(const Problem& problem, const Dims& logits, const void* prediction, DType dtype,
                                  const BadValue& bad) {
  const Found found = Find(dtype, prediction, bad.sample * problem.voxels + bad.voxel);
  return "predictions (y_pred) at voxel " + Place(problem, logits, bad) + NoClass(problem, found) +
         (found.whole ? "" : "; logits have a class axis, which labels that are class indices do not have");
}

}  // namespace dice_op

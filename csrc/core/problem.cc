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

// Removes the channel axis `axis` from `dims` if `dims` has this axis and its length is one.
Dims WithoutUnitAxis(Dims dims, size_t rank, size_t axis) {
  if (dims.size() == rank && Match(dims[axis], 1)) dims.erase(dims.begin() + axis);
  return dims;
}

// Returns the shape [N, spatial...] of the logits.
Dims WithoutClasses(Dims logits, DataFormat data_format) {
  logits.erase(logits.begin() + ClassAxis(logits.size(), data_format));
  return logits;
}

// Whether labels of this shape have one value per voxel of the logits. Otherwise they have one value per class.
bool HaveOneValuePerVoxel(const Dims& labels, const Dims& logits, DataFormat data_format) {
  const size_t rank = logits.size();
  return Match(WithoutUnitAxis(labels, rank, ClassAxis(rank, data_format)), WithoutClasses(logits, data_format));
}

// Returns the coordinates [sample, spatial...] of a voxel.
std::string Place(const Problem& problem, const BadValue& bad) {
  const bool last = problem.channels_last();
  const Dims& logits = problem.logits_dims;
  const Dims spatial(logits.begin() + (last ? 1 : 2), logits.end() - (last ? 1 : 0));
  Dims position(spatial.size());
  int64_t rest = bad.voxel;
  for (size_t i = spatial.size(); i-- > 0; rest /= spatial[i]) position[i] = rest % spatial[i];
  position.insert(position.begin(), bad.sample);
  return Show(position);
}

std::string Show(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.15g", number);
  return text;
}

// A value found in an array.
struct Found {
  std::string value;
  bool whole = true;
};
Found FoundAt(const void* place, DType dtype) {
  return WithType(dtype, [&](auto type) -> Found {
    using T = typename decltype(type)::type;
    const T value = *static_cast<const T*>(place);
    if constexpr (std::is_integral_v<T>) {
      return {std::to_string(value)};
    } else {
      const double number = FromStorage<T, double>(value);
      return {Show(number), number == std::trunc(number) && std::abs(number) < 1e15};
    }
  });
}
const void* At(const void* array, DType dtype, int64_t place) {
  return static_cast<const char*>(array) + place * SizeOf(dtype);
}
std::string NoClass(const Problem& problem, const Found& found) {
  const int64_t end = problem.has_label_sets() ? problem.classes : problem.label_limit();
  return " have the value " + found.value + ", but must be " + (found.whole ? "" : "whole numbers ") + "in [0, " +
         std::to_string(end) + ")";
}
// The label values that label_sets name, as in "200, 201".
std::string NamesOf(const LabelSets& label_sets) {
  std::string names;
  for (int label = 0; label < label_sets.labels; ++label) {
    if (label_sets.set_of[label]) names += (names.empty() ? "" : ", ") + std::to_string(label);
  }
  return names;
}

// A summary of the values in a label map on the host.
struct Contents {
  std::set<double> strange;      // the first values that are not classes, in order
  bool several_classes = false;  // class 0 and another one occur
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
      if (!IsClass(label, static_cast<double>(problem.label_limit())) ||
          !problem.HasMeaning(static_cast<int64_t>(label))) {
        if (contents.strange.size() < kMost && label == label) contents.strange.insert(label);
      } else {
        (label == 0 ? background : foreground) = true;
      }
    }
    contents.several_classes = background && foreground;
  });
  return contents;
}

// Says what to do about a label that is a whole number, but not a class. If there is only one such value beside the
// classes, it probably marks voxels to be left out, as 255 often does. Several such values, or the number after the
// last class, are probably classes that are numbered differently. A map of one class and one such value may be either.
std::string AdviceFor(const Problem& problem, const std::string& value, bool on_host) {
  const std::string limit = std::to_string(problem.label_limit());
  const std::string ignore = "to leave such voxels out, pass ignore_label=" + value;
  if (problem.has_regions()) return "; name the value in the regions that it belongs to, or, " + ignore;
  if (problem.has_label_sets()) {
    return "; name the value there with the classes that it may stand for, or, " + ignore;
  }
  const std::string map = "; map the values to 0.." + std::to_string(problem.label_limit() - 1);
  if (!on_host) return map + ", or, " + ignore;
  const Contents contents = Survey(problem);
  if (contents.strange.size() == 1 && value != limit) {
    if (contents.several_classes) return "; " + ignore;
    if (problem.label_limit() > 2) return map + ", or, " + ignore;
  }
  std::string list;
  for (const double strange : contents.strange) list += (list.empty() ? "" : ", ") + Show(strange);
  return map + (contents.strange.size() > 1 ? " (" + list + " are no classes)" : "") +
         (value == limit ? ", or give the model more than " + limit + " classes" : "");
}

}  // namespace

size_t ClassAxis(size_t rank, DataFormat data_format) {
  return data_format == DataFormat::kChannelsLast ? rank - 1 : 1;
}

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

Error MakeProblem(const Dims& logits, const Dims& labels, const std::optional<Dims>& weight, Problem* problem) {
  const Options& options = problem->options;
  const bool last = problem->channels_last();
  const DataFormat other = last ? DataFormat::kChannelsFirst : DataFormat::kChannelsLast;
  const std::string layout = last ? "[batch, spatial..., classes]" : "[batch, classes, spatial...]";
  if (!IsFloat(problem->logits_dtype)) {
    return InvalidArgument(std::string("logits (y_pred) have dtype ") + Name(problem->logits_dtype) +
                           ", but must be half, bfloat16, float32 or float64");
  }
  if (logits.size() < 2) {
    return InvalidArgument("logits (y_pred) have shape " + Show(logits) +
                           ", but must be at least of rank 2: " + layout);
  }
  DICE_OP_RETURN_IF_ERROR(CheckRanges(options));
  const size_t rank = logits.size(), axis = ClassAxis(rank, options.data_format);
  const Dims spatial = WithoutClasses(logits, options.data_format);
  const int64_t classes = logits[axis];

  // The shape tells which kind the labels are. With one channel it fits both kinds: a mask of floats is then t itself,
  // and a mask of integers is read as class indices, which also checks its values.
  const bool one_channel = HaveOneValuePerVoxel(labels, logits, options.data_format);
  const bool mask = Match(classes, 1) && IsFloat(problem->labels_dtype) && !options.ignore_label.given &&
                    !problem->has_regions() && !problem->has_label_sets();
  const bool indices = one_channel && !mask;
  if (!one_channel && !Match(labels, logits)) {
    return InvalidArgument("labels (y_true) have shape " + Show(labels) + ", but for logits (y_pred) of shape " +
                           Show(logits) + " (" + ToAttribute(options.data_format) +
                           ") they must be class indices of shape " + Show(spatial) +
                           ", or one-hot or soft labels of shape " + Show(logits) +
                           (HaveOneValuePerVoxel(labels, logits, other)
                                ? std::string("; they fit data_format='") + ToAttribute(other) + "'"
                                : ""));
  }
  problem->dense_labels = !indices;
  if (problem->hard() && options.cross_entropy) {
    return InvalidArgument(std::string("activation '") + ToAttribute(options.activation) +
                           "' gives zeros and ones, which have no cross-entropy: use 'softmax', 'sigmoid' or 'none'");
  }
  if (problem->has_regions() && problem->has_label_sets()) {
    return InvalidArgument("regions and label_sets cannot be combined: label_sets are for classes that do not overlap");
  }
  if ((problem->has_regions() || problem->has_label_sets()) && problem->dense_labels) {
    const bool regions = problem->has_regions();
    return InvalidArgument(
        std::string(regions ? "regions are sets of class indices" : "label_sets are for class indices") +
        ", but labels (y_true) have shape " + Show(labels) + ": they must have shape " + Show(spatial));
  }
  if (problem->has_regions()) {
    const int64_t regions = options.regions.classes;
    for (int c = 0; c < regions; ++c) {
      bool named = false;
      for (int label = 0; label < options.regions.labels; ++label) {
        named |= options.regions.Holds(options.regions.set_of[label], c);
      }
      if (!named) return InvalidArgument("class " + std::to_string(c) + " of the regions has no label value");
    }
    if (!Match(classes, regions)) {
      return InvalidArgument("there are " + std::to_string(regions) + " regions, but logits (y_pred) of shape " +
                             Show(logits) + " (" + ToAttribute(options.data_format) + ") have " +
                             std::to_string(classes) + " classes");
    }
    if (options.activation == Activation::kSoftmax || options.activation == Activation::kArgmax) {
      return InvalidArgument(
          std::string("activation is '") + ToAttribute(options.activation) +
          "', which gives a voxel one class, but regions overlap: use 'sigmoid' ('threshold' for scores)");
    }
  }
  if (problem->has_label_sets()) {
    if (classes == 1) {
      return InvalidArgument(
          "label_sets need two classes or more; with one class, pass ignore_label for voxels that may be foreground");
    }
    if (classes >= 0 && options.label_sets.classes > classes) {
      return InvalidArgument("label_sets name class " + std::to_string(options.label_sets.classes - 1) +
                             ", but logits (y_pred) of shape " + Show(logits) + " (" +
                             ToAttribute(options.data_format) + ") have " + std::to_string(classes) + " classes");
    }
    const int64_t ignored = options.ignore_label.value;
    if (options.ignore_label.given && ignored >= 0 && ignored < options.label_sets.labels &&
        options.label_sets.set_of[ignored]) {
      return InvalidArgument("ignore_label " + std::to_string(ignored) +
                             " is also in label_sets: name it in one of them");
    }
  }
  if (problem->has_distances()) {
    const int64_t count = options.dist_matrix.classes;
    if (!Match(classes, count) || count < 2) {
      return InvalidArgument(
          "dist_matrix has " + std::to_string(count) + " rows, but logits (y_pred) of shape " + Show(logits) + " (" +
          ToAttribute(options.data_format) + ") " +
          (Match(classes, count) ? "must have two classes or more" : "have " + std::to_string(classes) + " classes"));
    }
    if (options.activation != Activation::kSoftmax && options.activation != Activation::kNone) {
      return InvalidArgument("activation is '" + ToAttribute(options.activation) +
                             "', but dist_matrix takes probabilities that add up to 1: use 'softmax' or 'none'");
    }
    if (problem->dense_labels) {
      return InvalidArgument("dist_matrix takes class indices, but labels (y_true) have shape " + Show(labels) +
                             ": they must have shape " + Show(spatial) + ", as tf.argmax gives for one-hot labels");
    }
    if (problem->has_regions() || problem->has_label_sets()) {
      return InvalidArgument(std::string("dist_matrix and ") + (problem->has_regions() ? "regions" : "label_sets") +
                             " cannot be combined: a voxel must have one class");
    }
  }
  if (options.focal_gammas.count > 0 && !Match(classes, options.focal_gammas.count)) {
    return InvalidArgument("focal_gamma has " + std::to_string(options.focal_gammas.count) +
                           " exponents, but logits (y_pred) of shape " + Show(logits) + " (" +
                           ToAttribute(options.data_format) + ") have " + std::to_string(classes) + " classes");
  }
  if (options.ignore_label.given && problem->dense_labels) {
    return InvalidArgument("ignore_label is " + std::to_string(options.ignore_label.value) +
                           ", which needs class indices, but labels (y_true) hold one value per class: pass a "
                           "voxel_weight (sample_weight) that is 0 where voxels are to be ignored");
  }
  if (weight && !Match(WithoutUnitAxis(*weight, rank, axis), spatial)) {
    return InvalidArgument("voxel_weight (sample_weight) has shape " + Show(*weight) +
                           ", but for logits (y_pred) of shape " + Show(logits) + " must have shape " + Show(spatial));
  }
  problem->logits_dims = logits;
  problem->batch = logits[0];
  problem->classes = classes;
  problem->voxels = Product(Dims(spatial.begin() + 1, spatial.end()));
  return {};
}

bool HasFractions(const Problem& problem) {
  if (!problem.soft_labels()) return false;
  constexpr int64_t kMost = 4096;
  return WithType(problem.labels_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const labels = static_cast<const T*>(problem.labels);
    const int64_t count = problem.logits_count();
    for (int64_t i = 0; i < count; i += 1 + count / kMost) {
      const double label = FromStorage<T, double>(labels[i]);
      if (label > 0 && label < 1) return true;
    }
    return false;
  });
}

Error CheckGradient(const Problem& problem) {
  if (!problem.hard()) return {};
  return InvalidArgument("activation '" + ToAttribute(problem.options.activation) +
                         "' has no gradient: it gives zeros and ones");
}

Error FindLabelKind(const Dims& logits, const Dims& labels, Problem problem, LabelKind* kind) {
  problem.options.activation = Activation::kSigmoid;  // an activation that is legal with regions
  DICE_OP_RETURN_IF_ERROR(MakeProblem(logits, labels, {}, &problem));
  const size_t axis = ClassAxis(logits.size(), problem.options.data_format);
  // If the length of the channel axis is not known, one value per class is more likely than length 1.
  const bool unknown_channels = labels.size() == logits.size() && labels[axis] < 0 && logits[axis] != 1;
  *kind = unknown_channels                                                    ? LabelKind::kPerClass
          : !problem.dense_labels                                             ? LabelKind::kIndices
          : HaveOneValuePerVoxel(labels, logits, problem.options.data_format) ? LabelKind::kMask
                                                                              : LabelKind::kPerClass;
  return {};
}

Error ErrorOf(const BadValue& bad, const Problem& problem, const CopyToHost& copy) {
  if (bad.sample < 0) return {};
  const std::string place = Place(problem, bad);
  int64_t held = 0;  // has room for a value of any type
  const auto on_host = [&](const void* from, DType dtype, const void** value) -> Error {
    *value = copy ? &held : from;
    return copy ? copy(&held, from, SizeOf(dtype)) : Error{};
  };
  const void* value = nullptr;
  if (bad.in_prediction) {
    for (int64_t c = 0; c < problem.classes; ++c) {
      const int64_t at = PlaceInLogits(problem, bad.sample, bad.voxel, c);
      DICE_OP_RETURN_IF_ERROR(on_host(At(problem.logits, problem.logits_dtype, at), problem.logits_dtype, &value));
      const bool probability = WithType(problem.logits_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        return IsProbability(FromStorage<T, double>(*static_cast<const T*>(value)));
      });
      if (!probability) break;
    }
    return InvalidArgument("predictions (y_pred) at voxel " + place + " hold the value " +
                           FoundAt(value, problem.logits_dtype).value +
                           ", but activation='none' takes probabilities, in [0, 1]: if they are logits, pass "
                           "activation='softmax' or 'sigmoid'");
  }
  const std::string where = "labels (y_true) at voxel " + place;
  if (problem.dense_labels) {
    const bool soft = IsFloat(problem.labels_dtype);
    return InvalidArgument(where + ": " + (soft ? "soft" : "one-hot") + " labels of dtype " +
                           Name(problem.labels_dtype) + " must be " + (soft ? "in [0, 1]" : "0 or 1") +
                           " for every class, but another value stands there; scale the masks (255 is common) or pass "
                           "class indices");
  }
  const int64_t at = bad.sample * problem.voxels + bad.voxel;
  DICE_OP_RETURN_IF_ERROR(on_host(At(problem.labels, problem.labels_dtype, at), problem.labels_dtype, &value));
  const Found found = FoundAt(value, problem.labels_dtype);
  std::string text = where + NoClass(problem, found);
  if (problem.has_label_sets()) text += ", or one of label_sets (" + NamesOf(problem.options.label_sets) + ")";
  if (problem.options.ignore_label.given) {
    return InvalidArgument(text + " or the ignore_label " + std::to_string(problem.options.ignore_label.value));
  }
  if (problem.classes == 1 && !problem.has_regions()) {
    return InvalidArgument(text + ": with one class they are a foreground mask; scale it (255 is common)");
  }
  if (!found.whole) return InvalidArgument(text + "; soft labels have one value per class, as the logits have");
  return InvalidArgument(text + AdviceFor(problem, found.value, !copy));
}

Error ErrorOfPrediction(const BadValue& bad, const Problem& problem, const void* prediction, DType dtype) {
  if (bad.sample < 0) return {};
  const Found found = FoundAt(At(prediction, dtype, bad.sample * problem.voxels + bad.voxel), dtype);
  return InvalidArgument(
      "predictions (y_pred) at voxel " + Place(problem, bad) + NoClass(problem, found) +
      (found.whole ? "" : "; logits have a class axis, which labels that are class indices do not have"));
}

}  // namespace dice_op

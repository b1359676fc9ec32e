// The options of a call. One list gives the name, type, default and legal range of each, and every front end uses it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"

namespace dice_op {

// The last two give 0 or 1 and are used for scores. They have neither a cross-entropy nor a gradient.
enum class Activation : int { kSoftmax, kSigmoid, kNone, kArgmax, kThreshold };
enum class DataFormat : int { kChannelsLast, kChannelsFirst };

// The class index that marks voxels to be left out, if there is one.
struct IgnoreLabel {
  bool given = false;
  int64_t value = 0;
};

// Classes that are overlapping regions. Each region is a set of label values: bit c of classes_of[label] says that the
// label belongs to class c. The legal labels are 0 to labels - 1. If `labels` is 0 there are no regions, and the label
// values are the classes.
struct Regions {
  static constexpr int kMost = 32;
  int labels = 0;
  uint32_t classes_of[kMost] = {};
};

struct Options {
  Activation activation = Activation::kSoftmax;
  DataFormat data_format = DataFormat::kChannelsLast;
  bool squared_pred = false;     // the cardinalities are sum p^2 and sum t^2
  bool soft_label = false;       // the intersection is sum min(p, t) if t may be a fraction
  bool cross_entropy = false;    // the cross-entropy is summed too
  double focal_gamma = 0.0;      // its focal exponent; 0 is plain cross-entropy
  double label_smoothing = 0.0;  // s: its labels are (1 - s) t + s / C, or (1 - s) t + s / 2 for sigmoid
  double threshold = 0.0;        // for the activation 'threshold': logits above it count as 1
  IgnoreLabel ignore_label;
  Regions regions;
};

template <class T>
using Member = T Options::*;

template <class T>
struct Option {
  using Type = T;
  const char* name;  // in Python
  Member<T> value;
  const char* attribute = name;  // of TensorFlow's op and XLA's handlers
};

// A number and its legal range. NaN is never legal.
template <>
struct Option<double> {
  using Type = double;
  const char* name;
  Member<double> value;
  double least, most;
  const char* range;  // in words that follow "must be"
  const char* attribute = name;
};

// Add a new number behind all others, and keep their order: saved graphs of TensorFlow refer to them by their position.
inline constexpr auto kOptions = std::make_tuple(
    Option<Activation>{"activation", &Options::activation},                        //
    Option<DataFormat>{"data_format", &Options::data_format},                      //
    Option<bool>{"squared_pred", &Options::squared_pred},                          //
    Option<bool>{"soft_label", &Options::soft_label},                              //
    Option<bool>{"cross_entropy", &Options::cross_entropy, "with_cross_entropy"},  // an output is named cross_entropy
    Option<double>{"focal_gamma", &Options::focal_gamma, 0, std::numeric_limits<double>::max(),
                   "finite and at least 0"},
    Option<double>{"label_smoothing", &Options::label_smoothing, 0, 1, "in [0, 1]"},
    Option<double>{"threshold", &Options::threshold, -std::numeric_limits<double>::infinity(),
                   std::numeric_limits<double>::infinity(), "a number"},
    Option<IgnoreLabel>{"ignore_label", &Options::ignore_label},  //
    Option<Regions>{"regions", &Options::regions});

// Calls fn(option) for each option, in order.
template <class Fn>
void ForEachOption(Fn&& fn) {
  std::apply([&](const auto&... option) { (fn(option), ...); }, kOptions);
}

#pragma GCC visibility push(default)  // dice_op_kernels.so exports what follows

// These convert an option to and from an attribute of TensorFlow's op or of XLA's handlers. A choice is a string
// ("softmax", "channels_first"). An ignore_label is a list with one element, or empty. Regions are a list of masks: bit
// c of the mask at index v says that the label value v belongs to class c. Numbers and booleans stay the same.
std::string ToAttribute(Activation activation);
std::string ToAttribute(DataFormat data_format);
std::vector<int64_t> ToAttribute(const IgnoreLabel& ignore_label);
std::vector<int64_t> ToAttribute(const Regions& regions);
inline bool ToAttribute(bool value) { return value; }
inline double ToAttribute(double value) { return value; }

Error FromAttribute(const std::string& name, Activation* activation);
Error FromAttribute(const std::string& name, DataFormat* data_format);
Error FromAttribute(const std::vector<int64_t>& values, IgnoreLabel* ignore_label);
Error FromAttribute(const std::vector<int64_t>& masks, Regions* regions);
inline Error FromAttribute(bool attribute, bool* value) {
  *value = attribute;
  return {};
}
inline Error FromAttribute(double attribute, double* value) {
  *value = attribute;
  return {};
}

template <class T>
using AttributeOf = decltype(ToAttribute(std::declval<T>()));

// Makes regions from the label values of each class.
Error RegionsOf(const std::vector<std::vector<int64_t>>& labels_of_classes, Regions* regions);

// Returns an error if a number is not in its range.
Error CheckRanges(const Options& options);

#pragma GCC visibility pop

}  // namespace dice_op

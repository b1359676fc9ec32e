// The options of a call. One list gives the name, type, default and legal range of each, and every front end uses it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/inline.h"

namespace dice_op {

// The last two give 0 or 1 and are used for scores. They have neither a cross-entropy nor a gradient.
enum class Activation : int { kSoftmax, kSigmoid, kNone, kArgmax, kThreshold };
enum class DataFormat : int { kChannelsLast, kChannelsFirst };

// The class index that marks voxels to be left out, if there is one.
struct IgnoreLabel {
  bool given = false;
  int64_t value = 0;
};

// For each label value, a set of classes. Equal sets are stored once, and set 0 is empty. The tables are small enough
// to be a parameter of a CUDA kernel.
struct ClassSets {
  static constexpr int kMostLabels = 256, kMostWords = 512;
  static constexpr int kAlone = 1 << 15;  // marks an entry of set_of that is a class, and not a set
  int labels = 0;                         // the values 0 to labels - 1 may have a set; 0 if there are no sets
  int classes = 0;                        // the classes that are named are below it
  int words = 0;                          // of 32 classes each, for every set; later classes are in none
  uint16_t set_of[kMostLabels] = {};
  uint32_t bits[kMostWords] = {};

  DICE_OP_INLINE bool Holds(int set, int c) const {
    return c / 32 < words && (bits[set * words + c / 32] >> (c % 32) & 1);
  }
};

// Classes that are overlapping regions: a voxel belongs to all classes in the set of its label value. The legal values
// are 0 to labels - 1. Without regions, the label values are the classes.
struct Regions : ClassSets {};

// Label values of voxels that belong to one of several classes, and nobody knows to which. Set 0 means that a value has
// its usual meaning. A set of one class is stored as that class.
struct LabelSets : ClassSets {
  // Returns the class that a label value stands for, or `total` + its set, or -1 if it stands for nothing. `total` is
  // the number of classes.
  DICE_OP_INLINE int IndexOf(int label, int total) const {
    const int entry = label < kMostLabels ? set_of[label] : 0;
    return entry >= kAlone ? entry - kAlone : entry > 0 ? total + entry : label < total ? label : -1;
  }
};

// The focal exponent of each class, if they are not all the same.
struct FocalGammas {
  static constexpr int kMost = 256;
  int count = 0;  // of classes; 0 if there is one exponent for all
  float values[kMost] = {};
};

// How far each class is from each other one, for generalized Wasserstein Dice: [C, C], the row is the label's class.
struct DistMatrix {
  int classes = 0;  // C, or 0 if there is no matrix
  std::vector<float> values;
};

struct Options {
  Activation activation = Activation::kSoftmax;
  DataFormat data_format = DataFormat::kChannelsLast;
  bool squared_pred = false;     // the cardinalities are sum p^2 and sum t^2
  bool soft_label = false;       // the intersection is sum min(p, t) if t may be a fraction
  bool cross_entropy = false;    // the cross-entropy is summed too
  double focal_gamma = 0.0;      // its focal exponent; 0 is plain cross-entropy
  FocalGammas focal_gammas;      // used instead if there are any
  double label_smoothing = 0.0;  // s: its labels are (1 - s) t + s / C, or (1 - s) t + s / 2 for sigmoid
  double threshold = 0.0;        // for the activation 'threshold': logits above it count as 1
  IgnoreLabel ignore_label;
  Regions regions;
  LabelSets label_sets;
  DistMatrix dist_matrix;
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
    Option<double>{"focal_gamma", &Options::focal_gamma, 0, std::numeric_limits<float>::max(),
                   "from 0 to 3.4e38, the largest float32"},
    Option<double>{"label_smoothing", &Options::label_smoothing, 0, 1, "in [0, 1]"},
    Option<double>{"threshold", &Options::threshold, -std::numeric_limits<double>::infinity(),
                   std::numeric_limits<double>::infinity(), "a number"},
    Option<IgnoreLabel>{"ignore_label", &Options::ignore_label},  //
    Option<Regions>{"regions", &Options::regions},                //
    Option<LabelSets>{"label_sets", &Options::label_sets},        //
    Option<FocalGammas>{"focal_gammas", &Options::focal_gammas},  //
    Option<DistMatrix>{"dist_matrix", &Options::dist_matrix});

// Calls fn(option) for each option, in order.
template <class Fn>
void ForEachOption(Fn&& fn) {
  std::apply([&](const auto&... option) { (fn(option), ...); }, kOptions);
}

#pragma GCC visibility push(default)  // dice_op_kernels.so exports what follows

// These convert an option to and from an attribute of TensorFlow's op or of XLA's handlers. Numbers and booleans stay
// the same.
//   A choice is a string ("softmax", "channels_first").
//   An ignore_label is a list with one element, or empty.
//   Regions are a list of masks: bit c of the mask at index v says that the label value v belongs to class c. With more
//   than 32 classes, the list starts with -n, and each label value has n masks of 32 classes.
//   Label sets are a list that holds for each of them its label value, the number of its classes, and the classes.
//   Focal exponents are a list.
//   A matrix of distances is a list of its rows, one after the other.
std::string ToAttribute(Activation activation);
std::string ToAttribute(DataFormat data_format);
std::vector<int64_t> ToAttribute(const IgnoreLabel& ignore_label);
std::vector<int64_t> ToAttribute(const Regions& regions);
std::vector<int64_t> ToAttribute(const LabelSets& label_sets);
std::vector<float> ToAttribute(const FocalGammas& gammas);
std::vector<float> ToAttribute(const DistMatrix& matrix);
inline bool ToAttribute(bool value) { return value; }
inline double ToAttribute(double value) { return value; }

Error FromAttribute(const std::string& name, Activation* activation);
Error FromAttribute(const std::string& name, DataFormat* data_format);
Error FromAttribute(const std::vector<int64_t>& values, IgnoreLabel* ignore_label);
Error FromAttribute(const std::vector<int64_t>& masks, Regions* regions);
Error FromAttribute(const std::vector<int64_t>& list, LabelSets* label_sets);
Error FromAttribute(const std::vector<float>& values, FocalGammas* gammas);
Error FromAttribute(const std::vector<float>& values, DistMatrix* matrix);
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

// Makes label sets from label values and their classes.
Error LabelSetsOf(const std::vector<std::pair<int64_t, std::vector<int64_t>>>& classes_of_labels,
                  LabelSets* label_sets);

// Makes a matrix of distances from its rows.
Error DistMatrixOf(const std::vector<std::vector<float>>& rows, DistMatrix* matrix);

// Returns an error if a number is not in its range.
Error CheckRanges(const Options& options);

#pragma GCC visibility pop

}  // namespace dice_op

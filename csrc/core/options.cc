#include "core/options.h"

#include <algorithm>
#include <map>
#include <set>
#include <type_traits>

namespace dice_op {
namespace {

constexpr const char* kActivations[] = {"softmax", "sigmoid", "none", "argmax", "threshold"};
constexpr const char* kDataFormats[] = {"channels_last", "channels_first"};

template <class E, size_t kCount>
Error ChoiceOf(const char* option, const std::string& name, const char* const (&names)[kCount], E* value) {
  std::string allowed;
  for (size_t i = 0; i < kCount; ++i) {
    *value = static_cast<E>(i);
    if (name == names[i]) return {};
    allowed += (i ? ", '" : "'") + std::string(names[i]) + "'";
  }
  return InvalidArgument(std::string(option) + " is '" + name + "', but must be one of " + allowed);
}

using ClassesOfLabels = std::map<int64_t, std::set<int64_t>>;

// Fills in the sets, each stored once. Returns an error if there are too many of them.
Error Store(const char* option, const ClassesOfLabels& classes_of_labels, ClassSets* sets) {
  *sets = {};
  std::map<std::set<int64_t>, int> numbers = {{{}, 0}};  // of the different sets
  for (const auto& [label, classes] : classes_of_labels) {
    sets->labels = std::max(sets->labels, static_cast<int>(label) + 1);
    if (!classes.empty()) sets->classes = std::max(sets->classes, static_cast<int>(*classes.rbegin()) + 1);
    numbers.emplace(classes, static_cast<int>(numbers.size()));
  }
  sets->words = (sets->classes + 31) / 32;
  if (static_cast<int>(numbers.size()) * sets->words > ClassSets::kMostWords) {
    return InvalidArgument(std::string(option) + " make " + std::to_string(numbers.size() - 1) + " different sets of " +
                           std::to_string(sets->classes) + " classes, but at most " +
                           std::to_string(std::max(0, ClassSets::kMostWords / sets->words - 1)) + " are possible");
  }
  for (const auto& [classes, number] : numbers) {
    for (const int64_t c : classes) sets->bits[number * sets->words + c / 32] |= uint32_t{1} << c % 32;
  }
  for (const auto& [label, classes] : classes_of_labels) {
    sets->set_of[label] = static_cast<uint16_t>(numbers[classes]);
  }
  return {};
}

bool IsLabel(int64_t label) { return label >= 0 && label < ClassSets::kMostLabels; }
bool IsClassIndex(int64_t c) { return c >= 0 && c < ClassSets::kAlone; }
std::string MostLabel() { return std::to_string(ClassSets::kMostLabels - 1); }

// The classes in a set.
std::vector<int64_t> ClassesIn(const ClassSets& sets, int set) {
  std::vector<int64_t> classes;
  for (int c = 0; c < sets.classes; ++c) {
    if (sets.Holds(set, c)) classes.push_back(c);
  }
  return classes;
}

}  // namespace

std::string ToAttribute(Activation activation) { return kActivations[static_cast<int>(activation)]; }
std::string ToAttribute(DataFormat data_format) { return kDataFormats[static_cast<int>(data_format)]; }
std::vector<int64_t> ToAttribute(const IgnoreLabel& ignore_label) {
  return std::vector<int64_t>(ignore_label.given ? 1 : 0, ignore_label.value);
}
std::vector<int64_t> ToAttribute(const Regions& regions) {
  std::vector<int64_t> masks;
  if (regions.words > 1) masks.push_back(-regions.words);
  for (int label = 0; label < regions.labels; ++label) {
    const uint32_t* const bits = regions.bits + regions.set_of[label] * regions.words;
    masks.insert(masks.end(), bits, bits + regions.words);
  }
  return masks;
}
std::vector<int64_t> ToAttribute(const LabelSets& label_sets) {
  std::vector<int64_t> list;
  for (int label = 0; label < label_sets.labels; ++label) {
    const int entry = label_sets.set_of[label];
    if (entry == 0) continue;
    const bool alone = entry >= ClassSets::kAlone;
    const std::vector<int64_t> classes =
        alone ? std::vector<int64_t>{entry - ClassSets::kAlone} : ClassesIn(label_sets, entry);
    list.insert(list.end(), {label, static_cast<int64_t>(classes.size())});
    list.insert(list.end(), classes.begin(), classes.end());
  }
  return list;
}
std::vector<float> ToAttribute(const FocalGammas& gammas) { return {gammas.values, gammas.values + gammas.count}; }
std::vector<float> ToAttribute(const DistMatrix& matrix) { return matrix.values; }

Error FromAttribute(const std::string& name, Activation* activation) {
  return ChoiceOf("activation", name, kActivations, activation);
}
Error FromAttribute(const std::string& name, DataFormat* data_format) {
  return ChoiceOf("data_format", name, kDataFormats, data_format);
}
Error FromAttribute(const std::vector<int64_t>& values, IgnoreLabel* ignore_label) {
  if (values.size() > 1) return InvalidArgument("ignore_label has several values, but must have none or one");
  ignore_label->given = !values.empty();
  ignore_label->value = values.empty() ? 0 : values[0];
  return {};
}
Error FromAttribute(const std::vector<int64_t>& masks, Regions* regions) {
  const bool many = !masks.empty() && masks[0] < 0;
  const size_t words = many ? static_cast<size_t>(std::min<int64_t>(-(masks[0] + 1), ClassSets::kMostWords)) + 1 : 1;
  const size_t count = masks.size() - many;
  const auto is_mask = [](int64_t mask) { return mask >= 0 && mask <= UINT32_MAX; };
  if (count % words || count / words > ClassSets::kMostLabels ||
      !std::all_of(masks.begin() + many, masks.end(), is_mask)) {
    return InvalidArgument("regions must be masks of 32 classes, for each label value from 0 to at most " +
                           MostLabel());
  }
  ClassesOfLabels classes_of_labels;
  for (size_t i = 0; i < count; ++i) {
    std::set<int64_t>& classes = classes_of_labels[i / words];
    for (int bit = 0; bit < 32; ++bit) {
      if (masks[i + many] >> bit & 1) classes.insert(i % words * 32 + bit);
    }
  }
  return Store("regions", classes_of_labels, regions);
}
Error FromAttribute(const std::vector<int64_t>& list, LabelSets* label_sets) {
  std::vector<std::pair<int64_t, std::vector<int64_t>>> classes_of_labels;
  for (size_t at = 0; at < list.size();) {
    const int64_t left = static_cast<int64_t>(list.size() - at) - 2;
    if (left < 0 || list[at + 1] < 0 || list[at + 1] > left) {
      return InvalidArgument(
          "label_sets must be a list that holds, for each label value, the value, the number of its classes, and the "
          "classes");
    }
    const auto first = list.begin() + at + 2;
    classes_of_labels.push_back({list[at], {first, first + list[at + 1]}});
    at += 2 + list[at + 1];
  }
  return LabelSetsOf(classes_of_labels, label_sets);
}
Error FromAttribute(const std::vector<float>& values, FocalGammas* gammas) {
  const auto outside = [](float gamma) { return !(gamma >= 0 && gamma <= std::numeric_limits<float>::max()); };
  if (std::any_of(values.begin(), values.end(), outside)) {
    return InvalidArgument("every focal_gamma must be finite and at least 0");
  }
  if (values.size() > FocalGammas::kMost) {
    return InvalidArgument("focal_gamma has " + std::to_string(values.size()) + " exponents, but at most " +
                           std::to_string(FocalGammas::kMost) + " classes may have one each");
  }
  gammas->count = static_cast<int>(values.size());
  std::copy(values.begin(), values.end(), gammas->values);
  return {};
}

Error FromAttribute(const std::vector<float>& values, DistMatrix* matrix) {
  size_t classes = 0;
  while (classes * classes < values.size()) ++classes;
  if (classes * classes != values.size()) {
    return InvalidArgument("dist_matrix has " + std::to_string(values.size()) +
                           " distances, but must have one for each pair of classes");
  }
  std::vector<std::vector<float>> rows;
  for (auto row = values.begin(); row != values.end(); row += static_cast<std::ptrdiff_t>(classes)) {
    rows.emplace_back(row, row + static_cast<std::ptrdiff_t>(classes));
  }
  return DistMatrixOf(rows, matrix);
}

Error RegionsOf(const std::vector<std::vector<int64_t>>& labels_of_classes, Regions* regions) {
  ClassesOfLabels classes_of_labels;
  bool legal = labels_of_classes.size() < ClassSets::kAlone;
  for (size_t c = 0; c < labels_of_classes.size(); ++c) {
    legal = legal && !labels_of_classes[c].empty();
    for (const int64_t label : labels_of_classes[c]) {
      legal = legal && IsLabel(label);
      classes_of_labels[label].insert(static_cast<int64_t>(c));
    }
  }
  if (!legal) {
    return InvalidArgument("regions must be the label values of each class: at least one, from 0 to " + MostLabel());
  }
  if (!classes_of_labels.empty()) {  // the values below the largest are legal too
    for (int64_t label = classes_of_labels.rbegin()->first; label-- > 0;) classes_of_labels[label];
  }
  return Store("regions", classes_of_labels, regions);
}

Error LabelSetsOf(const std::vector<std::pair<int64_t, std::vector<int64_t>>>& classes_of_labels,
                  LabelSets* label_sets) {
  ClassesOfLabels sets;
  for (const auto& [label, list] : classes_of_labels) {
    const std::set<int64_t> classes(list.begin(), list.end());
    if (!IsLabel(label)) {
      return InvalidArgument("label_sets name the label value " + std::to_string(label) +
                             ", but their label values must be from 0 to " + MostLabel());
    }
    if (classes.empty() || classes.size() != list.size() || !IsClassIndex(*classes.begin()) ||
        !IsClassIndex(*classes.rbegin())) {
      return InvalidArgument("label_sets[" + std::to_string(label) +
                             "] must be the classes that the label value may stand for: at least one, and each once");
    }
    if (classes.size() > 1) sets[label] = classes;
  }
  DICE_OP_RETURN_IF_ERROR(Store("label_sets", sets, label_sets));
  for (const auto& [label, classes] : classes_of_labels) {
    if (classes.size() > 1) continue;
    label_sets->set_of[label] = static_cast<uint16_t>(ClassSets::kAlone + classes[0]);
    label_sets->labels = std::max(label_sets->labels, static_cast<int>(label) + 1);
    label_sets->classes = std::max(label_sets->classes, static_cast<int>(classes[0]) + 1);
  }
  return {};
}

Error DistMatrixOf(const std::vector<std::vector<float>>& rows, DistMatrix* matrix) {
  *matrix = {};
  for (size_t label = 0; label < rows.size(); ++label) {
    if (rows[label].size() != rows.size()) {
      return InvalidArgument("dist_matrix has " + std::to_string(rows.size()) + " rows, but row " +
                             std::to_string(label) + " has " + std::to_string(rows[label].size()) +
                             " distances: it must have one for each class");
    }
    for (size_t c = 0; c < rows.size(); ++c) {
      const float distance = rows[label][c];
      if (!(distance >= 0 && distance <= std::numeric_limits<float>::max()) || (c == label && distance != 0)) {
        return InvalidArgument("dist_matrix[" + std::to_string(label) + "][" + std::to_string(c) + "] is " +
                               std::to_string(distance) + ", but the distance of a class from " +
                               (c == label ? "itself must be 0" : "another one must be finite and at least 0"));
      }
    }
    matrix->values.insert(matrix->values.end(), rows[label].begin(), rows[label].end());
  }
  matrix->classes = static_cast<int>(rows.size());
  return {};
}

Error CheckRanges(const Options& options) {
  Error error;
  ForEachOption([&](const auto& option) {
    if constexpr (std::is_same_v<decltype(option.value), Member<double>>) {
      const double value = options.*option.value;
      if (error || (value >= option.least && value <= option.most)) return;
      error =
          InvalidArgument(std::string(option.name) + " is " + std::to_string(value) + ", but must be " + option.range);
    }
  });
  return error;
}

}  // namespace dice_op

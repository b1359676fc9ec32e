#include "core/options.h"

#include <algorithm>
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

}  // namespace

std::string ToAttribute(Activation activation) { return kActivations[static_cast<int>(activation)]; }
std::string ToAttribute(DataFormat data_format) { return kDataFormats[static_cast<int>(data_format)]; }
std::vector<int64_t> ToAttribute(const IgnoreLabel& ignore_label) {
  return std::vector<int64_t>(ignore_label.given ? 1 : 0, ignore_label.value);
}
std::vector<int64_t> ToAttribute(const Regions& regions) {
  return std::vector<int64_t>(regions.classes_of, regions.classes_of + regions.labels);
}

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
  const auto outside = [](int64_t mask) { return mask < 0 || mask >> Regions::kMost; };
  if (masks.size() > Regions::kMost || std::any_of(masks.begin(), masks.end(), outside)) {
    const std::string most = std::to_string(Regions::kMost);
    return InvalidArgument("regions must be masks of at most " + most + " classes, of at most " + most +
                           " label values");
  }
  regions->labels = static_cast<int>(masks.size());
  std::copy(masks.begin(), masks.end(), regions->classes_of);
  return {};
}

Error RegionsOf(const std::vector<std::vector<int64_t>>& labels_of_classes, Regions* regions) {
  bool legal = labels_of_classes.size() <= Regions::kMost;
  *regions = {};
  for (size_t c = 0; legal && c < labels_of_classes.size(); ++c) {
    legal = !labels_of_classes[c].empty();
    for (int64_t label : labels_of_classes[c]) {
      legal = legal && label >= 0 && label < Regions::kMost;
      if (!legal) break;
      regions->labels = std::max(regions->labels, static_cast<int>(label) + 1);
      regions->classes_of[label] |= uint32_t{1} << c;
    }
  }
  if (legal) return {};
  return InvalidArgument("regions must be the label values of each class: at least one, from 0 to " +
                         std::to_string(Regions::kMost - 1) + ", of at most " + std::to_string(Regions::kMost) +
                         " classes");
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

// Turns bytes into one call of the library's entry points for CPUs, for libFuzzer, or for the driver at the end.
//
// The arrays lie in memory of exactly their size, so that the address sanitizer sees whatever is read or written beyond
// their ends. A call must be refused in words, or give the same bits however its work is cut, and sums that fit
// together. The bytes decide what sort of call it is, and the last of them are the seed of the numbers in the arrays.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/problem.h"

namespace dice_op {
namespace {

// The most elements of an array: of most of them, of some, and of few, for speed.
constexpr int64_t kMostOnce = 1 << 11, kMostOften = 1 << 13, kMostElements = 1 << 18;

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  uint8_t Byte() { return at_ < end_ ? *at_++ : 0; }
  template <class T>
  T Raw() {
    T value{};
    uint8_t bytes[sizeof(T)];
    for (uint8_t& byte : bytes) byte = Byte();
    std::memcpy(&value, bytes, sizeof(T));
    return value;
  }
  int Below(int limit) { return Byte() % limit; }
  bool OneIn(int count) { return Below(count) == 1; }
  template <class T>
  T OneOf(std::initializer_list<T> values) {
    return values.begin()[Below(static_cast<int>(values.size()))];
  }

 private:
  const uint8_t *at_, *end_;
};

// --- options --------------------------------------------------------------------------------------------------

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double NumberOf(Bytes& bytes) {
  if (bytes.OneIn(16)) return bytes.Raw<double>();
  return bytes.OneOf({0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 0.25, 1e-3, 5.0, -1.0, 1e30, 1e300, kInfinity, -0.0, 1e-320});
}
float SmallOf(Bytes& bytes) {
  if (bytes.OneIn(32)) return bytes.Raw<float>();
  return bytes.OneOf({0.0f, 1.0f, 0.5f, 2.0f, 0.25f, 1e-3f, 64.0f, 1e-40f});
}
int64_t IntegerOf(Bytes& bytes) {
  if (bytes.OneIn(32)) return bytes.Raw<int64_t>();
  constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(), kMost = std::numeric_limits<int64_t>::max();
  return bytes.OneOf<int64_t>(
      {0, 1, 2, 3, 4, 7, 31, 32, 200, 255, 256, -1, -2, 1 << 15, int64_t{1} << 32, kLeast, kMost});
}
std::vector<int64_t> IntegersOf(Bytes& bytes, int most) {
  std::vector<int64_t> values(bytes.Below(most + 1));
  for (int64_t& value : values) value = bytes.OneIn(8) ? IntegerOf(bytes) : bytes.Below(8);
  return values;
}
std::vector<float> FloatsOf(Bytes& bytes, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = SmallOf(bytes);
  return values;
}

// The attribute says the same about an option that was made of it.
template <class T>
void CheckThereAndBack(const T& option) {
  const auto attribute = ToAttribute(option);
  T again;
  CHECK(!FromAttribute(attribute, &again));
  CHECK(ToAttribute(again) == attribute);
}

template <class T, class Make>
Error Read(T* option, Make&& make) {
  const Error error = make(option);
  CHECK(static_cast<bool>(error) == !error.message.empty());
  if (!error) CheckThereAndBack(*option);
  return error;
}

Error OptionsOf(Bytes& bytes, int64_t classes, Options* options) {
  const int c = static_cast<int>(std::clamp<int64_t>(classes, 1, 300));
  const std::string activation =
      bytes.OneIn(32) ? "tanh"
                      : bytes.OneOf<const char*>({"softmax", "softmax", "sigmoid", "none", "argmax", "threshold"});
  const std::string data_format =
      bytes.OneIn(32) ? "NCHW" : bytes.OneOf<const char*>({"channels_last", "channels_first"});
  DICE_OP_RETURN_IF_ERROR(Read(&options->activation, [&](auto* o) { return FromAttribute(activation, o); }));
  DICE_OP_RETURN_IF_ERROR(Read(&options->data_format, [&](auto* o) { return FromAttribute(data_format, o); }));
  const uint8_t flags = bytes.Byte();
  options->squared_pred = flags & 1;
  options->soft_label = flags & 2;
  options->cross_entropy = flags & 4;
  options->focal_gamma = NumberOf(bytes);
  if (bytes.OneIn(4)) options->label_smoothing = NumberOf(bytes);
  if (bytes.OneIn(4)) options->threshold = NumberOf(bytes);
  if (bytes.OneIn(3)) {
    const std::vector<int64_t> values = bytes.OneIn(16) ? IntegersOf(bytes, 3) : std::vector{IntegerOf(bytes)};
    DICE_OP_RETURN_IF_ERROR(Read(&options->ignore_label, [&](auto* o) { return FromAttribute(values, o); }));
  }
  const int table = bytes.Below(16);
  if (table == 1) {  // regions as the attribute, of any sort
    std::vector<int64_t> masks = IntegersOf(bytes, 40);
    if (!masks.empty() && bytes.OneIn(2)) masks[0] = -bytes.Below(20);
    DICE_OP_RETURN_IF_ERROR(Read(&options->regions, [&](auto* o) { return FromAttribute(masks, o); }));
  } else if (table == 2 || table == 3) {  // regions as lists, mostly legal
    std::vector<std::vector<int64_t>> labels(bytes.OneIn(8) ? bytes.Below(50) : c);
    for (auto& region : labels) {
      region = IntegersOf(bytes, 3);
      if (!bytes.OneIn(8)) region.push_back(bytes.Below(8));
    }
    DICE_OP_RETURN_IF_ERROR(Read(&options->regions, [&](auto* o) { return RegionsOf(labels, o); }));
  } else if (table == 4) {
    const std::vector<int64_t> list = IntegersOf(bytes, 12);
    DICE_OP_RETURN_IF_ERROR(Read(&options->label_sets, [&](auto* o) { return FromAttribute(list, o); }));
  } else if (table == 5 || table == 6) {
    std::vector<std::pair<int64_t, std::vector<int64_t>>> sets(1 + bytes.Below(5));
    for (auto& [label, members] : sets) {
      label = bytes.OneIn(16) ? IntegerOf(bytes) : bytes.Byte();
      members.resize(bytes.OneIn(16) ? 0 : 1 + bytes.Below(4));
      for (size_t i = 0; i < members.size(); ++i) {
        members[i] = bytes.OneIn(16) ? IntegerOf(bytes) : (bytes.Below(c) + static_cast<int64_t>(i)) % c;
      }
    }
    DICE_OP_RETURN_IF_ERROR(Read(&options->label_sets, [&](auto* o) { return LabelSetsOf(sets, o); }));
  } else if (table == 7 || table == 8) {
    std::vector<float> values = FloatsOf(bytes, bytes.OneIn(8) ? bytes.Below(40) : c * c);
    for (int i = 0; !bytes.OneIn(8) && static_cast<size_t>(i) * (c + 1) < values.size(); ++i) values[i * (c + 1)] = 0;
    DICE_OP_RETURN_IF_ERROR(Read(&options->dist_matrix, [&](auto* o) { return FromAttribute(values, o); }));
  }
  if (bytes.OneIn(6)) {
    const std::vector<float> values = FloatsOf(bytes, bytes.OneIn(8) ? 2 * bytes.Below(150) : c);
    DICE_OP_RETURN_IF_ERROR(Read(&options->focal_gammas, [&](auto* o) { return FromAttribute(values, o); }));
  }
  if (bytes.OneIn(8)) return {};
  // Most calls are legal.
  if (options->regions.labels) options->activation = bytes.OneOf({Activation::kSigmoid, Activation::kThreshold});
  if (options->dist_matrix.classes) options->activation = bytes.OneOf({Activation::kSoftmax, Activation::kNone});
  if (options->activation > Activation::kNone) options->cross_entropy = false;
  return {};
}

// --- shapes ---------------------------------------------------------------------------------------------------

int64_t SizeOf(Bytes& bytes) {
  if (bytes.OneIn(64)) return bytes.OneOf<int64_t>({-1, -1, int64_t{1} << 20, int64_t{1} << 40});
  const int kind = bytes.Below(8);
  return kind == 0 ? bytes.Below(3) : kind == 1 ? bytes.Byte() : 1 + bytes.Below(kind < 6 ? 7 : 40);
}
int64_t ClassesOf(Bytes& bytes) {
  if (bytes.OneIn(32)) return SizeOf(bytes);
  return bytes.OneIn(16) ? bytes.OneOf<int64_t>({64, 65, 130, 260, 1100}) : 1 + bytes.Below(bytes.OneIn(4) ? 40 : 9);
}
void Disturb(Bytes& bytes, Dims* dims) {
  switch (bytes.Below(4)) {
    case 0:
      dims->push_back(SizeOf(bytes));
      break;
    case 1:
      if (!dims->empty()) dims->pop_back();
      break;
    default:
      if (!dims->empty()) (*dims)[bytes.Below(static_cast<int>(dims->size()))] = SizeOf(bytes);
  }
}

struct Shapes {
  Dims logits, labels;
  std::optional<Dims> weight;
};
Shapes ShapesOf(Bytes& bytes, int64_t classes, const Options& options) {
  const DataFormat data_format = options.data_format;
  Dims spatial(bytes.OneIn(8) ? 0 : 1 + bytes.Below(3));
  for (int64_t& size : spatial) size = SizeOf(bytes);
  const int64_t batch = bytes.OneIn(16) ? SizeOf(bytes) : 1 + bytes.Below(3);
  const auto with = [&](std::optional<int64_t> channels) {
    Dims dims = spatial;
    const bool last = data_format == DataFormat::kChannelsLast;
    if (channels) dims.insert(last ? dims.end() : dims.begin(), *channels);
    dims.insert(dims.begin(), batch);
    return dims;
  };
  const std::optional<int64_t> none, one = 1;
  Shapes shapes;
  shapes.logits = with(classes);
  const bool needs_indices =
      options.ignore_label.given || options.regions.labels || options.label_sets.labels || options.dist_matrix.classes;
  const int kind = bytes.Below(needs_indices && !bytes.OneIn(8) ? 5 : 8);
  shapes.labels = kind < 4 ? with(none) : kind == 4 ? with(one) : with(classes);
  if (bytes.OneIn(3)) shapes.weight = bytes.OneIn(4) ? with(one) : with(none);
  if (bytes.OneIn(32)) Disturb(bytes, &shapes.logits);
  if (bytes.OneIn(32)) Disturb(bytes, &shapes.labels);
  if (shapes.weight && bytes.OneIn(32)) Disturb(bytes, &*shapes.weight);
  return shapes;
}

// The number of elements, or -1 if a size is not known, or if there are too many. As in NumPy and TensorFlow, even an
// array without elements must not have sizes whose product is too large for a number.
int64_t CountOf(const Dims& dims, int64_t most) {
  int64_t count = 1, product = 1;
  for (const int64_t size : dims) {
    if (size < 0 || size > (int64_t{1} << 58) / product) return -1;
    product *= std::max<int64_t>(size, 1);
    count *= size;
  }
  return count > most ? -1 : count;
}

// Whether an array may have this shape, of which not all sizes need be known.
bool IsPossible(Dims dims) {
  for (int64_t& size : dims) size = std::abs(size);
  return CountOf(dims, std::numeric_limits<int64_t>::max()) >= 0;
}

// --- arrays ---------------------------------------------------------------------------------------------------

// An array in memory that ends with it. It starts at most a few elements after the memory's begin.
class Array {
 public:
  Array(DType dtype, int64_t count, int lead = 0)
      : size_(dice_op::SizeOf(dtype)),
        bytes_(count * size_),
        memory_(new char[lead * size_ + bytes_]),
        data_(memory_.get() + lead * size_) {}
  explicit Array(size_t bytes) : Array(DType::kUint8, static_cast<int64_t>(bytes)) {}
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  void Fill(int byte) const { std::memset(data_, byte, bytes_); }
  bool SameBits(const Array& other) const {
    return bytes_ == other.bytes_ && (bytes_ == 0 || std::memcmp(data_, other.data_, bytes_) == 0);
  }

 private:
  int64_t size_, bytes_;
  std::unique_ptr<char[]> memory_;
  char* data_;
};

using Random = std::minstd_rand;

// Fills an array with numbers of `next`, as its type holds them.
template <class Next>
void Fill(const Array& array, DType dtype, const Next& next) {
  WithType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* const values = reinterpret_cast<T*>(array.data());
    for (int64_t i = 0; i < array.bytes() / static_cast<int64_t>(sizeof(T)); ++i) {
      const double value = next();
      if constexpr (std::is_integral_v<T>) {
        // Other numbers cannot be converted.
        values[i] = std::abs(value) < 9e18 ? static_cast<T>(static_cast<int64_t>(value)) : T(0);
        if (dtype == DType::kBool) values[i] = values[i] != 0;
      } else {
        values[i] = ToStorage<T>(static_cast<std::conditional_t<std::is_arithmetic_v<T>, T, float>>(value));
      }
    }
  });
}

double Fraction(Random& random) { return static_cast<double>(random()) / Random::max(); }

// How the numbers of an array are drawn.
enum Style { kCalm, kWide, kStrange, kBits };

void FillLogits(const Array& array, DType dtype, bool probabilities, Style style, Random& random) {
  static constexpr double kNumbers[] = {0,    -0.0, 1,     -1,        88,         -88,   104,  1e4,
                                        -1e4, 1e30, -1e30, kInfinity, -kInfinity, 1e-40, 1e-7, 0.5};
  static constexpr double kOdd[] = {std::numeric_limits<double>::quiet_NaN(), 1e300, -1e300};
  if (style == kBits) {
    for (int64_t i = 0; i < array.bytes(); ++i) array.data()[i] = static_cast<char>(random() >> 8);
    return;
  }
  Fill(array, dtype, [&] {
    const double fraction = Fraction(random);
    if (probabilities && style != kStrange) return style == kWide && fraction < 0.2 ? 0.0 : fraction;
    if (style == kCalm) return 12 * (fraction - 0.5);
    if (style == kStrange && fraction < 0.1) return kOdd[random() % 3];
    return kNumbers[random() % 16];
  });
}

void FillLabels(const Array& array, const Problem& problem, Style style, Random& random) {
  if (style == kBits) {
    FillLogits(array, problem.labels_dtype, false, kBits, random);
    if (problem.labels_dtype == DType::kBool) {  // that holds nothing but 0 and 1
      for (int64_t i = 0; i < array.bytes(); ++i) array.data()[i] &= 1;
    }
    return;
  }
  // The first number that the type does not hold, or at least not exactly.
  const DType dtype = problem.labels_dtype;
  const int64_t end = dtype == DType::kBool                                 ? 2
                      : dtype == DType::kInt8                               ? 128
                      : dtype == DType::kUint8 || dtype == DType::kBFloat16 ? 256
                                                                            : 2048;
  std::vector<int> named;
  for (int label = 0; label < std::min(problem.label_limit(), end); ++label) {
    if (problem.HasMeaning(label)) named.push_back(label);
  }
  Fill(array, problem.labels_dtype, [&]() -> double {
    const double fraction = Fraction(random);
    if (problem.dense_labels) {
      if (style == kStrange && fraction < 0.05) return 12 * (fraction - 0.01);
      return problem.soft_labels() && style == kCalm ? fraction : fraction < 0.4;
    }
    if (style == kStrange && fraction < 0.05) return std::floor(600 * (Fraction(random) - 0.3)) / 2;
    if (problem.options.ignore_label.given && fraction > 0.8) {
      return static_cast<double>(problem.options.ignore_label.value);
    }
    return named.empty() ? 0 : named[random() % named.size()];
  });
}

// --- ways to cut the work ---------------------------------------------------------------------------------------

class AtOnce final : public cpu::ParallelFor {
  void Run(int64_t count, int64_t, Body body, void* context) const override { body(context, 0, count); }
};

// The last pieces come first.
class InPieces final : public cpu::ParallelFor {
 public:
  explicit InPieces(int64_t length) : length_(length) {}

 private:
  void Run(int64_t count, int64_t, Body body, void* context) const override {
    for (int64_t end = count; end > 0; end -= length_) body(context, std::max<int64_t>(end - length_, 0), end);
  }
  const int64_t length_;
};

// A pool some of whose threads help at once, and others only when the work is done.
class Pool final : public cpu::PoolParallelFor {
 public:
  ~Pool() override {
    for (const auto& task : late_) task();
  }

 private:
  int64_t threads() const override { return 5; }
  void Schedule(std::function<void()> task) const override {
    if (++scheduled_ % 2) return task();
    late_.push_back(std::move(task));
  }
  mutable int scheduled_ = 0;
  mutable std::vector<std::function<void()>> late_;
};

// Calls run(parallel) once for each way.
template <class Fn>
void InEachWay(int64_t length, const Fn& run) {
  run(AtOnce());
  run(InPieces(length));
  run(Pool());
}

// --- the calls ------------------------------------------------------------------------------------------------

struct AllSums {
  std::vector<Array> arrays;
  Sums sums;
  explicit AllSums(const Problem& problem) {
    for (const SumInfo& info : kSums) {
      arrays.emplace_back(problem.sums_dtype(), CountOf(problem.DimsOf(info), kMostElements));
      arrays.back().Fill(0x5a);
      if (problem.Has(info.sum)) sums[info.sum] = arrays.back().data();
    }
  }
  double At(const Problem& problem, Sum sum, int64_t i) const {
    const void* const values = sums[sum];
    return problem.sums_dtype() == DType::kDouble ? static_cast<const double*>(values)[i]
                                                  : static_cast<const float*>(values)[i];
  }
};

// What must be true of the sums of calm numbers.
void CheckSums(const Problem& problem, const AllSums& sums) {
  const Options& options = problem.options;
  for (int64_t n = 0; n < problem.batch; ++n) {
    const double weight = sums.At(problem, Sum::kWeightSum, n), slack = 1e-5 * weight + 1e-30;
    double total = 0;
    for (int64_t c = 0; c < problem.classes; ++c) {
      const int64_t at = n * problem.classes + c;
      const double i = sums.At(problem, Sum::kIntersection, at), p = sums.At(problem, Sum::kPredSum, at),
                   t = sums.At(problem, Sum::kLabelSum, at);
      CHECK(i >= 0 && p >= 0 && t >= 0 && p <= weight + slack && t <= weight + slack);
      if (!options.squared_pred) CHECK(i <= std::min(p, t) + slack);
      // The probabilities of a set of classes may add up to more than 1 if they need not add up to 1 for all classes.
      const bool below = options.activation == Activation::kNone && problem.has_label_sets();
      if (options.cross_entropy && !below) CHECK(sums.At(problem, Sum::kCrossEntropy, at) >= -slack);
      total += p;
    }
    const bool one = options.activation == Activation::kSoftmax || options.activation == Activation::kArgmax;
    if (one && problem.classes && !options.squared_pred && !problem.has_label_sets()) {
      CHECK(std::abs(total - weight) <= slack);
    }
  }
}

void Compute(Bytes& bytes, Problem problem) {
  const uint8_t manner = bytes.Byte();
  const Style of_logits = static_cast<Style>(manner & 3), of_labels = static_cast<Style>(manner >> 2 & 3);
  const int64_t length = 1 + bytes.Below(5);
  Random random(bytes.Raw<uint16_t>() + 1);
  const int64_t count = problem.logits_count(), voxels = problem.batch * problem.voxels;
  const Array logits(problem.logits_dtype, count, manner >> 4 & 3);
  const Array labels(problem.labels_dtype, problem.dense_labels ? count : voxels, manner >> 6);
  const Array weights(problem.weight_dtype, voxels, manner >> 5 & 1);
  FillLogits(logits, problem.logits_dtype, problem.options.activation == Activation::kNone, of_logits, random);
  FillLabels(labels, problem, of_labels == kWide ? kCalm : of_labels, random);
  Fill(weights, problem.weight_dtype, [&] { return static_cast<double>(random() % 3) / 1.5; });
  problem.logits = logits.data();
  problem.labels = labels.data();
  if (problem.voxel_weight) problem.voxel_weight = weights.data();

  std::vector<AllSums> found;
  std::vector<Error> errors;
  InEachWay(length, [&](const cpu::ParallelFor& parallel) {
    found.emplace_back(problem);
    const Array workspace(cpu::DiceSumsWorkspace(problem));
    errors.push_back(cpu::DiceSums(problem, found.back().sums, workspace.data(), parallel));
    CHECK(errors.back().message == errors.front().message);
    CHECK(static_cast<bool>(errors.back()) == !errors.back().message.empty());
    if (errors.back()) return;
    for (size_t i = 0; i < found[0].arrays.size(); ++i) CHECK(found.back().arrays[i].SameBits(found[0].arrays[i]));
  });
  if (of_logits == kCalm && of_labels <= kWide && !errors[0]) CheckSums(problem, found[0]);
  const bool legal = of_logits == kCalm && of_labels <= kWide && !problem.options.ignore_label.given;
  if (legal && problem.classes && errors[0]) {
    std::fprintf(stderr, "a legal call is refused: %s\n", errors[0].message.c_str());
    std::abort();
  }
  HasFractions(problem);

  if (CheckGradient(problem)) return;
  SumsGrad grad;
  std::vector<Array> derivatives;
  for (const SumInfo& info : kSums) {
    if (!info.has_gradient || !problem.Has(info.sum)) continue;
    derivatives.emplace_back(problem.sums_dtype(), problem.batch * problem.classes);
    Fill(derivatives.back(), problem.sums_dtype(), [&] { return 4 * Fraction(random) - 2; });
    grad.d_sums[info.sum] = derivatives.back().data();
  }
  std::vector<Array> gradients;
  InEachWay(length, [&](const cpu::ParallelFor& parallel) {
    gradients.emplace_back(problem.logits_dtype, count, manner >> 7);
    gradients.back().Fill(0x5a);
    grad.d_logits = gradients.back().data();
    cpu::DiceSumsGrad(problem, grad, parallel);
    CHECK(gradients.back().SameBits(gradients[0]));
  });
  grad.d_logits = logits.data();
  cpu::DiceSumsGrad(problem, grad, InPieces(length));
  CHECK(logits.SameBits(gradients[0]));
}

// As dice_op.core.scores does with two label maps.
void Count(Bytes& bytes, const Shapes& shapes, Options options, int64_t classes) {
  Problem problem;
  problem.options = options;
  problem.options.activation = Activation::kThreshold;
  problem.options.data_format = DataFormat::kChannelsLast;
  problem.options.cross_entropy = false;
  problem.labels_dtype = static_cast<DType>(bytes.Below(11));
  const DType dtype = static_cast<DType>(bytes.Below(11));
  Dims logits = shapes.labels;
  logits.push_back(classes);
  if (!IsPossible(logits)) return;
  const Error error = MakeProblem(logits, shapes.labels, {}, &problem);
  CHECK(static_cast<bool>(error) == !error.message.empty());
  if (error || CountOf(logits, kMostElements) < 0) return;
  // Samples without a voxel have counts all the same.
  if (CountOf({problem.batch, problem.classes}, kMostElements) < 0) return;
  problem.dense_labels = false;
  const uint8_t manner = bytes.Byte();
  Random random(bytes.Raw<uint16_t>() + 1);
  const int64_t voxels = problem.batch * problem.voxels;
  const Array labels(problem.labels_dtype, voxels, manner & 3), prediction(dtype, voxels, manner >> 2 & 3);
  FillLabels(labels, problem, static_cast<Style>(manner >> 4 & 3), random);
  Problem predicted = problem;
  predicted.labels_dtype = dtype;
  FillLabels(prediction, predicted, static_cast<Style>(manner >> 6), random);
  problem.labels = labels.data();
  std::vector<Array> found;
  std::vector<Error> errors;
  InEachWay(1 + bytes.Below(3), [&](const cpu::ParallelFor& parallel) {
    for (int i = 0; i < 3; ++i) found.emplace_back(DType::kInt64, problem.batch * problem.classes);
    const auto counts = [&](size_t i) { return reinterpret_cast<int64_t*>(found[found.size() - 3 + i].data()); };
    errors.push_back(cpu::CountLabels(problem, prediction.data(), dtype, {counts(0), counts(1), counts(2)}, parallel));
    CHECK(errors.back().message == errors.front().message);
    for (size_t i = 0; !errors[0] && i < 3; ++i) CHECK(found[found.size() - 3 + i].SameBits(found[i]));
  });
}

void Call(Bytes& bytes) {
  const int64_t classes = ClassesOf(bytes);
  Problem problem;
  if (OptionsOf(bytes, classes, &problem.options)) return;
  problem.logits_dtype =
      bytes.OneIn(64) ? static_cast<DType>(bytes.Below(11))
                      : bytes.OneOf({DType::kFloat, DType::kFloat, DType::kHalf, DType::kBFloat16, DType::kDouble});
  problem.labels_dtype = static_cast<DType>(bytes.Below(11));
  problem.weight_dtype = static_cast<DType>(bytes.Below(11));
  problem.single_counts = bytes.OneIn(8);
  const Shapes shapes = ShapesOf(bytes, classes, problem.options);
  if (bytes.OneIn(12)) return Count(bytes, shapes, problem.options, classes);

  if (!IsPossible(shapes.logits) || !IsPossible(shapes.labels)) return;
  LabelKind kind;
  static_cast<void>(FindLabelKind(shapes.logits, shapes.labels, problem, &kind));
  static const char kSomething = 0;
  if (shapes.weight) problem.voxel_weight = &kSomething;  // the array follows
  const Error error = MakeProblem(shapes.logits, shapes.labels, shapes.weight, &problem);
  CHECK(static_cast<bool>(error) == !error.message.empty());
  if (error) return;
  const int64_t most = bytes.OneIn(64) ? kMostElements : bytes.OneIn(8) ? kMostOften : kMostOnce;
  const auto fits = [&](const Dims& dims) { return CountOf(dims, most) >= 0; };
  if (!fits(shapes.logits) || !fits(shapes.labels) || (shapes.weight && !fits(*shapes.weight))) return;
  if (!fits({problem.batch}) || !fits({problem.batch, problem.classes}) || !fits({problem.batch, problem.voxels}))
    return;
  Compute(bytes, problem);
}

}  // namespace
}  // namespace dice_op

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  dice_op::Bytes bytes(data, size);
  dice_op::Call(bytes);
  return 0;
}

#if !defined(DICE_OP_LIBFUZZER)
// Without libFuzzer: as many inputs as the first argument says, from the seed in the second one. Each is random, or
// the one before with a few bytes changed.
int main(int count, char** arguments) {
  if (count != 3) return 2;
  const long inputs = std::atol(arguments[1]);
  std::mt19937_64 random(std::strtoull(arguments[2], nullptr, 10));
  std::vector<uint8_t> input;
  for (long i = 0; i < inputs; ++i) {
    if (random() % 4 == 0) {
      input.resize(16 + random() % 240);
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    } else {
      for (int change = 0; change < 3 && !input.empty(); ++change) {
        input[random() % input.size()] = static_cast<uint8_t>(random());
      }
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs at %s\n", inputs, dice_op::cpu::SimdLevel());
}
#endif

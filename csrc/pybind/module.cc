// The Python module dice_op.core computes the sums and gradients on arrays, without TensorFlow and without copies.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dice_op.h"
#include "core/problem.h"
#include "pybind/tensor.h"

namespace dice_op {
namespace {

// Starts `threads` threads for each call, or as many as the system has. They take the blocks one by one from a counter.
class Threads final : public cpu::ParallelFor {
 public:
  explicit Threads(int threads) : threads_(threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency())) {}

  void Run(int64_t count, int64_t, Body body, void* context) const override {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < count;) body(context, i, i + 1);
    };
    std::vector<std::thread> others;
    try {
      for (int64_t i = 1; i < std::min<int64_t>(threads_, count); ++i) others.emplace_back(work);
    } catch (const std::exception&) {  // no thread more, or no memory for one: those that there are do the work
    }
    work();
    for (auto& thread : others) thread.join();
  }

 private:
  int threads_;
};

// --- the options --------------------------------------------------------------------------------------------

// Makes regions from Python's lists of the label values of each class.
Regions RegionsOfLists(const py::object& lists) {
  std::vector<std::vector<int64_t>> labels;
  try {
    for (const py::handle region : lists.is_none() ? py::tuple() : lists) {
      labels.emplace_back();
      for (const py::handle label : region) labels.back().push_back(label.cast<int64_t>());
    }
  } catch (const std::exception&) {
    ThrowAgainIfNotOfArgument();
    throw py::type_error("regions must be a list of the label values of each class, such as [(1, 2, 3), (2, 3), (3,)]");
  }
  Regions regions;
  Require(RegionsOf(labels, &regions));
  return regions;
}

// Makes label sets from Python's dict from a label value to its classes.
LabelSets LabelSetsOfDict(const py::object& dict) {
  std::vector<std::pair<int64_t, std::vector<int64_t>>> classes_of_labels;
  try {
    for (const auto& [label, classes] : dict.is_none() ? py::dict() : dict.cast<py::dict>()) {
      classes_of_labels.push_back({label.cast<int64_t>(), {}});
      for (const py::handle c : classes) classes_of_labels.back().second.push_back(c.cast<int64_t>());
    }
  } catch (const std::exception&) {
    ThrowAgainIfNotOfArgument();
    throw py::type_error(
        "label_sets must be a dict from label values to the classes that each may stand for, such as "
        "{200: (0, 2, 3), 201: (0, 1, 4)}");
  }
  LabelSets label_sets;
  Require(LabelSetsOf(classes_of_labels, &label_sets));
  return label_sets;
}

// How Python passes an option: the type that a function takes, the default, and the conversion to the option.
template <class T>
struct InPython {  // bool, double
  using Type = T;
  static Type Default(T value) { return value; }
  static T Read(Type value) { return value; }
};
template <class T>
struct ChoiceInPython {
  using Type = std::string;
  static Type Default(T value) { return ToAttribute(value); }
  static T Read(const Type& name) {
    T value;
    Require(FromAttribute(name, &value));
    return value;
  }
};
template <>
struct InPython<Activation> : ChoiceInPython<Activation> {};
template <>
struct InPython<DataFormat> : ChoiceInPython<DataFormat> {};
template <>
struct InPython<IgnoreLabel> {
  using Type = std::optional<int64_t>;
  static py::object Default(IgnoreLabel) { return py::none(); }
  static IgnoreLabel Read(Type value) { return {value.has_value(), value.value_or(0)}; }
};
template <>
struct InPython<Regions> {
  using Type = py::object;
  static py::object Default(const Regions&) { return py::none(); }
  static Regions Read(const Type& lists) { return RegionsOfLists(lists); }
};

template <>
struct InPython<LabelSets> {
  using Type = py::object;
  static py::object Default(const LabelSets&) { return py::none(); }
  static LabelSets Read(const Type& dict) { return LabelSetsOfDict(dict); }
};
template <>
struct InPython<FocalGammas> {
  using Type = std::optional<std::vector<float>>;
  static py::object Default(const FocalGammas&) { return py::none(); }
  static FocalGammas Read(const Type& values) {
    FocalGammas gammas;
    Require(FromAttribute(values.value_or(std::vector<float>()), &gammas));
    return gammas;
  }
};

template <>
struct InPython<DistMatrix> {
  using Type = std::optional<std::vector<std::vector<float>>>;
  static py::object Default(const DistMatrix&) { return py::none(); }
  static DistMatrix Read(const Type& rows) {
    DistMatrix matrix;
    Require(DistMatrixOf(rows.value_or(std::vector<std::vector<float>>()), &matrix));
    return matrix;
  }
};

// --- the calls ----------------------------------------------------------------------------------------------

struct Inputs {
  Problem problem;
  Tensor logits, labels, voxel_weight;
};

Inputs InputsOf(Tensor logits, Tensor labels, const std::optional<py::object>& voxel_weight, const Options& options) {
  Inputs inputs{{}, std::move(logits), std::move(labels), {}};
  Problem& problem = inputs.problem;
  problem.options = options;
  problem.logits = inputs.logits.data;
  problem.logits_dtype = inputs.logits.dtype;
  problem.labels = inputs.labels.data;
  problem.labels_dtype = inputs.labels.dtype;
  RequireSameMemory(inputs.labels, "labels", inputs.logits);
  std::optional<Dims> weight;
  if (voxel_weight) {
    inputs.voxel_weight = TensorOf(*voxel_weight, "voxel_weight");
    RequireSameMemory(inputs.voxel_weight, "voxel_weight", inputs.logits);
    problem.voxel_weight = inputs.voxel_weight.data;
    problem.weight_dtype = inputs.voxel_weight.dtype;
    weight = inputs.voxel_weight.dims;
  }
  Require(MakeProblem(inputs.logits.dims, inputs.labels.dims, weight, &problem));
  return inputs;
}

// Returns a new array for results, on the host or on the device, and a pointer to its memory.
std::pair<py::object, void*> NewArray([[maybe_unused]] bool on_device, DType dtype, const Dims& dims,
                                      [[maybe_unused]] uintptr_t stream) {
#ifdef DICE_OP_WITH_CUDA
  if (on_device) {
    auto array = std::make_unique<DeviceArray>(dtype, dims, stream);
    void* const data = array->data();
    return {py::cast(std::move(array)), data};
  }
#endif
  py::array array(NumpyType(dtype), std::vector<py::ssize_t>(dims.begin(), dims.end()));
  void* const data = array.mutable_data();
  return {array, data};
}

py::dict RunSums(const Inputs& inputs, int threads, uintptr_t stream) {
  const Problem& problem = inputs.problem;
  const bool on_device = inputs.logits.on_device;
  py::dict result;
  Sums sums;
  for (const SumInfo& info : kSums) {
    if (!problem.Has(info.sum)) continue;
    const auto [array, data] = NewArray(on_device, problem.sums_dtype(), problem.DimsOf(info), stream);
    result[info.name] = array;
    sums[info.sum] = data;
  }
  if (on_device) {
#ifdef DICE_OP_WITH_CUDA
    size_t bytes = 0;
    Require(cuda::DiceSumsWorkspace(problem, &bytes));
    const DeviceMemory workspace(bytes, stream);
    Require(cuda::DiceSums(problem, sums, workspace.data(), reinterpret_cast<void*>(stream)));
#endif
    return result;
  }
  Error error;
  {
    py::gil_scoped_release release;
    std::vector<double> workspace(cpu::DiceSumsWorkspace(problem) / sizeof(double));
    error = cpu::DiceSums(problem, sums, workspace.data(), Threads(threads));
  }
  Require(error);
  return result;
}

// Counts the voxels of two label maps.
py::dict CountsOf(const Tensor& prediction, const Tensor& labels, int64_t classes, Options options, int threads) {
  Problem problem;
  problem.options = options;
  problem.options.activation = Activation::kThreshold;  // an activation that is legal with regions
  problem.options.data_format = DataFormat::kChannelsLast;
  problem.labels = labels.data;
  problem.labels_dtype = labels.dtype;
  Dims logits = labels.dims;  // the shape that logits would have
  logits.push_back(classes);
  Require(MakeProblem(logits, labels.dims, {}, &problem));
  problem.dense_labels = false;  // a mask of floats must hold only zeros and ones here
  py::dict result;
  const auto output = [&](const char* name) {
    py::array_t<int64_t> array({problem.batch, problem.classes});
    result[name] = array;
    return array.mutable_data();
  };
  cpu::Counts counts;
  counts.intersection = output("intersection");
  counts.pred_sum = output("pred_sum");
  counts.label_sum = output("label_sum");
  Error error;
  {
    py::gil_scoped_release release;
    error = cpu::CountLabels(problem, prediction.data, prediction.dtype, counts, Threads(threads));
  }
  Require(error);
  return result;
}

py::dict ScoresOf(const py::object& prediction, const py::object& labels, const std::optional<int64_t>& classes,
                  const std::optional<int64_t>& ignore_label, const py::object& regions, const py::object& label_sets,
                  double threshold, const std::string& data_format, int threads) {
  const Tensor predicted = LabelMapOf(prediction, "prediction"), truth = LabelMapOf(labels, "labels");
  if (predicted.on_device || truth.on_device) {
    throw py::value_error("prediction and labels must be in host memory: scores are counted there");
  }
  Options options;
  options.data_format = InPython<DataFormat>::Read(data_format);
  options.regions = RegionsOfLists(regions);
  options.label_sets = LabelSetsOfDict(label_sets);
  options.ignore_label = InPython<IgnoreLabel>::Read(ignore_label);
  options.threshold = threshold;
  const bool has_regions = options.regions.labels > 0;
  const bool are_logits = predicted.dims != truth.dims;
  if (are_logits && !IsFloat(predicted.dtype)) {
    throw py::value_error("prediction has shape " + Show(predicted.dims) + ", but labels " + Show(truth.dims) +
                          ": two label maps must have the same");
  }
  int64_t count = classes.value_or(-1);
  if (has_regions) {
    count = py::len(regions);
  } else if (are_logits && predicted.dims.size() > 1) {
    count = predicted.dims[ClassAxis(predicted.dims.size(), options.data_format)];
  } else if (!classes) {
    throw py::value_error("classes, the number of classes, is needed where prediction is a label map");
  }
  if (count < 1 || classes.value_or(count) != count) {
    throw py::value_error("classes is " + std::to_string(classes.value_or(count)) +
                          (count < 1 ? ", but must be at least 1" : ", but there are " + std::to_string(count)));
  }
  py::dict result;
  if (are_logits) {
    options.activation = count == 1 || has_regions ? Activation::kThreshold : Activation::kArgmax;
    Inputs inputs = InputsOf(predicted, truth, {}, options);
    if (inputs.problem.dense_labels && count > 1) {
      throw py::value_error("labels have shape " + Show(truth.dims) +
                            ", but must be class indices, without a class axis");
    }
    inputs.problem.dense_labels = false;  // as in CountsOf
    const py::dict sums = RunSums(inputs, threads, 0);
    for (const char* name : {"intersection", "pred_sum", "label_sum"}) {
      const auto values = sums[name].cast<py::array_t<double>>();
      if (!std::all_of(values.data(), values.data() + values.size(), [](double x) { return std::isfinite(x); })) {
        throw py::value_error("prediction holds NaN, which is no class's logit");
      }
      result[name] = values.attr("astype")("int64");
    }
  } else {
    result = CountsOf(predicted, truth, count, options, threads);
  }
  const auto of = [&](const char* name) { return result[name].cast<py::array_t<int64_t>>(); };
  const auto intersection = of("intersection"), pred_sum = of("pred_sum"), label_sum = of("label_sum");
  const auto score = [&](const char* name, auto&& formula) {
    py::array_t<double> array({intersection.shape(0), intersection.shape(1)});
    for (py::ssize_t i = 0; i < array.size(); ++i) {
      array.mutable_data()[i] = formula(static_cast<double>(intersection.data()[i]),
                                        static_cast<double>(pred_sum.data()[i] + label_sum.data()[i]));
    }
    result[name] = array;
  };
  score("dice", [](double both, double sum) { return 2 * both / sum; });  // NaN for 0 / 0
  score("jaccard", [](double both, double sum) { return both / (sum - both); });
  return result;
}

// Uses only the shapes and the dtype. None in a shape stands for a size that is not known yet.
std::string LabelKindOf(const std::vector<std::optional<int64_t>>& logits_shape,
                        const std::vector<std::optional<int64_t>>& labels_shape, const std::string& labels_dtype,
                        const std::optional<int64_t>& ignore_label, const py::object& regions,
                        const std::string& data_format) {
  const auto known = [](const std::vector<std::optional<int64_t>>& shape) {
    Dims dims;
    for (const auto& size : shape) dims.push_back(size.value_or(-1));
    return dims;
  };
  Problem problem;
  problem.options.data_format = InPython<DataFormat>::Read(data_format);
  problem.options.regions = RegionsOfLists(regions);
  problem.options.ignore_label = InPython<IgnoreLabel>::Read(ignore_label);
  problem.labels_dtype = DTypeNamed(labels_dtype, "labels");
  LabelKind kind;
  Require(FindLabelKind(known(logits_shape), known(labels_shape), problem, &kind));
  return kind == LabelKind::kIndices ? "indices" : kind == LabelKind::kMask ? "mask" : "per class";
}

py::object GradientOf(const Inputs& inputs, const PerSum<std::optional<py::object>>& d_sums, int threads,
                      uintptr_t stream, std::optional<py::object> out) {
  const Problem& problem = inputs.problem;
  Require(CheckGradient(problem));
  const bool on_device = inputs.logits.on_device;
  std::vector<Tensor> kept;
  SumsGrad grad;
  for (const SumInfo& info : kSums) {
    if (!d_sums[info.sum]) continue;
    const std::string name = std::string("d_") + info.name;
    kept.push_back(TensorOf(*d_sums[info.sum], name.c_str()));
    const Tensor& tensor = kept.back();
    RequireSameMemory(tensor, name.c_str(), inputs.logits);
    if (tensor.dtype != problem.sums_dtype() || tensor.dims != problem.DimsOf(info)) {
      throw py::value_error(name + " must be of dtype " + Name(problem.sums_dtype()) + " and shape " +
                            Show(problem.DimsOf(info)));
    }
    grad.d_sums[info.sum] = tensor.data;
  }
  if (out) {
    kept.push_back(WritableTensorOf(*out, "out"));
    if (kept.back().dtype != problem.logits_dtype || kept.back().dims != inputs.logits.dims) {
      throw py::value_error("out must have the dtype and shape of logits");
    }
    RequireSameMemory(kept.back(), "out", inputs.logits);
    grad.d_logits = kept.back().data;
  } else {
    std::tie(out, grad.d_logits) = NewArray(on_device, problem.logits_dtype, inputs.logits.dims, stream);
  }
  if (on_device) {
#ifdef DICE_OP_WITH_CUDA
    Require(cuda::DiceSumsGrad(problem, grad, reinterpret_cast<void*>(stream)));
#endif
  } else {
    py::gil_scoped_release release;
    cpu::DiceSumsGrad(problem, grad, Threads(threads));
  }
  return *out;
}

#ifdef DICE_OP_WITH_FFI
// Returns the name that JAX has for one of XLA's platforms.
std::string JaxName(const std::string& platform) { return platform == "Host" ? "cpu" : platform; }

py::dict FfiTargets() {
  py::dict platforms;
  for (const ffi::Handler& handler : ffi::Handlers()) {
    const py::str platform(JaxName(handler.platform));
    if (!platforms.contains(platform)) platforms[platform] = py::dict();
    platforms[platform][handler.target] = py::capsule(handler.function, "xla._CUSTOM_CALL_TARGET");
  }
  return platforms;
}

size_t FfiWorkspace(const std::string& platform, int64_t batch, int64_t voxels, int64_t classes) {
  constexpr int64_t kMost = int64_t{1} << 20;  // so that no product overflows
  if (std::min({batch, voxels, classes}) < 0 || std::max({batch, classes, voxels / kMost}) > kMost) {
    throw py::value_error("batch, voxels and classes must be at least 0, and no more than a volume can have");
  }
  Problem problem;
  problem.batch = batch;
  problem.voxels = voxels;
  problem.classes = classes;
  size_t bytes = 0;
  Require(ffi::DiceSumsWorkspace(problem, platform == "cpu" ? "Host" : platform, &bytes));
  return bytes;
}
#endif

py::dict OpAttributes(const Options& options) {
  py::dict attributes;
  const auto in_python = [](const auto& attribute) -> py::object {
    using Attribute = std::decay_t<decltype(attribute)>;
    if constexpr (std::is_same_v<Attribute, std::vector<int64_t>> || std::is_same_v<Attribute, std::vector<float>>) {
      return py::array_t<typename Attribute::value_type>(attribute.size(), attribute.data());
    } else {
      return py::cast(attribute);
    }
  };
  ForEachOption(
      [&](const auto& option) { attributes[option.attribute] = in_python(ToAttribute(options.*option.value)); });
  return attributes;
}

py::dict BuildInfo() {
  const std::string levels = cpu::SimdLevels();
  py::dict info;
  info["version"] = DICE_OP_VERSION;
  const std::string tensorflow = DICE_OP_TENSORFLOW;
  info["tensorflow"] = tensorflow.empty() ? py::object(py::none()) : py::object(py::str(tensorflow));
#ifdef DICE_OP_WITH_CUDA
  info["cuda"] = cuda::Version();
  info["cuda_archs"] = py::str(cuda::Archs()).attr("split")(",");
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
#endif
#ifdef DICE_OP_WITH_FFI
  info["ffi"] = ffi::Version();
#else
  info["ffi"] = py::none();
#endif
  info["simd_levels"] = py::str(levels).attr("split")(",");
  info["simd_level"] = cpu::SimdLevel();
  info["compiler"] = DICE_OP_COMPILER;
  return info;
}

constexpr char kSumsDoc[] =
    "Compute the sums of each sample and class in one pass.\n\n"
    "Args:\n"
    "  logits: [N, spatial..., C] (channels_last) or [N, C, spatial...]; float16, bfloat16, float32, float64.\n"
    "  labels: class indices [N, spatial...], or one-hot or soft labels of the logits' shape; C-contiguous.\n"
    "  activation: 'softmax', 'sigmoid', or 'none' if the logits are already probabilities. For scores, 'argmax'\n"
    "    gives 1 to the class of the largest logit, and 'threshold' gives 1 to each logit above `threshold`.\n"
    "  squared_pred: whether pred_sum and label_sum add up squares.\n"
    "  soft_label: whether intersection adds up min(p, t) in place of p t, for soft labels.\n"
    "  voxel_weight: [N, spatial...], any dtype; voxels of weight 0 are left out.\n"
    "  ignore_label: voxels with this class index are left out.\n"
    "  cross_entropy: whether sum t (1-p)^gamma (-log p) is computed too, with gamma = focal_gamma and the labels t\n"
    "    smoothed by label_smoothing. For 'sigmoid' there is also sum (1-t) p^gamma (-log(1-p)).\n"
    "  focal_gammas: one exponent for each class, used in place of focal_gamma.\n"
    "  regions: for overlapping classes, the label values of each, such as [(1, 2, 3), (2, 3), (3,)].\n"
    "  label_sets: for label values that stand for one of several classes, a dict from the value to the classes,\n"
    "    such as {200: (0, 2, 3)}. Such a voxel says nothing about these classes.\n"
    "  dist_matrix: [C, C], how far each class is from each other one; the row is the label's class. It asks for\n"
    "    distance_sum.\n"
    "  threads: the number of threads, or 0 for one per processor. It does not change a single bit of the result.\n"
    "  stream: for arrays on a device, the CUDA stream to work on, as a number\n"
    "    (torch.cuda.current_stream().cuda_stream). The arrays must be ready on it.\n\n"
    "Returns: a dict with intersection, pred_sum, label_sum [, cross_entropy] [, negative_cross_entropy]\n"
    "  [, unknown_sum] [, distance_sum] of shape [N, C] and weight_sum [N]. negative_cross_entropy is for 'sigmoid'\n"
    "  with cross_entropy; unknown_sum, the weight of the voxels that may belong to a class, for label_sets; and\n"
    "  distance_sum, the sum over the voxels of a class of how far their predictions are from it, for dist_matrix.\n"
    "  The sums are float32, or float64 for float64 logits and for scores. On a device they are DeviceArrays, and\n"
    "  the sums of a sample are NaN if one of its labels is not a class.\n\n"
    "Raises: ValueError or TypeError, with a message that says which argument is wrong and what it must be.";

constexpr char kGradientDoc[] =
    "Compute the gradient of a loss with respect to the logits in one pass, from its derivatives with respect to\n"
    "the sums.\n\n"
    "Args:\n"
    "  d_intersection, d_pred_sum, d_cross_entropy, d_negative_cross_entropy: [N, C], of the sums' dtype. For\n"
    "    'sigmoid', give both cross-entropies or neither; the same array twice counts both the same.\n"
    "  d_distance_sum: the same, needed with dist_matrix.\n"
    "  out: the array to write to, with the logits' dtype and shape; not a list, but it may be the logits array.\n"
    "    After a MemoryError it may hold a part of the gradient.\n"
    "  The other arguments are those of `sums`. A label that is not a class belongs to no class.\n\n"
    "Returns: an array of the logits' dtype and shape.";

// Defines `sums` and `gradient`, which take every option by its name.
template <class... T>
void DefineCalls(py::module_& m, const std::tuple<Option<T>...>& list) {
  using py::arg;
  const Options defaults;
  std::apply(
      [&](const Option<T>&... option) {
        const auto read = [=](const typename InPython<T>::Type&... values) {
          Options options;
          ((options.*option.value = InPython<T>::Read(values)), ...);
          return options;
        };
        m.def(
            "sums",
            [read](const py::object& logits, const py::object& labels, const std::optional<py::object>& voxel_weight,
                   const typename InPython<T>::Type&... values, int threads, uintptr_t stream) {
              return RunSums(
                  InputsOf(TensorOf(logits, "logits"), TensorOf(labels, "labels"), voxel_weight, read(values...)),
                  threads, stream);
            },
            arg("logits"), arg("labels"), py::kw_only(), arg("voxel_weight") = py::none(),
            (arg(option.name) = InPython<T>::Default(defaults.*option.value))..., arg("threads") = 0, arg("stream") = 0,
            kSumsDoc);
        m.def(
            "gradient",
            [read](const py::object& logits, const py::object& labels, const py::object& d_intersection,
                   const py::object& d_pred_sum, const std::optional<py::object>& d_cross_entropy,
                   const std::optional<py::object>& d_negative_cross_entropy,
                   const std::optional<py::object>& d_distance_sum, const std::optional<py::object>& voxel_weight,
                   const typename InPython<T>::Type&... values, int threads, uintptr_t stream,
                   const std::optional<py::object>& out) {
              Options options = read(values...);
              const bool binary = options.activation == Activation::kSigmoid;
              if ((options.cross_entropy && !d_cross_entropy) ||
                  (binary && d_cross_entropy.has_value() != d_negative_cross_entropy.has_value())) {
                throw py::value_error(binary ? "a binary cross-entropy needs d_cross_entropy and "
                                               "d_negative_cross_entropy: the same array twice if both count the same"
                                             : "cross_entropy=True needs d_cross_entropy");
              }
              if (!binary && d_negative_cross_entropy) {
                throw py::value_error("d_negative_cross_entropy is only for activation='sigmoid'");
              }
              if ((options.dist_matrix.classes > 0) != d_distance_sum.has_value()) {
                throw py::value_error("dist_matrix and d_distance_sum must be given both or neither");
              }
              options.cross_entropy = d_cross_entropy.has_value();
              PerSum<std::optional<py::object>> d_sums;
              d_sums[Sum::kIntersection] = d_intersection;
              d_sums[Sum::kPredSum] = d_pred_sum;
              d_sums[Sum::kCrossEntropy] = d_cross_entropy;
              d_sums[Sum::kNegativeCrossEntropy] = d_negative_cross_entropy;
              d_sums[Sum::kDistanceSum] = d_distance_sum;
              return GradientOf(InputsOf(TensorOf(logits, "logits"), TensorOf(labels, "labels"), voxel_weight, options),
                                d_sums, threads, stream, out);
            },
            arg("logits"), arg("labels"), py::kw_only(), arg("d_intersection"), arg("d_pred_sum"),
            arg("d_cross_entropy") = py::none(), arg("d_negative_cross_entropy") = py::none(),
            arg("d_distance_sum") = py::none(), arg("voxel_weight") = py::none(),
            (arg(option.name) = InPython<T>::Default(defaults.*option.value))..., arg("threads") = 0, arg("stream") = 0,
            arg("out") = py::none(), kGradientDoc);
        m.def(
            "asked_sums",
            [read](const typename InPython<T>::Type&... values) {
              Problem problem;
              problem.options = read(values...);
              py::dict sums;
              for (const SumInfo& info : kSums) {
                if (problem.Has(info.sum)) sums[info.name] = info.has_gradient;
              }
              return sums;
            },
            py::kw_only(), (arg(option.name) = InPython<T>::Default(defaults.*option.value))...,
            "Name the sums that `sums` computes with these options, in their order. The values of the dict say which\n"
            "of them have a gradient.");
        m.def(
            "op_attributes",
            [read](const typename InPython<T>::Type&... values) { return OpAttributes(read(values...)); },
            py::kw_only(), (arg(option.name) = InPython<T>::Default(defaults.*option.value))...,
            "Convert options, given as for `sums`, to the attributes of the TensorFlow op and of XLA's handlers. All\n"
            "options are in the result, with their defaults, in the attributes' order: strings, bools, floats, and\n"
            "arrays of int64 or float32.");
      },
      list);
}

}  // namespace
}  // namespace dice_op

PYBIND11_MODULE(core, m) {
  using namespace dice_op;
  using py::arg;
  m.doc() =
      "This module computes the fused sums and gradients on arrays, without TensorFlow and without copies.\n\n"
      "It takes NumPy arrays, or arrays on a CUDA device that support DLPack (PyTorch, JAX, CuPy) or\n"
      "__cuda_array_interface__. All arrays of a call must be in the same memory and contiguous in C order. An\n"
      "object that NumPy can convert, such as a list, is copied once. N is the number of samples and C the number\n"
      "of classes; see dice_op.dice_sums for the formulas.";
#ifdef DICE_OP_WITH_CUDA
  py::class_<DeviceArray>(m, "DeviceArray",
                          "A result on a CUDA device. Other libraries read it through __cuda_array_interface__\n"
                          "(torch.as_tensor, cupy.asarray), and numpy() copies it to the host.")
      .def_property_readonly("__cuda_array_interface__", &DeviceArray::Interface)
      .def_property_readonly("shape", &DeviceArray::Shape)
      .def_property_readonly("dtype", [](const DeviceArray& array) -> py::object { return NumpyType(array.dtype()); })
      .def(
          "numpy", [](const DeviceArray& array) -> py::object { return array.ToNumpy(); },
          "Wait for the stream and return a copy on the host.");
#endif
  m.attr("PROBABILITY_EPSILON") = kProbabilityEpsilon;
  m.def("build_info", &BuildInfo,
        "Describe this build: its version, the tensorflow and cuda versions it was built for (None if it was built\n"
        "without), its cuda_archs, the version of XLA's foreign function interface (ffi) that its handlers were\n"
        "compiled with, the simd_levels it contains, the simd_level used here, and its compiler.");
  DefineCalls(m, kOptions);
  m.def(
      "scores", &ScoresOf, arg("prediction"), arg("labels"), py::kw_only(), arg("classes") = py::none(),
      arg("ignore_label") = py::none(), arg("regions") = py::none(), arg("label_sets") = py::none(),
      arg("threshold") = 0.0, arg("data_format") = "channels_last", arg("threads") = 0,
      "Compute hard scores of each sample and class, for evaluation scripts.\n\n"
      "Args:\n"
      "  prediction: a label map [N, spatial...] like `labels`, or floating-point logits [N, spatial..., C]. With\n"
      "    logits, a voxel belongs to the class of the largest logit; with one class or with regions, it belongs to\n"
      "    each class whose logit is above `threshold`.\n"
      "  labels: class indices [N, spatial...], of any dtype and byte order; with one class, the foreground mask.\n"
      "    Pass a single volume as volume[numpy.newaxis].\n"
      "  classes: the number of classes, needed if prediction is a label map and no regions are given.\n"
      "  ignore_label, regions, label_sets, data_format, threads: as for `sums`. A predicted label map holds classes\n"
      "    alone.\n\n"
      "Returns: a dict with dice, 2 I / (P + T), and jaccard, I / (P + T - I), both float64 [N, C]. They are NaN\n"
      "  for a class that is in neither map (numpy.nanmean leaves it out). The dict also has the voxel counts\n"
      "  intersection (I), pred_sum (P) and label_sum (T), int64 [N, C].\n\n"
      "Raises: ValueError or TypeError, with a message that says which argument is wrong and what it must be.");
  m.def(
      "label_kind", &LabelKindOf, arg("logits_shape"), arg("labels_shape"), arg("labels_dtype"), py::kw_only(),
      arg("ignore_label") = py::none(), arg("regions") = py::none(), arg("data_format") = "channels_last",
      "Say how labels of this shape and dtype are read. 'indices': one class index per voxel. 'per class': one-hot\n"
      "or soft labels, one per class. 'mask': a foreground mask of floats, one per voxel, which may be soft; only if\n"
      "there is one class. None in a shape stands for a size that is not known yet. If the number of classes is not\n"
      "known, floats that may be indices give 'mask', and labels of the logits' rank give 'per class'.\n\n"
      "Raises: ValueError if the shapes do not fit together.");
#ifdef DICE_OP_WITH_FFI
  m.def("ffi_targets", &FfiTargets,
        "Return the same calls as handlers of XLA's foreign function interface, for jax.ffi.register_ffi_target(name,\n"
        "handler, platform=platform): a dict from platform ('cpu', 'CUDA') to a dict from name to handler. The file\n"
        "csrc/core/dice_op.h describes their operands, results and attributes.");
  m.def("ffi_workspace", &FfiWorkspace, arg("platform"), arg("batch"), arg("voxels"), arg("classes"),
        "Return the size in bytes of the workspace, which is one of the results of dice_op_sums.");
#endif
}

// dice_op.core: the sums and gradients on arrays, without TensorFlow and without copies.
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

// Takes blocks one by one from a counter, on `threads` threads that live for the call.
class Threads final : public cpu::ParallelFor {
 public:
  explicit Threads(int threads) : threads_(threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency())) {}

  void Run(int64_t count, int64_t, Body body, void* context) const override {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < count;) body(context, i, i + 1);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(threads_, count); ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
  }

 private:
  int threads_;
};

void Require(const std::string& error) {
  if (!error.empty()) throw py::value_error(error);
}

// Of the label values of each class, as lists of lists, the mask of each value.
std::vector<int64_t> MasksOf(const py::object& regions) {
  std::vector<std::vector<int64_t>> labels;
  std::vector<int64_t> masks;
  try {
    for (const py::handle region : regions.is_none() ? py::tuple() : regions) {
      labels.emplace_back();
      for (const py::handle label : region) labels.back().push_back(label.cast<int64_t>());
    }
  } catch (const std::exception&) {
    throw py::type_error("regions must be a list of the label values of each class, such as [(1, 2, 3), (2, 3), (3,)]");
  }
  Require(RegionMasks(labels, &masks));
  return masks;
}

struct Inputs {
  Problem problem;
  Tensor logits, labels, voxel_weight;
};

Inputs InputsOf(Tensor logits, Tensor labels, const std::string& activation, bool squared_pred,
                const std::optional<py::object>& voxel_weight, const std::optional<int64_t>& ignore_label,
                bool cross_entropy, double focal_gamma, double label_smoothing, double threshold,
                const py::object& regions, const std::string& data_format) {
  Inputs inputs{{}, std::move(logits), std::move(labels), {}};
  Problem& problem = inputs.problem;
  Options& options = problem.options;
  Require(Parse(activation, &options.activation));
  Require(Parse(data_format, &options.data_format));
  Require(SetRegions(MasksOf(regions), &options));
  options.squared_pred = squared_pred;
  options.cross_entropy = cross_entropy;
  options.focal_gamma = focal_gamma;
  options.label_smoothing = label_smoothing;
  options.threshold = threshold;
  options.has_ignore_label = ignore_label.has_value();
  options.ignore_label = ignore_label.value_or(0);
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

// A new array on the host or on the device, for results, and its memory.
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
  const auto output = [&](const char* name, const Dims& dims) {
    const auto [array, data] = NewArray(on_device, problem.sums_dtype(), dims, stream);
    result[name] = array;
    return data;
  };
  const Dims shape = {problem.batch, problem.classes};
  Sums sums;
  sums.intersection = output("intersection", shape);
  sums.pred_sum = output("pred_sum", shape);
  sums.label_sum = output("label_sum", shape);
  sums.cross_entropy = problem.options.cross_entropy ? output("cross_entropy", shape) : nullptr;
  sums.weight_sum = output("weight_sum", {problem.batch});
  if (on_device) {
#ifdef DICE_OP_WITH_CUDA
    size_t bytes = 0;
    Check(cuda::DiceSumsWorkspace(problem, &bytes));
    const DeviceMemory workspace(bytes, stream);
    Check(cuda::DiceSums(problem, sums, workspace.data(), reinterpret_cast<void*>(stream)));
#endif
    return result;
  }
  BadValue bad;
  {
    py::gil_scoped_release release;
    std::vector<double> workspace(cpu::DiceSumsWorkspace(problem) / sizeof(double));
    bad = cpu::DiceSums(problem, sums, workspace.data(), Threads(threads));
  }
  if (bad.sample >= 0) throw py::value_error(DescribeBadValue(problem, inputs.logits.dims, bad));
  return result;
}

py::dict SumsOf(const py::object& logits, const py::object& labels, const std::string& activation, bool squared_pred,
                const std::optional<py::object>& voxel_weight, const std::optional<int64_t>& ignore_label,
                bool cross_entropy, double focal_gamma, double label_smoothing, double threshold,
                const py::object& regions, const std::string& data_format, int threads, uintptr_t stream) {
  return RunSums(
      InputsOf(TensorOf(logits, "logits"), TensorOf(labels, "labels"), activation, squared_pred, voxel_weight,
               ignore_label, cross_entropy, focal_gamma, label_smoothing, threshold, regions, data_format),
      threads, stream);
}

// Counts of two label maps.
py::dict CountsOf(const Tensor& prediction, const Tensor& labels, int64_t classes, Options options, int threads) {
  Problem problem;
  problem.options = options;
  problem.options.activation = Activation::kThreshold;  // one that regions have
  problem.options.data_format = DataFormat::kChannelsLast;
  problem.labels = labels.data;
  problem.labels_dtype = labels.dtype;
  Dims logits = labels.dims;  // as if there were some
  logits.push_back(classes);
  Require(MakeProblem(logits, labels.dims, {}, &problem));
  problem.dense_labels = false;  // a mask of floats must be one of zeros and ones here
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
  BadValue bad_label, bad_prediction;
  {
    py::gil_scoped_release release;
    bad_label = cpu::CountLabels(problem, prediction.data, prediction.dtype, counts, Threads(threads), &bad_prediction);
  }
  if (bad_label.sample >= 0) throw py::value_error(DescribeBadValue(problem, logits, bad_label));
  if (bad_prediction.sample >= 0) {
    throw py::value_error(DescribeBadPrediction(problem, logits, prediction.data, prediction.dtype, bad_prediction));
  }
  return result;
}

py::dict ScoresOf(const py::object& prediction, const py::object& labels, const std::optional<int64_t>& classes,
                  const std::optional<int64_t>& ignore_label, const py::object& regions, double threshold,
                  const std::string& data_format, int threads) {
  const Tensor predicted = LabelMapOf(prediction, "prediction"), truth = LabelMapOf(labels, "labels");
  if (predicted.on_device || truth.on_device) {
    throw py::value_error("prediction and labels must be in host memory: scores are counted there");
  }
  Options options;
  Require(Parse(data_format, &options.data_format));
  Require(SetRegions(MasksOf(regions), &options));
  options.has_ignore_label = ignore_label.has_value();
  options.ignore_label = ignore_label.value_or(0);
  const bool are_logits = predicted.dims != truth.dims;
  if (are_logits && !IsFloat(predicted.dtype)) {
    throw py::value_error("prediction has shape " + Show(predicted.dims) + ", but labels " + Show(truth.dims) +
                          ": two label maps must have the same");
  }
  int64_t count = classes.value_or(-1);
  if (options.region_labels) {
    count = py::len(regions);
  } else if (are_logits && predicted.dims.size() > 1) {
    count = predicted.dims[options.data_format == DataFormat::kChannelsLast ? predicted.dims.size() - 1 : 1];
  } else if (!classes) {
    throw py::value_error("classes, the number of classes, is needed where prediction is a label map");
  }
  if (count < 1 || classes.value_or(count) != count) {
    throw py::value_error("classes is " + std::to_string(classes.value_or(count)) +
                          (count < 1 ? ", but must be at least 1" : ", but there are " + std::to_string(count)));
  }
  py::dict result;
  if (are_logits) {
    Inputs inputs = InputsOf(predicted, truth, count == 1 || options.region_labels ? "threshold" : "argmax", false, {},
                             ignore_label, false, 0, 0, threshold, regions, data_format);
    if (inputs.problem.dense_labels && count > 1) {
      throw py::value_error("labels have shape " + Show(truth.dims) +
                            ", but must be class indices, without a class axis");
    }
    inputs.problem.dense_labels = false;  // as above
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

// Shapes and dtypes alone, of which None is not known yet: what MakeProblem takes the labels for.
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
  Options& options = problem.options;
  Require(Parse(data_format, &options.data_format));
  Require(SetRegions(MasksOf(regions), &options));
  options.activation = Activation::kSigmoid;  // one that regions have
  options.has_ignore_label = ignore_label.has_value();
  problem.labels_dtype = DTypeNamed(labels_dtype, "labels");
  const Dims logits = known(logits_shape), labels = known(labels_shape);
  Require(MakeProblem(logits, labels, {}, &problem));
  const size_t axis = options.data_format == DataFormat::kChannelsLast ? logits.size() - 1 : 1;
  const bool unknown_channels = labels.size() == logits.size() && labels[axis] < 0 && logits[axis] != 1;
  if (unknown_channels) return "per class";  // more often than an axis of length 1
  if (!problem.dense_labels) return "indices";
  return HaveOneValuePerVoxel(labels, logits, options.data_format) ? "mask" : "per class";
}

py::object GradientOf(const py::object& logits, const py::object& labels, const py::object& d_intersection,
                      const py::object& d_pred_sum, const std::optional<py::object>& d_cross_entropy,
                      const std::string& activation, bool squared_pred, const std::optional<py::object>& voxel_weight,
                      const std::optional<int64_t>& ignore_label, double focal_gamma, double label_smoothing,
                      const py::object& regions, const std::string& data_format, int threads, uintptr_t stream,
                      std::optional<py::object> out) {
  const Inputs inputs =
      InputsOf(TensorOf(logits, "logits"), TensorOf(labels, "labels"), activation, squared_pred, voxel_weight,
               ignore_label, d_cross_entropy.has_value(), focal_gamma, label_smoothing, 0, regions, data_format);
  const Problem& problem = inputs.problem;
  Require(CheckGradient(problem));
  const bool on_device = inputs.logits.on_device;
  std::vector<Tensor> kept;
  const auto coefficients = [&](const py::object& array, const char* name) -> const void* {
    kept.push_back(TensorOf(array, name));
    const Tensor& tensor = kept.back();
    RequireSameMemory(tensor, name, inputs.logits);
    const Dims shape = {problem.batch, problem.classes};
    if (tensor.dtype != problem.sums_dtype() || tensor.dims != shape) {
      throw py::value_error(std::string(name) + " must be of dtype " + Name(problem.sums_dtype()) + " and shape " +
                            Show(shape));
    }
    return tensor.data;
  };
  SumsGrad grad;
  grad.d_intersection = coefficients(d_intersection, "d_intersection");
  grad.d_pred_sum = coefficients(d_pred_sum, "d_pred_sum");
  grad.d_cross_entropy = d_cross_entropy ? coefficients(*d_cross_entropy, "d_cross_entropy") : nullptr;
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
    Check(cuda::DiceSumsGrad(problem, grad, reinterpret_cast<void*>(stream)));
#endif
  } else {
    py::gil_scoped_release release;
    cpu::DiceSumsGrad(problem, grad, Threads(threads));
  }
  return *out;
}

#ifdef DICE_OP_WITH_FFI
// XLA's platforms as JAX names them.
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
  info["simd_levels"] = py::str(levels).attr("split")(",");
  info["simd_level"] = cpu::SimdLevel();
  info["compiler"] = DICE_OP_COMPILER;
  return info;
}

}  // namespace
}  // namespace dice_op

PYBIND11_MODULE(core, m) {
  using namespace dice_op;
  using py::arg;
  m.doc() =
      "The fused sums and gradients on arrays, without TensorFlow and without copies.\n\n"
      "NumPy arrays, or arrays on a CUDA device that speak DLPack (PyTorch, JAX, CuPy) or\n"
      "__cuda_array_interface__; all of one call in the same memory, contiguous in C order. What NumPy can convert, "
      "such\n"
      "as a list, is copied once. N samples, C classes; see dice_op.dice_sums for the formulas.";
#ifdef DICE_OP_WITH_CUDA
  py::class_<DeviceArray>(m, "DeviceArray",
                          "An array on a CUDA device, as results are. Other libraries take it through\n"
                          "__cuda_array_interface__ (torch.as_tensor, cupy.asarray); numpy() copies it to the host.")
      .def_property_readonly("__cuda_array_interface__", &DeviceArray::Interface)
      .def_property_readonly("shape", &DeviceArray::Shape)
      .def_property_readonly("dtype", [](const DeviceArray& array) { return NumpyType(array.dtype()); })
      .def("numpy", &DeviceArray::ToNumpy, "A copy on the host, once the stream has done its work.");
#endif
  m.def("build_info", &BuildInfo,
        "What this build is: version, tensorflow and cuda it was built for (None: without), cuda_archs, "
        "simd_levels it holds, simd_level in use here, compiler.");
  m.def(
      "sums", &SumsOf, arg("logits"), arg("labels"), py::kw_only(), arg("activation") = "softmax",
      arg("squared_pred") = false, arg("voxel_weight") = py::none(), arg("ignore_label") = py::none(),
      arg("cross_entropy") = false, arg("focal_gamma") = 0.0, arg("label_smoothing") = 0.0, arg("threshold") = 0.0,
      arg("regions") = py::none(), arg("data_format") = "channels_last", arg("threads") = 0, arg("stream") = 0,
      "The sums of each sample and class, in one pass.\n\n"
      "Args:\n"
      "  logits: [N, spatial..., C] (channels_last) or [N, C, spatial...]; float16, bfloat16, float32, float64.\n"
      "  labels: class indices [N, spatial...] or one-hot or soft labels of the logits' shape; C-contiguous.\n"
      "  activation: 'softmax', 'sigmoid' or 'none' (logits are probabilities already); for scores 'argmax', 1 for\n"
      "    the class of the largest logit, or 'threshold', 1 for each logit above `threshold`.\n"
      "  squared_pred: squares in pred_sum and label_sum.\n"
      "  voxel_weight: [N, spatial...], any dtype; voxels of weight 0 count for nothing.\n"
      "  ignore_label: voxels with this class index count for nothing.\n"
      "  cross_entropy, focal_gamma, label_smoothing: also sum t (1-p)^gamma (-log p), the labels smoothed.\n"
      "  regions: for classes that overlap: the label values of each, such as [(1, 2, 3), (2, 3), (3,)].\n"
      "  threads: 0 for one per processor. The result does not depend on it, bit for bit.\n"
      "  stream: on a device, the CUDA stream to work on, as a number (torch.cuda.current_stream().cuda_stream). The\n"
      "    arrays must be ready on it.\n\n"
      "Returns: a dict of intersection, pred_sum, label_sum [, cross_entropy] of shape [N, C] and weight_sum [N],\n"
      "  float32 (float64 for float64 logits and for scores); on a device as DeviceArray, and NaN for a sample\n"
      "  with a label that is no class.\n\n"
      "Raises: ValueError, TypeError, saying which argument is wrong and what it must be.");
  m.def(
      "scores", &ScoresOf, arg("prediction"), arg("labels"), py::kw_only(), arg("classes") = py::none(),
      arg("ignore_label") = py::none(), arg("regions") = py::none(), arg("threshold") = 0.0,
      arg("data_format") = "channels_last", arg("threads") = 0,
      "Hard scores of each sample and class, for evaluation scripts.\n\n"
      "Args:\n"
      "  prediction: a label map [N, spatial...], as `labels`; or logits [N, spatial..., C] of floats: the class of\n"
      "    the largest then, or, for one class and for regions, where they are above `threshold`.\n"
      "  labels: class indices [N, spatial...], of any dtype and byte order; with one class the foreground mask. One\n"
      "    volume is volume[numpy.newaxis].\n"
      "  classes: their number, where prediction is a label map and no regions are given.\n"
      "  ignore_label, regions, data_format, threads: as for `sums`.\n\n"
      "Returns: a dict of dice, 2 I / (P + T), and jaccard, I / (P + T - I), float64 [N, C], NaN for a class that is\n"
      "  in neither map (numpy.nanmean leaves it out); and of the counts of voxels intersection (I), pred_sum (P),\n"
      "  label_sum (T), int64 [N, C].\n\n"
      "Raises: ValueError, TypeError, saying which argument is wrong and what it must be.");
  m.def(
      "label_kind", &LabelKindOf, arg("logits_shape"), arg("labels_shape"), arg("labels_dtype"), py::kw_only(),
      arg("ignore_label") = py::none(), arg("regions") = py::none(), arg("data_format") = "channels_last",
      "What labels of that shape and dtype are taken for: 'indices', class indices, one for each voxel; 'per class',\n"
      "one-hot or soft labels, one for each class; 'mask', a foreground mask of floats, which may be soft, one for "
      "each\n"
      "voxel, where there is one class. None in a shape is a size that is not known yet; where that is the number of\n"
      "classes, 'mask' is said of floats that may be indices, and 'per class' of labels of the logits' rank.\n\n"
      "Raises: ValueError where the shapes do not fit.");
  m.def("region_masks", &MasksOf, arg("regions"),
        "Of classes given as label values, as `sums` takes them, the mask of each value 0, 1, ...: bit c set where\n"
        "it belongs to class c. The attribute `regions` of the TensorFlow op and of XLA's handlers.");
  m.def("gradient", &GradientOf, arg("logits"), arg("labels"), py::kw_only(), arg("d_intersection"), arg("d_pred_sum"),
        arg("d_cross_entropy") = py::none(), arg("activation") = "softmax", arg("squared_pred") = false,
        arg("voxel_weight") = py::none(), arg("ignore_label") = py::none(), arg("focal_gamma") = 0.0,
        arg("label_smoothing") = 0.0, arg("regions") = py::none(), arg("data_format") = "channels_last",
        arg("threads") = 0, arg("stream") = 0, arg("out") = py::none(),
        "The gradient of a loss with respect to the logits, in one pass, from its derivatives with respect to the "
        "sums.\n\n"
        "Args:\n"
        "  d_intersection, d_pred_sum, d_cross_entropy: [N, C], of the sums' dtype.\n"
        "  out: array to write to, of the logits' dtype and shape, never a list; may be the logits themselves.\n"
        "  The others are those of `sums`. Labels that are no class count as absent.\n\n"
        "Returns: an array of the logits' dtype and shape.");
#ifdef DICE_OP_WITH_FFI
  m.def("ffi_targets", &FfiTargets,
        "The same calls as handlers of XLA's foreign function interface, for jax.ffi.register_ffi_target(name,\n"
        "handler, platform=platform): a dict from platform ('cpu', 'CUDA') to a dict from name to handler. Their\n"
        "operands, results and attributes are described in csrc/core/dice_op.h.");
  m.def("ffi_workspace", &FfiWorkspace, arg("platform"), arg("batch"), arg("voxels"), arg("classes"),
        "Bytes of the workspace among the results of dice_op_sums.");
#endif
}

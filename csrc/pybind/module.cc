// dice_op.core: the sums and gradients on NumPy arrays, without TensorFlow and without copies.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "core/dice_op.h"
#include "core/problem.h"

namespace py = pybind11;

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

DType DTypeOf(const py::array& array, const char* name) {
  const std::string dtype = py::str(array.dtype().attr("name"));
  static const std::pair<const char*, DType> kTypes[] = {
      {"bool", DType::kBool},     {"uint8", DType::kUint8},    {"int8", DType::kInt8},
      {"uint16", DType::kUint16}, {"int16", DType::kInt16},    {"int32", DType::kInt32},
      {"int64", DType::kInt64},   {"float16", DType::kHalf},   {"bfloat16", DType::kBFloat16},
      {"float32", DType::kFloat}, {"float64", DType::kDouble},
  };
  for (const auto& [known, type] : kTypes) {
    if (dtype == known) return type;
  }
  throw py::type_error(std::string(name) + " has dtype " + dtype +
                       ", but must be bool, uint8, int8, uint16, int16, int32, int64, float16, bfloat16, "
                       "float32 or float64");
}

// The array's memory, read as it is.
const void* DataOf(const py::array& array, const char* name) {
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) +
                          " is not contiguous in C order; numpy.ascontiguousarray() makes a copy that is");
  }
  if (!array.dtype().attr("isnative").cast<bool>()) {
    throw py::value_error(std::string(name) + " is not in this machine's byte order");
  }
  return array.data();
}

Dims DimsOf(const py::array& array) { return Dims(array.shape(), array.shape() + array.ndim()); }

template <class E>
E OneOf(const char* argument, const std::string& value, std::initializer_list<std::pair<const char*, E>> choices) {
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (value == name) return choice;
    names += (names.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  throw py::value_error(std::string(argument) + " is '" + value + "', but must be one of " + names);
}

Problem ProblemOf(const py::array& logits, const py::array& labels, const std::string& activation, bool squared_pred,
                  const std::optional<py::array>& voxel_weight, const std::optional<int64_t>& ignore_label,
                  bool cross_entropy, double focal_gamma, const std::string& data_format) {
  Problem problem;
  Options& options = problem.options;
  options.activation = OneOf<Activation>(
      "activation", activation,
      {{"softmax", Activation::kSoftmax}, {"sigmoid", Activation::kSigmoid}, {"none", Activation::kNone}});
  options.data_format =
      OneOf<DataFormat>("data_format", data_format,
                        {{"channels_last", DataFormat::kChannelsLast}, {"channels_first", DataFormat::kChannelsFirst}});
  options.squared_pred = squared_pred;
  options.cross_entropy = cross_entropy;
  options.focal_gamma = focal_gamma;
  options.has_ignore_label = ignore_label.has_value();
  options.ignore_label = ignore_label.value_or(0);
  problem.logits = DataOf(logits, "logits");
  problem.logits_dtype = DTypeOf(logits, "logits");
  problem.labels = DataOf(labels, "labels");
  problem.labels_dtype = DTypeOf(labels, "labels");
  std::optional<Dims> weight;
  if (voxel_weight) {
    problem.voxel_weight = DataOf(*voxel_weight, "voxel_weight");
    problem.weight_dtype = DTypeOf(*voxel_weight, "voxel_weight");
    weight = DimsOf(*voxel_weight);
  }
  const std::string error = MakeProblem(DimsOf(logits), DimsOf(labels), weight, &problem);
  if (!error.empty()) throw py::value_error(error);
  return problem;
}

// The sums' type: that of the arithmetic.
py::dtype SumsType(const Problem& problem) {
  return problem.logits_dtype == DType::kDouble ? py::dtype::of<double>() : py::dtype::of<float>();
}

py::dict SumsOf(const py::array& logits, const py::array& labels, const std::string& activation, bool squared_pred,
                const std::optional<py::array>& voxel_weight, const std::optional<int64_t>& ignore_label,
                bool cross_entropy, double focal_gamma, const std::string& data_format, int threads) {
  const Problem problem = ProblemOf(logits, labels, activation, squared_pred, voxel_weight, ignore_label, cross_entropy,
                                    focal_gamma, data_format);
  py::dict result;
  const auto output = [&](const char* name, std::vector<py::ssize_t> shape) {
    py::array array(SumsType(problem), shape);
    result[name] = array;
    return array.mutable_data();
  };
  const std::vector<py::ssize_t> shape = {problem.batch, problem.classes};
  Sums sums;
  sums.intersection = output("intersection", shape);
  sums.pred_sum = output("pred_sum", shape);
  sums.label_sum = output("label_sum", shape);
  sums.cross_entropy = cross_entropy ? output("cross_entropy", shape) : nullptr;
  sums.weight_sum = output("weight_sum", {problem.batch});
  BadLabel bad;
  {
    py::gil_scoped_release release;
    std::vector<double> workspace(cpu::DiceSumsWorkspace(problem) / sizeof(double));
    bad = cpu::DiceSums(problem, sums, workspace.data(), Threads(threads));
  }
  if (bad.sample >= 0) throw py::value_error(DescribeBadLabel(problem, DimsOf(logits), bad));
  return result;
}

py::array GradientOf(const py::array& logits, const py::array& labels, const py::array& d_intersection,
                     const py::array& d_pred_sum, const std::optional<py::array>& d_cross_entropy,
                     const std::string& activation, bool squared_pred, const std::optional<py::array>& voxel_weight,
                     const std::optional<int64_t>& ignore_label, double focal_gamma, const std::string& data_format,
                     int threads, std::optional<py::array> out) {
  const Problem problem = ProblemOf(logits, labels, activation, squared_pred, voxel_weight, ignore_label,
                                    d_cross_entropy.has_value(), focal_gamma, data_format);
  const auto coefficients = [&](const py::array& array, const char* name) {
    if (!array.dtype().equal(SumsType(problem)) || DimsOf(array) != Dims{problem.batch, problem.classes}) {
      throw py::value_error(std::string(name) + " must be of dtype " +
                            std::string(py::str(SumsType(problem).attr("name"))) + " and shape [" +
                            std::to_string(problem.batch) + ", " + std::to_string(problem.classes) + "]");
    }
    return DataOf(array, name);
  };
  if (!out) out = py::array(logits.dtype(), std::vector<py::ssize_t>(logits.shape(), logits.shape() + logits.ndim()));
  if (!out->dtype().equal(logits.dtype()) || DimsOf(*out) != DimsOf(logits)) {
    throw py::value_error("out must have the dtype and shape of logits");
  }
  DataOf(*out, "out");
  SumsGrad grad;
  grad.d_intersection = coefficients(d_intersection, "d_intersection");
  grad.d_pred_sum = coefficients(d_pred_sum, "d_pred_sum");
  grad.d_cross_entropy = d_cross_entropy ? coefficients(*d_cross_entropy, "d_cross_entropy") : nullptr;
  grad.d_logits = out->mutable_data();
  {
    py::gil_scoped_release release;
    cpu::DiceSumsGrad(problem, grad, Threads(threads));
  }
  return *out;
}

py::dict BuildInfo() {
  const std::string levels = cpu::SimdLevels();
  py::dict info;
  info["version"] = DICE_OP_VERSION;
  const std::string tensorflow = DICE_OP_TENSORFLOW;
  info["tensorflow"] = tensorflow.empty() ? py::object(py::none()) : py::object(py::str(tensorflow));
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
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
      "The fused sums and gradients on NumPy arrays, without TensorFlow and without copies.\n\n"
      "Arrays must be contiguous in C order. N samples, C classes; see dice_op.dice_sums for the formulas.";
  m.def("build_info", &BuildInfo,
        "What this build is: version, tensorflow and cuda it was built for (None: without), cuda_archs, "
        "simd_levels it holds, simd_level in use here, compiler.");
  m.def("sums", &SumsOf, arg("logits"), arg("labels"), py::kw_only(), arg("activation") = "softmax",
        arg("squared_pred") = false, arg("voxel_weight") = py::none(), arg("ignore_label") = py::none(),
        arg("cross_entropy") = false, arg("focal_gamma") = 0.0, arg("data_format") = "channels_last",
        arg("threads") = 0,
        "The sums of each sample and class, in one pass.\n\n"
        "Args:\n"
        "  logits: [N, spatial..., C] (channels_last) or [N, C, spatial...]; float16, bfloat16, float32, float64.\n"
        "  labels: class indices [N, spatial...] or one-hot or soft labels of the logits' shape; C-contiguous.\n"
        "  activation: 'softmax', 'sigmoid' or 'none' (logits are probabilities already).\n"
        "  squared_pred: squares in pred_sum and label_sum.\n"
        "  voxel_weight: [N, spatial...], any dtype; voxels of weight 0 count for nothing.\n"
        "  ignore_label: voxels with this class index count for nothing.\n"
        "  cross_entropy, focal_gamma: also sum t (1-p)^gamma (-log p).\n"
        "  threads: 0 for one per processor. The result does not depend on it, bit for bit.\n\n"
        "Returns: a dict of intersection, pred_sum, label_sum [, cross_entropy] of shape [N, C] and weight_sum [N],\n"
        "  float32 (float64 for float64 logits).\n\n"
        "Raises: ValueError, TypeError, saying which argument is wrong and what it must be.");
  m.def("gradient", &GradientOf, arg("logits"), arg("labels"), py::kw_only(), arg("d_intersection"), arg("d_pred_sum"),
        arg("d_cross_entropy") = py::none(), arg("activation") = "softmax", arg("squared_pred") = false,
        arg("voxel_weight") = py::none(), arg("ignore_label") = py::none(), arg("focal_gamma") = 0.0,
        arg("data_format") = "channels_last", arg("threads") = 0, arg("out") = py::none(),
        "The gradient of a loss with respect to the logits, in one pass, from its derivatives with respect to the "
        "sums.\n\n"
        "Args:\n"
        "  d_intersection, d_pred_sum, d_cross_entropy: [N, C], of the sums' dtype.\n"
        "  out: array to write to, of the logits' dtype and shape; may be the logits themselves.\n"
        "  The others are those of `sums`. Labels that are no class count as absent.\n\n"
        "Returns: an array of the logits' dtype and shape.");
}

// The entry points of the library: all that the TensorFlow op, XLA's handlers and the pybind11 module include.
//
// Plain pointers, a shape, and memory that the caller owns; nothing here knows a framework. Each
// pointer carries its shape in a comment: N samples, V voxels per sample, C classes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace dice_op {

enum class DType : int {
  kBool,
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kInt32,
  kInt64,
  kHalf,
  kBFloat16,
  kFloat,
  kDouble,
};

// The last two give 0 or 1, for scores: they have neither cross-entropy nor gradient.
enum class Activation : int { kSoftmax, kSigmoid, kNone, kArgmax, kThreshold };
enum class DataFormat : int { kChannelsLast, kChannelsFirst };

// What the sums are to be: the attributes of the op.
struct Options {
  Activation activation = Activation::kSoftmax;
  DataFormat data_format = DataFormat::kChannelsLast;
  bool squared_pred = false;     // cardinalities of squares: sum p^2 and sum t^2
  bool cross_entropy = false;    // accumulate the cross-entropy as well
  double focal_gamma = 0.0;      // its focal exponent; 0 is plain cross-entropy
  double label_smoothing = 0.0;  // s: its labels are (1 - s) t + s / C, for sigmoid (1 - s) t + s / 2
  double threshold = 0.0;        // of the activation of that name: logits above it count as 1
  bool has_ignore_label = false;
  int64_t ignore_label = 0;  // voxels with this integer label count for nothing
  // Where classes are overlapping regions, each a set of label values: bit c of regions[label] says that the
  // label belongs to class c. Labels below region_labels are known; 0: classes are label values.
  static constexpr int kMaxRegions = 32;
  int region_labels = 0;
  uint32_t regions[kMaxRegions] = {};
};

// One call. Made by `MakeProblem` (problem.h), which alone decides what is a legal one.
struct Problem {
  Options options;
  int64_t batch = 0;          // N
  int64_t voxels = 0;         // V
  int64_t classes = 0;        // C
  bool dense_labels = false;  // labels hold t itself, one value per class
  DType logits_dtype = DType::kFloat;
  DType labels_dtype = DType::kUint8;
  DType weight_dtype = DType::kFloat;
  const void* logits = nullptr;        // [N, V, C], or [N, C, V] if channels first
  const void* labels = nullptr;        // [N, V] class indices, or laid out as the logits if dense
  const void* voxel_weight = nullptr;  // [N, V], or null for ones

  int64_t logits_count() const { return batch * voxels * classes; }

  // With one class there is no background channel: integer labels are the foreground mask, so the
  // only channel is class 1 of {0, 1}.
  int64_t first_class() const { return classes == 1 && !options.region_labels ? 1 : 0; }
  int64_t label_limit() const { return options.region_labels ? options.region_labels : classes == 1 ? 2 : classes; }
  // Whether every class has a categorical cross-entropy, not the label's alone.
  bool smoothed() const {
    return options.cross_entropy && options.label_smoothing != 0 && options.activation != Activation::kSigmoid;
  }
  // Whether the kernels take a label for each class, as it stands there or made of the index, and not one index.
  bool labels_per_class() const { return dense_labels || options.region_labels || smoothed(); }
  bool hard() const { return options.activation > Activation::kNone; }
  // Whether the arithmetic is double: that of counts, too, where sums of the voxels' weights would be rounded in float.
  bool in_double() const {
    return logits_dtype == DType::kDouble || (hard() && voxel_weight && weight_dtype >= DType::kInt32);
  }
  // In the precision of the logits, so that those that are as large as the threshold are not above it.
  double threshold() const {
    return logits_dtype == DType::kDouble ? options.threshold : static_cast<float>(options.threshold);
  }
  // Of the sums: that of the arithmetic, but for counts a double, which holds any.
  DType sums_dtype() const { return hard() || logits_dtype == DType::kDouble ? DType::kDouble : DType::kFloat; }
  // Among so many labels the smoothing of one is spread.
  double label_choices() const { return options.activation == Activation::kSigmoid ? 2 : static_cast<double>(classes); }
};

// Of the problem's sums_dtype(). A null cross_entropy is not written.
struct Sums {
  void* intersection;   // [N, C]  sum m p t
  void* pred_sum;       // [N, C]  sum m p,  or sum m p^2
  void* label_sum;      // [N, C]  sum m t,  or sum m t^2
  void* cross_entropy;  // [N, C]  sum m t (1-p)^gamma (-log p); sigmoid: plus its mirror image
  void* weight_sum;     // [N]     sum m
};

// The loss's derivatives with respect to the sums, of the sums' type.
struct SumsGrad {
  const void* d_intersection;   // [N, C]
  const void* d_pred_sum;       // [N, C]
  const void* d_cross_entropy;  // [N, C], or null
  void* d_logits;               // as the logits; may be the logits' own memory
};

// A voxel with a label that is no class, or with a prediction that is no probability where the activation is none.
// sample < 0: there was none.
struct BadValue {
  int64_t sample = -1;
  int64_t voxel = -1;
  bool in_prediction = false;
};

// What follows is what dice_op_kernels.so exports.
#pragma GCC visibility push(default)

namespace cpu {

// Runs body(begin, end) over disjoint ranges that cover [0, count), on any threads it likes.
// `cost` is a hint: nanoseconds per item. The result never depends on how the ranges are cut.
class ParallelFor {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  virtual ~ParallelFor() = default;
  virtual void Run(int64_t count, int64_t cost, Body body, void* context) const = 0;

  // The same with a function object.
  template <class Fn>
  void ForRanges(int64_t count, int64_t cost, const Fn& fn) const {
    if (count == 0) return;
    const auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Fn*>(context))(begin, end); };
    Run(count, cost, body, const_cast<Fn*>(&fn));
  }
};

// On a pool of threads that others use too. A thread that is slow or comes late takes fewer pieces; the caller takes
// part, and waits only for helpers that have begun, so that a pool whose threads all wait in calls like this one still
// gets on. The body must not throw.
class PoolParallelFor : public ParallelFor {
 public:
  void Run(int64_t count, int64_t cost, Body body, void* context) const noexcept final;

 protected:
  virtual int64_t threads() const = 0;
  virtual void Schedule(std::function<void()> task) const = 0;
};

// Bytes of scratch memory that DiceSums needs, aligned to 8.
size_t DiceSumsWorkspace(const Problem& problem);

// A bad value makes the sums meaningless: the first one is returned.
BadValue DiceSums(const Problem& problem, const Sums& sums, void* workspace, const ParallelFor& parallel);

// Expects labels that DiceSums accepted; others belong to no class.
void DiceSumsGrad(const Problem& problem, const SumsGrad& grad, const ParallelFor& parallel);

// Counts of voxels for hard scores, where the prediction is a label map as well.
struct Counts {
  int64_t* intersection;  // [N, C]  voxels of the class in both maps
  int64_t* pred_sum;      // [N, C]  in the prediction
  int64_t* label_sum;     // [N, C]  in the labels
};

// prediction: [N, V] class indices, in the place of the problem's logits. A value that is no class makes the counts
// meaningless: the first one of the labels is returned, the prediction's in *bad_prediction. Voxels that the labels
// ignore may be predicted as anything.
BadValue CountLabels(const Problem& problem, const void* prediction, DType prediction_dtype, const Counts& counts,
                     const ParallelFor& parallel, BadValue* bad_prediction);

// Comma-separated names of the SIMD levels in this binary, and the one that runs here: the best
// the processor has, or what the environment variable DICE_OP_SIMD asks for.
const char* SimdLevels();
const char* SimdLevel();

}  // namespace cpu

// Everything is enqueued on `stream` (a cudaStream_t) of the current device; pointers are device
// memory. Each returns what went wrong, in words, or an empty string.
namespace cuda {

constexpr int kMaxClasses = 256;

// Bytes of scratch memory that DiceSums or FindBadValue need, aligned to 8, on any GPU: it asks for none.
std::string DiceSumsWorkspace(const Problem& problem, size_t* bytes);

// A bad value makes its sample's sums NaN.
std::string DiceSums(const Problem& problem, const Sums& sums, void* workspace, void* stream);

// Expects labels that DiceSums accepted; others belong to no class.
std::string DiceSumsGrad(const Problem& problem, const SumsGrad& grad, void* stream);

// The first bad value, if there is one; `value`, 8 bytes on the host, receives it as it stands in the array, but not a
// label that is one of several of its voxel. Waits for the stream: for those who look for the reason of a NaN.
std::string FindBadValue(const Problem& problem, void* workspace, void* stream, BadValue* bad, void* value);

// Whether the environment asks for that search before each DiceSums: DICE_OP_CHECK_LABELS=1.
bool ChecksLabels();

int CurrentDevice();  // or -1

// Memory in the order of the stream, for callers without a framework that has some. CopyToHost waits.
std::string Allocate(size_t bytes, void* stream, void** memory);
std::string Release(void* memory, void* stream);
std::string CopyToHost(void* to, const void* from, size_t bytes, void* stream);

// What the kernels were compiled with ("13.0") and for ("75,80,90").
const char* Version();
const char* Archs();

}  // namespace cuda

// The same calls for the compiler XLA: handlers of its typed foreign function interface (FFI), for TensorFlow's
// jit_compile and for JAX.
//
//   dice_op_sums(logits, labels [, voxel_weight])
//     -> intersection, pred_sum, label_sum, cross_entropy, weight_sum, workspace
//   dice_op_sums_grad(logits, labels [, voxel_weight], d_intersection, d_pred_sum, d_cross_entropy) -> d_logits
//
// Shapes and dtypes are those of the TensorFlow ops (cross_entropy and its derivative [N, 0] where it is not asked
// for), and so are the attributes: activation, data_format (strings), squared_pred, with_cross_entropy (bool),
// focal_gamma, label_smoothing, threshold (float64), ignore_label (int64 array of none or one), regions (int64 array).
// workspace: uint8 [bytes], see below; an output, so that its memory is the compiled program's own, also where that is
// replayed as a CUDA graph.
namespace ffi {

struct Handler {
  const char* target;    // "dice_op_sums" or "dice_op_sums_grad"
  const char* platform;  // "Host" or "CUDA", as XLA names them
  void* function;        // an XLA_FFI_Handler*
  uint32_t traits;       // XLA_FFI_Handler_Traits
};

// Of the platforms that this build serves.
const std::vector<Handler>& Handlers();

// Bytes of the workspace on that platform; or what is wrong, in words.
std::string DiceSumsWorkspace(const Problem& problem, const std::string& platform, size_t* bytes);

}  // namespace ffi

#pragma GCC visibility pop

}  // namespace dice_op

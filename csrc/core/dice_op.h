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

#include "core/error.h"
#include "core/options.h"
#include "core/sums.h"

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

using Dims = std::vector<int64_t>;  // -1: not known yet

// One call. Made by `MakeProblem` (problem.h), which alone decides what is a legal one.
struct Problem {
  Options options;
  Dims logits_dims;           // [N, spatial..., C], or [N, C, spatial...] if channels first
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
  bool channels_last() const { return options.data_format == DataFormat::kChannelsLast; }
  bool has_regions() const { return options.regions.labels > 0; }

  // With one class there is no background channel: integer labels are the foreground mask, so the
  // only channel is class 1 of {0, 1}.
  int64_t first_class() const { return classes == 1 && !has_regions() ? 1 : 0; }
  int64_t label_limit() const { return has_regions() ? options.regions.labels : classes == 1 ? 2 : classes; }
  // Whether every class has a categorical cross-entropy, not the label's alone.
  bool smoothed() const {
    return options.cross_entropy && options.label_smoothing != 0 && options.activation != Activation::kSigmoid;
  }
  // Whether the kernels take a label for each class, as it stands there or made of the index, and not one index.
  bool labels_per_class() const { return dense_labels || has_regions() || smoothed(); }
  // Whether some voxels may count for nothing.
  bool masked() const { return voxel_weight || options.ignore_label.given; }
  bool hard() const { return options.activation > Activation::kNone; }
  // Whether the arithmetic is double: that of counts, too, where sums of the voxels' weights would be rounded in float.
  bool in_double() const {
    return logits_dtype == DType::kDouble || (hard() && voxel_weight && weight_dtype >= DType::kInt32);
  }
  // Of the sums: that of the arithmetic, but for counts a double, which holds any.
  DType sums_dtype() const { return hard() || logits_dtype == DType::kDouble ? DType::kDouble : DType::kFloat; }
  // Whether the call asks for that sum.
  bool Has(Sum sum) const { return sum != Sum::kCrossEntropy || options.cross_entropy; }
  // The shape of that sum, which is empty where the call does not ask for it.
  Dims DimsOf(const SumInfo& info) const {
    return info.per_class ? Dims{batch, Has(info.sum) ? classes : 0} : Dims{batch};
  }
};

// Where each sum goes, of the problem's sums_dtype(); null for a sum that the call does not ask for.
using Sums = PerSum<void*>;

struct SumsGrad {
  // The loss's derivatives with respect to the sums, [N, C] of the sums' dtype; null for the sums without a gradient
  // and for those that the loss does not use.
  PerSum<const void*> d_sums;
  void* d_logits;  // as the logits; may be the logits' own memory
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

// A label that is no class, or with activation 'none' a prediction that is no probability, is an error that names the
// first such voxel; the sums mean nothing then.
Error DiceSums(const Problem& problem, const Sums& sums, void* workspace, const ParallelFor& parallel);

// Expects labels that DiceSums accepted; others belong to no class.
void DiceSumsGrad(const Problem& problem, const SumsGrad& grad, const ParallelFor& parallel);

// Counts of voxels for hard scores, where the prediction is a label map as well.
struct Counts {
  int64_t* intersection;  // [N, C]  voxels of the class in both maps
  int64_t* pred_sum;      // [N, C]  in the prediction
  int64_t* label_sum;     // [N, C]  in the labels
};

// prediction: [N, V] class indices, in the place of the problem's logits. A value that is no class is an error, but
// voxels that the labels ignore may be predicted as anything.
Error CountLabels(const Problem& problem, const void* prediction, DType prediction_dtype, const Counts& counts,
                  const ParallelFor& parallel);

// Comma-separated names of the SIMD levels in this binary, and the one that runs here: the best
// the processor has, or what the environment variable DICE_OP_SIMD asks for.
const char* SimdLevels();
const char* SimdLevel();

}  // namespace cpu

// Everything is enqueued on `stream` (a cudaStream_t) of the current device; pointers are device memory.
namespace cuda {

constexpr int kMaxClasses = 256;

// Bytes of scratch memory that DiceSums or FindBadValue need, aligned to 8, on any GPU: it asks for none.
Error DiceSumsWorkspace(const Problem& problem, size_t* bytes);

// A label that is no class, or with activation 'none' a prediction that is no probability, makes its sample's sums NaN;
// where ChecksLabels(), it is an error that FindBadValue describes.
Error DiceSums(const Problem& problem, const Sums& sums, void* workspace, void* stream);

// Expects labels that DiceSums accepted; others belong to no class.
Error DiceSumsGrad(const Problem& problem, const SumsGrad& grad, void* stream);

// An error that names the first such voxel, if there is one. Waits for the stream: for those who look for the reason
// of a NaN.
Error FindBadValue(const Problem& problem, void* workspace, void* stream);

// Whether the environment asks for that search before each DiceSums: DICE_OP_CHECK_LABELS=1.
bool ChecksLabels();

int CurrentDevice();  // or -1

// Memory in the order of the stream, for callers without a framework that has some. CopyToHost waits.
Error Allocate(size_t bytes, void* stream, void** memory);
Error Release(void* memory, void* stream);
Error CopyToHost(void* to, const void* from, size_t bytes, void* stream);

// What the kernels were compiled with ("13.0") and for ("75,80,90").
const char* Version();
const char* Archs();

}  // namespace cuda

// The same calls for the compiler XLA: handlers of its typed foreign function interface (FFI), for TensorFlow's
// jit_compile and for JAX.
//
//   dice_op_sums(logits, labels [, voxel_weight]) -> the sums of kSums, workspace
//   dice_op_sums_grad(logits, labels [, voxel_weight], the derivatives of those with a gradient) -> d_logits
//
// Shapes and dtypes are those of the TensorFlow ops (cross_entropy and its derivative [N, 0] where it is not asked
// for). The attributes are those of kOptions, all of them: strings, bools, float64, and arrays of int64.
// workspace: uint8 [bytes], see below; an output, so that its memory is the compiled program's own, also where that is
// replayed as a CUDA graph.
namespace ffi {

struct Handler {
  const char* target;    // "dice_op_sums" or "dice_op_sums_grad"
  const char* platform;  // "Host" or "CUDA", as XLA names them
  void* function;        // an XLA_FFI_Handler*
  uint32_t traits;       // XLA_FFI_Handler_Traits
};

// Two for each platform that this build serves.
const std::vector<Handler>& Handlers();

// Bytes of the workspace on that platform.
Error DiceSumsWorkspace(const Problem& problem, const std::string& platform, size_t* bytes);

}  // namespace ffi

#pragma GCC visibility pop

}  // namespace dice_op

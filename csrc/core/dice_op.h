// The entry points of the library. The TensorFlow op, XLA's handlers and the pybind11 module include nothing else.
//
// If the system refuses memory, a call throws std::bad_alloc, which each front end turns into its framework's error.
//
// The calls take plain pointers, a shape, and memory that the caller owns; nothing here depends on a framework. The
// comment behind each pointer gives its shape: there are N samples, V voxels per sample and C classes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/inline.h"
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

// One call. Only `MakeProblem` (problem.h) makes it, and only that function decides which calls are legal.
struct Problem {
  Options options;
  Dims logits_dims;            // [N, spatial..., C], or [N, C, spatial...] if channels first
  int64_t batch = 0;           // N
  int64_t voxels = 0;          // V
  int64_t classes = 0;         // C
  bool dense_labels = false;   // the labels hold t itself, one value per class
  bool single_counts = false;  // the caller wants counts as floats
  DType logits_dtype = DType::kFloat;
  DType labels_dtype = DType::kUint8;
  DType weight_dtype = DType::kFloat;
  const void* logits = nullptr;        // [N, V, C], or [N, C, V] if channels first
  const void* labels = nullptr;        // [N, V] class indices, or laid out as the logits if dense
  const void* voxel_weight = nullptr;  // [N, V], or null for ones

  int64_t logits_count() const { return batch * voxels * classes; }
  bool channels_last() const { return options.data_format == DataFormat::kChannelsLast; }
  DICE_OP_INLINE bool has_regions() const { return options.regions.labels > 0; }
  DICE_OP_INLINE bool has_label_sets() const { return options.label_sets.labels > 0; }
  // The sets of classes of the label values, of either option.
  DICE_OP_INLINE const ClassSets& sets() const {
    return has_label_sets() ? static_cast<const ClassSets&>(options.label_sets) : options.regions;
  }

  // With one class there is no background channel. Integer labels are then the foreground mask, and the only channel
  // is class 1 of {0, 1}.
  int64_t first_class() const { return classes == 1 && !has_regions() ? 1 : 0; }
  // Legal label values are below it. With label_sets, not all of those are legal.
  int64_t label_limit() const {
    return has_regions()  ? options.regions.labels
           : classes == 1 ? 2
                          : std::max<int64_t>(classes, options.label_sets.labels);
  }
  // Whether a label value below label_limit() is legal.
  bool HasMeaning(int64_t label) const {
    return !has_label_sets() || options.label_sets.IndexOf(static_cast<int>(label), static_cast<int>(classes)) >= 0;
  }
  // Whether every class has a categorical cross-entropy term, and not only the class of the label.
  DICE_OP_INLINE bool smoothed() const {
    return options.cross_entropy && options.label_smoothing != 0 && options.activation != Activation::kSigmoid;
  }
  // Whether each class has its own focal exponent.
  DICE_OP_INLINE bool has_gammas() const { return options.cross_entropy && options.focal_gammas.count > 0; }
  DICE_OP_INLINE bool has_distances() const { return options.dist_matrix.classes > 0; }
  // Whether an option is a table that a kernel looks up for each class, see AllClasses.
  DICE_OP_INLINE bool has_tables() const { return has_label_sets() || has_gammas() || has_distances(); }
  // Whether the kernels work with one label value per class instead of one index. The values are either in memory or
  // computed from the index.
  DICE_OP_INLINE bool labels_per_class() const {
    return dense_labels || has_regions() || has_label_sets() || smoothed() || has_gammas() || has_distances();
  }
  // Whether t may be a fraction.
  bool soft_labels() const { return dense_labels && labels_dtype >= DType::kHalf; }
  // Whether some voxels may be left out.
  bool masked() const { return voxel_weight || options.ignore_label.given; }
  bool hard() const { return options.activation > Activation::kNone; }
  // Whether the arithmetic is in double. Weighted counts need it too if float would round the sums of the weights.
  bool in_double() const {
    return logits_dtype == DType::kDouble || (hard() && voxel_weight && weight_dtype >= DType::kInt32);
  }
  // The dtype of the sums. It is the one of the arithmetic, but counts are doubles, which hold every count exactly,
  // unless the caller has none.
  DType sums_dtype() const {
    return logits_dtype == DType::kDouble || (hard() && !single_counts) ? DType::kDouble : DType::kFloat;
  }
  // Whether the call asks for this sum.
  bool Has(Sum sum) const {
    switch (sum) {
      case Sum::kCrossEntropy:
        return options.cross_entropy;
      case Sum::kNegativeCrossEntropy:
        return options.cross_entropy && options.activation == Activation::kSigmoid;
      case Sum::kUnknownSum:
        return has_label_sets();
      case Sum::kDistanceSum:
        return has_distances();
      default:
        return true;
    }
  }
  // The shape of this sum, which has no elements if the call does not ask for the sum.
  Dims DimsOf(const SumInfo& info) const {
    return info.per_class ? Dims{batch, Has(info.sum) ? classes : 0} : Dims{batch};
  }
};

// The memory that each sum is written to, of the problem's sums_dtype(); null if the call does not ask for the sum.
using Sums = PerSum<void*>;

struct SumsGrad {
  // The derivatives of the loss with respect to the sums, [N, C] of the sums' dtype. They are null for sums that have
  // no gradient and for sums that the loss does not use.
  PerSum<const void*> d_sums;
  void* d_logits;  // laid out like the logits; may be the logits' own memory
};

// dice_op_kernels.so exports everything that follows.
#pragma GCC visibility push(default)

namespace cpu {

// Runs body(begin, end) over disjoint ranges that cover [0, count), on any number of threads. `cost` is a hint: the
// nanoseconds that one item takes. The result does not depend on how the ranges are cut. The body must not throw.
class ParallelFor {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  virtual ~ParallelFor() = default;
  virtual void Run(int64_t count, int64_t cost, Body body, void* context) const = 0;

  // Does the same with a body that may throw, on whichever thread. The caller gets one of the exceptions, when all
  // threads are done.
  void RunThrowing(int64_t count, int64_t cost, Body body, void* context) const;

  // Does that with a function object.
  template <class Fn>
  void ForRanges(int64_t count, int64_t cost, const Fn& fn) const {
    if (count == 0) return;
    const auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const Fn*>(context))(begin, end); };
    RunThrowing(count, cost, body, const_cast<Fn*>(&fn));
  }
};

// Runs on a pool of threads that others use too. A thread that is slow or starts late takes fewer pieces. The caller
// works as well, and waits only for helpers that have started: so there is no deadlock when every thread of the pool
// waits in such a call. Where memory is refused, fewer threads work.
class PoolParallelFor : public ParallelFor {
 public:
  void Run(int64_t count, int64_t cost, Body body, void* context) const noexcept final;

 protected:
  virtual int64_t threads() const = 0;
  virtual void Schedule(std::function<void()> task) const = 0;
};

// The number of bytes of scratch memory that DiceSums needs. The memory must be aligned to 8 bytes.
size_t DiceSumsWorkspace(const Problem& problem);

// Returns an error that names the first bad voxel if a label is not a class, or if the activation is 'none' and a
// prediction is not a probability. The sums are then undefined.
Error DiceSums(const Problem& problem, const Sums& sums, void* workspace, const ParallelFor& parallel);

// Expects labels that DiceSums has accepted. Other labels belong to no class.
void DiceSumsGrad(const Problem& problem, const SumsGrad& grad, const ParallelFor& parallel);

// The counts of voxels for hard scores. Here the prediction is a label map too.
struct Counts {
  int64_t* intersection;  // [N, C]  voxels of the class in both maps
  int64_t* pred_sum;      // [N, C]  in the prediction
  int64_t* label_sum;     // [N, C]  in the labels
};

// prediction: [N, V] class indices, used instead of the problem's logits. A value that is not a class is an error,
// except at voxels that the labels ignore: there the prediction may hold any value.
Error CountLabels(const Problem& problem, const void* prediction, DType prediction_dtype, const Counts& counts,
                  const ParallelFor& parallel);

// SimdLevels lists the SIMD levels in this binary, separated by commas. SimdLevel is the one that runs here: the best
// that the processor has, or the one that the environment variable DICE_OP_SIMD asks for.
const char* SimdLevels();
const char* SimdLevel();

}  // namespace cpu

// All work is enqueued on `stream`, a cudaStream_t of the current device. The pointers are to device memory.
namespace cuda {

constexpr int kMaxClasses = 256;
constexpr int kMaxClassesWithDistances = 25;  // so that the matrix fits in a kernel's parameter

// The number of bytes of scratch memory that DiceSums and FindBadValue need. The memory must be aligned to 8 bytes. The
// number is the same for every GPU, and it can be computed without one.
Error DiceSumsWorkspace(const Problem& problem, size_t* bytes);

// The sums of a sample are NaN if one of its labels is not a class, or if the activation is 'none' and a prediction is
// not a probability. If ChecksLabels() is true, such a value is an error instead, which FindBadValue describes.
Error DiceSums(const Problem& problem, const Sums& sums, void* workspace, void* stream);

// Expects labels that DiceSums has accepted. Other labels belong to no class.
Error DiceSumsGrad(const Problem& problem, const SumsGrad& grad, void* stream);

// Returns an error that names the first voxel with a bad label or prediction, if there is one. It waits for the stream,
// so call it only to find out where a NaN comes from.
Error FindBadValue(const Problem& problem, void* workspace, void* stream);

// Whether the environment asks for this search before each DiceSums, by DICE_OP_CHECK_LABELS=1.
bool ChecksLabels();

int CurrentDevice();  // or -1

// These allocate, release and copy memory in the order of the stream, for callers that have no framework to do so.
// CopyToHost waits for the stream.
Error Allocate(size_t bytes, void* stream, void** memory);
Error Release(void* memory, void* stream);
Error CopyToHost(void* to, const void* from, size_t bytes, void* stream);

// The CUDA version that compiled the kernels ("13.0"), and the architectures they were compiled for ("75,80,90").
const char* Version();
const char* Archs();

}  // namespace cuda

// The same calls for the compiler XLA, as handlers of its typed foreign function interface (FFI). TensorFlow's
// jit_compile and JAX use them.
//
//   dice_op_sums(logits, labels [, voxel_weight]) -> the sums of kSums, workspace
//   dice_op_sums_grad(logits, labels [, voxel_weight], the derivatives of the sums that have a gradient) -> d_logits
//
// Shapes and dtypes are those of the TensorFlow ops: a sum that the call does not ask for is [N, 0], and so is its
// derivative. The attributes are all those of kOptions, as strings, bools, float64, and arrays of int64 or float32.
// workspace: uint8 [bytes or more], see below. It is an output, so that the compiled program owns its memory even when
// the program is replayed as a CUDA graph.
namespace ffi {

struct Handler {
  const char* target;    // "dice_op_sums" or "dice_op_sums_grad"
  const char* platform;  // "Host" or "CUDA", as XLA names them
  void* function;        // an XLA_FFI_Handler*
  uint32_t traits;       // XLA_FFI_Handler_Traits
};

// There are two handlers for each platform that this build supports.
const std::vector<Handler>& Handlers();

// The version of XLA's interface that the handlers were compiled with, such as "0.1". A runtime that has an older one
// refuses them.
std::string Version();

// The number of bytes that the workspace has on this platform.
Error DiceSumsWorkspace(const Problem& problem, const std::string& platform, size_t* bytes);

}  // namespace ffi

#pragma GCC visibility pop

}  // namespace dice_op

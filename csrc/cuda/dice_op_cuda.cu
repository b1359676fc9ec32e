// Chooses the kernel and the grid of a call, launches the kernel, and adds the blocks' sums in order. So the bits of
// the result are the same in every run on the same kind of GPU.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/dice_op.h"
#include "core/dtype.h"
#include "core/problem.h"
#include "cuda/call.h"
#include "cuda/device.h"

namespace dice_op {
namespace cuda {
namespace {

constexpr int kWarps = 4;  // per block, for the kernels in this file
constexpr int kThreads = kWarps * kWarp;

// A launch has at most this many blocks, which is more than a GPU holds at once, or one per sample. So the size of the
// workspace is known without a GPU, which XLA needs when it compiles.
constexpr int64_t kMaxBlocks = 4096;
static_assert(kMaxBlocks <= 65535, "a grid's second dimension");

// Kernels count the tiles of a sample in 32 bits, which is enough for 4 billion voxels or more.
constexpr int64_t kMaxTiles = int64_t{1} << 30;

// A block can have this much shared memory on every GPU, and no kernel takes more.
constexpr int kMostShared = 64 << 10;

// --- errors -------------------------------------------------------------------------------------------

// Whether the runtime says that the kernel is not compiled for this GPU.
[[maybe_unused]] bool HasNoCode(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
}

// Turns an error of the CUDA runtime into one of ours.
Error ErrorOf(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // else the next caller of the runtime would see the error
  std::string text = std::string(what) + ": " + cudaGetErrorString(error);
#ifdef __CUDACC__
  if (HasNoCode(error) || error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += "; this build of dice_op holds machine code for the architectures " + std::string(Archs()) +
            ", but this GPU has sm_" + std::to_string(major * 10 + minor) +
            ": install a build for it, or build with DICE_OP_CUDA_ARCHS=" + std::to_string(major * 10 + minor);
  }
#endif
  return DeviceFailure(text);
}

// --- what a launch needs --------------------------------------------------------------------------------

struct Plan {
  Variant variant;
  GeneralCall call;
  dim3 blocks = dim3(0);  // without blocks there is nothing to do
  int threads = 0;
  size_t shared_bytes = 0;

  // Calls fn(kernel, call) with the kernel, and as much of `call` as it takes.
  template <class Fn>
  auto WithKernel(Fn&& fn) const {
    return variant.plain ? fn(variant.plain, static_cast<const Call&>(call)) : fn(variant.general, call);
  }
  cudaError_t Launch(cudaStream_t stream) const {
    return WithKernel([&](auto* kernel, const auto& parameter) {
      return dice_op::Launch(kernel, blocks, threads, shared_bytes, stream, parameter);
    });
  }
};

int64_t LabelsEnd(DType dtype) {  // returns the first number that a signed type cannot hold
  return dtype == DType::kInt8 ? 128 : int64_t{1} << 15;
}

Error CheckClasses(const Problem& problem) {
  const int most = problem.has_distances() ? kMaxClassesWithDistances : kMaxClasses;
  if (problem.classes <= most) return {};
  return Unsupported("logits (y_pred) have " + std::to_string(problem.classes) +
                     " classes, but the GPU kernels take at most " + std::to_string(most) +
                     (problem.has_distances() ? " with dist_matrix" : "") + ": compute the loss on the CPU");
}

// Sets the size of the blocks and what the kernel needs of the GPU. Returns also how many blocks a multiprocessor can
// hold at a time.
cudaError_t Prepare(Plan* plan, int* resident) {
  plan->threads = plan->variant.warps * kWarp;
  plan->shared_bytes = static_cast<size_t>(plan->variant.shared_per_warp) * plan->variant.warps;
  return plan->WithKernel([&](auto* kernel, const auto&) {
    cudaError_t error = cudaSuccess;
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute, value);
    };
    // CUDA gives more only if asked. The answer holds for every thread that launches the kernel, so all ask for the
    // same, whatever their problems need: none can then take back what another has asked for.
    if (plan->shared_bytes > 48 << 10) {
      set(cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
    }
    if (plan->shared_bytes > 4 << 10) {  // for tiles: take all there is, as they need no cache
      set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(resident, kernel, plan->threads, plan->shared_bytes);
  });
}

// d_logits is null for the sums.
Error MakePlan(const Problem& problem, const void* d_logits, Plan* plan) {
  DICE_OP_RETURN_IF_ERROR(CheckClasses(problem));
  if (problem.logits_count() == 0) return {};
  plan->variant = FindPlain(problem, d_logits);
  if (!plan->variant.plain) plan->variant = FindGeneral(problem, d_logits);

  int device = 0, multiprocessors = 0, resident = 0;
  DICE_OP_RETURN_IF_ERROR(ErrorOf(cudaGetDevice(&device), "cudaGetDevice"));
  DICE_OP_RETURN_IF_ERROR(ErrorOf(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                                  "cudaDeviceGetAttribute"));
  cudaError_t refused = Prepare(plan, &resident);
#ifdef DICE_OP_WITH_PTX
  if (HasNoCode(refused)) {
    cudaGetLastError();  // else the next caller of the runtime would see the error
    plan->variant = FindPortable(problem, d_logits);
    refused = Prepare(plan, &resident);
  }
#endif
  DICE_OP_RETURN_IF_ERROR(ErrorOf(refused, "the preparation of a kernel"));

  const Variant& variant = plan->variant;
  GeneralCall& call = plan->call;
  call.logits = problem.logits;
  call.labels = problem.labels;
  call.weight = problem.voxel_weight;
  call.voxels = problem.voxels;
  const int64_t tiles = (problem.voxels + variant.tile - 1) / variant.tile;
  if (tiles > kMaxTiles) {
    return Unsupported("a sample has " + std::to_string(problem.voxels) + " voxels, but the GPU kernels take at most " +
                       std::to_string(kMaxTiles * variant.tile) + " of " + std::to_string(problem.classes) +
                       " classes: compute the loss on the CPU");
  }
  call.tiles = static_cast<int>(tiles);
  call.last_voxels = static_cast<int>(problem.voxels - (tiles - 1) * variant.tile);
  // All blocks run at once, each with its share of the tiles. A second wave would fill only a part of the GPU.
  const int64_t at_once = std::min(kMaxBlocks, static_cast<int64_t>(multiprocessors) * std::max(1, resident));
  const int64_t useful = (tiles + variant.warps - 1) / variant.warps;
  call.blocks_per_sample = static_cast<int>(std::max<int64_t>(1, std::min(useful, at_once / problem.batch)));
  if (problem.batch > 0x7fffffff / RowLength(problem.classes)) {
    return Unsupported("the batch has more samples than a GPU can take in one call: make it smaller");
  }
  plan->blocks = dim3(static_cast<unsigned>(problem.batch), static_cast<unsigned>(call.blocks_per_sample));
  call.ignore_label = problem.options.ignore_label;
  call.terms = TermsOf(problem);
  call.terms.gammas = nullptr;  // a kernel finds them in the call
  call.has_gammas = problem.has_gammas();
  call.has_regions = problem.has_regions();
  call.has_label_sets = problem.has_label_sets();
  if (call.has_regions || call.has_label_sets) static_cast<ClassSets&>(call.sets) = problem.sets();
  if (problem.has_distances()) {
    const std::vector<float>& distances = problem.options.dist_matrix.values;
    std::copy(distances.begin(), distances.end(), call.distances);
  }
  if (call.has_gammas) call.focal_gammas = problem.options.focal_gammas;
  call.classes = static_cast<int>(problem.classes);
  call.first_class = static_cast<int>(problem.first_class());
  call.label_limit = static_cast<int>(std::min(problem.label_limit(), LabelsEnd(problem.labels_dtype)));
  call.label_bytes = SizeOf(problem.labels_dtype);
  call.has_ignored = WithType(problem.labels_dtype, [&](auto type) {  // no label has a value that its type cannot hold
    using T = typename decltype(type)::type;
    const int64_t value = call.ignore_label.value;
    if constexpr (std::is_integral_v<T>) {
      call.ignored = static_cast<uint32_t>(static_cast<std::make_unsigned_t<T>>(value));
      return call.ignore_label.given && static_cast<int64_t>(static_cast<T>(value)) == value;
    }
    return false;
  });
  call.row_padding = variant.row_padding;
  call.row_words = variant.row_words;
  call.row_magic = variant.row_magic;
  call.access_bytes = variant.access_bytes;
  call.shared_per_warp = variant.shared_per_warp;
  call.logits_dtype = problem.logits_dtype;
  call.labels_dtype = problem.labels_dtype;
  call.weight_dtype = problem.weight_dtype;
  call.planar = !problem.channels_last();
  call.dense_labels = problem.dense_labels;
  return {};
}

// --- from the blocks' sums to the outputs -----------------------------------------------------------------

struct Partials {
  const double* values;  // [N, blocks_per_sample, PartialLength]
  int class_sums;        // in a row
  int64_t batch;
  int64_t voxels;  // the sum of the weights if there are none
  int blocks_per_sample, classes;
  bool weighted;
  Sums outputs;
};

// Each sum has one warp. A lane adds the sums of every 32nd block, and then the lanes add their results. A label that
// is not a class makes the sums of its sample NaN, as TensorFlow's sparse cross-entropy does on a GPU.
template <class R>
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ Partials partials) {
  const int classes = partials.classes, class_sums = partials.class_sums;
  const int row = static_cast<int>(RowLength(classes, class_sums)), length = PartialLength(classes, class_sums);
  const int64_t item = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  const int64_t sample = item / row;
  const int entry = item % row;
  if (sample >= partials.batch) return;
  const bool per_class = entry < class_sums * classes;
  const int sum = per_class ? entry / classes : kClassSumCount + entry - class_sums * classes;
  void* const output = partials.outputs.values[sum];
  if (!output) return;
  const double* const first = partials.values + sample * partials.blocks_per_sample * length;
  double total = 0, bad = 0;
  for (int block = Lane(); block < partials.blocks_per_sample; block += kWarp) {
    total += first[static_cast<int64_t>(block) * length + entry];
    bad += first[static_cast<int64_t>(block) * length + length - 1];
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    total += FromPartner(total, distance);
    bad += FromPartner(bad, distance);
  }
  if (sum == static_cast<int>(Sum::kWeightSum) && !partials.weighted) total = static_cast<double>(partials.voxels);
  if (bad > 0) total = NAN;
  if (Lane() == 0)
    static_cast<R*>(output)[per_class ? sample * classes + entry % classes : sample] = static_cast<R>(total);
}

// --- the search for bad labels and predictions --------------------------------------------------------------

struct ValueCheck {
  const void* labels;
  const void* predictions;  // or null if they are logits
  const void* weight;       // or null
  int64_t samples, voxels, classes, limit;
  IgnoreLabel ignore_label;
  LabelSets label_sets;
  DType labels_dtype, predictions_dtype, weight_dtype;
  bool dense, channels_last;
  unsigned long long* first;  // out: the smallest 2 * (sample * voxels + voxel), plus 1 for a prediction
};

__global__ void __launch_bounds__(kThreads) CheckValuesKernel(const __grid_constant__ ValueCheck check) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; at < check.samples * check.voxels;
       at += step) {
    bool counts = !check.weight || ReadNumber<double>(check.weight, check.weight_dtype, at) != 0;
    bool good_label = true, good_prediction = true;
    if (!check.dense) {
      const double label = ReadNumber<double>(check.labels, check.labels_dtype, at);  // only bad integers may round
      const bool ignored = check.ignore_label.given && label == static_cast<double>(check.ignore_label.value);
      good_label =
          ignored || (IsClass(label, static_cast<double>(check.limit)) &&
                      (check.label_sets.labels == 0 ||
                       check.label_sets.IndexOf(static_cast<int>(label), static_cast<int>(check.classes)) >= 0));
      counts = counts && !ignored;
    }
    for (int64_t c = 0; counts && c < check.classes; ++c) {
      const int64_t place =
          PlaceInLogits(at / check.voxels, at % check.voxels, c, check.voxels, check.classes, check.channels_last);
      if (check.dense && check.labels_dtype != DType::kBool) {
        const double t = ReadNumber<double>(check.labels, check.labels_dtype, place);
        good_label &= IsSoftLabel(t, check.labels_dtype >= DType::kHalf);
      }
      if (check.predictions) {
        good_prediction &= IsProbability(ReadNumber<double>(check.predictions, check.predictions_dtype, place));
      }
    }
    if (!good_label || !good_prediction) {
      atomicMin(check.first, static_cast<unsigned long long>(2 * at + (good_label ? 1 : 0)));
    }
  }
}

}  // namespace

#ifdef DICE_OP_CUDA_VERSION  // a program that tests the kernels needs none of these
const char* Version() { return DICE_OP_CUDA_VERSION; }
const char* Archs() { return DICE_OP_CUDA_ARCHS; }

int CurrentDevice() {
  int device = -1;
  return ErrorOf(cudaGetDevice(&device), "cudaGetDevice") ? -1 : device;
}

Error Allocate(size_t bytes, void* stream, void** memory) {
  return ErrorOf(cudaMallocAsync(memory, bytes, static_cast<cudaStream_t>(stream)), "cudaMallocAsync");
}
Error Release(void* memory, void* stream) {
  return ErrorOf(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)), "cudaFreeAsync");
}
#endif

Error CopyToHost(void* to, const void* from, size_t bytes, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  DICE_OP_RETURN_IF_ERROR(ErrorOf(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, queue), "cudaMemcpyAsync"));
  return ErrorOf(cudaStreamSynchronize(queue), "cudaStreamSynchronize");
}

Error DiceSumsWorkspace(const Problem& problem, size_t* bytes) {
  *bytes = sizeof(int64_t);  // for FindBadValue
  DICE_OP_RETURN_IF_ERROR(CheckClasses(problem));
  if (problem.logits_count() == 0) return {};
  const int64_t blocks_per_sample = std::max<int64_t>(1, std::min(problem.voxels, kMaxBlocks / problem.batch));
  *bytes = problem.batch * blocks_per_sample * PartialLength(static_cast<int>(problem.classes), kClassSumCount) *
           sizeof(double);
  return {};
}

Error DiceSums(const Problem& problem, const Sums& sums, void* workspace, void* stream) {
  if (ChecksLabels()) DICE_OP_RETURN_IF_ERROR(FindBadValue(problem, workspace, stream));
  if (problem.batch == 0) return {};
  const auto queue = static_cast<cudaStream_t>(stream);
  Plan plan;
  DICE_OP_RETURN_IF_ERROR(MakePlan(problem, nullptr, &plan));
  if (plan.blocks.x > 0) {
    plan.call.partials = static_cast<double*>(workspace);
    DICE_OP_RETURN_IF_ERROR(ErrorOf(plan.Launch(queue), "the launch of the sums' kernel"));
  }
  Partials partials = {};
  partials.values = static_cast<const double*>(workspace);
  partials.class_sums = plan.blocks.x > 0 ? plan.variant.class_sums : kClassSumCount;
  partials.batch = problem.batch;
  partials.voxels = problem.voxels;
  partials.blocks_per_sample = plan.blocks.x > 0 ? plan.call.blocks_per_sample : 0;
  partials.classes = static_cast<int>(problem.classes);
  partials.weighted = problem.masked();
  partials.outputs = sums;
  const int64_t blocks = (problem.batch * RowLength(problem.classes, partials.class_sums) + kWarps - 1) / kWarps;
  const auto combine = problem.sums_dtype() == DType::kDouble ? CombineKernel<double> : CombineKernel<float>;
  DICE_OP_RETURN_IF_ERROR(ErrorOf(Launch(combine, dim3(static_cast<unsigned>(blocks)), kThreads, 0, queue, partials),
                                  "the launch of the combining kernel"));
  return {};
}

Error DiceSumsGrad(const Problem& problem, const SumsGrad& grad, void* stream) {
  Plan plan;
  DICE_OP_RETURN_IF_ERROR(MakePlan(problem, grad.d_logits, &plan));
  if (plan.blocks.x == 0) return {};
  plan.call.d_sums = grad.d_sums;
  plan.call.terms.cross_entropy = grad.d_sums[Sum::kCrossEntropy] != nullptr;
  plan.call.d_logits = grad.d_logits;
  return ErrorOf(plan.Launch(static_cast<cudaStream_t>(stream)), "the launch of the gradient's kernel");
}

Error FindBadValue(const Problem& problem, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  ValueCheck check = {};
  check.labels = problem.labels;
  check.predictions = problem.options.activation == Activation::kNone ? problem.logits : nullptr;
  check.weight = problem.voxel_weight;
  check.samples = problem.batch;
  check.voxels = problem.voxels;
  check.classes = problem.classes;
  check.limit = problem.label_limit();
  check.ignore_label = problem.options.ignore_label;
  check.label_sets = problem.options.label_sets;
  check.labels_dtype = problem.labels_dtype;
  check.predictions_dtype = problem.logits_dtype;
  check.weight_dtype = problem.weight_dtype;
  check.dense = problem.dense_labels;
  check.channels_last = problem.channels_last();
  check.first = static_cast<unsigned long long*>(workspace);
  constexpr unsigned long long kNone = ~0ull;
  unsigned long long first = kNone;
  DICE_OP_RETURN_IF_ERROR(ErrorOf(cudaMemsetAsync(workspace, 0xff, sizeof(first), queue), "cudaMemsetAsync"));
  const int64_t blocks = std::min<int64_t>(4096, (problem.batch * problem.voxels + kThreads - 1) / kThreads);
  if (blocks > 0) {
    DICE_OP_RETURN_IF_ERROR(
        ErrorOf(Launch(CheckValuesKernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, queue, check),
                "the launch of the kernel that checks labels and predictions"));
  }
  const auto copy = [&](void* to, const void* from, size_t bytes) { return cuda::CopyToHost(to, from, bytes, stream); };
  DICE_OP_RETURN_IF_ERROR(copy(&first, workspace, sizeof(first)));
  if (first == kNone) return {};
  const auto at = static_cast<int64_t>(first / 2);
  return dice_op::ErrorOf({at / problem.voxels, at % problem.voxels, first % 2 == 1}, problem, copy);
}

bool ChecksLabels() {
  static const bool checks = [] {
    const char* const wish = std::getenv("DICE_OP_CHECK_LABELS");
    return wish && *wish && std::strcmp(wish, "0") != 0;
  }();
  return checks;
}

}  // namespace cuda
}  // namespace dice_op

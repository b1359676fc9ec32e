// The ops' kernels. They check their inputs, allocate their outputs and call the library.
#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>

#include "core/problem.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/stream_executor.h"
#include "tensorflow/core/util/work_sharder.h"
#include "tf/attributes.h"

namespace dice_op {
namespace {

using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

Dims DimsOf(const Tensor& tensor) {
  const auto sizes = tensor.shape().dim_sizes();
  return Dims(sizes.begin(), sizes.end());
}

class DiceKernel : public OpKernel {
 public:
  explicit DiceKernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, Guarded([&] { return ReadAttributes(context, &attributes_); }));
  }

  void Compute(OpKernelContext* context) final {
    OP_REQUIRES_OK(context, Guarded([&] { return Call(context); }));
  }

 protected:
  virtual absl::Status Call(OpKernelContext* context) const = 0;

  absl::Status ProblemOf(OpKernelContext* context, Problem* problem) const {
    *problem = attributes_;
    OpInputList weight;
    TF_RETURN_IF_ERROR(context->input_list("voxel_weight", &weight));
    const Tensor &logits = context->input(0), &labels = context->input(1);
    std::optional<Dims> weight_dims;
    if (weight.size() > 0) weight_dims = DimsOf(weight[0]);
    TF_RETURN_IF_ERROR(ToStatus(MakeProblem(DimsOf(logits), DimsOf(labels), weight_dims, problem)));
    problem->logits = logits.data();
    problem->labels = labels.data();
    problem->voxel_weight = weight.size() > 0 ? weight[0].data() : nullptr;
    return absl::OkStatus();
  }

 private:
  Problem attributes_;
};

// The op for the sums on any device. This class allocates the outputs, and Run fills them.
class DiceSumsKernel : public DiceKernel {
 public:
  using DiceKernel::DiceKernel;

 protected:
  absl::Status Call(OpKernelContext* context) const final {
    Problem problem;
    TF_RETURN_IF_ERROR(ProblemOf(context, &problem));
    Sums sums;
    for (const SumInfo& info : kSums) {
      Tensor* output;
      TF_RETURN_IF_ERROR(
          context->allocate_output(static_cast<int>(info.sum), TensorShape(problem.DimsOf(info)), &output));
      if (problem.Has(info.sum)) sums[info.sum] = output->data();
    }
    return Run(context, problem, sums);
  }

  virtual absl::Status Run(OpKernelContext* context, const Problem& problem, const Sums& sums) const = 0;

  // Allocates scratch memory on the op's device.
  static absl::Status Allocate(OpKernelContext* context, size_t bytes, Tensor* memory) {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({static_cast<int64_t>(bytes)}), memory);
  }
};

// The op for the gradient on any device.
class DiceSumsGradKernel : public DiceKernel {
 public:
  using DiceKernel::DiceKernel;

 protected:
  absl::Status Call(OpKernelContext* context) const final {
    Problem problem;
    TF_RETURN_IF_ERROR(ProblemOf(context, &problem));
    SumsGrad grad;
    for (const SumInfo& info : kSums) {
      if (!info.has_gradient) continue;
      const std::string name = std::string("d_") + info.name;
      const Tensor* d_sum;
      TF_RETURN_IF_ERROR(context->input(name, &d_sum));
      const TensorShape expected(problem.DimsOf(info));
      if (d_sum->shape() != expected) {
        return absl::InvalidArgumentError(name + " has shape " + d_sum->shape().DebugString() +
                                          ", but must have shape " + expected.DebugString());
      }
      if (problem.Has(info.sum)) grad.d_sums[info.sum] = d_sum->data();
    }
    // If nobody else uses the logits, the gradient overwrites their memory. This is safe, because a whole tile is read
    // before it is written.
    Tensor* d_logits;
    TF_RETURN_IF_ERROR(context->forward_input_or_allocate_output({0}, 0, context->input(0).shape(), &d_logits));
    grad.d_logits = d_logits->data();
    return Run(context, problem, grad);
  }

  virtual absl::Status Run(OpKernelContext* context, const Problem& problem, const SumsGrad& grad) const = 0;
};

// --- CPU ----------------------------------------------------------------------------------------------

// Uses TensorFlow's own thread pool, but only as many of its threads as the caller may use.
class ThreadPool final : public cpu::PoolParallelFor {
 public:
  explicit ThreadPool(OpKernelContext* context) : workers_(*context->device()->tensorflow_cpu_worker_threads()) {}

 private:
  int64_t threads() const override { return std::min(workers_.num_threads, tensorflow::GetPerThreadMaxParallelism()); }
  void Schedule(std::function<void()> task) const override { workers_.workers->Schedule(std::move(task)); }

  const tensorflow::DeviceBase::CpuWorkerThreads& workers_;
};

// Warns once in a process. Only its first calls are looked at, because looking takes time.
void WarnOfFractions(const Problem& problem) {
  static std::atomic<int> looks{0};
  static std::once_flag warned;
  constexpr int kMost = 16;
  if (problem.options.soft_label || problem.options.squared_pred || !problem.soft_labels()) return;
  if (looks >= kMost || looks++ >= kMost || !HasFractions(problem)) return;
  std::call_once(warned, [] {
    LOG(WARNING) << "dice_op: labels (y_true) are fractions. A Dice loss of them is not smallest where the prediction "
                    "equals them, unless soft_label=True or squared_pred=True is given to the loss.";
  });
}

class DiceSumsCpu final : public DiceSumsKernel {
 public:
  using DiceSumsKernel::DiceSumsKernel;

 private:
  absl::Status Run(OpKernelContext* context, const Problem& problem, const Sums& sums) const override {
    Tensor workspace;
    TF_RETURN_IF_ERROR(Allocate(context, cpu::DiceSumsWorkspace(problem), &workspace));
    WarnOfFractions(problem);
    return ToStatus(cpu::DiceSums(problem, sums, workspace.data(), ThreadPool(context)));
  }
};

class DiceSumsGradCpu final : public DiceSumsGradKernel {
 public:
  using DiceSumsGradKernel::DiceSumsGradKernel;

 private:
  absl::Status Run(OpKernelContext* context, const Problem& problem, const SumsGrad& grad) const override {
    cpu::DiceSumsGrad(problem, grad, ThreadPool(context));
    return absl::OkStatus();
  }
};

REGISTER_KERNEL_BUILDER(Name("DiceSums").Device(tensorflow::DEVICE_CPU), DiceSumsCpu);
REGISTER_KERNEL_BUILDER(Name("DiceSumsGrad").Device(tensorflow::DEVICE_CPU), DiceSumsGradCpu);

// --- GPU ----------------------------------------------------------------------------------------------

#ifdef DICE_OP_WITH_CUDA

absl::Status StreamOf(OpKernelContext* context, void** stream) {
  const auto* device = context->op_device_context();
  if (!device || !device->stream()) return absl::InternalError("TensorFlow gives this op no CUDA stream");
  *stream = device->stream()->platform_specific_handle().stream;
  return absl::OkStatus();
}

class DiceSumsGpu final : public DiceSumsKernel {
 public:
  using DiceSumsKernel::DiceSumsKernel;

 private:
  absl::Status Run(OpKernelContext* context, const Problem& problem, const Sums& sums) const override {
    void* stream = nullptr;
    TF_RETURN_IF_ERROR(StreamOf(context, &stream));
    size_t bytes = 0;
    TF_RETURN_IF_ERROR(ToStatus(cuda::DiceSumsWorkspace(problem, &bytes)));
    Tensor workspace;
    TF_RETURN_IF_ERROR(Allocate(context, bytes, &workspace));
    return ToStatus(cuda::DiceSums(problem, sums, workspace.data(), stream));
  }
};

class DiceSumsGradGpu final : public DiceSumsGradKernel {
 public:
  using DiceSumsGradKernel::DiceSumsGradKernel;

 private:
  absl::Status Run(OpKernelContext* context, const Problem& problem, const SumsGrad& grad) const override {
    void* stream = nullptr;
    TF_RETURN_IF_ERROR(StreamOf(context, &stream));
    return ToStatus(cuda::DiceSumsGrad(problem, grad, stream));
  }
};

REGISTER_KERNEL_BUILDER(Name("DiceSums").Device(tensorflow::DEVICE_GPU), DiceSumsGpu);
REGISTER_KERNEL_BUILDER(Name("DiceSumsGrad").Device(tensorflow::DEVICE_GPU), DiceSumsGradGpu);

#endif

}  // namespace
}  // namespace dice_op

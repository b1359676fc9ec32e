// The ops' kernels: validate, allocate, call.
#include <optional>

#include "core/problem.h"
#include "tensorflow/core/framework/op_kernel.h"
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
    OP_REQUIRES_OK(context, ReadAttributes(context, &attributes_));
  }

 protected:
  absl::Status ProblemOf(OpKernelContext* context, Problem* problem) const {
    *problem = attributes_;
    OpInputList weight;
    TF_RETURN_IF_ERROR(context->input_list("voxel_weight", &weight));
    const Tensor &logits = context->input(0), &labels = context->input(1);
    std::optional<Dims> weight_dims;
    if (weight.size() > 0) weight_dims = DimsOf(weight[0]);
    const std::string error = MakeProblem(DimsOf(logits), DimsOf(labels), weight_dims, problem);
    if (!error.empty()) return absl::InvalidArgumentError(error);
    problem->logits = logits.data();
    problem->labels = labels.data();
    problem->voxel_weight = weight.size() > 0 ? weight[0].data() : nullptr;
    return absl::OkStatus();
  }

 private:
  Problem attributes_;
};

// TensorFlow's own pool. It cuts the ranges as it likes; the blocks in them are fixed.
class ThreadPool final : public cpu::ParallelFor {
 public:
  explicit ThreadPool(OpKernelContext* context) : workers_(*context->device()->tensorflow_cpu_worker_threads()) {}

  void Run(int64_t count, int64_t cost, Body body, void* context) const override {
    tensorflow::Shard(workers_.num_threads, workers_.workers, count, cost,
                      [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }

 private:
  const tensorflow::DeviceBase::CpuWorkerThreads& workers_;
};

class DiceSumsCpu final : public DiceKernel {
 public:
  using DiceKernel::DiceKernel;

  void Compute(OpKernelContext* context) override {
    Problem problem;
    OP_REQUIRES_OK(context, ProblemOf(context, &problem));
    const TensorShape shape({problem.batch, problem.classes});
    const bool cross_entropy = problem.options.cross_entropy;
    Tensor* outputs[5];
    for (int i = 0; i < 5; ++i) {
      const TensorShape one = i == 4                     ? TensorShape({problem.batch})
                              : i == 3 && !cross_entropy ? TensorShape({problem.batch, 0})
                                                         : shape;
      OP_REQUIRES_OK(context, context->allocate_output(i, one, &outputs[i]));
    }
    Tensor workspace;
    const auto bytes = static_cast<int64_t>(cpu::DiceSumsWorkspace(problem));
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_INT8, TensorShape({bytes}), &workspace));
    const Sums sums{outputs[0]->data(), outputs[1]->data(), outputs[2]->data(),
                    cross_entropy ? outputs[3]->data() : nullptr, outputs[4]->data()};
    const BadLabel bad = cpu::DiceSums(problem, sums, workspace.data(), ThreadPool(context));
    OP_REQUIRES(context, bad.sample < 0,
                absl::InvalidArgumentError(DescribeBadLabel(problem, DimsOf(context->input(0)), bad)));
  }
};

class DiceSumsGradCpu final : public DiceKernel {
 public:
  using DiceKernel::DiceKernel;

  void Compute(OpKernelContext* context) override {
    Problem problem;
    OP_REQUIRES_OK(context, ProblemOf(context, &problem));
    const bool cross_entropy = problem.options.cross_entropy;
    const void* coefficients[3];
    static constexpr const char* kNames[3] = {"d_intersection", "d_pred_sum", "d_cross_entropy"};
    for (int i = 0; i < 3; ++i) {
      const Tensor* d_sum;
      OP_REQUIRES_OK(context, context->input(kNames[i], &d_sum));
      const TensorShape expected({problem.batch, i == 2 && !cross_entropy ? 0 : problem.classes});
      OP_REQUIRES(context, d_sum->shape() == expected,
                  absl::InvalidArgumentError(std::string(kNames[i]) + " has shape " + d_sum->shape().DebugString() +
                                             ", but must have shape " + expected.DebugString()));
      coefficients[i] = d_sum->data();
    }
    // Where nobody else holds the logits, the gradient takes their memory: each tile is read whole
    // before it is written.
    Tensor* d_logits;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, context->input(0).shape(), &d_logits));
    const SumsGrad grad{coefficients[0], coefficients[1], cross_entropy ? coefficients[2] : nullptr, d_logits->data()};
    cpu::DiceSumsGrad(problem, grad, ThreadPool(context));
  }
};

REGISTER_KERNEL_BUILDER(Name("DiceSums").Device(tensorflow::DEVICE_CPU), DiceSumsCpu);
REGISTER_KERNEL_BUILDER(Name("DiceSumsGrad").Device(tensorflow::DEVICE_CPU), DiceSumsGradCpu);

}  // namespace
}  // namespace dice_op

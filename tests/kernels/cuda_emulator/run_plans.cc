// Has the launch code plan problems of every sort, and prints what it asks of CUDA for each kernel. No kernel runs, so
// a problem's arrays need not exist. tests/helpers/emulation.py reads the lines.
#include <array>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>

#include "core/problem.h"
#include "cuda/call.h"
#include "cuda_emulator.h"
#include "no_machine_code.h"
#include "problems.h"

extern "C" const char __executable_start;  // from the linker; `nm` names the addresses counted from here

namespace dice_op {
namespace {

constexpr Volume kVolume = {1, 4096};  // planned with every number of classes, the others with a few numbers
constexpr Volume kOtherVolumes[] = {{1, 1}, {2, 1003}, {3, int64_t{1} << 32}, {1 << 20, 4}};
constexpr int kFewClasses[] = {1, 2, 3, 4, 16, 17, 104, cuda::kMaxClasses};

// --- what is asked for --------------------------------------------------------------------------------

// Prints each launch that differs from all before: numbers, then the first problem that it was for.
class Printer : public cuda_emulator::Observer {
 public:
  void Start(const Problem* problem, const char* setting, int64_t workspace) {
    problem_ = problem;
    setting_ = setting;
    workspace_ = workspace;
    most_dynamic_ = carveout_ = kNotAsked;
  }
  void SetAttribute(const void*, int attribute, int value) override {
    (attribute == cudaFuncAttributePreferredSharedMemoryCarveout ? carveout_ : most_dynamic_) = value;
  }
  void Launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) override {
    const int64_t row = cuda::PartialLength(static_cast<int>(problem_->classes), kClassSumCount) * sizeof(double);
    const std::array<int64_t, 10> numbers = {static_cast<const char*>(kernel) - &__executable_start,
                                             grid.x,
                                             grid.y,
                                             grid.z,
                                             int64_t{block.x} * block.y * block.z,
                                             static_cast<int64_t>(shared_bytes),
                                             most_dynamic_,
                                             carveout_,
                                             workspace_,
                                             row};
    most_dynamic_ = carveout_ = kNotAsked;
    if (!printed_.insert(numbers).second) return;
    for (const int64_t number : numbers) std::printf("%lld ", static_cast<long long>(number));
    const Options& options = problem_->options;
    std::printf("%s%s %s %s, %s%s labels, %s%s\n", Name(problem_->logits_dtype), Show(problem_->logits_dims).c_str(),
                ToAttribute(options.data_format).c_str(), ToAttribute(options.activation).c_str(),
                problem_->dense_labels ? "dense " : "", Name(problem_->labels_dtype),
                options.cross_entropy ? "cross-entropy " : "", setting_);
  }

 private:
  static constexpr int64_t kNotAsked = -1;
  const Problem* problem_ = nullptr;
  const char* setting_ = nullptr;
  int64_t workspace_ = 0, most_dynamic_ = kNotAsked, carveout_ = kNotAsked;
  std::set<std::array<int64_t, 10>> printed_;
} printer;

// The sums, the gradient and the search for bad values.
void Plan(const Problem& problem, const char* setting) {
  int64_t memory = 0;  // all that the search needs
  size_t workspace = 0;
  Require(cuda::DiceSumsWorkspace(problem, &workspace));
  const auto start = [&] { printer.Start(&problem, setting, static_cast<int64_t>(workspace)); };
  start();
  Require(cuda::DiceSums(problem, {}, &memory, nullptr));
  start();
  Require(cuda::FindBadValue(problem, &memory, nullptr));
  if (problem.hard()) return;
  start();
  SumsGrad grad = {};
  grad.d_logits = const_cast<void*>(problem.logits);
  Require(cuda::DiceSumsGrad(problem, grad, nullptr));
}

}  // namespace
}  // namespace dice_op

int main() {
  using namespace dice_op;
  cuda_emulator::observer = &printer;
  for (int classes = 1; classes <= cuda::kMaxClasses; ++classes) ForEachProblem(kVolume, classes, Plan);
  for (const Volume& volume : kOtherVolumes) {
    for (const int classes : kFewClasses) ForEachProblem(volume, classes, Plan);
  }
}

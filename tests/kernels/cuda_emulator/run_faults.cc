// Lets each call of CUDA's runtime fail in turn, within each of the library's calls. tests/reliability/test_faults.py
// compiles it and reads what it prints, a line for each failure:
//
//   CALL NUMBER KIND LAST BLOCKS RIGHT MESSAGE
//
// The NUMBER-th call of the runtime within CALL failed: then KIND is the kind of the error that CALL returned, with
// MESSAGE; LAST is the error that the next caller of the runtime would see; BLOCKS, by how much the number of blocks of
// device memory has grown; and RIGHT, whether the next CALL gave the right results.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "core/dice_op.h"
#include "core/problem.h"
#include "cuda/device.h"
#include "no_machine_code.h"

namespace dice_op {
namespace {

using cuda_emulator::blocks;
using cuda_emulator::calls;
using cuda_emulator::failing_call;

using Results = std::vector<float>;

void Try(const char* name, Results* results, const std::function<Error()>& call) {
  std::fill(results->begin(), results->end(), -1.f);
  if (call()) std::abort();
  const Results wanted = *results;
  for (int number = 1;; ++number) {
    const int blocks_before = blocks;
    calls = 0;
    failing_call = number;
    const Error error = call();
    failing_call = 0;
    if (calls < number) return;
    const int last = cudaPeekAtLastError(), more_blocks = blocks - blocks_before;
    std::fill(results->begin(), results->end(), -1.f);
    const bool right = !call() && *results == wanted;
    std::printf("%s %d %d %d %d %d %s\n", name, number, static_cast<int>(error.kind), last, more_blocks, right,
                error.message.c_str());
  }
}

void TryAll(const char* kernels, int64_t classes) {
  constexpr int64_t kBatch = 2, kVoxels = 1003;
  std::vector<float> logits(kBatch * kVoxels * classes);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = (i * 7919 % 1000) / 128.f - 4;
  std::vector<uint8_t> labels(kBatch * kVoxels);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = i * 31 % classes;
  Problem problem;
  problem.logits = logits.data();
  problem.labels = labels.data();
  if (MakeProblem({kBatch, kVoxels, classes}, {kBatch, kVoxels}, {}, &problem)) std::abort();

  Results results(logits.size());
  const auto name = [&](const char* call) { return std::string(call) + kernels; };
  size_t bytes = 0;
  if (cuda::DiceSumsWorkspace(problem, &bytes)) std::abort();
  std::vector<double> workspace(bytes / sizeof(double));
  Sums sums;
  for (const Sum sum : {Sum::kIntersection, Sum::kPredSum, Sum::kLabelSum}) {
    sums[sum] = results.data() + static_cast<int>(sum) * kBatch * classes;
  }
  Try(name("sums").c_str(), &results, [&] { return cuda::DiceSums(problem, sums, workspace.data(), nullptr); });
  const std::vector<float> coefficients(kBatch * classes, 0.5f);
  SumsGrad grad;
  grad.d_sums[Sum::kIntersection] = grad.d_sums[Sum::kPredSum] = coefficients.data();
  grad.d_logits = results.data();
  Try(name("gradient").c_str(), &results, [&] { return cuda::DiceSumsGrad(problem, grad, nullptr); });
  if (*kernels) return;

  Try("find", &results, [&] { return cuda::FindBadValue(problem, workspace.data(), nullptr); });
  std::vector<uint8_t> bad_labels = labels;
  bad_labels[kVoxels + 7] = 9;
  problem.labels = bad_labels.data();
  Try("describe", &results, [&]() -> Error {  // the value, which is brought from the device
    Error found = cuda::FindBadValue(problem, workspace.data(), nullptr);
    return found.kind == ErrorKind::kInvalidArgument ? Error{} : found ? found : Unsupported("the label was not found");
  });
  Try("copy", &results, [&] {
    return cuda::CopyToHost(results.data(), coefficients.data(), coefficients.size() * sizeof(float), nullptr);
  });
  void* memory = nullptr;
  Try("allocate", &results, [&]() -> Error {
    memory = nullptr;
    DICE_OP_RETURN_IF_ERROR(cuda::Allocate(100, nullptr, &memory));
    std::free(std::exchange(memory, nullptr));  // not by a call of the runtime, which would fail in its turn
    --blocks;
    return {};
  });
  Try("release", &results, [&] {
    if (!memory) {
      memory = std::malloc(1);
      ++blocks;
    }
    Error error = cuda::Release(memory, nullptr);
    if (!error) memory = nullptr;
    return error;
  });
  Try("device", &results, [&]() -> Error {
    if (cuda::CurrentDevice() >= 0) return {};
    return DeviceFailure("no device");
  });
}

}  // namespace
}  // namespace dice_op

int main() {
  dice_op::TryAll("", 4);
  dice_op::TryAll("_staged", 64);  // these kernels ask for more shared memory than others get
}

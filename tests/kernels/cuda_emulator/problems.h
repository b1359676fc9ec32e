// Problems of every sort, which reach every kernel. Programs that launch kernels without a front end include this file.
#ifndef DICE_OP_CUDA_EMULATOR_PROBLEMS_H_
#define DICE_OP_CUDA_EMULATOR_PROBLEMS_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/problem.h"

namespace dice_op {
namespace {

void Require(const Error& error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error.message.c_str());
  std::exit(2);
}

// --- the table ----------------------------------------------------------------------------------------

struct Volume {
  int64_t batch, voxels;
};

constexpr DType kLogits[] = {DType::kHalf, DType::kBFloat16, DType::kFloat, DType::kDouble};

struct Labels {
  DType dtype;
  bool dense;
};
constexpr Labels kLabels[] = {{DType::kUint8, false}, {DType::kInt16, false}, {DType::kInt32, false},
                              {DType::kInt64, false}, {DType::kFloat, false}, {DType::kFloat, true}};

constexpr Activation kActivations[] = {Activation::kSoftmax, Activation::kSigmoid, Activation::kNone,
                                       Activation::kArgmax, Activation::kThreshold};

// An array that nobody reads. At 8 it does not begin with a whole word.
void* ArrayAt(int64_t place) { return reinterpret_cast<void*>((int64_t{1} << 40) + place); }

// What else a call may ask for. Where a setting does not fit a problem, the problem is left out.
struct Setting {
  const char* name;
  void (*make)(int classes, Problem* problem);
};
const Setting kSettings[] = {
    {"", [](int, Problem*) {}},
    {"not aligned", [](int, Problem* problem) { problem->logits = ArrayAt(8); }},
    {"squared_pred", [](int, Problem* problem) { problem->options.squared_pred = true; }},
    {"label_smoothing", [](int, Problem* problem) { problem->options.label_smoothing = 0.5; }},
    {"ignore_label", [](int, Problem* problem) { problem->options.ignore_label = {true, 255}; }},
    {"voxel_weight",
     [](int, Problem* problem) {
       problem->voxel_weight = ArrayAt(0);
       problem->weight_dtype = DType::kFloat;
     }},
    {"regions",
     [](int classes, Problem* problem) {
       Require(RegionsOf(std::vector<std::vector<int64_t>>(classes, {1}), &problem->options.regions));
     }},
    {"label_sets", [](int, Problem* problem) { Require(LabelSetsOf({{0, {0, 1}}}, &problem->options.label_sets)); }},
    {"focal_gammas",
     [](int classes, Problem* problem) {
       Require(FromAttribute(std::vector<float>(classes, 2), &problem->options.focal_gammas));
     }},
    {"dist_matrix",
     [](int classes, Problem* problem) {
       if (classes > cuda::kMaxClassesWithDistances) return;
       Require(FromAttribute(std::vector<float>(classes * classes), &problem->options.dist_matrix));
     }},
};

// Calls fn(problem, name of the setting) for every legal problem of this volume, whose arrays nobody may read.
template <class Fn>
void ForEachProblem(const Volume& volume, int classes, Fn&& fn) {
  Problem problem;
  problem.logits = problem.labels = ArrayAt(0);
  for (const DType logits : kLogits) {
    problem.logits_dtype = logits;
    for (const DataFormat format : {DataFormat::kChannelsLast, DataFormat::kChannelsFirst}) {
      problem.options.data_format = format;
      const Dims voxels = {volume.batch, volume.voxels};
      const Dims dims = problem.channels_last() ? Dims{volume.batch, volume.voxels, classes}
                                                : Dims{volume.batch, classes, volume.voxels};
      for (const Labels& labels : kLabels) {
        problem.labels_dtype = labels.dtype;
        for (const Activation activation : kActivations) {
          problem.options.activation = activation;
          for (const bool cross_entropy : {false, true}) {
            problem.options.cross_entropy = cross_entropy;
            for (const Setting& setting : kSettings) {
              Problem made = problem;
              setting.make(classes, &made);
              if (!MakeProblem(dims, labels.dense ? dims : voxels, {}, &made)) fn(made, setting.name);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace dice_op

#endif  // DICE_OP_CUDA_EMULATOR_PROBLEMS_H_

// What is a legal call, decided in one place for every front end, and what is said of one that is not.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "core/dice_op.h"

#pragma GCC visibility push(default)  // dice_op_kernels.so exports all of it

namespace dice_op {

// Fills in the shape of `problem`, whose options and dtypes are set. Unknown dimensions pass: the kernel asks again
// when they are known.
Error MakeProblem(const Dims& logits, const Dims& labels, const std::optional<Dims>& weight, Problem* problem);

// An error if the activation has no gradient.
Error CheckGradient(const Problem& problem);

// Index of the class axis among `rank` axes.
size_t ClassAxis(size_t rank, DataFormat data_format);

// What labels are taken for: class indices, one per voxel; a foreground mask of floats, which may be soft, one per
// voxel where there is one class; one-hot or soft labels, one per class.
enum class LabelKind { kIndices, kMask, kPerClass };
// By shapes and the labels' dtype alone, with the problem's options. Where the number of classes is not known, floats
// that may be indices are a mask, and labels of the logits' rank are one per class.
Error FindLabelKind(const Dims& logits, const Dims& labels, Problem problem, LabelKind* kind);

// A voxel with a label that is no class, or with a prediction that is no probability where the activation is none.
// sample < 0: there is none.
struct BadValue {
  int64_t sample = -1;
  int64_t voxel = -1;
  bool in_prediction = false;
};

// Copies from where labels and logits are to the host.
using CopyToHost = std::function<Error(void* to, const void* from, size_t bytes)>;

// Names the voxel by its coordinates, the value found there, the values allowed, and what to do; no error where there
// is no bad value. `copy` is for labels and logits that are not on the host.
Error ErrorOf(const BadValue& bad, const Problem& problem, const CopyToHost& copy = nullptr);
// The same of a value in a predicted label map on the host.
Error ErrorOfPrediction(const BadValue& bad, const Problem& problem, const void* prediction, DType dtype);

bool IsFloat(DType dtype);
const char* Name(DType dtype);
std::string Show(const Dims& dims);

}  // namespace dice_op

#pragma GCC visibility pop

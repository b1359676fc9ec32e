// Decides for every front end which calls are legal, and writes the error messages for those that are not.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "core/dice_op.h"

#pragma GCC visibility push(default)  // dice_op_kernels.so exports all of it

namespace dice_op {

// Fills in the shape of `problem`; its options and dtypes must be set. Unknown dimensions are accepted, because the
// kernel checks again when they are known.
Error MakeProblem(const Dims& logits, const Dims& labels, const std::optional<Dims>& weight, Problem* problem);

// Returns an error if the activation has no gradient.
Error CheckGradient(const Problem& problem);

// The index of the class axis among `rank` axes.
size_t ClassAxis(size_t rank, DataFormat data_format);

// What the labels are read as. kIndices: one class index per voxel. kMask: a foreground mask of floats, one per voxel,
// which may be soft; only if there is one class. kPerClass: one-hot or soft labels, one per class.
enum class LabelKind { kIndices, kMask, kPerClass };
// Uses only the shapes, the labels' dtype and the problem's options. If the number of classes is not known, floats that
// may be indices are taken for a mask, and labels of the logits' rank for one label per class.
Error FindLabelKind(const Dims& logits, const Dims& labels, Problem problem, LabelKind* kind);

// A voxel whose label is not a class, or whose prediction is not a probability although the activation is 'none'.
// A negative sample means that there is no such voxel.
struct BadValue {
  int64_t sample = -1;
  int64_t voxel = -1;
  bool in_prediction = false;
};

// Copies labels or logits from their memory to the host.
using CopyToHost = std::function<Error(void* to, const void* from, size_t bytes)>;

// The error gives the coordinates of the voxel, the value found there, the values allowed, and what to do. Without a
// bad value there is no error. `copy` is needed if labels and logits are not on the host.
Error ErrorOf(const BadValue& bad, const Problem& problem, const CopyToHost& copy = nullptr);
// Does the same for a value in a predicted label map on the host.
Error ErrorOfPrediction(const BadValue& bad, const Problem& problem, const void* prediction, DType dtype);

// Whether labels on the host that may be fractions are some, judged by a few thousand of them.
bool HasFractions(const Problem& problem);

bool IsFloat(DType dtype);
const char* Name(DType dtype);
std::string Show(const Dims& dims);

}  // namespace dice_op

#pragma GCC visibility pop

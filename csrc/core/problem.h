// What is a legal call, decided in one place for every binding.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/dice_op.h"

#pragma GCC visibility push(default)  // dice_op_kernels.so exports all of it

namespace dice_op {

using Dims = std::vector<int64_t>;  // -1: not known yet

// Fills in the shape of `problem`, whose options and dtypes are set. Returns what is wrong, in
// words for the person who made the call, or an empty string. Unknown dimensions pass: the kernel
// asks again when they are known.
std::string MakeProblem(const Dims& logits, const Dims& labels, const std::optional<Dims>& weight, Problem* problem);

// Whether there is a gradient: what is wrong, or an empty string.
std::string CheckGradient(const Problem& problem);

// Whether labels of that shape have one value for each voxel, for logits of the other shape; else one for each class.
bool HaveOneValuePerVoxel(const Dims& labels, const Dims& logits, DataFormat data_format);

// Names the voxel by its coordinates, the value found there, the values allowed, and what to do. `value` points to
// that value on the host; null: labels and logits are on the host themselves.
std::string DescribeBadValue(const Problem& problem, const Dims& logits, const BadValue& bad,
                             const void* value = nullptr);
// The same of a value in a predicted label map.
std::string DescribeBadPrediction(const Problem& problem, const Dims& logits, const void* prediction, DType dtype,
                                  const BadValue& bad);

// The option of that name, such as "softmax" or "channels_first"; or what is wrong, as above.
std::string Parse(const std::string& name, Activation* activation);
std::string Parse(const std::string& name, DataFormat* data_format);
// Of classes given as sets of label values, the mask of each value 0, 1, ...: bit c set where it belongs to class c.
std::string RegionMasks(const std::vector<std::vector<int64_t>>& regions, std::vector<int64_t>* masks);
std::string SetRegions(const std::vector<int64_t>& masks, Options* options);
const char* Name(Activation activation);
const char* Name(DataFormat data_format);

bool IsFloat(DType dtype);
const char* Name(DType dtype);
std::string Show(const Dims& dims);

}  // namespace dice_op

#pragma GCC visibility pop

// The sums of a call, in one list. Every processor and every front end keeps its order.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace dice_op {

enum class Sum : int {
  kIntersection,
  kPredSum,
  kLabelSum,
  kCrossEntropy,
  kNegativeCrossEntropy,
  kUnknownSum,
  kDistanceSum,
  kWeightSum,
};

struct SumInfo {
  Sum sum;
  const char* name;
  bool per_class;     // its shape is [N, C], else [N]
  bool has_gradient;  // it depends on the logits, so that a loss passes back a derivative for it
};

// Sums per class come first, and those that most calls do not ask for are last among them: a kernel computes as many of
// the first as it may need. The dtype of all of them is Problem::sums_dtype().
constexpr SumInfo kSums[] = {
    {Sum::kIntersection, "intersection", true, true},                    // sum m p t, or sum m min(p, t)
    {Sum::kPredSum, "pred_sum", true, true},                             // sum m p, or sum m p^2
    {Sum::kLabelSum, "label_sum", true, false},                          // sum m t, or sum m t^2
    {Sum::kCrossEntropy, "cross_entropy", true, true},                   // sum m t (1-p)^gamma (-log p)
    {Sum::kNegativeCrossEntropy, "negative_cross_entropy", true, true},  // sum m (1-t) p^gamma (-log(1-p)); for sigmoid
    {Sum::kUnknownSum, "unknown_sum", true, false},                      // sum m of voxels that may belong to the class
    {Sum::kDistanceSum, "distance_sum", true, true},                     // sum m t sum_c' M p_c', with dist_matrix M
    {Sum::kWeightSum, "weight_sum", false, false},                       // sum m
};

// If the predictions are already probabilities, the cross-entropy takes those below this number for this number, as
// keras.losses do with their backend's epsilon.
constexpr double kProbabilityEpsilon = 1e-7;

constexpr int kSumCount = sizeof(kSums) / sizeof(kSums[0]);

constexpr int CountClassSums() {
  int count = 0;
  while (count < kSumCount && kSums[count].per_class) ++count;
  return count;
}
constexpr int kClassSumCount = CountClassSums();
constexpr int kSampleSumCount = kSumCount - kClassSumCount;

constexpr bool SumsAreInOrder() {
  for (int i = 0; i < kSumCount; ++i) {
    if (static_cast<int>(kSums[i].sum) != i || kSums[i].per_class != (i < kClassSumCount)) return false;
  }
  return true;
}
static_assert(SumsAreInOrder(), "the list has the enumeration's order, and sums per class come first");

// One value for each sum.
template <class T>
struct PerSum {
  T values[kSumCount] = {};
  DICE_OP_INLINE T& operator[](Sum sum) { return values[static_cast<int>(sum)]; }
  DICE_OP_INLINE const T& operator[](Sum sum) const { return values[static_cast<int>(sum)]; }
};

// The sums of one block of voxels are a row of numbers: first the sums per class, or the first of them, each for all
// classes, then the other sums.
DICE_OP_INLINE constexpr int64_t RowLength(int64_t classes, int class_sums = kClassSumCount) {
  return class_sums * classes + kSampleSumCount;
}

}  // namespace dice_op

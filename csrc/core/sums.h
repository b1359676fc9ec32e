// The sums of a call: one list, in the one order that every processor and every front end keeps.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace dice_op {

enum class Sum : int { kIntersection, kPredSum, kLabelSum, kCrossEntropy, kWeightSum };

struct SumInfo {
  Sum sum;
  const char* name;
  bool per_class;     // of shape [N, C], else [N]
  bool has_gradient;  // with respect to the logits: a loss hands back a derivative of it
};

// Sums per class come first. The dtype of all of them is Problem::sums_dtype().
constexpr SumInfo kSums[] = {
    {Sum::kIntersection, "intersection", true, true},   // sum m p t
    {Sum::kPredSum, "pred_sum", true, true},            // sum m p, or sum m p^2
    {Sum::kLabelSum, "label_sum", true, false},         // sum m t, or sum m t^2
    {Sum::kCrossEntropy, "cross_entropy", true, true},  // sum m t (1-p)^gamma (-log p); sigmoid: plus its mirror image
    {Sum::kWeightSum, "weight_sum", false, false},      // sum m
};
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

// What one block of voxels has added up, in a row of numbers: the sums per class, each of all classes, then the others.
DICE_OP_INLINE constexpr int64_t RowLength(int64_t classes) { return kClassSumCount * classes + kSampleSumCount; }

}  // namespace dice_op

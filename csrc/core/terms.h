// What the options do to one voxel, worked out once for every processor.
#pragma once

#include "core/dice_op.h"
#include "core/inline.h"

namespace dice_op {

// `Scalar` is the type of plain numbers, or of a register's elements.
template <class Scalar>
struct Terms {
  bool squared;         // p^2 and t^2 in the cardinalities
  bool masked;          // some voxels may have weight 0, and then count for nothing, whatever they hold
  bool cross_entropy;   // wanted, where kCrossEntropy stands for "with or without"
  Scalar gamma;         // focal exponent
  Scalar keep, spread;  // label smoothing: the cross-entropy takes keep * t + spread for t; not where t is one-hot and
                        // the activation is not binary, see Problem::smoothed
  Scalar threshold;     // of the activation of that name

  template <class Other>
  DICE_OP_INLINE Terms<Other> To() const {
    return {squared,
            masked,
            cross_entropy,
            static_cast<Other>(gamma),
            static_cast<Other>(keep),
            static_cast<Other>(spread),
            static_cast<Other>(threshold)};
  }
};

namespace {  // see core/voxel.h

inline Terms<double> TermsOf(const Problem& problem) {
  const Options& options = problem.options;
  const double choices = options.activation == Activation::kSigmoid ? 2 : static_cast<double>(problem.classes);
  const bool in_double = problem.logits_dtype == DType::kDouble;
  Terms<double> terms = {};
  terms.squared = options.squared_pred;
  terms.masked = problem.masked();
  terms.cross_entropy = options.cross_entropy;
  terms.gamma = options.focal_gamma;
  terms.keep = 1 - options.label_smoothing;
  terms.spread = options.label_smoothing / choices;
  // In the precision of the logits, so that those that are as large as the threshold are not above it.
  terms.threshold = in_double ? options.threshold : static_cast<float>(options.threshold);
  return terms;
}

}  // namespace
}  // namespace dice_op

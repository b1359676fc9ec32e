// What the options do to one voxel, worked out once for every processor.
#pragma once

#include "core/dice_op.h"
#include "core/inline.h"

namespace dice_op {

// `Scalar` is the type of plain numbers, or of a register's elements.
template <class Scalar>
struct Terms {
  bool squared = false;        // p^2 and t^2 in the cardinalities
  bool masked = false;         // some voxels may have weight 0, and then count for nothing, whatever they hold
  bool cross_entropy = false;  // wanted, where kCrossEntropy stands for "with or without"
  Scalar gamma = 0;            // focal exponent
  // Label smoothing: the cross-entropy takes keep * t + spread for t. Not where t is one-hot and the activation is not
  // binary, see Problem::smoothed.
  Scalar keep = 1, spread = 0;
  Scalar threshold = 0;  // of the activation of that name

  // Whether a voxel is computed as without any option, but for the cross-entropy.
  bool plain() const { return !squared && !masked && gamma == 0 && keep == 1 && spread == 0; }

  template <class Other>
  DICE_OP_INLINE Terms<Other> To() const {
    Terms<Other> terms;
    terms.squared = squared;
    terms.masked = masked;
    terms.cross_entropy = cross_entropy;
    terms.gamma = static_cast<Other>(gamma);
    terms.keep = static_cast<Other>(keep);
    terms.spread = static_cast<Other>(spread);
    terms.threshold = static_cast<Other>(threshold);
    return terms;
  }
};

namespace {  // see core/voxel.h

inline Terms<double> TermsOf(const Problem& problem) {
  const Options& options = problem.options;
  Terms<double> terms;
  terms.squared = options.squared_pred;
  terms.masked = problem.masked();
  terms.cross_entropy = options.cross_entropy;
  if (options.cross_entropy) {
    const double choices = options.activation == Activation::kSigmoid ? 2 : static_cast<double>(problem.classes);
    terms.gamma = options.focal_gamma;
    terms.keep = 1 - options.label_smoothing;
    terms.spread = options.label_smoothing / choices;
  }
  // In the precision of the logits, so that those that are as large as the threshold are not above it.
  const bool in_double = problem.logits_dtype == DType::kDouble;
  terms.threshold = in_double ? options.threshold : static_cast<float>(options.threshold);
  return terms;
}

}  // namespace
}  // namespace dice_op

// The options in the form in which the arithmetic of one voxel uses them, the same for every processor.
#pragma once

#include "core/dice_op.h"
#include "core/inline.h"

namespace dice_op {

// `Scalar` is the type of a number, or of the elements of a SIMD register.
template <class Scalar>
struct Terms {
  bool squared = false;           // the cardinalities use p^2 and t^2
  bool soft = false;              // the intersection uses min(p, t), not p t
  bool sets = false;              // a label may say that the voxel belongs to one of several classes
  bool masked = false;            // some voxels may have weight 0; they are left out, whatever they hold
  bool cross_entropy = false;     // is wanted; only asked if the template argument kCrossEntropy is true
  Scalar gamma = 0;               // focal exponent
  const float* gammas = nullptr;  // the exponent of each class, if they differ
  bool distances = false;         // a label knows how far its class is from every other one
  // Label smoothing: the cross-entropy uses keep * t + spread instead of t. This is not done if t is one-hot and the
  // activation is not binary, see Problem::smoothed.
  Scalar keep = 1, spread = 0;
  Scalar threshold = 0;  // for the activation 'threshold'

  // Whether no option changes how a voxel is computed, apart from the cross-entropy.
  bool plain() const {
    return !squared && !soft && !sets && !masked && gamma == 0 && !gammas && !distances && keep == 1 && spread == 0;
  }

  template <class Other>
  DICE_OP_INLINE Terms<Other> To() const {
    Terms<Other> terms;
    terms.squared = squared;
    terms.soft = soft;
    terms.sets = sets;
    terms.masked = masked;
    terms.cross_entropy = cross_entropy;
    terms.gamma = static_cast<Other>(gamma);
    terms.gammas = gammas;
    terms.distances = distances;
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
  terms.soft = options.soft_label && problem.soft_labels() && !options.squared_pred;
  terms.sets = problem.has_label_sets();
  terms.distances = problem.has_distances();
  terms.masked = problem.masked();
  terms.cross_entropy = options.cross_entropy;
  if (options.cross_entropy) {
    const double choices = options.activation == Activation::kSigmoid ? 2 : static_cast<double>(problem.classes);
    terms.gamma = options.focal_gamma;
    if (problem.has_gammas()) terms.gammas = options.focal_gammas.values;
    terms.keep = 1 - options.label_smoothing;
    terms.spread = options.label_smoothing / choices;
  }
  // The threshold is rounded to the precision of the logits, so that a logit equal to it is not above it.
  const bool in_double = problem.logits_dtype == DType::kDouble;
  terms.threshold = in_double ? options.threshold : static_cast<float>(options.threshold);
  return terms;
}

}  // namespace
}  // namespace dice_op

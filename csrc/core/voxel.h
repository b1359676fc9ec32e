// The mathematics of one voxel, written once for every processor.
//
// `R` is a number: a float in a CUDA thread, or a SIMD register that holds the same class of
// several voxels on a CPU. `Classes` says which of a voxel's classes the caller holds: all of them
// on a CPU, every kLanes-th in a CUDA thread that shares a voxel with its neighbours, where Sum and
// Max combine across those. A file that includes this has defined, for its R: Exp, Log, Log1p, Max,
// Abs, Select and the comparisons.
//
// Everything lies in an unnamed namespace: the CPU kernels compile this file once per instruction
// set, and internal linkage keeps a linker from merging those copies into one that the processor
// may not have.
#pragma once

#include "core/dice_op.h"

#ifdef __CUDACC__
#define DICE_OP_HD __host__ __device__ __forceinline__
#else
#define DICE_OP_HD inline __attribute__((always_inline))
#endif

namespace dice_op {
namespace {

// All of a voxel's classes, their number known when compiling or (kCount = 0) when running.
template <int kCount>
struct AllClasses {
  int count;
  DICE_OP_HD int size() const { return kCount ? kCount : count; }
  DICE_OP_HD bool Has(int) const { return true; }
  DICE_OP_HD int Class(int i) const { return i; }
  template <class R>
  DICE_OP_HD static R Sum(R x) {
    return x;
  }
  template <class R>
  DICE_OP_HD static R Max(R x) {
    return x;
  }
};

// t is one for one class: the index of the label. An index that is no class has t = 0 everywhere.
template <class Int>
struct IndexLabel {
  static constexpr bool kOneHot = true;
  Int index;
  template <class R>
  DICE_OP_HD R Times(R x, int c, int) const {
    return Select(index == c, x, R(0));
  }
  template <class R>
  DICE_OP_HD R Mix(R present, R absent, int c, int) const {
    return Select(index == c, present, absent);
  }
};

// t is any number per class; `stride` apart in memory.
template <class R>
struct DenseLabel {
  static constexpr bool kOneHot = false;
  const R* t;
  DICE_OP_HD R Times(R x, int, int i) const { return x * t[i]; }
  DICE_OP_HD R Mix(R present, R absent, int, int i) const { return present * t[i] + absent * (R(1) - t[i]); }
};

// What the run-time options do to a voxel. `Scalar` is the plain number type beneath R.
template <class Scalar>
struct Terms {
  bool squared;  // p^2 and t^2 in the cardinalities
  bool masked;   // some voxels may have weight 0, and then count for nothing, whatever they hold
  Scalar gamma;  // focal exponent
};

// The focal cross-entropy of a class whose label is one, f(p) = (1-p)^gamma (-log p), and p f'(p).
// Lin et al., "Focal Loss for Dense Object Detection", 2017.
template <class R>
struct Focal {
  R loss, slope;
  template <class Scalar>
  DICE_OP_HD static Focal Of(R p, R log_p, Scalar gamma) {
    if (gamma == Scalar(0)) return {-log_p, R(-1)};
    const R rest = Max(R(1) - p, R(0));
    const R weight = Exp(R(gamma) * Log(rest));
    // p log(p) / (1-p), which tends to -1 as p does to 1, and to 0 with p
    const R ratio = Select(p > R(0), Select(rest > R(0), p * log_p / rest, R(-1)), R(0));
    return {-(weight * log_p), weight * (R(gamma) * ratio - R(1))};
  }
};

struct Softmax {
  static constexpr bool kBinary = false;  // one cross-entropy term per voxel: the label's
  // z: logits, on return shifted so that z - *log_norm is log p; p: probabilities.
  template <class Classes, class R>
  DICE_OP_HD static void Forward(const Classes& k, R* z, R* p, R* log_norm) {
    R top = z[0];
    for (int i = 1; i < k.size(); ++i) top = Max(top, z[i]);
    top = k.Max(top);
    R total = R(0);
    for (int i = 0; i < k.size(); ++i) {
      z[i] = z[i] - top;
      p[i] = Exp(z[i]);
      if (k.Has(i)) total = total + p[i];
    }
    total = k.Sum(total);
    const R scale = R(1) / total;
    for (int i = 0; i < k.size(); ++i) p[i] = p[i] * scale;
    if (log_norm) *log_norm = Log(total);
  }
  template <class R, class Scalar>
  DICE_OP_HD static Focal<R> CategoricalTerm(R z, R p, R log_norm, Scalar gamma) {
    return Focal<R>::Of(p, z - log_norm, gamma);
  }
  // d: in dL/dp without the cross-entropy, out dL/dlogits; h: p dL/dp of the cross-entropy.
  template <class Classes, class R>
  DICE_OP_HD static void Backward(const Classes& k, const R* p, const R* h, R* d) {
    R dot = R(0);
    for (int i = 0; i < k.size(); ++i) {
      d[i] = p[i] * d[i];
      if (h) d[i] = d[i] + h[i];
      if (k.Has(i)) dot = dot + d[i];
    }
    dot = k.Sum(dot);
    for (int i = 0; i < k.size(); ++i) d[i] = d[i] - p[i] * dot;
  }
};

// p and q = 1 - p, each exact also where the other rounds to 1: a confident mistake keeps its gradient.
template <class R>
struct Logistic {
  R p, q, e;  // e = exp(-|z|)
  DICE_OP_HD static Logistic Of(R z) {
    const R e = Exp(-Abs(z));
    const R larger = R(1) / (R(1) + e), smaller = e * larger;
    const auto negative = z < R(0);
    return {Select(negative, smaller, larger), Select(negative, larger, smaller), e};
  }
};

struct Sigmoid {
  static constexpr bool kBinary = true;  // a cross-entropy term for every class, present or not
  template <class Classes, class R>
  DICE_OP_HD static void Forward(const Classes& k, R* z, R* p, R*) {
    for (int i = 0; i < k.size(); ++i) p[i] = Logistic<R>::Of(z[i]).p;
  }
};

// The caller's y_pred are probabilities already.
struct Identity {
  static constexpr bool kBinary = false;
  // The cross-entropy takes smaller probabilities for this one, as keras.losses do (backend epsilon).
  static constexpr double kEpsilon = 1e-7;
  template <class Classes, class R>
  DICE_OP_HD static void Forward(const Classes& k, R* z, R* p, R*) {
    for (int i = 0; i < k.size(); ++i) p[i] = z[i];
  }
  template <class R, class Scalar>
  DICE_OP_HD static Focal<R> CategoricalTerm(R, R p, R, Scalar gamma) {
    const R cut = Max(p, R(kEpsilon));
    return Focal<R>::Of(cut, Log(cut), gamma);
  }
  template <class Classes, class R>
  DICE_OP_HD static void Backward(const Classes& k, const R* p, const R* h, R* d) {
    if (!h) return;
    for (int i = 0; i < k.size(); ++i) d[i] = d[i] + Select(p[i] < R(kEpsilon), R(0), h[i] / p[i]);
  }
};

// The focal binary cross-entropy of a logit for both values of the label, and its derivatives with
// respect to the logit.
template <class R>
struct BinaryTerms {
  R present, absent;  // (1-p)^gamma (-log p),  p^gamma (-log(1-p))
  R d_present, d_absent;
  template <class Scalar>
  DICE_OP_HD static BinaryTerms Of(R z, const Logistic<R>& s, Scalar gamma) {
    const R tail = Log1p(s.e);
    const R not_log_p = Max(-z, R(0)) + tail;  // -log p
    const R not_log_q = Max(z, R(0)) + tail;   // -log(1-p)
    if (gamma == Scalar(0)) return {not_log_p, not_log_q, -s.q, s.p};
    const R g = R(gamma);
    const R p_power = Exp(-(g * not_log_p)), q_power = Exp(-(g * not_log_q));
    return {q_power * not_log_p, p_power * not_log_q, -(q_power * (s.q + g * s.p * not_log_p)),
            p_power * (s.p + g * s.q * not_log_q)};
  }
};

// Calls fn(i, loss, slope) for every class i: the cross-entropy that the voxel adds to class i, and
// what Activation::Backward wants as h for a unit coefficient (nothing where the terms are binary).
template <class Activation, class Classes, class Label, class R, class Scalar, class Fn>
DICE_OP_HD void CrossEntropy(const Classes& k, const R* z, const R* p, R log_norm, const Label& label, Scalar gamma,
                             Fn&& fn) {
  if constexpr (Activation::kBinary) {
    for (int i = 0; i < k.size(); ++i) {
      const auto terms = BinaryTerms<R>::Of(z[i], Logistic<R>::Of(z[i]), gamma);
      fn(i, label.Mix(terms.present, terms.absent, k.Class(i), i), R(0));
    }
  } else if constexpr (Label::kOneHot) {
    // One class has a term: pick its numbers first, then take logarithm and power once.
    R z_t = R(0), p_t = R(0);
    for (int i = 0; i < k.size(); ++i) {
      z_t = z_t + label.Times(z[i], k.Class(i), i);
      p_t = p_t + label.Times(p[i], k.Class(i), i);
    }
    p_t = k.Sum(p_t);
    const auto focal = Activation::CategoricalTerm(k.Sum(z_t), p_t, log_norm, gamma);
    for (int i = 0; i < k.size(); ++i) {
      fn(i, label.Times(focal.loss, k.Class(i), i), label.Times(focal.slope, k.Class(i), i));
    }
  } else {
    for (int i = 0; i < k.size(); ++i) {
      const auto focal = Activation::CategoricalTerm(z[i], p[i], log_norm, gamma);
      const R present = label.Times(R(1), k.Class(i), i);
      const auto some = present != R(0);  // keeps 0 * log(0) out
      fn(i, Select(some, present * focal.loss, R(0)), Select(some, present * focal.slope, R(0)));
    }
  }
}

// A voxel without weight may hold anything, NaN too: it becomes a harmless one.
template <class Classes, class R, class Scalar>
DICE_OP_HD void ClearMasked(const Classes& k, R* z, R weight, const Terms<Scalar>& terms) {
  if (!terms.masked) return;
  const auto counts = weight != R(0);
  for (int i = 0; i < k.size(); ++i) z[i] = Select(counts, z[i], R(0));
}

// Adds the voxel of weight `m` to the running sums. z: logits in, destroyed; p: scratch.
template <class Activation, bool kCrossEntropy, class Classes, class Label, class R, class Scalar, class Accumulators>
DICE_OP_HD void AddVoxel(const Classes& k, R* z, R* p, const Label& label, R m, const Terms<Scalar>& terms,
                         Accumulators& sums) {
  ClearMasked(k, z, m, terms);
  R log_norm = R(0);
  Activation::Forward(k, z, p, kCrossEntropy ? &log_norm : nullptr);
  for (int i = 0; i < k.size(); ++i) {
    const R mp = m * p[i];
    const R mt = label.Times(m, k.Class(i), i);
    sums.intersection[i] = sums.intersection[i] + label.Times(mp, k.Class(i), i);
    sums.pred_sum[i] = sums.pred_sum[i] + (terms.squared ? mp * p[i] : mp);
    sums.label_sum[i] = sums.label_sum[i] + (terms.squared ? label.Times(mt, k.Class(i), i) : mt);
  }
  if constexpr (kCrossEntropy) {
    CrossEntropy<Activation>(k, z, p, log_norm, label, terms.gamma,
                             [&](int i, R loss, R) { sums.cross_entropy[i] = sums.cross_entropy[i] + m * loss; });
  }
}

// Turns the logits z into dL/dlogits, in d. p, h: scratch. a, b, e: dL/d(intersection, pred_sum,
// cross_entropy) of the classes held.
template <class Activation, bool kCrossEntropy, class Classes, class Label, class R, class Scalar>
DICE_OP_HD void VoxelGrad(const Classes& k, R* z, R* p, R* h, R* d, const Label& label, R m, const Terms<Scalar>& terms,
                          const Scalar* a, const Scalar* b, const Scalar* e) {
  ClearMasked(k, z, m, terms);
  // dL/dp of class i by way of intersection and cardinality
  const auto direct = [&](int i, R p_i) {
    const R cardinality = terms.squared ? R(Scalar(2) * b[i]) * p_i : R(b[i]);
    return cardinality + label.Times(R(a[i]), k.Class(i), i);
  };
  if constexpr (Activation::kBinary) {  // no class knows of another
    for (int i = 0; i < k.size(); ++i) {
      const auto s = Logistic<R>::Of(z[i]);
      R total = direct(i, s.p) * s.p * s.q;
      if constexpr (kCrossEntropy) {
        const auto binary = BinaryTerms<R>::Of(z[i], s, terms.gamma);
        total = total + R(e[i]) * label.Mix(binary.d_present, binary.d_absent, k.Class(i), i);
      }
      d[i] = m * total;
    }
  } else {
    R log_norm = R(0);
    Activation::Forward(k, z, p, kCrossEntropy ? &log_norm : nullptr);
    if constexpr (kCrossEntropy) {
      CrossEntropy<Activation>(k, z, p, log_norm, label, terms.gamma,
                               [&](int i, R, R slope) { h[i] = R(e[i]) * slope; });
    }
    for (int i = 0; i < k.size(); ++i) d[i] = direct(i, p[i]);
    Activation::Backward(k, p, kCrossEntropy ? h : static_cast<const R*>(nullptr), d);
    for (int i = 0; i < k.size(); ++i) d[i] = m * d[i];
  }
}

}  // namespace
}  // namespace dice_op

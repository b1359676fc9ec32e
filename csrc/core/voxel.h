// The mathematics of one voxel, written once for every processor.
//
// `R` is a number: a float in a CUDA thread, or on a CPU a SIMD register that holds the same class of several voxels.
// `Classes` says which classes of a voxel the caller holds. On a CPU these are all classes. A CUDA thread that shares a
// voxel with its neighbours holds a share of its classes, and Sum, Max and Top, which gives the largest logit, combine
// the values of these threads. Such a thread may hold one class too many: its logit is -infinity, which adds nothing to
// the others. A type R has comparisons and the functions of arithmetic.h: Exp, ExpOfDifference(a, b) = exp(a - b) for
// a <= b, ExpOfDifferenceToItself(a), which is what that gives for a = b, Reciprocal, Log, Log1p, Max, Abs, Select and
// AddWhere.
//
// Everything is in an unnamed namespace. The CPU kernels compile this file once per instruction set, and internal
// linkage keeps the linker from merging the copies into one that the processor may not be able to run.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/arithmetic.h"
#include "core/inline.h"
#include "core/terms.h"

namespace dice_op {
namespace {

// The largest of the logits held.
template <class Classes, class R>
DICE_OP_DEVICE R Largest(const Classes& k, const R* z) {
  R top = z[0];
  DICE_OP_UNROLL
  for (int i = 1; i < k.size(); ++i) top = Max(top, z[i]);
  return top;
}

// All classes of a voxel. Their number is known at compile time, or only at run time (kCount = 0).
template <int kCount>
struct AllClasses {
  // Whether a call may have an option that is a table: label_sets, a focal exponent for each class, or dist_matrix. It
  // is rare, and the specialised kernels do without.
  static constexpr bool kTables = kCount == 0;
  int count;
  DICE_OP_DEVICE int size() const { return kCount ? kCount : count; }
  DICE_OP_DEVICE int Class(int i) const { return i; }
  DICE_OP_DEVICE void Prefetch(int) const {}  // called for each class of a voxel
  template <class R>
  DICE_OP_DEVICE static R Sum(R x) {
    return x;
  }
  template <class R>
  DICE_OP_DEVICE static R Max(R x) {
    return x;
  }
  template <class R>
  DICE_OP_DEVICE R Top(const R* z) const {
    return Largest(*this, z);
  }
};

// A label given by its class index: t is 1 for this class and 0 for the others. If the index is not a class, t is 0 for
// all classes.
template <class Int>
struct IndexLabel {
  static constexpr bool kOneHot = true;
  static constexpr bool kSingle = false;
  static constexpr bool kTables = false;
  Int index;
  template <class R>
  DICE_OP_DEVICE R Times(R x, int c, int) const {
    return Select(index == c, x, R(0));
  }
  template <class R>
  DICE_OP_DEVICE R AddTo(R sum, R x, int c, int) const {
    return AddWhere(index == c, sum, x);
  }
  template <class R>
  DICE_OP_DEVICE R Pick(R x, R other, int c, int) const {
    return Select(index == c, x, other);
  }
  template <class R>
  DICE_OP_DEVICE R Mix(R present, R absent, int c, int) const {
    return Select(index == c, present, absent);
  }
};

// The same for a single voxel. The caller looks up the logit of the label's class by its index, so that no loop has to
// search for the class.
template <class R>
struct SingleLabel {
  static constexpr bool kOneHot = true;
  static constexpr bool kSingle = true;
  static constexpr bool kTables = false;
  int index;  // the class; means nothing if `item` is negative
  int item;   // its position among the classes held, or -1
  R z;        // its logit, if the class is held
  DICE_OP_DEVICE R Times(R x, int, int i) const { return Select(item == i, x, R(0)); }
  DICE_OP_DEVICE R AddTo(R sum, R x, int, int i) const { return AddWhere(item == i, sum, x); }
  DICE_OP_DEVICE R Pick(R x, R other, int, int i) const { return Select(item == i, x, other); }
  DICE_OP_DEVICE R Mix(R present, R absent, int, int i) const { return Select(item == i, present, absent); }
};

// What t is if the voxel belongs to one of several classes, of which this is one, or the lowest one.
constexpr int kOneOfSeveral = -1, kLowestOfSeveral = -2;

// A label that gives any number t for each class. If kTables is true, t may also be one of the two above, and a label
// that is an index may know the distance of its class from each of the `classes`. D is the type of these distances.
template <class R, bool kTables_, class D = R>
struct DenseLabel {
  static constexpr bool kOneHot = false;
  static constexpr bool kSingle = false;
  static constexpr bool kTables = kTables_;
  const R* t;
  const D* distances = nullptr;
  int classes = 0;
  // Whether nobody knows if the voxel belongs to the class; and whether this is the lowest such class of the voxel.
  DICE_OP_DEVICE auto IsUnknown(int i) const { return t[i] < R(0); }
  DICE_OP_DEVICE auto IsLowestUnknown(int i) const { return t[i] < R(-1.5f); }
  DICE_OP_DEVICE R Distance(int c) const { return c < classes ? R(distances[c]) : R(0); }
  // min(p, t), and its derivative with respect to p. Where p = t, this is the middle of the subgradients.
  DICE_OP_DEVICE R Least(R p, int i) const { return Select(t[i] < p, t[i], p); }
  DICE_OP_DEVICE R SlopeOfLeast(R p, int i) const { return Select(p < t[i], R(1), Select(t[i] < p, R(0), R(0.5))); }
  DICE_OP_DEVICE R Times(R x, int, int i) const { return x * t[i]; }
  DICE_OP_DEVICE R AddTo(R sum, R x, int, int i) const { return sum + x * t[i]; }
  DICE_OP_DEVICE R Mix(R present, R absent, int, int i) const {  // for an infinite logit one term is infinite
    return Select(t[i] != R(0), present * t[i], R(0)) + Select(t[i] != R(1), absent * (R(1) - t[i]), R(0));
  }
};

// Returns x, or 0 where the label does not say whether the voxel belongs to class i.
template <class Label, class R, class Scalar>
DICE_OP_DEVICE R IfKnown(const Label& label, R x, int i, const Terms<Scalar>& terms) {
  if constexpr (Label::kTables) {
    if (terms.sets) return Select(label.IsUnknown(i), R(0), x);
  }
  return x;
}

// How far the prediction of a voxel is from its label: the mean distance of the classes from the label's class,
// weighted by their probabilities. p: from Activate; it is still to be scaled, and a class too many has none.
template <class Classes, class Label, class R>
DICE_OP_DEVICE R DistanceOf(const Classes& k, const Label& label, const R* p) {
  R distance = R(0);
  DICE_OP_UNROLL
  for (int i = 0; i < k.size(); ++i) {
    if (k.Class(i) < label.classes) distance = distance + p[i] * label.Distance(k.Class(i));
  }
  return k.Sum(distance);
}

// loss is the focal cross-entropy of a class whose label is one, f(p) = (1-p)^gamma (-log p). slope is p f'(p).
// Lin et al., "Focal Loss for Dense Object Detection", 2017.
template <class R>
struct Focal {
  R loss, slope;
  // rest: 1 - p
  template <class Scalar>
  DICE_OP_DEVICE static Focal Of(R p, R rest, R log_p, Scalar gamma) {
    if (gamma == Scalar(0)) return {-log_p, R(-1)};
    const R weight = Exp(R(gamma) * Log(rest));
    // p log(p) / (1-p), which tends to -1 as p goes to 1, and to 0 as p goes to 0
    const R ratio = Select(p > R(0), Select(rest > R(0), p * log_p * Reciprocal(rest), R(-1)), R(0));
    return {-(weight * log_p), weight * (R(gamma) * ratio - R(1))};
  }
};

// The numbers that turn a logit of one voxel into a probability: exp(z - top) * scale.
template <class R>
struct Norm {
  R top, scale, total;  // scale = 1 / total
};

// The classes that a voxel may belong to, if its label says no more. q is the sum of their probabilities, and rest that
// of the others: 1 - q, exact even if q rounds to 1.
template <class R>
struct Set {
  R q, rest, log_q;
  R top, scale;  // exp(z - top) * scale is the share of a class in q. Identity has no use for these, nor for rest.
};

// The base of the activations whose Forward or Decide gives probabilities directly.
struct Unscaled {
  template <class R>
  DICE_OP_DEVICE static R Scale(R x, const Norm<R>&) {
    return x;
  }
};

struct Softmax {
  static constexpr bool kHard = false;    // true: gives zeros and ones, without cross-entropy and gradient
  static constexpr bool kBinary = false;  // each voxel has one cross-entropy term, the label's
  // z: the logits; e: the values that Scale turns into probabilities. The scale is applied later, so that it is
  // multiplied with the voxel's weight only once.
  template <class Classes, class R>
  DICE_OP_DEVICE static Norm<R> Forward(const Classes& k, const R* z, R* e) {
    const R top = k.Top(z);
    R total = R(0);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      k.Prefetch(i);
      e[i] = ExpOfDifference(z[i], top);
      total = i == 0 ? e[0] : total + e[i];
    }
    total = k.Sum(total);
    return {top, Reciprocal(total), total};
  }
  template <class R>
  DICE_OP_DEVICE static R Scale(R x, const Norm<R>& norm) {
    return x * norm.scale;
  }
  template <class R>
  DICE_OP_DEVICE static R Probability(R z, const Norm<R>& norm) {
    return ExpOfDifference(z, norm.top) * norm.scale;
  }
  template <class R>
  DICE_OP_DEVICE static R LogTotal(const Norm<R>& norm) {
    return Log(norm.total * Reciprocal(ExpOfDifferenceToItself(norm.top)));
  }
  template <class R>
  DICE_OP_DEVICE static R LogProbability(R z, R, const Norm<R>& norm, R log_total) {
    return (z - norm.top) - log_total;
  }
  template <class R, class Scalar>
  DICE_OP_DEVICE static Focal<R> CategoricalTerm(R p, R rest, R log_p, Scalar gamma) {
    return Focal<R>::Of(p, rest, log_p, gamma);
  }
  // What Set needs of the classes that a voxel may belong to. Without such classes the numbers mean nothing.
  template <class Classes, class Label, class R>
  DICE_OP_DEVICE static Set<R> SetOf(const Classes& k, const R* z, const R* e, const Norm<R>& norm, R log_total,
                                     const Label& label) {
    R top = R(-INFINITY), rest = R(0), total = R(0);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      top = Max(top, Select(label.IsUnknown(i), z[i], top));
      rest = rest + Select(label.IsUnknown(i), R(0), e[i]);
    }
    top = k.Max(top);
    top = Select(top > R(-INFINITY), top, norm.top);  // a set without any probability has an infinite loss, not NaN
    rest = k.Sum(rest) * norm.scale;
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      total = total + Select(label.IsUnknown(i), ExpOfDifference(z[i], top), R(0));
    }
    total = k.Sum(total);
    const R log_q = (top - norm.top) + (LogTotal(Norm<R>{top, R(0), total}) - log_total);
    return {Max(R(1) - rest, R(0)), rest, log_q, top, Select(total > R(0), Reciprocal(total), R(0))};
  }
  // The h of Backward that the term f(q) of a set adds for a class. slope: q f'(q). The sum of u does not change.
  template <class R, class Unknown>
  DICE_OP_DEVICE static R SlopeOfSet(const Set<R>& set, R slope, R z, R p, Unknown unknown) {
    return slope * Select(unknown, ExpOfDifference(z, set.top) * set.scale * set.rest, -p);
  }
  // d: m dL/dlogits; g(i): dL/dp without the cross-entropy; h(i): p dL/dp of the cross-entropy. With u = p g + h, the
  // derivative with respect to the logits is u - p sum u.
  //
  // If one p is near 1, this subtraction leaves little of its derivative but the rounding error of the sum. The
  // derivatives of a voxel add up to zero, and those of small p are exact. So what they do add up to is that error, and
  // it is taken off by the same subtraction.
  template <bool kCrossEntropy, class Classes, class R, class G, class H>
  DICE_OP_DEVICE static void Backward(const Classes& k, const R* e, const Norm<R>& norm, R m, const G& g, const H& h,
                                      R* d) {
    R sum = R(0);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      d[i] = e[i] * g(i);
      if constexpr (kCrossEntropy) d[i] = d[i] + norm.total * h(i);
      sum = sum + d[i];
    }
    sum = norm.scale * k.Sum(sum);
    R error = R(0);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      d[i] = d[i] - sum * e[i];
      error = error + d[i];
    }
    error = norm.scale * k.Sum(error);
    const R weight = m * norm.scale;
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) d[i] = weight * (d[i] - error * e[i]);
  }
};

// p and q = 1 - p. Each is exact even if the other rounds to 1, so that a confident mistake keeps its gradient.
template <class R>
struct Logistic {
  R p, q, e;  // e = exp(-|z|)
  DICE_OP_DEVICE static Logistic Of(R z) {
    const R e = Exp(-Abs(z));
    const R larger = Reciprocal(R(1) + e), smaller = e * larger;
    const auto negative = z < R(0);
    return {Select(negative, smaller, larger), Select(negative, larger, smaller), e};
  }
};

// p alone. In float, 1 + exp(-z) may become infinite, but then p is below all normal numbers.
template <class R>
DICE_OP_DEVICE R LogisticP(R z) {
  if constexpr (std::is_same_v<R, float>) {
    return Reciprocal(R(1) + Exp(-z));
  } else {
    return Logistic<R>::Of(z).p;
  }
}

struct Sigmoid : Unscaled {
  static constexpr bool kHard = false;
  static constexpr bool kBinary = true;  // every class has a cross-entropy term, whatever its label
  template <class Classes, class R>
  DICE_OP_DEVICE static Norm<R> Forward(const Classes& k, const R* z, R* p) {
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      k.Prefetch(i);
      p[i] = LogisticP(z[i]);
    }
    return {};
  }
  template <class R>
  DICE_OP_DEVICE static R Probability(R z, const Norm<R>&) {
    return LogisticP(z);
  }
};

// The predictions (y_pred) are already probabilities.
struct Identity : Unscaled {
  static constexpr bool kHard = false;
  static constexpr bool kBinary = false;
  template <class Classes, class R>
  DICE_OP_DEVICE static Norm<R> Forward(const Classes& k, const R* z, R* p) {
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      k.Prefetch(i);
      p[i] = z[i];
    }
    return {};
  }
  template <class R>
  DICE_OP_DEVICE static R Probability(R z, const Norm<R>&) {
    return z;
  }
  template <class R>
  DICE_OP_DEVICE static R LogTotal(const Norm<R>&) {
    return R(0);
  }
  template <class R>
  DICE_OP_DEVICE static R LogProbability(R, R p, const Norm<R>&, R) {
    return Log(Max(p, R(kProbabilityEpsilon)));
  }
  // Here slope is f'(p).
  template <class R, class Scalar>
  DICE_OP_DEVICE static Focal<R> CategoricalTerm(R p, R, R log_p, Scalar gamma) {
    const R cut = Max(p, R(kProbabilityEpsilon));
    Focal<R> focal = Focal<R>::Of(cut, Max(R(1) - cut, R(0)), log_p, gamma);
    focal.slope = Select(p < R(kProbabilityEpsilon), R(0), focal.slope * Reciprocal(cut));
    return focal;
  }
  template <class Classes, class Label, class R>
  DICE_OP_DEVICE static Set<R> SetOf(const Classes& k, const R*, const R* p, const Norm<R>& norm, R log_total,
                                     const Label& label) {
    R q = R(0);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) q = q + Select(label.IsUnknown(i), p[i], R(0));
    q = k.Sum(q);
    return {q, R(0), LogProbability(q, q, norm, log_total), R(0), R(0)};
  }
  template <class R, class Unknown>
  DICE_OP_DEVICE static R SlopeOfSet(const Set<R>&, R slope, R, R, Unknown unknown) {
    return Select(unknown, slope, R(0));
  }
  // h(i): dL/dp of the cross-entropy.
  template <bool kCrossEntropy, class Classes, class R, class G, class H>
  DICE_OP_DEVICE static void Backward(const Classes& k, const R*, const Norm<R>&, R m, const G& g, const H& h, R* d) {
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      R total = g(i);
      if constexpr (kCrossEntropy) total = total + h(i);
      d[i] = m * total;
    }
  }
};

// The next two are for scores. They give 1 for the classes that a voxel belongs to and 0 for the others. A NaN among
// the logits makes the result NaN, as in a softmax or a sigmoid.

// Chooses the class of the largest logit, and the first one if several are equal.
struct Argmax : Unscaled {
  static constexpr bool kHard = true, kBinary = false;
  template <class Classes, class R, class Scalar>
  DICE_OP_DEVICE static void Decide(const Classes& k, const R* z, R* p, Scalar) {
    R nan = R(0);
    const R top = k.Top(z);
    const R no_class = R(Scalar(-INFINITY));
    R first = no_class;  // minus the class index, so that the first class is the largest
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      first = Max(first, Select(z[i] != top, no_class, R(Scalar(-k.Class(i)))));
      nan = nan + Select(z[i] != z[i], z[i], R(0));
    }
    first = k.Max(first);
    nan = k.Sum(nan);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) p[i] = Select(first == Scalar(-k.Class(i)), R(1), R(0)) + nan;
  }
};

// Chooses every class whose logit is above the threshold.
struct Threshold : Unscaled {
  static constexpr bool kHard = true, kBinary = false;
  template <class Classes, class R, class Scalar>
  DICE_OP_DEVICE static void Decide(const Classes& k, const R* z, R* p, Scalar threshold) {
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      p[i] = Select(z[i] > R(threshold), R(1), Select(z[i] != z[i], z[i], R(0)));
    }
  }
};

// The focal binary cross-entropy of a logit for label 1 (present) and label 0 (absent), and its derivatives with
// respect to the logit.
template <class R>
struct BinaryTerms {
  R present, absent;  // (1-p)^gamma (-log p),  p^gamma (-log(1-p))
  R d_present, d_absent;
  template <class Scalar>
  DICE_OP_DEVICE static BinaryTerms Of(R z, const Logistic<R>& s, Scalar gamma) {
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

// The cross-entropy of a class whose label is one.
template <class Activation, class R, class Scalar>
DICE_OP_DEVICE Focal<R> TermOf(R z, R p, const Norm<R>& norm, R log_total, Scalar gamma) {
  const R log_p = Activation::LogProbability(z, p, norm, log_total);
  return Activation::CategoricalTerm(p, Max(R(1) - p, R(0)), log_p, gamma);
}

// The mean of a binary term for present and absent classes, weighted by the label after smoothing.
template <class Label, class R, class Scalar>
DICE_OP_DEVICE R MixSmoothed(const Label& label, R present, R absent, int c, int i, const Terms<Scalar>& terms) {
  const R mixed = label.Mix(present, absent, c, i);
  return terms.spread == Scalar(0) ? mixed : R(terms.keep) * mixed + R(terms.spread) * (present + absent);
}

// The focal exponent of the i-th class that is held.
template <class Classes, class Scalar>
DICE_OP_DEVICE Scalar GammaOf(const Classes& k, int i, const Terms<Scalar>& terms) {
  if constexpr (Classes::kTables) {
    if (terms.gammas) return static_cast<Scalar>(terms.gammas[k.Class(i)]);
  }
  return terms.gamma;
}

// The term of a voxel whose label is one class. The numbers of this class are picked first, so that logarithm and power
// are computed only once.
template <class Activation, class Classes, class Label, class R, class Scalar>
DICE_OP_DEVICE Focal<R> TermOfLabel(const Classes& k, const R* z, const R* p, const Norm<R>& norm, const Label& label,
                                    const Terms<Scalar>& terms) {
  R z_t = R(0), p_t = R(0);
  DICE_OP_UNROLL
  for (int i = 0; i < k.size(); ++i) {
    z_t = label.Pick(z[i], z_t, k.Class(i), i);
    p_t = label.Pick(p[i], p_t, k.Class(i), i);
  }
  return TermOf<Activation>(z_t, Activation::Scale(p_t, norm), norm, Activation::LogTotal(norm), terms.gamma);
}

// Calls add(i, loss, negative) for every class i. loss is the cross-entropy that the voxel adds to class i, and
// negative is what it adds to the other sum if the terms are binary. Where they are not, and `e` is given, this also
// writes h[i], the h of Activation::Backward. e: dL/dcross_entropy of the classes.
//
// A voxel that belongs to one of several classes has the term f(q) of the sum of their probabilities (Shi et al.,
// "Marginal Loss and Exclusion Loss for Partially Supervised Multi-Organ Segmentation", 2021). It counts for the lowest
// of the classes; label smoothing gives each of them its part of it.
template <class Activation, class Classes, class Label, class R, class Scalar, class Add>
DICE_OP_DEVICE void CrossEntropy(const Classes& k, const R* z, const R* p, const Norm<R>& norm, const Label& label,
                                 const Terms<Scalar>& terms, const Scalar* e, R* h, Add&& add) {
  if constexpr (Activation::kBinary) {
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      const auto binary = BinaryTerms<R>::Of(z[i], Logistic<R>::Of(z[i]), GammaOf(k, i, terms));
      const auto part = [&](R present, R absent) {
        return IfKnown(label, MixSmoothed(label, present, absent, k.Class(i), i, terms), i, terms);
      };
      add(i, part(binary.present, R(0)), part(R(0), binary.absent));
    }
  } else if constexpr (Label::kOneHot) {
    const auto focal = TermOfLabel<Activation>(k, z, p, norm, label, terms);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      add(i, label.Times(focal.loss, k.Class(i), i), R(0));
      if (e) h[i] = label.Times(R(e[i]) * focal.slope, k.Class(i), i);
    }
  } else {
    const bool has_sets = Label::kTables && terms.sets;
    const R log_total = Activation::LogTotal(norm);
    Set<R> set = {};
    if constexpr (Label::kTables) {
      if (has_sets) set = Activation::SetOf(k, z, p, norm, log_total, label);
    }
    R slope_of_set = R(0);
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      R p_i = Activation::Scale(p[i], norm), rest = Max(R(1) - p_i, R(0));
      R log_p = Activation::LogProbability(z[i], p_i, norm, log_total);
      R t = label.Times(R(1), k.Class(i), i);
      if constexpr (Label::kTables) {
        if (has_sets) {
          const auto unknown = label.IsUnknown(i);
          p_i = Select(unknown, set.q, p_i);
          rest = Select(unknown, set.rest, rest);
          log_p = Select(unknown, set.log_q, log_p);
          t = Select(unknown, Select(label.IsLowestUnknown(i), R(1), R(0)), t);
        }
      }
      const auto focal = Activation::CategoricalTerm(p_i, rest, log_p, GammaOf(k, i, terms));
      const R present = R(terms.keep) * t + R(terms.spread);
      const auto some = present != R(0);  // avoids 0 * log(0)
      add(i, Select(some, present * focal.loss, R(0)), R(0));
      if (!e) continue;
      h[i] = R(e[i]) * Select(some, present * focal.slope, R(0));
      if constexpr (Label::kTables) {
        if (has_sets) {
          slope_of_set = slope_of_set + Select(label.IsUnknown(i), h[i], R(0));
          h[i] = Select(label.IsUnknown(i), R(0), h[i]);
        }
      }
    }
    if constexpr (Label::kTables) {
      if (!has_sets || !e) return;
      slope_of_set = k.Sum(slope_of_set);
      DICE_OP_UNROLL
      for (int i = 0; i < k.size(); ++i) {
        h[i] =
            h[i] + Activation::SlopeOfSet(set, slope_of_set, z[i], Activation::Scale(p[i], norm), label.IsUnknown(i));
      }
    }
  }
}

// A voxel without weight may hold anything, even NaN. Its logits are replaced by zeros.
template <class Classes, class R, class Scalar>
DICE_OP_DEVICE void ClearMasked(const Classes& k, R* z, R weight, const Terms<Scalar>& terms) {
  if (!terms.masked) return;
  const auto counts = weight != R(0);
  DICE_OP_UNROLL
  for (int i = 0; i < k.size(); ++i) z[i] = Select(counts, z[i], R(0));
}

// Whether probabilities of this activation may have a distance from the label, see Problem::has_distances.
template <class Activation, class Label>
constexpr bool kHasDistance = Label::kTables && !Activation::kBinary && !Activation::kHard;

// Writes to p the values that Activation::Scale turns into probabilities. It may set the logits z to zero where a mask
// says so. p may be the same array as z.
template <class Activation, class Classes, class R, class Scalar>
DICE_OP_DEVICE Norm<R> Activate(const Classes& k, R* z, R* p, R m, const Terms<Scalar>& terms) {
  ClearMasked(k, z, m, terms);
  if constexpr (Activation::kHard) {
    Activation::Decide(k, z, p, terms.threshold);
    return {};
  } else {
    return Activation::Forward(k, z, p);
  }
}

// Adds the contribution of a voxel of weight `m` for the i-th class that is held, which is class c. p: from Activate;
// weight: m after Activation::Scale.
template <class Activation, class Label, class R, class Scalar>
DICE_OP_DEVICE void AddClass(const Label& label, int c, int i, R p, R m, R weight, const Norm<R>& norm,
                             const Terms<Scalar>& terms, R* intersection, R* pred_sum, R* label_sum) {
  m = IfKnown(label, m, i, terms);
  const R mp = IfKnown(label, weight, i, terms) * p;
  *pred_sum = *pred_sum + (terms.squared ? mp * Activation::Scale(p, norm) : mp);
  if constexpr (!Label::kSingle) {
    *label_sum = label.AddTo(*label_sum, terms.squared ? label.Times(m, c, i) : m, c, i);
    if constexpr (!Label::kOneHot) {
      if (terms.soft) {
        *intersection = *intersection + m * label.Least(Activation::Scale(p, norm), i);
        return;
      }
    }
    *intersection = label.AddTo(*intersection, mp, c, i);
  }
}

// Adds a voxel of weight `m` to the running sums. z: the logits, which are overwritten; p: scratch.
template <class Activation, bool kCrossEntropy, class Classes, class Label, class R, class Scalar, class Accumulators>
DICE_OP_DEVICE void AddVoxel(const Classes& k, R* z, R* p, const Label& label, R m, const Terms<Scalar>& terms,
                             Accumulators& sums) {
  const Norm<R> norm = Activate<Activation>(k, z, p, m, terms);
  const R weight = Activation::Scale(m, norm);
  DICE_OP_UNROLL
  for (int i = 0; i < k.size(); ++i) {
    const int held = Label::kSingle ? 0 : i;
    AddClass<Activation>(label, k.Class(i), i, p[i], m, weight, norm, terms, &sums.intersection[held],
                         &sums.pred_sum[i], &sums.label_sum[held]);
    if constexpr (Label::kTables) {
      if (terms.sets) sums.AddToTable(i, Select(label.IsUnknown(i), m, R(0)));
    }
  }
  if constexpr (kHasDistance<Activation, Label>) {
    if (terms.distances) {
      const R distance = weight * DistanceOf(k, label, p);
      DICE_OP_UNROLL
      for (int i = 0; i < k.size(); ++i) sums.AddToTable(i, label.Times(distance, k.Class(i), i));
    }
  }
  if constexpr (Label::kSingle) {
    if (label.item >= 0) {
      const R p_t = Activation::Probability(label.z, norm);
      sums.AddLabel(label.item, m * p_t, m, [&] {
        if constexpr (Activation::kBinary) {
          return R(0);
        } else {
          const R log_total = Activation::LogTotal(norm);
          return m * TermOf<Activation>(label.z, p_t, norm, log_total, terms.gamma).loss;
        }
      });
    }
  }
  if constexpr (kCrossEntropy && !Activation::kBinary && Label::kOneHot && !Label::kSingle) {
    if (terms.cross_entropy) {
      const R loss = m * TermOfLabel<Activation>(k, z, p, norm, label, terms).loss;
      DICE_OP_UNROLL
      for (int i = 0; i < k.size(); ++i) {
        sums.cross_entropy[i] = label.AddTo(sums.cross_entropy[i], loss, k.Class(i), i);
      }
    }
  } else if constexpr (kCrossEntropy && (Activation::kBinary || !Label::kSingle)) {
    if (terms.cross_entropy) {
      CrossEntropy<Activation>(k, z, p, norm, label, terms, static_cast<const Scalar*>(nullptr),
                               static_cast<R*>(nullptr), [&](int i, R loss, R negative) {
                                 sums.cross_entropy[i] = sums.cross_entropy[i] + m * loss;
                                 if constexpr (Activation::kBinary) {
                                   sums.negative_cross_entropy[i] = sums.negative_cross_entropy[i] + m * negative;
                                 }
                               });
    }
  }
}

// Writes dL/dlogits to d. z: the logits; p, h: scratch. a, b, e, n: dL/d(intersection, pred_sum, cross_entropy,
// negative_cross_entropy) of the classes held. e may be null if no cross-entropy is wanted, and n also if the
// activation is not binary. If the label is a SingleLabel, a is for all classes, and so is e unless the activation is
// binary. w: dL/ddistance_sum of all classes, if there are distances.
template <class Activation, bool kCrossEntropy, class Classes, class Label, class R, class Scalar>
DICE_OP_DEVICE void VoxelGrad(const Classes& k, R* z, R* p, R* h, R* d, const Label& label, R m,
                              const Terms<Scalar>& terms, const Scalar* a, const Scalar* b, const Scalar* e,
                              const Scalar* n, const Scalar* w) {
  ClearMasked(k, z, m, terms);
  R a_t = R(0);  // the a of a single label
  if constexpr (Label::kSingle) {
    if (label.item >= 0) a_t = a[label.index];
  }
  R w_t = R(0);  // the w of the label
  if constexpr (kHasDistance<Activation, Label>) {
    if (terms.distances) {
      DICE_OP_UNROLL
      for (int i = 0; i < k.size(); ++i) {
        if (k.Class(i) < label.classes) w_t = w_t + label.Times(R(w[k.Class(i)]), k.Class(i), i);
      }
      w_t = k.Sum(w_t);
    }
  }
  // The part of dL/dp of class i that comes from the sums without a logarithm.
  const auto direct = [&](int i, R p_i) {
    R linear = terms.squared ? R(Scalar(2) * b[i]) * p_i : R(b[i]);
    if constexpr (kHasDistance<Activation, Label>) {
      if (terms.distances) linear = linear + w_t * label.Distance(k.Class(i));
    }
    if constexpr (!Label::kOneHot) {
      if (terms.soft) return linear + R(a[i]) * label.SlopeOfLeast(p_i, i);
    }
    return IfKnown(label, label.AddTo(linear, Label::kSingle ? a_t : R(a[i]), k.Class(i), i), i, terms);
  };
  if constexpr (Activation::kBinary) {  // the classes are independent
    DICE_OP_UNROLL
    for (int i = 0; i < k.size(); ++i) {
      k.Prefetch(i);
      const auto s = Logistic<R>::Of(z[i]);
      R total = direct(i, s.p) * s.p * s.q;
      if constexpr (kCrossEntropy) {
        if (terms.cross_entropy) {
          const auto binary = BinaryTerms<R>::Of(z[i], s, GammaOf(k, i, terms));
          const R present = R(e[i]) * binary.d_present, absent = R(n[i]) * binary.d_absent;
          total = total + IfKnown(label, MixSmoothed(label, present, absent, k.Class(i), i, terms), i, terms);
        }
      }
      d[i] = m * total;
    }
  } else {
    const auto norm = Activation::Forward(k, z, p);
    R h_t = R(0);  // the part of p dL/dp that comes from the cross-entropy of a single label
    if constexpr (Label::kSingle && kCrossEntropy) {
      if (terms.cross_entropy && label.item >= 0) {
        const R p_t = Activation::Probability(label.z, norm), log_total = Activation::LogTotal(norm);
        h_t = R(e[label.index]) * TermOf<Activation>(label.z, p_t, norm, log_total, terms.gamma).slope;
      }
    } else if constexpr (kCrossEntropy) {
      if (terms.cross_entropy) {
        CrossEntropy<Activation>(k, z, p, norm, label, terms, e, h, [](int, R, R) {});
      } else {
        DICE_OP_UNROLL
        for (int i = 0; i < k.size(); ++i) h[i] = R(0);
      }
    }
    const auto by_cross_entropy = [&](int i) { return Label::kSingle ? label.Times(h_t, k.Class(i), i) : h[i]; };
    const auto by_sums = [&](int i) { return direct(i, Activation::Scale(p[i], norm)); };
    Activation::template Backward<kCrossEntropy>(k, p, norm, m, by_sums, by_cross_entropy, d);
  }
}

}  // namespace
}  // namespace dice_op

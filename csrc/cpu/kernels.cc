// The CPU kernels of one instruction set. CMake compiles this file once per level, with the level's flags, its width in
// bytes (DICE_OP_VECTOR_BYTES) and the name of its table (DICE_OP_KERNELS). Everything else here has internal linkage;
// a test checks that the object exports only the table.
#include "cpu/kernels.h"

#include <algorithm>
#include <utility>

#include "core/dispatch.h"
#include "core/voxel.h"
#include "cpu/pack.h"
#include "cpu/tile.h"

namespace dice_op {
namespace {

// The count of numbers that a lane adds in its own precision before the result is added to the double sums. This limits
// the rounding error for volumes of any size.
constexpr int kFlush = kMaxGroups;

// Loops over at most this many classes are unrolled, unless few processors use this level.
#if defined(DICE_OP_SMALL)
constexpr int kMaxUnrolled = 0;
#else
constexpr int kMaxUnrolled = 4;
#endif

// Double is no faster with the widest registers, because its exponentials are computed one by one. The level with
// those leaves it to the level below.
constexpr bool kHasDouble = DICE_OP_VECTOR_BYTES < 64;

// The most classes of a voxel that are kept in registers, of which there are 16 or 32. With more classes, the numbers
// stay in the first-level cache.
constexpr int kMaxInRegisters = DICE_OP_VECTOR_BYTES == 64 ? 4 : 3;

// With more classes, this many are added up at the same time, so that they share the loads of a voxel's weight and
// label. The instruction set has registers for this many.
constexpr int kSideBySide = DICE_OP_VECTOR_BYTES / 16;

// A gradient with this many bytes does not stay in the caches until somebody reads it.
constexpr int64_t kStreamBytes = 8 << 20;

template <class P, int kCount>
struct Row {
  P values[kCount];
  Row(int, Scratch&) {}
};
template <class P>
struct Row<P, 0> {
  P* values;
  Row(int count, Scratch& scratch) : values(static_cast<P*>(scratch.Take(count * sizeof(P)))) {}
};

// The running sums of each lane, which Flush adds to the totals.
template <class P, int kCount>
struct Accumulators {
  struct OfClasses : Row<P, kCount> {  // one of the sums
    using Row<P, kCount>::Row;
    P& operator[](int c) { return this->values[c]; }
  };
  OfClasses rows[kClassSumCount];
  P weight_sum;
  int count, additions = 0;  // additions to each lane since the last Flush

  Accumulators(int classes, Scratch& scratch)
      : Accumulators(classes, scratch, std::make_index_sequence<kClassSumCount>()) {}
  OfClasses& operator[](Sum sum) { return rows[static_cast<int>(sum)]; }
  void Clear() {
    for (OfClasses& row : rows) std::fill(&row[0], &row[0] + count, P(0));
    weight_sum = P(0);
  }
  void Flush(double* partial) {
    for (OfClasses& row : rows) {
      for (int c = 0; c < count; ++c) *partial++ += SumLanes(row[c]);
    }
    *partial += SumLanes(weight_sum);
    Clear();
    additions = 0;
  }

 private:
  template <size_t... kRow>
  Accumulators(int classes, Scratch& scratch, std::index_sequence<kRow...>)
      : rows{(static_cast<void>(kRow), OfClasses(classes, scratch))...}, count(kCount ? kCount : classes) {
    Clear();
  }
};
static_assert(kSampleSumCount == 1, "Accumulators hold weight_sum alone beside the sums per class");

// While a class is computed, this prefetches memory that the next tile reads. The memory goes to the second-level
// cache, because this tile fills the first-level cache.
template <int kCount>
struct ClassesOfTile : AllClasses<kCount> {
  const int* numbers;  // 0, 1, ..., see Tile::numbers
  Ahead ahead;
  DICE_OP_INLINE int Class(int i) const { return kCount ? i : numbers[i]; }
  DICE_OP_INLINE void Prefetch(int i) const { __builtin_prefetch(ahead.memory + i * ahead.stride, 0, 2); }
};

template <class R, class Activation, bool kCrossEntropy, bool kDense, int kCount>
struct Block {
  static constexpr int W = DICE_OP_VECTOR_BYTES / sizeof(R);
  using P = Pack<R, W>;
  using I = Pack<typename IntFor<R>::type, W>;
  using Classes = ClassesOfTile<kCount>;
  static constexpr bool kInRegisters = kCount > 0 && kCount <= kMaxInRegisters;
  static constexpr int kHeld = kInRegisters ? kCount : 1;
  static constexpr int kTogether = kCount ? std::min(kCount, kSideBySide) : kSideBySide;
  static constexpr bool kAsks = std::is_same_v<R, double>;  // whether a cross-entropy is wanted is asked at run time
  static constexpr bool kTables = kDense && Classes::kTables;
  using Label = std::conditional_t<kDense, DenseLabel<P, kTables>, IndexLabel<I>>;

  static Label LabelOf(const Tile<R, W>& tile, int group, const Classes& k) {
    if constexpr (kDense) {
      return {reinterpret_cast<const P*>(tile.labels(group)), reinterpret_cast<const P*>(tile.distances(group)),
              k.size()};
    } else {
      return {I::Load(tile.index(group))};
    }
  }

  struct Rows {  // for Add
    Row<P, 0> p, scales, weights;
    Rows(int classes, int groups, Scratch& scratch)
        : p(classes, scratch), scales(groups, scratch), weights(groups, scratch) {}
  };

  static size_t ScratchBytes(const Problem& problem) {
    const size_t of_classes = kClassSumCount + 1, of_groups = 2;  // rows, which are as many as Sums has, and Grad fewer
    return Tile<R, W>::Bytes(problem) + (of_classes * problem.classes + of_groups * kMaxGroups) * sizeof(P) +
           (1 + of_classes + of_groups) * Scratch::kAlign;
  }

  static int64_t Sums(const Problem& problem, int64_t sample, int64_t begin, int64_t end, double* partial,
                      Scratch scratch) {
    auto terms = TermsOf(problem).To<R>();
    if (!kAsks) terms.cross_entropy = kCrossEntropy;
    Tile<R, W> tile(problem, scratch);
    const Classes k{{static_cast<int>(problem.classes)}, tile.numbers(), {}};
    Accumulators<P, kCount> sums(k.size(), scratch);
    Rows rows(k.size(), tile.capacity() / W, scratch);
    int64_t bad = -1;
    for (int64_t v = begin; v < end; v += tile.capacity()) {
      const int64_t label = tile.Load(sample, v, static_cast<int>(std::min<int64_t>(tile.capacity(), end - v)));
      if (bad < 0 && label >= 0) bad = 2 * label;
      if constexpr (std::is_same_v<Activation, Identity>) {
        const int64_t prediction = tile.FindNoProbability();
        if (bad < 0 && prediction >= 0) bad = 2 * prediction + 1;
      }
      Add(k, terms, tile, rows, sums);
      if (sums.additions + tile.capacity() / W > kFlush) sums.Flush(partial);
    }
    sums.Flush(partial);
    return bad;
  }

  // Computes the voxels first, and then adds up a few classes at a time over all voxels of the tile. So the sums of
  // these classes stay in registers, and no sum waits for a voxel's exponentials and quotient.
  static void Add(Classes k, const Terms<R>& terms, Tile<R, W>& tile, Rows& rows, Accumulators<P, kCount>& sums) {
    P *const scales = rows.scales.values, *const weights = rows.weights.values;
    P *const intersections = &sums[Sum::kIntersection][0], *const pred_sums = &sums[Sum::kPredSum][0];
    P *const label_sums = &sums[Sum::kLabelSum][0], *const unknown_sums = &sums[Sum::kUnknownSum][0];
    P* const distance_sums = &sums[Sum::kDistanceSum][0];
    P *const cross_entropy = &sums[Sum::kCrossEntropy][0], *const negative = &sums[Sum::kNegativeCrossEntropy][0];
    const int groups = tile.groups();
    for (int group = 0; group < groups; ++group) {
      k.ahead = tile.NextTile(group);
      P* const stored = reinterpret_cast<P*>(tile.logits(group));
      P held_z[kHeld], held_p[kHeld];
      P* const z = kInRegisters ? held_z : stored;
      P* const p = kInRegisters ? held_p : kCrossEntropy ? rows.p.values : stored;
      for (int i = 0; kInRegisters && i < kCount; ++i) z[i] = stored[i];
      const P m = P::Load(tile.weight(group));
      const auto norm = Activate<Activation>(k, z, p, m, terms);
      scales[group] = norm.scale;
      weights[group] = Activation::Scale(m, norm);
      sums.weight_sum = sums.weight_sum + m;
      if constexpr (kHasDistance<Activation, Label>) {
        if (terms.distances) {
          const Label label = LabelOf(tile, group, k);
          const P distance = weights[group] * DistanceOf(k, label, p);
          for (int i = 0; i < k.size(); ++i) distance_sums[i] = distance_sums[i] + label.Times(distance, i, i);
        }
      }
      if constexpr (kCrossEntropy) {
        if (terms.cross_entropy) {
          CrossEntropy<Activation>(k, z, p, norm, LabelOf(tile, group, k), terms, static_cast<const R*>(nullptr),
                                   static_cast<P*>(nullptr), [&](int i, P loss, P of_negative) {
                                     cross_entropy[i] = cross_entropy[i] + m * loss;
                                     if constexpr (Activation::kBinary) negative[i] = negative[i] + m * of_negative;
                                   });
        }
      }
      if (p != stored) {
        for (int i = 0; i < k.size(); ++i) stored[i] = p[i];
      }
    }
    for (int c = 0; c < k.size(); c += kTogether) {
      P intersection[kTogether] = {}, pred_sum[kTogether] = {}, label_sum[kTogether] = {};
      for (int group = 0; group < groups; ++group) {
        const Label label = LabelOf(tile, group, k);
        const P m = P::Load(tile.weight(group));
        const Norm<P> norm = {P(R(0)), scales[group], P(R(0))};
        for (int j = 0; j < kTogether; ++j) {
          const int i = std::min(c + j, k.size() - 1);  // the results past the last class are not used
          const P p = P::Load(tile.logits(group) + i * W);
          AddClass<Activation>(label, k.Class(i), i, p, m, weights[group], norm, terms, &intersection[j], &pred_sum[j],
                               &label_sum[j]);
          if constexpr (kTables) {
            if (terms.sets && c + j < k.size()) {
              unknown_sums[i] = unknown_sums[i] + Select(label.IsUnknown(i), m, P(R(0)));
            }
          }
        }
      }
      for (int j = 0; j < kTogether && c + j < k.size(); ++j) {
        intersections[c + j] = intersections[c + j] + intersection[j];
        pred_sums[c + j] = pred_sums[c + j] + pred_sum[j];
        label_sums[c + j] = label_sums[c + j] + label_sum[j];
      }
    }
    sums.additions += groups;
  }

  static void Grad(const Problem& problem, const SumsGrad& grad, int64_t sample, int64_t begin, int64_t end,
                   Scratch scratch) {
    const auto of_sample = [&](Sum sum) {
      const R* const coefficients = static_cast<const R*>(grad.d_sums[sum]);
      return coefficients ? coefficients + sample * problem.classes : nullptr;
    };
    const R *a = of_sample(Sum::kIntersection), *b = of_sample(Sum::kPredSum), *e = of_sample(Sum::kCrossEntropy),
            *n = of_sample(Sum::kNegativeCrossEntropy), *w = of_sample(Sum::kDistanceSum);
    auto terms = TermsOf(problem).To<R>();
    terms.cross_entropy = kAsks ? e != nullptr : kCrossEntropy;
    Tile<R, W> tile(problem, scratch);
    Classes k{{static_cast<int>(problem.classes)}, tile.numbers(), {}};
    const bool stream = grad.d_logits != problem.logits && LogitsBytes(problem) >= kStreamBytes;
    Row<P, kCount> p(k.size(), scratch), h(k.size(), scratch);
    for (int64_t v = begin; v < end; v += tile.capacity()) {
      tile.Load(sample, v, static_cast<int>(std::min<int64_t>(tile.capacity(), end - v)));
      for (int group = 0; group < tile.groups(); ++group) {
        k.ahead = tile.NextTile(group);
        P* const stored = reinterpret_cast<P*>(tile.logits(group));
        P held[kHeld], *const z = kInRegisters ? held : stored;
        for (int i = 0; kInRegisters && i < kCount; ++i) held[i] = stored[i];
        // The gradient may overwrite z, because z is read for the last time before.
        VoxelGrad<Activation, kCrossEntropy>(k, z, p.values, h.values, z, LabelOf(tile, group, k),
                                             P::Load(tile.weight(group)), terms, a, b, e, n, w);
        for (int i = 0; kInRegisters && i < kCount; ++i) stored[i] = held[i];
      }
      tile.Store(grad.d_logits, stream);
    }
    if (stream) FenceStreams();
  }
};

// Calls fn(Block<...>{}) with the specialisation for the problem.
template <class Activation, class Fn>
auto WithBlock(const Problem& problem, Activation, Fn&& fn) {
  return WithBool(problem.labels_per_class(), [&](auto dense) {
    if constexpr (kHasDouble) {
      if (problem.in_double()) {  // mostly for tests, so one block does both, with and without cross-entropy
        return fn(Block<double, Activation, !Activation::kHard, dense.value, 0>{});
      }
    }
    return WithBool(problem.options.cross_entropy, [&](auto cross_entropy) {
      constexpr bool kCrossEntropy = cross_entropy.value && !Activation::kHard;
      // Training uses logits mostly, so only they are worth the code size of a block for each small number of classes.
      constexpr bool kOften = std::is_same_v<Activation, Softmax> || std::is_same_v<Activation, Sigmoid>;
      return WithCount<kOften ? kMaxUnrolled : 0>(problem.has_tables() ? 0 : problem.classes, [&](auto count) {
        return fn(Block<float, Activation, kCrossEntropy, dense.value, count.value>{});
      });
    });
  });
}

// Without any class there is nothing to normalise.
Activation ActivationOf(const Problem& problem) {
  return problem.classes ? problem.options.activation : Activation::kNone;
}

size_t ScratchBytes(const Problem& problem) {
  return WithBool(problem.in_double(), [&](auto in_double) {
    using R = std::conditional_t<in_double.value && kHasDouble, double, float>;
    return Block<R, Softmax, true, true, 0>::ScratchBytes(problem);  // it is the same for every other block
  });
}

int64_t SumsOfBlock(const Problem& problem, int64_t sample, int64_t begin, int64_t end, double* partial,
                    void* scratch) {
  return WithAnyActivation(ActivationOf(problem), [&](auto activation) {
    return WithBlock(problem, activation, [&](auto block) {
      return decltype(block)::Sums(problem, sample, begin, end, partial, Scratch(scratch));
    });
  });
}

void GradOfBlock(const Problem& problem, const SumsGrad& grad, int64_t sample, int64_t begin, int64_t end,
                 void* scratch) {
  WithActivation(ActivationOf(problem), [&](auto activation) {
    WithBlock(problem, activation,
              [&](auto block) { decltype(block)::Grad(problem, grad, sample, begin, end, Scratch(scratch)); });
  });
}

}  // namespace

namespace cpu {
const Kernels DICE_OP_KERNELS = {DICE_OP_LEVEL, ScratchBytes, SumsOfBlock, GradOfBlock};
}  // namespace cpu
}  // namespace dice_op

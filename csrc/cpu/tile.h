// A tile is a few hundred voxels of one sample in the first-level cache. Whatever their type and layout in memory, they
// are brought into the form that the arithmetic needs: groups of W voxels, with one register per class in each group.
// core/voxel.h says why the namespace is unnamed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/dispatch.h"
#include "core/dtype.h"
#include "cpu/pack.h"
#include "cpu/transpose.h"

namespace dice_op {
namespace {

template <int W, class T, class R>
void Convert(const T* from, int64_t n, R* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) LoadAs<R, W>(from + i).Store(to + i);
  for (; i < n; ++i) to[i] = FromStorage<T, R>(from[i]);
}

template <int W, class T>
void Copy(const T* from, int64_t n, T* to, bool stream) {
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(to + i) % (W * sizeof(T)); ++i) to[i] = from[i];
    for (; i + W <= n; i += W) Stream(LoadStored<W>(from + i).v, to + i);
  }
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}

// Gives an address for each class of a group: `memory` for the first, and `stride` bytes from each to the next.
struct Ahead {
  const char* memory;
  int64_t stride;
};

constexpr int kMaxGroups = 64;

// Hands out scratch memory, piece by piece. Each piece is aligned for any register, which takes up to kAlign bytes
// more.
class Scratch {
 public:
  static constexpr size_t kAlign = 64;

  explicit Scratch(void* memory) : next_(reinterpret_cast<uintptr_t>(memory)) {}
  void* Take(size_t bytes) {
    const uintptr_t taken = (next_ + kAlign - 1) / kAlign * kAlign;
    next_ = taken + bytes;
    return reinterpret_cast<void*>(taken);
  }

 private:
  uintptr_t next_;
};

template <class R, int W>
class Tile {
 public:
  using Int = typename IntFor<R>::type;
  using P = Pack<R, W>;

  // The number of voxels. Their logits and dense labels together take about half of a 32 KB cache.
  static int CapacityFor(const Problem& problem) {
    const int classes = static_cast<int>(problem.classes);
    return std::max<int>(2 * W, std::min({512, kMaxGroups * W, 2048 / std::max(1, classes)}) / W * W);
  }
  // The number of bytes of scratch memory that a tile takes.
  static size_t Bytes(const Problem& problem) {
    return Numbers(problem) * sizeof(R) + CapacityFor(problem) * sizeof(Int) + problem.classes * sizeof(int);
  }

  Tile(const Problem& problem, Scratch& scratch)
      : problem_(problem),
        classes_(static_cast<int>(problem.classes)),
        logit_size_(SizeOf(problem.logits_dtype)),
        capacity_(CapacityFor(problem)) {
    const size_t volume = static_cast<size_t>(capacity_) * classes_;
    logits_ = static_cast<R*>(scratch.Take(Bytes(problem)));
    rows_ = logits_ + volume;
    labels_ = rows_ + volume;
    distances_ = labels_ + volume;
    weight_ = logits_ + Numbers(problem) - capacity_;
    index_ = reinterpret_cast<Int*>(weight_ + capacity_);
    numbers_ = reinterpret_cast<int*>(index_ + capacity_);
    for (int c = 0; c < classes_; ++c) numbers_[c] = c;
  }

  int capacity() const { return capacity_; }
  int groups() const { return (count_ + W - 1) / W; }
  R* logits(int group) { return logits_ + static_cast<size_t>(group) * classes_ * W; }
  const R* labels(int group) const { return labels_ + static_cast<size_t>(group) * classes_ * W; }
  const R* distances(int group) const { return distances_ + static_cast<size_t>(group) * classes_ * W; }
  const R* weight(int group) const { return weight_ + group * W; }
  const Int* index(int group) const { return index_ + group * W; }
  // The numbers 0, 1, ... in memory. A comparison can read a number from memory, but a loop's counter must be copied to
  // a vector register first.
  const int* numbers() const { return numbers_; }

  // Reads voxels [begin, begin + count) of a sample, and fills the last group up with voxels of weight 0. Returns the
  // first voxel whose label is not a class, or -1.
  int64_t Load(int64_t sample, int64_t begin, int count) {
    sample_ = sample;
    begin_ = begin;
    count_ = count;
    LoadPlane(problem_.logits, problem_.logits_dtype, logits_);
    LoadWeight();
    if (problem_.dense_labels) return LoadDenseLabels();
    const int64_t bad = LoadIndices();
    if (problem_.labels_per_class()) SpreadIndices();
    if (problem_.has_distances()) LookUpDistances();
    return bad;
  }

  // Returns the first voxel whose prediction is not a probability, or -1.
  int64_t FindNoProbability() const {
    return AreAll(logits_, MayBeProbability) ? -1 : FindOther(logits_, [](R p) { return IsProbability(p); });
  }

  // Returns the memory that the next tile will read for its group with the same number.
  Ahead NextTile(int group) const {
    const int64_t voxel = begin_ + capacity_ + group * W, sample = sample_ * problem_.voxels * classes_;
    const int64_t first = sample + voxel * (channels_last() ? classes_ : 1);
    const int64_t stride = channels_last() ? W : problem_.voxels;
    return {static_cast<const char*>(problem_.logits) + first * logit_size_, stride * logit_size_};
  }

  // Writes the numbers in logits() to an array of the logits' type and layout, and bypasses the caches if `stream`.
  void Store(void* to, bool stream) {
    WithType(problem_.logits_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (kTurnsInto<R, T>) {
        T* const base = static_cast<T*>(to) + sample_ * problem_.voxels * classes_;
        T* const scratch = reinterpret_cast<T*>(rows_);
        if (!channels_last()) {
          for (int c = 0; c < classes_; ++c) {
            for (int group = 0; group < groups(); ++group) {
              StoreAs<false>(P::Load(logits(group) + c * W), scratch + group * W);
            }
            Copy<W>(scratch, count_, base + c * problem_.voxels + begin_, stream);
          }
          return;
        }
        T* const at = base + begin_ * classes_;
        const bool whole = count_ % W == 0, aligned = reinterpret_cast<uintptr_t>(at) % (W * sizeof(T)) == 0;
        if (whole && stream && aligned && classes_ <= kFew) {
          return TransposeFewGroups<R, W, false, true>(logits_, classes_, groups(), at);
        }
        T* const rows = whole && !stream ? at : scratch;
        Transpose<R, W, false>(logits_, classes_, groups(), rows);
        if (rows != at) Copy<W>(rows, static_cast<int64_t>(count_) * classes_, at, stream);
      }
    });
  }

 private:
  // The number of numbers of type R in a tile.
  static size_t Numbers(const Problem& problem) {
    const size_t capacity = CapacityFor(problem), volume = capacity * problem.classes;
    return (2 + problem.labels_per_class() + problem.has_distances()) * volume + capacity;
  }

  bool channels_last() const { return problem_.channels_last(); }

  // Reads an array with the layout of the logits into groups.
  void LoadPlane(const void* from, DType dtype, R* to) {
    WithType(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* base = static_cast<const T*>(from) + sample_ * problem_.voxels * classes_;
      if (channels_last()) {
        const T* source = base + begin_ * classes_;
        if constexpr (kTurnsInto<R, T>) {
          if (count_ % W == 0) return Transpose<R, W, true>(source, classes_, groups(), to);
        }
        const int64_t n = static_cast<int64_t>(count_) * classes_;
        Convert<W>(source, n, rows_);
        std::fill(rows_ + n, rows_ + static_cast<int64_t>(groups()) * W * classes_, R(0));
        Transpose<R, W, true>(rows_, classes_, groups(), to);
      } else {
        for (int group = 0; group < groups(); ++group) {
          const int width = std::min(W, count_ - group * W);  // voxels that exist
          for (int c = 0; c < classes_; ++c) {
            R* target = to + (static_cast<size_t>(group) * classes_ + c) * W;
            Convert<W>(base + c * problem_.voxels + begin_ + group * W, width, target);
            std::fill(target + width, target + W, R(0));
          }
        }
      }
    });
  }

  void LoadWeight() {
    if (problem_.voxel_weight) {
      WithType(problem_.weight_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        Convert<W>(static_cast<const T*>(problem_.voxel_weight) + sample_ * problem_.voxels + begin_, count_, weight_);
      });
    } else if (problem_.options.ignore_label.given || !ones_) {
      std::fill(weight_, weight_ + capacity_, R(1));
      ones_ = true;
    }
    if (count_ % W) {
      std::fill(weight_ + count_, weight_ + groups() * W, R(0));
      ones_ = false;
    }
  }

  int64_t LoadDenseLabels() {
    LoadPlane(problem_.labels, problem_.labels_dtype, labels_);
    if (problem_.labels_dtype == DType::kBool) return -1;
    const bool soft = problem_.labels_dtype >= DType::kHalf;
    if (soft ? AreAll(labels_, MayBeProbability) : AreAll(labels_, [](P t) { return t - t * t == R(0); })) return -1;
    return FindOther(labels_, [soft](R t) { return IsSoftLabel(t, soft); });
  }

  // Whether each of W numbers is in [0, 1]. It allows a little less slack than IsSoftLabel.
  static typename P::Mask MayBeProbability(P p) { return Abs(p - P(R(0.5))) < P(R(0.5009)); }

  // Whether `good` is true for all `numbers`, which have the layout of the groups. It is in most tiles, so this does
  // not look at the weights.
  template <class Good>
  bool AreAll(const R* numbers, const Good& good) const {
    typename P::Mask all = P(R(0)) == R(0);
    const R* const end = numbers + static_cast<size_t>(groups()) * classes_ * W;
    for (const R* at = numbers; at != end; at += W) all &= good(P::Load(at));
    bool result = true;
    for (int v = 0; v < W; ++v) result &= all[v] != 0;
    return result;
  }

  // Returns the first voxel that has a weight and one of whose `numbers` is not good, or -1. The numbers have the
  // layout of the groups.
  template <class Good>
  int64_t FindOther(const R* numbers, const Good& good) const {
    const auto in_group = [&](int group) { return numbers + static_cast<size_t>(group) * classes_ * W; };
    Int bad = 0;
    for (int group = 0; group < groups(); ++group) {
      for (int c = 0; c < classes_; ++c) {
        for (int v = 0; v < W; ++v) bad |= !good(in_group(group)[c * W + v]) & (weight(group)[v] != R(0));
      }
    }
    if (!bad) return -1;
    for (int v = 0;; ++v) {
      for (int c = 0; c < classes_; ++c) {
        if (weight_[v] != R(0) && !good(in_group(v / W)[c * W + v % W])) return begin_ + v;
      }
    }
  }

  int64_t LoadIndices() {
    std::fill(index_ + count_, index_ + groups() * W, Int(-1));
    return WithType(problem_.labels_dtype, [&](auto type) -> int64_t {
      using T = typename decltype(type)::type;
      using Wide =
          std::conditional_t<!std::is_integral_v<T>, double, std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;
      const auto fits = [](int64_t x) {
        return x >= std::numeric_limits<Wide>::lowest() && x <= std::numeric_limits<Wide>::max();
      };
      const Wide first = static_cast<Wide>(problem_.first_class());
      const Wide limit = static_cast<Wide>(problem_.label_limit());
      const bool has_ignore = problem_.options.ignore_label.given && fits(problem_.options.ignore_label.value);
      const Wide ignore = has_ignore ? static_cast<Wide>(problem_.options.ignore_label.value) : Wide(-1);
      const T* labels = static_cast<const T*>(problem_.labels) + sample_ * problem_.voxels + begin_;
      Int* const __restrict index = index_;
      const int count = count_;
      Int wrong = 0;
      for (int v = 0; v < count; ++v) {
        const Wide label = FromStorage<T, Wide>(labels[v]);
        const bool valid = IsClass(label, limit);
        const Int outside = -static_cast<Int>(!valid);
        index[v] = static_cast<Int>((valid ? label : first) - first) | outside;  // compilers can vectorise this form
        wrong |= outside;
      }
      const bool has_sets = problem_.has_label_sets();
      if (has_sets) {
        wrong = 0;
        for (int v = 0; v < count; ++v) {
          if (index[v] >= 0) index[v] = problem_.options.label_sets.IndexOf(static_cast<int>(index[v]), classes_);
          wrong |= index[v] < 0;
        }
      }
      const auto is_label = [&](int v, Wide label) { return has_sets ? index[v] >= 0 : IsClass(label, limit); };
      bool bad = wrong;
      if (has_ignore) {
        bad = false;
        for (int v = 0; v < count_; ++v) {
          const Wide label = FromStorage<T, Wide>(labels[v]);
          const bool ignored = label == ignore;
          weight_[v] = ignored ? R(0) : weight_[v];
          bad |= !ignored & !is_label(v, label);
        }
      }
      if (!bad) return -1;
      for (int v = 0;; ++v) {
        const Wide label = FromStorage<T, Wide>(labels[v]);
        if (!(has_ignore && label == ignore) && !is_label(v, label)) return begin_ + v;
      }
    });
  }

  // Turns the index of each voxel's label into one label value per class.
  void SpreadIndices() {
    const bool regions = problem_.has_regions();
    const ClassSets& sets = problem_.sets();
    for (int group = 0; group < groups(); ++group) {
      R* const to = labels_ + static_cast<size_t>(group) * classes_ * W;
      Int label[W], set[W], bits[W] = {};
      R unknown[W];  // what is written for the next class that the voxel may belong to
      for (int v = 0; v < W; ++v) {
        label[v] = index(group)[v];
        set[v] = regions && label[v] >= 0 ? sets.set_of[label[v]] : std::max<Int>(label[v] - classes_, 0);
        unknown[v] = R(kLowestOfSeveral);
      }
      for (int c = 0; c < classes_; ++c) {
        if (c % 32 == 0) {
          for (int v = 0; v < W; ++v) {
            bits[v] = c / 32 < sets.words ? static_cast<Int>(sets.bits[set[v] * sets.words + c / 32]) : 0;
          }
        }
        if (regions) {
          for (int v = 0; v < W; ++v) to[c * W + v] = static_cast<R>(bits[v] >> c % 32 & 1);
        } else if (problem_.has_label_sets()) {
          for (int v = 0; v < W; ++v) {
            const bool held = bits[v] >> c % 32 & 1;
            to[c * W + v] = held ? unknown[v] : static_cast<R>(label[v] == c);
            unknown[v] = held ? R(kOneOfSeveral) : unknown[v];
          }
        } else {
          for (int v = 0; v < W; ++v) to[c * W + v] = static_cast<R>(label[v] == c);
        }
      }
    }
  }

  // Writes the row of the matrix that belongs to each voxel's label. A voxel without a label gets any row.
  void LookUpDistances() {
    for (int group = 0; group < groups(); ++group) {
      R* const to = distances_ + static_cast<size_t>(group) * classes_ * W;
      const float* rows[W];
      for (int v = 0; v < W; ++v) {
        rows[v] = problem_.options.dist_matrix.values.data() + std::max<Int>(index(group)[v], 0) * classes_;
      }
      for (int c = 0; c < classes_; ++c) {
        for (int v = 0; v < W; ++v) to[c * W + v] = static_cast<R>(rows[v][c]);
      }
    }
  }

  const Problem& problem_;
  const int classes_, logit_size_, capacity_;
  int64_t sample_ = 0, begin_ = 0;
  int count_ = 0;
  bool ones_ = false;  // all numbers in weight_ are 1
  R* logits_;          // [group][C][W]; later the gradients
  R* rows_;            // scratch between memory and groups: [voxel][C], or the voxels of a class
  R* labels_;          // [group][C][W], if there is a label per class
  R* distances_;       // [group][C][W], if there are distances
  R* weight_;          // [voxel]
  Int* index_;         // [voxel] the class, or a set behind the classes (see LabelSets), or -1
  int* numbers_;
};

}  // namespace
}  // namespace dice_op

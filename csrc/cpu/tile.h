// A tile: some hundred voxels of one sample in the first-level cache, turned into the form the
// arithmetic wants, whatever their type and layout in memory. Groups of W voxels; in a group, one
// register per class. Unnamed namespace: see core/voxel.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "cpu/pack.h"

namespace dice_op {
namespace {

template <class T, class R>
void Convert(const T* from, int64_t n, R* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<R, float>) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < n; ++i) to[i] = FromStorage<T, R>(from[i]);
}

template <class R, class T>
void ConvertBack(const R* from, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, Half>) {
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
  }
  for (; i < n; ++i) to[i] = ToStorage<T>(from[i]);
}

// Four rows of four become four columns.
template <class R>
DICE_OP_INLINE void Transpose4(const R* const from[4], R* const to[4]) {
  using P = Pack<R, 4>;
  const P a = P::Load(from[0]), b = P::Load(from[1]), c = P::Load(from[2]), d = P::Load(from[3]);
  const P ab_low = Shuffle<0, 4, 1, 5>(a, b), ab_high = Shuffle<2, 6, 3, 7>(a, b);
  const P cd_low = Shuffle<0, 4, 1, 5>(c, d), cd_high = Shuffle<2, 6, 3, 7>(c, d);
  Shuffle<0, 1, 4, 5>(ab_low, cd_low).Store(to[0]);
  Shuffle<2, 3, 6, 7>(ab_low, cd_low).Store(to[1]);
  Shuffle<0, 1, 4, 5>(ab_high, cd_high).Store(to[2]);
  Shuffle<2, 3, 6, 7>(ab_high, cd_high).Store(to[3]);
}

// Between [W, C] in memory and [C, W] in a group: whole 4 x 4 squares, then what is left.
template <int W, bool kToGroup, class R>
DICE_OP_INLINE void TransposeGroup(const R* from, int classes, R* to) {
  const auto rows = [&](auto* base, int v, int c) { return base + v * classes + c; };
  const auto group = [&](auto* base, int v, int c) { return base + c * W + v; };
  int c = 0;
  if constexpr (W >= 4) {
    for (; c + 4 <= classes; c += 4) {
      for (int v = 0; v < W; v += 4) {
        const R* source[4];
        R* target[4];
        for (int i = 0; i < 4; ++i) {
          source[i] = kToGroup ? rows(from, v + i, c) : group(from, v, c + i);
          target[i] = kToGroup ? group(to, v, c + i) : rows(to, v + i, c);
        }
        Transpose4(source, target);
      }
    }
  }
  for (; c < classes; ++c) {
    for (int v = 0; v < W; ++v) {
      if constexpr (kToGroup) {
        *group(to, v, c) = *rows(from, v, c);
      } else {
        *rows(to, v, c) = *group(from, v, c);
      }
    }
  }
}

template <int W, bool kToGroup, class R>
void TransposeGroups(const R* from, int classes, int groups, R* to) {
  const auto all = [&](int count) {
    for (int g = 0; g < groups; ++g) {
      TransposeGroup<W, kToGroup>(from + g * W * count, count, to + g * W * count);
    }
  };
  switch (classes) {  // known counts unroll
    case 1:
      std::memcpy(to, from, sizeof(R) * groups * W);
      return;
    case 2:
      return all(std::integral_constant<int, 2>{});
    case 3:
      return all(std::integral_constant<int, 3>{});
    case 4:
      return all(std::integral_constant<int, 4>{});
    case 5:
      return all(std::integral_constant<int, 5>{});
    default:
      return all(classes);
  }
}

template <class R, int W>
class Tile {
 public:
  using Int = typename IntFor<R>::type;

  // Scratch memory for one thread's blocks.
  explicit Tile(const Problem& problem)
      : problem_(problem),
        classes_(static_cast<int>(problem.classes)),
        // logits and dense labels together fill about half of a 32 KB cache
        capacity_(std::max<int>(W, std::min<int>(512, 2048 / std::max(1, classes_)) / W * W)) {
    const size_t volume = static_cast<size_t>(capacity_) * classes_;
    const size_t numbers = (problem.labels_per_class() ? 3 : 2) * volume + capacity_;
    memory_.reset(new char[numbers * sizeof(R) + capacity_ * sizeof(Int) + kAlign]);
    void* at = memory_.get();
    size_t space = numbers * sizeof(R) + capacity_ * sizeof(Int) + kAlign;
    std::align(kAlign, space - kAlign, at, space);
    logits_ = static_cast<R*>(at);
    rows_ = logits_ + volume;
    labels_ = rows_ + volume;
    weight_ = labels_ + (problem.labels_per_class() ? volume : 0);
    index_ = reinterpret_cast<Int*>(weight_ + capacity_);
  }

  int capacity() const { return capacity_; }
  int groups() const { return (count_ + W - 1) / W; }
  R* logits(int group) { return logits_ + static_cast<size_t>(group) * classes_ * W; }
  const R* labels(int group) const { return labels_ + static_cast<size_t>(group) * classes_ * W; }
  const R* weight(int group) const { return weight_ + group * W; }
  const Int* index(int group) const { return index_ + group * W; }

  // Reads voxels [begin, begin + count) of a sample. The last group is filled up with voxels of
  // weight 0. Returns the first voxel with a label that is no class, or -1.
  int64_t Load(int64_t sample, int64_t begin, int count) {
    sample_ = sample;
    begin_ = begin;
    count_ = count;
    LoadPlane(problem_.logits, problem_.logits_dtype, logits_);
    LoadWeight();
    if (problem_.dense_labels) return LoadDenseLabels();
    const int64_t bad = LoadIndices();
    if (problem_.labels_per_class()) SpreadIndices();
    return bad;
  }

  // Writes what stands in logits() to an array of the logits' type and layout.
  void Store(void* to) {
    WithType(problem_.logits_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      // half and bfloat16 are computed in float, double in double
      if constexpr (std::is_same_v<T, R> || (!std::is_arithmetic_v<T> && std::is_same_v<R, float>)) {
        T* base = static_cast<T*>(to) + sample_ * problem_.voxels * classes_;
        if (channels_last()) {
          const bool direct = std::is_same_v<T, R> && count_ % W == 0;
          R* rows = direct ? reinterpret_cast<R*>(base + begin_ * classes_) : rows_;
          TransposeGroups<W, false>(logits_, classes_, groups(), rows);
          if (!direct) ConvertBack(rows, static_cast<int64_t>(count_) * classes_, base + begin_ * classes_);
        } else {
          ForEachRun([&](int group, int c, int width) {
            ConvertBack(logits(group) + c * W, width, base + c * problem_.voxels + begin_ + group * W);
          });
        }
      }
    });
  }

 private:
  static constexpr size_t kAlign = 64;

  bool channels_last() const { return problem_.options.data_format == DataFormat::kChannelsLast; }

  // fn(group, class, voxels of the group that exist)
  template <class Fn>
  void ForEachRun(Fn&& fn) {
    for (int group = 0; group < groups(); ++group) {
      const int width = std::min(W, count_ - group * W);
      for (int c = 0; c < classes_; ++c) fn(group, c, width);
    }
  }

  // Brings an array laid out as the logits into groups.
  void LoadPlane(const void* from, DType dtype, R* to) {
    WithType(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* base = static_cast<const T*>(from) + sample_ * problem_.voxels * classes_;
      if (channels_last()) {
        const int64_t n = static_cast<int64_t>(count_) * classes_;
        const T* source = base + begin_ * classes_;
        const R* rows = rows_;
        if (std::is_same_v<T, R> && count_ % W == 0) {
          rows = reinterpret_cast<const R*>(source);
        } else {
          Convert(source, n, rows_);
          std::fill(rows_ + n, rows_ + static_cast<int64_t>(groups()) * W * classes_, R(0));
        }
        TransposeGroups<W, true>(rows, classes_, groups(), to);
      } else {
        ForEachRun([&](int group, int c, int width) {
          R* target = to + (static_cast<size_t>(group) * classes_ + c) * W;
          Convert(base + c * problem_.voxels + begin_ + group * W, width, target);
          std::fill(target + width, target + W, R(0));
        });
      }
    });
  }

  void LoadWeight() {
    std::fill(weight_, weight_ + count_, R(1));
    std::fill(weight_ + count_, weight_ + groups() * W, R(0));
    if (!problem_.voxel_weight) return;
    WithType(problem_.weight_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      Convert(static_cast<const T*>(problem_.voxel_weight) + sample_ * problem_.voxels + begin_, count_, weight_);
    });
  }

  int64_t LoadDenseLabels() {
    LoadPlane(problem_.labels, problem_.labels_dtype, labels_);
    if (problem_.labels_dtype == DType::kBool) return -1;
    const bool soft = problem_.labels_dtype >= DType::kHalf;
    Int bad = 0;
    for (int group = 0; group < groups(); ++group) {
      for (int c = 0; c < classes_; ++c) {
        for (int v = 0; v < W; ++v) bad |= !IsSoftLabel(labels(group)[c * W + v], soft) & (weight(group)[v] != R(0));
      }
    }
    if (!bad) return -1;
    for (int v = 0;; ++v) {
      for (int c = 0; c < classes_; ++c) {
        if (weight_[v] != R(0) && !IsSoftLabel(labels(v / W)[c * W + v % W], soft)) return begin_ + v;
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
      const bool has_ignore = problem_.options.has_ignore_label && fits(problem_.options.ignore_label);
      const Wide ignore = has_ignore ? static_cast<Wide>(problem_.options.ignore_label) : Wide(-1);
      const T* labels = static_cast<const T*>(problem_.labels) + sample_ * problem_.voxels + begin_;
      bool bad = false;
      for (int v = 0; v < count_; ++v) {
        const Wide label = FromStorage<T, Wide>(labels[v]);
        const bool valid = IsClass(label, limit);
        index_[v] = valid ? static_cast<Int>(label - first) : Int(-1);
        bad |= !valid;
      }
      if (has_ignore) {
        bad = false;
        for (int v = 0; v < count_; ++v) {
          const Wide label = FromStorage<T, Wide>(labels[v]);
          const bool ignored = label == ignore;
          weight_[v] = ignored ? R(0) : weight_[v];
          bad |= !ignored & !IsClass(label, limit);
        }
      }
      if (!bad) return -1;
      for (int v = 0;; ++v) {
        const Wide label = FromStorage<T, Wide>(labels[v]);
        if (!(has_ignore && label == ignore) && !IsClass(label, limit)) return begin_ + v;
      }
    });
  }

  // From the index of a voxel's label to a label for each class.
  void SpreadIndices() {
    const uint32_t* const regions = problem_.options.region_labels ? problem_.options.regions : nullptr;
    for (int group = 0; group < groups(); ++group) {
      R* const to = labels_ + static_cast<size_t>(group) * classes_ * W;
      for (int v = 0; v < W; ++v) {
        const Int label = index(group)[v];
        for (int c = 0; c < classes_; ++c) {
          to[c * W + v] = static_cast<R>(regions ? label >= 0 && (regions[label] >> c & 1) : label == c);
        }
      }
    }
  }

  const Problem& problem_;
  const int classes_, capacity_;
  int64_t sample_ = 0, begin_ = 0;
  int count_ = 0;
  std::unique_ptr<char[]> memory_;
  R* logits_;   // [group][C][W]; gradients on the way out
  R* rows_;     // [voxel][C], between memory and groups
  R* labels_;   // [group][C][W], where there is a label per class
  R* weight_;   // [voxel]
  Int* index_;  // [voxel] class, or -1
};

}  // namespace
}  // namespace dice_op

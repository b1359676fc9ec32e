// Counts the voxels of two label maps for hard scores.
#include <algorithm>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/dice_op.h"
#include "core/dtype.h"
#include "core/problem.h"

namespace dice_op {
namespace cpu {
namespace {

constexpr int64_t kBlock = 1 << 20;  // voxels per task
constexpr int64_t kChunk = 1024;     // voxels converted at a time
constexpr int32_t kIgnored = -1, kBad = -2;

// Writes the classes of `count` values of `map` to `labels`. In the map of the labels, the ignore_label becomes
// kIgnored, and a value of label_sets becomes its class, or its set behind the classes. Any other value that is not a
// class becomes kBad.
void ReadLabels(const Problem& problem, const void* map, DType dtype, int64_t first, int64_t count, bool are_labels,
                int32_t* labels) {
  const bool ignores = are_labels && problem.options.ignore_label.given;
  const bool has_sets = are_labels && problem.has_label_sets();
  const int classes = static_cast<int>(problem.classes);
  const int64_t end = !are_labels && problem.has_label_sets() ? classes : problem.label_limit();
  WithType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Wide = std::conditional_t<std::is_integral_v<T>, int64_t, double>;
    const T* const from = static_cast<const T*>(map) + first;
    const Wide limit = static_cast<Wide>(end);
    const Wide ignored = static_cast<Wide>(problem.options.ignore_label.value);
    for (int64_t i = 0; i < count; ++i) {
      const Wide label = FromStorage<T, Wide>(from[i]);
      labels[i] = ignores && label == ignored ? kIgnored : IsClass(label, limit) ? static_cast<int32_t>(label) : kBad;
      if (has_sets && labels[i] >= 0) {
        labels[i] = problem.options.label_sets.IndexOf(labels[i], classes);
        if (labels[i] < 0) labels[i] = kBad;
      }
    }
  });
}

// Whether the label is a set of several classes, and c is one of them.
bool MayBelongTo(const Problem& problem, int32_t label, int64_t c) {
  return problem.has_label_sets() && label >= problem.classes &&
         problem.sets().Holds(label - static_cast<int>(problem.classes), static_cast<int>(c));
}

bool BelongsTo(const Problem& problem, int32_t label, int64_t c) {
  return problem.has_regions() ? problem.sets().Holds(problem.sets().set_of[label], static_cast<int>(c))
                               : label == c + problem.first_class();
}

// Calls fn(c) for every class c that the label belongs to.
template <class Fn>
void ForEachClass(const Problem& problem, int32_t label, const Fn& fn) {
  if (problem.has_regions()) {
    for (int64_t c = 0; c < problem.classes; ++c) {
      if (BelongsTo(problem, label, c)) fn(c);
    }
  } else if (label >= problem.first_class() && label < problem.first_class() + problem.classes) {
    fn(label - problem.first_class());
  }
}

// Keeps the bad value that comes first in the volume, whichever task finds it.
void KeepFirst(BadValue* first, const BadValue& other) {
  const auto key = [](const BadValue& bad) { return std::make_pair(bad.sample, bad.voxel); };
  if (other.sample >= 0 && (first->sample < 0 || key(other) < key(*first))) *first = other;
}

}  // namespace

Error CountLabels(const Problem& problem, const void* prediction, DType prediction_dtype, const Counts& counts,
                  const ParallelFor& parallel) {
  const int64_t blocks = (problem.voxels + kBlock - 1) / kBlock, classes = problem.classes;
  int64_t* const totals[] = {counts.intersection, counts.pred_sum, counts.label_sum};
  for (int64_t* total : totals) std::fill_n(total, problem.batch * classes, 0);
  BadValue bad_label, bad_prediction;
  std::mutex mutex;

  parallel.ForRanges(problem.batch * blocks, kBlock, [&](int64_t first, int64_t last) {
    std::vector<int64_t> sums(3 * classes);  // of one block
    int32_t predictions[kChunk], labels[kChunk];
    for (int64_t block = first; block < last; ++block) {
      const int64_t sample = block / blocks, begin = block % blocks * kBlock;
      const int64_t end = std::min(begin + kBlock, problem.voxels);
      std::fill(sums.begin(), sums.end(), 0);
      BadValue bad_p, bad_t;
      // Neighbours are mostly equal, so runs of equal voxels are counted at once.
      int32_t p = kIgnored, t = kIgnored;
      int64_t begin_of_run = begin;
      const auto end_run = [&](int64_t at) {
        const int64_t length = at - begin_of_run;
        if (t == kBad) KeepFirst(&bad_t, {sample, begin_of_run});
        if (p == kBad && t != kIgnored) KeepFirst(&bad_p, {sample, begin_of_run});
        if (p < 0 || t < 0) return;
        ForEachClass(problem, p, [&](int64_t c) {
          if (MayBelongTo(problem, t, c)) return;
          sums[classes + c] += length;
          if (BelongsTo(problem, t, c)) sums[c] += length;
        });
        ForEachClass(problem, t, [&](int64_t c) { sums[2 * classes + c] += length; });
      };
      for (int64_t at = begin; at < end; at += kChunk) {
        const int64_t count = std::min(kChunk, end - at), from = sample * problem.voxels + at;
        ReadLabels(problem, prediction, prediction_dtype, from, count, false, predictions);
        ReadLabels(problem, problem.labels, problem.labels_dtype, from, count, true, labels);
        for (int64_t i = 0; i < count; ++i) {
          if (predictions[i] == p && labels[i] == t) continue;
          end_run(at + i);
          p = predictions[i], t = labels[i], begin_of_run = at + i;
        }
      }
      end_run(end);
      const std::lock_guard<std::mutex> lock(mutex);
      KeepFirst(&bad_label, bad_t);
      KeepFirst(&bad_prediction, bad_p);
      for (int which = 0; which < 3; ++which) {
        for (int64_t c = 0; c < classes; ++c) totals[which][sample * classes + c] += sums[which * classes + c];
      }
    }
  });
  DICE_OP_RETURN_IF_ERROR(ErrorOf(bad_label, problem));
  return ErrorOfPrediction(bad_prediction, problem, prediction, prediction_dtype);
}

}  // namespace cpu
}  // namespace dice_op

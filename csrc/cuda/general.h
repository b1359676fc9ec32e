// Reads voxels of every type and layout, with every kind of label, weight and option, all known only at run time.
#pragma once

#include "cuda/voxel_access.h"

namespace dice_op {
namespace {

// There are at most kItems * kLanes classes. With kDense there is one label value per class, either read from memory or
// computed from an index.
template <class R, bool kDense, int kItems_, int kLanes_>
class General {
 public:
  using Number = R;
  using Parameter = GeneralCall;
  using Storage = R;
  using Classes = StridedClasses<kItems_, kLanes_>;
  using Label = std::conditional_t<kDense, DenseLabel<R, true, float>, SingleLabel<R>>;
  static constexpr int kItems = kItems_, kLanes = kLanes_, kTogether = 1;
  static constexpr bool kSingle = !kDense, kWeighted = true, kTables = kDense;
  static constexpr int kRegisters = sizeof(R) == 8 ? 255 : kDense && kItems > 4 ? 168 : 128;
  static constexpr int kGroups = kWarp / kLanes;
  static constexpr int kRounds = kGroups == 1 ? 4 : kGroups < 8 ? 8 / kGroups : 1;
  static constexpr int kTile = kGroups * kRounds;
  // Rows of an odd number of elements start at different banks.
  DICE_OP_INLINE static constexpr int Pitch(int classes) { return classes | 1; }
  // Labels in memory, one for each class, take as much once more.
  static constexpr int Bytes(int classes, int) { return kTile * Pitch(classes) * static_cast<int>(sizeof(R)); }

  DICE_OP_DEVICE General(const GeneralCall& call, int64_t sample, char* memory)
      : call_(call),
        offset_(sample * call.voxels * call.classes),
        voxel_offset_(sample * call.voxels),
        tile_(reinterpret_cast<R*>(memory)),
        label_tile_(tile_ + kTile * Pitch(call.classes)),
        first_voxel_(call.planar ? Lane() % kTile : Lane() * call.row_magic >> 20),
        first_class_(call.planar ? Lane() / kTile : Lane() - first_voxel_ * call.classes),
        voxel_step_(call.planar ? 0 : kWarp * call.row_magic >> 20),
        class_step_(call.planar ? kWarp / kTile : kWarp - voxel_step_ * call.classes) {}
  DICE_OP_DEVICE bool bad() const { return bad_; }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int first, int step, Voxel&& voxel, Done&& done) {
    for (int t = first; t < call_.tiles; t += step) {
      const int tile = kStore ? call_.tiles - 1 - t : t;
      const int64_t begin = tile * static_cast<int64_t>(kTile);
      const int count = tile == call_.tiles - 1 ? call_.last_voxels : kTile;
      __syncwarp();  // no lane is at the tile before any more
      FetchLogits(begin, count);
      if (kDense && call_.dense_labels) FetchLabels(begin, count);
      __syncwarp();
#pragma unroll 1
      for (int r = 0; r < kRounds; ++r) {
        const int v = r * kGroups + Lane() / kLanes;
        const bool there = v < count;
        R m = R(0);
        int index = -1;
        if (there) m = ReadVoxel(voxel_offset_ + begin + v, &index);
        R* row = tile_ + v * Pitch(call_.classes);
        R z[kItems], labels[kDense ? kItems : 1];
#pragma unroll
        for (int i = 0; i < kItems; ++i) z[i] = HasClass(i) ? row[Classes::Class(i)] : R(-INFINITY);
        const Label label = LabelOf(v, index, m, labels);
        auto terms = call_.terms.template To<R>();
        if (call_.has_gammas) terms.gammas = call_.focal_gammas.values;
        terms.masked |= count < kTile;
        voxel(Classes{}, z, label, m, terms);
        if constexpr (kStore) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (HasClass(i)) row[Classes::Class(i)] = z[i];
          }
        }
      }
      if constexpr (kStore) {
        __syncwarp();
        Put(begin, count);
      }
      done(kRounds, t + step >= call_.tiles);
    }
  }

 private:
  DICE_OP_DEVICE bool HasClass(int i) const { return Classes::Class(i) < call_.classes; }

  // Calls fn(index in the tile, index in the sample) for this lane's share of a tile, in the order of memory.
  template <int kUnroll, class Fn>
  DICE_OP_DEVICE void ForEachElement(int64_t begin, int count, Fn&& fn) const {
    const int classes = call_.classes, pitch = Pitch(classes);
    const int64_t step = call_.planar ? class_step_ * call_.voxels : kWarp;
    int64_t at = call_.planar ? first_class_ * call_.voxels + begin + first_voxel_ : begin * classes + Lane();
    int v = first_voxel_, c = first_class_;
#pragma unroll kUnroll
    while (v < count && c < classes) {
      fn(v * pitch + c, at);
      at += step;
      v += voxel_step_;
      c += class_step_;
      if (c >= classes && !call_.planar) {
        c -= classes;
        ++v;
      }
    }
  }
  // Half and bfloat16 are computed in float, and double in double. Weighted counts may need double for every type, see
  // Problem::in_double.
  DICE_OP_DEVICE void FetchLogits(int64_t begin, int count) const {
    const auto fetch = [&](auto type, auto read) {
      const auto* const sample = static_cast<const decltype(type)*>(call_.logits) + offset_;
      ForEachElement<2>(begin, count, [&](int to, int64_t at) { tile_[to] = read(sample[at]); });
    };
    const bool half = call_.logits_dtype == DType::kHalf;
    if (std::is_same_v<R, double> && call_.logits_dtype == DType::kDouble) {
      fetch(R{}, [](R value) { return value; });
    } else if (call_.logits_dtype == DType::kFloat) {
      fetch(0.0f, [](float value) { return static_cast<R>(value); });
    } else {
      fetch(uint16_t{}, [&](uint16_t bits) { return half ? Read<R>(Half{bits}) : Read<R>(BFloat16{bits}); });
    }
  }
  DICE_OP_DEVICE void Put(int64_t begin, int count) const {
    const auto put = [&](auto type, auto write) {
      auto* const sample = static_cast<decltype(type)*>(call_.d_logits) + offset_;
      ForEachElement<2>(begin, count, [&](int from, int64_t at) { sample[at] = write(tile_[from]); });
    };
    const bool half = call_.logits_dtype == DType::kHalf;
    if (std::is_same_v<R, double> || call_.logits_dtype == DType::kFloat) {
      put(R{}, [](R value) { return value; });
    } else {
      put(uint16_t{}, [&](R value) { return half ? Write<Half>(value).bits : Write<BFloat16>(value).bits; });
    }
  }
  // The types that one-hot encoders return have their own loop. The other loop checks the type for each element.
  DICE_OP_DEVICE void FetchLabels(int64_t begin, int count) const {
    const auto fetch = [&](auto type) {
      const auto* const sample = static_cast<const decltype(type)*>(call_.labels) + offset_;
      ForEachElement<2>(begin, count, [&](int to, int64_t at) { label_tile_[to] = static_cast<R>(sample[at]); });
    };
    if (call_.labels_dtype == DType::kFloat) {
      fetch(0.0f);
    } else if (call_.labels_dtype <= DType::kUint8) {
      fetch(uint8_t{});
    } else {
      ForEachElement<1>(begin, count, [&](int to, int64_t at) {
        label_tile_[to] = ReadNumber<R>(call_.labels, call_.labels_dtype, offset_ + at);
      });
    }
  }
  // Returns the weight of the voxel, and sets `index` to its class, or to a set behind the classes (see LabelSets).
  // Without either `index` stays the same.
  DICE_OP_DEVICE R ReadVoxel(int64_t at, int* index) {
    R m = R(1);
    if (call_.weight) m = ReadNumber<R>(call_.weight, call_.weight_dtype, at);
    if (!kDense || !call_.dense_labels) {
      const auto take = [&](auto label) {
        using Wide = decltype(label);
        if (call_.ignore_label.given && label == static_cast<Wide>(call_.ignore_label.value)) {
          m = R(0);
        } else if (IsClass(label, static_cast<Wide>(call_.label_limit))) {
          int found = static_cast<int>(label) - call_.first_class;
          if (kDense && call_.has_label_sets) {
            found = call_.sets.IndexOf(found, call_.classes);
            bad_ |= found < 0;
          }
          if (m != R(0)) *index = found;
        } else {
          bad_ = true;
        }
      };
      if (call_.labels_dtype <= DType::kInt64) {
        take(ReadNumber<int64_t>(call_.labels, call_.labels_dtype, at));
      } else {
        take(ReadNumber<double>(call_.labels, call_.labels_dtype, at));
      }
    }
    return m;
  }
  // Returns the lowest class in a set.
  DICE_OP_DEVICE int Lowest(int set) const {
    int c = 0;
    while (c < call_.sets.classes && !call_.sets.Holds(set, c)) ++c;
    return c;
  }
  // v: the voxel in the tile; index: from ReadVoxel. A voxel of weight 0 has no label.
  DICE_OP_DEVICE Label LabelOf(int v, int index, R m, R* labels) {
    if constexpr (kDense) {
      if (call_.dense_labels) {
        const bool soft = call_.labels_dtype >= DType::kHalf;
        const R* row = label_tile_ + v * Pitch(call_.classes);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          labels[i] = HasClass(i) && m != R(0) ? row[Classes::Class(i)] : R(0);
          bad_ |= !IsSoftLabel(labels[i], soft);
        }
      } else {
        const int set = index < 0                ? 0
                        : call_.has_regions      ? call_.sets.set_of[index]
                        : index >= call_.classes ? index - call_.classes
                                                 : 0;
        const int lowest = call_.has_label_sets ? Lowest(set) : 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = Classes::Class(i);
          const bool held = set > 0 && call_.sets.Holds(set, c);
          if (call_.has_regions) {
            labels[i] = held ? R(1) : R(0);
          } else {
            labels[i] = held ? R(c == lowest ? kLowestOfSeveral : kOneOfSeveral) : index == c ? R(1) : R(0);
          }
        }
      }
      return {labels, call_.distances + max(index, 0) * call_.classes, call_.classes};
    } else {
      const bool held = index >= 0 && index % kLanes == Lane() % kLanes;
      return {index, held ? index / kLanes : -1, held ? tile_[v * Pitch(call_.classes) + index] : R(0)};
    }
  }

  const GeneralCall& call_;
  const int64_t offset_, voxel_offset_;
  R* const tile_;        // [kTile] rows, channels last
  R* const label_tile_;  // the same for dense labels; not there otherwise
  // The first element of a tile that this lane handles, and the step from each to the next.
  const int first_voxel_, first_class_, voxel_step_, class_step_;
  bool bad_ = false;
};

}  // namespace
}  // namespace dice_op

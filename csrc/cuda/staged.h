// Reads voxels by way of shared memory, each by several lanes of a warp, or any number of classes by one. Tiles are
// copied there while the warp computes.
#pragma once

#include "cuda/voxel_access.h"

namespace dice_op {
namespace {

// There are more than kLanes * kAlwaysHeld classes, and at most kLanes * kItems. With kMasked voxels may have weights
// in float, and a label may be ignored.
template <class T, int kItems_, int kLanes_, int kAlwaysHeld, bool kMasked = false>
class Staged {
 public:
  using Number = float;
  using Parameter = Call;  // of the kernels
  using Storage = T;
  static constexpr int kItems = kItems_, kLanes = kLanes_;
  static constexpr bool kPlanar = false;
  // The classes in 32 bits of memory are held by the same thread, which reads them together if rows are aligned.
  static constexpr int kTogether = 4 / sizeof(T);
  using Classes = StridedClassesIfThere<kItems, kLanes, kTogether>;
  static constexpr bool kSingle = true, kWeighted = kMasked, kTables = false;
  using Label = SingleLabel<float>;
  static constexpr int kGroups = kWarp / kLanes;  // voxels at a time
  static constexpr int kRounds = kLanes == 1 ? 1 : (kLanes < 8 ? 4 : 8) / static_cast<int>(sizeof(T));
  static constexpr int kTile = kGroups * kRounds;  // voxels; a multiple of 16 bytes with any number of classes
  static constexpr int kRegisters = kItems > 8 ? 128 : 96;
  static constexpr int StageBytes(int classes, int padding) {
    return kTile * (classes * static_cast<int>(sizeof(T)) + padding);
  }
  static constexpr int Bytes(int classes, int padding) { return 2 * StageBytes(classes, padding); }
  static_assert(kTile * sizeof(T) % 16 == 0 && kTile <= kWarp);

  DICE_OP_DEVICE Staged(const Call& call, int64_t sample, char* memory)
      : call_(call),
        offset_(sample * call.voxels * call.classes * static_cast<int>(sizeof(T))),
        voxel_offset_(sample * call.voxels),
        memory_(memory),
        is_half_(call.logits_dtype == DType::kHalf),
        row_bytes_(call.classes * static_cast<int>(sizeof(T)) + call.row_padding),
        tile_bytes_(kTile * call.classes * static_cast<int>(sizeof(T))),
        first_word_(Lane() * 16 + Lane() / call.row_words * call.row_padding),
        word_step_(kWarp * 16 + kWarp / call.row_words * call.row_padding) {}
  DICE_OP_DEVICE bool bad() const { return largest_ >= static_cast<uint32_t>(call_.label_limit); }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int first, int step, Voxel&& voxel, Done&& done) {
    // Where the last tile has no voxel, there must be no NaN.
#pragma unroll 1
    for (int w = Lane(); w < 2 * kTile * row_bytes_ / 16; w += kWarp) {
      reinterpret_cast<Word*>(memory_)[w] = Word{};
    }
    __syncwarp();
    // Tiles are visited in steps of this many bytes of logits and voxels of labels.
    const int64_t begin = kStore ? call_.tiles - 1 - first : first, stride = kStore ? -step : step;
    const int64_t bytes = stride * tile_bytes_;
    const char* from = static_cast<const char*>(call_.logits) + offset_ + begin * tile_bytes_;
    char* to = static_cast<char*>(call_.d_logits) + offset_ + begin * tile_bytes_;
    int64_t labels_at = voxel_offset_ + begin * kTile + Lane();
    const int last = kStore ? 0 : call_.tiles - 1;  // the turn of the tile that may not be full
    uint32_t place, next_place = kNoPlace;
    float weight, next_weight = 0;
    int count, next_count = 0, stage = 1;
    // The first round only fills the pipeline.
#pragma unroll 1
    for (int t = first - step; t < call_.tiles; t += step) {
      WaitForCopies<0>();
      __syncwarp();  // all lanes' copies are there, and no lane is at the stage before
      place = next_place;
      weight = next_weight;
      count = next_count;
      if (t + step < call_.tiles) {
        next_count = t + step == last ? call_.last_voxels : kTile;
        Fetch(from, next_count, 1 - stage);
        next_place = FetchPlace(labels_at, next_count, &next_weight);
        from += bytes;
        labels_at += stride * kTile;
      }
      EndCopies();
      if (t >= first) {
        Compute<kStore>(stage, count, place, weight, voxel);
        if constexpr (kStore) {
          __syncwarp();  // the whole tile is computed
          Put(to, count, stage);
          to += bytes;
        }
        done(kRounds, t + step >= call_.tiles);
      }
      stage = 1 - stage;
    }
  }

 private:
  static constexpr int kPerWord = 16 / sizeof(T);
  DICE_OP_DEVICE char* Stage(int stage) const { return memory_ + stage * kTile * row_bytes_; }

  // Calls fn(offset, word) for this lane's words of a tile: their offsets in the tile in memory, and their places in
  // the stage. Then calls rest(element) for the elements after the last whole word.
  template <class Fn, class Rest>
  DICE_OP_DEVICE void ForEachWord(int voxels, int stage, Fn&& fn, Rest&& rest) const {
    const int bytes = voxels == kTile ? tile_bytes_ : voxels * call_.classes * static_cast<int>(sizeof(T));
    char* word = Stage(stage) + first_word_;
#pragma unroll 2
    for (int at = Lane() * 16; at <= bytes - 16; at += kWarp * 16) {
      fn(at, word);
      word += word_step_;
    }
    // Only rows of whole words are padded, and then no elements are left.
#pragma unroll 1
    for (int e = bytes / 16 * kPerWord + Lane(); e < bytes / static_cast<int>(sizeof(T)); e += kWarp) rest(e);
  }

  DICE_OP_DEVICE void Fetch(const char* from, int voxels, int stage) {
    ForEachWord(
        voxels, stage, [&](int at, char* word) { CopyWord(word, from + at); },
        [&](int e) { reinterpret_cast<T*>(Stage(stage))[e] = reinterpret_cast<const T*>(from)[e]; });
  }
  DICE_OP_DEVICE void Put(char* to, int voxels, int stage) {
    ForEachWord(
        voxels, stage,
        [&](int at, const char* word) {
          StoreStreaming(reinterpret_cast<Word*>(to + at), *reinterpret_cast<const Word*>(word));
        },
        [&](int e) { reinterpret_cast<T*>(to)[e] = reinterpret_cast<const T*>(Stage(stage))[e]; });
  }
  // Lane l reads the label of voxel l of the tile, if there is one. Returns the class, the thread that holds it, and
  // its place among the classes of that thread. A voxel without weight, or whose label is no class, belongs to no
  // thread.
  DICE_OP_DEVICE uint32_t FetchPlace(int64_t at, int voxels, float* weight) {
    *weight = 0;
    if (Lane() >= voxels) return kNoPlace;
    const uint32_t label = ReadLabel(call_, at);
    if constexpr (kMasked) {
      const bool ignored = call_.has_ignored && label == call_.ignored;
      *weight = ignored ? 0.0f : call_.weight ? static_cast<const float*>(call_.weight)[at] : 1.0f;
      if (ignored) return kNoPlace;
    }
    largest_ = largest_ < label ? label : largest_;
    if (label >= static_cast<uint32_t>(call_.classes) || (kMasked && *weight == 0)) return kNoPlace;
    return label | Classes::Item(label) << 8 | Classes::LaneOf(label) << 16;
  }
  static constexpr uint32_t kNoPlace = 0xffff0000u;

  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void Compute(int stage, int count, uint32_t place_of_lane, float weight_of_lane, Voxel&& voxel) {
    const bool aligned = kTogether == 1 || row_bytes_ % 4 == 0;
    int v = Lane() / kLanes;
    char* row = Stage(stage) + v * row_bytes_;
#pragma unroll 1
    for (int r = 0; r < kRounds; ++r, v += kGroups, row += kGroups * row_bytes_) {
      const bool there = v < count;  // else the row holds an old voxel or zeros
      float z[kItems];
      float top = ReadRow(row, aligned, z);
      const uint32_t place = kLanes == 1 ? place_of_lane : __shfl_sync(0xffffffffu, place_of_lane, v);
      const bool held = place >> 16 == static_cast<uint32_t>(Lane() % kLanes);
      const int index = place & 0xff, item = place >> 8 & 0xff;
      const T* const logit =
          reinterpret_cast<const T*>(row) + (held ? index : Classes::Class(0));  // others write theirs
      const Label label = {index, held ? item : -1, ReadEither(*logit, is_half_)};
      float m = 1;
      if constexpr (kMasked) {
        m = kLanes == 1 ? weight_of_lane : __shfl_sync(0xffffffffu, weight_of_lane, v);
        if (m == 0) top = 0;  // a voxel without weight may hold anything
#pragma unroll
        for (int i = 0; i < kItems; ++i) z[i] = m == 0 ? 0.0f : z[i];
      }
      voxel(Classes{{}, there, top}, z, label, m, PlainTerms<float>(call_.terms.cross_entropy));
      if constexpr (kStore) {
        if (there) WriteRow(row, aligned, z);
      }
    }
  }
  DICE_OP_DEVICE bool HasClass(int i) const { return i < kAlwaysHeld || Classes::Class(i) < call_.classes; }

  // This thread's classes of a row, in parts of 32 bits. Part p is RunAt(row)[p * kLanes].
  using Parts = Elements<T, kItems / kTogether>;
  DICE_OP_DEVICE static uint32_t* RunAt(char* row) { return reinterpret_cast<uint32_t*>(row) + Lane() % kLanes; }

  // Returns the largest logit that this thread holds.
  DICE_OP_DEVICE float ReadRow(char* row, bool aligned, float* z) const {
    const uint32_t none = sizeof(T) == 4 ? 0xff800000u : is_half_ ? 0xfc00fc00u : 0xff80ff80u;  // -infinity
    Parts parts;
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kItems / kTogether; ++p) {
        parts.parts[p] = HasClass(p * kTogether) ? RunAt(row)[p * kLanes] : none;
      }
    } else {
      const auto* const halves = reinterpret_cast<const uint16_t*>(RunAt(row));
#pragma unroll
      for (int p = 0; p < kItems / kTogether; ++p) {
        const uint32_t low = HasClass(2 * p) ? halves[2 * p * kLanes] : none & 0xffff;
        const uint32_t high = HasClass(2 * p + 1) ? halves[2 * p * kLanes + 1] : none & 0xffff;
        parts.parts[p] = low | high << 16;
      }
    }
    return parts.ToFloatsAndLargest(is_half_, z);
  }
  DICE_OP_DEVICE void WriteRow(char* row, bool aligned, const float* z) const {
    Parts parts;
    parts.FromFloats(is_half_, z);
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kItems / kTogether; ++p) {
        if (HasClass(p * kTogether)) RunAt(row)[p * kLanes] = parts.parts[p];
      }
    } else {
      auto* const halves = reinterpret_cast<uint16_t*>(RunAt(row));
#pragma unroll
      for (int p = 0; p < kItems / kTogether; ++p) {
        if (HasClass(2 * p)) halves[2 * p * kLanes] = static_cast<uint16_t>(parts.parts[p]);
        if (HasClass(2 * p + 1)) halves[2 * p * kLanes + 1] = static_cast<uint16_t>(parts.parts[p] >> 16);
      }
    }
  }

  const Call& call_;
  const int64_t offset_, voxel_offset_;
  char* const memory_;  // [2 stages][kTile] rows
  const bool is_half_;
  const int row_bytes_, tile_bytes_;
  // Where this lane's first word of a tile is in a stage, and the distance to each of the next.
  const int first_word_, word_step_;
  uint32_t largest_ = 0;
};

}  // namespace
}  // namespace dice_op

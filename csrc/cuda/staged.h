// Reads voxels by way of shared memory. Tiles are copied there while the warp computes.
#pragma once

#include "cuda/voxel_access.h"

namespace dice_op {
namespace {

// If kLanes is 1, there are exactly kItems classes. If kLanes > 1, there are more than kLanes * kAlwaysHeld classes,
// and at most kLanes * kItems.
template <class T, int kItems_, int kLanes_, int kAlwaysHeld>
class Staged {
 public:
  using Number = float;
  using Parameter = Call;  // of the kernels
  using Storage = T;
  static constexpr int kItems = kItems_, kLanes = kLanes_;
  using Classes = std::conditional_t<kLanes == 1, AllClasses<kItems>, StridedClassesIfThere<kItems, kLanes>>;
  // The sums of few classes are kept in registers, and each class is compared with the label.
  static constexpr bool kSingle = kLanes > 1 || kItems > 4, kWeighted = false, kTables = false;
  using Label = std::conditional_t<kSingle, SingleLabel<float>, IndexLabel<int>>;
  static constexpr int kGroups = kWarp / kLanes;  // voxels at a time
  static constexpr int kRounds = kLanes == 1                ? (kItems * sizeof(T) <= 16 ? 2 : 1)
                                 : kGroups * sizeof(T) < 16 ? 16 / (kGroups * sizeof(T))
                                                            : 1;
  static constexpr int kTile = kGroups * kRounds;  // voxels; a multiple of 16 bytes with any number of classes
  static constexpr int kLabels = kTile > kWarp ? kTile / kWarp : 1;  // the number that a lane reads per tile
  static constexpr int kStages = 3;
  static constexpr int kRegisters = kItems > 8 ? 128 : 96;
  static constexpr int StageBytes(int classes, int padding) {
    return kTile * (classes * static_cast<int>(sizeof(T)) + padding);
  }
  static constexpr int Bytes(int classes, int padding) { return kStages * StageBytes(classes, padding); }

  DICE_OP_DEVICE Staged(const Call& call, int64_t sample, char* memory)
      : call_(call),
        logits_(static_cast<const T*>(call.logits) + sample * call.voxels * classes()),
        d_logits_(static_cast<T*>(call.d_logits) + sample * call.voxels * classes()),
        voxel_offset_(sample * call.voxels),
        memory_(memory) {}
  DICE_OP_DEVICE bool bad() const { return largest_ >= static_cast<uint32_t>(call_.label_limit); }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int first, int step, Voxel&& voxel, Done&& done) {
    if constexpr (kLanes > 1) {  // where the last tile has no voxel, there must be no NaN
#pragma unroll 1
      for (int w = Lane(); w < kStages * kTile * row_bytes() / 16; w += kWarp) {
        reinterpret_cast<Word<T>*>(memory_)[w] = Word<T>{};
      }
      __syncwarp();
    }
    const auto tile_of = [&](int t) { return kStore ? call_.tiles - 1 - t : t; };
    uint32_t labels[kLabels], next_labels[kLabels][1] = {};
    int stage = 1;
    // The first rounds only fill the pipeline.
    for (int t = first - (kStages - 1) * step; t < call_.tiles; t += step) {
      WaitForCopies<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and no lane is at the stage before
      const int ahead = t + (kStages - 1) * step;
      if (ahead < call_.tiles) Fetch(tile_of(ahead), stage == 0 ? kStages - 1 : stage - 1);
      EndCopies();
#pragma unroll
      for (int i = 0; i < kLabels; ++i) labels[i] = next_labels[i][0];
      FetchLabels(tile_of(t + step), next_labels);
      if (t >= first) {
        const int tile = tile_of(t);
        Compute<kStore>(stage, Voxels(tile), labels, voxel);
        if constexpr (kStore) {
          __syncwarp();  // the whole tile is computed
          Put(tile, stage);
        }
        done(kRounds, t + step >= call_.tiles);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
  }

 private:
  DICE_OP_DEVICE int classes() const { return kLanes == 1 ? kItems : call_.classes; }
  DICE_OP_DEVICE int row_bytes() const {
    return classes() * static_cast<int>(sizeof(T)) + (kLanes == 1 ? 0 : call_.row_padding);
  }
  DICE_OP_DEVICE char* Stage(int stage) const { return memory_ + stage * kTile * row_bytes(); }
  DICE_OP_DEVICE T* Row(int stage, int voxel) const { return reinterpret_cast<T*>(Stage(stage) + voxel * row_bytes()); }
  DICE_OP_DEVICE static int VoxelOf(int round) { return round * kGroups + Lane() / kLanes; }
  DICE_OP_DEVICE char* WordAt(int stage, int word) const {
    char* at = Stage(stage) + word * 16;
    if constexpr (kLanes > 1) at += static_cast<int>(word * call_.row_magic >> 20) * call_.row_padding;
    return at;
  }
  DICE_OP_DEVICE int Voxels(int tile) const { return tile == call_.tiles - 1 ? call_.last_voxels : kTile; }

  // Calls fn(word, at) for this lane's words of a tile. `word` counts the words of the tile, and `at` is the index in
  // the sample of the word's first element. Then calls rest(element, at) for the elements after the last whole word.
  template <class Fn, class Rest>
  DICE_OP_DEVICE void ForEachWord(int tile, Fn&& fn, Rest&& rest) const {
    constexpr int kMost = kLanes == 1 ? (kTile * kItems / kPerWord + kWarp - 1) / kWarp : 0;  // known at compile time
    const int64_t begin = tile * (static_cast<int64_t>(kTile) * classes());
    const int elements = Voxels(tile) * classes(), words = elements / kPerWord;
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i * kWarp + Lane() < words) fn(i * kWarp + Lane(), begin + (i * kWarp + Lane()) * kPerWord);
      }
    } else {
#pragma unroll 2
      for (int w = Lane(); w < words; w += kWarp) fn(w, begin + w * kPerWord);
    }
    // Only rows of whole words are padded, and then no elements are left.
#pragma unroll 1
    for (int e = words * kPerWord + Lane(); e < elements; e += kWarp) rest(e, begin + e);
  }
  static constexpr int kPerWord = 16 / sizeof(T);

  DICE_OP_DEVICE void Fetch(int tile, int stage) {
    ForEachWord(
        tile, [&](int w, int64_t at) { CopyWord(WordAt(stage, w), logits_ + at); },
        [&](int e, int64_t at) { Row(stage, 0)[e] = logits_[at]; });
  }
  DICE_OP_DEVICE void Put(int tile, int stage) {
    ForEachWord(
        tile,
        [&](int w, int64_t at) {
          StoreStreaming<T>(reinterpret_cast<Word<T>*>(d_logits_ + at),
                            *reinterpret_cast<const Word<T>*>(WordAt(stage, w)));
        },
        [&](int e, int64_t at) { d_logits_[at] = Row(stage, 0)[e]; });
  }
  // Lane l reads the label of voxel l of the tile, and of voxel l + 32 if there is one. The tile need not exist.
  DICE_OP_DEVICE void FetchLabels(int tile, uint32_t (*labels)[1]) {
#pragma unroll
    for (int i = 0; i < kLabels; ++i) labels[i][0] = UINT32_MAX;
    const int left = static_cast<uint32_t>(tile) < static_cast<uint32_t>(call_.tiles) ? Voxels(tile) - Lane() : 0;
    if (left > 0) {
      const int64_t at = voxel_offset_ + tile * static_cast<int64_t>(kTile) + Lane();
      ReadLabels<1, kLabels>(call_, at, kWarp, left, labels, &largest_);
    }
  }

  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void Compute(int stage, int count, const uint32_t* labels, Voxel&& voxel) {
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (VoxelOf(r) < count) {
          T* row = Row(stage, VoxelOf(r));
          float z[kItems];
          ReadRow(row, z);
          voxel(Classes{}, z, LabelOf(row, labels[r]), 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
          if constexpr (kStore) WriteRow(row, z);
        }
      }
    } else {
      const int lane = Lane() % kLanes;
#pragma unroll 1
      for (int r = 0; r < kRounds; ++r) {
        const bool there = VoxelOf(r) < count;
        T* row = Row(stage, VoxelOf(r));  // holds an old voxel or zeros if there is no voxel
        float z[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) z[i] = HasClass(i, lane) ? Read<float>(row[i * kLanes + lane]) : -INFINITY;
        const Label label = LabelOf(row, __shfl_sync(0xffffffffu, labels[0], VoxelOf(r)));
        voxel(Classes{{}, there}, z, label, 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
        if constexpr (kStore) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (there && HasClass(i, lane)) row[i * kLanes + lane] = Write<T>(z[i]);
          }
        }
      }
    }
  }
  DICE_OP_DEVICE bool HasClass(int i, int lane) const { return i < kAlwaysHeld || i * kLanes + lane < call_.classes; }
  DICE_OP_DEVICE Label LabelOf(const T* row, uint32_t label) const {
    if constexpr (kSingle) {
      const bool held = label < static_cast<uint32_t>(classes()) && label % kLanes == Lane() % kLanes;
      const int index = static_cast<int>(label);
      return {index, held ? index / kLanes : -1, held ? Read<float>(row[index]) : 0.0f};
    } else {
      return {static_cast<int>(label)};
    }
  }

  static constexpr int kWidth =  // elements read at once, as the alignment of the rows allows
      kItems % kPerWord == 0 ? kPerWord
      : kItems % 4 == 0      ? 4
      : kItems % 2 == 0      ? 2
                             : 1;
  DICE_OP_DEVICE static void ReadRow(const T* row, float* z) {
#pragma unroll
    for (int i = 0; i < kItems; i += kWidth) {
      const auto part = *reinterpret_cast<const Vector<T, kWidth>*>(row + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) z[i + j] = Read<float>(part.elements[j]);
    }
  }
  DICE_OP_DEVICE static void WriteRow(T* row, const float* z) {
#pragma unroll
    for (int i = 0; i < kItems; i += kWidth) {
      Vector<T, kWidth> part;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) part.elements[j] = Write<T>(z[i + j]);
      *reinterpret_cast<Vector<T, kWidth>*>(row + i) = part;
    }
  }

  const Call& call_;
  const T* const logits_;
  T* const d_logits_;
  const int64_t voxel_offset_;
  char* const memory_;  // [kStages][kTile] rows
  uint32_t largest_ = 0;
};

}  // namespace
}  // namespace dice_op

// Reads voxels from memory to registers and writes them back. It is for few classes that fill 16-byte words evenly.
#pragma once

#include "cuda/voxel_access.h"

namespace dice_op {
namespace {

// A unit is the kVoxels voxels in one 16-byte word, or in one word of the plane of each class. A thread takes several
// at a time, so that the loop takes few instructions for a voxel and enough bytes are on their way. Words must be
// aligned.
template <class T, int kCount, bool kPlanar_>
class Direct {
 public:
  using Number = float;
  using Parameter = Call;  // of the kernels
  using Storage = T;       // the type of a tile's elements
  using Classes = AllClasses<kCount>;
  using Label = IndexLabel<int>;
  static constexpr int kItems = kCount, kLanes = 1, kTogether = 1;
  static constexpr bool kPlanar = kPlanar_;
  static constexpr int kPerWord = 16 / sizeof(T);
  static constexpr int kWords = kPlanar ? kCount : 1;
  static constexpr int kVoxels = kPlanar ? kPerWord : kPerWord / kCount;
  static constexpr int kUnits = kPlanar ? 1 : kVoxels < 4 ? 4 : 2;
  static constexpr int kTile = kWarp * kUnits * kVoxels;
  static constexpr int Bytes(int, int) { return 0; }
  static constexpr bool kSingle = false, kWeighted = false, kTables = false;
  static constexpr int kRegisters =
      sizeof(T) == 4 ? (kPlanar ? 80 : 64) : (kPlanar ? 128 : 80);  // the most that a thread may use

  DICE_OP_DEVICE Direct(const Call& call, int64_t sample, char*)
      : call_(call),
        offset_(sample * call.voxels * kCount),
        voxel_offset_(sample * call.voxels),
        is_half_(call.logits_dtype == DType::kHalf) {}
  DICE_OP_DEVICE bool bad() const { return largest_ >= static_cast<uint32_t>(call_.label_limit); }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int first, int step, Voxel&& voxel, Done&& done) {
    for (int t = first; t < call_.tiles; t += step) {
      const int tile = kStore ? call_.tiles - 1 - t : t;
      if (tile < call_.tiles - 1 || call_.last_voxels == kTile) {
        Units<kStore>(tile * static_cast<int64_t>(kTile / kVoxels) + Lane(), voxel);
      } else {
#pragma unroll 1
        for (int64_t v = tile * static_cast<int64_t>(kTile) + Lane(); v < call_.voxels; v += kWarp) {
          One<kStore>(v, voxel);
        }
      }
      done(kUnits * kVoxels, t + step >= call_.tiles);
    }
  }

 private:
  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void Units(int64_t first, Voxel&& voxel) {
    const auto* logits = reinterpret_cast<const Word*>(static_cast<const T*>(call_.logits) + offset_);
    auto* d_logits = reinterpret_cast<Word*>(static_cast<T*>(call_.d_logits) + offset_);
    const int64_t plane = call_.voxels / kPerWord;  // only used if planar
    Elements<T, 4 * kWords> units[kUnits];
    uint32_t labels[kUnits][kVoxels];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) units[u].Read(4 * w, logits[first + u * kWarp + w * plane]);
    }
    constexpr int kStride = kWarp * kVoxels;
    ReadLabels<kVoxels, kUnits>(call_, voxel_offset_ + first * kVoxels, kStride, labels, &largest_);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float values[kVoxels * kCount];
      units[u].ToFloats(is_half_, values);
#pragma unroll
      for (int v = 0; v < kVoxels; ++v) {
        float z[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) z[c] = values[Index(v, c)];
        voxel(Classes{}, z, LabelOf(labels[u][v]), 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
        if constexpr (kStore) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) values[Index(v, c)] = z[c];
        }
      }
      if constexpr (kStore) {
        Elements<T, 4 * kWords> gradient;
        gradient.FromFloats(is_half_, values);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          StoreStreaming(d_logits + first + u * kWarp + w * plane, gradient.template Run<4>(4 * w));
        }
      }
    }
  }
  // The place of a voxel's class in a unit.
  DICE_OP_DEVICE static constexpr int Index(int v, int c) { return kPlanar ? c * kPerWord + v : v * kCount + c; }

  // The only class of a mask is the label 1.
  DICE_OP_DEVICE static Label LabelOf(uint32_t label) { return {static_cast<int>(label - (kCount == 1 ? 1 : 0))}; }

  // Handles one voxel of the last tile if that is not full.
  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void One(int64_t v, Voxel&& voxel) {
    const auto at = [&](int c) { return offset_ + (kPlanar ? c * call_.voxels + v : v * kCount + c); };
    float z[kCount];
    const uint32_t label = ReadLabel(call_, voxel_offset_ + v);
    largest_ = largest_ < label ? label : largest_;
    for (int c = 0; c < kCount; ++c) z[c] = ReadEither(static_cast<const T*>(call_.logits)[at(c)], is_half_);
    voxel(Classes{}, z, LabelOf(label), 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
    if constexpr (kStore) {
      for (int c = 0; c < kCount; ++c) static_cast<T*>(call_.d_logits)[at(c)] = WriteEither<T>(z[c], is_half_);
    }
  }

  const Call& call_;
  const int64_t offset_, voxel_offset_;
  const bool is_half_;
  uint32_t largest_ = 0;
};

}  // namespace
}  // namespace dice_op

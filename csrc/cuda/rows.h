// Reads voxels by way of shared memory, each by one thread. Tiles are copied there while the warp computes.
#pragma once

#include "cuda/voxel_access.h"

namespace dice_op {
namespace {

// There are exactly kCount classes. In each round a thread takes one voxel, or two if only two fill parts of 32 bits.
// With kMasked voxels may have weights, and a label may be ignored.
template <class T, int kCount, bool kMasked = false>
class Rows {
 public:
  using Number = float;
  using Parameter = Call;  // of the kernels
  using Storage = T;
  using Classes = AllClasses<kCount>;
  static constexpr int kItems = kCount, kLanes = 1, kTogether = 1;
  static constexpr bool kPlanar = false;
  // The sums of few classes are kept in registers, and each class is compared with the label.
  static constexpr bool kSingle = kCount > 4, kWeighted = kMasked, kTables = false;
  using Label = std::conditional_t<kSingle, SingleLabel<float>, IndexLabel<int>>;
  static constexpr int kRowBytes = kCount * sizeof(T);
  static constexpr int kVoxels = kRowBytes % 4 == 0 ? 1 : 2, kParts = kVoxels * kRowBytes / 4;
  static constexpr int kRounds = kParts <= 8 ? 4 : 2;
  static constexpr int kTile = kWarp * kVoxels * kRounds, kTileWords = kTile * kRowBytes / 16;
  static constexpr int kStages = kTileWords * 16 < 2048 ? 3 : 2;
  static constexpr int kRegisters = kCount > 8 ? 128 : 96;

  DICE_OP_DEVICE Rows(const Call& call, int64_t sample, char* memory)
      : call_(call),
        offset_(sample * call.voxels * kRowBytes),
        voxel_offset_(sample * call.voxels),
        memory_(memory),
        whole_(call.last_voxels == kTile ? call.tiles : call.tiles - 1),
        is_half_(call.logits_dtype == DType::kHalf),
        above_((128 - call.label_limit) * 0x01010101u) {}
  DICE_OP_DEVICE bool bad() const { return (bad_ & 0x80808080u) != 0; }

  static constexpr int Bytes(int, int) { return kStages * kStageBytes; }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int first, int step, Voxel&& voxel, Done&& done) {
    // Tiles are visited in steps of this many bytes of logits and voxels of labels.
    const int64_t sign = kStore ? -1 : 1, begin = kStore ? whole_ - 1 - first : first;
    const int64_t bytes = sign * step * (kTileWords * 16), voxels = sign * step * kTile;
    const char* from = static_cast<const char*>(call_.logits) + offset_ + begin * (kTileWords * 16) + Lane() * 16;
    char* to = static_cast<char*>(call_.d_logits) + offset_ + begin * (kTileWords * 16) + Lane() * 16;
    int64_t labels_at = voxel_offset_ + begin * kTile + Lane() * kVoxels;
    Labels labels, next = 0;
    int stage = 1;
    // The first rounds only fill the pipeline.
#pragma unroll 1
    for (int t = first - (kStages - 1) * step; t < call_.tiles; t += step) {
      WaitForCopies<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and no lane is at the stage before
      const int ahead = t + (kStages - 1) * step;
      if (ahead < whole_) Fetch(from, kStore ? whole_ - 1 - ahead : ahead, stage == 0 ? kStages - 1 : stage - 1);
      EndCopies();
      from += bytes;
      labels = next;
      if (t + step >= first && t + step < whole_) {
        next = FetchLabels(labels_at);
        labels_at += voxels;
      }
      if (t >= first) {
        if (t < whole_) {
          Compute<kStore>(stage, labels, voxel);
          if constexpr (kStore) {
            __syncwarp();  // the whole tile is computed
            Put(to, stage);
            to += bytes;
          }
        } else {
#pragma unroll 1
          for (int64_t v = whole_ * static_cast<int64_t>(kTile) + Lane(); v < call_.voxels; v += kWarp) {
            Last<kStore>(v, voxel);
          }
        }
        done(kVoxels * kRounds, t + step >= call_.tiles);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
  }

 private:
  // The labels of a thread's voxels in a tile, a byte each. A label that does not fit is 255, which is no class here.
  // If labels take more than a byte, the one that is ignored is 254.
  using Labels = std::conditional_t<kRounds * kVoxels <= 4, uint32_t, uint64_t>;
  static constexpr int kRun = kParts % 4 == 0 ? 4 : kParts % 2 == 0 ? 2 : 1;  // parts read at once, as rows are aligned

  // Threads that read at the same time must not read from the same bank of shared memory. If their rows are a multiple
  // of 32 bytes apart, they do, and 16 bytes are left out behind each 128.
  static constexpr bool kPadded = kParts % 8 == 0;
  static constexpr int kLogitsBytes = kTileWords * (kPadded ? 18 : 16);
  static constexpr int kStageBytes = kLogitsBytes + (kMasked ? kTile * 4 : 0);
  // The distance between words of a tile that are a multiple of 128 bytes apart, given in words.
  DICE_OP_INLINE static constexpr int Distance(int words) { return words * (kPadded ? 18 : 16); }
  DICE_OP_DEVICE char* At(int stage, int byte) const {
    return memory_ + stage * kStageBytes + byte + (kPadded ? byte / 128 * 16 : 0);
  }

  DICE_OP_DEVICE float* WeightsAt(int stage) const {
    return reinterpret_cast<float*>(memory_ + stage * kStageBytes + kLogitsBytes);
  }

  // tile: whose weights are fetched too, if there are some.
  DICE_OP_DEVICE void Fetch(const char* from, int tile, int stage) const {
#pragma unroll
    for (int w = 0; w < kTileWords; w += kWarp) CopyWord(At(stage, Lane() * 16) + Distance(w), from + w * 16);
    if (kMasked && call_.weight) {
      const float* weights = static_cast<const float*>(call_.weight) + voxel_offset_ + tile * int64_t{kTile} + Lane();
#pragma unroll
      for (int v = 0; v < kTile; v += kWarp) CopyNumber(WeightsAt(stage) + Lane() + v, weights + v);
    }
  }
  DICE_OP_DEVICE void Put(char* to, int stage) const {
#pragma unroll
    for (int w = 0; w < kTileWords; w += kWarp) {
      StoreStreaming(reinterpret_cast<Word*>(to + w * 16),
                     *reinterpret_cast<const Word*>(At(stage, Lane() * 16) + Distance(w)));
    }
  }

  DICE_OP_DEVICE Labels FetchLabels(int64_t at) const {
    Labels labels = 0;
    if (call_.label_bytes == 1) {
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        using Several = std::conditional_t<kVoxels == 1, uint8_t, uint16_t>;
        const char* const from = static_cast<const char*>(call_.labels) + at + r * (kWarp * kVoxels);
        labels |= static_cast<Labels>(*reinterpret_cast<const Several*>(from)) << 8 * kVoxels * r;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRounds * kVoxels; ++i) {
        const uint32_t label = Packed(ReadLabel(call_, at + i / kVoxels * (kWarp * kVoxels) + i % kVoxels));
        labels |= static_cast<Labels>(label) << 8 * i;
      }
    }
    return labels;
  }

  DICE_OP_DEVICE uint32_t Packed(uint32_t label) const {
    if (kMasked && call_.label_bytes > 1) {
      if (call_.has_ignored && label == call_.ignored) return 254;
      return label < 254 ? label : 255;
    }
    return label < 255 ? label : 255;
  }
  DICE_OP_DEVICE bool IsIgnored(uint32_t packed) const {
    return kMasked && call_.has_ignored && packed == (call_.label_bytes > 1 ? 254 : call_.ignored);
  }
  // Calls voxel(classes, z, label, m, terms). row: of the voxel, in memory; label: packed.
  template <class Voxel>
  DICE_OP_DEVICE void One(const T* row, float* z, uint32_t label, const float& weight, Voxel&& voxel) {
    auto terms = PlainTerms<float>(call_.terms.cross_entropy);
    float m = 1;
    if constexpr (kMasked) {
      terms.masked = true;
      if (call_.weight) m = weight;
      if (IsIgnored(label)) {
        m = 0;
        label = 0;
      }
      Check(label);
    }
    voxel(Classes{}, z, LabelOf(row, label), m, terms);
  }

  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void Compute(int stage, Labels labels, Voxel&& voxel) {
    constexpr int kUnroll = kSingle || kMasked ? 1 : kRounds;  // many classes are enough to do at a time
    if constexpr (!kMasked) {                                  // several at a time
#pragma unroll
      for (size_t half = 0; half < sizeof(Labels) / 4; ++half) Check(static_cast<uint32_t>(labels >> 32 * half));
    }
    char* row = At(stage, Lane() * (kParts * 4));
    const float* weight = WeightsAt(stage) + Lane() * kVoxels;  // only read if there are some
#pragma unroll kUnroll
    for (int r = 0; r < kRounds; ++r) {
      Elements<T, kParts> logits, gradient;
#pragma unroll
      for (int p = 0; p < kParts; p += kRun) {
        logits.Read(p, *reinterpret_cast<const Vector<uint32_t, kRun>*>(row + 4 * p));
      }
      float z[kVoxels * kCount];
      logits.ToFloats(is_half_, z);
#pragma unroll
      for (int v = 0; v < kVoxels; ++v) {
        const T* const of_voxel = reinterpret_cast<const T*>(row) + v * kCount;
        One(of_voxel, z + v * kCount, static_cast<uint8_t>(labels), weight[v], voxel);
        labels >>= 8;
      }
      if constexpr (kStore) {
        gradient.FromFloats(is_half_, z);
#pragma unroll
        for (int p = 0; p < kParts; p += kRun) {
          *reinterpret_cast<Vector<uint32_t, kRun>*>(row + 4 * p) = gradient.template Run<kRun>(p);
        }
      }
      row += Distance(kWarp * kParts / 4);
      weight += kWarp * kVoxels;
    }
  }
  // Handles a voxel of the last tile if that is not full.
  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void Last(int64_t v, Voxel&& voxel) {
    const int64_t at = offset_ + v * kRowBytes;
    const T* const row = reinterpret_cast<const T*>(static_cast<const char*>(call_.logits) + at);
    const uint32_t label = Packed(ReadLabel(call_, voxel_offset_ + v));
    float z[kCount], weight = 1;
    if (kMasked && call_.weight) weight = static_cast<const float*>(call_.weight)[voxel_offset_ + v];
    if constexpr (!kMasked) Check(label);
#pragma unroll
    for (int c = 0; c < kCount; ++c) z[c] = ReadEither(row[c], is_half_);
    One(row, z, label, weight, voxel);
    if constexpr (kStore) {
      T* const d_row = reinterpret_cast<T*>(static_cast<char*>(call_.d_logits) + at);
#pragma unroll
      for (int c = 0; c < kCount; ++c) d_row[c] = WriteEither<T>(z[c], is_half_);
    }
  }
  // Notes whether one of four labels is no class: adding `above` then sets the highest bit of its byte.
  DICE_OP_DEVICE void Check(uint32_t labels) { bad_ |= ((labels & 0x7f7f7f7fu) + above_) | labels; }
  // A label that is no class counts as the last class, because its sample has no sums anyway.
  DICE_OP_DEVICE Label LabelOf(const T* row, uint32_t label) const {
    if constexpr (kSingle) {
      const int index = static_cast<int>(label < kCount ? label : kCount - 1);
      return {index, index, ReadEither(row[index], is_half_)};
    } else {
      return {static_cast<int>(label)};
    }
  }

  const Call& call_;
  const int64_t offset_, voxel_offset_;  // of the sample, in bytes of logits and in voxels
  char* const memory_;                   // [kStages] tiles
  const int whole_;                      // tiles that are full
  const bool is_half_;
  const uint32_t above_;
  uint32_t bad_ = 0;
};

}  // namespace
}  // namespace dice_op

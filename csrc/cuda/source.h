// How the threads of a warp come by voxels, and where gradients go. Three ways, one interface:
//
//   Direct   few classes that fill 16-byte words evenly: from memory to registers and back
//   Staged   other class counts: tiles go through shared memory, copied in 16-byte words while the
//            warp computes; above 16 classes, and for some below, several lanes share a voxel
//   General  every type, layout, weight and option, at run time: tiles are converted on their way
//
// A source works for one warp and one sample. Run(first, step, voxel, done) visits the tiles first,
// first + step, ...; for each voxel it calls voxel(classes, z, label, m, terms), with the logits z of
// the classes that this thread holds. With kStore it writes to d_logits what `voxel` has put in their
// place, and goes backwards: the sums' kernel left the sample's end in the cache. After each tile all
// lanes together call done(voxels of this thread, whether it was the last tile).
#pragma once

#include <type_traits>

#include "core/dice_op.h"
#include "core/dtype.h"
#include "cuda/call.h"
#include "cuda/device.h"
// what voxel.h needs is in device.h
#include "core/voxel.h"

namespace dice_op {
namespace {

using cuda::Call;

// The classes of a voxel dealt out to kLanes neighbouring threads: class c to thread c % kLanes.
template <int kItems, int kLanes>
struct Dealt {
  DICE_OP_DEVICE static constexpr int size() { return kItems; }
  DICE_OP_DEVICE static int Class(int i) { return i * kLanes + Lane() % kLanes; }
  DICE_OP_DEVICE static void Prefetch(int) {}
  template <class R>
  DICE_OP_DEVICE R Sum(R x) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x = x + FromPartner(x, distance);
    return x;
  }
  template <class R>
  DICE_OP_DEVICE R Max(R x) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x = dice_op::Max(x, FromPartner(x, distance));
    return x;
  }
};

// The same where the last tile's threads must take part in what they share, voxel or none: the
// probabilities of a voxel that is not there have an infinite sum before they are normalised, and are 0.
template <int kItems, int kLanes>
struct DealtIfThere : Dealt<kItems, kLanes> {
  bool there;
  template <class R>
  DICE_OP_DEVICE R Sum(R x) const {
    const R sum = Dealt<kItems, kLanes>::Sum(x);
    return there ? sum : R(INFINITY);
  }
};

template <class R>
DICE_OP_DEVICE constexpr Terms<R> PlainTerms(bool cross_entropy) {
  return {false, false, cross_entropy, R(0), R(1), R(0), R(0)};
}

// --- labels and weights -------------------------------------------------------------------------------

// Integer labels, kCount at once and that kTimes, `stride` apart, as far as they begin before `limit`. Four widths
// serve all types: read as unsigned, negative ones lie beyond every class. *largest keeps the largest label seen.
template <int kCount, int kTimes>
DICE_OP_DEVICE void ReadLabels(const Call& call, int64_t at, int stride, int limit, uint32_t (*labels)[kCount],
                               uint32_t* largest) {
  const char* const first = static_cast<const char*>(call.labels) + at * call.label_bytes;
  const auto read = [&](auto zero) {
    using T = decltype(zero);
    const T* const from = reinterpret_cast<const T*>(first);
#pragma unroll
    for (int t = 0; t < kTimes; ++t) {
      if (t * stride < limit) {
        const auto several = *reinterpret_cast<const Vector<T, kCount>*>(from + t * stride);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const T label = several.elements[i];
          labels[t][i] = sizeof(T) == 8 && label > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(label);
        }
      }
    }
  };
  if (call.label_bytes == 1) {
    read(uint8_t{});
  } else if (call.label_bytes == 4) {
    read(uint32_t{});
  } else if (call.label_bytes == 8) {
    read(uint64_t{});
  } else {
    read(uint16_t{});
  }
#pragma unroll
  for (int t = 0; t < kTimes; ++t) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (t * stride < limit) *largest = *largest < labels[t][i] ? labels[t][i] : *largest;
    }
  }
}

// --- direct -------------------------------------------------------------------------------------------

// A unit is what a thread takes at once: the kVoxels voxels in one 16-byte word, or in one word of each
// class's plane. Words must be aligned.
template <class T, int kCount, bool kPlanar>
class Direct {
 public:
  using Number = float;
  using Storage = T;  // of a tile
  using Classes = AllClasses<kCount>;
  using Label = IndexLabel<int>;
  static constexpr int kItems = kCount, kLanes = 1;
  static constexpr int kPerWord = 16 / sizeof(T);
  static constexpr int kWords = kPlanar ? kCount : 1;
  static constexpr int kVoxels = kPlanar ? kPerWord : kPerWord / kCount;
  static constexpr int kUnits = kWords == 1 && kVoxels < 8 ? 2 : 1;  // so that threads wait for 32 bytes or more
  static constexpr int kTile = kWarp * kUnits * kVoxels;
  static constexpr int Bytes(int, int) { return 0; }
  static constexpr bool kSingle = false, kWeighted = false;
  static constexpr int kRegisters =
      sizeof(T) == 4 ? (kPlanar ? 80 : 64) : (kPlanar ? 128 : 80);  // of a thread, at most

  DICE_OP_DEVICE Direct(const Call& call, int64_t sample, char*)
      : call_(call), offset_(sample * call.voxels * kCount), voxel_offset_(sample * call.voxels) {}
  DICE_OP_DEVICE bool bad() const { return largest_ >= static_cast<uint32_t>(call_.label_limit); }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int first, int step, Voxel&& voxel, Done&& done) {
    for (int t = first; t < call_.tiles; t += step) {
      const int tile = kStore ? call_.tiles - 1 - t : t;
      if (tile < call_.tiles - 1 || call_.last_voxels == kTile) {
        Units<kStore>(tile * static_cast<int64_t>(kTile / kVoxels) + Lane(), voxel);
      } else {
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
    const auto* logits = reinterpret_cast<const Word<T>*>(static_cast<const T*>(call_.logits) + offset_);
    auto* d_logits = reinterpret_cast<Word<T>*>(static_cast<T*>(call_.d_logits) + offset_);
    const int64_t plane = call_.voxels / kPerWord;  // if planar
    Word<T> words[kUnits][kWords];
    uint32_t labels[kUnits][kVoxels];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[u][w] = logits[first + u * kWarp + w * plane];
    }
    constexpr int kStride = kWarp * kVoxels;
    ReadLabels<kVoxels, kUnits>(call_, voxel_offset_ + first * kVoxels, kStride, kUnits * kStride, labels, &largest_);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int v = 0; v < kVoxels; ++v) {
        float z[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) z[c] = Read<float>(Element(words[u], v, c));
        voxel(Classes{}, z, LabelOf(labels[u][v]), 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
        if constexpr (kStore) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) Element(words[u], v, c) = Write<T>(z[c]);
        }
      }
      if constexpr (kStore) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) StoreStreaming<T>(d_logits + first + u * kWarp + w * plane, words[u][w]);
      }
    }
  }
  DICE_OP_DEVICE static T& Element(Word<T>* words, int voxel, int c) {
    return kPlanar ? words[c].elements[voxel] : words[0].elements[voxel * kCount + c];
  }

  // The only class of a mask is the label 1.
  DICE_OP_DEVICE static Label LabelOf(uint32_t label) { return {static_cast<int>(label - (kCount == 1 ? 1 : 0))}; }

  // A voxel of the last tile, which is not full.
  template <bool kStore, class Voxel>
  DICE_OP_DEVICE void One(int64_t v, Voxel&& voxel) {
    const auto at = [&](int c) { return offset_ + (kPlanar ? c * call_.voxels + v : v * kCount + c); };
    float z[kCount];
    uint32_t label[1][1];
    ReadLabels<1, 1>(call_, voxel_offset_ + v, 1, 1, label, &largest_);
    for (int c = 0; c < kCount; ++c) z[c] = Read<float>(static_cast<const T*>(call_.logits)[at(c)]);
    voxel(Classes{}, z, LabelOf(label[0][0]), 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
    if constexpr (kStore) {
      for (int c = 0; c < kCount; ++c) static_cast<T*>(call_.d_logits)[at(c)] = Write<T>(z[c]);
    }
  }

  const Call& call_;
  const int64_t offset_, voxel_offset_;
  uint32_t largest_ = 0;
};

// --- staged -------------------------------------------------------------------------------------------

// kLanes = 1: kItems classes exactly. kLanes > 1: more than kLanes * (kSure) and at most kLanes * kItems.
template <class T, int kItems_, int kLanes_, int kSure>
class Staged {
 public:
  using Number = float;
  using Storage = T;
  static constexpr int kItems = kItems_, kLanes = kLanes_;
  using Classes = std::conditional_t<kLanes == 1, AllClasses<kItems>, DealtIfThere<kItems, kLanes>>;
  // Few classes: their sums live in registers, and each asks whether it is the label's.
  static constexpr bool kSingle = kLanes > 1 || kItems > 4, kWeighted = false;
  using Label = std::conditional_t<kSingle, SingleLabel<float>, IndexLabel<int>>;
  static constexpr int kGroups = kWarp / kLanes;  // voxels at a time
  static constexpr int kRounds = kLanes == 1                ? (kItems * sizeof(T) <= 16 ? 2 : 1)
                                 : kGroups * sizeof(T) < 16 ? 16 / (kGroups * sizeof(T))
                                                            : 1;
  static constexpr int kTile = kGroups * kRounds;  // voxels; a multiple of 16 bytes with any number of classes
  static constexpr int kLabels = kTile > kWarp ? kTile / kWarp : 1;  // that a lane reads of a tile
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
    if constexpr (kLanes > 1) {  // no NaN may stand where the last tile has no voxel
#pragma unroll 1
      for (int w = Lane(); w < kStages * kTile * row_bytes() / 16; w += kWarp) {
        reinterpret_cast<Word<T>*>(memory_)[w] = Word<T>{};
      }
      __syncwarp();
    }
    const auto tile_of = [&](int t) { return kStore ? call_.tiles - 1 - t : t; };
    uint32_t labels[kLabels], next_labels[kLabels][1] = {};
    int stage = 1;
    // Ahead of the first tile, the pipeline fills.
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

  // Calls fn(word, at) for this lane's words of a tile, whose first is word 0 and lies at `at` of the sample; then
  // rest(element, at) for the elements after the last whole word.
  template <class Fn, class Rest>
  DICE_OP_DEVICE void ForEachWord(int tile, Fn&& fn, Rest&& rest) const {
    constexpr int kMost = kLanes == 1 ? (kTile * kItems / kPerWord + kWarp - 1) / kWarp : 0;  // known when compiling
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
    // rows are padded only where they are whole words, and then nothing is left
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
  // Lane l reads the label of the tile's voxel l (and l + 32). There may be no such tile.
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
        T* row = Row(stage, VoxelOf(r));  // where no voxel is: an old one, or zeros
        float z[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) z[i] = Holds(i, lane) ? Read<float>(row[i * kLanes + lane]) : -INFINITY;
        const Label label = LabelOf(row, __shfl_sync(0xffffffffu, labels[0], VoxelOf(r)));
        voxel(Classes{{}, there}, z, label, 1.0f, PlainTerms<float>(call_.terms.cross_entropy));
        if constexpr (kStore) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (there && Holds(i, lane)) row[i * kLanes + lane] = Write<T>(z[i]);
          }
        }
      }
    }
  }
  DICE_OP_DEVICE bool Holds(int i, int lane) const { return i < kSure || i * kLanes + lane < call_.classes; }
  DICE_OP_DEVICE Label LabelOf(const T* row, uint32_t label) const {
    if constexpr (kSingle) {
      const bool held = label < static_cast<uint32_t>(classes()) && label % kLanes == Lane() % kLanes;
      const int index = static_cast<int>(label);
      return {index, held ? index / kLanes : -1, held ? Read<float>(row[index]) : 0.0f};
    } else {
      return {static_cast<int>(label)};
    }
  }

  static constexpr int kWidth =  // elements at once: as many as every row is aligned for
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

// --- general ------------------------------------------------------------------------------------------

// At most kItems * kLanes classes. kDense: a label for each class, as it stands there, or made of an index.
template <class R, bool kDense, int kItems_, int kLanes_>
class General {
 public:
  using Number = R;
  using Storage = R;
  using Classes = Dealt<kItems_, kLanes_>;
  using Label = std::conditional_t<kDense, DenseLabel<R>, SingleLabel<R>>;
  static constexpr int kItems = kItems_, kLanes = kLanes_;
  static constexpr bool kSingle = !kDense, kWeighted = true;
  static constexpr int kRegisters = sizeof(R) == 8 ? 255 : kDense && kItems > 4 ? 168 : 128;
  static constexpr int kGroups = kWarp / kLanes;
  static constexpr int kRounds = kGroups == 1 ? 4 : kGroups < 8 ? 8 / kGroups : 1;
  static constexpr int kTile = kGroups * kRounds;
  // Rows of an odd number of elements start at different banks.
  DICE_OP_INLINE static constexpr int Pitch(int classes) { return classes | 1; }
  static constexpr int Bytes(int classes, int) {
    return (kDense ? 2 : 1) * kTile * Pitch(classes) * static_cast<int>(sizeof(R));
  }

  DICE_OP_DEVICE General(const Call& call, int64_t sample, char* memory)
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
        for (int i = 0; i < kItems; ++i) z[i] = Holds(i) ? row[Classes::Class(i)] : R(-INFINITY);
        const Label label = LabelOf(v, index, m, labels);
        auto terms = call_.terms.template To<R>();
        terms.masked |= count < kTile;
        voxel(Classes{}, z, label, m, terms);
        if constexpr (kStore) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (Holds(i)) row[Classes::Class(i)] = z[i];
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
  DICE_OP_DEVICE bool Holds(int i) const { return Classes::Class(i) < call_.classes; }

  // fn(place in the tile, place in the sample) for this lane's share of a tile, in the order of memory.
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
  // Half and bfloat16 are computed in float, double in double; and all of them in double where they are counted with
  // weights that are fractions.
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
  // What one-hot encoders give has a loop of its own; of the other types each element asks.
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
  // The voxel's weight, and its class if it has one: `index` stays as it is otherwise.
  DICE_OP_DEVICE R ReadVoxel(int64_t at, int* index) {
    R m = R(1);
    if (call_.weight) m = ReadNumber<R>(call_.weight, call_.weight_dtype, at);
    if (!kDense || !call_.dense_labels) {
      const auto take = [&](auto label) {
        using Wide = decltype(label);
        if (call_.options.ignore_label.given && label == static_cast<Wide>(call_.options.ignore_label.value)) {
          m = R(0);
        } else if (IsClass(label, static_cast<Wide>(call_.label_limit))) {
          if (m != R(0)) *index = static_cast<int>(label) - call_.first_class;
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
  // v: voxel of the tile; index: its class, or negative. A voxel of weight 0 has no label.
  DICE_OP_DEVICE Label LabelOf(int v, int index, R m, R* labels) {
    if constexpr (kDense) {
      if (call_.dense_labels) {
        const bool soft = call_.labels_dtype >= DType::kHalf;
        const R* row = label_tile_ + v * Pitch(call_.classes);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          labels[i] = Holds(i) && m != R(0) ? row[Classes::Class(i)] : R(0);
          bad_ |= !IsSoftLabel(labels[i], soft);
        }
      } else {
        const bool has_regions = call_.options.regions.labels > 0;
        const uint32_t regions = has_regions && index >= 0 ? call_.options.regions.classes_of[index] : 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = Classes::Class(i);
          const bool inside = has_regions ? c < call_.classes && regions >> c & 1 : index == c;
          labels[i] = inside ? R(1) : R(0);
        }
      }
      return {labels};
    } else {
      const bool held = index >= 0 && index % kLanes == Lane() % kLanes;
      return {index, held ? index / kLanes : -1, held ? tile_[v * Pitch(call_.classes) + index] : R(0)};
    }
  }

  const Call& call_;
  const int64_t offset_, voxel_offset_;
  R* const tile_;        // [kTile] rows, channels last
  R* const label_tile_;  // the same of dense labels
  // This lane's first element of a tile, and from each to the next.
  const int first_voxel_, first_class_, voxel_step_, class_step_;
  bool bad_ = false;
};

}  // namespace
}  // namespace dice_op

// How the threads of a warp come by voxels, and where gradients go. Three ways, one interface:
//
//   Direct   few classes that fill 16-byte words evenly: from memory to registers and back
//   Staged   other class counts: tiles go through shared memory, copied in 16-byte words while the
//            warp computes; above 16 classes several lanes share a voxel
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

// Integer labels, kCount at once and that kTimes, `stride` apart. Four widths serve all types: read as
// unsigned, negative ones lie beyond every class. *largest keeps the largest label seen.
template <int kCount, int kTimes>
DICE_OP_DEVICE void ReadLabels(const Call& call, int64_t at, int stride, uint32_t (*labels)[kCount],
                               uint32_t* largest) {
  const auto read = [&](auto zero) {
    using T = decltype(zero);
    const T* const from = static_cast<const T*>(call.labels) + at;
#pragma unroll
    for (int t = 0; t < kTimes; ++t) {
      const auto several = *reinterpret_cast<const Vector<T, kCount>*>(from + t * stride);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T label = several.elements[i];
        labels[t][i] = sizeof(T) == 8 && label > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(label);
        *largest = *largest < labels[t][i] ? labels[t][i] : *largest;
      }
    }
  };
  switch (call.label_bytes) {
    case 1:
      return read(uint8_t{});
    case 2:
      return read(uint16_t{});
    case 4:
      return read(uint32_t{});
    default:
      return read(uint64_t{});
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
  DICE_OP_DEVICE void Run(int64_t first, int64_t step, Voxel&& voxel, Done&& done) {
    for (int64_t t = first; t < call_.tiles; t += step) {
      const int64_t begin = (kStore ? call_.tiles - 1 - t : t) * kTile;
      if (begin + kTile <= call_.voxels) {
        Units<kStore>(begin / kVoxels + Lane(), voxel);
      } else {
        for (int64_t v = begin + Lane(); v < call_.voxels; v += kWarp) One<kStore>(v, voxel);
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
    ReadLabels<kVoxels, kUnits>(call_, voxel_offset_ + first * kVoxels, kWarp * kVoxels, labels, &largest_);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int v = 0; v < kVoxels; ++v) {
        float z[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) z[c] = Read<float>(Element(words[u], v, c));
        voxel(Classes{}, z, LabelOf(labels[u][v]), 1.0f, PlainTerms<float>(true));
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
    ReadLabels<1, 1>(call_, voxel_offset_ + v, 0, label, &largest_);
    for (int c = 0; c < kCount; ++c) z[c] = Read<float>(static_cast<const T*>(call_.logits)[at(c)]);
    voxel(Classes{}, z, LabelOf(label[0][0]), 1.0f, PlainTerms<float>(true));
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
  DICE_OP_DEVICE void Run(int64_t first, int64_t step, Voxel&& voxel, Done&& done) {
    const auto begin_of = [&](int64_t t) { return (kStore ? call_.tiles - 1 - t : t) * kTile; };
    if constexpr (kLanes > 1) {  // no NaN may stand where the last tile has no voxel
#pragma unroll 1
      for (int w = Lane(); w < kStages * kTile * row_bytes() / 16; w += kWarp) {
        reinterpret_cast<Word<T>*>(memory_)[w] = Word<T>{};
      }
      __syncwarp();
    }
    int64_t ahead = first;
    int stage = 0;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s, ahead += step) {
      if (ahead < call_.tiles) Fetch(begin_of(ahead), s);
      EndCopies();
    }
    uint32_t labels[kLabels], next_labels[kLabels];
    FetchLabels(begin_of(first), next_labels);
    for (int64_t t = first; t < call_.tiles; t += step, ahead += step) {
      WaitForCopies<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and no lane is at the stage before
      if (ahead < call_.tiles) Fetch(begin_of(ahead), stage == 0 ? kStages - 1 : stage - 1);
      EndCopies();
#pragma unroll
      for (int i = 0; i < kLabels; ++i) labels[i] = next_labels[i];
      FetchLabels(begin_of(t + step), next_labels);
      const int64_t begin = begin_of(t);
      const int64_t left = call_.voxels - begin;
      Compute<kStore>(stage, left < kTile ? static_cast<int>(left) : kTile, labels, voxel);
      if constexpr (kStore) {
        __syncwarp();  // the whole tile is computed
        Put(begin, stage);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
      done(kRounds, t + step >= call_.tiles);
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
  // Elements of the tile from `begin`, and those of them in whole words.
  DICE_OP_DEVICE int Elements(int64_t begin) const {
    const int64_t left = call_.voxels - begin;
    return static_cast<int>(left < kTile ? left : kTile) * classes();
  }
  static constexpr int kPerWord = 16 / sizeof(T);

  DICE_OP_DEVICE void Fetch(int64_t begin, int stage) {
    const T* from = logits_ + begin * classes();
    const int elements = Elements(begin), words = elements / kPerWord;
#pragma unroll 2
    for (int w = Lane(); w < words; w += kWarp) CopyWord(WordAt(stage, w), from + w * kPerWord);
    // rows are padded only where they are whole words, and then nothing is left
#pragma unroll 1
    for (int e = words * kPerWord + Lane(); e < elements; e += kWarp) Row(stage, 0)[e] = from[e];
  }
  DICE_OP_DEVICE void Put(int64_t begin, int stage) {
    T* to = d_logits_ + begin * classes();
    const int elements = Elements(begin), words = elements / kPerWord;
#pragma unroll 2
    for (int w = Lane(); w < words; w += kWarp) {
      StoreStreaming<T>(reinterpret_cast<Word<T>*>(to) + w, *reinterpret_cast<const Word<T>*>(WordAt(stage, w)));
    }
#pragma unroll 1
    for (int e = words * kPerWord + Lane(); e < elements; e += kWarp) to[e] = Row(stage, 0)[e];
  }
  // Lane l reads the label of the tile's voxel l (and l + 32). `begin` may lie outside the sample.
  DICE_OP_DEVICE void FetchLabels(int64_t begin, uint32_t* labels) {
#pragma unroll
    for (int i = 0; i < kLabels; ++i) {
      const int in_tile = i * kWarp + Lane();
      const int64_t v = begin + in_tile;
      uint32_t label[1][1] = {{UINT32_MAX}};
      if (v >= 0 && v < call_.voxels && in_tile < kTile) {
        ReadLabels<1, 1>(call_, voxel_offset_ + v, 0, label, &largest_);
      }
      labels[i] = label[0][0];
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
          voxel(Classes{}, z, LabelOf(row, labels[r]), 1.0f, terms());
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
        voxel(Classes{{}, there}, z, label, 1.0f, terms());
        if constexpr (kStore) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            if (there && Holds(i, lane)) row[i * kLanes + lane] = Write<T>(z[i]);
          }
        }
      }
    }
  }
  DICE_OP_DEVICE Terms<float> terms() const { return PlainTerms<float>(!kSingle || call_.cross_entropy); }
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
  static constexpr int kRegisters = sizeof(R) == 8 ? 255 : 128;
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
        label_tile_(tile_ + kTile * Pitch(call.classes)) {}
  DICE_OP_DEVICE bool bad() const { return bad_; }

  template <bool kStore, class Voxel, class Done>
  DICE_OP_DEVICE void Run(int64_t first, int64_t step, Voxel&& voxel, Done&& done) {
    const bool masked = call_.weight || call_.has_ignore_label;
    for (int64_t t = first; t < call_.tiles; t += step) {
      const int64_t begin = (kStore ? call_.tiles - 1 - t : t) * kTile;
      const int count = static_cast<int>(call_.voxels - begin < kTile ? call_.voxels - begin : kTile);
      __syncwarp();  // no lane is at the tile before any more
      FetchLogits(begin, count);
      if (kDense && call_.dense_labels) FetchLabels(begin, count);
      __syncwarp();
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
        voxel(Classes{}, z, label, m,
              Terms<R>{call_.squared, masked || count < kTile, call_.cross_entropy, static_cast<R>(call_.gamma),
                       static_cast<R>(call_.keep), static_cast<R>(call_.spread), static_cast<R>(call_.threshold)});
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
  template <class Fn>
  DICE_OP_DEVICE void ForEachElement(int64_t begin, int count, Fn&& fn) const {
    const bool planar = call_.planar;
    const int classes = call_.classes, pitch = Pitch(classes);
    const int64_t voxel_step = planar ? 1 : classes, class_step = planar ? call_.voxels : 1;
    int v = planar ? Lane() % kTile : Lane() / classes, c = planar ? Lane() / kTile : Lane() % classes;
#pragma unroll 2
    while (v < count && c < classes) {
      fn(v * pitch + c, (begin + v) * voxel_step + c * class_step);
      c += planar ? kWarp / kTile : kWarp % classes;
      if (!planar) {
        v += kWarp / classes;
        if (c >= classes) {
          c -= classes;
          ++v;
        }
      }
    }
  }
  // fn(Type<T>{}) with the logits' type: half and bfloat16 are computed in float, double in double.
  template <class Fn>
  DICE_OP_DEVICE void WithLogitsType(Fn&& fn) const {
    if constexpr (std::is_same_v<R, double>) {
      fn(Type<double>{});
    } else if (call_.logits_dtype == DType::kHalf) {
      fn(Type<Half>{});
    } else if (call_.logits_dtype == DType::kBFloat16) {
      fn(Type<BFloat16>{});
    } else {
      fn(Type<float>{});
    }
  }
  DICE_OP_DEVICE void FetchLogits(int64_t begin, int count) const {
    WithLogitsType([&](auto type) {
      using T = typename decltype(type)::type;
      const T* const sample = static_cast<const T*>(call_.logits) + offset_;
      ForEachElement(begin, count, [&](int to, int64_t at) { tile_[to] = Read<R>(sample[at]); });
    });
  }
  // What one-hot encoders give has a loop of its own; of the other types each element asks.
  DICE_OP_DEVICE void FetchLabels(int64_t begin, int count) const {
    const auto fetch = [&](auto read) {
      ForEachElement(begin, count, [&](int to, int64_t at) { label_tile_[to] = read(offset_ + at); });
    };
    if (call_.labels_dtype == DType::kFloat) {
      fetch([&](int64_t at) { return static_cast<R>(static_cast<const float*>(call_.labels)[at]); });
    } else if (call_.labels_dtype <= DType::kUint8) {
      fetch([&](int64_t at) { return static_cast<R>(static_cast<const uint8_t*>(call_.labels)[at]); });
    } else {
      fetch([&](int64_t at) { return ReadNumber<R>(call_.labels, call_.labels_dtype, at); });
    }
  }
  DICE_OP_DEVICE void Put(int64_t begin, int count) const {
    WithLogitsType([&](auto type) {
      using T = typename decltype(type)::type;
      T* const sample = static_cast<T*>(call_.d_logits) + offset_;
      ForEachElement(begin, count, [&](int from, int64_t at) { sample[at] = Write<T>(tile_[from]); });
    });
  }
  // The voxel's weight, and its class if it has one: `index` stays as it is otherwise.
  DICE_OP_DEVICE R ReadVoxel(int64_t at, int* index) {
    R m = R(1);
    if (call_.weight) m = ReadNumber<R>(call_.weight, call_.weight_dtype, at);
    if (!kDense || !call_.dense_labels) {
      WithType(call_.labels_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using Wide = std::conditional_t<std::is_integral_v<T>, int64_t, double>;
        const Wide label = Read<Wide>(static_cast<const T*>(call_.labels)[at]);
        if (call_.has_ignore_label && label == static_cast<Wide>(call_.ignore_label)) {
          m = R(0);
        } else if (IsClass(label, static_cast<Wide>(call_.label_limit))) {
          if (m != R(0)) *index = static_cast<int>(label) - call_.first_class;
        } else {
          bad_ = true;
        }
      });
    }
    return m;
  }
  // v: voxel of the tile; index: its class, or negative. A voxel of weight 0 has no label.
  DICE_OP_DEVICE Label LabelOf(int v, int index, R m, R* labels) {
    if constexpr (kDense) {
      const bool soft = call_.labels_dtype >= DType::kHalf;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        R t = R(0);
        if (!call_.dense_labels) {
          const int c = Classes::Class(i);
          const bool inside =
              call_.region_labels ? index >= 0 && c < call_.classes && call_.regions[index] >> c & 1 : index == c;
          t = inside ? R(1) : R(0);
        } else if (Holds(i) && m != R(0)) {
          t = label_tile_[v * Pitch(call_.classes) + Classes::Class(i)];
          bad_ |= !IsSoftLabel(t, soft);
        }
        labels[i] = t;
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
  bool bad_ = false;
};

}  // namespace
}  // namespace dice_op

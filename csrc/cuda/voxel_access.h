// How the threads of a warp read voxels and write gradients. There are four ways with one interface:
//
//   Direct   (direct.h) is for few classes that fill 16-byte words evenly: it reads from memory to registers.
//   Rows     (rows.h) is for any number of classes that is known when it is compiled: tiles are copied to shared memory
//            in 16-byte words while the warp computes, and a thread computes a voxel.
//   Staged   (staged.h) does the same for numbers of classes that are known only at run time. Above 16 classes several
//            lanes share a voxel.
//   General  (general.h) handles every type, layout, weight and option at run time, and converts tiles while reading.
//
// Such a voxel access works for one warp and one sample. Run(first, step, voxel, done) visits the tiles first,
// first + step, ... For each voxel it calls voxel(classes, z, label, m, terms), where z are the logits of the classes
// that this thread holds. With kStore, `voxel` replaces z by the gradient, and Run writes it to d_logits. It then
// visits the tiles backwards, because the kernel of the sums left the end of the sample in the cache. After each tile
// all lanes together call done(the number of this thread's voxels, whether it was the last tile).
#pragma once

#include <type_traits>

#include "core/dice_op.h"
#include "core/dtype.h"
#include "core/voxel.h"
#include "cuda/call.h"
#include "cuda/device.h"

namespace dice_op {
namespace {

using cuda::Call;
using cuda::GeneralCall;

// Distributes the classes of a voxel over kLanes neighbouring threads, in runs of kTogether: with runs of one class,
// thread c % kLanes holds class c.
template <int kItems, int kLanes, int kTogether = 1>
struct StridedClasses {
  static constexpr bool kTables = true;
  DICE_OP_DEVICE static constexpr int size() { return kItems; }
  DICE_OP_DEVICE static int Class(int i) {
    return (i / kTogether * kLanes + Lane() % kLanes) * kTogether + i % kTogether;
  }
  // The place of a class among those of its thread, which is this lane of kLanes.
  DICE_OP_DEVICE static int Item(uint32_t c) { return c / kTogether / kLanes * kTogether + c % kTogether; }
  DICE_OP_DEVICE static int LaneOf(uint32_t c) { return c / kTogether % kLanes; }
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
  template <class R>
  DICE_OP_DEVICE R Top(const R* z) const {
    return Max(Largest(*this, z));
  }
};

// Does the same if threads of the last tile may have no voxel. They must still take part in Sum and Max. Without a
// voxel, the sum that normalises the probabilities is infinite, so that all probabilities are 0. The largest logit of
// each thread is known.
template <int kItems, int kLanes, int kTogether>
struct StridedClassesIfThere : StridedClasses<kItems, kLanes, kTogether> {
  static constexpr bool kTables = false;
  bool there;
  float top;
  DICE_OP_DEVICE float Top(const float*) const { return this->Max(top); }
  template <class R>
  DICE_OP_DEVICE R Sum(R x) const {
    const R sum = StridedClasses<kItems, kLanes, kTogether>::Sum(x);
    return there ? sum : R(INFINITY);
  }
};

template <class R>
DICE_OP_DEVICE Terms<R> PlainTerms(bool cross_entropy) {
  Terms<R> terms;
  terms.cross_entropy = cross_entropy;
  return terms;
}

// --- labels and weights -------------------------------------------------------------------------------

// Reads an integer label. Four widths are enough for all types, because a negative label read as unsigned is larger
// than any class.
DICE_OP_DEVICE uint32_t ReadLabel(const Call& call, int64_t at) {
  const char* const from = static_cast<const char*>(call.labels) + at * call.label_bytes;
  if (call.label_bytes == 1) return *reinterpret_cast<const uint8_t*>(from);
  if (call.label_bytes == 2) return *reinterpret_cast<const uint16_t*>(from);
  const auto* const halves = reinterpret_cast<const uint32_t*>(from);
  return call.label_bytes == 8 && halves[1] != 0 ? UINT32_MAX : halves[0];
}

// Reads kTimes runs of kCount labels, which are `stride` apart. *largest is the largest label seen.
template <int kCount, int kTimes>
DICE_OP_DEVICE void ReadLabels(const Call& call, int64_t at, int stride, uint32_t (*labels)[kCount],
                               uint32_t* largest) {
  const auto read = [&](auto zero) {
    using T = decltype(zero);
#pragma unroll
    for (int t = 0; t < kTimes; ++t) {
      const T* const from = static_cast<const T*>(call.labels) + at + t * stride;
      const auto several = *reinterpret_cast<const Vector<T, kCount>*>(from);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const T label = several.elements[i];
        labels[t][i] = sizeof(T) == 8 && label > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(label);
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
    for (int i = 0; i < kCount; ++i) *largest = *largest < labels[t][i] ? labels[t][i] : *largest;
  }
}

}  // namespace
}  // namespace dice_op

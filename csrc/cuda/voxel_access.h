// How the threads of a warp come by voxels, and where gradients go. Three ways, one interface:
//
//   Direct   (direct.h) few classes that fill 16-byte words evenly: from memory to registers and back
//   Staged   (staged.h) other class counts: tiles go through shared memory, copied in 16-byte words while the
//            warp computes; above 16 classes, and for some below, several lanes share a voxel
//   General  (general.h) every type, layout, weight and option, at run time: tiles are converted on their way
//
// Such an access to the voxels works for one warp and one sample. Run(first, step, voxel, done) visits the tiles first,
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
struct StridedClasses {
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
struct StridedClassesIfThere : StridedClasses<kItems, kLanes> {
  bool there;
  template <class R>
  DICE_OP_DEVICE R Sum(R x) const {
    const R sum = StridedClasses<kItems, kLanes>::Sum(x);
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

}  // namespace
}  // namespace dice_op

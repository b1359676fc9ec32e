// Converts between voxels in memory, where the classes of a voxel are neighbours, and groups of W voxels with one
// register per class. core/voxel.h says why the namespace is unnamed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/dispatch.h"
#include "cpu/pack.h"

namespace dice_op {
namespace {

// These load and store kRun numbers at each of W / kRun places, which are `stride` apart.
template <int W, int kRun, class T>
DICE_OP_INLINE Stored<T, W> LoadRuns(const T* from, int64_t stride) {
  if constexpr (W == kRun) {
    return LoadStored<W>(from);
  } else {
    return Beside(LoadRuns<W / 2, kRun>(from, stride), LoadRuns<W / 2, kRun>(from + W / 2 / kRun * stride, stride),
                  std::make_integer_sequence<int, W>());
  }
}
template <int kRun, class P, class T, size_t... kPlace>
DICE_OP_INLINE void StoreRuns(P x, T* to, int64_t stride, std::index_sequence<kPlace...>) {
  (StoreOrStream<false>(Part<kPlace * kRun>(x, std::make_integer_sequence<int, kRun>()).v, to + kPlace * stride), ...);
}

// The shuffles are named as in the library Highway. kRun is the number of lanes that move together.
//
//   a = a0 a1 a2 a3, b = b0 b1 b2 b3
//   ConcatEven: a0 a2 b0 b2            ConcatOdd: a1 a3 b1 b3
//   InterleaveWholeLower: a0 b0 a1 b1  InterleaveWholeUpper: a2 b2 a3 b3
template <int kRun, int kOdd, class P, size_t... kLane>
DICE_OP_INLINE P ConcatEvenOrOdd(P a, P b, std::index_sequence<kLane...>) {
  return Shuffle<(kLane / kRun * 2 * kRun + kLane % kRun + kOdd * kRun)...>(a, b);
}
template <int kRun, class P>
DICE_OP_INLINE P ConcatEven(P a, P b) {
  return ConcatEvenOrOdd<kRun, 0>(a, b, std::make_index_sequence<P::kWidth>());
}
template <int kRun, class P>
DICE_OP_INLINE P ConcatOdd(P a, P b) {
  return ConcatEvenOrOdd<kRun, 1>(a, b, std::make_index_sequence<P::kWidth>());
}
template <int kRun, int kUpper, class P, size_t... kLane>
DICE_OP_INLINE P InterleaveWhole(P a, P b, std::index_sequence<kLane...>) {
  constexpr int W = P::kWidth;
  return Shuffle<(kLane / kRun % 2 * W + kLane / (2 * kRun) * kRun + kLane % kRun + kUpper * W / 2)...>(a, b);
}
template <int kRun, class P>
DICE_OP_INLINE P InterleaveWholeLower(P a, P b) {
  return InterleaveWhole<kRun, 0>(a, b, std::make_index_sequence<P::kWidth>());
}
template <int kRun, class P>
DICE_OP_INLINE P InterleaveWholeUpper(P a, P b) {
  return InterleaveWhole<kRun, 1>(a, b, std::make_index_sequence<P::kWidth>());
}

// These work within each block of four lanes:
//
//   InterleaveInFours<0>: a0 b0 a1 b1    InterleaveInFours<1>: a2 b2 a3 b3    (Highway's InterleaveLower and Upper)
//   ConcatInFours<0>:     a0 a1 b0 b1    ConcatInFours<1>:     a2 a3 b2 b3    (ConcatLowerLower and ConcatUpperUpper)
template <int kUpper, class P, size_t... kLane>
DICE_OP_INLINE P InterleaveInFours(P a, P b, std::index_sequence<kLane...>) {
  return Shuffle<(kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * P::kWidth + 2 * kUpper)...>(a, b);
}
template <int kUpper, class P, size_t... kLane>
DICE_OP_INLINE P ConcatInFours(P a, P b, std::index_sequence<kLane...>) {
  return Shuffle<(kLane / 4 * 4 + kLane % 2 + kLane % 4 / 2 * P::kWidth + 2 * kUpper)...>(a, b);
}
// Transposes every block of four lanes of four registers.
template <class P>
DICE_OP_INLINE void TransposeFours(P* x) {
  constexpr auto kLanes = std::make_index_sequence<P::kWidth>();
  const P low[2] = {InterleaveInFours<0>(x[0], x[1], kLanes), InterleaveInFours<0>(x[2], x[3], kLanes)};
  const P high[2] = {InterleaveInFours<1>(x[0], x[1], kLanes), InterleaveInFours<1>(x[2], x[3], kLanes)};
  x[0] = ConcatInFours<0>(low[0], low[1], kLanes);
  x[1] = ConcatInFours<1>(low[0], low[1], kLanes);
  x[2] = ConcatInFours<0>(high[0], high[1], kLanes);
  x[3] = ConcatInFours<1>(high[0], high[1], kLanes);
}

// Converts between kSide registers that hold kSide classes of W / kSide voxels each, and kSide registers that hold one
// class of W voxels each.
template <int kSide, bool kToClasses, class P>
DICE_OP_INLINE void TransposeSquare(P* x) {
  if constexpr (kSide == 8 && !kToClasses) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const P a = x[i], b = x[i + 4];
      x[i] = InterleaveWholeLower<4>(a, b);
      x[i + 4] = InterleaveWholeUpper<4>(a, b);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kSide; i += 4) TransposeFours(x + i);
  if constexpr (kSide == 8 && kToClasses) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const P a = x[i], b = x[i + 4];
      x[i] = ConcatEven<4>(a, b);
      x[i + 4] = ConcatOdd<4>(a, b);
    }
  }
}

// These say which lane of which register becomes lane i of register kWhich. There are kCount registers of W lanes.
// Strided takes number kWhich + i * kCount of all lanes side by side. Woven takes number n = kWhich * W + i of an array
// whose number n is in register n % kCount, in lane n / kCount.
template <int kWhich, int kCount, int W>
struct Strided {
  static constexpr int Register(int i) { return (kWhich + i * kCount) / W; }
  static constexpr int Lane(int i) { return (kWhich + i * kCount) % W; }
};
template <int kWhich, int kCount, int W>
struct Woven {
  static constexpr int Register(int i) { return (kWhich * W + i) % kCount; }
  static constexpr int Lane(int i) { return (kWhich * W + i) / kCount; }
};
// Gathers one register from all registers, one after the other.
template <class Pattern, int kCount, int kFrom = 1, class P, size_t... kLane>
DICE_OP_INLINE P Gathered(const P* from, P so_far, std::index_sequence<kLane...> lanes) {
  if constexpr (kFrom == kCount) {
    return so_far;
  } else {
    const auto lane = [](int i) constexpr {
      const bool first = kFrom == 1 && Pattern::Register(i) == 0;
      return Pattern::Register(i) == kFrom ? P::kWidth + Pattern::Lane(i) : first ? Pattern::Lane(i) : i;
    };
    return Gathered<Pattern, kCount, kFrom + 1>(from, Shuffle<lane(kLane)...>(so_far, from[kFrom]), lanes);
  }
}
template <template <int, int, int> class Pattern, class P, size_t... kWhich>
DICE_OP_INLINE void GatherAll(const P* x, P* y, std::index_sequence<kWhich...>) {
  constexpr int kCount = sizeof...(kWhich);
  constexpr auto kLanes = std::make_index_sequence<P::kWidth>();
  ((y[kWhich] = Gathered<Pattern<kWhich, kCount, P::kWidth>, kCount>(x, x[0], kLanes)), ...);
}

// Deinterleave turns kCount registers that hold [W, kCount] numbers of memory into one register per class. Interleave
// does the reverse. For three classes in registers of four lanes, where voxel v has the numbers av, bv, cv:
//
//   a0 b0 c0 a1 | b1 c1 a2 b2 | c2 a3 b3 c3  <->  a0 a1 a2 a3 | b0 b1 b2 b3 | c0 c1 c2 c3
template <int kCount, class P>
DICE_OP_INLINE void Deinterleave(P* x) {
  P y[kCount];
  if constexpr (kCount % 2 == 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      y[i] = ConcatEven<1>(x[2 * i], x[2 * i + 1]);
      y[kCount / 2 + i] = ConcatOdd<1>(x[2 * i], x[2 * i + 1]);
    }
    if constexpr (kCount > 2) {
      Deinterleave<kCount / 2>(y);
      Deinterleave<kCount / 2>(y + kCount / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) x[i] = y[i % 2 * kCount / 2 + i / 2];
  } else if constexpr (kCount > 1) {
    GatherAll<Strided>(x, y, std::make_index_sequence<kCount>());
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) x[i] = y[i];
  }
}
template <int kCount, class P>
DICE_OP_INLINE void Interleave(P* x) {
  P y[kCount];
  if constexpr (kCount % 2 == 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) y[i % 2 * kCount / 2 + i / 2] = x[i];
    if constexpr (kCount > 2) {
      Interleave<kCount / 2>(y);
      Interleave<kCount / 2>(y + kCount / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      x[2 * i] = InterleaveWholeLower<1>(y[i], y[kCount / 2 + i]);
      x[2 * i + 1] = InterleaveWholeUpper<1>(y[i], y[kCount / 2 + i]);
    }
  } else if constexpr (kCount > 1) {
    GatherAll<Woven>(x, y, std::make_index_sequence<kCount>());
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) x[i] = y[i];
  }
}

// Transposes groups of a few classes in registers.
template <class R, int W, bool kToGroup, bool kStream, int kCount, class From, class To>
DICE_OP_INLINE void TransposeFew(const From* from, int groups, To* to) {
  for (int g = 0; g < groups; ++g, from += W * kCount, to += W * kCount) {
    Pack<R, W> x[kCount];
    if constexpr (kToGroup && kCount == 4 && W == 8) {  // AVX2 cannot do it across its halves in one instruction
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) x[i] = FromStored<R, From>(LoadRuns<W, 4>(from + i * 4, 4 * 4));
      TransposeSquare<4, true>(x);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) x[i].Store(to + i * W);
      continue;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) x[i] = LoadAs<R, W>(from + i * W);
    if constexpr (kToGroup) {
      Deinterleave<kCount>(x);
    } else {
      Interleave<kCount>(x);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) StoreAs<kStream>(x[i], to + i * W);
  }
}

// Converts between [W, C] in memory and [C, W] in a group, kSide classes at a time. The last kSide classes may overlap
// those before.
template <class R, int W, bool kToGroup, int kSide, class From, class To>
DICE_OP_INLINE void TransposeSquares(const From* from, int classes, To* to) {
  const auto voxel = [](int i) { return i / 4 * (4 * W / kSide) + i % 4; };  // the first in register i; others 4 apart
  for (int next = 0; next < classes; next += kSide) {
    const int c = std::min(next, classes - kSide);
    Pack<R, W> x[kSide];
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) {
      if constexpr (kToGroup) {
        x[i] = FromStored<R, From>(LoadRuns<W, kSide>(from + voxel(i) * classes + c, 4 * classes));
      } else {
        x[i] = Pack<R, W>::Load(from + (c + i) * W);
      }
    }
    TransposeSquare<kSide, kToGroup>(x);
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) {
      if constexpr (kToGroup) {
        x[i].Store(to + (c + i) * W);
      } else {
        StoreRuns<kSide>(ToStored<To>(x[i]), to + voxel(i) * classes + c, 4 * classes,
                         std::make_index_sequence<W / kSide>());
      }
    }
  }
}

constexpr int kFew = 6;

// Converts between voxels in memory and groups, for up to kFew classes. With kStream it bypasses the caches, and `to`
// must be aligned to the size of a register.
template <class R, int W, bool kToGroup, bool kStream, class From, class To>
void TransposeFewGroups(const From* from, int classes, int groups, To* to) {
  WithCount<kFew>(classes, [&](auto count) {
    if constexpr (count.value) TransposeFew<R, W, kToGroup, kStream, count.value>(from, groups, to);
  });
}

// Does the same for any number of classes.
template <class R, int W, bool kToGroup, class From, class To>
__attribute__((noinline)) void Transpose(const From* from, int classes, int groups, To* to) {
  if (classes <= kFew) return TransposeFewGroups<R, W, kToGroup, false>(from, classes, groups, to);
  constexpr int kSide = std::min(W, 8);
  for (int g = 0; g < groups; ++g, from += W * classes, to += W * classes) {
    if constexpr (kSide < 4) {
      for (int c = 0; c < classes; ++c) {
        for (int v = 0; v < W; ++v) {
          const int row = v * classes + c, column = c * W + v;
          to[kToGroup ? column : row] = from[kToGroup ? row : column];
        }
      }
    } else if (classes >= kSide) {
      TransposeSquares<R, W, kToGroup, kSide>(from, classes, to);
    } else {
      TransposeSquares<R, W, kToGroup, 4>(from, classes, to);
    }
  }
}

}  // namespace
}  // namespace dice_op

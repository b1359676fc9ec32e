// Pack<T, W>: one SIMD register of W numbers, by the vector extension of GCC and Clang, with what
// core/voxel.h asks of a number. Unnamed namespace: see core/voxel.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace dice_op {
namespace {

template <class T>
struct IntFor;
template <>
struct IntFor<float> {
  using type = int32_t;
};
template <>
struct IntFor<double> {
  using type = int64_t;
};
template <>
struct IntFor<int32_t> {
  using type = int32_t;
};
template <>
struct IntFor<int64_t> {
  using type = int64_t;
};

// Apart from Pack because GCC 12 loses the attribute of a typedef inside a template it instantiates.
template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};

template <class T, int W>
struct __attribute__((may_alias)) Pack {
  static constexpr int kWidth = W;
  using Vector = typename VectorOf<T, W>::type;
  using Mask = typename VectorOf<typename IntFor<T>::type, W>::type;
  Vector v;

  Pack() = default;
  DICE_OP_INLINE explicit Pack(T x) : v(Vector{} + x) {}
  DICE_OP_INLINE explicit Pack(Vector x) : v(x) {}

  DICE_OP_INLINE static Pack Load(const T* from) {
    Pack pack;
    std::memcpy(&pack.v, from, sizeof(Vector));
    return pack;
  }
  DICE_OP_INLINE void Store(T* to) const { std::memcpy(to, &v, sizeof(Vector)); }

  DICE_OP_INLINE friend Pack operator+(Pack a, Pack b) { return Pack(a.v + b.v); }
  DICE_OP_INLINE friend Pack operator-(Pack a, Pack b) { return Pack(a.v - b.v); }
  DICE_OP_INLINE friend Pack operator*(Pack a, Pack b) { return Pack(a.v * b.v); }
  DICE_OP_INLINE friend Pack operator/(Pack a, Pack b) { return Pack(a.v / b.v); }
  DICE_OP_INLINE friend Pack operator-(Pack a) { return Pack(-a.v); }
  DICE_OP_INLINE friend Mask operator==(Pack a, T b) { return a.v == b; }
  DICE_OP_INLINE friend Mask operator!=(Pack a, Pack b) { return a.v != b.v; }
  DICE_OP_INLINE friend Mask operator<(Pack a, Pack b) { return a.v < b.v; }
  DICE_OP_INLINE friend Mask operator>(Pack a, Pack b) { return a.v > b.v; }

  DICE_OP_INLINE friend Pack Select(Mask mask, Pack a, Pack b) { return Pack(mask ? a.v : b.v); }
  // The first where it is larger, so NaN in the second stays.
  DICE_OP_INLINE friend Pack Max(Pack a, Pack b) { return Pack(a.v > b.v ? a.v : b.v); }
  DICE_OP_INLINE friend Pack Abs(Pack a) { return Pack(a.v < T(0) ? -a.v : a.v); }
};

// 2^n p(r) with x = n log 2 + r, |r| <= log(2)/2; error below 2 units in the last place. Minimax
// polynomial of the Cephes library (S. Moshier). Results under the smallest normal number are 0,
// above the largest infinity; NaN stays NaN.
template <int W>
DICE_OP_INLINE Pack<float, W> Exp(Pack<float, W> x) {
  using F = typename Pack<float, W>::Vector;
  using I = typename Pack<float, W>::Mask;
  const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  F v = x.v < -87.5f ? F{} - 87.5f : x.v;
  v = v > 88.5f ? F{} + 88.5f : v;
  const F shifted = v * 1.44269504f + magic;
  const F n = shifted - magic;
  const F r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // scale in two steps of half the exponent, which reaches both ends of the range
  const I bits = BitCast<I>(shifted) - BitCast<I>(magic);
  const I half = bits >> 1;
  const F low = BitCast<F>((half + 127) << 23), high = BitCast<F>((bits - half + 127) << 23);
  F result = p * low * high;
  result = x.v < -87.3365402f ? F{} : result;
  result = x.v > 88.7228394f ? F{} + INFINITY : result;
  return Pack<float, W>(result);
}

// log of numbers >= 0; error below 2 units in the last place (Cephes). 0 gives -infinity, numbers
// under the smallest normal one count as 0, infinity and NaN stay.
template <int W>
DICE_OP_INLINE Pack<float, W> Log(Pack<float, W> x) {
  using F = typename Pack<float, W>::Vector;
  using I = typename Pack<float, W>::Mask;
  // x = 2^n m, sqrt(1/2) <= m < sqrt(2)
  const I offset = BitCast<I>(x.v) - 0x3f3504f3;
  const I n = offset >> 23;
  const F m = BitCast<F>((offset & 0x007fffff) + 0x3f3504f3);
  const F r = m - 1.0f;
  F p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const F nf = __builtin_convertvector(n, F);
  F result = p * (r * r * r) - nf * 2.12194440e-4f - r * r * 0.5f + r + nf * 0.693359375f;
  result = x.v < 1.17549435e-38f ? F{} - INFINITY : result;
  return Pack<float, W>(x.v < INFINITY ? result : x.v);
}

// Double precision is for tests and for those who need it: one lane at a time.
template <int W>
DICE_OP_INLINE Pack<double, W> Exp(Pack<double, W> x) {
  for (int i = 0; i < W; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}
template <int W>
DICE_OP_INLINE Pack<double, W> Log(Pack<double, W> x) {
  for (int i = 0; i < W; ++i) x.v[i] = ::log(x.v[i]);
  return x;
}

template <class T, int W>
DICE_OP_INLINE Pack<T, W> ExpOfDifference(Pack<T, W> a, Pack<T, W> b) {
  return Exp(a - b);
}
template <class T, int W>
DICE_OP_INLINE Pack<T, W> ExpOfDifferenceToItself(Pack<T, W>) {
  return Pack<T, W>(T(1));
}
template <class T, int W>
DICE_OP_INLINE Pack<T, W> Reciprocal(Pack<T, W> x) {
  return Pack<T, W>(T(1)) / x;
}

// log(1 + x), exact also where 1 + x rounds: the error of the sum corrects the quotient (Kahan).
template <class T, int W>
DICE_OP_INLINE Pack<T, W> Log1p(Pack<T, W> x) {
  using P = Pack<T, W>;
  const P u = P(T(1)) + x;
  const P lost = u - P(T(1));
  return Select(lost != P(T(0)), Log(u) * (x / lost), x);
}

// Lanes of a (0 to W-1) and b (W to 2W-1).
template <int... kLanes, class T, int W>
DICE_OP_INLINE Pack<T, W> Shuffle(Pack<T, W> a, Pack<T, W> b) {
#if defined(__clang__) || __GNUC__ >= 12
  return Pack<T, W>(__builtin_shufflevector(a.v, b.v, kLanes...));
#else
  return Pack<T, W>(__builtin_shuffle(a.v, b.v, typename Pack<T, W>::Mask{kLanes...}));
#endif
}

// The sum of the lanes, in pairs, as a double.
template <class T, int W>
DICE_OP_INLINE double SumLanes(Pack<T, W> x) {
  T lanes[W];
  x.Store(lanes);
  for (int width = W / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return static_cast<double>(lanes[0]);
}

}  // namespace
}  // namespace dice_op

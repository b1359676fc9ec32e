// Pack<T, W> is one SIMD register of W numbers. It uses the vector extension of GCC and Clang, and has the functions
// that core/voxel.h needs of a number. core/voxel.h also says why the namespace is unnamed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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
struct IntFor<uint16_t> {
  using type = int16_t;
};
template <>
struct IntFor<int32_t> {
  using type = int32_t;
};
template <>
struct IntFor<int64_t> {
  using type = int64_t;
};

// This is separate from Pack because GCC 12 loses the attribute of a typedef inside a template that it instantiates.
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
  DICE_OP_INLINE explicit Pack(T x) : v(x - Vector{}) {}  // 0 + x would turn -0 into 0
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
  DICE_OP_INLINE friend Pack AddWhere(Mask mask, Pack sum, Pack x) { return Select(mask, sum + x, sum); }
  // Takes `a` only where it is larger, so that a NaN in `b` stays.
  DICE_OP_INLINE friend Pack Max(Pack a, Pack b) { return Pack(a.v > b.v ? a.v : b.v); }
  DICE_OP_INLINE friend Pack Abs(Pack a) { return Pack(a.v < T(0) ? -a.v : a.v); }
};

// Stores a value that nobody reads soon. It bypasses the caches if the processor can do so. `to` must be aligned to the
// size of the value.
template <class V>
DICE_OP_INLINE void Stream(V value, void* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), BitCast<__m512i>(value));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), BitCast<__m256i>(value));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), BitCast<__m128i>(value));
#endif
  std::memcpy(to, &value, sizeof(V));
}

// Call this after the last Stream, so that other threads see the streamed data before any data written later.
inline void FenceStreams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The numbers as they are in memory. For half and bfloat16 these are the bits.
template <class T, int W>
using Stored = Pack<std::conditional_t<std::is_arithmetic_v<T>, T, uint16_t>, W>;

template <int W, class T>
DICE_OP_INLINE Stored<T, W> LoadStored(const T* from) {
  Stored<T, W> x;
  std::memcpy(&x.v, from, sizeof(x.v));
  return x;
}
template <bool kStream, class V, class T>
DICE_OP_INLINE void StoreOrStream(V value, T* to) {
  if constexpr (kStream) {
    Stream(value, to);
  } else {
    std::memcpy(to, &value, sizeof(V));
  }
}

// Whether a register of T can be converted to R and back. Half and bfloat16 are computed in float.
template <class R, class T>
constexpr bool kTurnsInto = std::is_same_v<T, R> || (!std::is_arithmetic_v<T> && std::is_same_v<R, float>);

template <class R, class T, int W>
DICE_OP_INLINE Pack<R, W> FromStored(Stored<T, W> x) {
  static_assert(kTurnsInto<R, T>);
  if constexpr (std::is_same_v<T, R>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Wide = typename VectorOf<uint32_t, W>::type;
    return Pack<R, W>(BitCast<typename Pack<R, W>::Vector>(__builtin_convertvector(x.v, Wide) << 16));
  } else {
#if defined(__F16C__)
    if constexpr (W == 8) return Pack<R, W>(_mm256_cvtph_ps(BitCast<__m128i>(x.v)));
#endif
#if defined(__AVX512F__)
    if constexpr (W == 16) return Pack<R, W>(_mm512_cvtph_ps(BitCast<__m256i>(x.v)));
#endif
    Pack<R, W> wide;
    for (int i = 0; i < W; ++i) wide.v[i] = ToFloat(T{x.v[i]});
    return wide;
  }
}
template <class T, class R, int W>
DICE_OP_INLINE Stored<T, W> ToStored(Pack<R, W> x) {
  static_assert(kTurnsInto<R, T>);
  if constexpr (std::is_same_v<T, R>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Wide = typename VectorOf<uint32_t, W>::type;
    const Wide bits = BitCast<Wide>(x.v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Wide result = (bits & 0x7fffffff) > 0x7f800000 ? Wide{} + 0x7fc0 : rounded;
    return Stored<T, W>(__builtin_convertvector(result, typename Stored<T, W>::Vector));
  } else {
#if defined(__F16C__)
    if constexpr (W == 8)
      return Stored<T, W>(BitCast<typename Stored<T, W>::Vector>(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT)));
#endif
#if defined(__AVX512F__)
    if constexpr (W == 16)
      return Stored<T, W>(BitCast<typename Stored<T, W>::Vector>(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT)));
#endif
    Stored<T, W> narrow;
    for (int i = 0; i < W; ++i) narrow.v[i] = ToHalf(x.v[i]).bits;
    return narrow;
  }
}

// These load a register from consecutive numbers of any type in memory, and store it there.
template <class R, int W, class T>
DICE_OP_INLINE Pack<R, W> LoadAs(const T* from) {
  if constexpr (kTurnsInto<R, T>) {
    return FromStored<R, T>(LoadStored<W>(from));
  } else {
    R numbers[W];
    for (int i = 0; i < W; ++i) numbers[i] = FromStorage<T, R>(from[i]);
    return Pack<R, W>::Load(numbers);
  }
}
template <bool kStream, class R, int W, class T>
DICE_OP_INLINE void StoreAs(Pack<R, W> x, T* to) {
  StoreOrStream<kStream>(ToStored<T>(x).v, to);
}

// Writes x as n log 2 + r with |r| <= log(2)/2, and computes p = e^r by a minimax polynomial, whose relative error is
// 3e-9 before rounding.
template <int W>
struct Exponent {
  using F = typename Pack<float, W>::Vector;
  using I = typename Pack<float, W>::Mask;
  F n, p;
  I bits;  // holds n in the lowest bits

  DICE_OP_INLINE explicit Exponent(F x) {
    const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const F shifted = x * 1.44269504f + magic;
    n = shifted - magic;
    bits = BitCast<I>(shifted);
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    p = r * 1.381314451e-3f + 8.369418836e-3f;
    p = p * r + 4.166845679e-2f;
    p = p * r + 1.666651479e-1f;
    p = p * r + 4.999999305e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
  }
};

constexpr float kLogOfSmallest = -87.3365402f;  // the logarithm of the smallest normal number

// The error is below 1 unit in the last place. Results below the smallest normal number are 0, and results above the
// largest number are infinity. NaN stays NaN.
template <int W>
DICE_OP_INLINE Pack<float, W> Exp(Pack<float, W> x) {
  using F = typename Pack<float, W>::Vector;
  using I = typename Pack<float, W>::Mask;
  const Exponent<W> e((Max(Pack<float, W>(-87.5f), -Max(Pack<float, W>(-88.5f), -x))).v);
  // Scale in two steps, by half of the exponent each, to reach both ends of the range.
  const I n = e.bits - BitCast<I>(F{} + 12582912.0f), half = n >> 1;
  F result = e.p * BitCast<F>((half + 127) << 23) * BitCast<F>((n - half + 127) << 23);
  result = x.v < kLogOfSmallest ? F{} : result;
  result = x.v > 88.7228394f ? F{} + INFINITY : result;
  return Pack<float, W>(result);
}

#if defined(__AVX2__) && defined(__FMA__)
// Looks up one number per lane in a table that is one register. The lowest bits of each lane of `index` select it.
DICE_OP_INLINE __m256 LookUp(__m256 table, __m256i index) { return _mm256_permutevar8x32_ps(table, index); }
#if defined(__AVX512F__)
DICE_OP_INLINE __m512 LookUp(__m512 table, __m512i index) { return _mm512_permutexvar_ps(index, table); }
#endif

// Writes x as n log 2 + r, where n is a multiple of 1 / W. A table of W roots of 2 gives the fractional part of 2^n,
// and three terms of the series give e^r; the middle term is changed a little to make the error smallest. This takes a
// third fewer instructions than Exponent.
template <int W>
DICE_OP_INLINE Pack<float, W> ExpByTable(Pack<float, W> x) {
  using F = typename Pack<float, W>::Vector;
  using I = typename Pack<float, W>::Mask;
  using Bits = std::conditional_t<W == 16, __m512i, __m256i>;
  constexpr float kRoots[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  constexpr float kLog2 = 0.693147182f, kLargestRest = kLog2 / (2 * W);
  constexpr int kShift = W == 16 ? 19 : 20;  // 23 bits of fraction, less those of a multiple of 1 / W
  I roots;  // adding the shifted multiple to one of them leaves its whole part in the exponent
  for (int i = 0; i < W; ++i) roots[i] = BitCast<int32_t>(kRoots[i * (16 / W)]) - (i << kShift);
  const F shifted = x.v * 1.44269504f + 12582912.0f / W;  // 1.5 * 2^23 / W: adding it rounds to a multiple of 1 / W
  const F n = shifted - 12582912.0f / W;
  const F r = x.v - n * kLog2;
  const I root = BitCast<I>(LookUp(BitCast<F>(roots), BitCast<Bits>(shifted)));
  using U = typename VectorOf<uint32_t, W>::type;  // may overflow, as it does where the result is taken for 0
  const F power = BitCast<F>(BitCast<U>(root) + (BitCast<U>(shifted) << kShift));
  const F p = (r * (1.0f / 6) + (0.5f + 0.0345178f * kLargestRest * kLargestRest)) * r + 1.0f;
  return Pack<float, W>(x.v < kLogOfSmallest ? F{} : (power * r) * p + power);
}
#endif

// Computes e^x of numbers that are negative, 0 or NaN; a softmax needs no others. Results below the smallest normal
// number are 0. With the table, the error is below 2 units in the last place for x > -20, where e^x is 2e-9, and below
// 5 for smaller x. Without the table it is below 1.2.
template <int W>
DICE_OP_INLINE Pack<float, W> ExpOfNegative(Pack<float, W> x) {
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (W >= 8) return ExpByTable(x);
#endif
  using F = typename Pack<float, W>::Vector;
  using U = typename VectorOf<uint32_t, W>::type;  // may overflow, as it does where x is NaN
  const Exponent<W> e(Max(Pack<float, W>(kLogOfSmallest), x).v);
  return Pack<float, W>(x.v < kLogOfSmallest ? F{} : e.p * BitCast<F>((BitCast<U>(e.bits) << 23) + 0x3f800000));
}

// Computes the logarithm of numbers >= 0, with an error below 2 units in the last place (Cephes). 0 and numbers below
// the smallest normal number give -infinity. Infinity and NaN stay the same.
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

// Double precision is used mostly by tests, so these compute one lane at a time.
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

template <int W>
DICE_OP_INLINE Pack<double, W> ExpOfNegative(Pack<double, W> x) {
  return Exp(x);
}

template <class T, int W>
DICE_OP_INLINE Pack<T, W> ExpOfDifference(Pack<T, W> a, Pack<T, W> b) {
  return ExpOfNegative(a - b);
}
template <class T, int W>
DICE_OP_INLINE Pack<T, W> ExpOfDifferenceToItself(Pack<T, W>) {
  return Pack<T, W>(T(1));
}
template <class T, int W>
DICE_OP_INLINE Pack<T, W> Reciprocal(Pack<T, W> x) {
  return Pack<T, W>(T(1)) / x;
}

// Computes log(1 + x). It is accurate even if 1 + x rounds, because the quotient corrects the error of the sum (Kahan).
template <class T, int W>
DICE_OP_INLINE Pack<T, W> Log1p(Pack<T, W> x) {
  using P = Pack<T, W>;
  const P u = P(T(1)) + x;
  const P lost = u - P(T(1));
  return Select(lost != P(T(0)), Log(u) * (x / lost), x);
}

// Selects lanes of a (0 to W-1) and b (W to 2W-1).
template <int... kLanes, class T, int W>
DICE_OP_INLINE Pack<T, W> Shuffle(Pack<T, W> a, Pack<T, W> b) {
#if defined(__clang__) || __GNUC__ >= 12
  return Pack<T, W>(__builtin_shufflevector(a.v, b.v, kLanes...));
#else
  return Pack<T, W>(__builtin_shuffle(a.v, b.v, typename Pack<T, W>::Mask{kLanes...}));
#endif
}

// Beside joins two registers in one of twice the size. Part takes neighbouring lanes of a register, from kFirst on.
template <class T, int W, int... kLanes>
DICE_OP_INLINE Pack<T, 2 * W> Beside(Pack<T, W> low, Pack<T, W> high, std::integer_sequence<int, kLanes...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return Pack<T, 2 * W>(__builtin_shufflevector(low.v, high.v, kLanes...));
#else
  return Pack<T, 2 * W>(typename Pack<T, 2 * W>::Vector{(kLanes < W ? low.v[kLanes % W] : high.v[kLanes % W])...});
#endif
}
template <int kFirst, class T, int W, int... kLanes>
DICE_OP_INLINE Pack<T, sizeof...(kLanes)> Part(Pack<T, W> x, std::integer_sequence<int, kLanes...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return Pack<T, sizeof...(kLanes)>(__builtin_shufflevector(x.v, x.v, (kFirst + kLanes)...));
#else
  return Pack<T, sizeof...(kLanes)>(typename Pack<T, sizeof...(kLanes)>::Vector{x.v[kFirst + kLanes]...});
#endif
}

// Adds the lanes in pairs and returns the sum as a double.
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

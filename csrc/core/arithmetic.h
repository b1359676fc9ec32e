// The arithmetic of plain numbers that voxel.h needs. A CUDA thread computes with it; cpu/pack.h has the same for SIMD
// registers. The inline PTX has a plain form beside it.
#pragma once

#include <cmath>

#include "core/inline.h"

namespace dice_op {
namespace {

template <class T>
DICE_OP_DEVICE T Select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
template <class T>
DICE_OP_DEVICE T AddWhere(bool condition, T sum, T x) {
  if (condition) sum = sum + x;
  return sum;
}
DICE_OP_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
DICE_OP_DEVICE double Max(double a, double b) { return fmax(a, b); }
DICE_OP_DEVICE float Abs(float x) { return fabsf(x); }
DICE_OP_DEVICE double Abs(double x) { return fabs(x); }
DICE_OP_DEVICE float Log(float x) { return logf(x); }
DICE_OP_OUTLINED double Log(double x) { return log(x); }
DICE_OP_DEVICE float Log1p(float x) { return log1pf(x); }
DICE_OP_OUTLINED double Log1p(double x) { return log1p(x); }

constexpr float kLog2E = 1.4426950408889634f;

// This is one instruction, with an error below 2 units in the last place. Subnormal results become 0.
DICE_OP_DEVICE float Exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
DICE_OP_DEVICE float Exp(float x) { return Exp2(x * kLog2E); }
DICE_OP_OUTLINED double Exp(double x) { return exp(x); }

// This uses one fused multiply-add. The rounding error of b * log2(e) is a factor close to one, the same for all
// classes, so it cancels when the exponentials are normalised.
DICE_OP_DEVICE float ExpOfDifference(float a, float b) { return Exp2(fmaf(a, kLog2E, -(b * kLog2E))); }
DICE_OP_DEVICE double ExpOfDifference(double a, double b) { return Exp(a - b); }
DICE_OP_DEVICE float ExpOfDifferenceToItself(float a) { return ExpOfDifference(a, a); }
DICE_OP_DEVICE double ExpOfDifferenceToItself(double) { return 1; }

// This is one instruction, with an error of one unit in the last place.
DICE_OP_DEVICE float Reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
DICE_OP_DEVICE double Reciprocal(double x) { return 1 / x; }

}  // namespace
}  // namespace dice_op

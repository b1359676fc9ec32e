// How functions are inlined, and for which processor nvcc compiles them.
#pragma once

#ifdef __CUDACC__
#define DICE_OP_INLINE __host__ __device__ __forceinline__
#define DICE_OP_DEVICE __device__ __forceinline__
#define DICE_OP_OUTLINED __device__ __noinline__  // compiled once per kernel, not at every use
#define DICE_OP_UNROLL _Pragma("unroll")          // else the arrays of a thread are not kept in registers
#else
#define DICE_OP_INLINE inline __attribute__((always_inline))
#define DICE_OP_DEVICE inline __attribute__((always_inline))
#define DICE_OP_OUTLINED inline
#define DICE_OP_UNROLL
#endif

// Declares a small function that is always inlined. nvcc compiles it for the host and for the device.
#pragma once

#ifdef __CUDACC__
#define DICE_OP_INLINE __host__ __device__ __forceinline__
#else
#define DICE_OP_INLINE inline __attribute__((always_inline))
#endif

// How a small function is compiled for the host, and by nvcc for the device as well.
#pragma once

#ifdef __CUDACC__
#define DICE_OP_INLINE __host__ __device__ __forceinline__
#else
#define DICE_OP_INLINE inline __attribute__((always_inline))
#endif

// The rest of CUDA's runtime, for benchmarks/gpu/device.cu on the emulator. All calls are synchronous. A graph holds
// nothing, because what is captured runs at once, so that the time of its launch means nothing.
#ifndef CUDA_EMULATOR_CUDA_RUNTIME_H_
#define CUDA_EMULATOR_CUDA_RUNTIME_H_

#include <chrono>

#include "cuda_emulator.h"

namespace cuda_emulator {
constexpr size_t kMemory = size_t{5} << 28;  // what the device claims to have, all of it free
using Clock = std::chrono::steady_clock;
}  // namespace cuda_emulator

using cudaEvent_t = cuda_emulator::Clock::time_point*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
using cudaMemPool_t = struct CUmemPoolHandle_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
enum cudaMemPoolAttr { cudaMemPoolAttrUsedMemHigh = 8 };
constexpr unsigned cudaStreamNonBlocking = 1;

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static char any_address;  // a stream is no more than a number
  *stream = reinterpret_cast<cudaStream_t>(&any_address);
  return cudaSuccess;
}

inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = cuda_emulator::kMemory;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}
// Nobody counts what other libraries allocate.
inline cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new cuda_emulator::Clock::time_point;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = cuda_emulator::Clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::max(1e-6f, std::chrono::duration<float, std::milli>(*to - *from).count());
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  cuda_emulator::capturing = true;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  cuda_emulator::capturing = false;
  *graph = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
  *executable = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

#endif  // CUDA_EMULATOR_CUDA_RUNTIME_H_

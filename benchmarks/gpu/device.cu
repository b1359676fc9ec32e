// Lets device.py use a GPU without a framework: its memory, events and graphs. It also measures how fast the GPU
// copies and reads 16-byte words, with which the kernels are compared.
//
// All work goes to one stream. Functions return 0, or a cudaError_t for which gpu_error returns a message.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#define GPU_EXPORT extern "C" __attribute__((visibility("default")))
#define GPU_RETURN_IF_ERROR(expression)                                             \
  do {                                                                              \
    if (const cudaError_t error = (expression); error != cudaSuccess) return error; \
  } while (false)

namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // how many loads of a thread do not wait for each other
cudaStream_t stream = nullptr;
unsigned long long* counter = nullptr;  // 8 bytes on the device

__global__ void __launch_bounds__(kThreads) CopyKernel(uint4* to, const uint4* from, int64_t words) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  for (; i + (kInFlight - 1) * step < words; i += kInFlight * step) {
    uint4 word[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) word[k] = from[i + k * step];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) to[i + k * step] = word[k];
  }
  for (; i < words; i += step) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads) ReadKernel(const uint4* from, int64_t words, unsigned long long* sink) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  unsigned bits = 0;
  for (; i + (kInFlight - 1) * step < words; i += kInFlight * step) {
    uint4 word[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) word[k] = from[i + k * step];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) bits |= word[k].x & word[k].y & word[k].z & word[k].w;
  }
  for (; i < words; i += step) bits |= from[i].x & from[i].y & from[i].z & from[i].w;
  // The data of the caller never sets all bits. The compiler does not know this, so it keeps the loads.
  if (bits == ~0u) *sink = bits;
}

__global__ void __launch_bounds__(kThreads)
    CountKernel(const unsigned char* data, int64_t period, int64_t bytes, unsigned long long* count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned long long mismatches = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i + period < bytes; i += step) {
    mismatches += data[i] != data[i + period];
  }
  if (mismatches) atomicAdd(count, mismatches);
}

// Launches a kernel on the stream. Other compilers than nvcc call the emulator of tests/kernels/cuda_emulator.
template <class... P, class... A>
int Launch(void (*kernel)(P...), int blocks, A... arguments) {
#ifdef __CUDACC__
  kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
#else
  cuda_emulator::Launch(kernel, dim3(blocks), dim3(kThreads), 0, stream, arguments...);
#endif
  return cudaGetLastError();
}

}  // namespace

GPU_EXPORT const char* gpu_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Fills `about` with the multiprocessors, bytes of L2, 10 * major + minor, and versions of driver and runtime.
GPU_EXPORT int gpu_open(int about[5]) {
  GPU_RETURN_IF_ERROR(cudaSetDevice(0));
  int major = 0, minor = 0;
  GPU_RETURN_IF_ERROR(cudaDeviceGetAttribute(&about[0], cudaDevAttrMultiProcessorCount, 0));
  GPU_RETURN_IF_ERROR(cudaDeviceGetAttribute(&about[1], cudaDevAttrL2CacheSize, 0));
  GPU_RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  GPU_RETURN_IF_ERROR(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  about[2] = 10 * major + minor;
  GPU_RETURN_IF_ERROR(cudaDriverGetVersion(&about[3]));
  GPU_RETURN_IF_ERROR(cudaRuntimeGetVersion(&about[4]));
  if (!stream) GPU_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  if (!counter) GPU_RETURN_IF_ERROR(cudaMalloc(&counter, sizeof(*counter)));
  return cudaSuccess;
}

GPU_EXPORT uint64_t gpu_stream() { return reinterpret_cast<uint64_t>(stream); }
GPU_EXPORT int gpu_synchronize() { return cudaStreamSynchronize(stream); }

// --- memory -------------------------------------------------------------------------------------------

GPU_EXPORT int gpu_memory(uint64_t about[2]) {  // the free bytes and all bytes
  size_t free = 0, total = 0;
  GPU_RETURN_IF_ERROR(cudaMemGetInfo(&free, &total));
  about[0] = free;
  about[1] = total;
  return cudaSuccess;
}

GPU_EXPORT int gpu_allocate(uint64_t bytes, void** memory) {
  const cudaError_t error = cudaMalloc(memory, bytes);
  if (error != cudaSuccess) cudaGetLastError();  // Later calls must not report this error.
  return error;
}
GPU_EXPORT int gpu_release(void* memory) { return cudaFree(memory); }

GPU_EXPORT int gpu_copy_bytes(void* to, const void* from, uint64_t bytes) {  // in any direction
  GPU_RETURN_IF_ERROR(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  return cudaStreamSynchronize(stream);
}

GPU_EXPORT int gpu_fill(void* to, int byte, uint64_t bytes) { return cudaMemsetAsync(to, byte, bytes, stream); }

// Repeats the first `period` bytes until they fill all `bytes`.
GPU_EXPORT int gpu_repeat(void* data, uint64_t period, uint64_t bytes) {
  char* const start = static_cast<char*>(data);
  for (uint64_t done = period; done < bytes; done *= 2) {
    const uint64_t more = std::min(done, bytes - done);
    GPU_RETURN_IF_ERROR(cudaMemcpyAsync(start + done, start, more, cudaMemcpyDeviceToDevice, stream));
  }
  return cudaSuccess;
}

// Counts the bytes that differ from those one period before.
GPU_EXPORT int gpu_mismatches(const void* data, uint64_t period, uint64_t bytes, uint64_t* count) {
  GPU_RETURN_IF_ERROR(cudaMemsetAsync(counter, 0, sizeof(*counter), stream));
  const int error = Launch(CountKernel, 4096, static_cast<const unsigned char*>(data), static_cast<int64_t>(period),
                           static_cast<int64_t>(bytes), counter);
  if (error != cudaSuccess) return error;
  return gpu_copy_bytes(count, counter, sizeof(*count));
}

// Returns the peak use of the memory pool of cudaMallocAsync since the last reset.
GPU_EXPORT int gpu_pool_peak(uint64_t* bytes, int reset) {
  cudaMemPool_t pool = nullptr;
  GPU_RETURN_IF_ERROR(cudaDeviceGetDefaultMemPool(&pool, 0));
  GPU_RETURN_IF_ERROR(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemHigh, bytes));
  uint64_t zero = 0;
  return reset ? cudaMemPoolSetAttribute(pool, cudaMemPoolAttrUsedMemHigh, &zero) : cudaSuccess;
}

// --- time -----------------------------------------------------------------------------------------------

GPU_EXPORT int gpu_event(void** event) { return cudaEventCreate(reinterpret_cast<cudaEvent_t*>(event)); }
GPU_EXPORT int gpu_record(void* event) { return cudaEventRecord(static_cast<cudaEvent_t>(event), stream); }
GPU_EXPORT int gpu_elapsed(void* from, void* to, float* milliseconds) {
  return cudaEventElapsedTime(milliseconds, static_cast<cudaEvent_t>(from), static_cast<cudaEvent_t>(to));
}

GPU_EXPORT int gpu_capture() { return cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed); }

GPU_EXPORT int gpu_end_capture(void** executable) {
  cudaGraph_t graph = nullptr;
  GPU_RETURN_IF_ERROR(cudaStreamEndCapture(stream, &graph));
  const cudaError_t error = cudaGraphInstantiateWithFlags(reinterpret_cast<cudaGraphExec_t*>(executable), graph, 0);
  cudaGraphDestroy(graph);
  return error;
}

GPU_EXPORT int gpu_replay(void* executable) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable), stream);
}
GPU_EXPORT int gpu_drop_graph(void* executable) {
  return cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable));
}

GPU_EXPORT int gpu_copy_words(void* to, const void* from, uint64_t words, int blocks) {
  return Launch(CopyKernel, blocks, static_cast<uint4*>(to), static_cast<const uint4*>(from),
                static_cast<int64_t>(words));
}

GPU_EXPORT int gpu_read_words(const void* from, uint64_t words, int blocks) {
  return Launch(ReadKernel, blocks, static_cast<const uint4*>(from), static_cast<int64_t>(words), counter);
}

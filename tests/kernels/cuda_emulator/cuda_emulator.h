// Runs CUDA kernels on a CPU, to test them where there is no GPU. Kernel sources include this file instead of the
// CUDA headers and are compiled by g++ or clang++ as C++17; cuda_emulator.cc is the engine to link with.
//
// Every CUDA thread is a fibre on one CPU thread. Collectives are checked: a broken rule prints one line that starts
// with "cuda_emulator: ERROR: " and exits with status 66. Shared memory starts as NaN. The order of the threads is
// chosen by the environment, and a correct kernel gives the same bits in each:
//   CUDA_EMULATOR_ORDER     forward (default) | reverse | random (switches also at atomics, fences and waits)
//   CUDA_EMULATOR_SEED      seed of the random order (default 1)
//   CUDA_EMULATOR_RESIDENT  blocks alive at once in random order (default 4; the other orders have one)
//   CUDA_EMULATOR_SMS       multiprocessors that the device claims to have (default 3)
//   CUDA_EMULATOR_HELD      blocks that each of them claims to hold at once (default 2)
// Kernels compiled with -fsanitize=thread are checked for races by CUDA's rules: only __syncthreads, __syncwarp and
// fence + atomic + fence order memory. A fence counts for the atomics between it and the thread's next barrier. Race
// reports reach back about 250 threads, so keep grid x block of such a test below that.
//
// Not covered: inline PTX, TMA, cooperative groups, blocks that wait for one another outside the random order, values
// that weak memory would give (missing order is seen by the thread sanitizer only), the rounding of FMA and of fast
// intrinsics, registers and other limits (see tests/kernels/test_launches.py), real concurrency of streams (all calls
// are synchronous).
#ifndef CUDA_EMULATOR_H_
#define CUDA_EMULATOR_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// Vector types: the alignment is CUDA's, so that the undefined-behaviour sanitizer sees a misaligned vector access.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  constexpr dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
  unsigned x, y, z;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Written by the engine whenever it switches threads.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emulator {

constexpr size_t kMaxSharedBytes = 64 * 1024;      // of a block that opted in: what the smallest GPUs have
constexpr size_t kDefaultSharedBytes = 48 * 1024;  // without cudaFuncSetAttribute

// Where a collective was called: as a default argument it is the place of the outermost call.
struct Site {
  Site(const char* its_file = __builtin_FILE(), int its_line = __builtin_LINE()) : file(its_file), line(its_line) {}
  const char* file;
  int line;
};

// If `observer` is set, it is told what a launcher asks for. Kernels then do not run, and no limit is checked.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void SetAttribute(const void* kernel, int attribute, int value) = 0;
  virtual void Launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) = 0;
};
extern Observer* observer;

// If `chosen` is set, a launch runs only these of its blocks, in their order: block (x, y, z) has the number
// x + y * gridDim.x + z * gridDim.x * gridDim.y. So a test can look at single blocks of a launch that has millions.
extern const std::vector<unsigned>* chosen;

// The engine's side (cuda_emulator.cc, compiled without sanitizers). Whatever touches the memory of a kernel is
// inline in this header instead, for the sanitizers to see it.
namespace internal {
enum class WarpOp { kSync, kBallot, kAny, kAll, kShfl, kShflXor, kShflDown, kShflUp };
enum class Scope { kNone, kBlock, kDevice };
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
void Run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
void AllowShared(const void* kernel, size_t bytes);
void Barrier(Site site);
uint64_t Warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site);
unsigned ActiveMask();
void Fence(Scope scope);
void BeforeAtomic(), AfterAtomic(const void* address);
void* StaticShared(const void* key, size_t bytes);
void QueueCopy(void* to, const void* from, int bytes, Site site);
void CommitCopies();
void YieldInRandomOrder();
constexpr int kAll = -1;
bool NextCopy(int groups_to_keep, Copy* copy);  // the oldest copy that has to be complete

template <class T>
uint64_t ToBits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a value of 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T FromBits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T Shuffle(WarpOp op, unsigned mask, T value, int argument, int width, Site site) {
  return FromBits<T>(Warp(op, mask, ToBits(value), argument, width, site));
}

// CUDA's atomics are relaxed: they order no other memory without fences.
template <class T, class F>
__forceinline__ T Atomic(T* address, F new_value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics have 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  BeforeAtomic();
  Bits* const bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, static_cast<Bits>(ToBits(T(new_value(FromBits<T>(old))))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  AfterAtomic(address);
  return FromBits<T>(old);
}
template <class T>
using Same = std::common_type_t<T>;  // not deduced, so that atomicAdd(&unsigned_value, 1) compiles as in CUDA

__forceinline__ void CompleteCopies(int groups_to_keep) {
  for (Copy copy; NextCopy(groups_to_keep, &copy);) {
    for (int i = 0; i < copy.bytes / 4; ++i)
      static_cast<unsigned*>(copy.to)[i] = static_cast<const unsigned*>(copy.from)[i];
  }
}
}  // namespace internal

// Dynamic shared memory of the block: bytes as given to Launch, aligned to 16.
void* DynamicShared();

// Static shared memory, `__shared__ T name[n]`.
#define CUDA_EMULATOR_SHARED(T, name, n)   \
  static const char name##_shared_key = 0; \
  T(&name)[n] = *static_cast<T(*)[n]>(::cuda_emulator::internal::StaticShared(&name##_shared_key, sizeof(T) * (n)))

// cp.async of 4 or 16 bytes. The data arrive as late as is allowed, in the WaitGroup that completes them; until then
// the destination holds NaN.
template <int kBytes>
__forceinline__ void CopyAsync(void* shared, const void* global, Site site = {}) {
  internal::QueueCopy(shared, global, kBytes, site);
  const volatile unsigned* const source = static_cast<const volatile unsigned*>(global);
  static_cast<void>(source[0]);  // a bad source is best reported here, where the kernel names it
  static_cast<void>(source[kBytes / 4 - 1]);
  for (int i = 0; i < kBytes / 4; ++i) static_cast<unsigned*>(shared)[i] = ~0u;
}
inline void CommitGroup() { internal::CommitCopies(); }
// All but the newest n groups of this thread are complete. Other threads see that after a barrier only.
__forceinline__ void WaitGroup(int n) {
  internal::CompleteCopies(n);
  internal::YieldInRandomOrder();
}

}  // namespace cuda_emulator

// Collectives, fences, atomics.
inline void __syncthreads(cuda_emulator::Site site = {}) { cuda_emulator::internal::Barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, cuda_emulator::Site site = {}) {
  cuda_emulator::internal::Warp(cuda_emulator::internal::WarpOp::kSync, mask, 0, 0, 32, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_emulator::Site site = {}) {
  using namespace cuda_emulator::internal;
  return static_cast<unsigned>(Warp(WarpOp::kBallot, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, cuda_emulator::Site site = {}) {
  using namespace cuda_emulator::internal;
  return static_cast<int>(Warp(WarpOp::kAny, mask, predicate != 0, 0, 32, site));
}
inline int __all_sync(unsigned mask, int predicate, cuda_emulator::Site site = {}) {
  using namespace cuda_emulator::internal;
  return static_cast<int>(Warp(WarpOp::kAll, mask, predicate != 0, 0, 32, site));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, cuda_emulator::Site site = {}) {
  return cuda_emulator::internal::Shuffle(cuda_emulator::internal::WarpOp::kShfl, mask, value, lane, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, cuda_emulator::Site site = {}) {
  return cuda_emulator::internal::Shuffle(cuda_emulator::internal::WarpOp::kShflXor, mask, value, lanes, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, cuda_emulator::Site site = {}) {
  return cuda_emulator::internal::Shuffle(cuda_emulator::internal::WarpOp::kShflDown, mask, value, delta, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, cuda_emulator::Site site = {}) {
  return cuda_emulator::internal::Shuffle(cuda_emulator::internal::WarpOp::kShflUp, mask, value, delta, width, site);
}
inline unsigned __activemask() { return cuda_emulator::internal::ActiveMask(); }
inline void __threadfence() { cuda_emulator::internal::Fence(cuda_emulator::internal::Scope::kDevice); }
inline void __threadfence_block() { cuda_emulator::internal::Fence(cuda_emulator::internal::Scope::kBlock); }

template <class T>
__forceinline__ T atomicAdd(T* address, cuda_emulator::internal::Same<T> value) {
  return cuda_emulator::internal::Atomic(address, [=](T old) { return old + value; });
}
template <class T>
__forceinline__ T atomicMin(T* address, cuda_emulator::internal::Same<T> value) {
  return cuda_emulator::internal::Atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
__forceinline__ T atomicMax(T* address, cuda_emulator::internal::Same<T> value) {
  return cuda_emulator::internal::Atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
__forceinline__ T atomicExch(T* address, cuda_emulator::internal::Same<T> value) {
  return cuda_emulator::internal::Atomic(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, cuda_emulator::internal::Same<T> compare,
                            cuda_emulator::internal::Same<T> value) {
  return cuda_emulator::internal::Atomic(address, [=](T old) { return old == compare ? value : old; });
}
__forceinline__ unsigned atomicInc(unsigned* address, unsigned last) {
  return cuda_emulator::internal::Atomic(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}

// Intrinsics. Macros where the C library declares a function of the same name.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(cuda_emulator::internal::ToBits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::internal::FromBits<float>(x); }
using std::max;
using std::min;
template <class T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
template <class T>
__forceinline__ T __ldcs(const T* address) {
  return *address;
}
template <class T>
__forceinline__ T __ldcg(const T* address) {
  return *address;
}
template <class T>
__forceinline__ void __stcs(T* address, cuda_emulator::internal::Same<T> value) {
  *address = value;
}

// The part of the runtime API that a launcher needs. Device memory is host memory.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
using cudaStream_t = struct CUstream_st*;

namespace cuda_emulator {

inline int calls = 0;                         // of the runtime so far
inline int failing_call = 0;                  // the number of the call that fails
inline int blocks = 0;                        // of device memory that nobody has released
inline cudaError_t last_error = cudaSuccess;  // stays until somebody asks for it

// What a call of the runtime returns. If it is an error, the call must do nothing.
inline cudaError_t Outcome(cudaError_t error = cudaSuccess) {
  if (++calls == failing_call) error = cudaErrorMemoryAllocation;
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cuda_emulator

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorMemoryAllocation ? "out of memory" : "an error";
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulator::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return cuda_emulator::last_error; }
inline cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = cuda_emulator::Outcome()) return error;
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  if (const cudaError_t error = cuda_emulator::Outcome()) return error;
  const char* const multiprocessors = getenv("CUDA_EMULATOR_SMS");
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(cuda_emulator::kDefaultSharedBytes);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors ? atoi(multiprocessors) : 3;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 16 * 1024;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:  // of the GPUs with as much shared memory
      *value = 7;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 5;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_emulator::kMaxSharedBytes);
      return cudaSuccess;
  }
  return cuda_emulator::Outcome(cudaErrorInvalidValue);
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  const auto address = reinterpret_cast<const void*>(kernel);
  if (cuda_emulator::observer) {
    cuda_emulator::observer->SetAttribute(address, attribute, value);
    return cudaSuccess;
  }
  const bool is_size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  const bool refused = is_size && (value < 0 || static_cast<size_t>(value) > cuda_emulator::kMaxSharedBytes);
  if (const auto error = cuda_emulator::Outcome(refused ? cudaErrorInvalidValue : cudaSuccess)) return error;
  if (is_size) cuda_emulator::internal::AllowShared(address, value);
  return cudaSuccess;
}
// With CUDA_EMULATOR_NEW_GPU there is no code for the kernel that is asked for first, but for the next one.
inline bool HasCode() {
  static const bool new_gpu = getenv("CUDA_EMULATOR_NEW_GPU") != nullptr;
  static int queries = 0;
  return !new_gpu || queries++ % 2;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int /*threads*/, size_t) {
  const char* const held = getenv("CUDA_EMULATOR_HELD");
  *blocks = held ? atoi(held) : 2;
  return cuda_emulator::Outcome(HasCode() ? cudaSuccess : cudaErrorNoKernelImageForDevice);
}
template <class T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  if (const cudaError_t error = cuda_emulator::Outcome()) return error;
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) return cuda_emulator::Outcome(cudaErrorMemoryAllocation);
  *address = static_cast<T*>(memset(memory, 0xff, bytes));
  ++cuda_emulator::blocks;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  if (const cudaError_t error = cuda_emulator::Outcome()) return error;
  cuda_emulator::blocks -= address != nullptr;
  free(address);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMallocAsync(T** address, size_t bytes, cudaStream_t) {
  return cudaMalloc(address, bytes);
}
inline cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (const cudaError_t error = cuda_emulator::Outcome()) return error;
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t = nullptr) {
  if (const cudaError_t error = cuda_emulator::Outcome()) return error;
  memset(address, value, bytes);
  return cudaSuccess;
}
namespace cuda_emulator {
inline bool capturing = false;  // whether a stream records a graph
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cuda_emulator::Outcome(cuda_emulator::capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

namespace cuda_emulator {

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...)
template <class... P, class... A>
cudaError_t Launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... arguments) {
  if (const cudaError_t error = Outcome()) return error;
  const std::tuple<P...> parameters(static_cast<P>(std::forward<A>(arguments))...);
  internal::Run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] {
    std::apply(kernel, parameters);
    internal::CompleteCopies(internal::kAll);  // copies nobody waited for land in the end
  });
  return cudaSuccess;
}

}  // namespace cuda_emulator

#endif  // CUDA_EMULATOR_H_

// The features of a CUDA device that the kernels use: memory in 16-byte words, asynchronous copies, and sums over a
// warp. nvcc compiles them for GPUs. With any other compiler the same kernels run on the CPU: the tests provide an
// emulator of CUDA's execution model, and all inline PTX here has a plain C++ form beside it.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/inline.h"

namespace dice_op {
namespace {

constexpr int kWarp = 32;

// --- elements in memory -------------------------------------------------------------------------------

template <class R, class T>
DICE_OP_DEVICE R Read(T value) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Half>) return static_cast<R>(__half2float(__ushort_as_half(value.bits)));
#endif
  return FromStorage<T, R>(value);
}

// Either type of 16 bits. Which of them it is, a kernel asks once for several elements.
struct AnyFloat16 {
  uint16_t bits;
};
template <class T>
DICE_OP_DEVICE float ReadEither(T value, bool is_half) {
  if constexpr (std::is_same_v<T, AnyFloat16>) {
    return is_half ? Read<float>(Half{value.bits}) : Read<float>(BFloat16{value.bits});
  } else {
    return Read<float>(value);
  }
}

// Reads element `at` of an array whose type is known only at run time.
template <class R>
DICE_OP_DEVICE R ReadNumber(const void* from, DType dtype, int64_t at) {
  return WithType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return Read<R>(static_cast<const T*>(from)[at]);
  });
}

template <class T, class R>
DICE_OP_DEVICE T Write(R value) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Half>) return {__half_as_ushort(__float2half_rn(static_cast<float>(value)))};
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)))};
  }
#endif
  return ToStorage<T>(value);
}

template <class T>
DICE_OP_DEVICE T WriteEither(float value, bool is_half) {
  if constexpr (std::is_same_v<T, AnyFloat16>) {
    return {is_half ? Write<Half>(value).bits : Write<BFloat16>(value).bits};
  } else {
    return Write<T>(value);
  }
}

// Elements that are moved together, by one load or store instruction if they take at most 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  T elements[kCount];
};

// What memory is read and written in: 16 bytes.
using Word = Vector<uint32_t, 4>;

// Stores data that this kernel will not read again, so that other data stay in the cache.
DICE_OP_DEVICE void StoreStreaming(Word* to, const Word& word) {
#ifdef __CUDA_ARCH__
  __stcs(reinterpret_cast<uint4*>(to), BitCast<uint4>(word));
#else
  *to = word;
#endif
}

// The maxima of two pairs of elements of 16 bits. As in fmaxf, a NaN is no maximum.
template <class T>
DICE_OP_DEVICE uint32_t MaxOfPairs(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  using Pair = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;
  return BitCast<uint32_t>(__hmax2(BitCast<Pair>(a), BitCast<Pair>(b)));
#else
  uint32_t pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const T x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    pair |= static_cast<uint32_t>((ToFloat(x) >= ToFloat(y) || ToFloat(y) != ToFloat(y) ? x : y).bits) << shift;
  }
  return pair;
#endif
}

// Calls fn(Type<T>{}), with the type that it is if T is either of two.
template <class T, class Fn>
DICE_OP_DEVICE void AsType(bool is_half, Fn&& fn) {
  if constexpr (!std::is_same_v<T, AnyFloat16>) {
    fn(Type<T>{});
  } else if (is_half) {
    fn(Type<Half>{});
  } else {
    fn(Type<BFloat16>{});
  }
}

// Elements in registers, in parts of 32 bits. All indices must be known when the kernel is compiled. Elements of 16
// bits are converted in pairs, which takes half the instructions.
template <class T, int kParts>
struct Elements {
  static constexpr int kPerPart = 4 / sizeof(T);
  uint32_t parts[kParts];

  // Reads or gives kRun parts at a time, from part `first` on.
  template <int kRun>
  DICE_OP_DEVICE void Read(int first, const Vector<uint32_t, kRun>& from) {
    const Vector<uint32_t, kRun> run = from;  // one instruction, which is not split
#pragma unroll
    for (int i = 0; i < kRun; ++i) parts[first + i] = run.elements[i];
  }
  template <int kRun>
  DICE_OP_DEVICE Vector<uint32_t, kRun> Run(int first) const {
    Vector<uint32_t, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.elements[i] = parts[first + i];
    return run;
  }

  template <class As = T>
  DICE_OP_DEVICE float Get(int i) const {
    const uint32_t part = parts[i / kPerPart];
    if constexpr (sizeof(As) == 4) {
      return BitCast<float>(part);
    } else if constexpr (std::is_same_v<As, BFloat16>) {
      return BitCast<float>(i % 2 ? part & 0xffff0000u : part << 16);
    } else {
#ifdef __CUDA_ARCH__
      const auto pair = BitCast<__half2>(part);
      return i % 2 ? __high2float(pair) : __low2float(pair);
#else
      return ToFloat(Half{static_cast<uint16_t>(i % 2 ? part >> 16 : part)});
#endif
    }
  }
  // The second element of a pair must be set after the first.
  template <class As = T>
  DICE_OP_DEVICE void Set(int i, float value) {
    uint32_t& part = parts[i / kPerPart];
    part = sizeof(T) == 4 || i % 2 == 0 ? BitCast<uint32_t>(value) : Pair<As>(BitCast<float>(part), value);
  }
  // All of them.
  DICE_OP_DEVICE void ToFloats(bool is_half, float* values) const {
    AsType<T>(is_half, [&](auto type) { ToFloatsAs<typename decltype(type)::type>(values); });
  }
  // Returns also the largest of them. Elements of 16 bits are compared in pairs.
  DICE_OP_DEVICE float ToFloatsAndLargest(bool is_half, float* values) const {
    float largest;
    AsType<T>(is_half, [&](auto type) {
      using As = typename decltype(type)::type;
      ToFloatsAs<As>(values);
      if constexpr (sizeof(T) == 4) {
        largest = values[0];
#pragma unroll
        for (int i = 1; i < kParts; ++i) largest = fmaxf(largest, values[i]);
      } else {
        Elements<As, 1> pair;
        pair.parts[0] = parts[0];
#pragma unroll
        for (int p = 1; p < kParts; ++p) pair.parts[0] = MaxOfPairs<As>(pair.parts[0], parts[p]);
        largest = fmaxf(pair.Get(0), pair.Get(1));
      }
    });
    return largest;
  }
  DICE_OP_DEVICE void FromFloats(bool is_half, const float* values) {
    AsType<T>(is_half, [&](auto type) {
#pragma unroll
      for (int i = 0; i < kParts * kPerPart; ++i) Set<typename decltype(type)::type>(i, values[i]);
    });
  }

 private:
  template <class As>
  DICE_OP_DEVICE void ToFloatsAs(float* values) const {
#pragma unroll
    for (int i = 0; i < kParts * kPerPart; ++i) values[i] = Get<As>(i);
  }
  template <class As>
  DICE_OP_DEVICE static uint32_t Pair(float low, float high) {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<As, Half>) return BitCast<uint32_t>(__floats2half2_rn(low, high));
    if constexpr (std::is_same_v<As, BFloat16>) return BitCast<uint32_t>(__floats2bfloat162_rn(low, high));
#endif
    if constexpr (sizeof(As) == 2) return Write<As>(low).bits | static_cast<uint32_t>(Write<As>(high).bits) << 16;
    return 0;  // is not called
  }
};

// --- shared memory and asynchronous copies --------------------------------------------------------------

#ifdef __CUDACC__
extern __shared__ uint4 dice_op_shared_memory[];
DICE_OP_DEVICE char* SharedMemory() { return reinterpret_cast<char*>(dice_op_shared_memory); }
#else
inline char* SharedMemory() { return static_cast<char*>(cuda_emulator::DynamicShared()); }
#endif

// Starts a copy of 16 bytes from global to shared memory. This thread can read them there after WaitForCopies.
DICE_OP_DEVICE void CopyWord(void* shared, const void* global) {
#if !defined(__CUDACC__)
  cuda_emulator::CopyAsync<16>(shared, global);
#elif __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#elif defined(__CUDA_ARCH__)  // Turing has no asynchronous copies
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Does the same with 4 bytes, which may be anywhere.
DICE_OP_DEVICE void CopyNumber(float* shared, const float* global) {
#if !defined(__CUDACC__)
  cuda_emulator::CopyAsync<4>(shared, global);
#elif __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
#elif defined(__CUDA_ARCH__)
  *shared = *global;
#endif
}

// Ends a group of copies.
DICE_OP_DEVICE void EndCopies() {
#if !defined(__CUDACC__)
  cuda_emulator::CommitGroup();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all of this thread's groups of copies have finished, except for the newest kPending groups.
template <int kPending>
DICE_OP_DEVICE void WaitForCopies() {
#if !defined(__CUDACC__)
  cuda_emulator::WaitGroup(kPending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// --- the launch -------------------------------------------------------------------------------------------

template <class Argument>
cudaError_t Launch(void (*kernel)(Argument), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   Argument argument) {
#ifdef __CUDACC__
  void* arguments[] = {&argument};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(threads), arguments, shared_bytes,
                          stream);
#else
  return cuda_emulator::Launch(kernel, blocks, dim3(threads), shared_bytes, stream, argument);
#endif
}

// --- the warp ---------------------------------------------------------------------------------------------

DICE_OP_DEVICE int Lane() { return threadIdx.x % kWarp; }

template <class R>
DICE_OP_DEVICE R FromPartner(R x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}

// Adds up kCount values, each over the lanes of a warp whose numbers are equal modulo kLanes, and distributes the sums
// over these lanes. After Add, a lane for which IsOwner() is true holds the sums of the values First(), First() + 1,
// ... in the first kHeld elements of `values`, as far as these numbers are less than kCount. `values` has kPadded
// elements, and those from kCount on must be zero.
//
// Each step halves the number of values: two partners exchange halves, and each keeps one. This takes about kCount
// shuffles in all. Adding up one value after the other would take five times as many.
template <int kLanes, int kCount>
struct LaneSums {
  static constexpr int PowerOfTwo(int count) { return count <= 1 ? 1 : 2 * PowerOfTwo((count + 1) / 2); }
  static constexpr int kGroups = kWarp / kLanes, kPadded = PowerOfTwo(kCount);
  static constexpr int kHeld = kPadded > kGroups ? kPadded / kGroups : 1;
  static constexpr int kSharers = kPadded < kGroups ? kGroups / kPadded : 1;  // the first of them is the owner

  DICE_OP_DEVICE static int First() { return Lane() / kLanes / kSharers * kHeld; }
  DICE_OP_DEVICE static bool IsOwner() { return Lane() / kLanes % kSharers == 0; }

  template <int kDistance = kWarp / 2, int kLeft = kPadded, class R>
  DICE_OP_DEVICE static void Add(R* values) {
    if constexpr (kDistance >= kLanes) {
      const bool upper = Lane() & kDistance;
      if constexpr (kLeft == 1) {
        values[0] = values[0] + FromPartner(values[0], kDistance);
      } else {
#pragma unroll
        for (int i = 0; i < kLeft / 2; ++i) {
          const R low = values[i], high = values[i + kLeft / 2];
          values[i] = (upper ? high : low) + FromPartner(upper ? low : high, kDistance);
        }
      }
      Add<kDistance / 2, (kLeft + 1) / 2>(values);
    }
  }
};

}  // namespace
}  // namespace dice_op

// Correct kernels that use all of the emulator; prints a digest of what they compute, which is the same in every
// order. The tests also break single lines of this file and look whether the emulator notices.
#include <cstdio>

#include "cuda_emulator.h"

constexpr int kThreads = 64, kBlocks = 3, kTiles = 16;  // grid x block is small enough for the thread sanitizer
constexpr unsigned kFullMask = 0xffffffffu;

// Tree reduction of a block in static shared memory.
__global__ void __launch_bounds__(kThreads) TreeSum(const float* __restrict__ in, float* __restrict__ out) {
  CUDA_EMULATOR_SHARED(float, tree, kThreads);
  const int t = threadIdx.x;
  const int first = blockIdx.x * kThreads;
  tree[t] = in[first + t];
  __syncthreads();  // the tree is filled
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) tree[t] += tree[t + half];
    __syncthreads();  // this level is done
  }
  if (t == 0) out[blockIdx.x] = tree[0];
}

// Butterfly of a warp.
__global__ void WarpSum(const float* in, float* out) {
  float sum = in[blockIdx.x * kThreads + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, lanes);
  }
  if (threadIdx.x % 32 == 0) out[blockIdx.x * (kThreads / 32) + threadIdx.x / 32] = sum;
}

// Every warp copies its tiles of 32 float4, each mirrored, through a ring of two stages.
__global__ void MirrorTiles(const float4* in, float4* out, int tiles) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * (kThreads / 32);
  float4* const ring = static_cast<float4*>(cuda_emulator::DynamicShared()) + threadIdx.x / 32 * 64;
  int stage = 0;
  int tile = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (tile < tiles) cuda_emulator::CopyAsync<16>(&ring[lane], &in[tile * 32 + lane]);
  cuda_emulator::CommitGroup();
  for (; tile < tiles; tile += warps) {
    const int next = tile + warps;
    if (next < tiles) cuda_emulator::CopyAsync<16>(&ring[(1 - stage) * 32 + lane], &in[next * 32 + lane]);
    cuda_emulator::CommitGroup();  // without a copy too, to keep count
    cuda_emulator::WaitGroup(1);
    __syncwarp();  // the copies of all lanes are there
    __stcs(&out[tile * 32 + lane], ring[stage * 32 + 31 - lane]);
    __syncwarp();  // the stage is free
    stage = 1 - stage;
  }
}

// Every block adds up its share, the last one to finish adds up the blocks. All in a fixed order.
__global__ void TicketSum(const float* in, int n, float* partial, unsigned* ticket, float* total) {
  CUDA_EMULATOR_SHARED(float, shares, kThreads);
  CUDA_EMULATOR_SHARED(bool, is_last, 1);
  float share = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) share += in[i];
  shares[threadIdx.x] = share;
  __syncthreads();  // the shares are written
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += shares[i];
    partial[blockIdx.x] = sum;
    __threadfence();  // the partial sum before the ticket
    const unsigned number = atomicAdd(ticket, 1);
    __threadfence();  // the ticket before the others' partial sums
    is_last[0] = number == gridDim.x - 1;
  }
  __syncthreads();  // is_last is written
  if (!is_last[0] || threadIdx.x != 0) return;
  for (unsigned b = 0; b < gridDim.x; ++b) total[0] += __ldcg(&partial[b]);
}

// The rest: one number per thread, and atomics.
__global__ void Others(unsigned* out, int* extremes, unsigned* counters) {
  const unsigned t = threadIdx.x, lane = t % 32;
  unsigned bits = __ballot_sync(kFullMask, lane % 3 == 0);
  bits = bits * 31 + __popc(bits) + __ffs(bits) + __clz(t);
  bits = bits * 31 + __shfl_sync(kFullMask, t, lane + 1, 8);
  bits = bits * 31 + __shfl_up_sync(kFullMask, t, 3);
  bits = bits * 31 + __shfl_down_sync(kFullMask, t, 3, 8);
  bits = bits * 31 + __any_sync(kFullMask, t == 40) + 2 * __all_sync(kFullMask, t < 32);
  // Half warps on their own; 40 threads make a warp of 8, and lanes that do not exist may be named.
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  bits = bits * 31 + __ballot_sync(mask, lane & 1) + (__activemask() >> lane & 1);
  out[blockIdx.x * blockDim.x + t] = bits;
  atomicMin(&extremes[0], static_cast<int>(bits % 1000));
  atomicMax(&extremes[1], static_cast<int>(bits % 1000));
  atomicInc(&counters[0], 6);
  // One block gets the lock and publishes.
  if (t == 0 && atomicCAS(&counters[1], 0, 1) == 0) {
    __threadfence();
    counters[2] = 5;
    __threadfence();
    atomicExch(&counters[1], 2);
  }
}

template <class T>
struct Array {
  explicit Array(size_t n, T value = T{}) : n(n) {
    if (cudaMalloc(&data, n * sizeof(T)) != cudaSuccess) abort();
    for (size_t i = 0; i < n; ++i) data[i] = value;
  }
  ~Array() { cudaFree(data); }
  size_t n;
  T* data;
};

template <class T>
void AddToDigest(const Array<T>& array, uint64_t* digest) {
  const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(array.data);
  for (size_t i = 0; i < array.n * sizeof(T); ++i) *digest = (*digest ^ bytes[i]) * 1099511628211u;
}

int main() {
  using cuda_emulator::Launch;
  const int n = kTiles * 32 * 4;
  Array<float4> in(kTiles * 32), mirrored(kTiles * 32);
  Array<float> values(kBlocks * kThreads);  // nothing behind what the sums read
  unsigned random = 1;
  float* const floats = &in.data[0].x;
  for (int i = 0; i < n; ++i) {
    random = random * 1664525u + 1013904223u;
    floats[i] = static_cast<float>(random >> 8) / 3e6f;
  }
  memcpy(values.data, in.data, values.n * sizeof(float));
  bool good = true;

  Array<float> sums(kBlocks), warp_sums(kBlocks * (kThreads / 32));
  Launch(TreeSum, kBlocks, kThreads, 0, nullptr, values.data, sums.data);
  Launch(WarpSum, kBlocks, kThreads, 0, nullptr, values.data, warp_sums.data);
  for (int b = 0; b < kBlocks; ++b) {
    float sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += warp_sums.data[b * (kThreads / 32) + w];
    good &= std::fabs(sums.data[b] - sum) < 1e-5f * sum;
  }

  Launch(MirrorTiles, kBlocks, kThreads, kThreads / 32 * 64 * sizeof(float4), nullptr, in.data, mirrored.data, kTiles);
  for (int i = 0; i < kTiles * 32; ++i) good &= mirrored.data[i].x == in.data[i / 32 * 32 + 31 - i % 32].x;

  Array<float> partial(kBlocks), total(1);
  Array<unsigned> ticket(1);
  Launch(TicketSum, kBlocks, kThreads, 0, nullptr, floats, n, partial.data, ticket.data, total.data);
  double expected = 0;
  for (int i = 0; i < n; ++i) expected += floats[i];
  good &= std::fabs(total.data[0] - expected) < 1e-5 * expected;

  Array<unsigned> bits(2 * 40), counters(3);
  Array<int> extremes(2, 500);
  Launch(Others, 2, 40, 0, nullptr, bits.data, extremes.data, counters.data);
  good &= counters.data[0] == 2 * 40 % 7 && counters.data[1] == 2 && counters.data[2] == 5;

  uint64_t digest = 14695981039346656037u;
  AddToDigest(sums, &digest);
  AddToDigest(warp_sums, &digest);
  AddToDigest(mirrored, &digest);
  AddToDigest(total, &digest);
  AddToDigest(bits, &digest);
  AddToDigest(extremes, &digest);
  AddToDigest(counters, &digest);
  printf("digest %016llx\n", static_cast<unsigned long long>(digest));
  if (!good) printf("WRONG\n");
  return good ? 0 : 1;
}

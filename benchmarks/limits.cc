// Measures what memory allows: how fast `threads` threads read an array, and how fast they read one array while they
// write another. It also measures how fast they compute, which shows whether other programs use the processors.
// machine.py compiles this file for the machine's own processor, and calls it through ctypes.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Words = uint64_t __attribute__((vector_size(64)));

uint64_t Read(const Words* from, size_t count) {
  Words sums[4] = {};
  for (size_t i = 0; i + 4 <= count; i += 4) {
    for (size_t j = 0; j < 4; ++j) sums[j] += from[i + j];
  }
  const Words sum = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += sum[i];
  return total;
}

// Stores past the caches, because nothing reads the copy again.
void Copy(const Words* from, Words* to, size_t count) {
#if defined(__x86_64__)
  const __m128i* source = reinterpret_cast<const __m128i*>(from);
  __m128i* target = reinterpret_cast<__m128i*>(to);
  for (size_t i = 0; i < count * 4; ++i) _mm_stream_si128(target + i, _mm_load_si128(source + i));
  _mm_sfence();
#else
  std::memcpy(to, from, count * sizeof(Words));
#endif
}

// Fills the arithmetic units of a processor, so that it takes longer if another thread shares the processor.
float Compute(int rounds) {
  using Numbers = float __attribute__((vector_size(64)));
  Numbers x[12];  // They differ, because a compiler would compute equal ones only once.
  for (int i = 0; i < 12; ++i) x[i] = Numbers{} + static_cast<float>(i);
  for (int i = 0; i < rounds; ++i) {
    for (Numbers& y : x) y = y * 0.5f + 1.0f;
  }
  float total = 0;
  for (const Numbers& y : x) total += y[0];
  return total;
}

// Returns the seconds that `work` takes in `threads` threads at once.
template <class Work>
double SecondsOf(int threads, const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Returns the seconds that a fixed piece of arithmetic takes in `threads` threads at once (some milliseconds).
extern "C" double ComputeSeconds(int threads) {
  static std::atomic<float> keep;
  return SecondsOf(threads, [] { keep = Compute(1'000'000); });
}

// Returns the seconds that one pass over `bytes` bytes takes. If `to` is null, it only reads. `bytes` and the addresses
// are multiples of 64.
extern "C" double Seconds(const void* from, void* to, size_t bytes, int threads) {
  static std::atomic<uint64_t> keep;
  const size_t count = bytes / sizeof(Words), block = 1 << 10;
  std::atomic<size_t> next{0};
  return SecondsOf(threads, [&] {
    for (size_t i; (i = next.fetch_add(block)) < count;) {
      const size_t length = i + block < count ? block : count - i;
      const auto* source = static_cast<const Words*>(from) + i;
      if (to) {
        Copy(source, static_cast<Words*>(to) + i, length);
      } else {
        keep += Read(source, length);
      }
    }
  });
}

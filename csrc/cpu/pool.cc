// Distributes the blocks of a call over a framework's thread pool, and brings exceptions of its threads to the caller.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include "core/dice_op.h"

namespace dice_op {
namespace cpu {

void ParallelFor::RunThrowing(int64_t count, int64_t cost, Body body, void* context) const {
  struct Call {
    Body body;
    void* context;
    std::atomic_flag has_thrown = ATOMIC_FLAG_INIT;
    std::exception_ptr exception = nullptr;
  } call{body, context};
  const auto catching = [](void* context, int64_t begin, int64_t end) {
    Call& call = *static_cast<Call*>(context);
    try {
      call.body(call.context, begin, end);
    } catch (...) {
      if (!call.has_thrown.test_and_set()) call.exception = std::current_exception();
    }
  };
  Run(count, cost, catching, &call);
  if (call.exception) std::rethrow_exception(call.exception);
}

void PoolParallelFor::Run(int64_t count, int64_t cost, Body body, void* context) const noexcept {
  struct Work {
    int64_t count, tasks;
    Body body;
    void* context;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable idle;
    int helping = 0;
    bool finished = false;

    // Takes long runs of blocks first, because neighbours in memory are best left to one thread, and short runs at the
    // end, so that all threads finish at about the same time.
    void Help() noexcept {
      for (int64_t begin = next.load(); begin < count;) {
        const int64_t end = begin + std::max<int64_t>(1, (count - begin) / (2 * tasks));
        if (!next.compare_exchange_weak(begin, end)) continue;
        body(context, begin, end);
        begin = next.load();
      }
    }
  };
  constexpr int64_t kWorthATask = 20'000;  // nanoseconds
  const int64_t tasks = std::min({threads(), count, count * cost / kWorthATask});
  if (tasks <= 1) return body(context, 0, count);
  std::shared_ptr<Work> work;
  try {
    work = std::make_shared<Work>();
    work->count = count;
    work->tasks = tasks;
    work->body = body;
    work->context = context;
    for (int64_t i = 1; i < tasks; ++i) {
      Schedule([work] {
        {
          const std::lock_guard<std::mutex> lock(work->mutex);
          if (work->finished) return;
          ++work->helping;
        }
        work->Help();
        const std::lock_guard<std::mutex> lock(work->mutex);
        if (--work->helping == 0) work->idle.notify_one();
      });
    }
  } catch (const std::exception&) {  // no memory to ask for more help, or no thread
    if (!work) return body(context, 0, count);
  }
  work->Help();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished = true;
  work->idle.wait(lock, [&] { return work->helping == 0; });
}

}  // namespace cpu
}  // namespace dice_op

// Calls XLA's handlers (csrc/xla) as XLA would, XLA itself being a stand-in, and prints what they do.
// tests/front_ends/test_xla.py compiles and reads it.
//
//   run_handlers traits          of each handler, as registered and as it says itself
//   run_handlers cuda PLACE      sums and gradient by the CUDA kernels on the emulator; a label that is no class
//                                stands at that place (-1: nowhere), which gives an error
//   run_handlers host POOL [N]   how the CPU's work is shared out, N times: over threads, by a pool that runs a task
//                                at once (inline), on threads, on threads that start one after the other, some of
//                                them after the call (staggered), or only after the call (late)
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "core/dice_op.h"
#include "cuda/call.h"
#include "no_machine_code.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace dice_op {
// In place of the CPU kernels: work that counts how often each of its blocks is done.
namespace cpu {
constexpr int kBlocks = 100;
std::atomic<int> done[kBlocks];

void Work(const ParallelFor& parallel, int64_t cost) {
  volatile bool waits = true;  // volatile, as compilers leave out what they think nobody reads
  const auto body = [](void* context, int64_t begin, int64_t end) {
    const auto check = [&] {
      if (!*static_cast<volatile bool*>(context)) std::abort();  // the caller has left already
    };
    check();
    for (int64_t i = begin; i < end; ++i) ++done[i];
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    check();
  };
  parallel.Run(kBlocks, cost, body, const_cast<bool*>(&waits));
  waits = false;
}

size_t DiceSumsWorkspace(const Problem&) { return 0; }
Error DiceSums(const Problem&, const Sums&, void*, const ParallelFor& parallel) {
  Work(parallel, 1'000'000);
  return {};
}
void DiceSumsGrad(const Problem&, const SumsGrad&, const ParallelFor& parallel) { Work(parallel, 1); }  // not worth it
}  // namespace cpu

namespace {

constexpr int64_t kBatch = 2, kVoxels = 1003, kClasses = 4;

// --- XLA ----------------------------------------------------------------------------------------------

enum class Pool { kInline, kThreads, kStaggered, kLate } pool;
int scheduled = 0;
std::vector<XLA_FFI_ThreadPool_Schedule_Args> late;
std::vector<std::thread> threads;

XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
  api.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
    args->stream = nullptr;
    return nullptr;
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = 3;
    return nullptr;
  };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    ++scheduled;
    if (pool == Pool::kInline) args->task(args->data);
    if (pool == Pool::kThreads) threads.emplace_back(args->task, args->data);
    if (pool == Pool::kStaggered) {
      threads.emplace_back([task = args->task, data = args->data, delay = std::rand() % 20'000] {
        std::this_thread::sleep_for(std::chrono::microseconds(delay));  // the work takes 10 ms of one thread
        task(data);
      });
    }
    if (pool == Pool::kLate) late.push_back(*args);
    return nullptr;
  };
  return api;
}
const XLA_FFI_Api api = MakeApi();

XLA_FFI_ByteSpan SpanOf(const char* text) { return {text, std::strlen(text)}; }

// Memory of an operand or result, as long as its shape says and not a byte longer.
struct Buffer {
  std::vector<int64_t> dims;
  std::vector<char> bytes;
  XLA_FFI_Buffer header = {};

  Buffer(XLA_FFI_DataType dtype, size_t size, std::vector<int64_t> shape) : dims(std::move(shape)) {
    for (int64_t dim : dims) size *= dim;
    bytes.resize(size);
    header.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    header.dtype = dtype;
    header.data = bytes.data();
    header.rank = dims.size();
    header.dims = dims.data();
  }
  Buffer(const Buffer&) = delete;
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
  void Print() {
    for (size_t i = 0; i < bytes.size() / sizeof(float); ++i) std::printf("%.9g ", floats()[i]);
    std::printf("\n");
  }
};

struct Floats : Buffer {
  explicit Floats(std::vector<int64_t> shape) : Buffer(XLA_FFI_DataType_F32, sizeof(float), std::move(shape)) {}
};

// The options as attributes, as XLA keeps them: sorted by name.
struct Attributes {
  struct One {
    std::string text;
    double number = 0;
    bool boolean = false;
    XLA_FFI_ByteSpan span = {};
    XLA_FFI_Scalar scalar = {};
    XLA_FFI_Array array = {XLA_FFI_DataType_S64, 0, nullptr};
    XLA_FFI_AttrType type = XLA_FFI_AttrType_ARRAY;
    void* value = &array;
    XLA_FFI_ByteSpan name = {};

    void Set(const std::string& given) {
      text = given;
      span = SpanOf(text.c_str());
      type = XLA_FFI_AttrType_STRING, value = &span;
    }
    void Set(double given) {
      number = given;
      scalar = {XLA_FFI_DataType_F64, &number};
      type = XLA_FFI_AttrType_SCALAR, value = &scalar;
    }
    void Set(bool given) {
      boolean = given;
      scalar = {XLA_FFI_DataType_PRED, &boolean};
      type = XLA_FFI_AttrType_SCALAR, value = &scalar;
    }
    void Set(const std::vector<int64_t>&) {}  // none
    void Set(const std::vector<float>&) { array.dtype = XLA_FFI_DataType_F32; }
  };
  std::map<std::string, One> all;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<XLA_FFI_AttrType> types;
  std::vector<void*> values;
  Attributes() {
    Options options;
    options.cross_entropy = true;
    ForEachOption([&](const auto& option) { all[option.attribute].Set(ToAttribute(options.*option.value)); });
    for (auto& [name, one] : all) {
      one.name = SpanOf(name.c_str());
      names.push_back(&one.name);
      types.push_back(one.type);
      values.push_back(one.value);
    }
  }
  XLA_FFI_Attrs View() {
    return {XLA_FFI_Attrs_STRUCT_SIZE,
            nullptr,
            static_cast<int64_t>(names.size()),
            types.data(),
            names.data(),
            values.data()};
  }
};

XLA_FFI_CallFrame MakeFrame() {
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  return frame;
}

XLA_FFI_Handler* FunctionOf(const ffi::Handler& handler) {
  return reinterpret_cast<XLA_FFI_Handler*>(handler.function);
}

void Call(const char* platform, const char* target, std::vector<Buffer*> operands, std::vector<Buffer*> results) {
  std::vector<XLA_FFI_ArgType> arg_types(operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(results.size(), XLA_FFI_RetType_BUFFER);
  std::vector<void*> args, rets;
  for (Buffer* buffer : operands) args.push_back(&buffer->header);
  for (Buffer* buffer : results) rets.push_back(&buffer->header);
  Attributes attributes;
  XLA_FFI_CallFrame frame = MakeFrame();
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = attributes.View();
  const auto& handlers = ffi::Handlers();
  const auto handler = std::find_if(handlers.begin(), handlers.end(), [&](const ffi::Handler& h) {
    return std::string(h.platform) == platform && std::string(h.target) == target;
  });
  if (XLA_FFI_Error* const error = FunctionOf(*handler)(&frame)) {
    std::printf("%s\n", error->message.c_str());
    std::exit(0);
  }
}

// --- what to run ----------------------------------------------------------------------------------------

void PrintTraits() {
  for (const ffi::Handler& handler : ffi::Handlers()) {
    XLA_FFI_Metadata metadata = {};
    metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
    XLA_FFI_Metadata_Extension extension = {};
    extension.extension_base = {XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr};
    extension.metadata = &metadata;
    XLA_FFI_CallFrame frame = MakeFrame();
    frame.extension_start = &extension.extension_base;
    if (FunctionOf(handler)(&frame)) std::abort();
    std::printf("%s %s %u %u\n", handler.platform, handler.target, handler.traits, metadata.traits);
  }
}

void RunBoth(const char* platform, int64_t place, void (*after_sums)(), void (*after_gradient)()) {
  Floats logits({kBatch, kVoxels, kClasses});
  for (int64_t i = 0; i < kBatch * kVoxels * kClasses; ++i) logits.floats()[i] = (i * 7919 % 1000 - 500) / 128.f;
  Buffer labels(XLA_FFI_DataType_U8, 1, {kBatch, kVoxels});
  for (int64_t i = 0; i < kBatch * kVoxels; ++i) labels.bytes[i] = i * 31 % 7 % kClasses;
  if (place >= 0) labels.bytes[place] = 9;

  Problem problem;
  problem.batch = kBatch;
  problem.voxels = kVoxels;
  problem.classes = kClasses;
  size_t bytes = 0;
  if (ffi::DiceSumsWorkspace(problem, platform, &bytes)) std::abort();
  const std::vector<int64_t> shape = {kBatch, kClasses};
  Floats intersection(shape), pred_sum(shape), label_sum(shape), cross_entropy(shape), weight_sum({kBatch}),
      none({kBatch, 0});
  Buffer workspace(XLA_FFI_DataType_U8, 1, {static_cast<int64_t>(bytes)});
  Call(platform, "dice_op_sums", {&logits, &labels},
       {&intersection, &pred_sum, &label_sum, &cross_entropy, &none, &none, &none, &weight_sum, &workspace});
  after_sums();
  Floats gradient({kBatch, kVoxels, kClasses});  // with the sums as coefficients
  Call(platform, "dice_op_sums_grad", {&logits, &labels, &intersection, &pred_sum, &cross_entropy, &none, &none},
       {&gradient});
  after_gradient();
  if (std::string(platform) == "Host") return;
  for (Buffer* sums : {&intersection, &pred_sum, &label_sum, &cross_entropy, &weight_sum}) sums->Print();
  gradient.Print();
}

// Prints how many tasks there were, and the least and most often that a block was done.
void PrintWork() {
  for (std::thread& thread : threads) thread.join();
  threads.clear();
  for (const auto& args : late) args.task(args.data);
  late.clear();
  const auto [least, most] = std::minmax_element(std::begin(cpu::done), std::end(cpu::done));
  std::printf("%d %d %d\n", scheduled, least->load(), most->load());
  scheduled = 0;
  for (auto& count : cpu::done) count = 0;
}

}  // namespace
}  // namespace dice_op

int main(int argc, char** argv) {
  using namespace dice_op;
  const std::string what = argc > 1 ? argv[1] : "", how = argc > 2 ? argv[2] : "";
  if (what == "traits") {
    PrintTraits();
  } else if (what == "cuda") {
    RunBoth("CUDA", std::atoll(how.c_str()), [] {}, [] {});
  } else if (what == "host") {
    pool = how == "inline"      ? Pool::kInline
           : how == "threads"   ? Pool::kThreads
           : how == "staggered" ? Pool::kStaggered
                                : Pool::kLate;
    for (int i = 0; i < (argc > 3 ? std::atoi(argv[3]) : 1); ++i) RunBoth("Host", -1, PrintWork, PrintWork);
  }
}

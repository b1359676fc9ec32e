// Calls XLA's handlers for CUDA (csrc/xla) as XLA would, with the kernels on the emulator, and prints what they
// give: the sums, then the gradient; or the error. tests/test_xla.py compiles and reads it.
//
//   run_handlers PLACE    a label that is no class stands at that place; -1: nowhere
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/dice_op.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace dice_op {
namespace cpu {  // not reached
size_t DiceSumsWorkspace(const Problem&) { std::abort(); }
BadLabel DiceSums(const Problem&, const Sums&, void*, const ParallelFor&) { std::abort(); }
void DiceSumsGrad(const Problem&, const SumsGrad&, const ParallelFor&) { std::abort(); }
}  // namespace cpu
namespace cuda {
const char* Archs() { return "emulated"; }
}  // namespace cuda

namespace {

constexpr int64_t kBatch = 2, kVoxels = 1003, kClasses = 4;

XLA_FFI_ByteSpan SpanOf(const char* text) { return {text, std::strlen(text)}; }

// Memory of an operand or result, as long as its shape says and not a byte longer.
struct Buffer {
  XLA_FFI_Buffer header = {};
  std::vector<int64_t> dims;
  std::vector<char> bytes;

  Buffer(XLA_FFI_DataType dtype, size_t size, std::vector<int64_t> shape) : dims(std::move(shape)) {
    for (int64_t dim : dims) size *= dim;
    bytes.resize(size);
    header.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    header.dtype = dtype;
    header.data = bytes.data();
    header.rank = dims.size();
    header.dims = dims.data();
  }
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
  void Print() {
    for (size_t i = 0; i < bytes.size() / sizeof(float); ++i) std::printf("%.9g ", floats()[i]);
    std::printf("\n");
  }
};

Buffer Floats(std::vector<int64_t> shape) { return Buffer(XLA_FFI_DataType_F32, sizeof(float), std::move(shape)); }

// As XLA keeps them: sorted by name.
struct Attributes {
  bool cross_entropy = true, squared = false;
  float gamma = 0;
  XLA_FFI_ByteSpan activation = SpanOf("softmax"), data_format = SpanOf("channels_last");
  XLA_FFI_Scalar f32 = {XLA_FFI_DataType_F32, &gamma}, first = {XLA_FFI_DataType_PRED, &squared},
                 second = {XLA_FFI_DataType_PRED, &cross_entropy};
  XLA_FFI_Array ignored = {XLA_FFI_DataType_S64, 0, nullptr};
  XLA_FFI_ByteSpan names[6] = {SpanOf("activation"),   SpanOf("data_format"),  SpanOf("focal_gamma"),
                               SpanOf("ignore_label"), SpanOf("squared_pred"), SpanOf("with_cross_entropy")};
  XLA_FFI_ByteSpan* name_pointers[6];
  void* values[6] = {&activation, &data_format, &f32, &ignored, &first, &second};
  XLA_FFI_AttrType types[6] = {XLA_FFI_AttrType_STRING, XLA_FFI_AttrType_STRING, XLA_FFI_AttrType_SCALAR,
                               XLA_FFI_AttrType_ARRAY,  XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_SCALAR};
  Attributes() {
    for (int i = 0; i < 6; ++i) name_pointers[i] = &names[i];
  }
};

void Call(const char* target, std::vector<Buffer*> operands, std::vector<Buffer*> results) {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
  api.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
    args->stream = nullptr;
    return nullptr;
  };
  std::vector<XLA_FFI_ArgType> arg_types(operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(results.size(), XLA_FFI_RetType_BUFFER);
  std::vector<void*> args, rets;
  for (Buffer* buffer : operands) args.push_back(&buffer->header);
  for (Buffer* buffer : results) rets.push_back(&buffer->header);
  Attributes attributes;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 6, attributes.types, attributes.name_pointers, attributes.values};
  const auto& handlers = ffi::Handlers();
  const auto handler = std::find_if(handlers.begin(), handlers.end(), [&](const ffi::Handler& h) {
    return std::string(h.platform) == "CUDA" && std::string(h.target) == target;
  });
  if (XLA_FFI_Error* const error = reinterpret_cast<XLA_FFI_Handler*>(handler->function)(&frame)) {
    std::printf("%s\n", error->message.c_str());
    std::exit(0);
  }
}

void Run(int64_t place) {
  Buffer logits = Floats({kBatch, kVoxels, kClasses});
  for (int64_t i = 0; i < kBatch * kVoxels * kClasses; ++i) logits.floats()[i] = (i * 7919 % 1000 - 500) / 128.f;
  Buffer labels(XLA_FFI_DataType_U8, 1, {kBatch, kVoxels});
  for (int64_t i = 0; i < kBatch * kVoxels; ++i) labels.bytes[i] = i * 31 % 7 % kClasses;
  if (place >= 0) labels.bytes[place] = 9;

  Problem problem;
  problem.batch = kBatch;
  problem.voxels = kVoxels;
  problem.classes = kClasses;
  size_t bytes = 0;
  if (!ffi::DiceSumsWorkspace(problem, "CUDA", &bytes).empty()) std::abort();
  Buffer workspace(XLA_FFI_DataType_U8, 1, {static_cast<int64_t>(bytes)}), weight_sum = Floats({kBatch});
  std::vector<Buffer> sums(4, Floats({kBatch, kClasses}));
  for (Buffer& buffer : sums) buffer.header.data = buffer.bytes.data(), buffer.header.dims = buffer.dims.data();
  Call("dice_op_sums", {&logits, &labels}, {&sums[0], &sums[1], &sums[2], &sums[3], &weight_sum, &workspace});
  for (Buffer& buffer : sums) buffer.Print();
  weight_sum.Print();
  Buffer gradient = Floats({kBatch, kVoxels, kClasses});  // with the sums as coefficients
  Call("dice_op_sums_grad", {&logits, &labels, &sums[0], &sums[1], &sums[3]}, {&gradient});
  gradient.Print();
}

}  // namespace
}  // namespace dice_op

int main(int argc, char** argv) { dice_op::Run(argc > 1 ? std::atoll(argv[1]) : -1); }

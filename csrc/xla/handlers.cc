// The calls as handlers of XLA's typed foreign function interface. XLA's header for this interface needs nothing else
// from XLA or TensorFlow, so the same handlers work for JAX.
#include <algorithm>
#include <functional>
#include <iterator>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/dice_op.h"
#include "core/problem.h"
#include "xla/ffi/api/ffi.h"

namespace dice_op {
namespace ffi {
namespace {

using xla::ffi::AnyBuffer;
using xla::ffi::DataType;
using xla::ffi::Dictionary;
using xla::ffi::Ffi;
using xla::ffi::RemainingArgs;
using xla::ffi::RemainingRets;
using xla::ffi::Result;
using xla::ffi::Traits;

// Only this function turns our errors into XLA's.
xla::ffi::Error ToXla(const Error& error) {
  switch (error.kind) {
    case ErrorKind::kNone:
      return xla::ffi::Error::Success();
    case ErrorKind::kInvalidArgument:
      return xla::ffi::Error::InvalidArgument(error.message);
    case ErrorKind::kUnsupported:
      return xla::ffi::Error(xla::ffi::ErrorCode::kUnimplemented, error.message);
    case ErrorKind::kDevice:
      break;
  }
  return xla::ffi::Error::Internal(error.message);
}

Dims DimsOf(AnyBuffer buffer) { return Dims(buffer.dimensions().begin(), buffer.dimensions().end()); }

std::optional<DType> DTypeOf(AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case DataType::PRED:
      return DType::kBool;
    case DataType::U8:
      return DType::kUint8;
    case DataType::S8:
      return DType::kInt8;
    case DataType::U16:
      return DType::kUint16;
    case DataType::S16:
      return DType::kInt16;
    case DataType::S32:
      return DType::kInt32;
    case DataType::S64:
      return DType::kInt64;
    case DataType::F16:
      return DType::kHalf;
    case DataType::BF16:
      return DType::kBFloat16;
    case DataType::F32:
      return DType::kFloat;
    case DataType::F64:
      return DType::kDouble;
    default:
      return std::nullopt;
  }
}

std::string Describe(AnyBuffer buffer) {
  std::ostringstream text;
  text << buffer.element_type() << Show(DimsOf(buffer));
  return text.str();
}

// The type in which XLA stores an attribute.
template <class Attribute>
struct StoredAs {
  using type = Attribute;
};
template <>
struct StoredAs<std::string> {
  using type = std::string_view;
};
template <class T>
struct StoredAs<std::vector<T>> {
  using type = xla::ffi::Span<const T>;
};

// Reads an option from XLA's attributes.
template <class Value, class OptionOf>
Error ReadOption(const Dictionary& attributes, const OptionOf& option, Value* value) {
  using Attribute = AttributeOf<Value>;
  using Stored = typename StoredAs<Attribute>::type;
  const auto stored = attributes.get<Stored>(option.attribute);
  if (!stored.has_value())
    return InvalidArgument("attribute " + std::string(option.attribute) + ": " + stored.error().message());
  if constexpr (std::is_same_v<Stored, Attribute>) {
    return FromAttribute(*stored, value);
  } else {
    return FromAttribute(Attribute(stored->begin(), stored->end()), value);
  }
}

Error ReadOptions(const Dictionary& attributes, Options* options) {
  Error error;
  ForEachOption([&](const auto& option) {
    if (!error) error = ReadOption(attributes, option, &(options->*option.value));
  });
  constexpr size_t kCount = std::tuple_size_v<decltype(kOptions)>;
  if (!error && attributes.size() != kCount) {
    error = InvalidArgument("there are " + std::to_string(attributes.size()) + " attributes, but there must be " +
                            std::to_string(kCount));
  }
  return error;
}

Error ReadArray(const char* name, AnyBuffer buffer, DType* dtype, const void** data) {
  const auto known = DTypeOf(buffer);
  if (!known) {
    return InvalidArgument(std::string(name) + " have dtype " + Describe(buffer) +
                           ", which dice_op does not take: use a float of any width, bool, uint8, int8, uint16, "
                           "int16, int32 or int64");
  }
  *dtype = *known;
  *data = buffer.untyped_data();
  return {};
}

// Makes a Problem from a call's operands. `others` is the number of operands that must follow the optional voxel
// weight; the number of operands tells whether there is a voxel weight.
Error ReadCall(const Dictionary& attributes, AnyBuffer logits, AnyBuffer labels, RemainingArgs args, size_t others,
               Problem* problem, std::vector<AnyBuffer>* rest) {
  DICE_OP_RETURN_IF_ERROR(ReadOptions(attributes, &problem->options));
  if (args.size() < others || args.size() > others + 1) {
    return InvalidArgument(std::to_string(args.size() + 2) + " operands, but there must be " +
                           std::to_string(others + 2) + ", and one more for a voxel weight");
  }
  for (size_t i = 0; i < args.size(); ++i) rest->push_back(*args.get<AnyBuffer>(i));
  std::optional<Dims> weight;
  if (args.size() > others) {
    const AnyBuffer buffer = rest->front();
    rest->erase(rest->begin());
    DICE_OP_RETURN_IF_ERROR(ReadArray("voxel weights", buffer, &problem->weight_dtype, &problem->voxel_weight));
    weight = DimsOf(buffer);
  }
  DICE_OP_RETURN_IF_ERROR(ReadArray("logits", logits, &problem->logits_dtype, &problem->logits));
  DICE_OP_RETURN_IF_ERROR(ReadArray("labels", labels, &problem->labels_dtype, &problem->labels));
  return MakeProblem(DimsOf(logits), DimsOf(labels), weight, problem);
}

// Returns an error if the caller has declared an operand or result with another dtype or shape.
Error Expect(const std::string& name, AnyBuffer buffer, DType dtype, const Dims& dims) {
  if (DTypeOf(buffer) == dtype && DimsOf(buffer) == dims) return {};
  return InvalidArgument(name + " must be " + Name(dtype) + Show(dims) + ", but is " + Describe(buffer));
}

// --- the platforms --------------------------------------------------------------------------------------------

class ThreadPool final : public cpu::PoolParallelFor {
 public:
  explicit ThreadPool(xla::ffi::ThreadPool* pool) : pool_(pool) {}

 private:
  int64_t threads() const override { return pool_->num_threads(); }
  void Schedule(std::function<void()> task) const override { pool_->Schedule(std::move(task)); }

  xla::ffi::ThreadPool* pool_;
};

struct Host {
  static constexpr const char* kName = "Host";
  static std::initializer_list<Traits> TraitsOfCalls() { return {}; }
  using Context = xla::ffi::ThreadPool;

  static Error DiceSums(xla::ffi::ThreadPool pool, const Problem& problem, const Sums& sums, void* workspace) {
    return cpu::DiceSums(problem, sums, workspace, ThreadPool(&pool));
  }
  static Error DiceSumsGrad(xla::ffi::ThreadPool pool, const Problem& problem, const SumsGrad& grad) {
    cpu::DiceSumsGrad(problem, grad, ThreadPool(&pool));
    return {};
  }
};

#ifdef DICE_OP_WITH_CUDA
struct Cuda {
  static constexpr const char* kName = "CUDA";

  // A CUDA graph can replay a call, because the call launches the same kernels on the same memory each time. The
  // exception is a call that checks labels: it has to wait for the result.
  static std::initializer_list<Traits> TraitsOfCalls() {
    static constexpr std::initializer_list<Traits> kReplayed = {Traits::kCmdBufferCompatible}, kNone = {};
    return cuda::ChecksLabels() ? kNone : kReplayed;
  }
  using Context = xla::ffi::PlatformStream<void*>;

  static Error DiceSums(void* stream, const Problem& problem, const Sums& sums, void* workspace) {
    return cuda::DiceSums(problem, sums, workspace, stream);
  }
  static Error DiceSumsGrad(void* stream, const Problem& problem, const SumsGrad& grad) {
    return cuda::DiceSumsGrad(problem, grad, stream);
  }
};
#endif

// --- the handlers ---------------------------------------------------------------------------------------------

template <class Platform>
using ContextOf = typename xla::ffi::CtxDecoding<typename Platform::Context>::Type;

template <class Platform>
Error SumsOf(ContextOf<Platform> context, AnyBuffer logits, AnyBuffer labels, RemainingArgs args, RemainingRets results,
             const Dictionary& attributes) {
  Problem problem;
  std::vector<AnyBuffer> none;
  DICE_OP_RETURN_IF_ERROR(ReadCall(attributes, logits, labels, args, 0, &problem, &none));
  if (results.size() != kSumCount + 1) {
    return InvalidArgument("there must be " + std::to_string(kSumCount + 1) + " results");
  }
  // JAX has doubles only where it is told to have them.
  problem.single_counts = DTypeOf(**results.get<AnyBuffer>(0)) == DType::kFloat;
  Sums sums;
  for (const SumInfo& info : kSums) {
    const AnyBuffer result = **results.get<AnyBuffer>(static_cast<size_t>(info.sum));
    DICE_OP_RETURN_IF_ERROR(Expect(info.name, result, problem.sums_dtype(), problem.DimsOf(info)));
    if (problem.Has(info.sum)) sums[info.sum] = result.untyped_data();
  }
  size_t bytes = 0;
  DICE_OP_RETURN_IF_ERROR(DiceSumsWorkspace(problem, Platform::kName, &bytes));
  const AnyBuffer workspace = **results.get<AnyBuffer>(kSumCount);
  if (DTypeOf(workspace) != DType::kUint8 || workspace.element_count() < bytes) {  // it may be another platform's
    return InvalidArgument("workspace must be at least uint8[" + std::to_string(bytes) + "], but is " +
                           Describe(workspace));
  }
  return Platform::DiceSums(context, problem, sums, workspace.untyped_data());
}

template <class Platform>
Error GradOf(ContextOf<Platform> context, AnyBuffer logits, AnyBuffer labels, RemainingArgs args,
             Result<AnyBuffer> d_logits, const Dictionary& attributes) {
  Problem problem;
  std::vector<AnyBuffer> d_sums;
  const size_t count =
      std::count_if(std::begin(kSums), std::end(kSums), [](const SumInfo& info) { return info.has_gradient; });
  DICE_OP_RETURN_IF_ERROR(ReadCall(attributes, logits, labels, args, count, &problem, &d_sums));
  DICE_OP_RETURN_IF_ERROR(CheckGradient(problem));
  SumsGrad grad;
  auto next = d_sums.begin();
  for (const SumInfo& info : kSums) {
    if (!info.has_gradient) continue;
    const AnyBuffer d_sum = *next++;
    DICE_OP_RETURN_IF_ERROR(Expect(std::string("d_") + info.name, d_sum, problem.sums_dtype(), problem.DimsOf(info)));
    if (problem.Has(info.sum)) grad.d_sums[info.sum] = d_sum.untyped_data();
  }
  DICE_OP_RETURN_IF_ERROR(Expect("d_logits", *d_logits, problem.logits_dtype, problem.logits_dims));
  grad.d_logits = d_logits->untyped_data();
  return Platform::DiceSumsGrad(context, problem, grad);
}

template <class Platform>
xla::ffi::Error SumsImpl(ContextOf<Platform> context, AnyBuffer logits, AnyBuffer labels, RemainingArgs args,
                         RemainingRets results, Dictionary attributes) {
  return ToXla(SumsOf<Platform>(context, logits, labels, args, results, attributes));
}

template <class Platform>
xla::ffi::Error GradImpl(ContextOf<Platform> context, AnyBuffer logits, AnyBuffer labels, RemainingArgs args,
                         Result<AnyBuffer> d_logits, Dictionary attributes) {
  return ToXla(GradOf<Platform>(context, logits, labels, args, d_logits, attributes));
}

template <class Platform>
auto BindOperands() {
  return Ffi::Bind()
      .Ctx<typename Platform::Context>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .RemainingArgs();
}

// Returns what fn returns. No exception may pass through XLA's interface, which is one of C, so a refusal of memory
// becomes an error.
template <class Fn>
XLA_FFI_Error* Guarded(XLA_FFI_CallFrame* frame, const Fn& fn) {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr,
                                      "dice_op got no memory from the system", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
    return frame->api->XLA_FFI_Error_Create(&args);
  }
}

template <class Platform>
XLA_FFI_Error* CallSums(XLA_FFI_CallFrame* frame) {
  return Guarded(frame, [&] {
    static auto* const handler =
        BindOperands<Platform>().RemainingRets().Attrs().To(SumsImpl<Platform>, Platform::TraitsOfCalls()).release();
    return handler->Call(frame);
  });
}

template <class Platform>
XLA_FFI_Error* CallGrad(XLA_FFI_CallFrame* frame) {
  return Guarded(frame, [&] {
    static auto* const handler = BindOperands<Platform>()
                                     .template Ret<AnyBuffer>()
                                     .Attrs()
                                     .To(GradImpl<Platform>, Platform::TraitsOfCalls())
                                     .release();
    return handler->Call(frame);
  });
}

template <class Platform>
void Append(std::vector<Handler>* handlers) {
  uint32_t traits = 0;
  for (const Traits trait : Platform::TraitsOfCalls()) traits |= static_cast<uint32_t>(trait);
  handlers->push_back({"dice_op_sums", Platform::kName, reinterpret_cast<void*>(CallSums<Platform>), traits});
  handlers->push_back({"dice_op_sums_grad", Platform::kName, reinterpret_cast<void*>(CallGrad<Platform>), traits});
}

}  // namespace

const std::vector<Handler>& Handlers() {
  static const auto* const handlers = [] {
    auto* all = new std::vector<Handler>;
    Append<Host>(all);
#ifdef DICE_OP_WITH_CUDA
    Append<Cuda>(all);
#endif
    return all;
  }();
  return *handlers;
}

std::string Version() { return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR); }

Error DiceSumsWorkspace(const Problem& problem, const std::string& platform, size_t* bytes) {
  if (platform == Host::kName) {
    *bytes = cpu::DiceSumsWorkspace(problem);
    return {};
  }
#ifdef DICE_OP_WITH_CUDA
  if (platform == Cuda::kName) return cuda::DiceSumsWorkspace(problem, bytes);
#endif
  return Unsupported("this build of dice_op has no kernels for XLA's platform " + platform);
}

}  // namespace ffi
}  // namespace dice_op

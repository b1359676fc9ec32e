// The calls as handlers of XLA's typed foreign function interface. XLA's own header of that interface needs
// nothing else of XLA or TensorFlow, so that the same handlers serve JAX.
#include <functional>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>

#include "core/dice_op.h"
#include "core/problem.h"
#include "xla/ffi/api/ffi.h"

namespace dice_op {
namespace ffi {

struct Attributes {
  std::string_view activation, data_format;
  bool squared_pred, with_cross_entropy;
  double focal_gamma, label_smoothing, threshold;
  xla::ffi::Span<const int64_t> ignore_label, regions;
};

}  // namespace ffi
}  // namespace dice_op

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(dice_op::ffi::Attributes,                       //
                                      StructMember<std::string_view>("activation"),   //
                                      StructMember<std::string_view>("data_format"),  //
                                      StructMember<bool>("squared_pred"),             //
                                      StructMember<bool>("with_cross_entropy"),       //
                                      StructMember<double>("focal_gamma"),            //
                                      StructMember<double>("label_smoothing"),        //
                                      StructMember<double>("threshold"),              //
                                      StructMember<::xla::ffi::Span<const int64_t>>("ignore_label"),
                                      StructMember<::xla::ffi::Span<const int64_t>>("regions"));

namespace dice_op {
namespace ffi {
namespace {

using xla::ffi::AnyBuffer;
using xla::ffi::DataType;
using xla::ffi::Error;
using xla::ffi::Ffi;
using xla::ffi::RemainingArgs;
using xla::ffi::RemainingRets;
using xla::ffi::Result;
using xla::ffi::Traits;

Error Invalid(const std::string& message) { return Error::InvalidArgument(message); }

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

// A call's operands as a Problem.
struct Operands {
  Problem problem;
  Dims logits;
  std::vector<AnyBuffer> rest;  // behind the voxel weight
};

// `others`: operands that follow the voxel weight, if there is one.
Error Read(const Attributes& attributes, AnyBuffer logits, AnyBuffer labels, RemainingArgs args, size_t others,
           Operands* operands) {
  Problem& problem = operands->problem;
  Options& options = problem.options;
  for (const std::string& error : {Parse(std::string(attributes.activation), &options.activation),
                                   Parse(std::string(attributes.data_format), &options.data_format),
                                   SetRegions({attributes.regions.begin(), attributes.regions.end()}, &options)}) {
    if (!error.empty()) return Invalid(error);
  }
  options.squared_pred = attributes.squared_pred;
  options.cross_entropy = attributes.with_cross_entropy;
  options.focal_gamma = attributes.focal_gamma;
  options.label_smoothing = attributes.label_smoothing;
  options.threshold = attributes.threshold;
  options.has_ignore_label = attributes.ignore_label.size() > 0;
  if (options.has_ignore_label) options.ignore_label = attributes.ignore_label[0];
  if (attributes.ignore_label.size() > 1) return Invalid("ignore_label has several values, but must have none or one");
  if (args.size() < others || args.size() > others + 1) {
    return Invalid(std::to_string(args.size() + 2) + " operands, but there must be " + std::to_string(others + 2) +
                   ", and one more for a voxel weight");
  }

  const auto take = [](AnyBuffer buffer, const char* name, DType* dtype, const void** data) {
    const auto known = DTypeOf(buffer);
    if (!known) {
      return Invalid(std::string(name) + " have dtype " + Describe(buffer) +
                     ", which dice_op does not take: use a float of any width, bool, uint8, int8, uint16, int16, int32 "
                     "or int64");
    }
    *dtype = *known;
    *data = buffer.untyped_data();
    return Error::Success();
  };
  for (size_t i = 0; i < args.size(); ++i) operands->rest.push_back(*args.get<AnyBuffer>(i));
  std::optional<Dims> weight;
  if (args.size() > others) {
    const AnyBuffer buffer = operands->rest.front();
    operands->rest.erase(operands->rest.begin());
    if (Error error = take(buffer, "voxel weights", &problem.weight_dtype, &problem.voxel_weight); error.failure()) {
      return error;
    }
    weight = DimsOf(buffer);
  }
  if (Error error = take(logits, "logits", &problem.logits_dtype, &problem.logits); error.failure()) return error;
  if (Error error = take(labels, "labels", &problem.labels_dtype, &problem.labels); error.failure()) return error;
  operands->logits = DimsOf(logits);
  const std::string error = MakeProblem(operands->logits, DimsOf(labels), weight, &problem);
  return error.empty() ? Error::Success() : Invalid(error);
}

// Operands and results that the caller has to declare as they must be.
Error Expect(const char* name, AnyBuffer buffer, DType dtype, const Dims& dims) {
  if (DTypeOf(buffer) == dtype && DimsOf(buffer) == dims) return Error::Success();
  return Invalid(std::string(name) + " must be " + Name(dtype) + Show(dims) + ", but is " + Describe(buffer));
}

Dims SumsDims(const Problem& problem, bool cross_entropy) {
  return {problem.batch, cross_entropy && !problem.options.cross_entropy ? 0 : problem.classes};
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

  static Error DiceSums(xla::ffi::ThreadPool pool, const Operands& operands, const Sums& sums, void* workspace) {
    const BadValue bad = cpu::DiceSums(operands.problem, sums, workspace, ThreadPool(&pool));
    if (bad.sample < 0) return Error::Success();
    return Invalid(DescribeBadValue(operands.problem, operands.logits, bad));
  }
  static Error DiceSumsGrad(xla::ffi::ThreadPool pool, const Operands& operands, const SumsGrad& grad) {
    cpu::DiceSumsGrad(operands.problem, grad, ThreadPool(&pool));
    return Error::Success();
  }
};

#ifdef DICE_OP_WITH_CUDA
struct Cuda {
  static constexpr const char* kName = "CUDA";

  // A call launches the same kernels on the same memory each time, unless it has to wait for their result.
  static std::initializer_list<Traits> TraitsOfCalls() {
    static constexpr std::initializer_list<Traits> kReplayed = {Traits::kCmdBufferCompatible}, kNone = {};
    return cuda::ChecksLabels() ? kNone : kReplayed;
  }
  using Context = xla::ffi::PlatformStream<void*>;

  static Error DiceSums(void* stream, const Operands& operands, const Sums& sums, void* workspace) {
    if (cuda::ChecksLabels()) {
      BadValue bad;
      int64_t label = 0;
      const std::string error = cuda::FindBadValue(operands.problem, workspace, stream, &bad, &label);
      if (!error.empty()) return Error::Internal(error);
      if (bad.sample >= 0) return Invalid(DescribeBadValue(operands.problem, operands.logits, bad, &label));
    }
    return ToError(cuda::DiceSums(operands.problem, sums, workspace, stream));
  }
  static Error DiceSumsGrad(void* stream, const Operands& operands, const SumsGrad& grad) {
    return ToError(cuda::DiceSumsGrad(operands.problem, grad, stream));
  }
  static Error ToError(const std::string& error) { return error.empty() ? Error::Success() : Error::Internal(error); }
};
#endif

// --- the handlers ---------------------------------------------------------------------------------------------

template <class Platform>
using ContextOf = typename xla::ffi::CtxDecoding<typename Platform::Context>::Type;

template <class Platform>
Error SumsImpl(ContextOf<Platform> context, AnyBuffer logits, AnyBuffer labels, RemainingArgs args,
               RemainingRets results, Attributes attributes) {
  Operands operands;
  if (Error error = Read(attributes, logits, labels, args, 0, &operands); error.failure()) return error;
  const Problem& problem = operands.problem;
  static constexpr const char* kNames[] = {"intersection",  "pred_sum",   "label_sum",
                                           "cross_entropy", "weight_sum", "workspace"};
  if (results.size() != 6) return Invalid("there must be 6 results");
  size_t bytes = 0;
  if (const std::string error = DiceSumsWorkspace(problem, Platform::kName, &bytes); !error.empty()) {
    return Invalid(error);
  }
  void* data[6];
  for (size_t i = 0; i < 6; ++i) {
    const AnyBuffer result = **results.get<AnyBuffer>(i);
    const Dims dims = i < 4 ? SumsDims(problem, i == 3) : i == 4 ? Dims{problem.batch} : Dims{int64_t(bytes)};
    const DType dtype = i == 5 ? DType::kUint8 : problem.sums_dtype();
    if (Error error = Expect(kNames[i], result, dtype, dims); error.failure()) return error;
    data[i] = result.untyped_data();
  }
  const Sums sums{data[0], data[1], data[2], problem.options.cross_entropy ? data[3] : nullptr, data[4]};
  return Platform::DiceSums(context, operands, sums, data[5]);
}

template <class Platform>
Error GradImpl(ContextOf<Platform> context, AnyBuffer logits, AnyBuffer labels, RemainingArgs args,
               Result<AnyBuffer> d_logits, Attributes attributes) {
  Operands operands;
  if (Error error = Read(attributes, logits, labels, args, 3, &operands); error.failure()) return error;
  const Problem& problem = operands.problem;
  if (const std::string error = CheckGradient(problem); !error.empty()) return Invalid(error);
  static constexpr const char* kNames[] = {"d_intersection", "d_pred_sum", "d_cross_entropy"};
  for (size_t i = 0; i < 3; ++i) {
    const Error error = Expect(kNames[i], operands.rest[i], problem.sums_dtype(), SumsDims(problem, i == 2));
    if (error.failure()) return error;
  }
  if (Error error = Expect("d_logits", *d_logits, problem.logits_dtype, operands.logits); error.failure()) return error;
  const auto data = [&](int i) { return operands.rest[i].untyped_data(); };
  const SumsGrad grad{data(0), data(1), problem.options.cross_entropy ? data(2) : nullptr, d_logits->untyped_data()};
  return Platform::DiceSumsGrad(context, operands, grad);
}

template <class Platform>
auto BindOperands() {
  return Ffi::Bind()
      .Ctx<typename Platform::Context>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .RemainingArgs();
}

template <class Platform>
XLA_FFI_Error* CallSums(XLA_FFI_CallFrame* frame) {
  static auto* const handler = BindOperands<Platform>()
                                   .RemainingRets()
                                   .template Attrs<Attributes>()
                                   .To(SumsImpl<Platform>, Platform::TraitsOfCalls())
                                   .release();
  return handler->Call(frame);
}

template <class Platform>
XLA_FFI_Error* CallGrad(XLA_FFI_CallFrame* frame) {
  static auto* const handler = BindOperands<Platform>()
                                   .template Ret<AnyBuffer>()
                                   .template Attrs<Attributes>()
                                   .To(GradImpl<Platform>, Platform::TraitsOfCalls())
                                   .release();
  return handler->Call(frame);
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

std::string DiceSumsWorkspace(const Problem& problem, const std::string& platform, size_t* bytes) {
  if (platform == Host::kName) {
    *bytes = cpu::DiceSumsWorkspace(problem);
    return "";
  }
#ifdef DICE_OP_WITH_CUDA
  if (platform == Cuda::kName) return cuda::DiceSumsWorkspace(problem, bytes);
#endif
  return "this build of dice_op has no kernels for XLA's platform " + platform;
}

}  // namespace ffi
}  // namespace dice_op

// The ops in programs that TensorFlow compiles with XLA (jit_compile). Each op becomes a call of its handler in
// csrc/xla.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/problem.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tf/attributes.h"
#include "xla/ffi/api/c_api.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/shape_util.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // its header xla/ffi/ffi_api.h includes MLIR's, which TensorFlow does not ship
}

namespace dice_op {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;

// --- the handlers ---------------------------------------------------------------------------------------

XLA_FFI_ByteSpan SpanOf(const char* text) { return {text, std::string_view(text).size()}; }

std::string TakeMessage(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
#if XLA_FFI_API_MAJOR > 0 || XLA_FFI_API_MINOR >= 4  // from here on it tells a code as well
  XLA_FFI_Error_GetDetails_Args details = {};
  details.struct_size = XLA_FFI_Error_GetDetails_Args_STRUCT_SIZE;
  details.error = error;
  api->XLA_FFI_Error_GetDetails(&details);
#else
  XLA_FFI_Error_GetMessage_Args details = {};
  details.struct_size = XLA_FFI_Error_GetMessage_Args_STRUCT_SIZE;
  details.error = error;
  api->XLA_FFI_Error_GetMessage(&details);
#endif
  const std::string text = details.message;
  XLA_FFI_Error_Destroy_Args destroy = {};
  destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  destroy.error = error;
  api->XLA_FFI_Error_Destroy(&destroy);
  return text;
}

// Registers the handlers with XLA's runtime. Returns the reasons if the runtime refuses some, else an empty string.
// The versions are among them, whatever XLA says: a runtime takes no handlers of a later version than its own.
std::string RegisterHandlers() {
  const XLA_FFI_Api* const api = xla::ffi::GetXlaFfiApi();
  std::string refusals;
  for (const ffi::Handler& handler : ffi::Handlers()) {
    XLA_FFI_Handler_Register_Args args = {};
    args.struct_size = XLA_FFI_Handler_Register_Args_STRUCT_SIZE;
    args.name = SpanOf(handler.target);
    args.platform = SpanOf(handler.platform);
    args.bundle.execute = reinterpret_cast<XLA_FFI_Handler*>(handler.function);
    args.traits = handler.traits;
    if (XLA_FFI_Error* const error = api->XLA_FFI_Handler_Register(&args)) {
      refusals += (refusals.empty() ? "" : "; ") + TakeMessage(api, error);
    }
  }
  if (refusals.empty()) return "";
  const XLA_FFI_Api_Version& has = api->api_version;
  return "this TensorFlow's XLA does not take dice_op's handlers, which were compiled with version " + ffi::Version() +
         " of its foreign function interface, while it has version " + std::to_string(has.major_version) + "." +
         std::to_string(has.minor_version) + ": " + refusals;
}

const std::string refusal = RegisterHandlers();

// --- the ops --------------------------------------------------------------------------------------------

class DiceXlaKernel : public XlaOpKernel {
 public:
  explicit DiceXlaKernel(OpKernelConstruction* context)
      : XlaOpKernel(context),
        platform_(context->device_type() == tensorflow::DeviceType("XLA_GPU_JIT") ? "CUDA" : "Host") {
    static constexpr char kMend[] = "train without XLA, with model.compile(..., jit_compile=False)";
    OP_REQUIRES_OK(context, ReadAttributes(context, &attributes_));
    OP_REQUIRES(context, refusal.empty(),
                absl::UnimplementedError(refusal + "; build dice_op again for this TensorFlow, or " + kMend));
    const auto& handlers = ffi::Handlers();
    const bool served = std::any_of(handlers.begin(), handlers.end(),
                                    [&](const ffi::Handler& handler) { return platform_ == handler.platform; });
    OP_REQUIRES(context, served,
                absl::UnimplementedError("this build of dice_op has no kernels for XLA's platform " + platform_ +
                                         ": install one that has, or " + kMend));
  }

 protected:
  struct Inputs {
    Problem problem;
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> shapes;  // in the row-major layout that the handlers need
  };

  absl::Status Read(XlaOpKernelContext* context, Inputs* inputs) const {
    std::vector<Dims> dims;
    for (int i = 0; i < context->num_inputs(); ++i) {
      TF_ASSIGN_OR_RETURN(xla::Shape shape, context->InputXlaShape(i));
      if (shape.is_dynamic()) {
        return absl::UnimplementedError(
            "y_true, y_pred or voxel_weight have a shape that only the data tells, " + shape.ToString() +
            ", but XLA compiles for shapes: keep the whole shape and leave voxels out by a "
            "sample_weight (voxel_weight) of 0 or by ignore_label, or pass jit_compile=False");
      }
      xla::LayoutUtil::SetToDefaultLayout(&shape);
      dims.emplace_back(shape.dimensions().begin(), shape.dimensions().end());
      inputs->shapes.push_back(shape);
      inputs->operands.push_back(context->Input(i));
    }
    std::vector<xla::XlaOp> weights;
    std::vector<tensorflow::TensorShape> weight_shapes;
    TF_RETURN_IF_ERROR(context->InputList("voxel_weight", &weights, &weight_shapes));
    inputs->problem = attributes_;
    std::optional<Dims> weight;
    if (!weights.empty()) weight = dims[2];
    return ToStatus(MakeProblem(dims[0], dims[1], weight, &inputs->problem));
  }

  xla::XlaOp Call(XlaOpKernelContext* context, const char* target, const Inputs& inputs,
                  const xla::Shape& result) const {
    return xla::CustomCallWithLayout(
        context->builder(), target, inputs.operands, result, inputs.shapes, AttributesText(),
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  }

  const std::string& platform() const { return platform_; }

 private:
  // Writes the options as an MLIR dictionary.
  std::string AttributesText() const {
    std::string text;
    ForEachOption([&](const auto& option) {
      text += (text.empty() ? "{" : ", ") + std::string(option.attribute) + " = " +
              Text(ToAttribute(attributes_.options.*option.value));
    });
    return text + "}";
  }
  static std::string Text(const std::string& name) { return '"' + name + '"'; }
  static std::string Text(bool value) { return value ? "true" : "false"; }
  static std::string Text(double value) {  // exact, and the same in every locale
    unsigned long long bits;
    static_assert(sizeof(bits) == sizeof(value));
    std::memcpy(&bits, &value, sizeof(bits));
    char text[32];
    std::snprintf(text, sizeof(text), "0x%016llx : f64", bits);
    return text;
  }
  static std::string Text(const std::vector<float>& values) {
    std::string list;
    for (const float value : values) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      char text[16];
      std::snprintf(text, sizeof(text), "0x%08x", static_cast<unsigned>(bits));
      list += (list.empty() ? ": " : ", ") + std::string(text);
    }
    return "array<f32" + list + ">";
  }
  static std::string Text(const std::vector<int64_t>& values) {
    std::string text;
    for (const int64_t value : values) text += (text.empty() ? ": " : ", ") + std::to_string(value);
    return "array<i64" + text + ">";
  }

  const std::string platform_;
  Problem attributes_;
};

class DiceSumsXla final : public DiceXlaKernel {
 public:
  using DiceXlaKernel::DiceXlaKernel;

  void Compile(XlaOpKernelContext* context) override {
    Inputs inputs;
    OP_REQUIRES_OK(context, Read(context, &inputs));
    const Problem& problem = inputs.problem;
    size_t workspace_bytes = 0;
    OP_REQUIRES_OK(context, ToStatus(ffi::DiceSumsWorkspace(problem, platform(), &workspace_bytes)));
    const xla::PrimitiveType type = problem.sums_dtype() == DType::kDouble ? xla::F64 : xla::F32;
    std::vector<xla::Shape> results;
    for (const SumInfo& info : kSums) results.push_back(xla::ShapeUtil::MakeShape(type, problem.DimsOf(info)));
    results.push_back(xla::ShapeUtil::MakeShape(xla::U8, {static_cast<int64_t>(workspace_bytes)}));
    const xla::XlaOp call = Call(context, "dice_op_sums", inputs, xla::ShapeUtil::MakeTupleShape(results));
    for (int i = 0; i < kSumCount; ++i) context->SetOutput(i, xla::GetTupleElement(call, i));
  }
};

class DiceSumsGradXla final : public DiceXlaKernel {
 public:
  using DiceXlaKernel::DiceXlaKernel;

  void Compile(XlaOpKernelContext* context) override {
    Inputs inputs;
    OP_REQUIRES_OK(context, Read(context, &inputs));
    context->SetOutput(0, Call(context, "dice_op_sums_grad", inputs, inputs.shapes[0]));
  }
};

// REGISTER_XLA_OP is not used, because it has no effect once TensorFlow has run an op.
REGISTER_KERNEL_BUILDER(Name("DiceSums").Device("XLA_CPU_JIT"), DiceSumsXla);
REGISTER_KERNEL_BUILDER(Name("DiceSums").Device("XLA_GPU_JIT"), DiceSumsXla);
REGISTER_KERNEL_BUILDER(Name("DiceSumsGrad").Device("XLA_CPU_JIT"), DiceSumsGradXla);
REGISTER_KERNEL_BUILDER(Name("DiceSumsGrad").Device("XLA_GPU_JIT"), DiceSumsGradXla);

}  // namespace
}  // namespace dice_op

// Returns the reason why jit_compile=True will fail, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* dice_op_xla_refusal() { return dice_op::refusal.c_str(); }

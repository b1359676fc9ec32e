// The ops' schemas and shape functions.
#include <optional>

#include "core/problem.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/attributes.h"

namespace dice_op {
namespace {

using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

Dims DimsOf(InferenceContext* c, ShapeHandle shape) {
  Dims dims(c->Rank(shape));
  for (int i = 0; i < c->Rank(shape); ++i) dims[i] = c->Value(c->Dim(shape, i));
  return dims;
}

absl::Status CheckShapes(InferenceContext* c, Problem* problem, bool* known) {
  TF_RETURN_IF_ERROR(ReadAttributes(c, problem));
  std::vector<ShapeHandle> weight;
  TF_RETURN_IF_ERROR(c->input("voxel_weight", &weight));
  *known = c->RankKnown(c->input(0));
  if (!*known || !c->RankKnown(c->input(1))) return absl::OkStatus();
  std::optional<Dims> weight_dims;
  if (!weight.empty()) {
    if (!c->RankKnown(weight[0])) return absl::OkStatus();
    weight_dims = DimsOf(c, weight[0]);
  }
  return ToStatus(MakeProblem(DimsOf(c, c->input(0)), DimsOf(c, c->input(1)), weight_dims, problem));
}

// Checks what is known of the inputs' shapes before anything runs.
absl::Status Check(InferenceContext* c, Problem* problem, bool* known) {
  return Guarded([&] { return CheckShapes(c, problem, known); });
}

absl::Status SumsShape(InferenceContext* c) {
  Problem problem;
  bool known;
  TF_RETURN_IF_ERROR(Check(c, &problem, &known));
  const ShapeHandle logits = c->input(0);
  const auto batch = known ? c->Dim(logits, 0) : c->UnknownDim();
  const auto classes = known ? c->Dim(logits, problem.channels_last() ? -1 : 1) : c->UnknownDim();
  for (const SumInfo& info : kSums) {
    const auto count = problem.Has(info.sum) ? classes : c->MakeDim(0);
    c->set_output(static_cast<int>(info.sum), info.per_class ? c->Matrix(batch, count) : c->Vector(batch));
  }
  return absl::OkStatus();
}

absl::Status GradShape(InferenceContext* c) {
  Problem problem;
  bool known;
  TF_RETURN_IF_ERROR(Check(c, &problem, &known));
  c->set_output(0, c->input(0));
  return absl::OkStatus();
}

}  // namespace
}  // namespace dice_op

// TensorFlow wants this as literal text. A test checks that it agrees with kOptions and kSums.
#define DICE_OP_INPUTS                                                                                      \
  Input("logits: T")                                                                                        \
      .Input("labels: Tlabels")                                                                             \
      .Input("voxel_weight: Tweight") /* none or one */                                                     \
      .Attr("T: {half, bfloat16, float, double}")                                                           \
      .Attr("Tlabels: {bool, uint8, int8, uint16, int16, int32, int64, half, bfloat16, float, double}")     \
      .Attr(                                                                                                \
          "Tweight: list({bool, uint8, int8, uint16, int16, int32, int64, half, bfloat16, float, double}) " \
          ">= 0")                                                                                           \
      .Attr("Tsums: {float, double}") /* double for double logits and for counts */                         \
      .Attr("data_format: {'channels_last', 'channels_first'} = 'channels_last'")                           \
      .Attr("squared_pred: bool = false")                                                                   \
      .Attr("soft_label: bool = false")                                                                     \
      .Attr("with_cross_entropy: bool = false")                                                             \
      .Attr("focal_gamma: float = 0.0")                                                                     \
      .Attr("threshold: float = 0.0") /* of no use to the gradient */                                       \
      .Attr("label_smoothing: float = 0.0")                                                                 \
      .Attr("remainders: list(float) = []") /* of the floats, see attributes.h */                           \
      .Attr("ignore_label: list(int) = []") /* none or one */                                               \
      .Attr("regions: list(int) = []")      /* these four: see ToAttribute in core/options.h */             \
      .Attr("label_sets: list(int) = []")                                                                   \
      .Attr("focal_gammas: list(float) = []")                                                               \
      .Attr("dist_matrix: list(float) = []")

REGISTER_OP("DiceSums")
    .DICE_OP_INPUTS.Attr("activation: {'softmax', 'sigmoid', 'none', 'argmax', 'threshold'}")
    .Output("intersection: Tsums")
    .Output("pred_sum: Tsums")
    .Output("label_sum: Tsums")
    .Output("cross_entropy: Tsums")  // these four are [N, 0] if they are not asked for
    .Output("negative_cross_entropy: Tsums")
    .Output("unknown_sum: Tsums")
    .Output("distance_sum: Tsums")
    .Output("weight_sum: Tsums")
    .SetShapeFn(dice_op::SumsShape);

REGISTER_OP("DiceSumsGrad")
    .DICE_OP_INPUTS.Attr("activation: {'softmax', 'sigmoid', 'none'}")
    .Input("d_intersection: Tsums")
    .Input("d_pred_sum: Tsums")
    .Input("d_cross_entropy: Tsums")
    .Input("d_negative_cross_entropy: Tsums")
    .Input("d_distance_sum: Tsums")
    .Output("d_logits: T")
    .SetShapeFn(dice_op::GradShape);

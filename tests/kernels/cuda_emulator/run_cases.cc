// Runs the library's CUDA path on the emulator: reads calls from a file, writes what they give to
// another. tests/helpers/emulation.py writes and reads the files, and says how they are laid out.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/problem.h"
#include "cuda/call.h"
#include "no_machine_code.h"

namespace dice_op {
namespace {

struct Header {
  int64_t batch, voxels, classes;
  int64_t activation, planar, squared_pred, soft_label, cross_entropy, has_ignore_label, ignore_label;
  int64_t logits_dtype, labels_dtype, dense_labels, weight_dtype;  // weight_dtype < 0: no weight
  int64_t in_place;                                                // the gradient takes the logits' memory
  int64_t misalign;                                                // bytes by which the arrays miss 16-byte alignment
  int64_t regions, label_sets, focal_gammas, dist_matrix;          // the lengths of these tables
  double focal_gamma, label_smoothing, threshold;
};

void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "run_cases: %s\n", what);
  std::exit(2);
}

void Require(const Error& error) { Require(!error, error.message.c_str()); }

// Memory as long as the array and not a byte longer, for the address sanitizer.
class Array {
 public:
  Array(size_t bytes, int64_t misalign) : memory_(std::malloc(bytes + misalign + !bytes)), bytes_(bytes) {
    data_ = static_cast<char*>(memory_) + misalign;
    std::memset(data_, 0xff, bytes);
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  void Read(FILE* file) { Require(bytes_ == 0 || std::fread(data_, bytes_, 1, file) == 1, "the cases end too early"); }
  void Write(FILE* file) const { std::fwrite(data_, 1, bytes_, file); }
  void* data() const { return data_; }

 private:
  void* memory_;
  size_t bytes_;
  char* data_;
};

// Reads an option that is a table.
template <class T, class Table>
void Read(FILE* in, int64_t length, Table* table) {
  std::vector<T> values(length);
  Require(length == 0 || std::fread(values.data(), length * sizeof(T), 1, in) == 1, "the cases end too early");
  Require(FromAttribute(values, table));
}

void Run(const Header& header, FILE* in, FILE* out) {
  Problem problem;
  Options& options = problem.options;
  options.activation = static_cast<Activation>(header.activation);
  options.data_format = header.planar ? DataFormat::kChannelsFirst : DataFormat::kChannelsLast;
  options.squared_pred = header.squared_pred;
  options.soft_label = header.soft_label;
  options.cross_entropy = header.cross_entropy;
  options.focal_gamma = header.focal_gamma;
  options.label_smoothing = header.label_smoothing;
  options.threshold = header.threshold;
  options.ignore_label = {header.has_ignore_label != 0, header.ignore_label};
  Read<int64_t>(in, header.regions, &options.regions);
  Read<int64_t>(in, header.label_sets, &options.label_sets);
  Read<float>(in, header.focal_gammas, &options.focal_gammas);
  Read<float>(in, header.dist_matrix, &options.dist_matrix);
  problem.logits_dtype = static_cast<DType>(header.logits_dtype);
  problem.labels_dtype = static_cast<DType>(header.labels_dtype);
  const bool weighted = header.weight_dtype >= 0;
  if (weighted) problem.weight_dtype = static_cast<DType>(header.weight_dtype);

  const int64_t n = header.batch, v = header.voxels, c = header.classes;
  const Dims dims = header.planar ? Dims{n, c, v} : Dims{n, v, c};
  std::optional<Dims> weight_dims;
  if (weighted) weight_dims = Dims{n, v};
  Require(MakeProblem(dims, header.dense_labels ? dims : Dims{n, v}, weight_dims, &problem));

  const size_t logits_bytes = LogitsBytes(problem);
  Array logits(logits_bytes, header.misalign);
  Array labels(n * v * (header.dense_labels ? c : 1) * SizeOf(problem.labels_dtype), header.misalign);
  Array weight(weighted ? n * v * SizeOf(problem.weight_dtype) : 0, 0);
  // Each sum has an array of its own, and so has each derivative of the loss with respect to a sum.
  const auto bytes_of = [&](const SumInfo& info) {
    size_t bytes = SizeOf(problem.sums_dtype());
    for (const int64_t length : problem.DimsOf(info)) bytes *= length;
    return bytes;
  };
  std::vector<std::unique_ptr<Array>> d_arrays, arrays;
  for (Array* array : {&logits, &labels, &weight}) array->Read(in);
  SumsGrad grad;
  Sums sums;
  for (const SumInfo& info : kSums) {
    arrays.push_back(std::make_unique<Array>(bytes_of(info), 0));
    if (problem.Has(info.sum)) sums[info.sum] = arrays.back()->data();
    if (!info.has_gradient) continue;
    d_arrays.push_back(std::make_unique<Array>(bytes_of(info), 0));
    d_arrays.back()->Read(in);
    if (problem.Has(info.sum)) grad.d_sums[info.sum] = d_arrays.back()->data();
  }
  problem.logits = logits.data();
  problem.labels = labels.data();
  problem.voxel_weight = weighted ? weight.data() : nullptr;

  size_t workspace_bytes = 0;
  Error error = cuda::DiceSumsWorkspace(problem, &workspace_bytes);
  Array workspace(workspace_bytes, 0);
  if (!error) error = cuda::DiceSums(problem, sums, workspace.data(), nullptr);
  const std::string complaint = error ? "" : cuda::FindBadValue(problem, workspace.data(), nullptr).message;
  Array separate(header.in_place ? 0 : logits_bytes, header.misalign);
  Array& d_logits = header.in_place ? logits : separate;
  grad.d_logits = d_logits.data();
  const bool differentiable = !problem.hard();
  if (!error && differentiable) error = cuda::DiceSumsGrad(problem, grad, nullptr);

  // whether a specialised kernel takes the call
  const int64_t specialised[2] = {cuda::FindPlain(problem, nullptr).plain != nullptr,
                                  differentiable && cuda::FindPlain(problem, d_logits.data()).plain};
  std::fwrite(specialised, sizeof(specialised), 1, out);
  for (const std::string& text : {error.message, complaint}) {
    const int64_t length = text.size();
    std::fwrite(&length, sizeof(length), 1, out);
    std::fwrite(text.data(), 1, text.size(), out);
  }
  if (error) return;
  for (const auto& array : arrays) array->Write(out);
  d_logits.Write(out);
}

}  // namespace
}  // namespace dice_op

int main(int argc, char** argv) {
  dice_op::Require(argc == 3, "usage: run_cases CASES RESULTS");
  FILE* const in = std::fopen(argv[1], "rb");
  FILE* const out = std::fopen(argv[2], "wb");
  dice_op::Require(in && out, "a file cannot be opened");
  for (dice_op::Header header; std::fread(&header, sizeof(header), 1, in) == 1;) dice_op::Run(header, in, out);
  return std::fclose(out);
}

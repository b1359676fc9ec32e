// Runs every kernel on volumes of more than 2^32 voxels, of which only a few exist: memory that nobody has touched
// takes no room, and only those blocks of a launch run that see the chosen places. A voxel's gradient does not depend
// on other voxels, and neither does what it adds to the sums. So the same voxels are gathered in a small volume, which
// must give the same bits of the gradient, and sums that differ by rounding at most. An index that has too few bits
// would read another voxel, or write to another one.
//
// Prints a line for each kernel and kind of problem, and exits with status 1 if one is wrong.
// tests/helpers/emulation.py reads the lines.
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// The launches are planned as ever, and then spread over more blocks; so this program has the launch code itself.
#include "cuda/dice_op_cuda.cu"
#include "no_machine_code.h"
#include "problems.h"

extern "C" const char __executable_start;  // from the linker; `nm` names the addresses counted from here

namespace dice_op {
namespace cuda {
namespace {

constexpr int64_t k32 = int64_t{1} << 32;
constexpr int kTurns = 2;  // tiles that a warp visits
bool all_right = true;

void Expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("WRONG %s\n", what.c_str());
  all_right = false;
}

// Zeros, which take no memory until somebody writes there.
class Sparse {
 public:
  explicit Sparse(int64_t bytes, int64_t place = 0) : bytes_(bytes + 64), place_(place) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) Require(DeviceFailure("no address space"));
  }
  ~Sparse() { munmap(memory_, bytes_); }
  Sparse(const Sparse&) = delete;
  char* data() const { return static_cast<char*>(memory_) + place_; }

 private:
  int64_t bytes_, place_;
  void* memory_;
};

// A number in [0, 1) that says which voxel it belongs to.
double Fraction(uint64_t sample, uint64_t voxel, uint64_t item) {
  uint64_t x = sample * 0x9e3779b97f4a7c15u + voxel * 0xd1b54a32d192ed03u + item * 0x8cb92ba72f3d8dd7u;
  for (int i = 0; i < 2; ++i) x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  return static_cast<double>(x >> 11) / static_cast<double>(int64_t{1} << 53);
}

void Put(double value, DType dtype, char* array, int64_t at) {
  WithType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    reinterpret_cast<T*>(array)[at] = ToStorage<T>(value);
  });
}

struct Voxel {
  int64_t sample, voxel;
  bool operator<(const Voxel& other) const { return std::tie(sample, voxel) < std::tie(other.sample, other.voxel); }
};

// A problem like another one, but of this volume, with memory for its arrays.
class Placed {
 public:
  Problem problem;

  Placed(const Problem& like, const Volume& volume)
      : problem(Of(like, volume)),
        values_(problem.batch * problem.voxels * problem.classes),
        logits_(values_ * SizeOf(problem.logits_dtype), Place(like.logits)),
        d_logits_(values_ * SizeOf(problem.logits_dtype), Place(like.logits)),
        labels_((problem.dense_labels ? values_ : values_ / problem.classes) * SizeOf(problem.labels_dtype)),
        weight_(problem.batch * problem.voxels * SizeOf(problem.weight_dtype)),
        d_sums_(problem.batch * problem.classes * SizeOf(problem.sums_dtype()) * kSumCount) {
    problem.logits = logits_.data();
    problem.labels = labels_.data();
    if (problem.voxel_weight) problem.voxel_weight = weight_.data();
  }

  // The voxel gets the values of that one.
  void Fill(const Voxel& voxel, const Voxel& as) {
    const auto fraction = [&](int64_t item) { return Fraction(as.sample, as.voxel, item); };
    const int64_t at = voxel.sample * problem.voxels + voxel.voxel;
    const bool probabilities = problem.options.activation == Activation::kNone;
    for (int64_t c = 0; c < problem.classes; ++c) {
      const int64_t place = PlaceInLogits(problem, voxel.sample, voxel.voxel, c);
      const double x = fraction(c);
      Put(probabilities ? 0.05 + 0.9 * x : 6 * x - 3, problem.logits_dtype, logits_.data(), place);
      std::memset(Gradient(voxel, c), 0xff, SizeOf(problem.logits_dtype));  // no kernel writes this NaN
      if (problem.dense_labels) Put(fraction(1000 + c), problem.labels_dtype, labels_.data(), place);
    }
    const double labels = static_cast<double>(std::min<int64_t>(problem.label_limit(), 255));
    if (!problem.dense_labels) Put(std::floor(labels * fraction(2000)), problem.labels_dtype, labels_.data(), at);
    if (problem.voxel_weight) Put(0.5 + std::floor(4 * fraction(3000)), problem.weight_dtype, weight_.data(), at);
    // The derivatives are the same for every sample.
    for (int sum = 0; sum < kSumCount; ++sum) {
      for (int64_t c = 0; c < problem.classes; ++c) {
        Put(2 * Fraction(sum, c, 4000) - 1, problem.sums_dtype(), Derivatives(sum), voxel.sample * problem.classes + c);
      }
    }
  }

  char* Gradient(const Voxel& voxel, int64_t c) const {
    return d_logits_.data() + PlaceInLogits(problem, voxel.sample, voxel.voxel, c) * SizeOf(problem.logits_dtype);
  }

  // The launch of the gradient, or of the sums.
  Plan PlanOf(bool grad) const {
    Plan plan;
    Require(MakePlan(problem, grad ? d_logits_.data() : nullptr, &plan));
    if (!grad) return plan;
    for (const SumInfo& info : kSums) {
      if (info.has_gradient && problem.Has(info.sum)) {
        plan.call.d_sums[info.sum] = Derivatives(static_cast<int>(info.sum));
      }
    }
    plan.call.terms.cross_entropy = plan.call.d_sums[Sum::kCrossEntropy] != nullptr;
    plan.call.d_logits = d_logits_.data();
    return plan;
  }

 private:
  static Problem Of(const Problem& like, const Volume& volume) {
    Problem problem = like;
    const Dims voxels = {volume.batch, volume.voxels};
    const Dims dims = like.channels_last() ? Dims{volume.batch, volume.voxels, like.classes}
                                           : Dims{volume.batch, like.classes, volume.voxels};
    Require(MakeProblem(dims, like.dense_labels ? dims : voxels, {}, &problem));
    return problem;
  }
  static int64_t Place(const void* array) { return reinterpret_cast<int64_t>(array) % 16; }
  char* Derivatives(int sum) const {
    return d_sums_.data() + sum * problem.batch * problem.classes * SizeOf(problem.sums_dtype());
  }

  int64_t values_;
  Sparse logits_, d_logits_, labels_, weight_, d_sums_;
};

const void* KernelOf(const Plan& plan) {
  return plan.WithKernel([](auto* kernel, const auto&) { return reinterpret_cast<const void*>(kernel); });
}

// Launches these blocks. Of the sums' kernel, returns the sum of their rows.
std::vector<double> Launch(Plan plan, const std::vector<unsigned>& blocks) {
  const int length = PartialLength(plan.call.classes, plan.variant.class_sums);
  const Sparse partials(int64_t{plan.blocks.x} * plan.blocks.y * length * sizeof(double));
  plan.call.partials = reinterpret_cast<double*>(partials.data());
  cuda_emulator::chosen = &blocks;
  Require(ErrorOf(plan.Launch(nullptr), "the launch"));
  cuda_emulator::chosen = nullptr;
  std::vector<double> row(length);
  for (const unsigned block : blocks) {
    const int64_t place = block % plan.blocks.x * int64_t{plan.blocks.y} + block / plan.blocks.x;
    for (int i = 0; i < length; ++i) row[i] += plan.call.partials[place * length + i];
  }
  return row;
}

// Runs the kernel of the sums or of the gradient for one problem of this volume.
void Compare(const Problem& like, const Volume& volume, bool grad, const std::string& name) {
  Placed vast(like, volume);
  Plan plan = vast.PlanOf(grad);
  const int64_t tile = plan.variant.tile, tiles = plan.call.tiles, warps = plan.variant.warps;
  const int64_t batch = volume.batch, classes = like.classes, size = SizeOf(like.logits_dtype);
  if (batch <= 4) {
    plan.call.blocks_per_sample = static_cast<int>(std::max<int64_t>(1, tiles / (warps * kTurns)));
    plan.blocks.y = plan.call.blocks_per_sample;
  }
  const int64_t blocks = plan.call.blocks_per_sample;

  // The gradient's kernel may visit the tiles backwards, with the last or the last full one first.
  std::set<int64_t> chosen;  // of each sample
  const auto choose = [&](int64_t t) {
    if (t >= 0) chosen.insert(t % (blocks * warps) / warps);
  };
  for (const int64_t voxel : {int64_t{0}, volume.voxels - 1, k32 / 2, k32 - 1, k32, k32 / 2 / classes, k32 / classes,
                              k32 / 2 / classes / size, k32 / classes / size}) {
    if (voxel >= volume.voxels) continue;
    for (const int64_t t : {voxel / tile, tiles - 1 - voxel / tile, tiles - 2 - voxel / tile}) {
      if (grad || t == voxel / tile) choose(t);
    }
  }
  std::vector<unsigned> numbers;
  std::set<Voxel> filled, visited;
  int64_t count = 0;  // of voxels that the blocks visit
  for (const int64_t sample : std::set<int64_t>{0, batch - 1}) {
    for (const int64_t block : chosen) {
      numbers.push_back(static_cast<unsigned>(block * batch + sample));
      for (int64_t t = block * warps; t < tiles; t += (t + 1) % warps ? 1 : (blocks - 1) * warps + 1) {
        count += std::min((t + 1) * tile, volume.voxels) - t * tile;
        for (const int64_t seen : {t, tiles - 1 - t, tiles - 2 - t}) {
          if (seen < 0 || (!grad && seen != t)) continue;
          for (int64_t v = seen * tile; v < std::min((seen + 1) * tile, volume.voxels); ++v) {
            filled.insert({sample, v});
          }
        }
      }
    }
  }
  const std::vector<Voxel> voxels(filled.begin(), filled.end());
  Placed small(like, {1, static_cast<int64_t>(voxels.size())});
  for (size_t i = 0; i < voxels.size(); ++i) {
    vast.Fill(voxels[i], voxels[i]);
    small.Fill({0, static_cast<int64_t>(i)}, voxels[i]);
  }
  const Plan gathered = small.PlanOf(grad);
  Expect(KernelOf(gathered) == KernelOf(plan), name + ": the small volume has another kernel");
  std::vector<unsigned> all(gathered.blocks.y);
  for (unsigned i = 0; i < all.size(); ++i) all[i] = i;
  const std::vector<double> row = Launch(plan, numbers), wanted = Launch(gathered, all);
  if (!grad) {
    for (size_t i = 0; i < row.size(); ++i) {
      const double error = std::abs(row[i] - wanted[i]), size_of_it = std::abs(wanted[i]);
      Expect(error <= 2e-6 * size_of_it, name + ": sum " + std::to_string(i));
    }
    return;
  }
  int64_t written = 0, wrong = 0;
  for (size_t i = 0; i < voxels.size(); ++i) {
    bool untouched = true, same = true;
    for (int64_t c = 0; c < classes; ++c) {
      const char* const gradient = vast.Gradient(voxels[i], c);
      for (int byte = 0; byte < size; ++byte) untouched &= gradient[byte] == '\xff';
      same &= std::memcmp(gradient, small.Gradient({0, static_cast<int64_t>(i)}, c), size) == 0;
    }
    written += !untouched;
    wrong += !untouched && !same;
  }
  Expect(wrong == 0, name + ": the gradient of " + std::to_string(wrong) + " voxels");
  Expect(written == count, name + ": " + std::to_string(written) + " of " + std::to_string(count) + " voxels written");
}

// What differs in a kernel at run time: the types of logits and labels, the layout, the weights, and whether there is
// one class or several.
using Kind = std::tuple<const void*, DType, DType, bool, bool, bool, bool>;

// Which voxels a batch has: one sample, a few large ones, or as many as a call may have.
Volume Shape(int sort, const Problem& like, int64_t tile) {
  const int64_t odd = like.channels_last() ? 1 : 0;  // planes of whole words have the fast kernels
  const int64_t most = kMaxTiles * tile;
  if (sort == 0) return {1, k32 + 1000 + odd <= most ? k32 + 1000 + odd : most - 8 + odd};
  if (sort == 1) return {3, k32 / 2 + 1000};
  const int64_t batch = 0x7fffffff / RowLength(like.classes);
  return {batch, (k32 / batch / 64 + 1) * 64};
}

// A kernel that serves several numbers of classes runs with the largest, and with a single class.
// brief: not each type that a kernel reads.
void CompareAll(bool brief) {
  std::set<std::pair<int, Kind>> done;
  for (int classes = kMaxClasses; classes > 0; --classes) {
    ForEachProblem({1, 4096}, classes, [&](const Problem& like, const char* setting) {
      for (int grad = 0; grad < (like.hard() ? 1 : 2); ++grad) {
        const void* const d_logits = grad ? like.logits : nullptr;
        Variant variant = FindPlain(like, d_logits);
        if (!variant.plain) variant = FindGeneral(like, d_logits);
        if (!variant.plain && !variant.general) continue;  // few_kernels.cc has none for it
        const void* const kernel = variant.plain ? reinterpret_cast<const void*>(variant.plain)
                                                 : reinterpret_cast<const void*>(variant.general);
        const bool channels_last = like.channels_last(), weighted = like.voxel_weight != nullptr, one = classes == 1;
        const Kind layout = {kernel, {}, {}, {}, channels_last, weighted, one},
                   kind = {kernel, like.logits_dtype, like.labels_dtype, like.dense_labels, channels_last, weighted,
                           one};
        for (int sort = 0; sort < 3; ++sort) {
          if (!done.insert({sort, brief || sort > 0 ? layout : kind}).second) continue;
          const Volume volume = Shape(sort, like, variant.tile);
          const std::string name = std::string(Name(like.logits_dtype)) + " " +
                                   Show(Dims{volume.batch, volume.voxels, like.classes}) + " " +
                                   ToAttribute(like.options.data_format) + " " + ToAttribute(like.options.activation) +
                                   ", " + (like.dense_labels ? "dense " : "") + Name(like.labels_dtype) + " labels, " +
                                   setting + (grad ? " gradient" : " sums");
          std::printf("%lld %s\n", static_cast<long long>(static_cast<const char*>(kernel) - &__executable_start),
                      name.c_str());
          std::fflush(stdout);  // a wrong index may end the program
          Compare(like, volume, grad != 0, name);
        }
      }
    });
  }
}

// The kernel that adds the blocks' rows, where these have more than 2^32 numbers.
void CompareCombine() {
  const int64_t batch = int64_t{1} << 20, classes = 4, blocks = kMaxBlocks;
  const int row = static_cast<int>(RowLength(classes)), length = row + 1;
  const Sparse values(batch * blocks * length * sizeof(double)), output(batch * classes * sizeof(double));
  Partials partials = {};
  partials.values = reinterpret_cast<const double*>(values.data());
  partials.class_sums = kClassSumCount;
  partials.batch = batch;
  partials.blocks_per_sample = blocks;
  partials.classes = classes;
  partials.outputs[Sum::kPredSum] = output.data();
  std::vector<unsigned> numbers;
  for (const int64_t sample : {int64_t{0}, batch / 2, batch - 1}) {
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t c = 0; c < classes; ++c) {
        Put(Fraction(sample, i, c), DType::kDouble, values.data(), (sample * blocks + i) * length + classes + c);
      }
    }
    for (int64_t c = 0; c < classes; ++c) numbers.push_back((sample * row + classes + c) / kWarps);
  }
  cuda_emulator::chosen = &numbers;
  const unsigned grid = static_cast<unsigned>((batch * row + kWarps - 1) / kWarps);
  Require(ErrorOf(dice_op::Launch(CombineKernel<double>, dim3(grid), kThreads, 0, nullptr, partials), "the launch"));
  cuda_emulator::chosen = nullptr;
  for (const int64_t sample : {int64_t{0}, batch / 2, batch - 1}) {
    for (int64_t c = 0; c < classes; ++c) {
      double wanted = 0;
      for (int64_t i = 0; i < blocks; ++i) wanted += Fraction(sample, i, c);
      const double got = reinterpret_cast<const double*>(output.data())[sample * classes + c];
      Expect(std::abs(got - wanted) <= 1e-12 * wanted, "combined sums of sample " + std::to_string(sample));
    }
  }
  std::printf("combined\n");
}

// The search for bad values names the voxel, wherever it is.
void CompareSearch() {
  for (const bool in_prediction : {false, true}) {
    for (const bool channels_last : {false, true}) {
      Problem problem;
      problem.options.activation = Activation::kNone;
      problem.options.data_format = channels_last ? DataFormat::kChannelsLast : DataFormat::kChannelsFirst;
      const int64_t height = 65537, width = 65539, voxels = height * width, batch = 2, classes = 3;
      const Dims dims = channels_last ? Dims{batch, height, width, classes} : Dims{batch, classes, height, width};
      Require(MakeProblem(dims, {batch, height, width}, {}, &problem));
      const Sparse logits(batch * voxels * classes * sizeof(float)), labels(batch * voxels), first(8);
      problem.logits = logits.data();
      problem.labels = labels.data();
      const int64_t voxel = voxels - 4, at = voxels + voxel;
      if (in_prediction) {
        Put(1.5, DType::kFloat, logits.data(), PlaceInLogits(problem, 1, voxel, 2));
      } else {
        Put(7, DType::kUint8, labels.data(), at);
      }
      const std::vector<unsigned> numbers = {static_cast<unsigned>(at / kThreads % 4096)};  // whose thread sees it
      cuda_emulator::chosen = &numbers;
      const Error error = FindBadValue(problem, first.data(), nullptr);
      cuda_emulator::chosen = nullptr;
      const std::string place = "at voxel [1, 65536, 65535]", value = in_prediction ? "the value 1.5" : "the value 7";
      Expect(error.message.find(place) != std::string::npos && error.message.find(value) != std::string::npos,
             "the search says: " + error.message);
    }
  }
  std::printf("searched\n");
}

}  // namespace
}  // namespace cuda
}  // namespace dice_op

int main(int argc, char** argv) {
  const bool brief = argc == 2 && std::strcmp(argv[1], "brief") == 0;
  dice_op::cuda::CompareCombine();
  dice_op::cuda::CompareSearch();
  dice_op::cuda::CompareAll(brief);
  return dice_op::cuda::all_right ? 0 : 1;
}

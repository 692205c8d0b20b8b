// The Python module hyperadam.kernels._cpu.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>
#include <xsimd/xsimd.hpp>

#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace hyperadam {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Names of the instruction sets that this processor has, the best first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#ifdef HYPERADAM_X86
  const auto available = xsimd::available_architectures();
  if (available.has(xsimd::avx512bw{})) names.emplace_back("avx512");
  if (available.has(xsimd::fma3<xsimd::avx2>{})) names.emplace_back("avx2");
#endif
  names.emplace_back("portable");
  return names;
}

const Kernels& kernels_of(const std::string& name) {
  for (const std::string& known : instruction_sets()) {
    if (known != name) continue;
#ifdef HYPERADAM_X86
    if (name == "avx512") return avx512_kernels;
    if (name == "avx2") return avx2_kernels;
#endif
    return portable_kernels;
  }
  throw std::invalid_argument("this processor does not have the instruction set " + name);
}

// The parts of a state that a step is about, cut into chunks.
class Plan {
 public:
  // parts_P4: first tile, count, segment and first coordinate of each part.
  Plan(Matrix<const std::int64_t> parts_P4, Vector<const std::int64_t> seeds_P,
       Vector<const bool> sample_P)
      : parts_(static_cast<std::int64_t>(parts_P4.shape(0))) {
    require(parts_P4.shape(1) == 4, "parts must have four columns");
    require(static_cast<std::int64_t>(seeds_P.shape(0)) == parts_ &&
                static_cast<std::int64_t>(sample_P.shape(0)) == parts_,
            "one seed and one choice to sample for each part");
    for (std::int64_t p = 0; p < parts_; ++p) {
      const std::int64_t first = parts_P4(p, 0), count = parts_P4(p, 1);
      const std::int64_t segment = parts_P4(p, 2), coordinate = parts_P4(p, 3);
      require(first >= 0 && count >= 0 && segment >= 0 && coordinate >= 0,
              "a part's numbers must not be negative");
      const std::int64_t tiles = (count + TILE - 1) / TILE;
      if (first + tiles > tiles_) tiles_ = first + tiles;
      if (segment + 1 > segments_) segments_ = segment + 1;
      for (std::int64_t tile = 0; tile < tiles; tile += CHUNK_TILES) {
        const std::int64_t here = tiles - tile < CHUNK_TILES ? tiles - tile : CHUNK_TILES;
        chunks_.push_back({p, segment, first + tile, here, count - tile * TILE,
                           coordinate + tile * TILE, 0, static_cast<std::uint64_t>(seeds_P(p)),
                           sample_P(p)});
      }
    }
  }

  // The chunks, at the steps that the parts are to take.
  std::vector<Chunk> chunks(const Vector<const std::int64_t>& steps_P) const {
    require(static_cast<std::int64_t>(steps_P.shape(0)) == parts_, "one step for each part");
    std::vector<Chunk> chunks = chunks_;
    for (Chunk& chunk : chunks) chunk.step = static_cast<std::uint64_t>(steps_P(chunk.part));
    return chunks;
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  std::int64_t tiles() const { return tiles_; }
  std::int64_t segments() const { return segments_; }

 private:
  std::int64_t parts_;
  std::int64_t tiles_ = 0;
  std::int64_t segments_ = 0;
  std::vector<Chunk> chunks_;
};

// A rule with its theta, for one instruction set.
class Program {
 public:
  Program(int channels, const std::vector<double>& decays, float bound, bool bfloat16,
          const std::vector<Array<const float>>& theta, const std::string& instruction_set)
      : kernels_(kernels_of(instruction_set)) {
    require(channels >= 1 && channels <= MAX_CHANNELS, "the kernel has 1 to 32 channels");
    require(!decays.empty() && decays.size() <= MAX_DECAYS, "the kernel has 1 to 8 decays");
    require(theta.size() == 8 || theta.size() == 10, "theta has 8 or 10 tensors");
    config_.channels = channels;
    config_.decays = static_cast<int>(decays.size());
    for (std::size_t k = 0; k < decays.size(); ++k) config_.decay[k] = decays[k];
    config_.bound = bound;
    config_.bfloat16 = bfloat16;
    config_.var_block = theta.size() == 10;
    const std::size_t h = static_cast<std::size_t>(channels), f = 2 * decays.size();
    const std::size_t sizes[10] = {h * f, h, 8 * h * h, 4 * h, 4 * h * h, 2 * h, h * h, h, h, 1};
    for (std::size_t i = 0; i < theta.size(); ++i) {
      require(theta[i].size() == sizes[i], "a tensor of theta has a wrong size");
      storage_.emplace_back(theta[i].data(), theta[i].data() + theta[i].size());
    }
    const auto at = [&](std::size_t i) {
      return i < storage_.size() ? storage_[i].data() : nullptr;
    };
    theta_ = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  }
  Program(const Program&) = delete;

  // Sums over each segment of x squared; returns whether the gradient is finite.
  bool features(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                const Array<const std::uint8_t>& state, const Vector<const float>& grad,
                const Matrix<double>& sums_SH, int threads) const {
    check_state(plan, state);
    check_vector(plan, grad.shape(0));
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    std::vector<double> partial(chunks.size() * width());
    std::vector<char> finite(chunks.size());
    const Features job{state.data(), grad.data(), partial.data(),
                       reinterpret_cast<bool*>(finite.data())};
    {
      nb::gil_scoped_release release;
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        passes().features(config_, theta_, job, chunks[static_cast<std::size_t>(index)], index);
      });
    }
    add_up(chunks, partial, sums_SH);
    for (const char each : finite) {
      if (!each) return false;
    }
    return true;
  }

  // Sums over each segment of the squares of h ("h") or m ("m") as they are.
  void squares(const Plan& plan, const Array<const std::uint8_t>& state, const std::string& what,
               const Matrix<double>& sums_SH, int threads) const {
    check_state(plan, state);
    require(what == "h" || what == "m", "squares are of h or m");
    const int row = what == "h" ? config_.row_h() : config_.row_m();
    const std::vector<Chunk>& chunks = plan.chunks();
    std::vector<double> partial(chunks.size() * width());
    {
      nb::gil_scoped_release release;
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        const std::size_t i = static_cast<std::size_t>(index);
        passes().squares(config_, state.data(), row, config_.channels, chunks[i],
                         partial.data() + i * width());
      });
    }
    add_up(chunks, partial, sums_SH);
  }

  void state_cell(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                  const Array<const std::uint8_t>& state, const Array<std::uint8_t>& new_state,
                  const Vector<const float>& grad, const Matrix<const float>& scale_SC,
                  const Matrix<double>& sums_SH, int threads) const {
    check_state(plan, state);
    check_state(plan, new_state);
    check_vector(plan, grad.shape(0));
    check_scale(plan, scale_SC);
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    std::vector<double> partial(chunks.size() * width());
    {
      nb::gil_scoped_release release;
      const std::vector<float> weights =
          pack(plan, scale_SC, kernels_.packed_state_cell_size, kernels_.pack_state_cell);
      const StateCell job{state.data(), new_state.data(), grad.data(), weights.data(),
                          partial.data()};
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        passes().state_cell(config_, theta_, job, chunks[static_cast<std::size_t>(index)], index);
      });
    }
    add_up(chunks, partial, sums_SH);
  }

  void adam_cell(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                 const Array<const std::uint8_t>& state, const Array<std::uint8_t>& new_state,
                 const Vector<const float>& grad, const Matrix<const float>& scale_SC,
                 const Matrix<double>& sums_SH, const Vector<float>& mean,
                 const std::optional<Vector<float>>& log_var,
                 const std::optional<Vector<float>>& direction, int threads) const {
    check_state(plan, state);
    check_state(plan, new_state);
    check_vector(plan, grad.shape(0));
    check_vector(plan, mean.shape(0));
    check_scale(plan, scale_SC);
    require(log_var.has_value() == config_.var_block, "log_var goes with a VarBlock");
    if (log_var) check_vector(plan, log_var->shape(0));
    if (direction) check_vector(plan, direction->shape(0));
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    std::vector<double> partial(chunks.size() * width());
    {
      nb::gil_scoped_release release;
      const std::vector<float> weights =
          pack(plan, scale_SC, kernels_.packed_adam_cell_size, kernels_.pack_adam_cell);
      const AdamCell job{state.data(),
                         new_state.data(),
                         grad.data(),
                         weights.data(),
                         partial.data(),
                         mean.data(),
                         log_var ? log_var->data() : nullptr,
                         direction ? direction->data() : nullptr};
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        passes().adam_cell(config_, theta_, job, chunks[static_cast<std::size_t>(index)], index);
      });
    }
    add_up(chunks, partial, sums_SH);
  }

 private:
  std::size_t width() const { return static_cast<std::size_t>(config_.channels); }
  const Passes& passes() const { return config_.bfloat16 ? kernels_.bfloat16 : kernels_.float32; }

  // States come as bytes, so that one signature serves both storage types.
  template <class T>
  void check_state(const Plan& plan, const Array<T>& state) const {
    const std::size_t number = config_.bfloat16 ? 2 : 4;
    const std::size_t tile = static_cast<std::size_t>(config_.rows()) * TILE * number;
    require(state.size() >= static_cast<std::size_t>(plan.tiles()) * tile,
            "the state has too few tiles");
  }

  static void check_vector(const Plan& plan, std::size_t size) {
    require(size >= static_cast<std::size_t>(plan.tiles()) * TILE,
            "a vector over the coordinates is too short");
  }

  void check_scale(const Plan& plan, const Matrix<const float>& scale_SC) const {
    require(static_cast<std::int64_t>(scale_SC.shape(0)) >= plan.segments() &&
                scale_SC.shape(1) == 2 * width(),
            "scales must be of shape (segments, 2H)");
  }

  std::vector<float> pack(const Plan& plan, const Matrix<const float>& scale_SC,
                          std::int64_t (*size)(const Config&),
                          void (*pack_one)(const Config&, const Theta&, const float*,
                                           float*)) const {
    const std::int64_t each = size(config_);
    std::vector<float> packed(static_cast<std::size_t>(each * plan.segments()));
    for (std::int64_t s = 0; s < plan.segments(); ++s) {
      pack_one(config_, theta_, scale_SC.data() + s * 2 * config_.channels,
               packed.data() + s * each);
    }
    return packed;
  }

  // Sums over chunks in their order, so that the number of threads does not show.
  void add_up(const std::vector<Chunk>& chunks, const std::vector<double>& partial,
              const Matrix<double>& sums_SH) const {
    require(sums_SH.shape(1) == width(), "sums must be of shape (segments, H)");
    double* sums = sums_SH.data();
    for (std::size_t i = 0; i < sums_SH.size(); ++i) sums[i] = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      require(static_cast<std::size_t>(chunks[i].segment) < sums_SH.shape(0),
              "sums must be of shape (segments, H)");
      double* sum = sums + static_cast<std::size_t>(chunks[i].segment) * width();
      for (std::size_t c = 0; c < width(); ++c) sum[c] += partial[i * width() + c];
    }
  }

  const Kernels& kernels_;
  Config config_{};
  Theta theta_{};
  std::vector<std::vector<float>> storage_;
};

}  // namespace
}  // namespace hyperadam

NB_MODULE(_cpu, module) {
  using namespace hyperadam;
  module.attr("TILE") = TILE;
  module.attr("MAX_CHANNELS") = MAX_CHANNELS;
  module.attr("MAX_DECAYS") = MAX_DECAYS;
  module.def("instruction_sets", &instruction_sets);
  nb::class_<Plan>(module, "Plan")
      .def(nb::init<Matrix<const std::int64_t>, Vector<const std::int64_t>, Vector<const bool>>());
  nb::class_<Program>(module, "Program")
      .def(nb::init<int, const std::vector<double>&, float, bool,
                    const std::vector<Array<const float>>&, const std::string&>())
      .def("features", &Program::features)
      .def("squares", &Program::squares)
      .def("state_cell", &Program::state_cell)
      .def("adam_cell", &Program::adam_cell, nb::arg("plan"), nb::arg("steps"), nb::arg("state"),
           nb::arg("new_state"), nb::arg("grad"), nb::arg("scale"), nb::arg("sums"),
           nb::arg("mean"), nb::arg("log_var").none(), nb::arg("direction").none(),
           nb::arg("threads"));
}

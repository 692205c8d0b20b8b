// The Python module hyperadam.kernels._cpu.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
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

const InstructionSet& instruction_set_of(const std::string& name) {
  for (const std::string& known : instruction_sets()) {
    if (known != name) continue;
#ifdef HYPERADAM_X86
    if (name == "avx512") return avx512;
    if (name == "avx2") return avx2;
#endif
    return portable;
  }
  throw std::invalid_argument("this processor does not have the instruction set " + name);
}

// Standard normal numbers of B seeds at T steps, for the coordinates from 0 on.
void standard_normal(const Vector<const std::int64_t>& seeds_B,
                     const Vector<const std::int64_t>& steps_T,
                     const nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& out_TBN,
                     int threads) {
  const std::size_t tasks = seeds_B.shape(0), count = out_TBN.shape(2);
  require(out_TBN.shape(0) == steps_T.shape(0) && out_TBN.shape(1) == tasks,
          "noise must be of shape (steps, seeds, coordinates)");
  const InstructionSet& best = instruction_set_of(instruction_sets().front());
  nb::gil_scoped_release release;
  parallel_for(static_cast<std::int64_t>(steps_T.shape(0) * tasks), threads,
               [&](std::int64_t index) {
                 const std::size_t row = static_cast<std::size_t>(index);
                 best.standard_normal(static_cast<std::uint64_t>(seeds_B(row % tasks)),
                                      static_cast<std::uint64_t>(steps_T(row / tasks)), 0,
                                      static_cast<std::int64_t>(count),
                                      out_TBN.data() + row * count);
               });
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
template <class Real>
class Program {
 public:
  Program(int channels, const std::vector<double>& decays, double bound, bool bfloat16,
          const std::vector<Array<const Real>>& theta, const std::string& instruction_set)
      : kernels_(instruction_set_of(instruction_set).of<Real>()), bfloat16_(bfloat16) {
    require(!bfloat16 || std::is_same_v<Real, float>, "states of bfloat16 go with float32");
    require(channels >= 1 && channels <= MAX_CHANNELS, "the kernel has 1 to 32 channels");
    require(!decays.empty() && decays.size() <= MAX_DECAYS, "the kernel has 1 to 8 decays");
    require(theta.size() == 8 || theta.size() == 10, "theta has 8 or 10 tensors");
    config_.channels = channels;
    config_.decays = static_cast<int>(decays.size());
    for (std::size_t k = 0; k < decays.size(); ++k) config_.decay[k] = decays[k];
    config_.bound = bound;
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
                const Array<const std::uint8_t>& state, const Vector<const Real>& grad,
                const Matrix<double>& sums_SH, int threads) const {
    check_state(plan, state);
    check_vector(plan, grad.shape(0));
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    std::vector<double> partial(chunks.size() * width());
    std::vector<char> finite(chunks.size());
    const Features<Real> job{state.data(), grad.data(), partial.data(),
                       reinterpret_cast<bool*>(finite.data())};
    {
      nb::gil_scoped_release release;
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        passes().features(config_, theta_, job, chunks[static_cast<std::size_t>(index)], index);
      });
    }
    add_up(chunks, partial, sums_SH, width());
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
    add_up(chunks, partial, sums_SH, width());
  }

  void state_cell(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                  const Array<const std::uint8_t>& state, const Array<std::uint8_t>& new_state,
                  const Vector<const Real>& grad, const Matrix<const Real>& scale_SC,
                  const Matrix<double>& sums_SH, int threads) const {
    check_state(plan, state);
    check_state(plan, new_state);
    check_vector(plan, grad.shape(0));
    check_scale(plan, scale_SC);
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    std::vector<double> partial(chunks.size() * width());
    {
      nb::gil_scoped_release release;
      const std::vector<Real> weights =
          pack(plan, scale_SC, kernels_.state_cell);
      const StateCell<Real> job{state.data(), new_state.data(), grad.data(), weights.data(),
                          partial.data()};
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        passes().state_cell(config_, theta_, job, chunks[static_cast<std::size_t>(index)], index);
      });
    }
    add_up(chunks, partial, sums_SH, width());
  }

  void adam_cell(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                 const Array<const std::uint8_t>& state, const Array<std::uint8_t>& new_state,
                 const Vector<const Real>& grad, const Matrix<const Real>& scale_SC,
                 const Matrix<double>& sums_SH, const Vector<Real>& mean,
                 const std::optional<Vector<Real>>& log_var,
                 const std::optional<Vector<Real>>& direction, int threads) const {
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
      const std::vector<Real> weights =
          pack(plan, scale_SC, kernels_.adam_cell);
      const AdamCell<Real> job{state.data(),
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
    add_up(chunks, partial, sums_SH, width());
  }

  // Sums over each segment of the fixed moment of a decay, corrected, and of the mean squared.
  void variance_sums(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                     const Array<const std::uint8_t>& state, int decay,
                     const Vector<const Real>& mean, const Matrix<double>& sums_S2,
                     int threads) const {
    check_state(plan, state);
    check_decay(decay);
    check_vector(plan, mean.shape(0));
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    std::vector<double> partial(chunks.size() * 2);
    {
      nb::gil_scoped_release release;
      const VarianceSums<Real> job{state.data(), decay, mean.data(), partial.data()};
      parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
        passes().variance_sums(config_, job, chunks[static_cast<std::size_t>(index)], index);
      });
    }
    add_up(chunks, partial, sums_S2, 2);
  }

  // Gives the variances that adam_cell wrote, and its samples, their shape.
  void shape_variance(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                      const Array<const std::uint8_t>& state, int decay, double base, double floor,
                      const Vector<const double>& moment_S, const Vector<const double>& level_S,
                      const Vector<const Real>& mean, const Vector<Real>& log_var,
                      const std::optional<Vector<Real>>& direction, int threads) const {
    check_state(plan, state);
    check_decay(decay);
    check_vector(plan, mean.shape(0));
    check_vector(plan, log_var.shape(0));
    if (direction) check_vector(plan, direction->shape(0));
    require(static_cast<std::int64_t>(moment_S.shape(0)) >= plan.segments() &&
                static_cast<std::int64_t>(level_S.shape(0)) >= plan.segments(),
            "one moment and one level a segment");
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    nb::gil_scoped_release release;
    const VarianceShape<Real> job{state.data(),
                                  decay,
                                  base,
                                  floor,
                                  moment_S.data(),
                                  level_S.data(),
                                  mean.data(),
                                  log_var.data(),
                                  direction ? direction->data() : nullptr};
    parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
      passes().shape_variance(config_, job, chunks[static_cast<std::size_t>(index)]);
    });
  }

  // The state after a step whose scales are known, and no update: what state_cell and adam_cell make
  // of it, bit for bit.
  void again(const Plan& plan, const Vector<const std::int64_t>& steps_P,
             const Array<const Real>& state, const Array<Real>& new_state,
             const Vector<const Real>& grad, const Matrix<const Real>& state_scale_SC,
             const Matrix<const Real>& adam_scale_SC, int threads) const {
    require(!bfloat16_, "states of bfloat16 are not made again");
    check_numbers(plan, state.size());
    check_numbers(plan, new_state.size());
    check_vector(plan, grad.shape(0));
    check_scale(plan, state_scale_SC);
    check_scale(plan, adam_scale_SC);
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    nb::gil_scoped_release release;
    const std::vector<Real> state_weights = pack(plan, state_scale_SC, kernels_.state_cell);
    const std::vector<Real> adam_weights = pack(plan, adam_scale_SC, kernels_.adam_cell);
    const StateCell<Real> state_job{state.data(), new_state.data(), grad.data(),
                                    state_weights.data(), nullptr};
    const AdamCell<Real> adam_job{state.data(), new_state.data(), grad.data(), adam_weights.data(),
                                  nullptr,      nullptr,          nullptr,     nullptr};
    parallel_for(static_cast<std::int64_t>(chunks.size()), threads, [&](std::int64_t index) {
      const Chunk& chunk = chunks[static_cast<std::size_t>(index)];
      passes().state_cell(config_, theta_, state_job, chunk, index);
      passes().adam_cell(config_, theta_, adam_job, chunk, index);
    });
  }

  // The gradient of a meta-loss with respect to theta (in its order, flat) and to the state before the
  // step, from those with respect to the update and the state after it. `scales` are of [x, h] and of
  // [m, h]; `kappa_S` is 1, or one over the coordinates where norms are means. `owed_SC` times the rows
  // [m, h] of the state is still to be subtracted from its gradient: on entry of the state after the
  // step, on return of the one before it.
  void backward(const Plan& plan, const Vector<const std::int64_t>& steps_P,
                const Array<const Real>& state, const Array<const Real>& new_state,
                const Vector<const Real>& grad, const Matrix<const Real>& state_scale_SC,
                const Matrix<const Real>& adam_scale_SC, const Vector<const Real>& kappa_S,
                const Vector<const Real>& d_mean,
                const std::optional<Vector<const Real>>& d_log_var,
                const std::optional<Array<const Real>>& d_new_state,
                const Matrix<Real>& owed_SC, const Array<Real>& d_state,
                const Vector<Real>& d_theta, int threads) const {
    require(!bfloat16_, "the backward passes take states of float32");
    check_numbers(plan, state.size());
    check_numbers(plan, new_state.size());
    check_numbers(plan, d_state.size());
    if (d_new_state) check_numbers(plan, d_new_state->size());
    check_vector(plan, grad.shape(0));
    check_vector(plan, d_mean.shape(0));
    require(d_log_var.has_value() == config_.var_block, "log_var goes with a VarBlock");
    if (d_log_var) check_vector(plan, d_log_var->shape(0));
    check_scale(plan, state_scale_SC);
    check_scale(plan, adam_scale_SC);
    check_scale(plan, owed_SC);
    require(static_cast<std::int64_t>(kappa_S.shape(0)) >= plan.segments(), "one kappa a segment");
    std::size_t size = 0;
    for (const std::vector<Real>& tensor : storage_) size += tensor.size();
    require(d_theta.shape(0) == size, "the gradient of theta has a wrong size");

    nb::gil_scoped_release release;
    const std::vector<Chunk> chunks = plan.chunks(steps_P);
    const std::size_t columns = 2 * width();
    const std::size_t segments = static_cast<std::size_t>(plan.segments());
    const std::vector<Real> state_weights = pack(plan, state_scale_SC, kernels_.state_cell);
    const std::vector<Real> adam_weights = pack(plan, adam_scale_SC, kernels_.adam_cell);
    const std::vector<Real> state_transposed =
        pack(plan, state_scale_SC, kernels_.state_transposed);
    const std::vector<Real> adam_transposed = pack(plan, adam_scale_SC, kernels_.adam_transposed);
    const ThetaGradient layout = kernels_.backward.gradient_layout(config_);
    const std::size_t group_size = static_cast<std::size_t>(layout.size());
    const std::size_t groups = chunks.size() < MAX_GROUPS ? chunks.size() : MAX_GROUPS;
    std::vector<Real> sums(groups * group_size);
    std::vector<double> partial(chunks.size() * columns);
    const auto d_x = std::make_unique_for_overwrite<Real[]>(
        static_cast<std::size_t>(plan.tiles()) * width() * TILE);
    std::vector<Real> adam_correction(segments * columns), state_correction(segments * columns);
    const BackwardJob<Real> job{state.data(),
                          new_state.data(),
                          grad.data(),
                          d_mean.data(),
                          d_log_var ? d_log_var->data() : nullptr,
                          d_new_state ? d_new_state->data() : nullptr,
                          owed_SC.data(),
                          d_state.data(),
                          d_x.get(),
                          state_weights.data(),
                          adam_weights.data(),
                          state_transposed.data(),
                          adam_transposed.data(),
                          adam_correction.data(),
                          state_correction.data(),
                          adam_scale_SC.data(),
                          state_scale_SC.data(),
                          partial.data(),
                          sums.data()};
    // A group's chunks add to one gradient in their order, whichever thread has the group.
    const auto run = [&](typename BackwardPasses<Real>::Pass pass) {
      parallel_for(static_cast<std::int64_t>(groups), threads, [&](std::int64_t index) {
        const std::size_t group = static_cast<std::size_t>(index);
        const std::size_t begin = group * chunks.size() / groups;
        const std::size_t end = (group + 1) * chunks.size() / groups;
        for (std::size_t i = begin; i < end; ++i) {
          pass(config_, theta_, job, chunks[i], static_cast<std::int64_t>(i),
               sums.data() + group * group_size);
        }
      });
    };
    const auto correct = [&](const Matrix<const Real>& scale_SC, std::vector<Real>& correction) {
      std::vector<double> totals(segments * columns);
      for (std::size_t i = 0; i < chunks.size(); ++i) {
        for (std::size_t c = 0; c < columns; ++c) {
          totals[static_cast<std::size_t>(chunks[i].segment) * columns + c] +=
              partial[i * columns + c];
        }
      }
      for (std::size_t s = 0; s < segments; ++s) {
        for (std::size_t c = 0; c < columns; ++c) {
          const double scale = static_cast<double>(scale_SC(s, c));
          correction[s * columns + c] = static_cast<Real>(
              static_cast<double>(kappa_S(s)) * scale * scale * totals[s * columns + c]);
        }
      }
    };
    run(kernels_.backward.adam_cell);
    correct(adam_scale_SC, adam_correction);
    run(kernels_.backward.state_cell);
    correct(state_scale_SC, state_correction);
    run(kernels_.backward.features);
    for (std::size_t s = 0; s < segments; ++s) {
      Real* owed = owed_SC.data() + s * columns;
      for (std::size_t c = 0; c < columns; ++c) {
        owed[c] = c < width() ? adam_correction[s * columns + c] : state_correction[s * columns + c];
      }
    }

    for (std::size_t group = 1; group < groups; ++group) {
      for (std::size_t i = 0; i < group_size; ++i) sums[i] += sums[group * group_size + i];
    }
    Real* out = d_theta.data();
    for (std::size_t i = 0; i < size; ++i) out[i] = 0;
    if (groups == 0) return;
    const int channels = config_.channels, features = 2 * config_.decays;
    Real* pre = out;
    Real* lstm = pre + channels * (features + 1);
    Real* adam = lstm + 4 * channels * (2 * channels + 1);
    Real* post = adam + 2 * channels * (2 * channels + 1);
    Real* var = post + channels * (channels + 1);
    unpad(sums.data() + layout.pre(), channels, features, layout.short_(), pre,
          pre + channels * features);
    unpad(sums.data() + layout.lstm(), 4 * channels, 2 * channels, layout.wide(), lstm,
          lstm + 8 * channels * channels);
    unpad(sums.data() + layout.adam(), 2 * channels, 2 * channels, layout.wide(), adam,
          adam + 4 * channels * channels);
    const Real* of_h = sums.data() + layout.post() + channels - layout.skip();
    unpad(of_h, channels, channels, layout.narrow(), post, post + channels * channels);
    if (config_.var_block) {
      unpad(of_h + channels * layout.narrow(), 1, channels, layout.narrow(), var, var + channels);
    }
  }

 private:
  static constexpr std::size_t MAX_GROUPS = 64;

  std::size_t width() const { return static_cast<std::size_t>(config_.channels); }
  const Passes<Real>& passes() const { return bfloat16_ ? kernels_.bfloat16 : kernels_.plain; }

  // States come as bytes, so that one signature serves both storage types.
  template <class T>
  void check_state(const Plan& plan, const Array<T>& state) const {
    const std::size_t number = bfloat16_ ? 2 : sizeof(Real);
    const std::size_t tile = static_cast<std::size_t>(config_.rows()) * TILE * number;
    require(state.size() >= static_cast<std::size_t>(plan.tiles()) * tile,
            "the state has too few tiles");
  }

  void check_decay(int decay) const {
    require(decay >= 0 && decay < config_.decays, "there is no such decay");
  }

  void check_numbers(const Plan& plan, std::size_t size) const {
    require(size >= static_cast<std::size_t>(plan.tiles() * config_.rows() * TILE),
            "the state has too few tiles");
  }

  static void check_vector(const Plan& plan, std::size_t size) {
    require(size >= static_cast<std::size_t>(plan.tiles()) * TILE,
            "a vector over the coordinates is too short");
  }

  template <class T>
  void check_scale(const Plan& plan, const Matrix<T>& scale_SC) const {
    require(static_cast<std::int64_t>(scale_SC.shape(0)) >= plan.segments() &&
                scale_SC.shape(1) == 2 * width(),
            "scales must be of shape (segments, 2H)");
  }

  std::vector<Real> pack(const Plan& plan, const Matrix<const Real>& scale_SC,
                          const Packing<Real>& packing) const {
    const std::int64_t each = packing.size(config_);
    std::vector<Real> packed(static_cast<std::size_t>(each * plan.segments()));
    for (std::int64_t s = 0; s < plan.segments(); ++s) {
      packing.pack(config_, theta_, scale_SC.data() + s * 2 * config_.channels,
                   packed.data() + s * each);
    }
    return packed;
  }

  // Sums over chunks in their order, so that the number of threads does not show.
  static void add_up(const std::vector<Chunk>& chunks, const std::vector<double>& partial,
                     const Matrix<double>& sums_SC, std::size_t columns) {
    require(sums_SC.shape(1) == columns, "sums have a wrong number of columns");
    double* sums = sums_SC.data();
    for (std::size_t i = 0; i < sums_SC.size(); ++i) sums[i] = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      require(static_cast<std::size_t>(chunks[i].segment) < sums_SC.shape(0),
              "sums have too few segments");
      double* sum = sums + static_cast<std::size_t>(chunks[i].segment) * columns;
      for (std::size_t c = 0; c < columns; ++c) sum[c] += partial[i * columns + c];
    }
  }

  // Copies a padded matrix of weights, and its last column, the biases.
  static void unpad(const Real* sum_JK, int outputs, int inputs, int stride, Real* weight,
                    Real* bias) {
    for (int j = 0; j < outputs; ++j) {
      for (int k = 0; k < inputs; ++k) weight[j * inputs + k] = sum_JK[j * stride + k];
      bias[j] = sum_JK[j * stride + inputs];
    }
  }

  const Kernels<Real>& kernels_;
  bool bfloat16_;
  Config config_{};
  Theta<Real> theta_{};
  std::vector<std::vector<Real>> storage_;
};

template <class Real>
void bind_program(nb::module_& module, const char* name) {
  using P = Program<Real>;
  nb::class_<P>(module, name)
      .def(nb::init<int, const std::vector<double>&, double, bool,
                    const std::vector<Array<const Real>>&, const std::string&>())
      .def("features", &P::features)
      .def("squares", &P::squares)
      .def("state_cell", &P::state_cell)
      .def("adam_cell", &P::adam_cell, nb::arg("plan"), nb::arg("steps"), nb::arg("state"),
           nb::arg("new_state"), nb::arg("grad"), nb::arg("scale"), nb::arg("sums"),
           nb::arg("mean"), nb::arg("log_var").none(), nb::arg("direction").none(),
           nb::arg("threads"))
      .def("variance_sums", &P::variance_sums)
      .def("shape_variance", &P::shape_variance, nb::arg("plan"), nb::arg("steps"),
           nb::arg("state"), nb::arg("decay"), nb::arg("base"), nb::arg("floor"),
           nb::arg("moment"), nb::arg("level"), nb::arg("mean"), nb::arg("log_var"),
           nb::arg("direction").none(), nb::arg("threads"))
      .def("again", &P::again)
      .def("backward", &P::backward, nb::arg("plan"), nb::arg("steps"), nb::arg("state"),
           nb::arg("new_state"), nb::arg("grad"), nb::arg("state_scale"), nb::arg("adam_scale"),
           nb::arg("kappa"), nb::arg("d_mean"), nb::arg("d_log_var").none(),
           nb::arg("d_new_state").none(), nb::arg("owed"), nb::arg("d_state"), nb::arg("d_theta"),
           nb::arg("threads"));
}

}  // namespace
}  // namespace hyperadam

NB_MODULE(_cpu, module) {
  nb::set_leak_warnings(false);  // objects alive at exit are freed with the process
  using namespace hyperadam;
  module.attr("TILE") = TILE;
  module.attr("MAX_CHANNELS") = MAX_CHANNELS;
  module.attr("MAX_DECAYS") = MAX_DECAYS;
  module.def("instruction_sets", &instruction_sets);
  module.def("standard_normal", &standard_normal);
  nb::class_<Plan>(module, "Plan")
      .def(nb::init<Matrix<const std::int64_t>, Vector<const std::int64_t>, Vector<const bool>>());
  bind_program<float>(module, "Program32");
  bind_program<double>(module, "Program64");
}

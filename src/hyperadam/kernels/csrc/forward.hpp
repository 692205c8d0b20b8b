// The forward passes over one chunk, for one instruction set.
//
// A matrix product is blocked so that its outputs stay in registers from the first product to the
// last nonlinear function: a group of channels, all gates of each, for a block of coordinates.
// Column norms are folded into the weights, so inputs are the raw rows.
#pragma once

#include <cmath>

#include "noise.hpp"
#include "problem.hpp"
#include "simd.hpp"

namespace hyperadam {
namespace {  // each instruction set has its own copies

// Bias corrections of a step, for each decay.
template <class Real>
struct Corrections {
  Real inverse[MAX_DECAYS];

  Corrections(const Config& config, std::uint64_t step) {
    for (int k = 0; k < config.decays; ++k) {
      inverse[k] = static_cast<Real>(
          1.0 / (1.0 - std::pow(config.decay[k], static_cast<double>(step))));
    }
  }
};

// Adds the squares of rows to sums of each lane, of the lanes that are no padding.
template <class Arch, class Real, class Storage>
void add_squares(const Storage* rows, int count, int valid, Real* sums) {
  using F = typename Simd<Arch, Real>::F;
  for (int row = 0; row < count; ++row) {
    alignas(64) Real scratch[TILE];
    const Real* values = load_row(rows + row * TILE, scratch);
    Real* sum = sums + row * TILE;
    if (valid >= TILE) {
      for (int lane = 0; lane < TILE; lane += Simd<Arch, Real>::LANES) {
        const F value = F::load_unaligned(values + lane);
        xsimd::fma(value, value, F::load_aligned(sum + lane)).store_aligned(sum + lane);
      }
    } else {
      for (int lane = 0; lane < valid; ++lane) {
        sum[lane] = std::fma(values[lane], values[lane], sum[lane]);
      }
    }
  }
}

template <class Real>
void total_lanes(const Real* sums, int count, double* totals) {
  for (int row = 0; row < count; ++row) {
    double total = 0;
    for (int lane = 0; lane < TILE; ++lane) total += static_cast<double>(sums[row * TILE + lane]);
    totals[row] = total;
  }
}

template <class Arch, class Real, class Storage>
struct Forward {
  using S = Simd<Arch, Real>;
  using F = typename S::F;
  static constexpr int LANES = S::LANES;
  static constexpr int VECTORS = Blocking<Arch>::VECTORS;
  static constexpr int BLOCK = VECTORS * LANES;
  static_assert(TILE % BLOCK == 0);
  static constexpr bool ROUNDS = !std::is_same_v<Storage, Real>;  // stochastically

  static const Storage* tile_of(const void* state, const Config& config, std::int64_t tile) {
    return static_cast<const Storage*>(state) + tile * config.rows() * TILE;
  }
  static Storage* tile_of(void* state, const Config& config, std::int64_t tile) {
    return static_cast<Storage*>(state) + tile * config.rows() * TILE;
  }

  // Stores a vector of a state's row; `words` are null for rounding to nearest.
  HYPERADAM_INLINE static void store(F value, Storage* row, int row_index, int lane, const std::uint32_t* words) {
    if constexpr (std::is_same_v<Storage, Real>) {
      value.store_unaligned(row + lane);
    } else {
      alignas(64) Real values[LANES];
      value.store_aligned(values);
      for (int i = 0; i < LANES; ++i) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(values[i]);
        const std::uint32_t random =
            words == nullptr ? 0x7FFFu + ((bits >> 16) & 1u)
                             : rounding_bits(words[lane + i], static_cast<std::uint32_t>(row_index));
        row[lane + i].bits = static_cast<std::uint16_t>((bits + random) >> 16);
      }
    }
  }

  HYPERADAM_INLINE static F load(const Storage* row, int lane) {
    if constexpr (std::is_same_v<Storage, Real>) {
      return F::load_unaligned(row + lane);
    } else {
      alignas(64) Real values[LANES];
      for (int i = 0; i < LANES; ++i) values[i] = load_one(row, lane + i);
      return F::load_aligned(values);
    }
  }

  // Fixed moments and features of a tile (SPEC steps 1 and 2). Without `next`, nothing is stored.
  static void features(const Config& config, const Corrections<Real>& corrections, const Storage* tile,
                       Storage* next, const Real* grad, const std::uint32_t* words,
                       Real* features_FT) {
    const int decays = config.decays;
    for (int k = 0; k < decays; ++k) {
      const F keep(static_cast<Real>(config.decay[k]));
      const F take(1.0 - static_cast<Real>(config.decay[k]));
      const F inverse(corrections.inverse[k]);
      for (int lane = 0; lane < TILE; lane += LANES) {
        const F g = F::load_unaligned(grad + lane);
        const F avg = xsimd::fma(keep, load(tile + k * TILE, lane), take * g);
        const F sq = xsimd::fma(keep, load(tile + (decays + k) * TILE, lane), take * (g * g));
        if (next != nullptr) {
          store(avg, next + k * TILE, k, lane, words);
          store(sq, next + (decays + k) * TILE, decays + k, lane, words);
        }
        const F scale = F(1.0) / (xsimd::sqrt(sq * inverse) + F(1e-8));
        (g * scale).store_aligned(features_FT + 2 * k * TILE + lane);
        (avg * inverse * scale).store_aligned(features_FT + (2 * k + 1) * TILE + lane);
      }
    }
  }

  // x_NH = elu(features W^T + b) of a tile.
  static void preprocess(const Config& config, const Theta<Real>& theta, const Real* features_FT,
                         Real* x_HT) {
    const int width = 2 * config.decays;
    for (int channel = 0; channel < config.channels; ++channel) {
      const Real* weight = theta.pre_weight + channel * width;
      for (int lane = 0; lane < TILE; lane += LANES) {
        F x(theta.pre_bias[channel]);
        for (int f = 0; f < width; ++f) {
          x = xsimd::fma(F::load_aligned(features_FT + f * TILE + lane), F(weight[f]), x);
        }
        S::elu(x).store_aligned(x_HT + channel * TILE + lane);
      }
    }
  }

  // First pass: sums of x squared, and whether the gradient is finite (TiledRule.step).
  // Changes nothing.
  static void features_chunk(const Config& config, const Theta<Real>& theta, const Features<Real>& job,
                             const Chunk& chunk, std::int64_t index) {
    const Corrections<Real> corrections(config, chunk.step);
    alignas(64) Real features_FT[2 * MAX_DECAYS * TILE];
    alignas(64) Real x_HT[MAX_CHANNELS * TILE];
    alignas(64) Real sums_HT[MAX_CHANNELS * TILE] = {};
    typename F::batch_bool_type good(true);
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const Real* grad = job.grad + (chunk.tile + t) * TILE;
      for (int lane = 0; lane < TILE; lane += LANES) {
        const F size = xsimd::abs(F::load_unaligned(grad + lane));
        good = good & (size <= F(S::LARGEST_GRADIENT));  // false for NaN
      }
      features(config, corrections, tile_of(job.state, config, chunk.tile + t), nullptr, grad,
               nullptr, features_FT);
      preprocess(config, theta, features_FT, x_HT);
      const std::int64_t valid = chunk.valid - t * TILE;
      add_squares<Arch, Real>(x_HT, config.channels, static_cast<int>(valid < TILE ? valid : TILE),
                        sums_HT);
    }
    total_lanes(sums_HT, config.channels, job.sums_H + index * config.channels);
    job.finite[index] = xsimd::all(good);
  }

  // Sums of squares of `count` rows from `row` on.
  static void squares_chunk(const Config& config, const void* state, int row, int count,
                            const Chunk& chunk, double* totals) {
    alignas(64) Real sums[MAX_CHANNELS * TILE] = {};
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const std::int64_t valid = chunk.valid - t * TILE;
      add_squares<Arch, Real>(tile_of(state, config, chunk.tile + t) + row * TILE, count,
                        static_cast<int>(valid < TILE ? valid : TILE), sums);
    }
    total_lanes(sums, count, totals);
  }

  // Gates of G channels of the state cell, in registers.
  template <int G>
  HYPERADAM_INLINE static void state_gates(const Real* weights, int inputs, const Real* inputs_CT, int lane,
                          F (&gates)[4][G][VECTORS]) {
    for (int q = 0; q < 4; ++q) {
      for (int g = 0; g < G; ++g) {
        for (int v = 0; v < VECTORS; ++v) gates[q][g][v] = F(weights[q * G + g]);
      }
    }
    weights += 4 * G;  // behind the biases
    for (int k = 0; k < inputs; ++k, weights += 4 * G) {
      F input[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        input[v] = F::load_aligned(inputs_CT + k * TILE + lane + v * LANES);
      }
      for (int q = 0; q < 4; ++q) {
        for (int g = 0; g < G; ++g) {
          const F weight(weights[q * G + g]);
          for (int v = 0; v < VECTORS; ++v) {
            gates[q][g][v] = xsimd::fma(input[v], weight, gates[q][g][v]);
          }
        }
      }
    }
  }

  template <int G>
  static void state_group(const Config& config, const Real* weights, const Real* inputs_CT,
                          int channel, const Storage* tile, Storage* next,
                          const std::uint32_t* words) {
    for (int lane = 0; lane < TILE; lane += BLOCK) {
      F gates[4][G][VECTORS];
      state_gates<G>(weights, 2 * config.channels, inputs_CT, lane, gates);
      for (int g = 0; g < G; ++g) {
        const int row_c = config.row_c() + channel + g, row_h = config.row_h() + channel + g;
        for (int v = 0; v < VECTORS; ++v) {
          const int at = lane + v * LANES;
          F c = load(tile + row_c * TILE, at);
          c = S::sigmoid(gates[2][g][v]) * c +
              S::sigmoid(gates[0][g][v]) * S::tanh(gates[1][g][v]);
          store(c, next + row_c * TILE, row_c, at, words);
          store(S::sigmoid(gates[3][g][v]) * S::tanh(c), next + row_h * TILE, row_h, at, nullptr);
        }
      }
    }
  }

  // Second pass: the fixed moments, h and c of the new state, and the sums of h squared.
  static void state_chunk(const Config& config, const Theta<Real>& theta, const StateCell<Real>& job,
                          const Chunk& chunk, std::int64_t index) {
    constexpr int G = Blocking<Arch>::STATE_CHANNELS;
    const Corrections<Real> corrections(config, chunk.step);
    const int channels = config.channels;
    const Real* weights =
        job.weights + chunk.segment * packed_state_cell_size(config);
    alignas(64) Real features_FT[2 * MAX_DECAYS * TILE];
    alignas(64) Real inputs_CT[2 * MAX_CHANNELS * TILE];
    alignas(64) Real sums_HT[MAX_CHANNELS * TILE] = {};
    alignas(64) std::uint32_t word_store[ROUNDS ? CHUNK_TILES * TILE : 1];
    if (ROUNDS) {
      rounding_words(chunk.seed, chunk.step, static_cast<std::uint64_t>(chunk.coordinate),
                     chunk.tiles * TILE, word_store);
    }
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const Storage* tile = tile_of(job.state, config, chunk.tile + t);
      Storage* next = tile_of(job.new_state, config, chunk.tile + t);
      if (t + 1 < chunk.tiles) {
        prefetch(tile + config.rows() * TILE, config.row_m() * TILE);
        prefetch(next + config.rows() * TILE, config.row_m() * TILE);
      }
      const std::uint32_t* words = ROUNDS ? word_store + t * TILE : nullptr;
      features(config, corrections, tile, next, job.grad + (chunk.tile + t) * TILE, words,
               features_FT);
      preprocess(config, theta, features_FT, inputs_CT);
      copy_rows(tile + config.row_h() * TILE, channels, inputs_CT + channels * TILE);
      const Real* packed = weights;
      int channel = 0;
      for (; channel + G <= channels; channel += G) {
        state_group<G>(config, packed, inputs_CT, channel, tile, next, words);
        packed += 4 * G * (2 * channels + 1);
      }
      for (; channel < channels; ++channel) {
        state_group<1>(config, packed, inputs_CT, channel, tile, next, words);
        packed += 4 * (2 * channels + 1);
      }
      if (job.sums_H == nullptr) continue;
      const std::int64_t valid = chunk.valid - t * TILE;
      add_squares<Arch, Real>(next + config.row_h() * TILE, channels,
                        static_cast<int>(valid < TILE ? valid : TILE), sums_HT);
    }
    if (job.sums_H != nullptr) {
      total_lanes(sums_HT, channels, job.sums_H + index * channels);
    }
  }

  static void copy_rows(const Storage* rows, int count, Real* out) {
    for (int row = 0; row < count; ++row) {
      for (int lane = 0; lane < TILE; lane += LANES) {
        load(rows + row * TILE, lane).store_aligned(out + row * TILE + lane);
      }
    }
  }

  // The Adam cell's two rates of G channels and, with Q = 3, the weight cell's output, in registers.
  template <int Q, int G>
  HYPERADAM_INLINE static void adam_outputs(const Real* weights, int channels, const Real* inputs_CT, int lane,
                           F (&outputs)[Q][G][VECTORS]) {
    for (int q = 0; q < Q; ++q) {
      for (int g = 0; g < G; ++g) {
        for (int v = 0; v < VECTORS; ++v) outputs[q][g][v] = F(weights[q * G + g]);
      }
    }
    weights += 3 * G;
    multiply<2, 2 * G, G>(weights, channels, inputs_CT, lane, outputs);
    multiply<Q, 3 * G, G>(weights + 2 * G * channels, channels, inputs_CT + channels * TILE, lane,
                          outputs);
  }

  // Adds the first Q outputs' products; an input's weights are STRIDE numbers from the next one's.
  template <int Q, int STRIDE, int G>
  HYPERADAM_INLINE static void multiply(const Real* weights, int inputs, const Real* inputs_CT, int lane,
                       F (*outputs)[G][VECTORS]) {
    for (int k = 0; k < inputs; ++k, weights += STRIDE) {
      F input[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        input[v] = F::load_aligned(inputs_CT + k * TILE + lane + v * LANES);
      }
      for (int q = 0; q < Q; ++q) {
        for (int g = 0; g < G; ++g) {
          const F weight(weights[q * G + g]);
          for (int v = 0; v < VECTORS; ++v) {
            outputs[q][g][v] = xsimd::fma(input[v], weight, outputs[q][g][v]);
          }
        }
      }
    }
  }

  // New moments of G channels; with UPDATE, their candidates' share of the mean too.
  template <int G, bool UPDATE>
  static void adam_group(const Config& config, const Real* weights, const Real* inputs_CT,
                         const Real* grad, int channel, const Storage* tile, Storage* next,
                         const std::uint32_t* words, Real* mean) {
    const F epsilon(1e-24), to_bound(config.bound > 0 ? 1 / config.bound : 0);
    for (int lane = 0; lane < TILE; lane += BLOCK) {
      F outputs[UPDATE ? 3 : 2][G][VECTORS];
      adam_outputs(weights, config.channels, inputs_CT, lane, outputs);
      for (int v = 0; v < VECTORS; ++v) {
        const int at = lane + v * LANES;
        const F gradient = F::load_unaligned(grad + at);
        F total = F::load_aligned(mean + at);
        for (int g = 0; g < G; ++g) {
          F beta, take_m, gamma, take_v;
          S::sigmoids(outputs[0][g][v], beta, take_m);
          S::sigmoids(outputs[1][g][v], gamma, take_v);
          const int row = channel + g;
          const auto update = [&](int first_row, F keep, F taken) {
            const int at_row = first_row + row;
            const F value = xsimd::fma(keep, load(tile + at_row * TILE, at), taken);
            store(value, next + at_row * TILE, at_row, at, words);
            return value;
          };
          const F m = update(config.row_m(), beta, take_m * gradient);
          const F v2 = update(config.row_v(), gamma, take_v * (gradient * gradient));
          const F m_corr = update(config.row_m_corr(), beta, take_m);
          const F v_corr = update(config.row_v_corr(), gamma, take_v);
          if constexpr (UPDATE) {
            const F v_hat = xsimd::min(F(S::LARGEST), v2 * S::inverse(v_corr + epsilon));
            F a = m * S::inverse(m_corr + epsilon) * S::inverse_root(v_hat + epsilon);
            if (config.bound > 0) a = F(config.bound) * S::tanh(a * to_bound);
            total = xsimd::fma(S::elu(outputs[2][g][v]), a, total);
          }
        }
        total.store_aligned(mean + at);
      }
    }
  }

  template <bool UPDATE>
  static void adam_groups(const Config& config, const Real* weights, const Real* inputs_CT,
                          const Real* grad, const Storage* tile, Storage* next,
                          const std::uint32_t* words, Real* mean) {
    constexpr int G = Blocking<Arch>::ADAM_CHANNELS;
    const int channels = config.channels;
    int channel = 0;
    for (; channel + G <= channels; channel += G, weights += G * (5 * channels + 3)) {
      adam_group<G, UPDATE>(config, weights, inputs_CT, grad, channel, tile, next, words, mean);
    }
    for (; channel < channels; ++channel, weights += 5 * channels + 3) {
      adam_group<1, UPDATE>(config, weights, inputs_CT, grad, channel, tile, next, words, mean);
    }
  }

  // Third pass: m, v and their corrections, the update's distribution and a sample of it.
  static void adam_chunk(const Config& config, const Theta<Real>& theta, const AdamCell<Real>& job,
                         const Chunk& chunk, std::int64_t index) {
    const int channels = config.channels;
    const Real* weights = job.weights + chunk.segment * packed_adam_cell_size(config);
    alignas(64) Real inputs_CT[2 * MAX_CHANNELS * TILE];  // m before the step, and h
    alignas(64) Real sums_HT[MAX_CHANNELS * TILE] = {};
    alignas(64) std::uint32_t word_store[ROUNDS ? CHUNK_TILES * TILE : 1];
    if (ROUNDS) {
      rounding_words(chunk.seed, chunk.step, static_cast<std::uint64_t>(chunk.coordinate),
                     chunk.tiles * TILE, word_store);
    }
    alignas(64) float noise[CHUNK_TILES * TILE];
    const bool sample = chunk.sample && config.var_block && job.direction != nullptr;
    if (sample) {
      standard_normal(chunk.seed, chunk.step, static_cast<std::uint64_t>(chunk.coordinate),
                      chunk.tiles * TILE, noise);
    }
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const std::int64_t at = (chunk.tile + t) * TILE;
      const Storage* tile = tile_of(job.state, config, chunk.tile + t);
      Storage* next = tile_of(job.new_state, config, chunk.tile + t);
      if (t + 1 < chunk.tiles) {
        const int after = config.rows() * TILE, m = config.row_m() * TILE;
        prefetch(tile + after + m, after - m);
        prefetch(next + after + m, after - m);
        prefetch(next + after + config.row_h() * TILE, channels * TILE);
      }
      const std::uint32_t* words = ROUNDS ? word_store + t * TILE : nullptr;
      copy_rows(tile + config.row_m() * TILE, channels, inputs_CT);
      copy_rows(next + config.row_h() * TILE, channels, inputs_CT + channels * TILE);
      alignas(64) Real mean[TILE] = {};
      if (job.mean == nullptr) {
        adam_groups<false>(config, weights, inputs_CT, job.grad + at, tile, next, words, mean);
        continue;
      }
      adam_groups<true>(config, weights, inputs_CT, job.grad + at, tile, next, words, mean);
      finish(config, theta, job, chunk, t, inputs_CT + channels * TILE, mean,
             sample ? noise + t * TILE : nullptr);
      const std::int64_t valid = chunk.valid - t * TILE;
      add_squares<Arch, Real>(next + config.row_m() * TILE, channels,
                        static_cast<int>(valid < TILE ? valid : TILE), sums_HT);
    }
    if (job.sums_H != nullptr) {
      total_lanes(sums_HT, channels, job.sums_H + index * channels);
    }
  }

  // VarBlock and sample of a tile; without noise, the mean.
  static void finish(const Config& config, const Theta<Real>& theta, const AdamCell<Real>& job,
                     const Chunk& chunk, std::int64_t t, const Real* h_HT, const Real* mean,
                     const float* noise) {
    const std::int64_t at = (chunk.tile + t) * TILE;
    for (int lane = 0; lane < TILE; lane += LANES) {
      F direction = F::load_aligned(mean + lane);
      direction.store_unaligned(job.mean + at + lane);
      if (config.var_block) {
        F log_var(theta.var_bias[0]);
        for (int k = 0; k < config.channels; ++k) {
          log_var = xsimd::fma(F::load_aligned(h_HT + k * TILE + lane), F(theta.var_weight[k]),
                               log_var);
        }
        log_var.store_unaligned(job.log_var + at + lane);
        if (noise != nullptr) {
          alignas(64) Real normal[LANES];
          for (int i = 0; i < LANES; ++i) normal[i] = noise[lane + i];
          direction = xsimd::fma(xsimd::exp(log_var * F(0.5)), F::load_aligned(normal), direction);
        }
      }
      if (job.direction != nullptr) direction.store_unaligned(job.direction + at + lane);
    }
    // The direction may lie where the next gradient will: padding stays 0.
    for (std::int64_t lane = chunk.valid - t * TILE; job.direction != nullptr && lane < TILE;
         ++lane) {
      job.direction[at + lane] = 0.0;
    }
  }

  // Sums of a fixed moment, corrected, and of the update's mean squared.
  static void variance_chunk(const Config& config, const VarianceSums<Real>& job,
                             const Chunk& chunk, std::int64_t index) {
    alignas(64) Real moment_sums[TILE] = {}, square_sums[TILE] = {};
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const Storage* row = moment_row(config, job.state, chunk.tile + t, job.decay);
      const std::int64_t valid = chunk.valid - t * TILE;
      const int count = static_cast<int>(valid < TILE ? valid : TILE);
      add_squares<Arch, Real>(job.mean + (chunk.tile + t) * TILE, 1, count, square_sums);
      if (count == TILE) {
        for (int lane = 0; lane < TILE; lane += LANES) {
          (load(row, lane) + F::load_aligned(moment_sums + lane)).store_aligned(moment_sums + lane);
        }
      } else {
        for (int lane = 0; lane < count; ++lane) moment_sums[lane] += load_one(row, lane);
      }
    }
    double* sums = job.sums_2 + 2 * index;
    total_lanes(moment_sums, 1, sums);
    total_lanes(square_sums, 1, sums + 1);
    sums[0] *= static_cast<double>(Corrections<Real>(config, chunk.step).inverse[job.decay]);
  }

  // Multiplies variances by the segment's level and the coordinate's narrowing, and what samples
  // add to the mean by their roots.
  static void shape_chunk(const Config& config, const VarianceShape<Real>& job,
                          const Chunk& chunk) {
    const F correction(Corrections<Real>(config, chunk.step).inverse[job.decay]);
    const F to_share(static_cast<Real>(1 / job.moment_S[chunk.segment]));
    const double level = job.level_S[chunk.segment];
    const F base(static_cast<Real>(job.base)), floor(static_cast<Real>(job.floor));
    const F rest(static_cast<Real>((1 - job.floor) * job.base));
    const F log_level(static_cast<Real>(std::log(level)));
    const F root_level(static_cast<Real>(std::sqrt(level)));
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const std::int64_t at = (chunk.tile + t) * TILE;
      const Storage* row = moment_row(config, job.state, chunk.tile + t, job.decay);
      for (int lane = 0; lane < TILE; lane += LANES) {
        const F share = load(row, lane) * correction * to_share;
        const F narrowing = floor + rest / (base + share);
        Real* log_var = job.log_var + at + lane;
        (F::load_unaligned(log_var) + log_level + xsimd::log(narrowing)).store_unaligned(log_var);
        if (job.direction == nullptr) continue;
        const F mean = F::load_unaligned(job.mean + at + lane);
        Real* direction = job.direction + at + lane;
        const F scale = root_level * xsimd::sqrt(narrowing);
        xsimd::fma(F::load_unaligned(direction) - mean, scale, mean).store_unaligned(direction);
      }
      // As in finish: padding stays 0.
      for (std::int64_t lane = chunk.valid - t * TILE; job.direction != nullptr && lane < TILE;
           ++lane) {
        job.direction[at + lane] = 0.0;
      }
    }
  }

  static const Storage* moment_row(const Config& config, const void* state, std::int64_t tile,
                                   int decay) {
    return tile_of(state, config, tile) + (config.decays + decay) * TILE;
  }

  // -- weights in the order of use, with the column norms' scales in them ------------------------

  static std::int64_t packed_state_cell_size(const Config& config) {
    return std::int64_t{4} * config.channels * (2 * config.channels + 1);
  }

  // Each group's biases, with the forget gate's 1, then for each input its weights, gate by gate.
  // `scale_C` is of [x, h].
  static void pack_state_cell(const Config& config, const Theta<Real>& theta, const Real* scale_C,
                              Real* packed) {
    const int channels = config.channels;
    for (int channel = 0; channel < channels;) {
      constexpr int G = Blocking<Arch>::STATE_CHANNELS;
      const int group = channel + G <= channels ? G : 1;
      for (int q = 0; q < 4; ++q) {
        const Real forget = q == 2 ? 1.0 : 0.0;
        for (int g = 0; g < group; ++g) {
          *packed++ = theta.lstm_bias[q * channels + channel + g] + forget;
        }
      }
      for (int k = 0; k < 2 * channels; ++k) {
        for (int q = 0; q < 4; ++q) {
          for (int g = 0; g < group; ++g) {
            const std::int64_t output = q * channels + channel + g;
            *packed++ = theta.lstm_weight[output * 2 * channels + k] * scale_C[k];
          }
        }
      }
      channel += group;
    }
  }

  static std::int64_t packed_adam_cell_size(const Config& config) {
    return std::int64_t{config.channels} * (5 * config.channels + 3);
  }

  // Each group's biases of β, γ, ρ; for each m the weights of β, γ; for each h those of β, γ, ρ.
  static void pack_adam_cell(const Config& config, const Theta<Real>& theta, const Real* scale_C,
                             Real* packed) {
    const int channels = config.channels;
    for (int channel = 0; channel < channels;) {
      constexpr int G = Blocking<Arch>::ADAM_CHANNELS;
      const int group = channel + G <= channels ? G : 1;
      for (int q = 0; q < 3; ++q) {
        for (int g = 0; g < group; ++g) {
          *packed++ = q < 2 ? theta.adam_bias[q * channels + channel + g]
                            : theta.post_bias[channel + g];
        }
      }
      for (int k = 0; k < 2 * channels; ++k) {
        for (int q = 0; q < (k < channels ? 2 : 3); ++q) {
          for (int g = 0; g < group; ++g) {
            const std::int64_t output = q * channels + channel + g;
            *packed++ = q < 2
                            ? theta.adam_weight[output * 2 * channels + k] * scale_C[k]
                            : theta.post_weight[(channel + g) * channels + (k - channels)];
          }
        }
      }
      channel += group;
    }
  }
};

}  // namespace
}  // namespace hyperadam

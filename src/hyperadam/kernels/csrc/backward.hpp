// The backward passes over one chunk, for one instruction set.
//
// Everything inside the step is computed again from the states before and after it, tile by tile.
#pragma once

#include "forward.hpp"

namespace hyperadam {
namespace {

template <class Arch, class Real>
struct Backward {
  using Pass = Forward<Arch, Real, Real>;
  using S = Simd<Arch, Real>;
  using F = typename S::F;
  static constexpr int LANES = S::LANES;
  static constexpr int VECTORS = Pass::VECTORS;
  static constexpr int BLOCK = Pass::BLOCK;
  static constexpr int ROWS = 8;  // outputs of a block of rows_product

  HYPERADAM_INLINE static F at(const Real* row, int lane) { return F::load_unaligned(row + lane); }

  // out_KT = W in_JT, with weights packed by pack_rows.
  static void rows_product(const Real* packed, int inputs, int outputs, const Real* in_JT,
                           Real* out_KT) {
    for (int first = 0; first < outputs; first += ROWS, packed += inputs * ROWS) {
      const int rows = outputs - first < ROWS ? outputs - first : ROWS;
      for (int lane = 0; lane < TILE; lane += BLOCK) {
        F out[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r) {
          for (int v = 0; v < VECTORS; ++v) out[r][v] = F(0.0);
        }
        for (int j = 0; j < inputs; ++j) {
          F in[VECTORS];
          for (int v = 0; v < VECTORS; ++v) in[v] = at(in_JT + j * TILE, lane + v * LANES);
          for (int r = 0; r < ROWS; ++r) {
            const F weight(packed[j * ROWS + r]);
            for (int v = 0; v < VECTORS; ++v) out[r][v] = xsimd::fma(in[v], weight, out[r][v]);
          }
        }
        for (int r = 0; r < rows; ++r) {
          for (int v = 0; v < VECTORS; ++v) {
            out[r][v].store_unaligned(out_KT + (first + r) * TILE + lane + v * LANES);
          }
        }
      }
    }
  }

  static std::int64_t packed_rows(int inputs, int outputs) {
    return std::int64_t{inputs} * ThetaGradient::up(outputs, ROWS);
  }

  // Packs W (outputs by inputs): for each block of outputs, input by input. `weight(out, in)`.
  template <class Weight>
  static Real* pack_rows(int inputs, int outputs, const Weight& weight, Real* packed) {
    for (int first = 0; first < outputs; first += ROWS) {
      for (int j = 0; j < inputs; ++j) {
        for (int r = 0; r < ROWS; ++r) {
          *packed++ = first + r < outputs ? weight(first + r, j) : 0.0;
        }
      }
    }
    return packed;
  }

  // [x, h] from the gates.
  static std::int64_t state_transposed_size(const Config& config) {
    return packed_rows(4 * config.channels, 2 * config.channels);
  }
  static void pack_state_transposed(const Config& config, const Theta<Real>& theta, const Real* scale_C,
                                    Real* packed) {
    const int inputs = 2 * config.channels;
    pack_rows(4 * config.channels, inputs,
              [&](int k, int j) { return theta.lstm_weight[j * inputs + k] * scale_C[k]; }, packed);
  }

  // [m, h] from the rates, then h from the candidates' weights.
  static std::int64_t adam_transposed_size(const Config& config) {
    return packed_rows(2 * config.channels, 2 * config.channels) +
           packed_rows(config.channels, config.channels);
  }
  static void pack_adam_transposed(const Config& config, const Theta<Real>& theta, const Real* scale_C,
                                   Real* packed) {
    const int channels = config.channels, inputs = 2 * channels;
    packed = pack_rows(
        inputs, inputs,
        [&](int k, int j) { return theta.adam_weight[j * inputs + k] * scale_C[k]; }, packed);
    pack_rows(channels, channels,
              [&](int k, int j) { return theta.post_weight[j * channels + k]; }, packed);
  }

  // Transposes a square block: log2(LANES) times, every vector of the first half is interleaved
  // with its fellow of the second.
  static void transpose_block(F (&block)[LANES]) {
    F zipped[LANES];
    for (int done = 1; done < LANES; done *= 2) {
      for (int k = 0; k < LANES / 2; ++k) {
        S::zip(block[k], block[k + LANES / 2], zipped[2 * k], zipped[2 * k + 1]);
      }
      for (int k = 0; k < LANES; ++k) block[k] = zipped[k];
    }
  }

  // Rows of a tile as coordinates by columns, with a column of ones behind them for the bias.
  // `stride` is a multiple of the vector's length.
  static void transpose(const Real* rows_KT, int count, int stride, Real* out_TK) {
    for (int first = 0; first < stride; first += LANES) {
      for (int lane = 0; lane < TILE; lane += LANES) {
        F block[LANES];
        for (int k = 0; k < LANES; ++k) {
          block[k] = first + k < count ? at(rows_KT + (first + k) * TILE, lane)
                                       : F(first + k == count ? 1.0 : 0.0);
        }
        transpose_block(block);
        for (int k = 0; k < LANES; ++k) {
          block[k].store_unaligned(out_TK + (lane + k) * stride + first);
        }
      }
    }
  }

  // J rows of outer, for V vectors of inputs.
  template <int J, int V>
  static void outer_block(const Real* d_JT, const Real* in_TK, int stride, int in_stride, Real* sum) {
    F total[J][V];
    for (int j = 0; j < J; ++j) {
      for (int v = 0; v < V; ++v) total[j][v] = at(sum + j * stride, v * LANES);
    }
    for (int lane = 0; lane < TILE; ++lane) {
      F in[V];
      for (int v = 0; v < V; ++v) in[v] = at(in_TK + lane * in_stride, v * LANES);
      for (int j = 0; j < J; ++j) {
        const F d(d_JT[j * TILE + lane]);
        for (int v = 0; v < V; ++v) total[j][v] = xsimd::fma(d, in[v], total[j][v]);
      }
    }
    for (int j = 0; j < J; ++j) {
      for (int v = 0; v < V; ++v) total[j][v].store_unaligned(sum + j * stride + v * LANES);
    }
  }

  template <int J>
  static void outer_rows(const Real* d_JT, const Real* in_TK, int stride, int in_stride, Real* sum) {
    int k = 0;
    for (; k + 3 * LANES <= stride; k += 3 * LANES) {
      outer_block<J, 3>(d_JT, in_TK + k, stride, in_stride, sum + k);
    }
    for (; k + 2 * LANES <= stride; k += 2 * LANES) {
      outer_block<J, 2>(d_JT, in_TK + k, stride, in_stride, sum + k);
    }
    for (; k < stride; k += LANES) {
      outer_block<J, 1>(d_JT, in_TK + k, stride, in_stride, sum + k);
    }
  }

  // sum_JK += d_JT in_TK, for `stride` columns of in_TK, whose rows are `in_stride` long. `outputs`
  // is a multiple of 4 and both strides of the vector's length.
  static void outer(const Real* d_JT, int outputs, const Real* in_TK, int stride, int in_stride,
                    Real* sum_JK) {
    constexpr int J = Blocking<Arch>::OUTER_ROWS;
    int j = 0;
    for (; j + J <= outputs; j += J) {
      outer_rows<J>(d_JT + j * TILE, in_TK, stride, in_stride, sum_JK + j * stride);
    }
    for (; j < outputs; j += 4) {
      outer_rows<4>(d_JT + j * TILE, in_TK, stride, in_stride, sum_JK + j * stride);
    }
  }

  // Adds a chunk's sums to its group's, with the scales that were left out of the inputs.
  static void add_scaled(const Real* sum_JK, int outputs, int stride, const Real* scale, int count,
                         Real* total_JK) {
    for (int j = 0; j < outputs; ++j) {
      for (int k = 0; k < stride; ++k) {
        const Real factor = scale != nullptr && k < count ? scale[k] : 1.0;
        total_JK[j * stride + k] += sum_JK[j * stride + k] * factor;
      }
    }
  }

  static ThetaGradient gradient_layout(const Config& config) {
    return {LANES, config.channels, 2 * config.decays, config.var_block};
  }

  static constexpr int MAX_WIDE = 2 * MAX_CHANNELS + 1 + LANES;
  static constexpr int MAX_NARROW = MAX_CHANNELS + 1 + 2 * LANES;
  static constexpr int MAX_SHORT = 2 * MAX_DECAYS + 1 + LANES;

  // 1 in the lanes of coordinates, 0 in padding.
  static void make_mask(std::int64_t valid, Real* mask_T) {
    for (int lane = 0; lane < TILE; ++lane) mask_T[lane] = lane < valid ? 1.0 : 0.0;
  }

  HYPERADAM_INLINE static F incoming(const Real* tile, int row, int lane) {
    return tile == nullptr ? F(0.0) : at(tile + row * TILE, lane);
  }

  // The rates' and the candidates' part of G channels: d of z (beta, gamma, rho) and of the state.
  template <int G>
  static void adam_group(const Config& config, const Real* weights, const Real* inputs_CT,
                         const Real* grad, const Real* d_mean, int channel, const Real* tile,
                         const Real* next, const Real* d_next, const Real* owed, const Real* mask_T,
                         Real* d_tile, Real* d_z_JT) {
    const F epsilon(1e-24), one(1.0), to_bound(config.bound > 0 ? 1 / config.bound : 0);
    const int channels = config.channels;
    for (int lane = 0; lane < TILE; lane += BLOCK) {
      F outputs[3][G][VECTORS];
      Pass::adam_outputs(weights, channels, inputs_CT, lane, outputs);
      for (int v = 0; v < VECTORS; ++v) {
        const int x = lane + v * LANES;
        const F g = at(grad, x), d_mean_v = at(d_mean, x), mask = F::load_aligned(mask_T + x);
        for (int i = 0; i < G; ++i) {
          F beta, take_m, gamma, take_v;
          S::sigmoids(outputs[0][i][v], beta, take_m);
          S::sigmoids(outputs[1][i][v], gamma, take_v);
          const F z_rho = outputs[2][i][v];
          const F rho = S::elu(z_rho);
          const int c = channel + i;
          const int m = config.row_m() + c, v2 = config.row_v() + c;
          const int m_corr = config.row_m_corr() + c, v_corr = config.row_v_corr() + c;
          const F inverse_m = S::inverse(at(next + m_corr * TILE, x) + epsilon);
          const F inverse_v = S::inverse(at(next + v_corr * TILE, x) + epsilon);
          const F next_m = at(next + m * TILE, x);
          const F m_hat = next_m * inverse_m;
          const F v_hat = xsimd::min(F(S::LARGEST), at(next + v2 * TILE, x) * inverse_v);
          const F inverse_root = S::inverse_root(v_hat + epsilon);
          F a = m_hat * inverse_root;
          const F unbounded = a;
          F d_a = d_mean_v * rho;
          if (config.bound > 0) {
            const F t = S::tanh(a * to_bound);
            d_a = d_a * (one - t * t);
            a = F(config.bound) * t;
          }
          const F d_rho = d_mean_v * a;
          const F d_z_rho = d_rho * xsimd::select(z_rho > F(0.0), one, rho + one);
          const F d_m_hat = d_a * inverse_root;
          const F d_v_hat = F(-0.5) * (d_a * unbounded) * (inverse_root * inverse_root);
          const F d_m =
              incoming(d_next, m, x) - F(owed[c]) * (mask * next_m) + d_m_hat * inverse_m;
          const F d_v = incoming(d_next, v2, x) + d_v_hat * inverse_v;
          const F d_m_corr = incoming(d_next, m_corr, x) - d_m_hat * m_hat * inverse_m;
          const F d_v_corr = incoming(d_next, v_corr, x) - d_v_hat * v_hat * inverse_v;
          const F d_beta = d_m * (at(tile + m * TILE, x) - g) +
                           d_m_corr * (at(tile + m_corr * TILE, x) - one);
          const F d_gamma = d_v * (at(tile + v2 * TILE, x) - g * g) +
                            d_v_corr * (at(tile + v_corr * TILE, x) - one);
          (beta * d_m).store_unaligned(d_tile + m * TILE + x);
          (gamma * d_v).store_unaligned(d_tile + v2 * TILE + x);
          (beta * d_m_corr).store_unaligned(d_tile + m_corr * TILE + x);
          (gamma * d_v_corr).store_unaligned(d_tile + v_corr * TILE + x);
          (d_beta * beta * take_m).store_unaligned(d_z_JT + c * TILE + x);
          (d_gamma * gamma * take_v).store_unaligned(d_z_JT + (channels + c) * TILE + x);
          d_z_rho.store_unaligned(d_z_JT + (2 * channels + c) * TILE + x);
        }
      }
    }
  }

  // First backward pass: Adam cell, weight cell, VarBlock. Leaves d of h in d_state's rows of h.
  static void adam_chunk(const Config& config, const Theta<Real>& theta, const BackwardJob<Real>& job,
                         const Chunk& chunk, std::int64_t index, Real* group) {
    constexpr int G = Blocking<Arch>::ADAM_CHANNELS;
    const int channels = config.channels, inputs = 2 * channels;
    const ThetaGradient layout = gradient_layout(config);
    const Real* weights = job.adam_weights + chunk.segment * Pass::packed_adam_cell_size(config);
    const Real* transposed =
        job.adam_transposed + chunk.segment * adam_transposed_size(config);
    const Real* post_transposed = transposed + packed_rows(inputs, inputs);
    const Real* owed = job.owed_SC + chunk.segment * inputs;
    alignas(64) Real mask_T[TILE];
    alignas(64) Real inputs_CT[2 * MAX_CHANNELS * TILE];
    alignas(64) Real d_z_JT[(3 * MAX_CHANNELS + 4) * TILE] = {};
    alignas(64) Real d_in_CT[2 * MAX_CHANNELS * TILE];
    alignas(64) Real d_post_HT[MAX_CHANNELS * TILE];
    alignas(64) Real in_TK[TILE * MAX_WIDE];
    alignas(64) Real sums_CT[2 * MAX_CHANNELS * TILE] = {};
    alignas(64) Real rates_sum[2 * MAX_CHANNELS * MAX_WIDE] = {};
    alignas(64) Real post_sum[(MAX_CHANNELS + 4) * MAX_NARROW] = {};
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const std::int64_t first = (chunk.tile + t) * TILE;
      const Real* tile = Pass::tile_of(job.state, config, chunk.tile + t);
      const Real* next = Pass::tile_of(job.new_state, config, chunk.tile + t);
      const Real* d_next = job.d_new_state == nullptr
                                ? nullptr
                                : Pass::tile_of(job.d_new_state, config, chunk.tile + t);
      Real* d_tile = Pass::tile_of(static_cast<void*>(job.d_state), config, chunk.tile + t);
      if (t + 1 < chunk.tiles) {
        const int after = config.rows() * TILE, m = config.row_m() * TILE;
        prefetch(tile + after + m, after - m);
        prefetch(next + after + m, after - m);
        prefetch(next + after + config.row_h() * TILE, channels * TILE);
        prefetch(d_tile + after + m, after - m);
        prefetch(d_tile + after + config.row_h() * TILE, channels * TILE);
        if (d_next != nullptr && d_next != d_tile) prefetch(d_next + after + m, after - m);
      }
      make_mask(chunk.valid - t * TILE, mask_T);
      Pass::copy_rows(tile + config.row_m() * TILE, channels, inputs_CT);
      Pass::copy_rows(next + config.row_h() * TILE, channels, inputs_CT + channels * TILE);
      const Real* packed = weights;
      int channel = 0;
      for (; channel + G <= channels; channel += G) {
        adam_group<G>(config, packed, inputs_CT, job.grad + first, job.d_mean + first, channel, tile,
                      next, d_next, owed, mask_T, d_tile, d_z_JT);
        packed += G * (5 * channels + 3);
      }
      for (; channel < channels; ++channel) {
        adam_group<1>(config, packed, inputs_CT, job.grad + first, job.d_mean + first, channel, tile,
                      next, d_next, owed, mask_T, d_tile, d_z_JT);
        packed += 5 * channels + 3;
      }
      if (config.var_block) {
        Pass::copy_rows(job.d_log_var + first, 1, d_z_JT + 3 * channels * TILE);
      }
      rows_product(transposed, inputs, inputs, d_z_JT, d_in_CT);
      rows_product(post_transposed, channels, channels, d_z_JT + inputs * TILE, d_post_HT);
      for (int k = 0; k < inputs; ++k) {
        for (int lane = 0; lane < TILE; lane += LANES) {
          const F d_in = at(d_in_CT + k * TILE, lane);
          Real* sum = sums_CT + k * TILE + lane;
          xsimd::fma(d_in, at(inputs_CT + k * TILE, lane), F::load_aligned(sum)).store_aligned(sum);
          if (k < channels) {
            Real* d_m = d_tile + (config.row_m() + k) * TILE + lane;
            (F::load_unaligned(d_m) + d_in).store_unaligned(d_m);
          } else {
            const int c = k - channels;
            const F late = F(owed[k]) * (F::load_aligned(mask_T + lane) *
                                         F::load_aligned(inputs_CT + k * TILE + lane));
            F d_h = incoming(d_next, config.row_h() + c, lane) - late + d_in +
                    at(d_post_HT + c * TILE, lane);
            if (config.var_block) {
              d_h = xsimd::fma(at(d_z_JT + 3 * channels * TILE, lane), F(theta.var_weight[c]), d_h);
            }
            d_h.store_unaligned(d_tile + (config.row_h() + c) * TILE + lane);
          }
        }
      }
      transpose(inputs_CT, inputs, layout.wide(), in_TK);
      outer(d_z_JT, ThetaGradient::up(inputs, 4), in_TK, layout.wide(), layout.wide(), rates_sum);
      outer(d_z_JT + inputs * TILE, ThetaGradient::up(channels + 1, 4), in_TK + layout.skip(),
            layout.narrow(), layout.wide(), post_sum);
    }
    total_lanes(sums_CT, inputs, job.sums_C + index * inputs);
    const Real* scale = job.adam_scale_SC + chunk.segment * inputs;
    add_scaled(rates_sum, inputs, layout.wide(), scale, inputs, group + layout.adam());
    add_scaled(post_sum, channels + 1, layout.narrow(), nullptr, 0, group + layout.post());
  }

  // Inlined, the product's sums would share the registers with what follows, and some not stay there.
  template <int G>
  HYPERADAM_NOINLINE static void state_gates(const Real* weights, int inputs, const Real* inputs_CT,
                                             int lane, F (&gates)[4][G][VECTORS]) {
    F sums[4][G][VECTORS];
    Pass::template state_gates<G>(weights, inputs, inputs_CT, lane, sums);
    for (int q = 0; q < 4; ++q) {
      for (int g = 0; g < G; ++g) {
        for (int v = 0; v < VECTORS; ++v) gates[q][g][v] = sums[q][g][v];
      }
    }
  }

  template <int G>
  static void state_group(const Config& config, const Real* weights, const Real* inputs_CT,
                          int channel, const Real* tile, const Real* next, const Real* d_next,
                          const Real* d_h_HT, Real* d_tile, Real* d_z_JT) {
    const F one(1.0);
    const int channels = config.channels;
    for (int lane = 0; lane < TILE; lane += BLOCK) {
      F gates[4][G][VECTORS];
      state_gates<G>(weights, 2 * channels, inputs_CT, lane, gates);
      for (int g = 0; g < G; ++g) {
        const int c = channel + g, row = config.row_c() + c;
        for (int v = 0; v < VECTORS; ++v) {
          const int x = lane + v * LANES;
          F in, out_in, forget, out_forget, open, out_open;
          S::sigmoids(gates[0][g][v], in, out_in);
          S::sigmoids(gates[2][g][v], forget, out_forget);
          S::sigmoids(gates[3][g][v], open, out_open);
          const F candidate = S::tanh(gates[1][g][v]);
          const F squashed = S::tanh(at(next + row * TILE, x));
          const F d_h = at(d_h_HT + c * TILE, x);
          const F d_c =
              incoming(d_next, row, x) + d_h * open * (one - squashed * squashed);
          (d_c * candidate * in * out_in).store_unaligned(d_z_JT + c * TILE + x);
          (d_c * in * (one - candidate * candidate))
              .store_unaligned(d_z_JT + (channels + c) * TILE + x);
          (d_c * at(tile + row * TILE, x) * forget * out_forget)
              .store_unaligned(d_z_JT + (2 * channels + c) * TILE + x);
          (d_h * squashed * open * out_open)
              .store_unaligned(d_z_JT + (3 * channels + c) * TILE + x);
          (d_c * forget).store_unaligned(d_tile + row * TILE + x);
        }
      }
    }
  }

  // Second backward pass: state cell. Leaves the first term of d of x and h.
  static void state_chunk(const Config& config, const Theta<Real>& theta, const BackwardJob<Real>& job,
                          const Chunk& chunk, std::int64_t index, Real* group) {
    constexpr int G = Blocking<Arch>::STATE_CHANNELS;
    const int channels = config.channels, inputs = 2 * channels;
    const Corrections<Real> corrections(config, chunk.step);
    const ThetaGradient layout = gradient_layout(config);
    const Real* weights = job.state_weights + chunk.segment * Pass::packed_state_cell_size(config);
    const Real* transposed =
        job.state_transposed + chunk.segment * state_transposed_size(config);
    const Real* correction = job.adam_correction_SC + chunk.segment * inputs;
    alignas(64) Real features_FT[2 * MAX_DECAYS * TILE];
    alignas(64) Real inputs_CT[2 * MAX_CHANNELS * TILE];
    alignas(64) Real d_h_HT[MAX_CHANNELS * TILE];
    alignas(64) Real d_z_JT[4 * MAX_CHANNELS * TILE];
    alignas(64) Real d_in_CT[2 * MAX_CHANNELS * TILE];
    alignas(64) Real in_TK[TILE * MAX_WIDE];
    alignas(64) Real sums_CT[2 * MAX_CHANNELS * TILE] = {};
    alignas(64) Real gates_sum[4 * MAX_CHANNELS * MAX_WIDE] = {};
    alignas(64) Real mask_T[TILE];
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const std::int64_t first = (chunk.tile + t) * TILE;
      const Real* tile = Pass::tile_of(job.state, config, chunk.tile + t);
      const Real* next = Pass::tile_of(job.new_state, config, chunk.tile + t);
      const Real* d_next = job.d_new_state == nullptr
                                ? nullptr
                                : Pass::tile_of(job.d_new_state, config, chunk.tile + t);
      Real* d_tile = Pass::tile_of(static_cast<void*>(job.d_state), config, chunk.tile + t);
      if (t + 1 < chunk.tiles) {
        const int after = config.rows() * TILE, m = config.row_m() * TILE;
        prefetch(tile + after, m);
        prefetch(next + after + config.row_h() * TILE, 2 * channels * TILE);
        prefetch(d_tile + after + config.row_h() * TILE, 2 * channels * TILE);
      }
      make_mask(chunk.valid - t * TILE, mask_T);
      for (int c = 0; c < channels; ++c) {
        const F of_h(correction[channels + c]);
        const int h = (config.row_h() + c) * TILE;
        for (int lane = 0; lane < TILE; lane += LANES) {
          const F mask = F::load_aligned(mask_T + lane);
          (at(d_tile + h, lane) - mask * of_h * at(next + h, lane))
              .store_unaligned(d_h_HT + c * TILE + lane);
        }
      }
      Pass::features(config, corrections, tile, nullptr, job.grad + first, nullptr, features_FT);
      Pass::preprocess(config, theta, features_FT, inputs_CT);
      Pass::copy_rows(tile + config.row_h() * TILE, channels, inputs_CT + channels * TILE);
      const Real* packed = weights;
      int channel = 0;
      for (; channel + G <= channels; channel += G) {
        state_group<G>(config, packed, inputs_CT, channel, tile, next, d_next, d_h_HT, d_tile,
                       d_z_JT);
        packed += 4 * G * (inputs + 1);
      }
      for (; channel < channels; ++channel) {
        state_group<1>(config, packed, inputs_CT, channel, tile, next, d_next, d_h_HT, d_tile,
                       d_z_JT);
        packed += 4 * (inputs + 1);
      }
      rows_product(transposed, 4 * channels, inputs, d_z_JT, d_in_CT);
      for (int k = 0; k < inputs; ++k) {
        Real* out = k < channels
                         ? job.d_x + ((chunk.tile + t) * channels + k) * TILE
                         : d_tile + (config.row_h() + k - channels) * TILE;
        for (int lane = 0; lane < TILE; lane += LANES) {
          const F d_in = at(d_in_CT + k * TILE, lane);
          Real* sum = sums_CT + k * TILE + lane;
          xsimd::fma(d_in, at(inputs_CT + k * TILE, lane), F::load_aligned(sum)).store_aligned(sum);
          d_in.store_unaligned(out + lane);
        }
      }
      transpose(inputs_CT, inputs, layout.wide(), in_TK);
      outer(d_z_JT, 4 * channels, in_TK, layout.wide(), layout.wide(), gates_sum);
    }
    total_lanes(sums_CT, inputs, job.sums_C + index * inputs);
    add_scaled(gates_sum, 4 * channels, layout.wide(), job.state_scale_SC + chunk.segment * inputs,
               inputs, group + layout.lstm());
  }

  // Third backward pass: the preprocessing layer.
  static void features_chunk(const Config& config, const Theta<Real>& theta, const BackwardJob<Real>& job,
                             const Chunk& chunk, std::int64_t, Real* group) {
    const int channels = config.channels, width = 2 * config.decays;
    const Corrections<Real> corrections(config, chunk.step);
    const ThetaGradient layout = gradient_layout(config);
    const Real* correction = job.state_correction_SC + chunk.segment * 2 * channels;
    alignas(64) Real features_FT[2 * MAX_DECAYS * TILE];
    alignas(64) Real x_HT[MAX_CHANNELS * TILE];
    alignas(64) Real d_z_HT[(MAX_CHANNELS + 4) * TILE] = {};
    alignas(64) Real in_TK[TILE * MAX_SHORT];
    alignas(64) Real sum[(MAX_CHANNELS + 4) * MAX_SHORT] = {};
    alignas(64) Real mask_T[TILE];
    for (std::int64_t t = 0; t < chunk.tiles; ++t) {
      const Real* tile = Pass::tile_of(job.state, config, chunk.tile + t);
      Real* d_tile = Pass::tile_of(static_cast<void*>(job.d_state), config, chunk.tile + t);
      const Real* d_x_HT = job.d_x + (chunk.tile + t) * channels * TILE;
      make_mask(chunk.valid - t * TILE, mask_T);
      Pass::features(config, corrections, tile, nullptr, job.grad + (chunk.tile + t) * TILE, nullptr,
                     features_FT);
      Pass::preprocess(config, theta, features_FT, x_HT);
      for (int c = 0; c < channels; ++c) {
        const F of_x(correction[c]);
        for (int lane = 0; lane < TILE; lane += LANES) {
          const F mask = F::load_aligned(mask_T + lane);
          const F x = F::load_aligned(x_HT + c * TILE + lane);
          const F d_x = at(d_x_HT + c * TILE, lane) - mask * of_x * x;
          (d_x * xsimd::select(x > F(0.0), F(1.0), x + F(1.0)))
              .store_aligned(d_z_HT + c * TILE + lane);
        }
      }
      for (int row = 0; row < 2 * config.decays; ++row) {  // no gradient: they depend on g alone
        for (int lane = 0; lane < TILE; lane += LANES) {
          F(0.0).store_unaligned(d_tile + row * TILE + lane);
        }
      }
      transpose(features_FT, width, layout.short_(), in_TK);
      outer(d_z_HT, ThetaGradient::up(channels, 4), in_TK, layout.short_(), layout.short_(), sum);
    }
    add_scaled(sum, channels, layout.short_(), nullptr, 0, group + layout.pre());
  }
};

}  // namespace
}  // namespace hyperadam

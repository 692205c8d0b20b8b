// What a pass works on. Plain data, the same for every instruction set.
//
// The state lies in tiles of TILE coordinates: a tile holds its rows one after the other, each of
// TILE numbers, one a coordinate. Rows in order: exp_avg and exp_avg_sq (K each), then h, c, m, v,
// m_corr, v_corr (H each). A part is a run of coordinates that begins at a tile's first lane: one
// parameter, or one inner task. Lanes behind a part's last coordinate are padding: their gradient
// is 0, and what they hold is never read into a sum.
//
// Suffixes as in the rule: H channels, K fixed-moment decays, F = 2K features.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperadam {

constexpr int TILE = 32;
constexpr int MAX_CHANNELS = 32;
constexpr int MAX_DECAYS = 8;
constexpr std::int64_t CHUNK_TILES = 32;  // tiles whose sums are gathered lane by lane

struct Part {
  std::int64_t first_tile;
  std::int64_t count;
  std::int64_t segment;      // which column norms it belongs to
  std::int64_t noise_start;  // its first coordinate's number in the noise
};

// One stretch of a part's tiles: the unit of work of a thread.
struct Chunk {
  std::int64_t part;
  std::int64_t segment;
  std::int64_t tile;       // of the whole state
  std::int64_t tiles;
  std::int64_t valid;      // coordinates of the part in these tiles
  std::int64_t coordinate; // number of the first in the noise
  std::uint64_t step;      // from 1
  std::uint64_t seed;
  bool sample;
};

struct Config {
  int channels;
  int decays;
  double decay[MAX_DECAYS];
  double bound;  // of the candidates; 0: none
  bool var_block;

  int rows() const { return 2 * decays + 6 * channels; }
  int row_h() const { return 2 * decays; }
  int row_c() const { return row_h() + channels; }
  int row_m() const { return row_c() + channels; }
  int row_v() const { return row_m() + channels; }
  int row_m_corr() const { return row_v() + channels; }
  int row_v_corr() const { return row_m_corr() + channels; }
};

// Meta-parameters, row-major, under short forms of the authors' names.
template <class Real>
struct Theta {
  const Real* pre_weight;
  const Real* pre_bias;
  const Real* lstm_weight;
  const Real* lstm_bias;
  const Real* adam_weight;
  const Real* adam_bias;
  const Real* post_weight;
  const Real* post_bias;
  const Real* var_weight;  // null without a VarBlock
  const Real* var_bias;
};

template <class Real>
struct Features {
  const void* state;
  const Real* grad;
  double* sums_H;  // of x squared, per chunk
  bool* finite;    // per chunk
};

template <class Real>
struct StateCell {
  const void* state;
  void* new_state;
  const Real* grad;
  const Real* weights;  // of each segment, packed by pack_state_cell
  double* sums_H;        // of the new h squared, per chunk; null: not wanted
};

template <class Real>
struct AdamCell {
  const void* state;
  void* new_state;  // whose h is read
  const Real* grad;
  const Real* weights;  // of each segment, packed by pack_adam_cell
  double* sums_H;        // of the new m squared, per chunk
  Real* mean;       // null: the new state is wanted, and no update
  Real* log_var;    // null without a VarBlock
  Real* direction;  // null: not wanted
};

// What the variance's shape reads of a step (docs/method.md, "The variance's shape").
template <class Real>
struct VarianceSums {
  const void* state;  // after the step
  int decay;          // of the fixed moment
  const Real* mean;
  double* sums_2;     // of that moment, corrected, and of the mean squared, per chunk
};

template <class Real>
struct VarianceShape {
  const void* state;  // after the step
  int decay;
  double base;
  double floor;
  const double* moment_S;  // the moment's mean over each segment
  const double* level_S;   // what multiplies all variances of a segment
  const Real* mean;
  Real* log_var;
  Real* direction;  // null: not wanted
};

// The backward passes go through a step's cells in reverse, with states of float32. `d_` is the
// gradient of the meta-loss with respect to what follows. What a pass leaves for the next one lies in
// d_state, whose rows it will overwrite, and in d_x.
//
// unit_columns gives u = y s with s = (sum of y squared [/ N] + eps)^(-1/2), so for G = d_u
//   d_y = s G - kappa y s^2 Q,  Q = sum over N of (s G) y,  kappa = 1, or 1 / N for the mean;
// a pass writes the first term and gathers Q, and who reads it next subtracts the second: of h and x
// within a step the next pass, of m and h before it the step before, which is owed it.
template <class Real>
struct BackwardJob {
  const Real* state;        // before the step
  const Real* new_state;    // after it
  const Real* grad;
  const Real* d_mean;
  const Real* d_log_var;    // null without a VarBlock
  const Real* d_new_state;  // null: zero
  const Real* owed_SC;      // kappa s^2 Q of [m, h] after the step, still to be subtracted from it
  Real* d_state;
  Real* d_x;                    // H rows a tile
  const Real* state_weights;    // of each segment, packed for the forward pass
  const Real* adam_weights;
  const Real* state_transposed;  // of each segment, packed by pack_state_transposed
  const Real* adam_transposed;
  const Real* adam_correction_SC;   // kappa s^2 Q of [m, h], when it is known
  const Real* state_correction_SC;  // of [x, h before the step]
  const Real* adam_scale_SC;
  const Real* state_scale_SC;
  double* sums_C;    // Q of each chunk
  Real* d_theta;    // of each group of chunks, in the layout of ThetaGradient
};

// Where the gradients of a group of chunks lie: matrices whose rows are outputs and whose columns are
// inputs, then the bias; padded to whole vectors. The candidates' weights (post) read [h] alone, and
// share the other cells' [m, h] but for whole vectors of m.
struct ThetaGradient {
  int lanes;
  int channels;
  int features;
  bool var_block;

  static int up(int value, int step) { return (value + step - 1) / step * step; }
  int wide() const { return up(2 * channels + 1, lanes); }
  int skip() const { return channels / lanes * lanes; }      // of wide's columns, before those of h
  int narrow() const { return wide() - skip(); }             // the rest: some of m, h, the bias
  int short_() const { return up(features + 1, lanes); }
  int lstm() const { return 0; }
  int adam() const { return lstm() + 4 * channels * wide(); }
  int post() const { return adam() + up(2 * channels, 4) * wide(); }  // and VarBlock's last row
  int pre() const { return post() + up(channels + 1, 4) * narrow(); }
  int size() const { return pre() + up(channels, 4) * short_(); }
};

}  // namespace hyperadam

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
constexpr std::int64_t CHUNK_TILES = 32;  // tiles whose sums are gathered in float32

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
  float bound;  // of the candidates; 0: none
  bool var_block;
  bool bfloat16;  // storage of the state

  int rows() const { return 2 * decays + 6 * channels; }
  int row_h() const { return 2 * decays; }
  int row_c() const { return row_h() + channels; }
  int row_m() const { return row_c() + channels; }
  int row_v() const { return row_m() + channels; }
  int row_m_corr() const { return row_v() + channels; }
  int row_v_corr() const { return row_m_corr() + channels; }
};

// Meta-parameters, row-major, under short forms of the authors' names.
struct Theta {
  const float* pre_weight;
  const float* pre_bias;
  const float* lstm_weight;
  const float* lstm_bias;
  const float* adam_weight;
  const float* adam_bias;
  const float* post_weight;
  const float* post_bias;
  const float* var_weight;  // null without a VarBlock
  const float* var_bias;
};

struct Features {
  const void* state;
  const float* grad;
  double* sums_H;  // of x squared, per chunk
  bool* finite;    // per chunk
};

struct StateCell {
  const void* state;
  void* new_state;
  const float* grad;
  const float* weights;  // of each segment, packed by pack_state_cell
  double* sums_H;        // of the new h squared, per chunk
};

struct AdamCell {
  const void* state;
  void* new_state;  // whose h is read
  const float* grad;
  const float* weights;  // of each segment, packed by pack_adam_cell
  double* sums_H;        // of the new m squared, per chunk
  float* mean;
  float* log_var;    // null without a VarBlock
  float* direction;  // null: not wanted
};

}  // namespace hyperadam

// Vectors of one instruction set, and the nonlinear functions on them.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>
#include <xsimd/xsimd.hpp>

#include "problem.hpp"

namespace hyperadam {
namespace {  // each instruction set has its own copies

// How the matrix products are blocked: VECTORS vectors of coordinates by so many channels of four
// (state cell) or three (Adam cell) outputs, as many as the registers hold.
template <class Arch>
struct Blocking {
  static constexpr int VECTORS = 1;
  static constexpr int STATE_CHANNELS = 2;
  static constexpr int ADAM_CHANNELS = 4;
};

template <>
struct Blocking<xsimd::avx512bw> {
  static constexpr int VECTORS = 2;
  static constexpr int STATE_CHANNELS = 2;
  static constexpr int ADAM_CHANNELS = 3;
};

struct bfloat16 {
  std::uint16_t bits;
};

template <class Arch>
struct Simd {
  using F = xsimd::batch<float, Arch>;
  static constexpr int LANES = static_cast<int>(F::size);
  static_assert(TILE % LANES == 0);

  // 1 / (1 + exp(-x))
  static F sigmoid(F x) { return F(1.0f) / (F(1.0f) + xsimd::exp(-x)); }

  // sigmoid(x) and sigmoid(-x), each with its full relative precision.
  static void sigmoids(F x, F& sigmoid, F& complement) {
    const F power = xsimd::exp(xsimd::min(x, F(88.0f)));
    complement = F(1.0f) / (F(1.0f) + power);
    sigmoid = power * complement;
  }

  static F tanh(F x) { return xsimd::tanh(x); }

  static F elu(F x) { return xsimd::select(x > F(0.0f), x, xsimd::expm1(xsimd::min(x, F(0.0f)))); }
};

[[maybe_unused]] inline float load_one(const float* row, int lane) { return row[lane]; }

[[maybe_unused]] inline float load_one(const bfloat16* row, int lane) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(row[lane].bits) << 16);
}

// A row of a tile as float32: the row itself, or its numbers converted into `scratch`.
[[maybe_unused]] inline const float* load_row(const float* row, float*) { return row; }

[[maybe_unused]] inline const float* load_row(const bfloat16* row, float* scratch) {
  for (int lane = 0; lane < TILE; ++lane) scratch[lane] = load_one(row, lane);
  return scratch;
}

}  // namespace
}  // namespace hyperadam

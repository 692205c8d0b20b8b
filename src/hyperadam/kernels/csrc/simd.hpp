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
  static constexpr int OUTER_ROWS = 4;
};

template <>
struct Blocking<xsimd::avx512bw> {
  static constexpr int VECTORS = 2;
  static constexpr int STATE_CHANNELS = 2;
  static constexpr int ADAM_CHANNELS = 3;
  static constexpr int OUTER_ROWS = 8;
};

struct bfloat16 {
  std::uint16_t bits;
};

template <class Arch, class Real>
struct Simd {
  using F = xsimd::batch<Real, Arch>;
  static constexpr Real LARGEST_POWER = std::is_same_v<Real, float> ? 88 : 709;
  static constexpr int LANES = static_cast<int>(F::size);
  static_assert(TILE % LANES == 0);

  // 1 / (1 + exp(-x))
  static F sigmoid(F x) { return F(1.0) / (F(1.0) + xsimd::exp(-x)); }

  // sigmoid(x) and sigmoid(-x), each with its full relative precision.
  static void sigmoids(F x, F& sigmoid, F& complement) {
    const F power = xsimd::exp(xsimd::min(x, F(LARGEST_POWER)));
    complement = F(1.0) / (F(1.0) + power);
    sigmoid = power * complement;
  }

  static F tanh(F x) { return xsimd::tanh(x); }

  static F elu(F x) { return xsimd::select(x > F(0.0), x, xsimd::expm1(xsimd::min(x, F(0.0)))); }
};

template <class Real>
Real load_one(const Real* row, int lane) {
  return row[lane];
}

[[maybe_unused]] inline float load_one(const bfloat16* row, int lane) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(row[lane].bits) << 16);
}

// A row of a tile as numbers: the row itself, or its numbers converted into `scratch`.
template <class Real>
const Real* load_row(const Real* row, Real*) {
  return row;
}

[[maybe_unused]] inline const float* load_row(const bfloat16* row, float* scratch) {
  for (int lane = 0; lane < TILE; ++lane) scratch[lane] = load_one(row, lane);
  return scratch;
}

}  // namespace
}  // namespace hyperadam

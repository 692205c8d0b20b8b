// Vectors of one instruction set, and the nonlinear functions on them.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>
#include <xsimd/xsimd.hpp>

#include "problem.hpp"

// Vectors in registers do not outlive a call, so what works on them must not be one.
#if defined(__GNUC__)
#define HYPERADAM_INLINE [[gnu::always_inline]]
#define HYPERADAM_NOINLINE [[gnu::noinline]]
#else
#define HYPERADAM_INLINE
#define HYPERADAM_NOINLINE
#endif

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
  static constexpr int ADAM_CHANNELS = 4;
  static constexpr int OUTER_ROWS = 8;
};

struct bfloat16 {
  std::uint16_t bits;
};

// Whether an instruction set has estimates of 1/x and 1/sqrt(x) that one Newton step makes good to
// a few units in the last place of a float. Divisions are slower.
template <class Arch, class Real>
constexpr bool HAS_ESTIMATES =
    std::is_same_v<Real, float> &&
    (std::is_base_of_v<xsimd::avx2, Arch> || std::is_base_of_v<xsimd::avx512f, Arch>);

// NaN stays NaN in all of these: min and max return their second argument where one is NaN.
template <class Arch, class Real>
struct Simd {
  using F = xsimd::batch<Real, Arch>;
  // One over its exponential is still a normal number.
  static constexpr Real LARGEST_POWER = std::is_same_v<Real, float> ? 87 : 708;
  static constexpr Real LARGEST_TANH = std::is_same_v<Real, float> ? 10 : 20;  // tanh is 1 there
  // Root estimates make NaN of infinity, where dividing by the root gives 0. A v has no infinity but
  // in an unroll, which takes any gradient.
  static constexpr Real LARGEST = std::is_same_v<Real, float> ? 3e38 : 1e308;
  static constexpr Real LARGEST_GRADIENT = std::is_same_v<Real, float> ? 1e15 : 1e140;  // tiled.py
  static constexpr int LANES = static_cast<int>(F::size);
  static_assert(TILE % LANES == 0);

  // 1 / x, for x between 1e-38 and 8e37 (float).
  HYPERADAM_INLINE static F inverse(F x) {
    if constexpr (HAS_ESTIMATES<Arch, Real>) {
      const F estimate = xsimd::reciprocal(x);
      return xsimd::fma(estimate, xsimd::fnma(x, estimate, F(1)), estimate);
    } else {
      return F(1) / x;
    }
  }

  // 1 / sqrt(x), for x between 1e-38 and 3e38 (float).
  HYPERADAM_INLINE static F inverse_root(F x) {
    if constexpr (HAS_ESTIMATES<Arch, Real>) {
      const F estimate = xsimd::rsqrt(x), half = F(0.5) * x * estimate;
      return xsimd::fma(estimate, xsimd::fnma(half, estimate, F(0.5)), estimate);
    } else {
      return F(1) / xsimd::sqrt(x);
    }
  }

  // a0 b0 a1 b1 ... in two vectors.
  HYPERADAM_INLINE static void zip(F a, F b, F& low, F& high) {
#ifdef __AVX512F__  // xsimd takes six shuffles for each where the processor has one
    if constexpr (std::is_same_v<Real, float> && LANES == 16) {
      const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
      low = _mm512_permutex2var_ps(a, first, b);
      high = _mm512_permutex2var_ps(a, second, b);
      return;
    }
#endif
    low = xsimd::zip_lo(a, b);
    high = xsimd::zip_hi(a, b);
  }

  HYPERADAM_INLINE static F clamp(F x, Real largest) {
    return xsimd::min(F(largest), xsimd::max(F(-largest), x));
  }

  // exp(x) - 1 as power * (1 + rest) - 1, for x within LARGEST_POWER of 0. The power is one of two
  // and the rest a polynomial of what x has left, so nothing cancels where x is small (W. J. Cody
  // and W. Waite, 1980). xsimd's own functions do for any x what here would be done for nothing:
  // selections, a scaling in two steps.
  //
  // Adding ROUNDER rounds to a whole number, whose bits then end with the power's exponent. The
  // coefficients interpolate (exp(x) - 1 - x) / x^2 at Chebyshev's nodes of half a log 2 to each
  // side: 1e-8 of exp(x). That log 2 has 24 bits costs 2e-9 of exp(x) for each power of two.
  struct Power {
    F power, rest;
  };
  HYPERADAM_INLINE static Power split_exp(F x) {
    constexpr float ROUNDER = 12582912 + 127;  // 1.5 * 2^23, and the bias of exponents
    const F rounded = xsimd::fma(x, F(1.44269504088896341), F(ROUNDER));
    const F low = xsimd::fma(rounded - F(ROUNDER), F(-0.693147180559945309), x);
    F series = xsimd::fma(F(1.392620336e-03), low, F(8.363194882e-03));
    series = xsimd::fma(series, low, F(4.166655450e-02));
    series = xsimd::fma(series, low, F(1.666657689e-01));
    series = xsimd::fma(series, low, F(5.000000000e-01));
    return {xsimd::bitwise_cast<float>(xsimd::bitwise_cast<std::int32_t>(rounded) << 23),
            xsimd::fma(series, low * low, low)};
  }

  HYPERADAM_INLINE static F exp(F x) {
    if constexpr (std::is_same_v<Real, float>) {
      const Power e = split_exp(x);
      return xsimd::fma(e.power, e.rest, e.power);
    } else {
      return xsimd::exp(x);
    }
  }

  HYPERADAM_INLINE static F expm1(F x) {
    if constexpr (std::is_same_v<Real, float>) {
      const Power e = split_exp(x);
      return xsimd::fma(e.power, e.rest, e.power - F(1));
    } else {
      return xsimd::expm1(x);
    }
  }

  // 1 / (1 + exp(-x))
  HYPERADAM_INLINE static F sigmoid(F x) { return inverse(F(1) + exp(-clamp(x, LARGEST_POWER))); }

  // sigmoid(x) and sigmoid(-x), each with its full relative precision.
  HYPERADAM_INLINE static void sigmoids(F x, F& sigmoid, F& complement) {
    const F power = exp(clamp(x, LARGEST_POWER));
    complement = inverse(F(1) + power);
    sigmoid = power * complement;
  }

  // (exp(2x) - 1) / (exp(2x) + 1), exact also where x is small.
  HYPERADAM_INLINE static F tanh(F x) {
    const F clamped = clamp(x, LARGEST_TANH);
    const F power = expm1(clamped + clamped);
    return power * inverse(power + F(2));
  }

  HYPERADAM_INLINE static F elu(F x) {
    const F negative = xsimd::min(F(0), xsimd::max(F(-LARGEST_POWER), x));
    return xsimd::select(x > F(0), x, expm1(negative));
  }
};

// Asks for numbers that will be needed, so that they come from memory meanwhile.
template <class Number>
void prefetch(const Number* numbers, std::int64_t count) {
#if defined(__GNUC__)
  const char* bytes = reinterpret_cast<const char*>(numbers);
  const std::int64_t size = count * static_cast<std::int64_t>(sizeof(Number));
  for (std::int64_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at, 0, 2);
#endif
}

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

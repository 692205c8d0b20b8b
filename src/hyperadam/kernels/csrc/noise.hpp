// Standard normal numbers by counter: rule/noise.py in C++, operation for operation.
//
// Every float32 operation here is rounded by itself, so this must be compiled without contraction
// of products and sums and without fast-math.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace hyperadam {
namespace {

struct Words {
  std::uint32_t word[4];
};

// Philox 4x32-10 (Salmon et al., SC 2011).
[[maybe_unused]] inline Words philox(std::uint32_t w0, std::uint32_t w1, std::uint32_t w2, std::uint32_t w3,
                    std::uint64_t key) {
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{w0} * 0xD2511F53u;
    const std::uint64_t product1 = std::uint64_t{w2} * 0xCD9E8D57u;
    w0 = static_cast<std::uint32_t>(product1 >> 32) ^ w1 ^ key0;
    w2 = static_cast<std::uint32_t>(product0 >> 32) ^ w3 ^ key1;
    w1 = static_cast<std::uint32_t>(product1);
    w3 = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{w0, w1, w2, w3}};
}

// log((word | 1) / 2^32)
[[maybe_unused]] inline float log_unit(std::uint32_t word) {
  const float value = static_cast<float>(word | 1u);
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  float mantissa = std::bit_cast<float>((bits & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  int exponent = static_cast<int>(bits >> 23) - 126;
  const bool low = mantissa < 0.70710678118654752440f;
  mantissa = low ? mantissa + mantissa : mantissa;
  exponent = exponent - (low ? 1 : 0) - 32;
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const float square = s * s;
  float series = square * static_cast<float>(2.0 / 9);
  series = (series + static_cast<float>(2.0 / 7)) * square;
  series = (series + static_cast<float>(2.0 / 5)) * square;
  series = (series + static_cast<float>(2.0 / 3)) * square;
  series = (series + 2.0f) * s;
  return static_cast<float>(exponent) * 0.69314718055994530942f + series;
}

// Sine (odd) or cosine (even) of the word's part of a turn, shifted by half a quadrant.
[[maybe_unused]] inline float sin_or_cos_turn(std::uint32_t word, bool want_sine) {
  const std::uint32_t quadrant = word >> 30;
  const std::int32_t offset = static_cast<std::int32_t>(word & 0x3FFFFFFFu) - 0x20000000;
  const float angle = static_cast<float>(offset) *
                      static_cast<float>(3.14159265358979323846 / 2 / 1073741824.0);
  const float square = angle * angle;
  float sine = square * static_cast<float>(1.0 / 362880);
  sine = (sine + static_cast<float>(-1.0 / 5040)) * square;
  sine = (sine + static_cast<float>(1.0 / 120)) * square;
  sine = (sine + static_cast<float>(-1.0 / 6)) * square;
  sine = (sine + 1.0f) * angle;
  float cosine = square * static_cast<float>(-1.0 / 3628800);
  cosine = (cosine + static_cast<float>(1.0 / 40320)) * square;
  cosine = (cosine + static_cast<float>(-1.0 / 720)) * square;
  cosine = (cosine + static_cast<float>(1.0 / 24)) * square;
  cosine = (cosine + static_cast<float>(-1.0 / 2)) * square;
  cosine = cosine + 1.0f;
  const bool swap = (quadrant & 1u) == 1u;
  const float sine_turned = swap ? cosine : sine;
  const float cosine_turned = swap ? -sine : cosine;
  const float chosen = want_sine ? sine_turned : cosine_turned;
  return quadrant >= 2u ? -chosen : chosen;
}

// `count` numbers for the coordinates from `start` on. The loops are plain so that the compiler
// can turn each into vector instructions.
[[maybe_unused]] inline void standard_normal(std::uint64_t seed, std::uint64_t step, std::uint64_t start, int count,
                            float* out) {
  const std::uint32_t step0 = static_cast<std::uint32_t>(step);
  const std::uint32_t step1 = static_cast<std::uint32_t>(step >> 32);
  for (int lane = 0; lane < count; ++lane) {
    const std::uint64_t coordinate = start + static_cast<std::uint64_t>(lane);
    const std::uint64_t block = coordinate >> 2;
    const Words words = philox(static_cast<std::uint32_t>(block),
                               static_cast<std::uint32_t>(block >> 32), step0, step1, seed);
    const bool second = (coordinate & 2u) != 0;
    const std::uint32_t radius_word = second ? words.word[2] : words.word[0];
    const std::uint32_t angle_word = second ? words.word[3] : words.word[1];
    const float radius = std::sqrt(log_unit(radius_word) * -2.0f);
    out[lane] = radius * sin_or_cos_turn(angle_word, (coordinate & 1u) != 0);
  }
}

// Sixteen random bits for the rounding of a row of a coordinate's state.
[[maybe_unused]] inline std::uint32_t rounding_bits(std::uint32_t word, std::uint32_t row) {
  std::uint32_t x = word ^ (row * 0x9E3779B9u);
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x >> 16;
}

// The words that rounding_bits starts from, one a coordinate: another stream than the noise's.
[[maybe_unused]] inline void rounding_words(std::uint64_t seed, std::uint64_t step, std::uint64_t start, int count,
                           std::uint32_t* out) {
  const std::uint32_t step0 = static_cast<std::uint32_t>(step);
  const std::uint32_t step1 = static_cast<std::uint32_t>(step >> 32) | 0x80000000u;
  for (int lane = 0; lane < count; ++lane) {
    const std::uint64_t coordinate = start + static_cast<std::uint64_t>(lane);
    out[lane] = philox(static_cast<std::uint32_t>(coordinate),
                       static_cast<std::uint32_t>(coordinate >> 32), step0, step1, seed)
                    .word[0];
  }
}

}  // namespace
}  // namespace hyperadam

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

// Philox 4x32-10 (Salmon et al., SC 2011).
[[maybe_unused]] inline void philox_round(std::uint32_t& w0, std::uint32_t& w1, std::uint32_t& w2,
                                          std::uint32_t& w3, std::uint32_t key0,
                                          std::uint32_t key1) {
  const std::uint64_t product0 = std::uint64_t{w0} * 0xD2511F53u;
  const std::uint64_t product1 = std::uint64_t{w2} * 0xCD9E8D57u;
  w0 = static_cast<std::uint32_t>(product1 >> 32) ^ w1 ^ key0;
  w2 = static_cast<std::uint32_t>(product0 >> 32) ^ w3 ^ key1;
  w1 = static_cast<std::uint32_t>(product1);
  w3 = static_cast<std::uint32_t>(product0);
}

constexpr int BLOCKS = 64;  // counters at a time

// The words of BLOCKS counters from `first` on, by word and counter. The loops over counters are
// the inner ones so that the compiler turns them into vector instructions.
[[maybe_unused]] inline void philox(std::uint64_t first, std::uint32_t step0, std::uint32_t step1,
                                    std::uint64_t key, std::uint32_t (&words)[4][BLOCKS]) {
  for (int b = 0; b < BLOCKS; ++b) {
    const std::uint64_t block = first + static_cast<std::uint64_t>(b);
    words[0][b] = static_cast<std::uint32_t>(block);
    words[1][b] = static_cast<std::uint32_t>(block >> 32);
    words[2][b] = step0;
    words[3][b] = step1;
  }
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < BLOCKS; ++b) {
      philox_round(words[0][b], words[1][b], words[2][b], words[3][b], key0, key1);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
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

// Sine and cosine of the word's part of a turn, shifted by half a quadrant.
[[maybe_unused]] inline void sincos_turn(std::uint32_t word, float& sine_out, float& cosine_out) {
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
  sine_out = quadrant >= 2u ? -sine_turned : sine_turned;
  cosine_out = quadrant >= 2u ? -cosine_turned : cosine_turned;
}

// `count` numbers for the coordinates from `start` on. A counter makes four: two pairs of cosine
// and sine.
[[maybe_unused]] inline void standard_normal(std::uint64_t seed, std::uint64_t step,
                                             std::uint64_t start, std::int64_t count, float* out) {
  const std::uint32_t step0 = static_cast<std::uint32_t>(step);
  const std::uint32_t step1 = static_cast<std::uint32_t>(step >> 32);
  std::uint64_t block = start >> 2;
  std::int64_t first = -static_cast<std::int64_t>(start & 3u);  // place of the block's first number
  std::uint32_t words[4][BLOCKS];
  float numbers[4][BLOCKS];
  for (; first < count; first += 4 * BLOCKS, block += BLOCKS) {
    philox(block, step0, step1, seed, words);
    for (int pair = 0; pair < 2; ++pair) {
      for (int b = 0; b < BLOCKS; ++b) {
        const float radius = std::sqrt(log_unit(words[2 * pair][b]) * -2.0f);
        float sine, cosine;
        sincos_turn(words[2 * pair + 1][b], sine, cosine);
        numbers[2 * pair][b] = radius * cosine;
        numbers[2 * pair + 1][b] = radius * sine;
      }
    }
    const std::int64_t begin = first < 0 ? 0 : first;
    const std::int64_t end = first + 4 * BLOCKS < count ? first + 4 * BLOCKS : count;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t number = i - first;
      out[i] = numbers[number & 3][number >> 2];
    }
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
[[maybe_unused]] inline void rounding_words(std::uint64_t seed, std::uint64_t step, std::uint64_t start,
                                            std::int64_t count, std::uint32_t* out) {
  const std::uint32_t step0 = static_cast<std::uint32_t>(step);
  const std::uint32_t step1 = static_cast<std::uint32_t>(step >> 32) | 0x80000000u;
  std::uint32_t words[4][BLOCKS];
  for (std::int64_t first = 0; first < count; first += BLOCKS) {
    philox(start + static_cast<std::uint64_t>(first), step0, step1, seed, words);
    const std::int64_t end = first + BLOCKS < count ? first + BLOCKS : count;
    for (std::int64_t i = first; i < end; ++i) out[i] = words[0][i - first];
  }
}

}  // namespace
}  // namespace hyperadam

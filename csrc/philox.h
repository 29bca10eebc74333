// The noise contract: eps[row, col] is a pure function of (seed, row, col). vittle_kernels/noise.py is its twin.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
// key = (low, high word of the seed) and counter = (col / 4, row low, row high, 0) gives four words a call.
// Words (0, 1) make columns 4q, 4q + 1 and words (2, 3) make 4q + 2, 4q + 3 by Box-Muller.
#pragma once

#include "approx.h"

namespace vittle {

constexpr int kPhiloxRounds = 10;

// The key of each round.
struct PhiloxKeys {
  uint32_t low[kPhiloxRounds], high[kPhiloxRounds];
};

// Word: uint32_t, or several of them, where wide_product, high_word, low_word and ^ are defined.
template <typename Word>
struct PhiloxWords {
  Word word[4];
};

VITTLE_FN uint64_t wide_product(uint32_t factor, uint32_t word) { return static_cast<uint64_t>(factor) * word; }
VITTLE_FN uint32_t high_word(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
VITTLE_FN uint32_t low_word(uint64_t product) { return static_cast<uint32_t>(product); }

VITTLE_FN PhiloxKeys philox_keys(int64_t seed) {
  PhiloxKeys keys;
  keys.low[0] = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  keys.high[0] = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 1; round < kPhiloxRounds; ++round) {
    keys.low[round] = keys.low[round - 1] + 0x9E3779B9u;
    keys.high[round] = keys.high[round - 1] + 0xBB67AE85u;
  }
  return keys;
}

// Recursive, not a loop: a vectorizer wants the loop around it to be the innermost one.
template <int kRound = 0, typename Word>
VITTLE_FN PhiloxWords<Word> philox4x32(const PhiloxKeys& keys, PhiloxWords<Word> counter) {
  const auto product0 = wide_product(0xD2511F53u, counter.word[0]);
  const auto product1 = wide_product(0xCD9E8D57u, counter.word[2]);
  const PhiloxWords<Word> mixed = {{high_word(product1) ^ counter.word[1] ^ keys.low[kRound], low_word(product1),
                                    high_word(product0) ^ counter.word[3] ^ keys.high[kRound], low_word(product0)}};
  if constexpr (kRound + 1 == kPhiloxRounds) {
    return mixed;
  } else {
    return philox4x32<kRound + 1>(keys, mixed);
  }
}

VITTLE_FN PhiloxWords<uint32_t> noise_counter(int64_t row, uint32_t quad) {
  const uint64_t r = static_cast<uint64_t>(row);
  return {{quad, low_word(r), high_word(r), 0u}};
}

// Two standard normals from two words: radius sqrt(-2 ln u) and angle 2 pi u', u = (word + 1/2) 2^-32.
VITTLE_FN void box_muller(uint32_t radius_word, uint32_t angle_word, float& even, float& odd) {
  const float u = static_cast<float>(radius_word) * 2.32830644e-10f + 1.16415322e-10f;
  const float radius = square_root(-1.38629436f * log2_of_fraction(u));  // -2 ln u = -2 ln 2 log2 u
  const SinCos direction = sincos_of_turn(angle_word);
  even = radius * direction.cos;
  odd = radius * direction.sin;
}

struct Normals {
  float eps[4];
};

VITTLE_FN Normals normals(PhiloxWords<uint32_t> words) {
  Normals n;
  box_muller(words.word[0], words.word[1], n.eps[0], n.eps[1]);
  box_muller(words.word[2], words.word[3], n.eps[2], n.eps[3]);
  return n;
}

}  // namespace vittle

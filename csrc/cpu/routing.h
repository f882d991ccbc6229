// The router's score functions by name.
#pragma once

#include <string>

#include "tensors.h"

namespace deepkern {

enum class Score { sigmoid, softmax, sqrtsoftplus };

inline Score score_of(const char* op, const std::string& name) {
  if (name == "sigmoid") return Score::sigmoid;
  if (name == "softmax") return Score::softmax;
  STD_TORCH_CHECK(name == "sqrtsoftplus", op,
                  ": score: expected sigmoid, softmax or sqrtsoftplus, got ", name);
  return Score::sqrtsoftplus;
}

// E rounded up, so that every instruction set reads whole vectors.
constexpr int64_t padded_experts(int64_t E) { return ceil_div(E, 16) * 16; }

}  // namespace deepkern

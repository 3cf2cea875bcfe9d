// The softmax of PyTorch over rows and the codes behind it, one row after the other.
//
// What has to be as in aten/src/ATen/native/cpu/SoftMaxKernel.cpp: the order of sums, one vector
// along the row and then its lanes in halves, or lane after lane where a row fills no vector; and
// that the sum's reciprocal is multiplied. The largest value is the same in any order.
#pragma once

#include "glue_vectors.h"

namespace {

// the largest of a row of x * factor
float largest(const float* x, Size columns, float factor) {
  if (columns < W) {
    float top = x[0] * factor;
    for (Size c = 1; c < columns; ++c) top = std::max(top, x[c] * factor);
    return top;
  }
  auto value = [=](Size c) { return load(x + c, W) * splat(factor); };
  Vec even = value(0), odd = value(columns - W);  // the latter for what fills no vector
  for (Size c = W; c + W <= columns; c += 2 * W) {
    even = larger(even, value(c));
    odd = larger(odd, value(std::min(c + W, columns - W)));
  }
  return fold(larger(even, odd), larger);
}

// codes of the softmax of a row of x * factor; `scratch` holds a row
template <class T>
void softmax_row(const float* x, T* out, Size columns, float factor, const Grid& grid,
                 float* scratch) {
  const Vec top = splat(largest(x, columns, factor));
  Vec sums = splat(0);
  by_vectors(0, columns, [&](Size c, Size n) {
    store(scratch + c, exp(load(x + c, n) * splat(factor) - top), n);
    sums = sums + load(scratch + c, n);
  });
  float sum = scratch[0];
  if (columns < W) {
    for (Size c = 1; c < columns; ++c) sum = sum + scratch[c];
  } else {
    sum = fold(sums, [](Vec a, Vec b) { return a + b; });
  }
  const Vec reciprocal = splat(1.0f / sum);
  by_vectors(0, columns, [&](Size c, Size n) {
    grid.put(out + c, load(scratch + c, n) * reciprocal, c, n);
  });
}

template <class T>
void softmax(const float* x, T* out, Size rows, Size columns, float factor, const Grid& given,
             Size threads) {
  share(rows, threads, rows * columns >= GRAIN, [=](Size begin, Size end) {
    const Grid grid = given;
    std::vector<float> scratch(columns);
    for (Size i = begin; i < end; ++i) {
      softmax_row(x + i * columns, out + i * columns, columns, factor, grid, scratch.data());
    }
  });
}

}  // namespace

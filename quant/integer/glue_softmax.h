// The softmax of PyTorch over rows and the codes behind it, one row after the other.
//
// What has to be as in aten/src/ATen/native/cpu/SoftMaxKernel.cpp: the order of sums, one vector
// along the row whose lanes are then added in halves, or lane after lane where a row fills no vector;
// and that the sum's reciprocal is multiplied. The largest value is the same in any order.
#pragma once

#include "glue_vectors.h"

namespace {

float largest(const float* x, Size columns) {
  float top = x[0];
  if (columns < W) {
    for (Size c = 1; c < columns; ++c) top = std::max(top, x[c]);
    return top;
  }
  constexpr int B = 4;
  Vec tops[B];
  for (int b = 0; b < B; ++b) tops[b] = splat(top);
  Size c = 0;
  for (; c + B * W <= columns; c += B * W) {
    for (int b = 0; b < B; ++b) tops[b] = larger(tops[b], load(x + c + b * W, W));
  }
  for (; c + W <= columns; c += W) tops[0] = larger(tops[0], load(x + c, W));
  tops[1] = larger(tops[1], load(x + columns - W, W));  // what is left, and some once more
  float lanes[W];
  store(lanes, larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])), W);
  return *std::max_element(lanes, lanes + W);
}

// codes of the softmax of a row of x * factor; `scratch` holds a row
template <class T>
void softmax_row(const float* x, T* out, Size columns, float factor, const Grid& grid,
                 float* scratch) {
  if (factor != 1) {
    by_vectors(0, columns, [&](Size c, Size n) {
      store(scratch + c, load(x + c, n) * splat(factor), n);
    });
    x = scratch;
  }
  const float top = largest(x, columns);
  Vec sums = splat(0);
  by_vectors(0, columns, [&](Size c, Size n) {
    store(scratch + c, exp(load(x + c, n) - splat(top)), n);
    sums = sums + load(scratch + c, n);
  });
  float sum = scratch[0];
  if (columns < W) {
    for (Size c = 1; c < columns; ++c) sum = sum + scratch[c];
  } else {
    float lanes[W];
    store(lanes, sums, W);
    sum = tree_sum<W>(lanes);
  }
  const float reciprocal = 1.0f / sum;
  by_vectors(0, columns, [&](Size c, Size n) {
    grid.put(out + c, load(scratch + c, n) * splat(reciprocal), c, n);
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

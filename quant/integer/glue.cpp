// The glue between integer products on the CPU, with the bits that PyTorch's own operators give in
// many passes. quant/integer/glue.py defines it; glue_build.py compiles it with -ffp-contract=off,
// glue_cpu.py calls it and compares.
#include "glue_norm.h"
#include "glue_softmax.h"

namespace {

// f(row, begin, end) for the columns of all rows; a single row in pieces
template <class F>
void by_rows(Size rows, Size columns, Size threads, const F& f) {
  if (rows > 1) {
    share(rows, threads, rows * columns >= GRAIN, [&](Size begin, Size end) {
      for (Size i = begin; i < end; ++i) f(i, 0, columns);
    });
  } else {
    share(chunk(columns, GRAIN), threads, true, [&](Size begin, Size end) {
      f(0, begin * GRAIN, std::min(columns, end * GRAIN));
    });
  }
}

template <class T>
void quantize(const float* x, T* out, Size rows, Size columns, Size stride, Grid given,
              Size threads) {
  by_rows(rows, columns, threads, [=](Size i, Size begin, Size end) {
    const Grid grid = given;
    const float* from = x + i * stride;
    T* to = out + i * columns;
    by_vectors(begin, end, [&](Size c, Size n) { grid.put(to + c, load(from + c, n), c, n); });
  });
}

}  // namespace

extern "C" {

// codes (bytes) or integers (out) of rows of x, `stride` elements apart; one of the two is null
void glue_quantize(const float* x, Byte* codes, float* out, Size rows, Size columns, Size stride,
                   const float* balance, float inverse, float low, float high, int zero_point,
                   Size threads) {
  const Grid grid{balance, inverse, low, high, zero_point};
  if (codes) quantize(x, codes, rows, columns, stride, grid, threads);
  else quantize(x, out, rows, columns, stride, grid, threads);
}

// codes (bytes) or integers (out) of the softmax over rows of x * factor; one of the two is null
void glue_softmax(const float* x, Byte* codes, float* out, Size rows, Size columns, float factor,
                  float inverse, float low, float high, int zero_point, Size threads) {
  const Grid grid{nullptr, inverse, low, high, zero_point};
  if (codes) softmax(x, codes, rows, columns, factor, grid, threads);
  else softmax(x, out, rows, columns, factor, grid, threads);
}

// acc = (acc + shift_sum[row] * shifts[column]) * scale[column] + bias[column], in place
void glue_rescale(float* acc, const float* shift_sum, const float* shifts, const float* scale,
                  const float* bias, Size rows, Size columns, Size threads) {
  by_rows(rows, columns, threads, [=](Size i, Size begin, Size end) {
    by_vectors(begin, end, [&](Size c, Size n) {
      float* at = acc + i * columns + c;
      Vec v = load(at, n) + splat(shift_sum[i]) * load(shifts + c, n);
      v = v * load(scale + c, n);
      store(at, bias ? v + load(bias + c, n) : v, n);
    });
  });
}

// norm_act of glue.py, of x (samples, rows, channels): into codes or out, one of which is null;
// without gamma x is what the norm gave
void glue_norm_act(const float* x, Byte* codes, float* out, Size samples, Size rows, Size channels,
                   Size groups, const float* gamma, const float* beta, double eps, const float* add,
                   Size add_stride, const float* scale, const float* shift, Size film_stride,
                   int silu, const float* balance, float inverse, float low, float high,
                   int zero_point, const Byte* fused_bias, const int* rounding, Size threads) {
  Norm p{};
  p.x = x, p.codes = codes, p.out = out, p.gamma = gamma, p.beta = beta, p.eps = eps;
  p.samples = samples, p.rows = rows, p.channels = channels, p.groups = groups;
  p.add = add, p.add_stride = add_stride, p.threads = threads, p.silu = silu;
  p.scale = scale, p.shift = shift, p.film_stride = film_stride, p.fused_bias = fused_bias;
  p.grid = {balance, inverse, low, high, zero_point};
  std::memcpy(&p.rounding, rounding, sizeof p.rounding);
  norm_act(p);
}

// which offsets of group norms, as given at x = 0 (samples, groups, depth), are rounded once: into
// `fused` (depth,), the same in every group; returns whether it is so
int glue_fused_bias(const float* offset, const float* mean, const float* rstd, const float* gamma,
                    const float* beta, Size samples, Size groups, Size depth, Byte* fused) {
  for (Size d = 0; d < depth; ++d) {
    bool once = true, twice = true;
    for (Size i = 0; i < samples * groups; ++i) {
      const Size c = i % groups * depth + d;
      const float factor = rstd[i] * gamma[c];
      once &= offset[i * depth + d] == std::fma(-factor, mean[i], beta[c]);
      twice &= offset[i * depth + d] == beta[c] - factor * mean[i];
    }
    if (once == twice) return 0;
    fused[d] = once;
  }
  return 1;
}
}

// The group norm of PyTorch over a channels_last map and what follows it, in two passes over memory.
//
// What has to be as in aten/src/ATen/native/cpu/group_norm_kernel.cpp: the order of sums, also over
// threads, and where a product and a sum are rounded once (fma) or twice. The latter PyTorch left to
// its compiler; `Rounding` and `fused_bias` tell.
#pragma once

#include "glue_vectors.h"

namespace {

struct Rounding {  // what PyTorch's compiler made of its group norm
  int fused_squares_small, fused_squares_large;  // x * x + sum, of maps below and from 1024 pixels
  int variance;  // sum * s - mean * mean: 0 rounded apart, 1 sum * s not, 2 mean * mean not
  int fused_apply;  // x * scale + bias
  int silu_block;   // elements that its SiLU takes at once; what is left over has the exp of libm
};

struct Norm {
  const float *x, *gamma, *beta, *add, *scale, *shift;  // without gamma there is no norm
  Size samples, rows, channels, groups, add_stride, film_stride, threads;
  double eps;
  const Byte* fused_bias;  // (channels of a group): beta - scale * mean rounded once
  Rounding rounding;
  bool silu;
  Grid grid;
  Byte* codes;  // one of the two
  float* out;
  float *factor, *offset;  // (samples, channels): the norm is x * factor + offset

  Size depth() const { return channels / groups; }
  const float* at(Size n, Size m) const { return x + (n * rows + m) * channels; }
  const float* added(Size n) const { return add ? add + n * add_stride : nullptr; }
  Norm sample(Size n) const {  // that sample alone
    Norm one = *this;
    one.samples = one.threads = 1, one.x = at(n, 0), one.add = added(n);
    one.factor += n * channels, one.offset += n * channels;
    if (scale) one.scale += n * film_stride, one.shift += n * film_stride;
    if (codes) one.codes += n * rows * channels;
    if (out) one.out += n * rows * channels;
    return one;
  }
};

constexpr Size LARGE = 1024;  // pixels from which on PyTorch sums by channel and thread
constexpr Size LANES = 8;     // of the vectors of its group norm, also where there is AVX512

// sums of x and x * x of B vectors of n channels over some rows, each in the order of rows
template <int B, bool FUSED>
void block_sums(const float* x, Size rows, Size stride, const float* add, Size n, float* sum,
                float* square) {
  Vec s[B], q[B], a[B];
  for (int b = 0; b < B; ++b) {
    s[b] = load(sum + b * W, n), q[b] = load(square + b * W, n);
    a[b] = add ? load(add + b * W, n) : splat(0);
  }
  for (Size m = 0; m < rows; ++m, x += stride) {
    for (int b = 0; b < B; ++b) {
      Vec v = load(x + b * W, n);
      if (add) v = v + a[b];
      s[b] = v + s[b];
      q[b] = FUSED ? fma(v, v, q[b]) : v * v + q[b];
    }
  }
  for (int b = 0; b < B; ++b) store(sum + b * W, s[b], n), store(square + b * W, q[b], n);
}

// the same of the channels [c, end) of a sample
template <bool FUSED>
void channel_sums(const Norm& p, Size n, Size m, Size rows, Size c, Size end, float* sum,
                  float* square) {
  const float *x = p.at(n, m), *add = p.added(n);
  auto pass = [&](auto* function, Size vectors, Size count) {
    function(x + c, rows, p.channels, add ? add + c : add, count, sum + c, square + c);
    c += (vectors - 1) * W + count;
  };
  while (c < end) {
    const Size left = end - c;
    if (left >= 8 * W) pass(block_sums<8, FUSED>, 8, W);
    else if (left >= 4 * W) pass(block_sums<4, FUSED>, 4, W);
    else if (left >= 2 * W) pass(block_sums<2, FUSED>, 2, W);
    else pass(block_sums<1, FUSED>, 1, std::min(left, W));
  }
}

void channel_sums(const Norm& p, Size n, Size m, Size rows, Size c, Size end, bool fused,
                  float* sum, float* square) {
  auto* function = fused ? channel_sums<true> : channel_sums<false>;
  function(p, n, m, rows, c, end, sum, square);
}

float tree_sum(const float* lanes) {
  float v[LANES];
  std::copy(lanes, lanes + LANES, v);
  for (Size half = LANES / 2; half; half /= 2) {
    for (Size i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  }
  return v[0];
}

// sums of the B groups from channel c on, of more than LANES channels each: lane i has the channels
// i, i + LANES, ..., pixel by pixel
template <int B>
void lane_sums(const Norm& p, Size n, Size c, bool fused, float (*sum)[LANES],
               float (*square)[LANES]) {
  const Size depth = p.depth();
  const float* add = p.added(n);
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 s[B], q[B];
  for (int b = 0; b < B; ++b) s[b] = q[b] = _mm256_setzero_ps();
  for (Size m = 0; m < p.rows; ++m) {
    const float* x = p.at(n, m) + c;
    for (Size d = 0; d < depth; d += LANES) {
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(depth - d), index);
      for (int b = 0; b < B; ++b) {
        __m256 v = _mm256_maskload_ps(x + b * depth + d, mask);
        if (add) v = v + _mm256_maskload_ps(add + c + b * depth + d, mask);
        s[b] = s[b] + v;
        q[b] = fused ? _mm256_fmadd_ps(v, v, q[b]) : q[b] + v * v;
      }
    }
  }
  for (int b = 0; b < B; ++b) _mm256_storeu_ps(sum[b], s[b]), _mm256_storeu_ps(square[b], q[b]);
}

// from the sums of a group to the factors of its channels
void finish_group(const Norm& p, Size n, Size g, float sum, float square) {
  const Size depth = p.depth();
  const float s = 1.0f / static_cast<float>(depth * p.rows);
  const float mean = sum * s;
  float variance = p.rounding.variance == 0   ? square * s - mean * mean
                   : p.rounding.variance == 1 ? std::fma(square, s, -(mean * mean))
                                              : std::fma(-mean, mean, square * s);
  variance = std::max(variance, 0.0f);
  const float rstd = static_cast<float>(1.0 / std::sqrt(variance + p.eps));
  for (Size d = 0; d < depth; ++d) {
    const Size c = g * depth + d;
    const float factor = rstd * p.gamma[c];
    p.factor[n * p.channels + c] = factor;
    p.offset[n * p.channels + c] =
        p.fused_bias[d] ? std::fma(-factor, mean, p.beta[c]) : p.beta[c] - factor * mean;
  }
}

// the factors of the groups [g, end) of a sample of few pixels
void small_factors(const Norm& p, Size n, Size g, Size end) {
  const Size depth = p.depth();
  const bool fused = p.rounding.fused_squares_small;
  if (depth <= LANES) {
    std::vector<float> sums(2 * p.channels + LANES);
    float *sum = sums.data(), *square = sum + p.channels;
    channel_sums(p, n, 0, p.rows, g * depth, end * depth, fused, sum, square);
    for (; g < end; ++g) {
      float s[LANES] = {}, q[LANES] = {};
      std::copy_n(sum + g * depth, depth, s), std::copy_n(square + g * depth, depth, q);
      finish_group(p, n, g, tree_sum(s), tree_sum(q));
    }
    return;
  }
  constexpr int B = 4;
  float s[B][LANES], q[B][LANES];
  while (g < end) {
    const int count = end - g >= B ? B : 1;
    count == B ? lane_sums<B>(p, n, g * depth, fused, s, q) : lane_sums<1>(p, n, g * depth, fused, s, q);
    for (int b = 0; b < count; ++b, ++g) finish_group(p, n, g, tree_sum(s[b]), tree_sum(q[b]));
  }
}


// the factors of all samples of many pixels: by channel in the order of PyTorch's threads, each of
// which has its share of all rows; then over channels and threads
void large_factors(const Norm& p) {
  const Size all = p.samples * p.rows, share_size = chunk(all, std::min(p.threads, all));
  const Size table = 2 * p.channels;
  std::vector<float> sums(p.threads * p.samples * table);
  run(p.threads, true, [&](Size t) {
    for (Size i = t * share_size, end = std::min(all, i + share_size); i < end;) {
      const Size n = i / p.rows, m = i % p.rows, rows = std::min(p.rows - m, end - i);
      float* sum = &sums[(t * p.samples + n) * table];
      const bool fused = p.rounding.fused_squares_large;
      channel_sums(p, n, m, rows, 0, p.channels, fused, sum, sum + p.channels);
      i += rows;
    }
  });
  for (Size n = 0; n < p.samples; ++n) {
    for (Size g = 0; g < p.groups; ++g) {
      float sum = 0, square = 0;
      for (Size c = g * p.depth(); c < (g + 1) * p.depth(); ++c) {
        for (Size t = 0; t < p.threads; ++t) {
          const float* of_thread = &sums[(t * p.samples + n) * table];
          sum += of_thread[c], square += of_thread[p.channels + c];
        }
      }
      finish_group(p, n, g, sum, square);
    }
  }
}

// norm, scale and shift, SiLU of n channels from c on
template <bool SILU>
inline Vec value(const Norm& p, const float* x, Size sample, Size c, Size n) {
  Vec v = load(x + c, n);
  if (p.add) v = v + load(p.added(sample) + c, n);
  if (p.gamma) {
    const Size at = sample * p.channels + c;
    const Vec a = load(p.factor + at, n), b = load(p.offset + at, n);
    v = p.rounding.fused_apply ? fma(v, a, b) : v * a + b;
  }
  if (p.scale) {
    v = v * (splat(1) + load(p.scale + sample * p.film_stride + c, n));
    v = v + load(p.shift + sample * p.film_stride + c, n);
  }
  return SILU ? v / (splat(1) + exp(-v)) : v;
}

// the second pass over rows [begin, end) of all samples
template <bool SILU>
void apply(const Norm& given, Size begin, Size end) {
  const Norm p = given;  // own, so that it stays in registers while bytes are written
  for (Size i = begin; i < end; ++i) {
    const Size sample = i / p.rows, at = i * p.channels;
    by_vectors(0, p.channels, [&](Size c, Size n) {
      const Vec v = value<SILU>(p, p.x + at, sample, c, n);
      if (p.codes) p.grid.put(p.codes + at + c, v, c, n);
      else store(p.out + at + c, v, n);
    });
  }
}

void apply(const Norm& p, Size begin, Size end) {
  p.silu ? apply<true>(p, begin, end) : apply<false>(p, begin, end);
}

// what PyTorch's SiLU does with the ends of its threads' shares, which fill no vector: exp of libm
void silu_ends(const Norm& p) {
  const Size all = p.samples * p.rows * p.channels, block = p.rounding.silu_block;
  const Size size = all < GRAIN ? all : chunk(all, std::min(p.threads, chunk(all, GRAIN)));
  for (Size begin = 0; begin < all; begin += size) {
    const Size end = std::min(all, begin + size);
    for (Size i = begin + (end - begin) / block * block; i < end; ++i) {
      const Size c = i % p.channels;
      float v;
      store(&v, value<false>(p, p.x + i - c, i / p.channels / p.rows, c, 1), 1);
      v = v / (1.0f + std::exp(-v));
      if (p.codes) p.grid.put(p.codes + i, splat(v), c, 1);
      else p.out[i] = v;
    }
  }
}

void norm_act(Norm p) {
  std::vector<float> factors(2 * p.samples * p.channels);
  p.factor = factors.data(), p.offset = p.factor + p.samples * p.channels;
  const Size rows = p.samples * p.rows;
  const bool pays = rows * p.channels >= GRAIN, large = p.rows >= LARGE;
  if (p.threads == 1 || p.samples % p.threads == 0) {  // a sample at a time, while it is in the cache
    share(p.samples, p.threads, pays, [&](Size begin, Size end) {
      for (Size n = begin; n < end; ++n) {
        const Norm one = p.sample(n);
        if (p.gamma) large ? large_factors(one) : small_factors(one, 0, 0, p.groups);
        apply(one, 0, p.rows);
      }
    });
  } else {
    if (p.gamma && large) {
      large_factors(p);
    } else if (p.gamma) {
      share(p.samples * p.groups, p.threads, pays, [&](Size begin, Size end) {
        for (Size n = begin / p.groups; n * p.groups < end; ++n) {
          const Size first = n * p.groups;
          small_factors(p, n, std::max<Size>(begin - first, 0), std::min(end - first, p.groups));
        }
      });
    }
    share(rows, p.threads, pays, [&](Size begin, Size end) { apply(p, begin, end); });
  }
  if (p.silu) silu_ends(p);
}

}  // namespace

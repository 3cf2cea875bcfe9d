// The glue between integer products in one or two passes over a channels_last map, with the bits that
// PyTorch's own operators give in many: group norm (aten/src/ATen/native/cpu/group_norm_kernel.cpp),
// SiLU, quantization. quant/integer/glue.py defines it; glue_cpu.py builds this file and compares.
//
// What has to be the same: the order of sums, also over threads; where a product and a sum are
// rounded once (fma) and where twice, which PyTorch left to its compiler and `Rounding` tells; exp,
// for which libtorch_cpu has Sleef. To be compiled with -ffp-contract=off.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {
// of the OpenMP runtime that PyTorch has loaded: its threads are used, no others are started
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
int omp_get_num_threads();
int omp_get_thread_num();
#ifdef __AVX512F__
__m512 Sleef_expf16_u10(__m512);
#else
__m256 Sleef_expf8_u10(__m256);
#endif
}

namespace {

using Size = std::int64_t;
using Byte = std::uint8_t;

#ifdef __AVX512F__
constexpr Size W = 16;
using Vec = __m512;
inline Vec splat(float v) { return _mm512_set1_ps(v); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, Size n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, Vec v, Size n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec clamp(Vec v, Vec low, Vec high) { return _mm512_min_ps(high, _mm512_max_ps(low, v)); }
inline Vec round_even(Vec v) { return _mm512_roundscale_ps(v, 8); }
inline Vec exp(Vec v) { return Sleef_expf16_u10(v); }
inline __m128i bytes(Vec v, int zero) {  // of whole numbers or what rounds to them
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(zero)));
}
inline void store(Byte* p, __m128i v) { _mm_storeu_si128((__m128i*)p, v); }
#else
constexpr Size W = 8;
using Vec = __m256;
inline __m256i first(Size n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec splat(float v) { return _mm256_set1_ps(v); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, Size n) { return _mm256_maskload_ps(p, first(n)); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(float* p, Vec v, Size n) { _mm256_maskstore_ps(p, first(n), v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec clamp(Vec v, Vec low, Vec high) { return _mm256_min_ps(high, _mm256_max_ps(low, v)); }
inline Vec round_even(Vec v) { return _mm256_round_ps(v, 8); }
inline Vec exp(Vec v) { return Sleef_expf8_u10(v); }
inline __m128i bytes(Vec v, int zero) {
  __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(zero));
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  return _mm_packus_epi16(words, words);
}
inline void store(Byte* p, __m128i v) { _mm_storel_epi64((__m128i*)p, v); }
#endif

inline void store(Byte* p, __m128i v, Size n) {
  Byte all[16];
  _mm_storeu_si128((__m128i*)all, v);
  std::memcpy(p, all, n);
}

inline Size chunk(Size range, Size parts) { return (range + parts - 1) / parts; }

// f(0) ... f(count - 1), on PyTorch's threads where there is more than one and it pays
template <class F>
void run(Size count, bool pays, const F& f) {
  struct Task {
    const F& f;
    Size count;
  } task{f, count};
  auto share = [](void* p) {
    auto* task = static_cast<Task*>(p);
    for (Size t = omp_get_thread_num(); t < task->count; t += omp_get_num_threads()) task->f(t);
  };
  if (count > 1 && pays) {
    GOMP_parallel(share, &task, 0, 0);
  } else {
    for (Size t = 0; t < count; ++t) f(t);
  }
}

// f(begin, end) over equal shares of a range
template <class F>
void share(Size range, Size threads, bool pays, const F& f) {
  threads = pays ? std::max<Size>(std::min(threads, range), 1) : 1;
  const Size size = chunk(range, threads);
  run(threads, pays, [&](Size t) {
    if (t * size < range) f(t * size, std::min(range, (t + 1) * size));
  });
}

constexpr Size GRAIN = 32768;  // elements that are worth a thread; PyTorch's own too

struct Grid {  // a Row of glue.py
  const float* balance;
  float inverse, low, high;
  int zero_point;

  Vec scaled(Vec v, const float* balance_at, Size n) const {
    if (balance) v = v * (n == W ? load(balance_at) : load(balance_at, n));
    return v * splat(inverse);
  }
  // n codes of the channels from c on, from n values
  void put(Byte* out, Vec v, Size c, Size n) const {
    const __m128i code = bytes(clamp(scaled(v, balance + c, n), splat(low), splat(high)), zero_point);
    n == W ? store(out, code) : store(out, code, n);
  }
  void put_integers(float* out, Vec v, Size c, Size n) const {
    v = clamp(round_even(scaled(v, balance + c, n)), splat(low), splat(high));
    n == W ? store(out, v) : store(out, v, n);
  }
};

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

// sums of x and x * x of B vectors of channels over some rows, each in the order of rows
template <int B>
void block_sums(const float* x, Size rows, Size stride, const float* add, bool fused, Size n,
                float* sum, float* square) {
  auto get = [n](const float* p) { return B > 1 || n == W ? load(p) : load(p, n); };
  Vec s[B], q[B], a[B];
  for (int b = 0; b < B; ++b) {
    s[b] = get(sum + b * W), q[b] = get(square + b * W), a[b] = add ? get(add + b * W) : splat(0);
  }
  for (Size m = 0; m < rows; ++m, x += stride) {
    for (int b = 0; b < B; ++b) {
      Vec v = get(x + b * W);
      if (add) v = v + a[b];
      s[b] = v + s[b];
      q[b] = fused ? fma(v, v, q[b]) : v * v + q[b];
    }
  }
  for (int b = 0; b < B; ++b) {
    if (B > 1 || n == W) {
      store(sum + b * W, s[b]), store(square + b * W, q[b]);
    } else {
      store(sum, s[b], n), store(square, q[b], n);
    }
  }
}

// the same of the channels [c, end)
void channel_sums(const Norm& p, Size n, Size m, Size rows, Size c, Size end, bool fused, float* sum,
                  float* square) {
  const float* x = p.at(n, m);
  while (c < end) {
    const float* add = p.add ? p.added(n) + c : nullptr;
    const Size left = end - c, count = std::min(left, W);
    auto* function = left >= 8 * W   ? block_sums<8>
                     : left >= 4 * W ? block_sums<4>
                     : left >= 2 * W ? block_sums<2>
                                     : block_sums<1>;
    function(x + c, rows, p.channels, add, fused, count, sum + c, square + c);
    c += left >= 8 * W ? 8 * W : left >= 4 * W ? 4 * W : left >= 2 * W ? 2 * W : count;
  }
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
  auto get = [n](const float* at) { return n == W ? load(at) : load(at, n); };
  Vec v = get(x + c);
  if (p.add) v = v + get(p.added(sample) + c);
  if (p.gamma) {
    const Size at = sample * p.channels + c;
    const Vec a = get(p.factor + at), b = get(p.offset + at);
    v = p.rounding.fused_apply ? fma(v, a, b) : v * a + b;
  }
  if (p.scale) {
    v = v * (splat(1) + get(p.scale + sample * p.film_stride + c));
    v = v + get(p.shift + sample * p.film_stride + c);
  }
  return SILU ? v / (splat(1) + exp(-v)) : v;
}

template <bool SILU>
void apply(const Norm& p, Size begin, Size end) {
  for (Size i = begin; i < end; ++i) {
    const Size sample = i / p.rows;
    for (Size c = 0; c < p.channels; c += W) {
      const Size n = std::min(W, p.channels - c);
      const Vec v = value<SILU>(p, p.x + i * p.channels, sample, c, n);
      if (p.codes) {
        p.grid.put(p.codes + i * p.channels + c, v, c, n);
      } else {
        float* out = p.out + i * p.channels + c;
        n == W ? store(out, v) : store(out, v, n);
      }
    }
  }
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

// both passes over some rows of all samples
void apply_any(const Norm& p, Size begin, Size end) {
  p.silu ? apply<true>(p, begin, end) : apply<false>(p, begin, end);
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
        apply_any(one, 0, p.rows);
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
    share(rows, p.threads, pays, [&](Size begin, Size end) { apply_any(p, begin, end); });
  }
  if (p.silu) silu_ends(p);
}

template <class F>
void by_rows(Size rows, Size columns, Size threads, const F& f) {
  if (rows == 1) {  // no rows to share: pieces of the one, in whole vectors
    const Size pieces = chunk(columns, GRAIN);
    share(pieces, threads, pieces > 1, [&](Size begin, Size end) {
      const Size last = std::min(columns, end * GRAIN);
      for (Size c = begin * GRAIN; c < last; c += W) f(0, c, std::min(W, last - c));
    });
    return;
  }
  share(rows, threads, rows * columns >= GRAIN, [&](Size begin, Size end) {
    for (Size i = begin; i < end; ++i) {
      for (Size c = 0; c < columns; c += W) f(i, c, std::min(W, columns - c));
    }
  });
}

}  // namespace

extern "C" {

// codes (bytes) or integers (out) of rows of x, `stride` elements apart; one of the two is null
void glue_quantize(const float* x, Byte* codes, float* out, Size rows, Size columns, Size stride,
                   const float* balance, float inverse, float low, float high, int zero_point,
                   Size threads) {
  const Grid grid{balance, inverse, low, high, zero_point};
  by_rows(rows, columns, threads, [&](Size i, Size c, Size n) {
    const float* at = x + i * stride + c;
    const Vec v = n == W ? load(at) : load(at, n);
    codes ? grid.put(codes + i * columns + c, v, c, n)
          : grid.put_integers(out + i * columns + c, v, c, n);
  });
}

// acc = (acc + shift_sum[row] * shifts[column]) * scale[column] + bias[column], in place
void glue_rescale(float* acc, const float* shift_sum, const float* shifts, const float* scale,
                  const float* bias, Size rows, Size columns, Size threads) {
  by_rows(rows, columns, threads, [&](Size i, Size c, Size n) {
    auto get = [n](const float* at) { return n == W ? load(at) : load(at, n); };
    float* at = acc + i * columns + c;
    Vec v = (get(at) + splat(shift_sum[i]) * get(shifts + c)) * get(scale + c);
    if (bias) v = v + get(bias + c);
    n == W ? store(at, v) : store(at, v, n);
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

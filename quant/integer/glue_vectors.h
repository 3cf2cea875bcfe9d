// What glue.cpp is made of: vectors of the widest registers that PyTorch uses here, its threads, and
// codes. Included by glue_norm.h and glue_softmax.h.
#pragma once

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
inline Vec load(const float* p, Size n) {
  return n == W ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps((1u << n) - 1, p);
}
inline void store(float* p, Vec v, Size n) {
  n == W ? _mm512_storeu_ps(p, v) : _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec clamp(Vec v, Vec low, Vec high) { return _mm512_min_ps(high, _mm512_max_ps(low, v)); }
inline Vec round_even(Vec v) { return _mm512_roundscale_ps(v, 8); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec exp(Vec v) { return Sleef_expf16_u10(v); }
// f of all lanes: of lower and upper half, again and again
template <class F>
inline float fold(Vec v, const F& f) {
  v = f(v, _mm512_shuffle_f32x4(v, v, 0x4e)), v = f(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  v = f(v, _mm512_permute_ps(v, 0x4e)), v = f(v, _mm512_permute_ps(v, 0xb1));
  return _mm512_cvtss_f32(v);
}
inline __m128i bytes(Vec v, int zero) {  // of whole numbers or what rounds to them
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(zero)));
}
inline void store_all(Byte* p, __m128i v) { _mm_storeu_si128((__m128i*)p, v); }
#else
constexpr Size W = 8;
using Vec = __m256;
inline __m256i first(Size n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec splat(float v) { return _mm256_set1_ps(v); }
inline Vec load(const float* p, Size n) {
  return n == W ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n));
}
inline void store(float* p, Vec v, Size n) {
  n == W ? _mm256_storeu_ps(p, v) : _mm256_maskstore_ps(p, first(n), v);
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec clamp(Vec v, Vec low, Vec high) { return _mm256_min_ps(high, _mm256_max_ps(low, v)); }
inline Vec round_even(Vec v) { return _mm256_round_ps(v, 8); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec exp(Vec v) { return Sleef_expf8_u10(v); }
template <class F>
inline float fold(Vec v, const F& f) {
  v = f(v, _mm256_permute2f128_ps(v, v, 1));
  v = f(v, _mm256_permute_ps(v, 0x4e)), v = f(v, _mm256_permute_ps(v, 0xb1));
  return _mm256_cvtss_f32(v);
}
inline __m128i bytes(Vec v, int zero) {
  __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(zero));
  __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  return _mm_packus_epi16(words, words);
}
inline void store_all(Byte* p, __m128i v) { _mm_storel_epi64((__m128i*)p, v); }
#endif

inline void store(Byte* p, __m128i v, Size n) {
  if (n == W) return store_all(p, v);
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

// f(c, n) for vectors of n channels from c on: W, but for what is left at the end
template <class F>
inline void by_vectors(Size begin, Size end, const F& f) {
  for (; begin + W <= end; begin += W) f(begin, W);
  if (begin < end) f(begin, end - begin);
}

struct Grid {  // a Row of glue.py
  const float* balance;
  float inverse, low, high;
  int zero_point;

  Vec scaled(Vec v, Size c, Size n) const {
    if (balance) v = v * load(balance + c, n);
    return v * splat(inverse);
  }
  // n codes of the channels from c on, from n values
  void put(Byte* out, Vec v, Size c, Size n) const {
    store(out, bytes(clamp(scaled(v, c, n), splat(low), splat(high)), zero_point), n);
  }
  void put(float* out, Vec v, Size c, Size n) const {
    store(out, clamp(round_even(scaled(v, c, n)), splat(low), splat(high)), n);
  }
};

}  // namespace

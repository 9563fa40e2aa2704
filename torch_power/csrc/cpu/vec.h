// Vectors of the instruction set this file is compiled for, and the conversions at the edges.
//
// Included once by each variant_*.cpp, which defines POWER_ISA (a namespace) and POWER_VECTOR_BYTES. Everything lives in that
// namespace, and nothing here calls an inline function of the standard library: the linker keeps one copy of those, and it
// could be the copy with instructions this machine lacks.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../abi.h"

#if !defined(POWER_ISA) || !defined(POWER_VECTOR_BYTES)
#error "include this from a variant_*.cpp"
#endif

#define POWER_INLINE inline __attribute__((always_inline))

namespace power_cpu {
namespace POWER_ISA {

template <class T> struct VecOf {
  typedef T type __attribute__((vector_size(POWER_VECTOR_BYTES)));
};
template <class T> using Vec = typename VecOf<T>::type;
template <class T> constexpr int64_t kLanes = POWER_VECTOR_BYTES / int64_t(sizeof(T));

template <class T> struct IntOf;
template <> struct IntOf<float> {
  typedef int32_t type;
};
template <> struct IntOf<double> {
  typedef int64_t type;
};
template <class T> using Mask = Vec<typename IntOf<T>::type>;  // all ones or all zeros a lane, as comparisons give

template <class T> POWER_INLINE Vec<T> load(const T *p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T> POWER_INLINE void store(T *p, Vec<T> v) { memcpy(p, &v, sizeof v); }
template <class T> POWER_INLINE Vec<T> broadcast(T x) { return x - Vec<T>{}; }
template <class T> POWER_INLINE Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) { return m ? a : b; }
template <class T> POWER_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

template <class T> POWER_INLINE Vec<T> lane_index() {
  Vec<T> v;
  for (int64_t i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}
template <class T> POWER_INLINE T horizontal_sum(Vec<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

POWER_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
POWER_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
POWER_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// exp(x): x = n·ln 2 + r, |r| ≤ ln 2 / 2, a polynomial for exp(r), 2^n added to the exponent in two halves so that results
// may be subnormal. Relative error below 1.2e-7 (float32) and 4e-16 (float64); exp(−inf) = 0 and overflow gives inf.
POWER_INLINE Vec<float> exp(Vec<float> x) {
  x = select<float>(x < -110.0f, broadcast(-110.0f), x);
  x = select<float>(x > 100.0f, broadcast(100.0f), x);
  const float shift = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  Vec<float> n = (x * 1.44269504088896341f + shift) - shift;
  Vec<float> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  typedef Vec<int32_t> I;
  I e = __builtin_convertvector(n, I);
  I half = e >> 1;
  I first = (half + 127) << 23, second = (e - half + 127) << 23;
  Vec<float> a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  return p * a * b;
}
POWER_INLINE Vec<double> exp(Vec<double> x) {
  x = select<double>(x < -760.0, broadcast(-760.0), x);
  x = select<double>(x > 720.0, broadcast(720.0), x);
  const double shift = 6755399441055744.0;  // 1.5·2^52
  Vec<double> n = (x * 1.4426950408889634074 + shift) - shift;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;  // Taylor: |r|^14 / 14! < 4e-18
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  Vec<double> biased = n + shift;  // the integer sits in the low bits
  typedef Vec<int64_t> I;
  I e;
  memcpy(&e, &biased, sizeof e);
  e = e - 0x4338000000000000LL;
  I half = e >> 1;
  I first = (half + 1023) << 52, second = (e - half + 1023) << 52;
  Vec<double> a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  return p * a * b;
}
// The same for x ≤ 0 (as in softmax), a third cheaper: results below the least normal number are 0.
POWER_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const float shift = 12582912.0f;
  Vec<float> shifted = x * 1.44269504088896341f + shift;
  Vec<float> n = shifted - shift;
  Vec<float> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec<uint32_t> e;                 // unsigned: far below −87, where the result is not used, the bits wrap around
  memcpy(&e, &shifted, sizeof e);  // the integer sits in the low bits
  e = (e << 23) + 0x3f800000u;
  Vec<float> scale;
  memcpy(&scale, &e, sizeof scale);
  return select<float>(x < -87.3f, Vec<float>{}, p * scale);  // this way round, a NaN stays one
}
POWER_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp(x); }
template <class T> POWER_INLINE T exp_scalar(T x) { return exp(broadcast(x))[0]; }

// ---- 16-bit numbers ---------------------------------------------------------------------------------------------------

POWER_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
POWER_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

POWER_INLINE float widen(float x) { return x; }
POWER_INLINE double widen(double x) { return x; }
POWER_INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
POWER_INLINE float widen(Float16 x) {
  // Shifting puts the fraction in place; 2^112 mends the exponent's bias, for subnormal numbers too.
  uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
  uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 5.192296858534828e33f);
  uint32_t special = 0x7f800000u | (magnitude << 13);
  return bits_to_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

// Rounding to nearest, ties to even.
POWER_INLINE void narrow(float x, float *to) { *to = x; }
POWER_INLINE void narrow(double x, double *to) { *to = x; }
POWER_INLINE void narrow(float x, BFloat16 *to) {
  uint32_t u = float_to_bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  to->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | (u >> 16) : rounded);
}
POWER_INLINE void narrow(float x, Float16 *to) {
  uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 makes the float adder do the rounding to multiples of 2^-24.
  uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  to->bits = uint16_t(sign | result);
}

// ---- Arrays of the interface ------------------------------------------------------------------------------------------

template <class T> POWER_INLINE T *pointer(const PowerArray &a, int64_t i = 0, int64_t j = 0, int64_t k = 0) {
  return a.data ? static_cast<T *>(a.data) + i * a.stride[0] + j * a.stride[1] + k * a.stride[2] : nullptr;
}

// Rows of numbers of any dtype: x[i, c] is `row·i + column·c` elements from `data`.
struct Rows {
  void *data;
  int64_t row, column;
  int32_t dtype;
};
// From element (i, j, k) of an array on; its axis `row_axis` becomes the rows, its last axis the columns.
POWER_INLINE Rows rows_from(const PowerArray &a, int64_t i, int64_t j, int64_t k, int row_axis) {
  int64_t size = a.dtype == POWER_FLOAT64 ? 8 : a.dtype == POWER_FLOAT32 ? 4 : 2;
  return {static_cast<char *>(a.data) + size * (i * a.stride[0] + j * a.stride[1] + k * a.stride[2]), a.stride[row_axis], a.stride[3],
          a.dtype};
}

// f(pointer to the rows' own type); T = double goes with float64 alone, T = float with the others.
template <class T, class F> POWER_INLINE void with_dtype(const Rows &x, F f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double *>(x.data));
  } else {
    if (x.dtype == POWER_BFLOAT16)
      f(static_cast<BFloat16 *>(x.data));
    else if (x.dtype == POWER_FLOAT16)
      f(static_cast<Float16 *>(x.data));
    else
      f(static_cast<float *>(x.data));
  }
}

// rows[i·ld + c] = scale_i · x[i, c] for i < n, c < columns; the rest of each row up to ld, and rows n … n_padded−1, are 0.
// `scale` may be null.
template <class T>
inline void pack_rows(const Rows &x, int64_t n, int64_t columns, const T *scale, T *rows, int64_t ld, int64_t n_padded) {
  with_dtype<T>(x, [&](auto *data) {
    for (int64_t i = 0; i < n; ++i) {
      T *out = rows + i * ld;
      auto *in = data + i * x.row;
      T a = scale ? scale[i] : T(1);
      if (x.column == 1)
        for (int64_t c = 0; c < columns; ++c) out[c] = a * widen(in[c]);
      else
        for (int64_t c = 0; c < columns; ++c) out[c] = a * widen(in[c * x.column]);
      for (int64_t c = columns; c < ld; ++c) out[c] = 0;
    }
  });
  memset(rows + n * ld, 0, size_t((n_padded - n) * ld) * sizeof(T));
}

// x[i, c] = scale_i · rows[i·ld + c], rounded once.
template <class T>
inline void unpack_rows(const T *rows, int64_t ld, int64_t n, int64_t columns, const T *scale, const Rows &x) {
  with_dtype<T>(x, [&](auto *data) {
    for (int64_t i = 0; i < n; ++i) {
      T a = scale ? scale[i] : T(1);
      for (int64_t c = 0; c < columns; ++c) narrow(a * rows[i * ld + c], data + i * x.row + c * x.column);
    }
  });
}

// Interleaves two vectors: a0 b0 a1 b1 … of their lower or upper halves.
template <class T, bool Upper> POWER_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  Mask<T> from;
  for (int64_t i = 0; i < kLanes<T>; ++i) from[i] = (Upper ? kLanes<T> / 2 : 0) + i / 2 + (i % 2) * kLanes<T>;
  return __builtin_shuffle(a, b, from);
}

// out[c·ld + i] = rows[i·row_ld + c] for i < n, c < columns: tokens become the contiguous axis, or coordinates again. Squares of
// kLanes × kLanes are transposed in registers: log2(kLanes) rounds in which vectors i and i + kLanes/2 interleave to 2i and 2i + 1.
// Both leading dimensions are multiples of kLanes; a row of `out` is written up to the next multiple, with zeros from n on.
template <class T> inline void transpose(const T *rows, int64_t row_ld, int64_t n, int64_t columns, T *out, int64_t ld) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < n; i += L)
    for (int64_t c = 0; c < columns; c += L) {
      Vec<T> x[L], y[L];
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; ++k) x[k] = i + k < n ? load(rows + (i + k) * row_ld + c) : Vec<T>{};
#pragma GCC unroll 4
      for (int64_t round = 1; round < L; round *= 2) {
#pragma GCC unroll 8
        for (int64_t k = 0; k < L / 2; ++k) {
          y[2 * k] = interleave<T, false>(x[k], x[k + L / 2]);
          y[2 * k + 1] = interleave<T, true>(x[k], x[k + L / 2]);
        }
#pragma GCC unroll 16
        for (int64_t k = 0; k < L; ++k) x[k] = y[k];
      }
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; ++k)
        if (c + k < columns) store(out + (c + k) * ld + i, x[k]);
    }
}

// Σ x_c·y_c
template <class T> POWER_INLINE T dot(const T *x, const T *y, int64_t n) {
  Vec<T> sums = Vec<T>{};
  int64_t c = 0;
  for (; c + kLanes<T> <= n; c += kLanes<T>) sums += load(x + c) * load(y + c);
  T sum = horizontal_sum<T>(sums);
  for (; c < n; ++c) sum += x[c] * y[c];
  return sum;
}

// Scratch handed out of the caller's workspace in order; with base == 0 it only counts, which is how sizes are queried. Under
// AddressSanitizer a gap that must not be touched follows every array (dispatch.cpp gives the workspace back whole).
struct Arena {
  uintptr_t base;
  int64_t used;
  template <class T> T *take(int64_t count) {
    T *p = reinterpret_cast<T *>(base + uintptr_t(used));
    int64_t bytes = count * int64_t(sizeof(T));
#if defined(__SANITIZE_ADDRESS__)
    int64_t whole = round_up(bytes, 64) + 64;
    if (base) __asan_poison_memory_region(reinterpret_cast<char *>(p) + bytes, size_t(whole - bytes));
#else
    int64_t whole = round_up(bytes, 64);
#endif
    used += whole;
    return p;
  }
};

}  // namespace POWER_ISA
}  // namespace power_cpu

"""Vectors in C++: what every kernel is written with, once for each instruction set.

    vec              LANES floats
    words            LANES unsigned integers of 32 bits
    lane_set         some lanes: lanes_of(bits), any, and the operators & | ~
    splat, load, store, load_first, store_first, multiply_add, blend, sum, sums, transpose, pairs
    quad, pick<i>    four floats, and one of them in every lane: takes fewer loads than four broadcasts
    expand           kept values of LANES columns at their places, zeros between them

The element type of a kernel's tensors is ``element``: ``float``, or 16 bits that ``load`` and ``store`` convert.
"""

from __future__ import annotations

from fxsparse.codegen.cpu.instruction_sets import InstructionSet

COMMON = """
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// An address in one register: Intel splits a product with an operand at the sum of two, which then is two instructions.
template <class T>
INLINE T* in_one_register(T* at) {
  asm("" : "+r"(at));
  return at;
}
"""

_AVX512 = """
constexpr int LANES = 16;
using vec = __m512;
using words = uint32_t __attribute__((vector_size(64)));

INLINE vec splat(float value) { return _mm512_set1_ps(value); }
INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vec load_first(const float* p, long count) { return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p); }
INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
INLINE void store_first(float* p, vec v, long count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v); }
INLINE vec multiply_add(vec a, vec b, vec sum) { return _mm512_fmadd_ps(a, b, sum); }

using lane_set = unsigned;
INLINE lane_set lanes_of(unsigned bits) { return bits; }
INLINE bool any(lane_set some) { return some != 0; }
INLINE vec blend(lane_set chosen, vec a, vec b) { return _mm512_mask_blend_ps(__mmask16(chosen), b, a); }
INLINE words blend(lane_set chosen, words a, words b) {
  return words(_mm512_mask_blend_epi32(__mmask16(chosen), __m512i(b), __m512i(a)));
}
INLINE float sum(vec v) { return _mm512_reduce_add_ps(v); }

using quad = vec;
INLINE quad load_quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int i> INLINE vec pick(quad four) { return _mm512_permute_ps(four, i * 0x55); }

INLINE vec interleave_low(vec a, vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
INLINE vec interleave_high(vec a, vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// lane j of vector i becomes lane i of vector j
INLINE void transpose(vec* r) {
  vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = interleave_low(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = interleave_high(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
  }
}

// lane j: the sum of vector j
INLINE vec sums(const vec* r) {
  vec t[8], u[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  for (int i = 0; i < 4; ++i) u[i] = interleave_low(t[2 * i], t[2 * i + 1]) + interleave_high(t[2 * i], t[2 * i + 1]);
  for (int i = 0; i < 2; ++i)
    t[i] = _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd);
  return _mm512_shuffle_f32x4(t[0], t[1], 0x88) + _mm512_shuffle_f32x4(t[0], t[1], 0xdd);
}

// 32 numbers as those at even and those at odd places
INLINE void pairs(vec first, vec second, vec& even, vec& odd) {
  const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(first, places, second);
  odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(places, _mm512_set1_epi32(1)), second);
}
"""

_AVX2 = """
constexpr int LANES = 8;
using vec = __m256;
using words = uint32_t __attribute__((vector_size(32)));

INLINE __m256i lane_mask(unsigned chosen) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(chosen)), bits), bits);
}
INLINE vec splat(float value) { return _mm256_set1_ps(value); }
INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vec load_first(const float* p, long count) { return _mm256_maskload_ps(p, lane_mask((1u << count) - 1)); }
INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
INLINE void store_first(float* p, vec v, long count) { _mm256_maskstore_ps(p, lane_mask((1u << count) - 1), v); }
INLINE vec multiply_add(vec a, vec b, vec sum) { return _mm256_fmadd_ps(a, b, sum); }

using lane_set = words;
INLINE lane_set lanes_of(unsigned bits) { return lane_set(lane_mask(bits)); }
INLINE bool any(lane_set some) { return !_mm256_testz_si256(__m256i(some), __m256i(some)); }
INLINE vec blend(lane_set chosen, vec a, vec b) { return _mm256_blendv_ps(b, a, vec(chosen)); }
INLINE words blend(lane_set chosen, words a, words b) {
  return words(_mm256_blendv_epi8(__m256i(b), __m256i(a), __m256i(chosen)));
}
INLINE float sum(vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

using quad = vec;
INLINE quad load_quad(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int i> INLINE vec pick(quad four) { return _mm256_permute_ps(four, i * 0x55); }

INLINE vec interleave_low(vec a, vec b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
INLINE vec interleave_high(vec a, vec b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}

// lane j of vector i becomes lane i of vector j
INLINE void transpose(vec* r) {
  vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = interleave_low(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = interleave_high(t[i + j], t[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    vec low = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
    r[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
    r[j] = low;
  }
}

// lane j: the sum of vector j
INLINE vec sums(const vec* r) {
  vec t[4], u[2];
  for (int i = 0; i < 4; ++i)
    t[i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  for (int i = 0; i < 2; ++i) u[i] = interleave_low(t[2 * i], t[2 * i + 1]) + interleave_high(t[2 * i], t[2 * i + 1]);
  return _mm256_permute2f128_ps(u[0], u[1], 0x20) + _mm256_permute2f128_ps(u[0], u[1], 0x31);
}

// 16 numbers as those at even and those at odd places
INLINE void pairs(vec first, vec second, vec& even, vec& odd) {
  vec low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
  even = _mm256_shuffle_ps(low, high, 0x88);
  odd = _mm256_shuffle_ps(low, high, 0xdd);
}
"""

_PORTABLE = """
constexpr int LANES = 8;
using vec = float __attribute__((vector_size(32)));
using words = uint32_t __attribute__((vector_size(32)));

INLINE vec splat(float value) { return vec{} + value; }
INLINE vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE vec load_first(const float* p, long count) {
  vec v{};
  memcpy(&v, p, size_t(count) * sizeof *p);
  return v;
}
INLINE void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
INLINE void store_first(float* p, vec v, long count) { memcpy(p, &v, size_t(count) * sizeof *p); }
INLINE vec multiply_add(vec a, vec b, vec sum) { return a * b + sum; }

using lane_set = words;
INLINE lane_set lanes_of(unsigned bits) {
  const words each = {1, 2, 4, 8, 16, 32, 64, 128};
  return words((each & bits) != 0);
}
INLINE bool any(lane_set some) {
  uint32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= some[i];
  return all != 0;
}
INLINE words blend(lane_set chosen, words a, words b) { return (a & chosen) | (b & ~chosen); }
INLINE vec blend(lane_set chosen, vec a, vec b) { return vec(blend(chosen, words(a), words(b))); }
INLINE float sum(vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

using quad = const float*;
INLINE quad load_quad(const float* p) { return p; }
template <int i> INLINE vec pick(quad four) { return splat(four[i]); }

// lane j of vector i becomes lane i of vector j
INLINE void transpose(vec* r) {
  float t[LANES][LANES];
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) t[j][i] = r[i][j];
  for (int i = 0; i < LANES; ++i) r[i] = load(t[i]);
}

// lane j: the sum of vector j
INLINE vec sums(const vec* r) {
  vec total{};
  for (int i = 0; i < LANES; ++i) total[i] = sum(r[i]);
  return total;
}

// 16 numbers as those at even and those at odd places
INLINE void pairs(vec first, vec second, vec& even, vec& odd) {
  for (int i = 0; i < LANES / 2; ++i) {
    even[i] = first[2 * i], odd[i] = first[2 * i + 1];
    even[i + LANES / 2] = second[2 * i], odd[i + LANES / 2] = second[2 * i + 1];
  }
}
"""

_FLOAT = """
using element = float;
"""

_BFLOAT16 = """
// the upper half of a float, rounded to nearest even
struct element {
  uint16_t bits;
};
using halves = uint16_t __attribute__((vector_size(2 * LANES)));

INLINE vec load(const element* p) {
  halves h;
  memcpy(&h, p, sizeof h);
  return vec(__builtin_convertvector(h, words) << 16);
}
INLINE void store(element* p, vec v) {
  words w = words(v);
  words rounded = w + 0x7fff + ((w >> 16) & 1);
  words is_nan = words((w & 0x7fffffff) > 0x7f800000);
  rounded = ((w | 0x400000) & is_nan) | (rounded & ~is_nan);
  halves h = __builtin_convertvector(rounded >> 16, halves);
  memcpy(p, &h, sizeof h);
}
INLINE float number(element e) {
  uint32_t w = uint32_t(e.bits) << 16;
  float value;
  memcpy(&value, &w, sizeof value);
  return value;
}
"""

_FLOAT16_CONVERTED = {
    16: """
INLINE vec load(const element* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE void store(element* p, vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float number(element e) { return _cvtsh_ss(e.bits); }
""",
    8: """
INLINE vec load(const element* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE void store(element* p, vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE float number(element e) { return _cvtsh_ss(e.bits); }
""",
}

_FLOAT16 = """
struct element {
  uint16_t bits;
};
"""

# The exponent is rebased by a multiplication; numbers below the smallest normal one come out of a subtraction
# (Maratyszcza's FP16 library).
_FLOAT16_PORTABLE = """
using halves = uint16_t __attribute__((vector_size(2 * LANES)));

INLINE vec widened(words h) {
  words w = h << 16, twice = w + w;
  vec normal = vec((twice >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
  vec tiny = vec((twice >> 17) | (126u << 23)) - 0.5f;
  words is_tiny = words(twice < (1u << 27));
  return vec((w & 0x80000000u) | (words(tiny) & is_tiny) | (words(normal) & ~is_tiny));
}
INLINE vec load(const element* p) {
  halves h;
  memcpy(&h, p, sizeof h);
  return widened(__builtin_convertvector(h, words));
}
INLINE void store(element* p, vec v) {
  words w = words(v), twice = w + w;
  vec base = (vec(w & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  words bias = twice & 0xff000000u;
  words is_small = words(bias < 0x71000000u);
  bias = (is_small & 0x71000000u) | (bias & ~is_small);
  words bits = words(vec((bias >> 1) + 0x07800000u) + base);
  words result = ((bits >> 13) & 0x7c00u) + (bits & 0xfffu);
  words is_nan = words(twice > 0xff000000u);
  result = ((w & 0x80000000u) >> 16) | (is_nan & 0x7e00u) | (result & ~is_nan);
  halves h = __builtin_convertvector(result, halves);
  memcpy(p, &h, sizeof h);
}
INLINE float number(element e) { return widened(words{} + e.bits)[0]; }
"""

_PARTS_OF_16_BITS = """
INLINE vec load_first(const element* p, long count) {
  element some[LANES] = {};
  memcpy(some, p, size_t(count) * sizeof *p);
  return load(some);
}
INLINE void store_first(element* p, vec v, long count) {
  element some[LANES];
  store(some, v);
  memcpy(p, some, size_t(count) * sizeof *p);
}
"""

_NUMBER = """
INLINE float number(float value) { return value; }
"""


def lanes(instruction_set: InstructionSet) -> str:
    """Vectors of an instruction set."""
    if instruction_set.lanes == 16:
        return _AVX512
    return _AVX2 if instruction_set.flags else _PORTABLE


def elements(instruction_set: InstructionSet, dtype: str) -> str:
    """The element type of a dtype, loads and stores of it."""
    if dtype == "float32":
        return _FLOAT + _NUMBER
    if dtype == "bfloat16":
        return _BFLOAT16 + _PARTS_OF_16_BITS
    converted = _FLOAT16_CONVERTED[instruction_set.lanes] if instruction_set.flags else _FLOAT16_PORTABLE
    return _FLOAT16 + converted + _PARTS_OF_16_BITS


def header(instruction_set: InstructionSet) -> str:
    """What a file includes."""
    intrinsics = "#include <immintrin.h>\n" if instruction_set.flags else ""
    return f"{intrinsics}#include <cstdint>\n#include <cstdlib>\n#include <cstring>\n"

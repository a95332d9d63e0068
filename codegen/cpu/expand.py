"""C++ that expands rows of the weight in registers: for few tokens on any processor, and where columns are transposed.

    kept values   a b c d          (8 of 16 columns at 2:4)
    mask          0 1 0 1 1 0 0 1  from the packed indices, 512 columns at once
    expanded      0 a 0 b c 0 0 d  times x, summed

Memory is the limit: the values of a few rows stream through once, and the rows after them are prefetched, because
several streams at once are more than the hardware's prefetcher follows (measured: 2 rows without it run at half speed).
"""

from __future__ import annotations

from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.template import fill

MOST_ROWS = 4
"""Rows of the weight, at most, expanded at once."""

_TABLE = """
// mask_table.of[b]: the columns that a byte of indices keeps
struct MaskTable {
  uint16_t of[256];
  constexpr MaskTable() : of() {
    for (int b = 0; b < 256; ++b)
      for (int i = 0; i < 8 / INDEX_BITS; ++i) {
        const int place = (b >> (INDEX_BITS * i)) & ((1 << INDEX_BITS) - 1);
        of[b] = uint16_t(of[b] | 1 << (place + i / N * M) % 16);
      }
  }
};
constexpr MaskTable mask_table;
"""

_SCALAR_MASKS = """
constexpr int BLOCK = 512;  // columns whose masks are made at once

// the masks of up to BLOCK columns, one byte for 8 columns, from as many bytes of indices as exist
INLINE void make_masks(const uint8_t* indices, int64_t bytes, uint8_t* masks) {
  bytes = least(bytes, BLOCK / M * N * INDEX_BITS / 8);
  if constexpr (M * 8 == N * INDEX_BITS * 4) {  // a byte keeps columns of 4: two bytes a mask
    for (int64_t i = 0; i < bytes; i += 2) {
      masks[i / 2] = uint8_t(mask_table.of[indices[i]] | (i + 1 < bytes ? mask_table.of[indices[i + 1]] : 0));
    }
  } else if constexpr (M * 8 == N * INDEX_BITS * 16) {  // a byte keeps columns of 16: two masks
    for (int64_t i = 0; i < bytes; ++i) {
      masks[2 * i] = uint8_t(mask_table.of[indices[i]]);
      masks[2 * i + 1] = uint8_t(mask_table.of[indices[i]] >> 8);
    }
  } else {
    for (int64_t i = 0; i < bytes; ++i) masks[i] = uint8_t(mask_table.of[indices[i]]);
  }
}
"""

_VECTOR_MASKS = """
constexpr int BLOCK = 512;  // columns whose masks are made at once

// nibble_table.of[i]: the columns that four bits of indices keep
struct NibbleTable {
  alignas(16) uint8_t of[16];
  constexpr NibbleTable() : of() {
    for (int i = 0; i < 16; ++i) {
      const int two = 1 << (i & 3) | 1 << ((i >> 2) + $second), one = 1 << (i & 7);
      of[i] = uint8_t(INDEX_BITS == 4 ? one : two);
    }
  }
};
constexpr NibbleTable nibble_table;

// the masks of up to BLOCK columns, one byte for 8 columns, from as many bytes of indices as exist
INLINE void make_masks(const uint8_t* indices, int64_t bytes, uint8_t* masks) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(nibble_table.of)));
  const __m512i nibble = _mm512_set1_epi8(15);
  auto some = [&](int64_t from) {
    const int64_t left = bytes - from;
    const __mmask64 exist = left >= 64 ? ~0ull : left > 0 ? (1ull << left) - 1 : 0;
    return _mm512_maskz_loadu_epi8(exist, indices + (left > 0 ? from : 0));
  };
  auto low = [&](__m512i b) { return _mm512_shuffle_epi8(table, _mm512_and_si512(b, nibble)); };
  auto high = [&](__m512i b) { return _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble)); };
  $body
}
"""

_BODIES = {
    # a nibble of indices is a nibble of the mask
    "nibble": """
const __m512i b = some(0);
_mm512_store_si512(masks, _mm512_or_si512(low(b), _mm512_slli_epi16(high(b), 4)));
""",
    # a nibble of indices is a byte of the mask
    "byte": """
const __m512i b = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(some(0)));
const __m512i even = _mm512_and_si512(low(b), _mm512_set1_epi16(255));
_mm512_store_si512(masks, _mm512_or_si512(even, _mm512_slli_epi16(high(b), 8)));
""",
    # both nibbles of a byte keep columns of one mask
    "both": """
const __m512i b = some(0);
_mm512_store_si512(masks, _mm512_or_si512(low(b), high(b)));
""",
    # two bytes of indices are one mask
    "two": """
for (int half = 0; half < 2; ++half) {
  const __m512i b = some(64 * half), either = _mm512_or_si512(low(b), high(b));
  const __m512i word = _mm512_or_si512(either, _mm512_srli_epi16(either, 8));
  _mm256_store_si256(reinterpret_cast<__m256i*>(masks + 32 * half), _mm512_cvtepi16_epi8(word));
}
""",
}
_WAYS = {(1, 2): "nibble", (2, 4): "nibble", (1, 4): "byte", (2, 8): "both", (4, 8): "two"}

_SECOND = {(1, 2): 2, (1, 4): 4}  # columns from the first group of a nibble to the second

_AVX512_STEP = """
constexpr int STEP = LANES, KEPT = STEP / M * N;  // columns of a step, and its kept values
INLINE vec expand(const element* values, const uint8_t* masks) {
  uint16_t mask;
  memcpy(&mask, masks, sizeof mask);
  return _mm512_maskz_expand_ps(mask, $load);
}
"""

_AVX512_LOADS = {
    ("float32", 8): "_mm512_castps256_ps512(_mm256_loadu_ps(values))",
    ("float32", 4): "_mm512_castps128_ps512(_mm_loadu_ps(values))",
    ("bfloat16", 8): (
        "_mm512_castsi512_ps(_mm512_castsi256_si512(_mm256_slli_epi32(_mm256_cvtepu16_epi32("
        "_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))), 16)))"
    ),
    ("bfloat16", 4): (
        "_mm512_castsi512_ps(_mm512_castsi128_si512(_mm_slli_epi32(_mm_cvtepu16_epi32("
        "_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))), 16)))"
    ),
    ("float16", 8): (
        "_mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))))"
    ),
    ("float16", 4): ("_mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))))"),
}

_AVX2_STEP = """
constexpr int STEP = LANES, KEPT = STEP / M * N;  // columns of a step, and its kept values
// place_table.of[mask][lane]: which kept value a lane takes, negative where none
struct PlaceTable {
  alignas(8) int8_t of[256][8];
  constexpr PlaceTable() : of() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane) of[mask][lane] = int8_t(mask >> lane & 1 ? next++ : -1);
  }
};
constexpr PlaceTable place_table;

INLINE vec expand(const element* values, const uint8_t* masks) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(place_table.of[*masks]));
  const __m256i places = _mm256_cvtepi8_epi32(bytes);
  const vec taken = _mm256_permutevar8x32_ps(_mm256_castps128_ps256($load), places);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), taken);
}
"""

_TWO_FLOATS = "_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)))"
_FOUR_HALVES = "_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))"
_TWO_HALVES = "_mm_loadu_si32(values)"
_AVX2_LOADS = {
    ("float32", 4): "_mm_loadu_ps(values)",
    ("float32", 2): _TWO_FLOATS,
    ("bfloat16", 4): f"_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32({_FOUR_HALVES}), 16))",
    ("bfloat16", 2): f"_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32({_TWO_HALVES}), 16))",
    ("float16", 4): f"_mm_cvtph_ps({_FOUR_HALVES})",
    ("float16", 2): f"_mm_cvtph_ps({_TWO_HALVES})",
}

_PORTABLE_STEP = """
constexpr int STEP = LANES, KEPT = STEP / M * N;  // columns of a step, and its kept values
INLINE vec expand(const element* values, const uint8_t* masks) {
  float at[LANES] = {};
  for (unsigned rest = *masks; rest; rest &= rest - 1) at[__builtin_ctz(rest)] = number(*values++);
  return load(at);
}
"""

_ROWS = """
constexpr int UNROLLED = $unrolled;         // steps whose values fill a cache line or more

// sums[token * STRIDE + r] for ROWS rows of the weight from `row` on; rows after the last are the last one again
template <int ROWS, int TOKENS>
void multiply_rows(const Call& call, const Inputs& inputs, int64_t token, int64_t row, float* sums) {
  constexpr int PARTS = ROWS * TOKENS < 8 ? 2 : 1;  // enough sums that none waits for the one before
  const int64_t row_kept = kept_of(call.in), row_bytes = index_bytes(call.in);
  const element* values[ROWS];
  const uint8_t* indices[ROWS];
  find_rows(call, row, values, indices);
  const float* x = inputs.x + token * inputs.stride;
  vec total[PARTS][ROWS][TOKENS];
  for (int p = 0; p < PARTS; ++p)
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t) total[p][r][t] = vec{};
  alignas(64) uint8_t masks[ROWS][BLOCK / 8];
  alignas(64) element rest[ROWS][KEPT];

  auto step = [&](int part, int64_t column, const element* (&from)[ROWS], int64_t mask) INLINE_LAMBDA {
    vec weight[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) weight[r] = expand(from[r], masks[r] + mask);
    UNROLL for (int t = 0; t < TOKENS; ++t) {
      const vec xt = load(x + t * inputs.stride + column);
      UNROLL for (int r = 0; r < ROWS; ++r) total[part][r][t] = multiply_add(weight[r], xt, total[part][r][t]);
    }
  };

  for (int64_t block = 0; block < call.in; block += BLOCK) {
    const int64_t first_byte = block / M * N * INDEX_BITS / 8, columns = least(BLOCK, call.in - block);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      make_masks(indices[r] + first_byte, row_bytes - first_byte, masks[r]);
      __builtin_prefetch(indices[r] + ROWS * row_bytes + first_byte);
    }
    const element* from[ROWS];
    for (int r = 0; r < ROWS; ++r) from[r] = values[r] + kept_of(block);
    int64_t k = 0;
    for (; k + STEP * UNROLLED <= columns; k += STEP * UNROLLED) {
      UNROLL for (int r = 0; r < ROWS; ++r) __builtin_prefetch(from[r] + ROWS * row_kept);
      UNROLL for (int u = 0; u < UNROLLED; ++u) {
        step(u % PARTS, block + k + STEP * u, from, (k + STEP * u) / 8);
        UNROLL for (int r = 0; r < ROWS; ++r) from[r] += KEPT;
      }
    }
    for (; k + STEP <= columns; k += STEP) {
      step(0, block + k, from, k / 8);
      for (int r = 0; r < ROWS; ++r) from[r] += KEPT;
    }
    if (k < columns) {
      memset(rest, 0, sizeof rest);
      for (int r = 0; r < ROWS; ++r) {
        memcpy(rest[r], from[r], size_t(kept_of(columns - k)) * sizeof(element));
        from[r] = rest[r];
      }
      step(0, block + k, from, k / 8);
    }
  }

  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < ROWS; ++r) {
      vec all = total[0][r][t];
      for (int p = 1; p < PARTS; ++p) all = all + total[p][r][t];
      sums[t * STRIDE + r] = sum(all);
    }
  add_branch<ROWS, TOKENS>(call, inputs, token, row, sums);
}
"""

_CONVERTED = """
constexpr bool COPIES = true;

INLINE void copy_row(const element* from, int64_t columns, int64_t padded, float* to) {
  for (int64_t i = 0; i < padded; i += LANES) {
    const int64_t left = columns - i;
    store(to + i, left >= LANES ? load(from + i) : left > 0 ? load_first(from + i, left) : vec{});
  }
}
"""

_SAME = """
constexpr bool COPIES = false;  // unless x has to be longer

INLINE void copy_row(const element* from, int64_t columns, int64_t padded, float* to) {
  memcpy(to, from, size_t(columns) * sizeof *to);
  memset(to + columns, 0, size_t(padded - columns) * sizeof *to);
}
"""


def rows_of(tokens: int, instruction_set: InstructionSet) -> int:
    """Rows of the weight taken at once with this many tokens: as many as sums fit in registers."""
    fitting = (instruction_set.registers - 3) // (tokens + 1)
    return max(size for size in (1, 2, 3, MOST_ROWS) if size <= max(1, fitting))


def steps(instruction_set: InstructionSet, dtype: str, n: int, m: int) -> str:
    """Masks out of packed indices, and ``expand`` of STEP columns with KEPT values."""
    kept = instruction_set.lanes // m * n
    if instruction_set.lanes == 16:
        step = _AVX512_STEP.replace("$load", _AVX512_LOADS[dtype, kept])
    elif instruction_set.flags:
        step = _AVX2_STEP.replace("$load", _AVX2_LOADS[dtype, kept])
    else:
        step = _PORTABLE_STEP
    masks = _VECTOR_MASKS if instruction_set.lanes == 16 else _TABLE + _SCALAR_MASKS
    return fill(masks, body=_BODIES[_WAYS[n, m]], second=str(_SECOND.get((n, m), 0))) + step


def rows(instruction_set: InstructionSet, dtype: str, n: int, m: int) -> str:
    """``copy_row`` and ``multiply_rows``."""
    size = 4 if dtype == "float32" else 2
    parts = (
        steps(instruction_set, dtype, n, m),
        _SAME if size == 4 else _CONVERTED,
        fill(_ROWS, unrolled=str(min(8, max(2, 64 // (instruction_set.lanes // m * n * size))))),
    )
    return "\n".join(parts)

"""C++ for few tokens with AVX2 or AVX-512: x is picked from where the weight keeps values, so half is multiplied.

Both can pick one of four numbers for every lane, in each 128 bits of a vector. Two rows of W fill the lanes (2:4, 8
floats a vector, values a0 a1 .. of one row, b0 b1 .. of the next):

    values   a0 a1 b0 b1 | a4 a5 b4 b5      interleaved from both rows, and alike a2 a3 b2 b3 | a6 a7 b6 b7
    x        0  1  2  3  | 8  9  10 11      the columns of their groups, laid out so once a call
    picked   by two bits of packed index a lane, shifted out of one word: no table, no mask

Vectors of values and places serve all tokens; a token costs one pick and one product for 8 values. Groups of eight take
two picks, and the third bit of an index chooses; at 1:4 neighbouring values belong to two groups. AVX-512 could expand
the weight instead, which takes twice the products and more shuffles: 0.75 to 1 as fast on Sapphire Rapids.

Memory is the limit for one token. Four rows at once keep it busy (measured on Zen 3: 14 GB/s a core, with two rows 12),
each fetched a few lines ahead and, where it ends, into the rows after these.
"""

from __future__ import annotations

from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.template import fill

_LAYOUT = """
constexpr int STEP = BUNDLE_COLUMNS;
constexpr int PARTS_OF_BUNDLE = BUNDLE / LANES;
constexpr int PART_COLUMNS = BUNDLE_COLUMNS / PARTS_OF_BUNDLE;  // of a vector of kept values
constexpr bool COPIES = true;

// 4 columns at once: the columns of 4 kept values, M / N times 4, go to as many vectors
INLINE void copy_row(const element* from, int64_t columns, int64_t padded, float* to) {
  constexpr int QUARTERS = M / N;
  for (int64_t i = 0; i < padded; i += LANES) {
    const int64_t left = columns - i;
    alignas(64) float some[LANES];
    store(some, left >= LANES ? load(from + i) : left > 0 ? load_first(from + i, left) : vec{});
    for (int four = 0; four < LANES; four += 4) {
      const int64_t quarter = (i + four) % PART_COLUMNS / 4;
      float* at = to + (i + four) / PART_COLUMNS * PART_COLUMNS;
      memcpy(at + quarter % QUARTERS * LANES + quarter / QUARTERS * 4, some + four, 4 * sizeof(float));
    }
  }
}
"""

_AVX512 = """
// in every lane the word of packed indices that its value's lies in: lanes of 4 are of the first row and the second
template <int part>
INLINE words words_of_both(const uint8_t* first, const uint8_t* second) {
  int some[INDEX_BITS];
  for (int i = 0; i < INDEX_BITS / 2; ++i) {
    memcpy(some + 2 * i, first + 4 * i, 4);
    memcpy(some + 2 * i + 1, second + 4 * i, 4);
  }
  __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(some[0]), 0xcccc, some[1]);
  if constexpr (INDEX_BITS == 4)
    both = _mm512_mask_set1_epi32(_mm512_mask_set1_epi32(both, 0x3300, some[2]), 0xcc00, some[3]);
  return words(both);
}
INLINE vec pick_of_four(vec x, words places) { return _mm512_permutevar_ps(x, __m512i(places)); }
INLINE vec odd_lanes(vec even, vec odd) { return _mm512_mask_blend_ps(0xaaaa, even, odd); }
INLINE vec by_third_bit(words places, vec unset, vec set) {
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(__m512i(places), _mm512_set1_epi32(4)), unset, set);
}
INLINE __m128 sum_of_fours(vec v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
"""

_AVX2 = """
// in every lane the word of packed indices that its value's lies in: lanes of 4 are of the first row and the second
template <int part>
INLINE words words_of_both(const uint8_t* first, const uint8_t* second) {
  int some[2];
  memcpy(some, first + INDEX_BITS / 4 * 4 * part, 4);
  memcpy(some + 1, second + INDEX_BITS / 4 * 4 * part, 4);
  return words(_mm256_blend_epi32(_mm256_set1_epi32(some[0]), _mm256_set1_epi32(some[1]), 0xcc));
}
INLINE vec pick_of_four(vec x, words places) { return _mm256_permutevar_ps(x, __m256i(places)); }
INLINE vec odd_lanes(vec even, vec odd) { return _mm256_blend_ps(even, odd, 0xaa); }
INLINE vec by_third_bit(words places, vec unset, vec set) {
  return _mm256_blendv_ps(unset, set, vec(places << 29));
}
INLINE __m128 sum_of_fours(vec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
"""

_PLACES = """
// by how many bits a lane shifts its word, so that the place of its value is at the end; of the first pairs of values
template <int part>
struct Shifts {
  alignas(64) uint32_t of[LANES];
  constexpr Shifts() : of() {
    for (int lane = 0; lane < LANES; ++lane) of[lane] = (part * LANES + lane / 4 * 4 + lane % 2) * INDEX_BITS % 32;
  }
};
template <int part>
constexpr Shifts<part> shifts;

// where in their columns the values of both rows lie, of a vector's kept values the first or the second pairs
template <int part, int pair>
INLINE words places_of(const uint8_t* first, const uint8_t* second) {
  words by;
  memcpy(&by, shifts<part>.of, sizeof by);
  const words places = words_of_both<part>(first, second) >> (by + unsigned(2 * pair * INDEX_BITS));
  return $places;
}

// the numbers of x at such places; `x` is laid out by copy_row
template <int pair>
INLINE vec pick_from(const float* x, words places) {
  $pick
}

"""

_ROWS = """
// sums[token * STRIDE + r] for ROWS rows of the weight from `row` on; rows after the last are the last one again
template <int ROWS, int TOKENS>
void multiply_rows(const Call& call, const Inputs& inputs, int64_t token, int64_t row, float* sums) {
  constexpr int PAIRS = ROWS / 2, PARTS = PAIRS * TOKENS < 4 ? 2 : 1;  // enough sums that none waits for the one before
  constexpr int LINE = 64 / sizeof(element), AHEAD = 6 * LINE;  // values of a cache line, and how far they are fetched
  constexpr int LINE_COLUMNS = LINE / N * M;                    // columns of a line of values
  constexpr int BLOCK = 512 / INDEX_BITS / N * M;               // columns of a line of indices
  const int64_t row_kept = kept_of(call.in), row_bytes = index_bytes(call.in);
  const element* values[ROWS];
  const uint8_t* indices[ROWS];
  find_rows(call, row, values, indices);
  const float* x = inputs.x + token * inputs.stride;
  vec total[PARTS][PAIRS][TOKENS];
  for (int p = 0; p < PARTS; ++p)
    for (int r = 0; r < PAIRS; ++r)
      for (int t = 0; t < TOKENS; ++t) total[p][r][t] = vec{};

  // a bundle of every row: its values, its indices, and its first column
  auto bundle = [&](const auto& from, const auto& at, int64_t first) INLINE_LAMBDA {
    auto half = [&]<int part, int pair>() INLINE_LAMBDA {
      vec weight[PAIRS];
      words places[PAIRS];
      UNROLL for (int r = 0; r < PAIRS; ++r) {
        const vec a = load(from[2 * r] + part * LANES), b = load(from[2 * r + 1] + part * LANES);
        weight[r] = pair ? interleave_high(a, b) : interleave_low(a, b);
        places[r] = places_of<part, pair>(at[2 * r], at[2 * r + 1]);
      }
      UNROLL for (int t = 0; t < TOKENS; ++t)
        UNROLL for (int r = 0; r < PAIRS; ++r) {
          const vec picked = pick_from<pair>(x + t * inputs.stride + first + part * PART_COLUMNS, places[r]);
          total[pair % PARTS][r][t] = multiply_add(weight[r], picked, total[pair % PARTS][r][t]);
        }
    };
    half.template operator()<0, 0>();
    half.template operator()<0, 1>();
    if constexpr (PARTS_OF_BUNDLE == 2) {
      half.template operator()<1, 0>();
      half.template operator()<1, 1>();
    }
  };
  auto whole_bundle = [&](int64_t first) INLINE_LAMBDA {
    const element* from[ROWS];
    const uint8_t* at[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) {
      from[r] = values[r] + kept_of(first);
      at[r] = indices[r] + kept_of(first) * INDEX_BITS / 8;
    }
    bundle(from, at, first);
  };

  int64_t column = 0;
  for (int64_t block = 0; block < call.in; block += BLOCK) {
    const int64_t end = least(block + BLOCK, call.in);
    UNROLL for (int r = 0; r < ROWS; ++r)
      __builtin_prefetch(indices[r] + ROWS * row_bytes + kept_of(block) * INDEX_BITS / 8);
    for (; column + LINE_COLUMNS <= end; column += LINE_COLUMNS) {
      int64_t ahead = kept_of(column) + AHEAD;
      if (ahead >= row_kept) ahead += (ROWS - 1) * row_kept;
      UNROLL for (int r = 0; r < ROWS; ++r) __builtin_prefetch(values[r] + ahead);
      UNROLL for (int u = 0; u < LINE_COLUMNS / BUNDLE_COLUMNS; ++u)
        whole_bundle(column + u * BUNDLE_COLUMNS);
    }
  }
  for (; column + BUNDLE_COLUMNS <= call.in; column += BUNDLE_COLUMNS) whole_bundle(column);
  if (column < call.in) {
    element rest[ROWS][BUNDLE];
    uint8_t last[ROWS][BUNDLE_BYTES];
    memset(rest, 0, sizeof rest);
    memset(last, 0, sizeof last);
    const int64_t kept = kept_of(column), byte = kept * INDEX_BITS / 8;
    for (int r = 0; r < ROWS; ++r) {
      memcpy(rest[r], values[r] + kept, size_t(row_kept - kept) * sizeof(element));
      memcpy(last[r], indices[r] + byte, size_t(row_bytes - byte));
    }
    bundle(rest, last, column);
  }

  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < PAIRS; ++r) {
      vec all = total[0][r][t];
      for (int p = 1; p < PARTS; ++p) all = all + total[p][r][t];
      __m128 both = sum_of_fours(all);
      both = _mm_add_ps(both, _mm_movehdup_ps(both));
      sums[t * STRIDE + 2 * r] = _mm_cvtss_f32(both);
      sums[t * STRIDE + 2 * r + 1] = _mm_cvtss_f32(_mm_movehl_ps(both, both));
    }
  add_branch<ROWS, TOKENS>(call, inputs, token, row, sums);
}
"""

_ONE_PICK = "return pick_of_four(load(x + pair * LANES), places);"
_TWO_PICKS = """
const float* at = x + $at;
const vec first = pick_of_four(load(at), places), second = pick_of_four(load(at + LANES), places);
return $choose;
"""

_PICKS = {
    (1, 2): _ONE_PICK,
    (2, 4): _ONE_PICK,
    (1, 4): fill(_TWO_PICKS, at="2 * pair * LANES", choose="odd_lanes(first, second)"),
    (2, 8): fill(_TWO_PICKS, at="2 * pair * LANES", choose="by_third_bit(places, first, second)"),
    (4, 8): fill(_TWO_PICKS, at="0", choose="by_third_bit(places, first, second)"),
}


def rows(instruction_set: InstructionSet, dtype: str, n: int, m: int) -> str:
    """``copy_row`` and ``multiply_rows`` of an even number of rows."""
    odd = "places | (words)(_mm512_set1_epi64(2ll << 32))" if instruction_set.lanes == 16 else ""
    odd = odd or "places | (words)(_mm256_set1_epi64x(2ll << 32))"
    # at 1:2 four columns hold two groups
    places = fill(_PLACES, places=odd if m == 2 else "places", pick=_PICKS[n, m])
    return "\n".join((_LAYOUT, _AVX512 if instruction_set.lanes == 16 else _AVX2, places, _ROWS))


def rows_of(tokens: int, instruction_set: InstructionSet) -> int:
    """Rows of the weight taken at once with this many tokens: as many as sums fit in registers."""
    return 2 if tokens > 4 and instruction_set.registers < 32 else 4

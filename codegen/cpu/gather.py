"""C++ for few tokens with AVX2: numbers of x are picked where the weight keeps values, so half as many are multiplied.

AVX2 cannot expand, but it can pick one of four numbers for every lane, in each half of a vector. Two rows of W fill the
lanes (2:4, values a0 a1 .. of one row, b0 b1 .. of the next):

    values   a0 a1 b0 b1 | a4 a5 b4 b5      interleaved from both rows, and alike a2 a3 b2 b3 | a6 a7 b6 b7
    x        0  1  2  3  | 8  9  10 11      the columns of their groups, laid out so once a call
    picked   by two bits of packed index a lane, shifted out of one word: no table, no mask

Vectors of values and places serve all tokens; a token costs one pick and one product for 8 values. Groups of eight take
two picks, and the third bit of an index chooses; at 1:4 neighbouring values belong to two groups.

Memory is the limit for one token. Four rows at once keep it busy (measured on Zen 3: 14 GB/s a core, with two rows 12),
each fetched a few lines ahead and, where it ends, into the rows after these.
"""

from __future__ import annotations

from fxsparse.codegen.template import fill

_GATHER = """
using input = float;
constexpr int STEP = BUNDLE_COLUMNS;
constexpr int HALF = BUNDLE_COLUMNS / 2;  // columns of 8 kept values
constexpr bool COPIES = true;

// 4 columns at once: x as vectors of two times 4 columns, HALF / 2 apart
INLINE void copy_row(const element* from, int64_t columns, int64_t padded, float* to) {
  constexpr int QUARTERS = HALF / 8;  // times 4 columns, in half a vector's reach
  for (int64_t i = 0; i < padded; i += LANES) {
    const int64_t left = columns - i, quarter = i % HALF / 4;
    const vec some = left >= LANES ? load(from + i) : left > 0 ? load_first(from + i, left) : vec{};
    float* at = to + i / HALF * HALF + quarter % QUARTERS * LANES + quarter / QUARTERS * 4;
    _mm_storeu_ps(at, _mm256_castps256_ps128(some));
    _mm_storeu_ps(at + LANES, _mm256_extractf128_ps(some, 1));
  }
}

// where in their 4 columns the values of both rows lie, of half a bundle and the first or second pairs of its values
template <int half, int pair>
INLINE __m256i places_of(const uint8_t* first, const uint8_t* second) {
  constexpr int FROM = 8 * half + 2 * pair, WORD = 32 / INDEX_BITS, BIT = FROM % WORD * INDEX_BITS;
  int words_of[2];
  memcpy(words_of, first + FROM / WORD * 4, 4);
  memcpy(words_of + 1, second + FROM / WORD * 4, 4);
  const __m256i both = _mm256_blend_epi32(_mm256_set1_epi32(words_of[0]), _mm256_set1_epi32(words_of[1]), 0xcc);
  constexpr int B = INDEX_BITS;
  const __m256i places = _mm256_srlv_epi32(
      both, _mm256_setr_epi32(BIT, BIT + B, BIT, BIT + B, BIT + 4 * B, BIT + 5 * B, BIT + 4 * B, BIT + 5 * B));
  return $places;
}

// the numbers of x at such places; `x` is laid out by copy_row
template <int pair>
INLINE vec pick_from(const float* x, __m256i places) {
  $pick
}

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
    auto quarter = [&]<int half, int pair>() INLINE_LAMBDA {
      vec weight[PAIRS];
      __m256i places[PAIRS];
      UNROLL for (int r = 0; r < PAIRS; ++r) {
        const vec a = load(from[2 * r] + half * LANES), b = load(from[2 * r + 1] + half * LANES);
        weight[r] = pair ? interleave_high(a, b) : interleave_low(a, b);
        places[r] = places_of<half, pair>(at[2 * r], at[2 * r + 1]);
      }
      UNROLL for (int t = 0; t < TOKENS; ++t)
        UNROLL for (int r = 0; r < PAIRS; ++r) {
          const vec picked = pick_from<pair>(x + t * inputs.stride + first + half * HALF, places[r]);
          total[pair % PARTS][r][t] = multiply_add(weight[r], picked, total[pair % PARTS][r][t]);
        }
    };
    quarter.template operator()<0, 0>();
    quarter.template operator()<0, 1>();
    quarter.template operator()<1, 0>();
    quarter.template operator()<1, 1>();
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
      __m128 both = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
      both = _mm_add_ps(both, _mm_movehdup_ps(both));
      sums[t * STRIDE + 2 * r] = _mm_cvtss_f32(both);
      sums[t * STRIDE + 2 * r + 1] = _mm_cvtss_f32(_mm_movehl_ps(both, both));
    }
  add_branch<ROWS, TOKENS>(call, inputs, token, row, sums);
}
"""

_ONE_PICK = "return _mm256_permutevar_ps(load(x + pair * LANES), places);"
_TWO_PICKS = """
const float* at = x + $at;
const vec first = _mm256_permutevar_ps(load(at), places), second = _mm256_permutevar_ps(load(at + LANES), places);
return $choose;
"""
_THIRD_BIT = "_mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(places, 29)))"

_PICKS = {
    (1, 2): _ONE_PICK,
    (2, 4): _ONE_PICK,
    (1, 4): fill(_TWO_PICKS, at="2 * pair * LANES", choose="_mm256_blend_ps(first, second, 0xaa)"),
    (2, 8): fill(_TWO_PICKS, at="2 * pair * LANES", choose=_THIRD_BIT),
    (4, 8): fill(_TWO_PICKS, at="0", choose=_THIRD_BIT),
}


def rows(n: int, m: int) -> str:
    """``copy_row`` and ``multiply_rows`` of an even number of rows, for AVX2."""
    # at 1:2 four columns hold two groups
    places = "_mm256_or_si256(places, _mm256_setr_epi32(0, 2, 0, 2, 0, 2, 0, 2))" if m == 2 else "places"
    return fill(_GATHER, places=places, pick=_PICKS[n, m])


def rows_of(tokens: int) -> int:
    """Rows of the weight taken at once with this many tokens: as many as sums fit in registers."""
    return 2 if tokens > 4 else 4

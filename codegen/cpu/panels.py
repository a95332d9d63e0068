"""C++ for many tokens: the lanes of a vector are tokens, and only kept weights are multiplied.

    panel         x of TOKENS tokens, transposed: [in, TOKENS]
    row of W      every kept value times the panel's row at its index, added to VECTORS vectors of sums

A block of the panel (some columns, 32 KB) stays in the first cache while all rows of a task pass over it; sums of up to
some rows of the weight lie in the second. Values are spread to all lanes four at a time, because a load less is a
product more: two loads a cycle are the limit (measured 1.4 of 2 products a cycle, against 1.0 with a load a value).

Where one instruction multiplies pairs of bfloat16, panels are bfloat16, and the rows at two indices are interleaved in
registers: two loads, two shuffles and two products for what takes four loads and four products in float.
"""

from __future__ import annotations

from fxsparse.codegen.template import fill

MOST_ROWS = 512
"""Rows of the weight whose sums a thread may hold."""

_FLOAT_CELLS = """
using cell = float;  // of a panel
using cells = vec;
constexpr int CELLS = LANES, PARTS = 1;

INLINE cells load_cells(const cell* p) { return load(p); }
INLINE void store_cells(cell* p, const vec (&tokens)[PARTS]) { store(p, tokens[0]); }
// the part-th LANES tokens of a panel's row
INLINE vec load_part(const cell* row, int64_t part) { return load(row + part * LANES); }
INLINE vec multiply_cells(cells a, cells b, vec sum) { return multiply_add(a, b, sum); }
"""

# Half of a 128-bit lane each, so that interleaving two rows gives the first 16 tokens of both in one vector.
_PAIR_CELLS = """
using cell = element;  // of a panel: 32 tokens a vector, 4 of the first 16 and 4 of the second 16 in turn
using cells = __m512i;
constexpr int CELLS = 2 * LANES, PARTS = 2;

INLINE cells load_cells(const cell* p) { return _mm512_loadu_si512(p); }
INLINE __m256i halves_of(vec v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)); }
INLINE void store_cells(cell* p, const vec (&tokens)[PARTS]) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(halves_of(tokens[0])), halves_of(tokens[1]), 1);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), both));
}
// the part-th LANES tokens of a panel's row
INLINE vec load_part(const cell* row, int64_t part) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), odd = _mm512_setr_epi64(1, 3, 5, 7, 1, 3, 5, 7);
  const __m512i mine = _mm512_permutexvar_epi64(part % 2 ? odd : even, load_cells(row + part / 2 * CELLS));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(mine)), 16));
}
INLINE vec multiply_cells(cells a, cells b, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
"""

_MAKE_PANEL = """
// from [tokens, columns] transposed: to [padded, width], zeros outside
INLINE void make_panel(const element* from, int64_t stride, int64_t tokens, int64_t columns, int64_t begin, int64_t end,
                       int64_t width, cell* to) {
  for (int64_t t = 0; t < width; t += CELLS)
    for (int64_t c = begin; c < end; c += LANES) {
      vec r[PARTS][LANES];
      const int64_t left = columns - c;
      for (int part = 0; part < PARTS; ++part) {
        for (int i = 0; i < LANES; ++i) {
          const int64_t token = t + part * LANES + i;
          const element* p = from + token * stride + c;
          r[part][i] = token >= tokens || left <= 0 ? vec{} : left >= LANES ? load(p) : load_first(p, left);
        }
        transpose(r[part]);
      }
      for (int i = 0; i < LANES; ++i) {
        vec tokens_of[PARTS];
        for (int part = 0; part < PARTS; ++part) tokens_of[part] = r[part][i];
        store_cells(to + (c + i) * width + t, tokens_of);
      }
    }
}
"""

_SIZES = """
constexpr int64_t PANEL_CELLS = (32 << 10) / sizeof(cell);    // of a block of columns, in the first cache
constexpr int64_t SCRATCH_CELLS = (1 << 20) / sizeof(cell);   // of a thread's panels, made before they are used
constexpr int64_t MOST_ROWS = $rows, UNIT = 64;  // columns of the result whose sums a thread holds, in steps of UNIT
"""

_ADD = """
using kept_value = float;

// 16 kept values in float; `own` is room for them
INLINE const float* load_kept(const element* values, float* own) {
  $load_kept
}
// the last kept values of a row, zeros after them
INLINE void load_kept(const element* values, int64_t count, float* own) {
  element some[BUNDLE] = {};
  memcpy(some, values, size_t(least(count, BUNDLE)) * sizeof(element));
  for (int i = 0; i < BUNDLE; i += LANES) store(own + i, load(some + i));
}

// sums[chain] += value * the panel's row at its index, for four kept values
template <int VECTORS, int CHAINS>
INLINE void add_four(vec (&sums)[CHAINS][VECTORS], const cell* x, bundle indices, quad values) {
  constexpr int64_t WIDTH = VECTORS * LANES;
  constexpr bundle INDEX = (bundle(1) << INDEX_BITS) - 1;
  auto one = [&](vec value, int kept) INLINE_LAMBDA {
    const cell* at = in_one_register(x + (kept / N * M + int64_t(indices >> (INDEX_BITS * kept) & INDEX)) * WIDTH);
    UNROLL for (int j = 0; j < VECTORS; ++j)
      sums[kept % CHAINS][j] = multiply_add(value, load(at + j * LANES), sums[kept % CHAINS][j]);
  };
  one(pick<0>(values), 0);
  one(pick<1>(values), 1);
  one(pick<2>(values), 2);
  one(pick<3>(values), 3);
}

template <int VECTORS, int CHAINS>
INLINE void add_bundle(vec (&sums)[CHAINS][VECTORS], const cell* x, bundle indices, const kept_value* values) {
  UNROLL for (int q = 0; q < BUNDLE / 4; ++q) {
    add_four(sums, x, indices, load_quad(values + 4 * q));
    indices >>= 4 * INDEX_BITS;
    x += 4 / N * M * VECTORS * LANES;
  }
}
"""

_ADD_PAIRS = """
using kept_value = element;

INLINE const element* load_kept(const element* values, element*) { return values; }
// the last kept values of a row, zeros after them
INLINE void load_kept(const element* values, int64_t count, element* own) {
  memset(own, 0, BUNDLE * sizeof(element));
  memcpy(own, values, size_t(least(count, BUNDLE)) * sizeof(element));
}

// sums[chain] += two values * the panel's rows at their indices, which are interleaved for it
template <int VECTORS, int CHAINS>
INLINE void add_pair(vec (&sums)[CHAINS][VECTORS], const cell* x, bundle indices, int pair, __m512i values) {
  constexpr int64_t WIDTH = VECTORS * LANES;
  constexpr bundle INDEX = (bundle(1) << INDEX_BITS) - 1;
  const int kept = 2 * pair;
  const cell* first = x + (kept / N * M + int64_t(indices >> (INDEX_BITS * kept) & INDEX)) * WIDTH;
  const cell* second = x + ((kept + 1) / N * M + int64_t(indices >> (INDEX_BITS * (kept + 1)) & INDEX)) * WIDTH;
  UNROLL for (int j = 0; j < VECTORS; j += 2) {
    __m512i a = load_cells(first + j * LANES), b = load_cells(second + j * LANES);
    asm("" : "+v"(a), "+v"(b));  // held in registers: GCC loads both again for the second shuffle
    vec* to = sums[pair % CHAINS] + j;
    to[0] = multiply_cells(_mm512_unpacklo_epi16(a, b), values, to[0]);
    to[1] = multiply_cells(_mm512_unpackhi_epi16(a, b), values, to[1]);
  }
}

template <int VECTORS, int CHAINS>
INLINE void add_bundle(vec (&sums)[CHAINS][VECTORS], const cell* x, bundle indices, const kept_value* values) {
  UNROLL for (int q = 0; q < BUNDLE / 8; ++q) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8 * q)));
    add_pair(sums, x, indices, 4 * q, _mm512_shuffle_epi32(four, _MM_PERM_AAAA));
    add_pair(sums, x, indices, 4 * q + 1, _mm512_shuffle_epi32(four, _MM_PERM_BBBB));
    add_pair(sums, x, indices, 4 * q + 2, _mm512_shuffle_epi32(four, _MM_PERM_CCCC));
    add_pair(sums, x, indices, 4 * q + 3, _mm512_shuffle_epi32(four, _MM_PERM_DDDD));
  }
}
"""

_PANELS = """
// What a panel is multiplied with: `run` makes sums [rows, VECTORS * LANES] of the result's columns [first, last).
struct Gather {
  const element* values;  // [columns of the result, kept_of(depth)], or a bundle of each in turn
  const uint8_t* indices;
  const element* up;      // [columns of the result, rank]
  int64_t depth, rank;
  int64_t row_values, bundle_values, row_bytes, bundle_bytes;  // from a row, and from a bundle, to the next

  template <int VECTORS>
  void run(const cell* panel, const float* hidden, int64_t first, int64_t last, float* sums) const {
    constexpr int WIDTH = VECTORS * LANES;
    constexpr int CHAINS = VECTORS >= 8 ? 1 : VECTORS >= 4 ? 2 : 4;  // enough sums that none waits for the one before
    constexpr int64_t COLUMNS = most(1, PANEL_CELLS / WIDTH / BUNDLE_COLUMNS) * BUNDLE_COLUMNS;
    for (int64_t block = 0; block == 0 || block < depth; block += COLUMNS) {
      const int64_t end = least(block + COLUMNS, depth);
      for (int64_t row = first; row < last; ++row) {
        float* to = sums + (row - first) * WIDTH;
        vec total[CHAINS][VECTORS];
        for (int c = 0; c < CHAINS; ++c)
          for (int j = 0; j < VECTORS; ++j) total[c][j] = c || !block ? vec{} : load(to + j * LANES);
        if (!block)
          for (int64_t k = 0; k < rank; ++k) {
            const vec weight = splat(number(up[row * rank + k]));
            for (int j = 0; j < VECTORS; ++j)
              total[0][j] = multiply_add(weight, load(hidden + k * WIDTH + j * LANES), total[0][j]);
          }
        const element* from = values + row * row_values + block / BUNDLE_COLUMNS * bundle_values;
        const uint8_t* places = indices + row * row_bytes + block / BUNDLE_COLUMNS * bundle_bytes;
        alignas(64) kept_value own[BUNDLE];
        int64_t column = block;
        for (; column + BUNDLE_COLUMNS <= end; column += BUNDLE_COLUMNS) {
          __builtin_prefetch(from + 4 * row_values);
          __builtin_prefetch(places + 4 * row_bytes);
          add_bundle(total, panel + column * WIDTH, load_bundle(places), load_kept(from, own));
          from += bundle_values;
          places += bundle_bytes;
        }
        if (column < end) {
          const int64_t kept = kept_of(column);
          load_kept(from, kept_of(depth) - kept, own);
          const int64_t bytes = index_bytes(depth) - kept * INDEX_BITS / 8;
          add_bundle(total, panel + column * WIDTH, load_bundle(places, bytes), own);
        }
        for (int j = 0; j < VECTORS; ++j) {
          vec all = total[0][j];
          for (int c = 1; c < CHAINS; ++c) all = all + total[c][j];
          store(to + j * LANES, all);
        }
      }
    }
  }
};

// hidden [VECTORS * LANES] = scale x down^T, of one row of down and one panel
template <int VECTORS>
void hidden_row(const Call& call, const cell* panel, const element* down, float* hidden) {
  vec total[VECTORS] = {};
  for (int64_t i = 0; i < call.in; ++i) {
    const vec weight = splat(number(down[i]));
    for (int j = 0; j < VECTORS; ++j)
      total[j] = multiply_add(weight, load_part(panel + i * VECTORS * LANES, j), total[j]);
  }
  for (int j = 0; j < VECTORS; ++j) store(hidden + j * LANES, total[j] * float(call.scale));
}

// sums [columns of the result, width] as rows of tokens, which `finish` stores
INLINE void finish_panel(const Call& call, const float* sums, int64_t token, int64_t tokens, int64_t first,
                         int64_t last, int64_t width) {
  alignas(64) float tile[LANES][MOST_ROWS + 2 * LANES];
  for (int64_t t = 0; t < least(width, tokens); t += LANES) {
    for (int64_t row = 0; row < last - first; row += LANES) {
      vec r[LANES];
      for (int i = 0; i < LANES; ++i) r[i] = load(sums + (row + i) * width + t);
      transpose(r);
      for (int i = 0; i < LANES; ++i) store(tile[i] + row, r[i]);
    }
    for (int i = 0; i < least(LANES, tokens - t); ++i) finish(call, tile[i], token + t + i, first, last - first);
  }
}

// tokens [begin, begin + tokens) of x [.., depth], the first columns of y
template <int VECTORS, class Weight>
int multiply_tokens(const Call& call, const Weight& weight, const element* x, int64_t stride, int64_t depth,
                    int64_t columns, int64_t begin, int64_t tokens) {
  constexpr int64_t WIDTH = VECTORS * LANES, GROUP = 256;
  const int64_t padded = up_to(depth, 64), size = padded * WIDTH, rank = call.rank;
  const int64_t panels = (tokens + WIDTH - 1) / WIDTH, per_thread = most(1, SCRATCH_CELLS / most(1, size));
  const int64_t at_once = least(panels, call.threads * per_thread);
  Scratch panel_scratch(at_once * size), hidden(at_once * rank * WIDTH);
  if (!panel_scratch.get || !hidden.get) return 1;
  cell* panel = reinterpret_cast<cell*>(panel_scratch.get);
  const int64_t groups = (padded + GROUP - 1) / GROUP, units = (columns + UNIT - 1) / UNIT;
  int failed = 0;
  for (int64_t from = 0; from < panels; from += at_once) {
    const int64_t now = least(at_once, panels - from);
    parallel(call, now * groups, (1 << 14) / (GROUP * WIDTH), [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job) {
        const int64_t p = job / groups, c = job % groups * GROUP, token = (from + p) * WIDTH;
        make_panel(x + (begin + token) * stride, stride, least(WIDTH, tokens - token), depth, c,
                   least(c + GROUP, padded), WIDTH, panel + p * size);
      }
    });
    parallel(call, now * rank, (1 << 14) / most(1, size), [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job)
        hidden_row<VECTORS>(call, panel + job / rank * size,
                            static_cast<const element*>(call.down) + job % rank * depth, hidden.get + job * WIDTH);
    });
    const int64_t grain = (1 << 14) / most(1, UNIT * kept_of(depth) * VECTORS);
    parallel(call, now * units, grain, [&](int64_t first, int64_t last) {
      Scratch sums(call.rows * WIDTH);
      if (!sums.get) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      while (first < last) {  // some columns of one panel's result at a time
        const int64_t p = first / units, unit = first % units, token = (from + p) * WIDTH;
        const int64_t some = least(least(last - first, units - unit), call.rows / UNIT);
        const int64_t column = unit * UNIT, end = least(column + some * UNIT, columns);
        weight.template run<VECTORS>(panel + p * size, hidden.get + p * rank * WIDTH, column, end, sums.get);
        finish_panel(call, sums.get, begin + token, tokens - token, column, end, WIDTH);
        first += some;
      }
    });
  }
  return failed;
}

// some tokens in panels of so many vectors
template <class Weight>
int multiply_some(int64_t vectors, const Call& call, const Weight& weight, const element* x, int64_t stride,
                  int64_t depth, int64_t columns, int64_t begin, int64_t tokens) {
  $one
  if (vectors <= 2) return multiply_tokens<2>(call, weight, x, stride, depth, columns, begin, tokens);
  if (vectors <= 4) return multiply_tokens<4>(call, weight, x, stride, depth, columns, begin, tokens);
  return multiply_tokens<8>(call, weight, x, stride, depth, columns, begin, tokens);
}

// y [tokens, columns ..] = x [tokens, depth] times a weight, in panels of call.vectors vectors, the last ones narrower
template <class Weight>
int panel_product(const Call& call, const Weight& weight, const element* x, int64_t stride, int64_t depth,
                  int64_t columns) {
  const int64_t width = call.vectors * LANES, whole = call.tokens / width * width, rest = call.tokens - whole;
  if (whole)
    if (int failed = multiply_some(call.vectors, call, weight, x, stride, depth, columns, 0, whole)) return failed;
  if (!rest) return 0;
  return multiply_some((rest + LANES - 1) / LANES, call, weight, x, stride, depth, columns, whole, rest);
}
"""

_ONE_VECTOR = "if (vectors <= 1) return multiply_tokens<1>(call, weight, x, stride, depth, columns, begin, tokens);"

_LOAD_KEPT = {
    True: "return values;",
    False: """
for (int i = 0; i < BUNDLE; i += LANES) store(own + i, load(values + i));
return own;
""",
}


def make_panel(*, pairs: bool) -> str:
    """The function that transposes tokens into a panel.

    Args:
        pairs: of 16-bit numbers are multiplied by one instruction, so a panel holds those.
    """
    return (_PAIR_CELLS if pairs else _FLOAT_CELLS) + _MAKE_PANEL


def panels(dtype: str, *, pairs: bool) -> str:
    """Everything of a product for many tokens; the last function is ``panel_product``.

    Args:
        dtype: of the elements.
        pairs: as for :func:`make_panel`.
    """
    add = _ADD_PAIRS if pairs else fill(_ADD, load_kept=_LOAD_KEPT[dtype == "float32"])
    return (
        make_panel(pairs=pairs)
        + fill(_SIZES, rows=str(MOST_ROWS))
        + "\n\n"
        + add
        + "\n"
        + fill(_PANELS, one="" if pairs else _ONE_VECTOR)
        + "\n"
    )

"""C++ for many tokens: the lanes of a vector are tokens, and only kept weights are multiplied.

    panel         x of TOKENS tokens, transposed: [in, TOKENS]
    row of W      every kept value times the panel's row at its index, added to VECTORS vectors of sums

A block of the panel (some columns, 32 KB) stays in the first cache while all rows of a task pass over it; sums of up to
ROWS rows of the weight lie in the second. Values are spread to all lanes four at a time, because a load less is a
product more: two loads a cycle are the limit (measured 1.4 of 2 products a cycle, against 1.0 with a load a value).
"""

from __future__ import annotations

from fxsparse.codegen.template import fill

_MAKE_PANEL = """
// from [tokens, columns] transposed: to [padded, width], zeros outside
INLINE void make_panel(const element* from, int64_t stride, int64_t tokens, int64_t columns, int64_t begin, int64_t end,
                       int64_t width, float* to) {
  for (int64_t t = 0; t < width; t += LANES)
    for (int64_t c = begin; c < end; c += LANES) {
      vec r[LANES];
      const int64_t left = columns - c;
      for (int i = 0; i < LANES; ++i) {
        const element* p = from + (t + i) * stride + c;
        r[i] = t + i >= tokens || left <= 0 ? vec{} : left >= LANES ? load(p) : load_first(p, left);
      }
      transpose(r);
      for (int i = 0; i < LANES; ++i) store(to + (c + i) * width + t, r[i]);
    }
}
"""

_PANELS = """
constexpr int64_t PANEL_FLOATS = 8 << 10;    // of a block of columns, in the first cache
constexpr int64_t SCRATCH_FLOATS = 4 << 20;  // of the panels that are made before they are used
constexpr int64_t ROWS = $rows, UNIT = 64;     // columns of the result whose sums a thread holds; taken in steps of this

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
INLINE void add_four(vec (&sums)[CHAINS][VECTORS], const float* x, bundle indices, quad values) {
  constexpr int64_t WIDTH = VECTORS * LANES;
  constexpr bundle INDEX = (bundle(1) << INDEX_BITS) - 1;
  auto one = [&](vec value, int kept) INLINE_LAMBDA {
    const float* at = x + (kept / N * M + int64_t(indices >> (INDEX_BITS * kept) & INDEX)) * WIDTH;
    UNROLL for (int j = 0; j < VECTORS; ++j)
      sums[kept % CHAINS][j] = multiply_add(value, load(at + j * LANES), sums[kept % CHAINS][j]);
  };
  one(pick<0>(values), 0);
  one(pick<1>(values), 1);
  one(pick<2>(values), 2);
  one(pick<3>(values), 3);
}

template <int VECTORS, int CHAINS>
INLINE void add_bundle(vec (&sums)[CHAINS][VECTORS], const float* x, bundle indices, const float* values) {
  UNROLL for (int q = 0; q < BUNDLE / 4; ++q) {
    add_four(sums, x, indices, load_quad(values + 4 * q));
    indices >>= 4 * INDEX_BITS;
    x += 4 / N * M * VECTORS * LANES;
  }
}

// What a panel is multiplied with: `run` makes sums [rows, VECTORS * LANES] of the result's columns [first, last).
struct Gather {
  const element* values;  // [columns of the result, kept_of(depth)]
  const uint8_t* indices;
  const element* up;      // [columns of the result, rank]
  int64_t depth, rank;

  template <int VECTORS>
  void run(const float* panel, const float* hidden, int64_t first, int64_t last, float* sums) const {
    constexpr int WIDTH = VECTORS * LANES;
    constexpr int CHAINS = VECTORS >= 8 ? 1 : VECTORS >= 4 ? 2 : 4;  // enough sums that none waits for the one before
    constexpr int64_t COLUMNS = most(1, PANEL_FLOATS / WIDTH / BUNDLE_COLUMNS) * BUNDLE_COLUMNS;
    const int64_t row_kept = kept_of(depth), row_bytes = index_bytes(depth);
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
        const element* row_values = values + row * row_kept;
        const uint8_t* row_indices = indices + row * row_bytes;
        int64_t column = block;
        for (; column + BUNDLE_COLUMNS <= end; column += BUNDLE_COLUMNS) {
          const element* from = row_values + kept_of(column);
          alignas(64) float own[BUNDLE];
          __builtin_prefetch(from + 2 * row_kept);
          add_bundle(total, panel + column * WIDTH, load_bundle(row_indices + kept_of(column) * INDEX_BITS / 8),
                     load_kept(from, own));
        }
        if (column < end) {
          const int64_t kept = kept_of(column), byte = kept * INDEX_BITS / 8;
          alignas(64) float own[BUNDLE];
          load_kept(row_values + kept, row_kept - kept, own);
          add_bundle(total, panel + column * WIDTH, load_bundle(row_indices + byte, row_bytes - byte), own);
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
void hidden_row(const Call& call, const float* panel, const element* down, float* hidden) {
  vec total[VECTORS] = {};
  for (int64_t i = 0; i < call.in; ++i) {
    const vec weight = splat(number(down[i]));
    for (int j = 0; j < VECTORS; ++j)
      total[j] = multiply_add(weight, load(panel + (i * VECTORS + j) * LANES), total[j]);
  }
  for (int j = 0; j < VECTORS; ++j) store(hidden + j * LANES, total[j] * float(call.scale));
}

// sums [columns of the result, width] as rows of tokens, which `finish` stores
INLINE void finish_panel(const Call& call, const float* sums, int64_t token, int64_t tokens, int64_t first, int64_t last,
                         int64_t width) {
  alignas(64) float tile[LANES][ROWS + 2 * LANES];
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
  const int64_t panels = (tokens + WIDTH - 1) / WIDTH, at_once = least(panels, most(1, SCRATCH_FLOATS / most(1, size)));
  Scratch panel(at_once * size), hidden(at_once * rank * WIDTH);
  if (!panel.get || !hidden.get) return 1;
  int failed = 0;
  for (int64_t from = 0; from < panels; from += at_once) {
    const int64_t now = least(at_once, panels - from), groups = (padded + GROUP - 1) / GROUP, units = (columns + UNIT - 1) / UNIT;
    parallel(call, now * groups, (1 << 14) / (GROUP * WIDTH), [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job) {
        const int64_t p = job / groups, c = job % groups * GROUP, token = (from + p) * WIDTH;
        make_panel(x + (begin + token) * stride, stride, least(WIDTH, tokens - token), depth, c,
                   least(c + GROUP, padded), WIDTH, panel.get + p * size);
      }
    });
    parallel(call, now * rank, (1 << 14) / most(1, size), [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job)
        hidden_row<VECTORS>(call, panel.get + job / rank * size,
                            static_cast<const element*>(call.down) + job % rank * depth, hidden.get + job * WIDTH);
    });
    const int64_t grain = (1 << 14) / most(1, UNIT * kept_of(depth) * VECTORS);
    parallel(call, now * units, grain, [&](int64_t first, int64_t last) {
      Scratch sums(ROWS * WIDTH);
      if (!sums.get) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      while (first < last) {  // some columns of one panel's result at a time
        const int64_t p = first / units, unit = first % units, token = (from + p) * WIDTH;
        const int64_t some = least(least(last - first, units - unit), ROWS / UNIT);
        const int64_t column = unit * UNIT, end = least(column + some * UNIT, columns);
        weight.template run<VECTORS>(panel.get + p * size, hidden.get + p * rank * WIDTH, column, end, sums.get);
        finish_panel(call, sums.get, begin + token, tokens - token, column, end, WIDTH);
        first += some;
      }
    });
  }
  return failed;
}

// y [tokens, columns ..] = x [tokens, depth] times a weight, in panels of $vectors vectors, the last ones narrower
template <class Weight>
int panel_product(const Call& call, const Weight& weight, const element* x, int64_t stride, int64_t depth,
                  int64_t columns) {
  const int64_t whole = call.tokens / ($vectors * LANES) * ($vectors * LANES), rest = call.tokens - whole;
  if (whole)
    if (int failed = multiply_tokens<$vectors>(call, weight, x, stride, depth, columns, 0, whole)) return failed;
  if (!rest) return 0;
  $narrower
  return multiply_tokens<$vectors>(call, weight, x, stride, depth, columns, whole, rest);
}
"""

_LOAD_KEPT = {
    True: "return values;",
    False: """
for (int i = 0; i < BUNDLE; i += LANES) store(own + i, load(values + i));
return own;
""",
}


def make_panel() -> str:
    """The function that transposes tokens into a panel."""
    return _MAKE_PANEL


def panels(dtype: str, vectors: int, rows: int) -> str:
    """Everything of a product for many tokens; the last function is ``panel_product``.

    Args:
        vectors: of tokens in a panel.
        rows: of the weight whose sums a thread holds.
    """
    narrower = [
        f"if (rest <= {size} * LANES) return multiply_tokens<{size}>(call, weight, x, stride, depth, columns, whole, rest);"
        for size in (1, 2, 4, 8)
        if size < vectors
    ]
    return (
        _MAKE_PANEL
        + fill(
            _PANELS,
            load_kept=_LOAD_KEPT[dtype == "float32"],
            rows=str(rows),
            vectors=str(vectors),
            narrower="\n".join(narrower),
        )
        + "\n"
    )

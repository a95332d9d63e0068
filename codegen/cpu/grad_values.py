"""C++ for the gradient of kept values: the lanes of a vector are tokens, and the dense gradient is never there.

    panel         dy^T [rows, tokens] of some tokens, in the second cache while all columns pass
    bundle        16 kept values of a row, of 32 columns at 2:4, whose x^T [columns, tokens] lies in the first cache
    sums          8 vectors at once, one for each kept value; their lanes are added up once a panel, 16 together

Half of the products of dense are made at 2:4, and sums lie in float until the last token.
"""

from __future__ import annotations

from fxsparse.codegen.template import fill

_GRAD_VALUES = """
constexpr int CHAINS = 8;  // sums that are added to in turn: enough that none waits for the one before
// tokens of a panel, so that a bundle's columns of x fill 32 KB, and rows of dy that fill 1 MB
constexpr int64_t WIDTH = (32 << 10) / sizeof(cell) / BUNDLE_COLUMNS, ROWS = (1 << 20) / sizeof(cell) / WIDTH;
constexpr int64_t SHARE = 256;  // of them that a thread takes at once

// to [rows, row_kept] += the bundle at `column`, over the tokens of x [BUNDLE_COLUMNS, WIDTH] and dy [rows, WIDTH]
INLINE void add_bundle(const Call& call, const cell* x, const cell* dy, int64_t used, int64_t row, int64_t rows,
                       int64_t column, bool add, float* to) {
  constexpr bundle INDEX = (bundle(1) << INDEX_BITS) - 1;
  const int64_t row_kept = kept_of(call.in), row_bytes = index_bytes(call.in);
  const int64_t kept = kept_of(column), bytes = row_bytes - kept * INDEX_BITS / 8;
  const uint8_t* indices = call.indices + row * row_bytes + kept * INDEX_BITS / 8;
  for (float* out = to + kept; rows > 0; --rows, dy += WIDTH, indices += row_bytes, out += row_kept) {
    bundle b = bytes >= BUNDLE_BYTES ? load_bundle(indices) : load_bundle(indices, bytes);
    __builtin_prefetch(indices + 8 * row_bytes);
    __builtin_prefetch(out + 8 * row_kept, 1);
    for (int pass = 0; pass < BUNDLE; pass += LANES) {
      vec total[LANES];
      UNROLL for (int k = 0; k < LANES; ++k) total[k] = vec{};
      auto add_some = [&](int part, const auto& from, int64_t t) INLINE_LAMBDA {
        const cells some = load_cells(dy + t);
        UNROLL for (int k = 0; k < CHAINS; ++k)
          total[part + k] = multiply_cells(some, load_cells(from[k] + t), total[part + k]);
      };
      UNROLL for (int part = 0; part < LANES; part += CHAINS) {
        const cell* from[CHAINS];
        UNROLL for (int k = 0; k < CHAINS; ++k) {
          const int64_t index = int64_t(b >> (INDEX_BITS * (part + k)) & INDEX);
          from[k] = in_one_register(x + ((pass + part + k) / N * M + index) * WIDTH);
        }
        if (used == WIDTH) UNROLL for (int64_t t = 0; t < WIDTH; t += CELLS) add_some(part, from, t);
        else for (int64_t t = 0; t < used; t += CELLS) add_some(part, from, t);
      }
      if constexpr (LANES < BUNDLE) b >>= INDEX_BITS * LANES % (8 * sizeof(bundle));
      const int64_t left = row_kept - kept - pass;
      const vec all = sums(total);
      if (left >= LANES) store(out + pass, add ? all + load(out + pass) : all);
      else if (left > 0) store_first(out + pass, add ? all + load_first(out + pass, left) : all, left);
    }
  }
}

// rows [begin, end) of the gradient in float, to [.., row_kept]
int make_rows(const Call& call, int64_t begin, int64_t end, float* to) {
  const element* x = static_cast<const element*>(call.x);
  const int64_t bundles = bundles_of(call.in), row_kept = kept_of(call.in);
  Scratch scratch(least(ROWS, up_to(end - begin, 64)) * WIDTH);
  if (!scratch.get) return 1;
  cell* panel = reinterpret_cast<cell*>(scratch.get);
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t rows = least(ROWS, end - row), shares = (rows + SHARE - 1) / SHARE;
    const element* dy = static_cast<const element*>(call.dy) + row;
    for (int64_t token = 0; token < call.tokens; token += WIDTH) {
      const int64_t some = least(WIDTH, call.tokens - token), used = up_to(some, CELLS);
      parallel(call, (rows + 63) / 64, (1 << 14) / (64 * WIDTH), [&](int64_t first, int64_t last) {
        make_panel(dy + token * call.dy_stride, call.dy_stride, some, rows, first * 64, last * 64, WIDTH, panel);
      });
      parallel(call, bundles * shares, (1 << 14) / (least(rows, SHARE) * used), [&](int64_t first, int64_t last) {
        alignas(64) cell block[BUNDLE_COLUMNS * WIDTH];
        for (int64_t job = first, made = -1; job < last; ++job) {
          const int64_t column = job / shares * BUNDLE_COLUMNS, from = job % shares * SHARE;
          if (column != made)
            make_panel(x + token * call.x_stride + column, call.x_stride, some, call.in - column, 0, BUNDLE_COLUMNS,
                       WIDTH, block);
          made = column;
          add_bundle(call, block, panel + from * WIDTH, used, row + from, least(SHARE, rows - from), column, token > 0,
                     to + (row - begin + from) * row_kept);
        }
      });
    }
  }
  return 0;
}

$run

// the product over no tokens is zero
int empty(const Call& call) {
  memset(call.y, 0, size_t(call.out * kept_of(call.in)) * sizeof(element));
  return 0;
}
"""

_DIRECT = """
int run(const Call& call) { return make_rows(call, 0, call.out, static_cast<float*>(call.y)); }
"""

_CONVERTED = """
int run(const Call& call) {
  const int64_t kept = kept_of(call.in), slab = least(call.out, most(1, (4 << 20) / kept / 128) * 128);
  Scratch sums(slab * kept);
  if (!sums.get) return 1;
  for (int64_t begin = 0; begin < call.out; begin += slab) {
    const int64_t end = least(begin + slab, call.out), count = (end - begin) * kept;
    if (int failed = make_rows(call, begin, end, sums.get)) return failed;
    element* to = static_cast<element*>(call.y) + begin * kept;
    parallel(call, (count + 4095) / 4096, 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first * 4096; i < least(last * 4096, count); i += LANES) {
        if (count - i >= LANES) store(to + i, load(sums.get + i));
        else store_first(to + i, load_first(sums.get + i, count - i), count - i);
      }
    });
  }
  return 0;
}
"""


def grad_values(dtype: str) -> str:
    """The gradient of kept values, after ``panels.make_panel``."""
    return fill(_GRAD_VALUES, run=_DIRECT if dtype == "float32" else _CONVERTED) + "\n"

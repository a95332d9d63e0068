"""C++ for the gradient of kept values: the lanes of a vector are tokens, and the dense gradient is never there.

    panels        x^T [in, tokens] and dy^T [out, tokens]
    bundle        16 kept values of a row: dy of some tokens in registers, times x at each index, 16 vectors of sums
    sums          the lanes of each are added up once a panel, all vectors together

Half of the products of dense are made at 2:4, and sums lie in float until the last token.
"""

from __future__ import annotations

from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.template import fill

_GRAD_VALUES = """
constexpr int VECTORS = $vectors;  // of dy in registers
// tokens of a panel, so that a bundle's columns fill 32 KB; cells of the panels that are made before they are used
constexpr int64_t WIDTH = (32 << 10) / sizeof(cell) / BUNDLE_COLUMNS, SCRATCH_CELLS = (16 << 20) / sizeof(cell);

// sums of one bundle over one panel, for rows [first, last): to [.., row_kept]
INLINE void add_bundle(const Call& call, const cell* x, const cell* dy, int64_t used, int64_t first, int64_t last,
                       int64_t column, bool add, float* to) {
  constexpr bundle INDEX = (bundle(1) << INDEX_BITS) - 1;
  const int64_t row_kept = kept_of(call.in), row_bytes = index_bytes(call.in);
  const int64_t kept = kept_of(column), byte = kept * INDEX_BITS / 8;
  x += column * WIDTH;
  for (int64_t row = first; row < last; ++row) {
    const cell* dy_row = dy + (row - first) * WIDTH;
    const uint8_t* at_indices = call.indices + row * row_bytes + byte;
    bundle b = row_bytes - byte >= BUNDLE_BYTES ? load_bundle(at_indices) : load_bundle(at_indices, row_bytes - byte);
    float* out = to + (row - first) * row_kept + kept;
    for (int pass = 0; pass < BUNDLE; pass += LANES) {
      vec total[LANES];
      UNROLL for (int k = 0; k < LANES; ++k) total[k] = vec{};
      for (int64_t t = 0; t < used; t += VECTORS * CELLS) {
        cells some[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; ++j) some[j] = load_cells(dy_row + t + j * CELLS);
        UNROLL for (int part = 0; part < LANES; part += 4) {
          const cell* at[4];
          UNROLL for (int k = 0; k < 4; ++k) {
            const int place = part + k;
            at[k] = x + t + ((pass + place) / N * M + int64_t(b >> (INDEX_BITS * place) & INDEX)) * WIDTH;
          }
          UNROLL for (int j = 0; j < VECTORS; ++j)
            UNROLL for (int k = 0; k < 4; ++k)
              total[part + k] = multiply_cells(some[j], load_cells(at[k] + j * CELLS), total[part + k]);
        }
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
  const element* dy = static_cast<const element*>(call.dy) + begin;
  const int64_t padded = up_to(call.in, 64), rows = end - begin, padded_rows = up_to(rows, 64);
  const int64_t panels = (call.tokens + WIDTH - 1) / WIDTH, size = (padded + padded_rows) * WIDTH;
  const int64_t at_once = least(panels, most(1, SCRATCH_CELLS / size)), row_kept = kept_of(call.in);
  Scratch scratch(at_once * size);
  if (!scratch.get) return 1;
  cell* panel = reinterpret_cast<cell*>(scratch.get);
  for (int64_t from = 0; from < panels; from += at_once) {
    const int64_t now = least(at_once, panels - from), groups = (padded + padded_rows) / 64;
    parallel(call, now * groups, (1 << 14) / (64 * WIDTH), [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job) {
        const int64_t p = job / groups, c = job % groups * 64, token = (from + p) * WIDTH;
        const int64_t some = least(WIDTH, call.tokens - token);
        cell* here = panel + p * size;
        if (c < padded) make_panel(x + token * call.x_stride, call.x_stride, some, call.in, c, c + 64, WIDTH, here);
        else
          make_panel(dy + token * call.dy_stride, call.dy_stride, some, rows, c - padded, c - padded + 64, WIDTH,
                     here + padded * WIDTH);
      }
    });
    constexpr int64_t PIECE = 256;  // rows whose sums stay in the cache while the panels pass
    const int64_t grain = (1 << 14) / most(1, row_kept * now * WIDTH / LANES);
    parallel(call, (rows + 15) / 16, grain, [&](int64_t first, int64_t last) {
      const int64_t stop = least(last * 16, rows);
      for (int64_t row = first * 16; row < stop; row += PIECE)
        for (int64_t column = 0; column < call.in; column += BUNDLE_COLUMNS)
          for (int64_t p = 0; p < now; ++p) {
            const cell* here = panel + p * size;
            const int64_t used = least(WIDTH, up_to(call.tokens - (from + p) * WIDTH, VECTORS * CELLS));
            add_bundle(call, here, here + (padded + row) * WIDTH, used, begin + row, begin + least(row + PIECE, stop),
                       column, from + p > 0, to + row * row_kept);
          }
    });
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


def grad_values(instruction_set: InstructionSet, dtype: str, *, pairs: bool) -> str:
    """The gradient of kept values, after ``panels.make_panel``."""
    run = _DIRECT if dtype == "float32" else _CONVERTED
    vectors = (4 if pairs else 8) if instruction_set.registers >= 32 else 2
    return fill(_GRAD_VALUES, vectors=str(vectors), run=run) + "\n"

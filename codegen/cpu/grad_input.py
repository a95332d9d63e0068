"""C++ for the gradient of a linear's input: the product for many tokens, with the weight transposed on the way.

    W^{R,C}       [out, in], N:M along in, and along out after its column mask: at most N of M rows of a column are kept
    transposed    values [bundles, in, 16] and packed indices, a bundle for the 32 or 64 rows of W that it is made from

Nothing is kept from step to step: M rows of some columns are expanded, and each column takes the first rows that hold
something. That reads and writes the values once, in streams (a store into each column's row took three times as long
on Sapphire Rapids), a small share of the product, and is exact whatever the optimizer did.
Without a column mask, or if a column keeps more than N of M rows, every kept value is added to the row of dx^T that it
belongs to, which takes a store for every product.
"""

from __future__ import annotations

from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.template import fill

_GRAD_INPUT = """
// bit i of `bits` at the place of the i-th bit of `mask`
INLINE unsigned deposit(unsigned bits, unsigned mask) {
  $deposit
}

// the columns that rows keep, LANES of them from `column` on: a mask, and the values at their places
struct Rows {
  const element* values;
  const uint8_t* column_mask;
  int64_t in, row_kept, mask_bytes;

  unsigned keeps(int64_t row, int64_t column, const uint8_t* masks) const {
    unsigned mask = 0;
    memcpy(&mask, masks + column % BLOCK / 8, LANES / 8);
    if (in - column < LANES) mask &= (1u << (in - column)) - 1;
    if (!column_mask) return mask;
    const int64_t kept = kept_of(column);
    const unsigned bits = unsigned(column_mask[row * mask_bytes + kept / 8]) >> (kept % 8);
    return deposit(bits & ((1u << KEPT) - 1), mask);
  }
  vec at(int64_t row, int64_t column, const uint8_t* masks) const {
    const element* from = values + row * row_kept + kept_of(column);
    if (in - column >= LANES) return expand(from, masks + column % BLOCK / 8);
    element rest[KEPT];
    memset(rest, 0, sizeof rest);
    memcpy(rest, from, size_t(kept_of(in - column)) * sizeof(element));
    return expand(rest, masks + column % BLOCK / 8);
  }
};

// columns [begin, end) of W^T, N:M along `out`, as values [bundles, columns, BUNDLE] and packed indices
// [bundles, columns, BUNDLE_BYTES], which are written in one stream; whether some group keeps more than N
bool transpose_weight(const Call& call, int64_t begin, int64_t end, int64_t columns, element* values,
                      uint8_t* indices) {
  const int64_t row_bytes = index_bytes(call.in);
  const Rows rows{static_cast<const element*>(call.values), call.column_mask, call.in, kept_of(call.in),
                  (kept_of(call.in) + 7) / 8};
  alignas(64) uint8_t masks[BUNDLE_COLUMNS][BLOCK / 8];
  lane_set too_many{};
  for (int64_t first = 0; first < call.out; first += BUNDLE_COLUMNS) {
    const int64_t many = least(BUNDLE_COLUMNS, call.out - first);
    for (int64_t column = begin; column < end; column += LANES) {
      if (column == begin || column % BLOCK == 0) {
        const int64_t from = kept_of(column / BLOCK * BLOCK) * INDEX_BITS / 8;
        for (int64_t r = 0; r < many; ++r)
          make_masks(call.indices + (first + r) * row_bytes + from, row_bytes - from, masks[r]);
      }
      vec kept_values[BUNDLE];
      words packed[2] = {};
      for (int group = 0; group < BUNDLE / N; ++group) {
        lane_set left[M];
        vec row_values[M];
        for (int r = 0; r < M; ++r) {
          const int64_t row = group * M + r;
          left[r] = lanes_of(row < many ? rows.keeps(first + row, column, masks[row]) : 0);
          row_values[r] = row < many ? rows.at(first + row, column, masks[row]) : vec{};
        }
        for (int s = 0; s < N; ++s) {
          lane_set done{};
          vec value{};
          words place{};
          for (int r = 0; r < M; ++r) {  // each column takes the first row that is left
            const lane_set take = left[r] & ~done;
            value = blend(take, row_values[r], value);
            place = blend(take, words{} + unsigned(r), place);
            left[r] &= ~take;
            done |= take;
          }
          const int at = group * N + s, bit = at * INDEX_BITS;
          kept_values[at] = value;
          packed[bit / 32] |= place << unsigned(bit % 32);
        }
        for (int r = 0; r < M; ++r) too_many |= left[r];
      }
      for (int part = 0; part < BUNDLE; part += LANES) transpose(kept_values + part);
      for (int i = 0; i < least(LANES, end - column); ++i) {
        const int64_t at = first / BUNDLE_COLUMNS * columns + column - begin + i;
        for (int part = 0; part < BUNDLE; part += LANES) store(values + at * BUNDLE + part, kept_values[part + i]);
        const uint32_t word[2] = {packed[0][i], packed[1][i]};
        memcpy(indices + at * BUNDLE_BYTES, word, BUNDLE_BYTES);
      }
    }
  }
  return any(too_many);
}

// W itself: every kept value adds to the row of dx^T at its index.
struct Scatter {
  Rows rows;
  const uint8_t* indices;
  int64_t out;

  template <int VECTORS>
  void run(const cell* panel, const float*, int64_t first, int64_t last, float* sums) const {
    constexpr int64_t WIDTH = VECTORS * LANES;
    constexpr int64_t COLUMNS = most(1, (8 << 10) / WIDTH / BUNDLE_COLUMNS) * BUNDLE_COLUMNS;
    const int64_t row_bytes = index_bytes(rows.in);
    memset(sums, 0, size_t((last - first) * WIDTH) * sizeof(float));
    for (int64_t block = first; block < last; block += COLUMNS)
      for (int64_t row = 0; row < out; ++row) {
        vec dy[VECTORS];
        for (int j = 0; j < VECTORS; ++j) dy[j] = load_part(panel + row * WIDTH, j);
        for (int64_t column = block; column < least(block + COLUMNS, last); column += BUNDLE_COLUMNS) {
          const int64_t kept = kept_of(column), byte = kept * INDEX_BITS / 8;
          const int64_t count = least(BUNDLE, rows.row_kept - kept);
          const element* from = rows.values + row * rows.row_kept + kept;
          const bundle b = load_bundle(indices + row * row_bytes + byte, row_bytes - byte);
          unsigned survive = 0xffff;
          if (rows.column_mask)
            memcpy(&survive, rows.column_mask + row * rows.mask_bytes + kept / 8, size_t((count + 7) / 8));
          for (int k = 0; k < count; ++k) {
            if (!(survive >> k & 1)) continue;
            constexpr bundle INDEX = (bundle(1) << INDEX_BITS) - 1;
            float* at = sums + (column - first + k / N * M + int64_t(b >> (INDEX_BITS * k) & INDEX)) * WIDTH;
            const vec value = splat(number(from[k]));
            for (int j = 0; j < VECTORS; ++j)
              store(at + j * LANES, multiply_add(value, dy[j], load(at + j * LANES)));
          }
        }
      }
  }
};

// the product as one of dy [tokens, out] with a weight [in, out]
int run(const Call& call) {
  const element* dy = static_cast<const element*>(call.x);
  Call product = call;
  product.in = call.out;
  product.out = call.in;
  product.bias = nullptr;
  product.rank = 0;
  bool whole = call.column_mask && call.out % M == 0;
  if (whole) {
    const int64_t bundles = bundles_of(call.out);
    const int64_t slab = least(call.in, most(1, (4 << 20) / (bundles * BUNDLE) / 64) * 64);
    Scratch turned_values(slab * bundles * BUNDLE * int64_t(sizeof(element)) / 4);
    Scratch turned_indices(slab * bundles * BUNDLE_BYTES / 4);
    if (!turned_values.get || !turned_indices.get) return 1;
    element* turned = reinterpret_cast<element*>(turned_values.get);
    uint8_t* packed = reinterpret_cast<uint8_t*>(turned_indices.get);
    for (int64_t begin = 0; whole && begin < call.in; begin += slab) {
      const int64_t end = least(begin + slab, call.in), groups = (end - begin + 63) / 64;
      int too_many = 0;
      parallel(call, groups, (1 << 14) / (64 * call.out), [&](int64_t first, int64_t last) {
        const int64_t from = begin + first * 64, to = least(begin + last * 64, end);
        if (transpose_weight(call, from, to, end - begin, turned + (from - begin) * BUNDLE,
                             packed + (from - begin) * BUNDLE_BYTES))
          __atomic_store_n(&too_many, 1, __ATOMIC_RELAXED);
      });
      whole = !too_many;
      if (!whole) break;
      product.y = static_cast<element*>(call.y) + begin;
      const Gather weight{turned, packed, nullptr, call.out, 0, BUNDLE, (end - begin) * BUNDLE, BUNDLE_BYTES,
                          (end - begin) * BUNDLE_BYTES};
      if (int failed = panel_product(product, weight, dy, call.x_stride, call.out, end - begin)) return failed;
    }
  }
  if (whole) return 0;
  product.y = call.y;
  const Rows rows{static_cast<const element*>(call.values), call.column_mask, call.in, kept_of(call.in),
                  (kept_of(call.in) + 7) / 8};
  return panel_product(product, Scatter{rows, call.indices, call.out}, dy, call.x_stride, call.out, call.in);
}

// the product of no rows is zero
int empty(const Call& call) {
  memset(call.y, 0, size_t(call.tokens * call.in) * sizeof(element));
  return 0;
}
"""

_DEPOSIT = """
unsigned result = 0;
for (; mask; mask &= mask - 1, bits >>= 1)
  if (bits & 1) result |= mask & -mask;
return result;
"""


def grad_input(instruction_set: InstructionSet) -> str:
    """The gradient of the input, after the parts of ``panels`` and ``expand.steps``."""
    deposit = "return _pdep_u32(bits, mask);" if instruction_set.flags else _DEPOSIT
    return fill(_GRAD_INPUT, deposit=deposit) + "\n"

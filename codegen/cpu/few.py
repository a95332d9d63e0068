"""C++ for few tokens: rows of the weight are read once, for all tokens at once, as fast as memory gives them.

    chunk     rows of the weight that a thread takes, 8 tokens at a time; the second time they come out of the cache
    x         copied to floats where a kernel needs that, zeros after its end
    sums      [tokens, rows of a chunk] in float, which `finish` makes results of

How some rows and tokens are multiplied is in `gather` (x is picked from) and, portable, in `expand` (of the weight).
"""

from __future__ import annotations

from types import ModuleType

from fxsparse.codegen.cpu import expand, gather
from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.template import fill

_INPUTS = """
constexpr int CHUNK = 48;           // rows of the weight that a thread takes at once
constexpr int STRIDE = CHUNK + 16;  // sums of a token: of a chunk, and of rows that are computed with its last ones

// x as multiply_rows reads it: rows of whole steps, zeros after the end
struct Inputs {
  const float* x;
  int64_t stride;
  const float* hidden;  // scale x down^T [tokens, rank]
  int64_t hidden_stride;
};

// where the values and indices of rows of the weight from `row` on begin; rows after the last are the last one again
template <int ROWS>
INLINE void find_rows(const Call& call, int64_t row, const element* (&values)[ROWS], const uint8_t* (&indices)[ROWS]) {
  for (int r = 0; r < ROWS; ++r) {
    const int64_t at = least(row + r, call.out - 1);
    values[r] = static_cast<const element*>(call.values) + at * kept_of(call.in);
    indices[r] = call.indices + at * index_bytes(call.in);
  }
}

// adds hidden up^T to the sums of some rows of the weight
template <int ROWS, int TOKENS>
INLINE void add_branch(const Call& call, const Inputs& inputs, int64_t token, int64_t row, float* sums) {
  if (!call.rank) return;
  for (int r = 0; r < ROWS; ++r) {
    const element* up = static_cast<const element*>(call.up) + least(row + r, call.out - 1) * call.rank;
    vec total[TOKENS] = {};
    for (int64_t k = 0; k < call.rank; k += LANES) {
      const vec weight = call.rank - k >= LANES ? load(up + k) : load_first(up + k, call.rank - k);
      for (int t = 0; t < TOKENS; ++t)
        total[t] = multiply_add(weight, load(inputs.hidden + (token + t) * inputs.hidden_stride + k), total[t]);
    }
    for (int t = 0; t < TOKENS; ++t) sums[t * STRIDE + r] += sum(total[t]);
  }
}
"""

_PRODUCT = """
// rows [row, end) of the weight for TOKENS tokens, of which some exist
template <int ROWS, int TOKENS>
void multiply_chunk(const Call& call, const Inputs& inputs, int64_t token, int64_t row, int64_t end) {
  alignas(64) float sums[TOKENS * STRIDE + 2 * LANES];
  for (int64_t r = row; r < end; r += ROWS) multiply_rows<ROWS, TOKENS>(call, inputs, token, r, sums + r - row);
  for (int t = 0; t < least(TOKENS, call.tokens - token); ++t)
    finish(call, sums + t * STRIDE, token + t, row, end - row);
}

// scale x down^T in float, a dense product of few rows
INLINE void make_hidden(const Call& call, float* hidden, int64_t width) {
  const int64_t rank = call.rank;
  parallel(call, rank, 1 + (1 << 15) / most(1, call.in * call.tokens), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const element* down = static_cast<const element*>(call.down) + k * call.in;
      for (int64_t t = 0; t < call.tokens; ++t) {
        const element* x = static_cast<const element*>(call.x) + t * call.x_stride;
        vec total{};
        int64_t i = 0;
        for (; i + LANES <= call.in; i += LANES) total = multiply_add(load(down + i), load(x + i), total);
        const int64_t left = call.in - i;
        if (left) total = multiply_add(load_first(down + i, left), load_first(x + i, left), total);
        hidden[t * width + k] = sum(total) * float(call.scale);
      }
    }
  });
}

// the number of tokens that the last ones are computed as: 1, 2, 4 or 8
INLINE constexpr int64_t rounded(int64_t tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

// all tokens of a call, at most 8 at a time; a chunk of the weight's rows stays in the cache meanwhile
int few_tokens(const Call& call) {
  const int64_t padded = up_to(call.in, STEP), width = up_to(call.rank, LANES);
  const int64_t tokens = call.tokens / 8 * 8 + rounded(call.tokens % 8);
  const bool copies = COPIES || padded != call.in || tokens != call.tokens;
  Scratch x_scratch(copies ? tokens * padded : 0), hidden(tokens * width);
  if (!x_scratch.get || !hidden.get) return 1;
  Inputs inputs{static_cast<const float*>(call.x), call.x_stride, hidden.get, width};
  if (copies) {
    float* to = x_scratch.get;
    for (int64_t t = 0; t < tokens; ++t) {
      const element* from = static_cast<const element*>(call.x) + least(t, call.tokens - 1) * call.x_stride;
      copy_row(from, call.in, padded, to + t * padded);
    }
    inputs.x = to;
    inputs.stride = padded;
  }
  if (call.rank) {
    memset(hidden.get, 0, size_t(tokens * width) * sizeof(float));
    make_hidden(call, hidden.get, width);
  }
  const int64_t work = CHUNK * kept_of(call.in) * call.tokens;
  parallel(call, (call.out + CHUNK - 1) / CHUNK, (1 << 15) / most(1, work), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = chunk * CHUNK, last = least(row + CHUNK, call.out);
      for (int64_t t = 0; t < call.tokens; t += 8) {
        switch (rounded(least(call.tokens - t, 8))) {
          $cases
        }
      }
    }
  });
  return 0;
}
"""


def way(instruction_set: InstructionSet) -> ModuleType:
    """How some rows and tokens are multiplied: ``gather`` or ``expand``."""
    return gather if instruction_set.flags else expand


def few(instruction_set: InstructionSet, dtype: str, n: int, m: int) -> str:
    """Everything of a product for few tokens; the last function is ``few_tokens``."""
    chosen = way(instruction_set)
    cases = [
        f"case {tokens}:\n  multiply_chunk<{chosen.rows_of(tokens, instruction_set)}, {tokens}>"
        "(call, inputs, t, row, last);\n  break;"
        for tokens in (1, 2, 4, 8)
    ]
    rows = chosen.rows(instruction_set, dtype, n, m)
    return "\n".join((_INPUTS, rows, fill(_PRODUCT, cases="\n".join(cases)))) + "\n"

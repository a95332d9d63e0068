"""What every C++ kernel begins with: the call, the N:M weight, scratch memory, threads, and the last step of a product.

A kernel is one function, ``int fxsparse_kernel(const Call*)``; it returns 0, or 1 if there was no memory. It knows
nothing of torch: whoever calls it hands it a function that runs ranges on threads (``at::parallel_for``).
"""

from __future__ import annotations

import math

from fxsparse.codegen.epilogue import GATED, Epilogue
from fxsparse.codegen.template import fill
from fxsparse.errors import OptionError

OPERANDS = 2
"""Most tensors that the steps of an epilogue take."""

CALL = """
// What a kernel is called with. Matrices are row-major; x and dy have rows of any stride, the others are contiguous.
struct Call {
  const void* x;         // [tokens, in]; of the gradient of the input, dy [tokens, out]
  const void* dy;        // [tokens, out], of the gradient of the values
  const void* values;    // [out, in * N / M]
  const uint8_t* indices;
  const uint8_t* column_mask;
  const void* bias;      // [out]
  const void* down;      // [rank, in]
  const void* up;        // [out, rank]
  const void* operands[2];
  void* y;
  int64_t x_stride, dy_stride;
  int64_t tokens, in, out, rank;
  int64_t few, vectors, rows;  // of the tile
  double scale;
  int64_t threads;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};
"""

WEIGHT = """
// $n of every $m consecutive weights of a row are kept; a packed index has $bits bits.
constexpr int N = $n, M = $m, INDEX_BITS = $bits;
constexpr int BUNDLE = 16;                           // kept values that are taken at once
constexpr int BUNDLE_COLUMNS = BUNDLE / N * M;       // of this many columns
constexpr int BUNDLE_BYTES = BUNDLE * INDEX_BITS / 8;
using bundle = $bundle;                         // their packed indices

INLINE constexpr int64_t kept_of(int64_t columns) { return columns / M * N; }
INLINE constexpr int64_t bundles_of(int64_t columns) { return (columns + BUNDLE_COLUMNS - 1) / BUNDLE_COLUMNS; }
INLINE constexpr int64_t index_bytes(int64_t columns) { return (kept_of(columns) * INDEX_BITS + 7) / 8; }

INLINE bundle load_bundle(const uint8_t* p) {
  bundle b;
  memcpy(&b, p, sizeof b);
  return b;
}
// the packed indices of a bundle at the end of a row, of which this many bytes exist
INLINE bundle load_bundle(const uint8_t* p, int64_t bytes) {
  bundle b = 0;
  memcpy(&b, p, bytes < BUNDLE_BYTES ? size_t(bytes) : size_t(BUNDLE_BYTES));
  return b;
}
"""

THREADS = """
// runs body(begin, end) for parts of [0, count), each of at least `grain`
template <class Body>
INLINE void parallel(const Call& call, int64_t count, int64_t grain, Body body) {
  auto run = [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); };
  if (count > 0) call.parallel_for(0, count, grain < 1 ? 1 : grain, run, &body);
}

// floats for the time of a call; `get` is null if there is no memory
struct Scratch {
  float* get;
  explicit Scratch(int64_t count)
      : get(static_cast<float*>(aligned_alloc(64, (size_t(count) * sizeof(float) + 127) / 64 * 64))) {}
  ~Scratch() { free(get); }
  Scratch(const Scratch&) = delete;
};

INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE constexpr int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
"""

_EXP = """
// e^x, relative error below 2e-7
INLINE vec exp(vec x) {
  const vec low = splat(-87.3f), high = splat(88.7f);
  words is_nan = words(x != x);
  vec kept = x;
  x = x < low ? low : x;
  x = x > high ? high : x;
  vec n = x * 1.44269504f + 12582912.0f;  // the whole number is left in the lowest bits
  words power = words(n) - 0x4b400000u;
  n = n - 12582912.0f;
  x = x - n * 0.693145752f - n * 1.42860677e-6f;
  vec p = multiply_add(splat(1.9875692e-4f), x, splat(1.3981999e-3f));
  p = multiply_add(p, x, splat(8.3334519e-3f));
  p = multiply_add(p, x, splat(4.1665796e-2f));
  p = multiply_add(p, x, splat(1.6666667e-1f));
  p = multiply_add(p, x, splat(0.5f));
  p = multiply_add(p * x, x, x) + 1.0f;
  vec result = vec(words(p) + (power << 23));
  return vec((words(kept) & is_nan) | (words(result) & ~is_nan));
}
"""

_ERF = """
// Abramowitz and Stegun 7.1.26, absolute error below 5e-7
INLINE vec erf(vec x) {
  words sign = words(x) & 0x80000000u;
  vec a = vec(words(x) & 0x7fffffffu);
  vec t = 1.0f / (1.0f + 0.3275911f * a);
  vec p = multiply_add(splat(1.061405429f), t, splat(-1.453152027f));
  p = multiply_add(p, t, splat(1.421413741f));
  p = multiply_add(p, t, splat(-0.284496736f));
  p = multiply_add(p, t, splat(0.254829592f));
  return vec(words(1.0f - p * t * exp(-a * a)) | sign);
}
"""

_EXPRESSIONS = {
    "gelu": f"0.5f * t * (1.0f + erf(t * {math.sqrt(0.5)!r}f))",
    "gelu_tanh": f"t * (1.0f - 1.0f / (exp({2 * math.sqrt(2 / math.pi)!r}f * (t + 0.044715f * t * t * t)) + 1.0f))",
    "relu": "t < 0.0f ? vec{} : t",  # a NaN stays one
    "silu": "t / (1.0f + exp(-t))",
    "tanh": "1.0f - 2.0f / (exp(2.0f * t) + 1.0f)",
}
_OPERATORS = {"mul": "*", "add": "+"}

_FINISH = """
// $formula: what becomes of `count` neighbouring sums of a token, from output column `column` on
INLINE void finish(const Call& call, const float* from, int64_t token, int64_t column, int64_t count) {
  constexpr int SHRINK = $shrink;
  const int64_t width = call.out / SHRINK;
  const element* bias = static_cast<const element*>(call.bias);
  element* y = static_cast<element*>(call.y) + token * width + column / SHRINK;
  $operands
  if (bias) bias += column;
  for (int64_t i = 0; i < count / SHRINK; i += LANES) {
    const int64_t left = count / SHRINK - i;
    $step
    if (left >= LANES) store(y + i, t);
    else store_first(y + i, t, left);
  }
}
"""

_PLAIN = """
vec t = load(from + i);
if (bias) t = t + (left >= LANES ? load(bias + i) : load_first(bias + i, left));
"""

_GATED = """
vec first = load(from + 2 * i), second = load(from + 2 * i + LANES), t, other;
if (bias) {
  const int64_t columns = 2 * left;
  first = first + (columns >= LANES ? load(bias + 2 * i) : load_first(bias + 2 * i, columns));
  if (columns > LANES) {
    const element* rest = bias + 2 * i + LANES;
    second = second + (columns >= 2 * LANES ? load(rest) : load_first(rest, columns - LANES));
  }
}
pairs(first, second, t, other);
t = $gate;
t = t * other;
"""


def check_epilogue(epilogue: Epilogue) -> None:
    """Refuses what the C++ kernels cannot do.

    Raises:
        OptionError: the steps take more tensors than a call has places for.
    """
    if epilogue.operands > OPERANDS:
        raise OptionError(f"a kernel for a CPU takes {OPERANDS} tensors in its epilogue, {epilogue} takes more")


def weight(n: int, m: int, index_bits: int) -> str:
    """Constants of an N:M weight."""
    return fill(WEIGHT, n=str(n), m=str(m), bits=str(index_bits), bundle=f"uint{16 * index_bits}_t")


def finish(epilogue: Epilogue, product: str) -> str:
    """The function that turns sums into results: bias, gate, pointwise steps, conversion."""
    steps = epilogue.steps
    gated = bool(steps) and steps[0].startswith(GATED)
    lines = [_GATED.replace("$gate", _EXPRESSIONS[epilogue.gate]) if gated else _PLAIN]
    operands: list[str] = []
    for step in steps[gated:]:
        if step in _OPERATORS:
            name = f"operand{len(operands)}"
            operands.append(
                f"const element* {name} = static_cast<const element*>(call.operands[{len(operands)}])"
                " + token * width + column / SHRINK;"
            )
            loaded = f"(left >= LANES ? load({name} + i) : load_first({name} + i, left))"
            lines.append(f"t = t {_OPERATORS[step]} {loaded};")
        else:
            lines.append(f"t = {_EXPRESSIONS[step]};")
    text = "".join(lines)
    return (
        (_EXP if "exp(" in text or "erf(" in text else "")
        + (_ERF if "erf(" in text else "")
        + "\n"
        + fill(
            _FINISH,
            formula=Epilogue(True, steps).formula(product),
            shrink="2" if gated else "1",
            operands="\n".join(operands),
            step=text,
        )
        + "\n"
    )

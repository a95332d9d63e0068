// Calls three kernels on random products whose buffers end where their data ends, and compares with sums in double.
// Built by test_sanitizers.py together with the kernels, under AddressSanitizer and UndefinedBehaviorSanitizer.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

struct Call {
  const void *x, *dy, *values;
  const uint8_t *indices, *column_mask;
  const void *bias, *down, *up, *operands[2];
  void* y;
  int64_t x_stride, dy_stride, tokens, in, out, rank, few, vectors, rows;
  double scale;
  int64_t threads;
  void (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
};

extern "C" int linear(const Call*);
extern "C" int grad_input(const Call*);
extern "C" int grad_values(const Call*);

static void two_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = (begin + end) / 2;
  std::thread other([&] { body(begin, middle, context); });
  if (middle < end) body(middle, end, context);
  other.join();
}

static uint64_t state = 1;
static uint32_t draw() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 33);
}

// exactly as many bytes as are needed, so that any access beyond them is seen
template <class T>
std::unique_ptr<T[]> make(int64_t count) { return std::unique_ptr<T[]>(new T[size_t(count)]()); }

static std::unique_ptr<float[]> random_floats(int64_t count) {
  auto p = make<float>(count);
  for (int64_t i = 0; i < count; ++i) p[i] = float(draw() % 2001) / 1000 - 1;
  return p;
}

static void expect(double wanted, float got, const char* what) {
  if (std::fabs(wanted - got) > 1e-3) {
    std::printf("%s: %g instead of %g\n", what, double(got), wanted);
    std::exit(1);
  }
}

// the columns of 2:4 that a row keeps
static void product(int64_t tokens, int64_t in, int64_t out, int64_t rank, bool masked) {
  const int64_t kept = in / 2, bytes = (kept + 3) / 4, mask_bytes = (kept + 7) / 8;
  auto x = random_floats(tokens * in), dy = random_floats(tokens * out), values = random_floats(out * kept);
  auto bias = random_floats(out), down = random_floats(rank * in), up = random_floats(out * rank);
  auto indices = make<uint8_t>(out * bytes), mask = make<uint8_t>(out * mask_bytes);
  std::vector<double> dense(size_t(out * in)), pruned(size_t(out * in));
  for (int64_t group = 0; group < in / 4; ++group)
    for (int64_t o = 0; o < out; ++o) {
      const int first = int(draw() % 3), second = first + 1 + int(draw() % unsigned(3 - first));
      const int places[2] = {first, second};
      for (int k = 0; k < 2; ++k) {
        const int64_t at = group * 2 + k, column = group * 4 + places[k];
        indices[o * bytes + at / 4] |= uint8_t(places[k] << (at % 4 * 2));
        dense[o * in + column] = values[o * kept + at];
        int64_t above = 0;  // rows of the same four that keep this column already
        for (int64_t other = o / 4 * 4; other < o; ++other) above += pruned[other * in + column] != 0;
        if (above < 2) {
          pruned[o * in + column] = values[o * kept + at];
          mask[o * mask_bytes + at / 8] |= uint8_t(1 << (at % 8));
        }
      }
    }

  Call call{};
  call.values = values.get();
  call.indices = indices.get();
  call.threads = 2;
  call.parallel_for = two_threads;
  call.tokens = tokens;
  call.in = in;
  call.out = out;
  call.few = 12;
  call.vectors = 8;
  call.rows = 256;

  auto y = make<float>(tokens * out);
  call.x = x.get();
  call.x_stride = in;
  call.bias = bias.get();
  call.y = y.get();
  call.rank = rank;
  call.down = down.get();
  call.up = up.get();
  call.scale = 0.5;
  if (linear(&call)) std::exit(2);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < out; ++o) {
      double wanted = bias[o];
      for (int64_t i = 0; i < in; ++i) wanted += dense[o * in + i] * x[t * in + i];
      for (int64_t r = 0; r < rank; ++r) {
        double hidden = 0;
        for (int64_t i = 0; i < in; ++i) hidden += double(down[r * in + i]) * x[t * in + i];
        wanted += 0.5 * hidden * up[o * rank + r];
      }
      expect(wanted, y[t * out + o], "linear");
    }

  auto dx = make<float>(tokens * in);
  call.x = dy.get();
  call.x_stride = out;
  call.column_mask = masked ? mask.get() : nullptr;
  call.y = dx.get();
  if (grad_input(&call)) std::exit(2);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < in; ++i) {
      double wanted = 0;
      for (int64_t o = 0; o < out; ++o) wanted += (masked ? pruned : dense)[o * in + i] * dy[t * out + o];
      expect(wanted, dx[t * in + i], "gradient of the input");
    }

  auto dv = make<float>(out * kept);
  call.x = x.get();
  call.x_stride = in;
  call.dy = dy.get();
  call.dy_stride = out;
  call.y = dv.get();
  if (grad_values(&call)) std::exit(2);
  for (int64_t o = 0; o < out; ++o)
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t column = k / 2 * 4 + (indices[o * bytes + k / 4] >> (k % 4 * 2) & 3);
      double wanted = 0;
      for (int64_t t = 0; t < tokens; ++t) wanted += double(dy[t * out + o]) * x[t * in + column];
      expect(wanted, dv[o * kept + k], "gradient of the values");
    }
}

int main() {
  product(1, 4, 1, 1, false);
  product(1, 1028, 52, 3, true);
  product(3, 36, 12, 2, true);
  product(8, 64, 48, 16, false);
  product(11, 100, 7, 0, false);
  product(17, 132, 100, 5, true);
  product(61, 76, 68, 20, true);
  product(129, 260, 36, 1, true);
  product(150, 40, 9, 0, false);
  std::puts("right");
}

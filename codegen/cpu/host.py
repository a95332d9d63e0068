"""The door from torch to the kernels: operators in C++ that allocate the result and call a kernel by its number.

    fxsparse_cpu::linear(x, values, indices, bias?, kernel) -> y
    fxsparse_cpu::linear_with(x, values, indices, bias?, down?, up?, operand0?, operand1?, scale, kernel) -> y
    fxsparse_cpu::grad_input(dy, values, indices, column_mask?, kernel) -> dx
    fxsparse_cpu::grad_values(dy, x, indices, kernel) -> dv
    fxsparse_cpu::values(weight, indices, n, m) -> values
    fxsparse_cpu::spread(values, indices, in_features, n, m) -> weight

``kernel`` is ``CPUSpec.id``, which is the same in every process, so a compiled graph may hold it. They are written
against torch's stable interface: built in a second, and called for 2.9 us where ``aten.linear`` costs 2.3, a Python
function behind a ``custom_op`` 28 (two tokens of 16 numbers). Graphs of Inductor call kernels in a shorter way, without
the dispatcher (`extern`).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fxsparse.codegen.cpu import build
from fxsparse.codegen.cpu.common import CALL

NAMESPACE = "fxsparse_cpu"

_HOST = """/* The operators that call kernels for a CPU.

Made by fxsparse.codegen.cpu
*/

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>

using torch::stable::Tensor;

$call

namespace {

struct Kernel {
  int (*run)(const Call*);
  int64_t n, m, shrink, dtype, few, vectors, rows;
  std::atomic<int64_t> launches{0};
};

std::shared_mutex lock;
std::unordered_map<int64_t, std::unique_ptr<Kernel>> kernels;

Kernel* loaded(int64_t id) {
  std::shared_lock<std::shared_mutex> reading(lock);
  auto found = kernels.find(id);
  return found == kernels.end() ? nullptr : found->second.get();
}

Kernel& find(int64_t id) {
  Kernel* kernel = loaded(id);
  STD_TORCH_CHECK(kernel, "fxsparse: kernel ", id, " is not loaded in this process");
  return *kernel;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch_parallel_for(begin, end, grain, body, context);
}

// A tensor whose leading dimensions are rows of one stride, its last dimension dense; copied where it is not.
struct Rows {
  std::optional<Tensor> copy;
  const void* data;
  int64_t rows = 1, columns, stride;

  explicit Rows(const Tensor& given) {
    const auto sizes = given.sizes();
    const auto strides = given.strides();
    const size_t last = sizes.size() - 1;
    columns = sizes[last];
    stride = last ? strides[last - 1] : columns;
    bool regular = strides[last] == 1 || columns <= 1;
    for (size_t d = 0; d < last; ++d) {
      rows *= sizes[d];
      regular &= d + 1 == last || sizes[d] <= 1 || strides[d] == strides[d + 1] * sizes[d + 1];
    }
    if (!regular && rows && columns) {
      copy = torch::stable::contiguous(given);
      stride = columns;
    }
    data = copy ? copy->data_ptr() : given.data_ptr();
  }
};

// A dense tensor: the one that is given, or a copy of it.
struct Dense {
  std::optional<Tensor> copy;
  const void* data = nullptr;

  explicit Dense(const Tensor& given) {
    if (!given.is_contiguous()) copy = torch::stable::contiguous(given);
    data = copy ? copy->data_ptr() : given.data_ptr();
  }
  explicit Dense(const std::optional<Tensor>& given) {
    if (!given) return;
    if (!given->is_contiguous()) copy = torch::stable::contiguous(*given);
    data = copy ? copy->data_ptr() : given->data_ptr();
  }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
};

void check(const Kernel& kernel, const Tensor& x, int64_t kept, int64_t columns) {
  STD_TORCH_CHECK(int64_t(x.scalar_type()) == kernel.dtype, "fxsparse: the kernel is for another dtype");
  STD_TORCH_CHECK(kept * kernel.m == columns * kernel.n, "fxsparse: ", kept, " kept values do not fit ", columns,
                  " columns");
}

Tensor result(const Tensor& like, int64_t columns) {
  const auto sizes = like.sizes();
  if (sizes.size() == 2) return torch::stable::new_empty(like, {sizes[0], columns});
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = columns;
  return torch::stable::new_empty(like, shape);
}

int launch(Kernel& kernel, Call& call) {
  call.parallel_for = parallel_for;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  call.threads = threads;
  call.few = kernel.few;
  call.vectors = kernel.vectors;
  call.rows = kernel.rows;
  kernel.launches.fetch_add(1, std::memory_order_relaxed);
  return kernel.run(&call);
}

void run(Kernel& kernel, Call& call) { STD_TORCH_CHECK(launch(kernel, call) == 0, "fxsparse: out of memory"); }

Tensor multiply(Call& call, const Tensor& x, const Tensor& values, const Tensor& indices,
                const std::optional<Tensor>& bias, int64_t id) {
  Kernel& kernel = find(id);
  const Rows rows(x);
  const auto sizes = values.sizes();
  check(kernel, x, sizes[1], rows.columns);
  const Dense v(values), i(indices), b(bias);
  Tensor y = result(x, sizes[0] / kernel.shrink);
  call.x = rows.data;
  call.values = v.data;
  call.indices = i.bytes();
  call.bias = b.data;
  call.y = y.data_ptr();
  call.x_stride = rows.stride;
  call.tokens = rows.rows;
  call.in = rows.columns;
  call.out = sizes[0];
  run(kernel, call);
  return y;
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& indices, const std::optional<Tensor>& bias,
              int64_t id) {
  Call call{};
  return multiply(call, x, values, indices, bias, id);
}

Tensor linear_with(const Tensor& x, const Tensor& values, const Tensor& indices, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& down, const std::optional<Tensor>& up,
                   const std::optional<Tensor>& operand0, const std::optional<Tensor>& operand1, double scale,
                   int64_t id) {
  const Dense d(down), u(up), first(operand0), second(operand1);
  Call call{};
  call.down = d.data;
  call.up = u.data;
  call.operands[0] = first.data;
  call.operands[1] = second.data;
  call.rank = down ? down->size(0) : 0;
  call.scale = scale;
  return multiply(call, x, values, indices, bias, id);
}

Tensor grad_input(const Tensor& dy, const Tensor& values, const Tensor& indices,
                  const std::optional<Tensor>& column_mask, int64_t id) {
  Kernel& kernel = find(id);
  const Rows rows(dy);
  const int64_t columns = values.size(1) / kernel.n * kernel.m;
  check(kernel, dy, values.size(1), columns);
  STD_TORCH_CHECK(values.size(0) == rows.columns, "fxsparse: dy does not fit the weight");
  const Dense v(values), i(indices), mask(column_mask);
  Tensor dx = result(dy, columns);
  Call call{};
  call.x = rows.data;
  call.values = v.data;
  call.indices = i.bytes();
  call.column_mask = mask.bytes();
  call.y = dx.data_ptr();
  call.x_stride = rows.stride;
  call.tokens = rows.rows;
  call.in = columns;
  call.out = rows.columns;
  run(kernel, call);
  return dx;
}

Tensor grad_values(const Tensor& dy, const Tensor& x, const Tensor& indices, int64_t id) {
  Kernel& kernel = find(id);
  const Rows grads(dy), rows(x);
  const int64_t kept = rows.columns / kernel.m * kernel.n;
  check(kernel, x, kept, rows.columns);
  STD_TORCH_CHECK(grads.rows == rows.rows && indices.size(0) == grads.columns, "fxsparse: dy does not fit");
  const Dense i(indices);
  Tensor dv = torch::stable::new_empty(dy, {grads.columns, kept});
  Call call{};
  call.x = rows.data;
  call.dy = grads.data;
  call.indices = i.bytes();
  call.y = dv.data_ptr();
  call.x_stride = rows.stride;
  call.dy_stride = grads.stride;
  call.tokens = rows.rows;
  call.in = rows.columns;
  call.out = grads.columns;
  run(kernel, call);
  return dv;
}

// runs body(row) for every row of a matrix
template <class Body>
void for_rows(int64_t rows, int64_t columns, Body body) {
  auto run = [](int64_t begin, int64_t end, void* context) {
    for (int64_t row = begin; row < end; ++row) (*static_cast<Body*>(context))(row);
  };
  if (rows) torch_parallel_for(0, rows, 1 + (1 << 15) / (columns + 1), run, &body);
}

// calls at(kept, column) for the kept values of a row
template <int BITS, class At>
void for_kept(const uint8_t* indices, int64_t kept, int64_t n, int64_t m, At at) {
  constexpr int EACH = 8 / BITS;
  int64_t group = 0, in_group = 0;
  for (int64_t k = 0; k < kept; k += EACH) {
    unsigned byte = *indices++;
    const int64_t some = kept - k < EACH ? kept - k : EACH;
    for (int64_t i = 0; i < some; ++i, byte >>= BITS) {
      at(k + i, group + int64_t(byte & ((1 << BITS) - 1)));
      if (++in_group == n) in_group = 0, group += m;
    }
  }
}

// dense [rows, columns] and values [rows, kept], one made of the other
template <class T, bool SPREAD>
void convert(const Rows& from, void* to, const uint8_t* indices, int64_t columns, int64_t kept, int64_t n, int64_t m) {
  const int64_t bytes = (kept * (m <= 4 ? 2 : 4) + 7) / 8, width = SPREAD ? columns : kept;
  for_rows(from.rows, columns, [&](int64_t row) {
    const T* in = static_cast<const T*>(from.data) + row * from.stride;
    T* out = static_cast<T*>(to) + row * width;
    if (SPREAD) memset(out, 0, size_t(width) * sizeof(T));
    auto at = [&](int64_t k, int64_t column) {
      if (SPREAD) out[column] = in[k];
      else out[k] = in[column];
    };
    if (m <= 4) for_kept<2>(indices + row * bytes, kept, n, m, at);
    else for_kept<4>(indices + row * bytes, kept, n, m, at);
  });
}

template <bool SPREAD>
Tensor converted(const Tensor& given, const Tensor& indices, int64_t columns, int64_t kept, int64_t n, int64_t m) {
  const Rows from(given);
  const Dense i(indices);
  STD_TORCH_CHECK(from.columns == (SPREAD ? kept : columns) && indices.size(0) == from.rows &&
                      indices.size(1) == (kept * (m <= 4 ? 2 : 4) + 7) / 8,
                  "fxsparse: the indices do not fit");
  Tensor made = result(given, SPREAD ? columns : kept);
  if (given.element_size() == 4) convert<uint32_t, SPREAD>(from, made.data_ptr(), i.bytes(), columns, kept, n, m);
  else if (given.element_size() == 2) convert<uint16_t, SPREAD>(from, made.data_ptr(), i.bytes(), columns, kept, n, m);
  else STD_TORCH_CHECK(false, "fxsparse: values have 2 or 4 bytes");
  return made;
}

Tensor values(const Tensor& weight, const Tensor& indices, int64_t n, int64_t m) {
  return converted<false>(weight, indices, weight.size(1), weight.size(1) / m * n, n, m);
}

Tensor spread(const Tensor& values, const Tensor& indices, int64_t in_features, int64_t n, int64_t m) {
  return converted<true>(values, indices, in_features, values.size(1), n, m);
}

}  // namespace

// adds a kernel and returns where its launches are counted
extern "C" __attribute__((visibility("default"))) void* fxsparse_load(int64_t id, void* run, int64_t n, int64_t m,
                                                                      int64_t shrink, int64_t dtype, int64_t few,
                                                                      int64_t vectors, int64_t rows) {
  auto kernel = std::make_unique<Kernel>();
  kernel->run = reinterpret_cast<int (*)(const Call*)>(run);
  kernel->n = n;
  kernel->m = m;
  kernel->shrink = shrink;
  kernel->dtype = dtype;
  kernel->few = few;
  kernel->vectors = vectors;
  kernel->rows = rows;
  std::unique_lock<std::shared_mutex> writing(lock);
  return &kernels.emplace(id, std::move(kernel)).first->second->launches;
}

// for who calls kernels without these operators: a kernel, null if it is not loaded, and running it
extern "C" __attribute__((visibility("default"))) void* fxsparse_find(int64_t id) { return loaded(id); }
extern "C" __attribute__((visibility("default"))) int fxsparse_run(void* kernel, Call* call) {
  return launch(*static_cast<Kernel*>(kernel), *call);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse_cpu, library) {
  library.def("linear(Tensor x, Tensor values, Tensor indices, Tensor? bias, int kernel) -> Tensor");
  library.def(
      "linear_with(Tensor x, Tensor values, Tensor indices, Tensor? bias, Tensor? down, Tensor? up, Tensor? operand0, "
      "Tensor? operand1, float scale, int kernel) -> Tensor");
  library.def("grad_input(Tensor dy, Tensor values, Tensor indices, Tensor? column_mask, int kernel) -> Tensor");
  library.def("grad_values(Tensor dy, Tensor x, Tensor indices, int kernel) -> Tensor");
  library.def("values(Tensor weight, Tensor indices, int n, int m) -> Tensor");
  library.def("spread(Tensor values, Tensor indices, int in_features, int n, int m) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse_cpu, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_with", TORCH_BOX(&linear_with));
  library.impl("grad_input", TORCH_BOX(&grad_input));
  library.impl("grad_values", TORCH_BOX(&grad_values));
  library.impl("values", TORCH_BOX(&values));
  library.impl("spread", TORCH_BOX(&spread));
}
"""


@functools.cache
def host() -> ctypes.CDLL:
    """The library of the operators, built and loaded the first time it is asked for.

    Raises:
        BuildError: it cannot be built or loaded.
    """
    _, target = build.library("host", _HOST.replace("$call", CALL.strip()), torch_headers=True)
    loaded = build.load(target)
    loaded.fxsparse_load.argtypes = [ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 7]
    loaded.fxsparse_load.restype = ctypes.c_void_p
    _register_shapes()
    return loaded


def _register_shapes() -> None:
    """What the operators return, for tracers."""

    def product(x: Tensor, values: Tensor, *args: Any) -> Tensor:
        from fxsparse.codegen.cpu.loaded import by_id

        return x.new_empty(*x.shape[:-1], values.shape[0] // by_id(args[-1]).shrink)

    torch.library.register_fake(f"{NAMESPACE}::linear", product)
    torch.library.register_fake(f"{NAMESPACE}::linear_with", product)

    @torch.library.register_fake(f"{NAMESPACE}::grad_input")
    def _(dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, kernel: int) -> Tensor:
        from fxsparse.codegen.cpu.loaded import by_id

        spec = by_id(kernel).spec
        return dy.new_empty(*dy.shape[:-1], values.shape[1] // spec.n * spec.m)

    @torch.library.register_fake(f"{NAMESPACE}::values")
    def _(weight: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
        return weight.new_empty(weight.shape[0], weight.shape[1] // m * n)

    @torch.library.register_fake(f"{NAMESPACE}::spread")
    def _(values: Tensor, indices: Tensor, in_features: int, n: int, m: int) -> Tensor:
        return values.new_empty(values.shape[0], in_features)

    @torch.library.register_fake(f"{NAMESPACE}::grad_values")
    def _(dy: Tensor, x: Tensor, indices: Tensor, kernel: int) -> Tensor:
        from fxsparse.codegen.cpu.loaded import by_id

        spec = by_id(kernel).spec
        return dy.new_empty(dy.shape[-1], x.shape[-1] // spec.m * spec.n)

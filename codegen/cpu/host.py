"""The door from torch to the kernels: three operators in C++ that allocate the result and call a kernel by its number.

    fxsparse_cpu::linear(x, values, indices, bias?, down?, up?, operand0?, operand1?, scale, kernel) -> y
    fxsparse_cpu::grad_input(dy, values, indices, column_mask?, kernel) -> dx
    fxsparse_cpu::grad_values(dy, x, indices, kernel) -> dv

``kernel`` is ``CPUSpec.id``, which is the same in every process, so a compiled graph may hold it. They are written
against torch's stable interface: built in a second, and called for 2.9 us where ``aten.linear`` costs 2.3, a Python
function behind a ``custom_op`` 28 (two tokens of 16 numbers; ctypes 2.0 without the dispatcher, but a compiled graph
cannot hold that).
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
  int64_t n, m, shrink, dtype;
  std::atomic<int64_t> launches{0};
};

std::shared_mutex lock;
std::unordered_map<int64_t, std::unique_ptr<Kernel>> kernels;

Kernel& find(int64_t id) {
  std::shared_lock<std::shared_mutex> reading(lock);
  auto found = kernels.find(id);
  STD_TORCH_CHECK(found != kernels.end(), "fxsparse: kernel ", id, " is not loaded in this process");
  return *found->second;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch_parallel_for(begin, end, grain, body, context);
}

// a tensor whose leading dimensions are rows of one stride, its last dimension dense
struct Rows {
  Tensor tensor;
  int64_t rows, columns, stride;

  explicit Rows(const Tensor& given) : tensor(given), rows(1) {
    const int64_t dims = given.dim();
    columns = given.size(dims - 1);
    for (int64_t d = 0; d + 1 < dims; ++d) rows *= given.size(d);
    bool regular = given.stride(dims - 1) == 1 || columns <= 1;
    for (int64_t d = 0; d + 2 < dims; ++d)
      regular &= given.size(d) <= 1 || given.stride(d) == given.stride(d + 1) * given.size(d + 1);
    if (!regular && rows && columns) tensor = torch::stable::contiguous(given);
    stride = dims > 1 ? tensor.stride(dims - 2) : columns;
  }
};

const Tensor dense(const Tensor& given) { return given.is_contiguous() ? given : torch::stable::contiguous(given); }

const void* pointer(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

std::optional<Tensor> dense(const std::optional<Tensor>& given) {
  return given ? std::optional<Tensor>(dense(*given)) : given;
}

void check(const Kernel& kernel, const Tensor& x, int64_t kept, int64_t columns) {
  STD_TORCH_CHECK(int64_t(x.scalar_type()) == kernel.dtype, "fxsparse: the kernel is for another dtype");
  STD_TORCH_CHECK(kept * kernel.m == columns * kernel.n, "fxsparse: ", kept, " kept values do not fit ", columns,
                  " columns");
}

Tensor result(const Tensor& like, int64_t columns) {
  auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = columns;
  return torch::stable::new_empty(like, shape);
}

void run(Kernel& kernel, Call& call) {
  call.parallel_for = parallel_for;
  kernel.launches.fetch_add(1, std::memory_order_relaxed);
  STD_TORCH_CHECK(kernel.run(&call) == 0, "fxsparse: out of memory");
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& indices, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& down, const std::optional<Tensor>& up, const std::optional<Tensor>& operand0,
              const std::optional<Tensor>& operand1, double scale, int64_t id) {
  Kernel& kernel = find(id);
  const Rows rows(x);
  check(kernel, x, values.size(1), rows.columns);
  const Tensor v = dense(values), i = dense(indices);
  const auto b = dense(bias), d = dense(down), u = dense(up), first = dense(operand0), second = dense(operand1);
  Tensor y = result(x, values.size(0) / kernel.shrink);
  Call call{};
  call.x = rows.tensor.data_ptr();
  call.values = v.data_ptr();
  call.indices = static_cast<const uint8_t*>(i.data_ptr());
  call.bias = pointer(b);
  call.down = pointer(d);
  call.up = pointer(u);
  call.operands[0] = pointer(first);
  call.operands[1] = pointer(second);
  call.y = y.data_ptr();
  call.x_stride = rows.stride;
  call.tokens = rows.rows;
  call.in = rows.columns;
  call.out = values.size(0);
  call.rank = d ? d->size(0) : 0;
  call.scale = scale;
  run(kernel, call);
  return y;
}

Tensor grad_input(const Tensor& dy, const Tensor& values, const Tensor& indices,
                  const std::optional<Tensor>& column_mask, int64_t id) {
  Kernel& kernel = find(id);
  const Rows rows(dy);
  const int64_t columns = values.size(1) / kernel.n * kernel.m;
  check(kernel, dy, values.size(1), columns);
  STD_TORCH_CHECK(values.size(0) == rows.columns, "fxsparse: dy does not fit the weight");
  const Tensor v = dense(values), i = dense(indices);
  const auto mask = dense(column_mask);
  Tensor dx = result(dy, columns);
  Call call{};
  call.x = rows.tensor.data_ptr();
  call.values = v.data_ptr();
  call.indices = static_cast<const uint8_t*>(i.data_ptr());
  call.column_mask = static_cast<const uint8_t*>(pointer(mask));
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
  STD_TORCH_CHECK(grads.rows == rows.rows && indices.size(0) == grads.columns, "fxsparse: dy does not fit x and the weight");
  const Tensor i = dense(indices);
  Tensor dv = torch::stable::new_empty(dy, {grads.columns, kept});
  Call call{};
  call.x = rows.tensor.data_ptr();
  call.dy = grads.tensor.data_ptr();
  call.indices = static_cast<const uint8_t*>(i.data_ptr());
  call.y = dv.data_ptr();
  call.x_stride = rows.stride;
  call.dy_stride = grads.stride;
  call.tokens = rows.rows;
  call.in = rows.columns;
  call.out = grads.columns;
  run(kernel, call);
  return dv;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fxsparse_load(int64_t id, void* run, int64_t n, int64_t m,
                                                                     int64_t shrink, int64_t dtype) {
  auto kernel = std::make_unique<Kernel>();
  kernel->run = reinterpret_cast<int (*)(const Call*)>(run);
  kernel->n = n;
  kernel->m = m;
  kernel->shrink = shrink;
  kernel->dtype = dtype;
  std::unique_lock<std::shared_mutex> writing(lock);
  kernels.emplace(id, std::move(kernel));
}

extern "C" __attribute__((visibility("default"))) int64_t fxsparse_launches(int64_t id) {
  return find(id).launches.load(std::memory_order_relaxed);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse_cpu, library) {
  library.def(
      "linear(Tensor x, Tensor values, Tensor indices, Tensor? bias, Tensor? down, Tensor? up, Tensor? operand0, "
      "Tensor? operand1, float scale, int kernel) -> Tensor");
  library.def("grad_input(Tensor dy, Tensor values, Tensor indices, Tensor? column_mask, int kernel) -> Tensor");
  library.def("grad_values(Tensor dy, Tensor x, Tensor indices, int kernel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse_cpu, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("grad_input", TORCH_BOX(&grad_input));
  library.impl("grad_values", TORCH_BOX(&grad_values));
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
    loaded.fxsparse_load.argtypes = [ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    loaded.fxsparse_load.restype = None
    loaded.fxsparse_launches.argtypes = [ctypes.c_int64]
    loaded.fxsparse_launches.restype = ctypes.c_int64
    _register_shapes()
    return loaded


def _register_shapes() -> None:
    """What the operators return, for tracers."""

    @torch.library.register_fake(f"{NAMESPACE}::linear")
    def _(x: Tensor, values: Tensor, *args: Any) -> Tensor:
        from fxsparse.codegen.cpu.loaded import by_id

        return x.new_empty(*x.shape[:-1], values.shape[0] // by_id(args[-1]).shrink)

    @torch.library.register_fake(f"{NAMESPACE}::grad_input")
    def _(dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, kernel: int) -> Tensor:
        from fxsparse.codegen.cpu.loaded import by_id

        spec = by_id(kernel).spec
        return dy.new_empty(*dy.shape[:-1], values.shape[1] // spec.n * spec.m)

    @torch.library.register_fake(f"{NAMESPACE}::grad_values")
    def _(dy: Tensor, x: Tensor, indices: Tensor, kernel: int) -> Tensor:
        from fxsparse.codegen.cpu.loaded import by_id

        spec = by_id(kernel).spec
        return dy.new_empty(dy.shape[-1], x.shape[-1] // spec.m * spec.n)

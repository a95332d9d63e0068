"""Kernels as functions of Python that a compiled graph calls without torch's dispatcher: tensors and a result, bound.

    linear_3f2a = bind(kernel, ("x", "values", "indices"), in_features, out_features)
    linear_3f2a(x, values, indices, tokens, x_stride, out=y)

What a graph knows when it is compiled is bound: the kernel, the places of its tensors, sizes of the weight. A call
reads addresses and runs, so nothing is checked: `fxsparse.backend.extern_kernels` does that, and writes these lines
into the code of Inductor. The address of a tensor's data is read by the function that Inductor's own C++ kernels use,
so the library needs Python's headers and none of torch's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxsparse.codegen.cpu import build
from fxsparse.codegen.cpu.common import CALL
from fxsparse.codegen.cpu.host import host

PLACES = (
    "x",
    "dy",
    "values",
    "indices",
    "column_mask",
    "bias",
    "down",
    "up",
    "operand0",
    "operand1",
)
"""The tensors of a call, in the order of ``Call``."""

_EXTERN = """/* Kernels for a CPU as functions of Python.

Made by fxsparse.codegen.cpu
*/

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <exception>

$call

namespace {

void* (*data_of)(PyObject*);
void* (*find)(int64_t);
int (*run)(void*, Call*);

constexpr int MOST = $most;  // tensors that are read
const size_t OFFSETS[MOST] = {$offsets};

struct Bound {
  int64_t id;
  void* kernel;  // once it was called
  int count;
  size_t offsets[MOST];
  Call call;
};

const char* const NAME = "fxsparse.kernel";

Bound* bound_of(PyObject* capsule) { return static_cast<Bound*>(PyCapsule_GetPointer(capsule, NAME)); }

PyObject* fail(const char* text) {
  PyErr_SetString(PyExc_RuntimeError, text);
  return nullptr;
}

// (tensors..., tokens, x_stride, dy_stride?, *, out)
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  Bound* bound = bound_of(self);
  if (!bound) return nullptr;
  const Py_ssize_t numbers = count - bound->count;
  if (numbers < 2 || numbers > 3 || !names || PyTuple_GET_SIZE(names) != 1)
    return fail("fxsparse: a kernel takes its tensors, numbers and out=");
  if (!bound->kernel && !(bound->kernel = find(bound->id)))
    return fail("fxsparse: a kernel is not loaded in this process");
  Call call = bound->call;
  try {
    for (int i = 0; i < bound->count; ++i) {
      const void* data = data_of(args[i]);
      __builtin_memcpy(reinterpret_cast<char*>(&call) + bound->offsets[i], &data, sizeof data);
    }
    call.y = data_of(args[count]);
  } catch (const std::exception& error) {
    return fail(error.what());
  }
  args += bound->count;
  call.tokens = PyLong_AsLongLong(args[0]);
  call.x_stride = PyLong_AsLongLong(args[1]);
  if (numbers == 3) call.dy_stride = PyLong_AsLongLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  int failed;
  Py_BEGIN_ALLOW_THREADS
  failed = run(bound->kernel, &call);
  Py_END_ALLOW_THREADS
  if (failed) return fail("fxsparse: out of memory");
  Py_RETURN_NONE;
}

PyMethodDef call_method = {"fxsparse_kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(call)),
                           METH_FASTCALL | METH_KEYWORDS, nullptr};

// (kernel, places, in_features, out_features, rank, scale) -> function
PyObject* bind(PyObject*, PyObject* args) {
  long long id, in, out, rank;
  double scale;
  PyObject* places;
  if (!PyArg_ParseTuple(args, "LO!LLLd", &id, &PyTuple_Type, &places, &in, &out, &rank, &scale)) return nullptr;
  const Py_ssize_t count = PyTuple_GET_SIZE(places);
  if (count > MOST) return fail("fxsparse: too many tensors");
  Bound* bound = new Bound{};
  bound->id = id;
  bound->count = int(count);
  bound->call.in = in;
  bound->call.out = out;
  bound->call.rank = rank;
  bound->call.scale = scale;
  PyObject* capsule = PyCapsule_New(bound, NAME, [](PyObject* capsule) { delete bound_of(capsule); });
  if (!capsule) {
    delete bound;
    return nullptr;
  }
  PyObject* function = nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const long place = PyLong_AsLong(PyTuple_GET_ITEM(places, i));
    if (place < 0 || place >= MOST) {
      if (!PyErr_Occurred()) fail("fxsparse: no such place");
      break;
    }
    bound->offsets[i] = OFFSETS[place];
  }
  if (!PyErr_Occurred()) function = PyCFunction_New(&call_method, capsule);
  Py_DECREF(capsule);
  return function;
}

// the addresses of what is called: data of a tensor, find a kernel, run it
PyObject* connect(PyObject*, PyObject* args) {
  unsigned long long data, finds, runs;
  if (!PyArg_ParseTuple(args, "KKK", &data, &finds, &runs)) return nullptr;
  data_of = reinterpret_cast<void* (*)(PyObject*)>(uintptr_t(data));
  find = reinterpret_cast<void* (*)(int64_t)>(uintptr_t(finds));
  run = reinterpret_cast<int (*)(void*, Call*)>(uintptr_t(runs));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"bind", bind, METH_VARARGS, nullptr},
                         {"connect", connect, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fxsparse_extern", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_fxsparse_extern() { return PyModule_Create(&module); }
"""


def bind(
    kernel: int, places: Sequence[str], in_features: int, out_features: int, rank: int = 0, scale: float = 1.0
) -> Callable[..., None]:
    """A kernel as a function.

    Args:
        kernel: its number; it has to be loaded when the function is called.
        places: which tensors the function takes, of :data:`PLACES`.
        in_features, out_features: of the weight.
        rank, scale: of a low-rank branch.

    Returns:
        a function of these tensors, of the number of tokens, the stride of rows of x and for the gradient of values
        that of dy, and of ``out``. Every tensor is contiguous but for those strides; nothing is checked.

    Raises:
        BuildError: :func:`obstacle` says why.
    """
    made: Callable[..., None] = _module().bind(
        kernel, tuple(map(PLACES.index, places)), in_features, out_features, rank, scale
    )
    return made


@functools.cache
def obstacle() -> str | None:
    """Why kernels cannot be called so here, None if they can; builds the library, once."""
    try:
        _module()
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def _module() -> Any:
    address = getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None)
    if not isinstance(address, int):
        raise build.BuildError("this torch does not tell where a tensor's data is")
    fields = [f"offsetof(Call, {name})" for name in PLACES[:-2]]
    fields += [f"offsetof(Call, operands) + {i} * sizeof(void*)" for i in range(2)]
    text = _EXTERN.replace("$call", CALL.strip()).replace("$most", str(len(PLACES)))
    flags = (f"-I{sysconfig.get_path('include')}", f"-I{sysconfig.get_path('platinclude')}")
    _, target = build.library("extern", text.replace("$offsets", ", ".join(fields)), flags)
    loader = importlib.machinery.ExtensionFileLoader("fxsparse_extern", str(target))
    spec = importlib.util.spec_from_loader("fxsparse_extern", loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError as error:
        raise build.BuildError(f"cannot load {target}: {error}") from error
    module.connect(address, *_of_host())
    return module


def _of_host() -> tuple[int, int]:
    """The addresses of the functions that find and run a kernel."""
    functions = host().fxsparse_find, host().fxsparse_run
    find, run = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    assert find is not None and run is not None
    return find, run

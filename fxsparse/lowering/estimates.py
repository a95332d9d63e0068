"""What a product should take on a device nobody measured, from bytes, FLOPs and published rates.

    time = launch + max(bytes / bandwidth, FLOPs / (rate * efficiency))

Peak rates are the manufacturer's for dense bfloat16. Efficiencies are rough, for large shapes: their use is to order
the implementations of one product, and measuring replaces them (`fxsparse.lowering.timings`). They hold where a kernel
occupies the device, so one that has fewer programs than there are multiprocessors is not estimated into use, nor one
that would gain less than `GAIN`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import fxsparse.codegen.kernels  # noqa: F401  whose files say what their tiles are
from fxsparse.codegen import tiles
from fxsparse.codegen.cpu import instruction_sets
from fxsparse.ops.operator import CUSPARSELT, DENSE, OPERATORS, REFERENCE, SPARSE_TENSOR_CORES, Problem


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        bandwidth: of its memory, bytes a second.
        rate: of dense 16-bit products, FLOPs a second.
        multiprocessors: that programs run on.
        sparse: what a generated kernel on sparse tensor cores reaches, over a dense library product.
    """

    name: str
    bandwidth: float
    rate: float
    sparse: float
    multiprocessors: int

    @property
    def is_hopper(self) -> bool:
        return self.name.startswith("NVIDIA H")


# NVIDIA's data sheets; the names as CUDA gives them begin so.
DEVICES = (
    Device("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12, 1.3, 108),
    Device("NVIDIA A100", 1.55e12, 312e12, 1.3, 108),
    Device("NVIDIA H200", 4.8e12, 989e12, 0.75, 132),
    Device("NVIDIA H100 PCIe", 2.0e12, 756e12, 0.75, 114),
    Device("NVIDIA H100", 3.35e12, 989e12, 0.75, 132),
)

GAIN = 1.05
"""What a kernel has to be estimated faster by than what is always right."""

LAUNCH = 4e-6
"""Seconds before a kernel does anything."""

_DENSE_EFFICIENCY = 0.7
_LIBRARY = 1.2  # what cuSPARSELt reaches, over a dense library product
# A generated kernel of a plain product; one that decompresses in registers spends instructions a plain one does not.
_GENERATED_EFFICIENCY, _DECOMPRESSING_EFFICIENCY = 0.55, 0.4


_FEW = 64
# What dense took at the least, over the C++ kernel, on an EPYC of the Zen 5 kind and a Xeon of the Sapphire Rapids kind
# (`benchmarks/RESULTS.md`): by operator and by whether rows are few. Gradients gained 1.4 on one and lost on the other.
_RATIOS_ON_CPU = {
    ("nm_linear", True): 1.4,
    ("nm_linear", False): 1.1,
    ("nm_linear_low_rank", True): 1.4,
    ("nm_linear_low_rank", False): 1.1,
}


def ratio_on_cpu(problem: Problem) -> float | None:
    """How many times as long a dense product takes as the C++ kernel, on processors with AVX-512; None where it was not
    measured, or the kernel does not gain for sure."""
    if instruction_sets.chosen().lanes < 16 or problem.dtype != torch.float32:
        return None
    return _RATIOS_ON_CPU.get((problem.op, problem.rows <= _FEW))


@functools.cache
def device(name: str | None = None) -> Device | None:
    """A known device by its name, by default the current one; None if it is not known."""
    if name is None:
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    return next((known for known in DEVICES if name.startswith(known.name)), None)


def programs(problem: Problem, on: Device | None = None) -> int | None:
    """Programs that a product's generated kernel launches with its default tile on a device; None if it has none."""
    shape = OPERATORS[problem.op].tiles
    if shape is None:
        return None
    rows, columns, _ = shape.sizes(problem)
    tile = tiles.default(
        shape.kernel, rows, str(problem.dtype).removeprefix("torch."), hopper=on is not None and on.is_hopper
    )
    if shape.kernel.endswith(("grad_values", "grad_weight")):  # of a result as large as the weight
        rows, columns = problem.out_features, problem.in_features
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def microseconds(problem: Problem, implementation: str, on: Device) -> float | None:
    """An estimate of one product's time.

    Args:
        problem: the product.
        implementation: a name of `fxsparse.lowering.choose`.
        on: the device.

    Returns:
        None if bytes and FLOPs do not tell implementations apart.
    """
    operator = OPERATORS[problem.op]
    if operator.traffic is None:
        return None
    traffic = operator.traffic(problem)
    size = problem.dtype.itemsize
    rate = on.rate * (2 / size if size > 2 else 1)
    computing = problem.flops / (rate * _DENSE_EFFICIENCY)
    efficiency = _DECOMPRESSING_EFFICIENCY if traffic.decompresses else _GENERATED_EFFICIENCY
    product = _time(problem.weight_bytes + problem.input_bytes + problem.output_bytes, computing, on)
    if implementation == DENSE:
        time = product
    elif implementation == REFERENCE:
        time = product + (_time(traffic.copies, 0, on) if traffic.copies else 0)
    elif implementation == SPARSE_TENSOR_CORES:
        time = _time(traffic.kernel, computing / on.sparse, on)
    elif implementation == CUSPARSELT:
        time = _time(traffic.kernel, computing / _LIBRARY, on)
    else:
        time = _time(traffic.kernel, problem.flops / (rate * efficiency), on)
    return 1e6 * time


def effort(problem: Problem) -> float:
    """Microseconds of a dense product of its size on a GPU of middling speed: to compare products with each other."""
    on, moved = DEVICES[1], problem.weight_bytes + problem.input_bytes + problem.output_bytes
    return 1e6 * _time(moved, problem.flops / (on.rate * _DENSE_EFFICIENCY), on)


def _time(moved: float, computing: float, on: Device) -> float:
    return LAUNCH + max(moved / on.bandwidth, computing)

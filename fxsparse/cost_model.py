"""What a product with an N:M weight should take on a GPU nobody measured, from bytes, FLOPs and published rates.

    time = launch + max(bytes / bandwidth, FLOPs / (rate * efficiency))

Peak rates are the manufacturer's for dense bfloat16. Efficiencies are rough, for large shapes: their use is to order
the implementations of one product, and measuring replaces them (`fxsparse.measured`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fxsparse.nm import Pattern


@dataclass(frozen=True)
class Work:
    """A product with an N:M weight.

    Attributes:
        op: the operator.
        pattern: of the weight.
        dtype: of the operands.
        rows: of the input.
        out_features, in_features: of the weight.
    """

    op: str
    pattern: Pattern
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        bandwidth: of its memory, bytes a second.
        rate: of dense 16-bit products, FLOPs a second.
        sparse: what a generated kernel on sparse tensor cores reaches, over a dense library product.
    """

    name: str
    bandwidth: float
    rate: float
    sparse: float


# NVIDIA's data sheets; the names as CUDA gives them begin so.
DEVICES = (
    Device("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12, 1.3),
    Device("NVIDIA A100", 1.55e12, 312e12, 1.3),
    Device("NVIDIA H200", 4.8e12, 989e12, 0.75),
    Device("NVIDIA H100 PCIe", 2.0e12, 756e12, 0.75),
    Device("NVIDIA H100", 3.35e12, 989e12, 0.75),
)

LAUNCH = 4e-6
"""Seconds before a kernel does anything."""

_DENSE_EFFICIENCY = 0.7
# A kernel that decompresses in registers spends instructions a plain product does not.
_DECOMPRESSING_EFFICIENCY = 0.4


@functools.cache
def device(name: str | None = None) -> Device | None:
    """A known device by its name, by default the current one; None where it is not known."""
    if name is None:
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    return next((known for known in DEVICES if name.startswith(known.name)), None)


def microseconds(work: Work, implementation: str, on: Device) -> float:
    """An estimate of one product's time.

    Args:
        work: the product.
        implementation: a name of `fxsparse.lower`.
        on: the device.
    """
    size = work.dtype.itemsize
    weight = work.out_features * work.in_features
    kept = weight * work.pattern.density
    compressed = kept * size + kept * work.pattern.index_bits / 8
    activations = work.rows * (work.in_features + work.out_features) * size
    flops = 2.0 * work.rows * weight
    rate = on.rate * (2 / size if size > 2 else 1)
    dense = flops / (rate * _DENSE_EFFICIENCY)
    product = _time(weight * size + activations, dense, on)
    times = {
        "dense": product,
        # Decompressing writes the dense weight and the product reads it again.
        "reference": LAUNCH + (compressed + weight * size) / on.bandwidth + product,
        "sparse_tensor_cores": _time(compressed + activations, dense / on.sparse, on),
        "cusparselt": _time(compressed + activations, dense / 1.2, on),
    }
    own = _time(compressed + activations, flops / (rate * _DECOMPRESSING_EFFICIENCY), on)
    return 1e6 * times.get(implementation, own)


def _time(moved: float, computing: float, on: Device) -> float:
    return LAUNCH + max(moved / on.bandwidth, computing)

"""What a product should take on a GPU nobody measured, from bytes, FLOPs and published rates.

    time = launch + max(bytes / bandwidth, FLOPs / (rate * efficiency))

Peak rates are the manufacturer's for dense bfloat16. Efficiencies are rough, for large shapes: their use is to order
the implementations of one product, and measuring replaces them (`fxsparse.lowering.timings`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fxsparse.ops.nm import Pattern


@dataclass(frozen=True)
class Work:
    """What one call of an operator computes.

    Attributes:
        op: the operator.
        pattern: of an N:M weight; None where the weight is dense or there is none.
        dtype: of the operands.
        rows: of the input; of ``mux``, of its result.
        out_features, in_features: of the weight, as far as it takes part; of ``mux``, the width twice.
        further: sizes. ``nm_linear_low_rank``: the rank. ``gather_linear`` and its gradients: the whole weight's.
            ``mux`` and ``demux_linear``: the members of a group, of the latter the width of a key, and the positions of
            a row.
    """

    op: str
    pattern: Pattern | None
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int
    further: tuple[int, ...] = ()


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
# A generated kernel of a plain product; one that decompresses in registers spends instructions a plain one does not.
_GENERATED_EFFICIENCY, _DECOMPRESSING_EFFICIENCY = 0.55, 0.4


@functools.cache
def device(name: str | None = None) -> Device | None:
    """A known device by its name, by default the current one; None where it is not known."""
    if name is None:
        if not torch.cuda.is_available():
            return None
        name = torch.cuda.get_device_name()
    return next((known for known in DEVICES if name.startswith(known.name)), None)


def microseconds(work: Work, implementation: str, on: Device) -> float | None:
    """An estimate of one product's time.

    Args:
        work: the product.
        implementation: a name of `fxsparse.lowering.choose`.
        on: the device.

    Returns:
        None where bytes and FLOPs do not tell implementations apart.
    """
    if work.op == "mux":  # one pass over the input, whoever makes it
        return None
    size = work.dtype.itemsize
    rate = on.rate * (2 / size if size > 2 else 1)
    weight = work.out_features * work.in_features
    flops = 2.0 * work.rows * weight
    inputs, outputs = (work.rows * features * size for features in (work.in_features, work.out_features))
    computing = flops / (rate * _DENSE_EFFICIENCY)
    product = _time(weight * size + inputs + outputs, computing, on)
    if work.op == "demux_linear":
        # The reference adds the keys' part afterwards, to every member of a group.
        outputs_of_all = outputs * work.further[0]
        own = _time(weight * size + inputs + outputs_of_all, flops / (rate * _GENERATED_EFFICIENCY), on)
        reference = product + _time(outputs + outputs_of_all, 0, on)
    elif work.pattern is None:
        # The reference copies what was chosen of a weight, and the product reads the copy.
        whole = work.further == (work.out_features, work.in_features)
        own = _time(weight * size + inputs + outputs, flops / (rate * _GENERATED_EFFICIENCY), on)
        reference = product + (0 if whole else _time(2 * weight * size, 0, on))
    else:
        stored = weight * (work.pattern.density * size + work.pattern.density * work.pattern.index_bits / 8)
        moved = stored + inputs + outputs
        own = _time(moved, flops / (rate * _DECOMPRESSING_EFFICIENCY), on)
        # Decompressing writes the dense weight and the product reads it again.
        reference = product + _time(stored + weight * size, 0, on)
        if implementation == "sparse_tensor_cores":
            own = _time(moved, computing / on.sparse, on)
        elif implementation == "cusparselt":
            own = _time(moved, computing / 1.2, on)
    return 1e6 * {"dense": product, "reference": reference}.get(implementation, own)


def _time(moved: float, computing: float, on: Device) -> float:
    return LAUNCH + max(moved / on.bandwidth, computing)

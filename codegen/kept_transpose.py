"""The gradient of a linear's input on sparse tensor cores, from a compressed W^{R,C} kept along the output dimension.

    nm_linear_grad_input_kept(dy, values, indices, column_mask)

It computes what ``nm_linear_grad_input`` does for 2:4, faster on large shapes, and costs the memory of the compressed
weight once more and of where its values come from (4 bytes each). The pattern is made anew when indices or column mask
were written to; the values are gathered on every call, because the optimizer has changed them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxsparse.codegen.fused_ops import sparse_tensor_core_linear
from fxsparse.codegen.metadata import SparseTranspose

_lock = threading.Lock()
_kept: dict[tuple[object, ...], _Kept] = {}


@dataclass(frozen=True)
class _Kept:
    """A transpose, and of what."""

    transpose: SparseTranspose
    versions: tuple[int, int]
    storages: tuple[StorageWeakRef, ...]

    @property
    def is_alive(self) -> bool:
        return not any(storage.expired() for storage in self.storages)


def kept_transpose(values: Tensor, indices: Tensor, column_mask: Tensor) -> SparseTranspose:
    """The kept transpose of a weight ``[out, in]``, its values up to date; both sizes are multiples of 16."""
    sources = (indices, column_mask)
    if any(tensor.is_inference() for tensor in sources):  # no versions to follow
        return SparseTranspose.of(values, indices, column_mask)
    key = (values.shape, values.dtype, values.device, *(tensor.data_ptr() for tensor in sources))
    versions = (indices._version, column_mask._version)
    with _lock:
        found = _kept.get(key)
        if found is None or not found.is_alive or found.versions != versions:
            for gone in [other for other, kept in _kept.items() if not kept.is_alive]:
                del _kept[gone]
            storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in sources)
            found = _kept[key] = _Kept(SparseTranspose.of(values, indices, column_mask), versions, storages)
        else:
            found.transpose.refresh(values)
    return found.transpose


# Python decides on every call what is up to date, which the replay of a CUDA graph would leave out.
@torch.library.custom_op("fxsparse::nm_linear_grad_input_kept", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def nm_linear_grad_input_kept(dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor) -> Tensor:
    """dx = dy W^{R,C}, ``[..., in]``; W is 2:4."""
    transpose = kept_transpose(values, indices, column_mask)
    return sparse_tensor_core_linear(dy, transpose.values, transpose.metadata, None, "", [])


@nm_linear_grad_input_kept.register_fake
def _(dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], values.shape[1] * 2)

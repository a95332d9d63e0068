"""The operators of ``fxsparse.multiplexing`` in plain torch: what every other implementation must equal."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def mux(x: Tensor, keys: Tensor, n: int) -> Tensor:
    """``1/n sum of keys[i] * x[g n + i]``, ``[groups, ..., dim]``."""
    return (members_of(x, n) * beside_positions(keys, x)).sum(1) / n


def demux_linear(h: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``weight [key_i ; h[g]] + bias``, ``[groups * N, ..., out]``."""
    key_dim = keys.shape[-1]
    projected = linear(keys, weight[:, :key_dim], bias)
    product = linear(h, weight[:, key_dim:])
    return (product.unsqueeze(1) + beside_positions(projected, product)).flatten(0, 1)


def members_of(x: Tensor, n: int) -> Tensor:
    """``[groups * n, ...]`` as ``[groups, n, ...]``."""
    return x.unflatten(0, (-1, n))


def beside_positions(keys: Tensor, x: Tensor) -> Tensor:
    """Keys ``[(groups,) N, dim]`` with dimensions of size 1 for those between the first and the last of ``x``."""
    return keys[(..., *(None,) * (x.dim() - 2), slice(None))]

"""Attention that is causal says so.

Capture writes a causal model's mask out: ``arange``, compare, expand, and the result goes into
``scaled_dot_product_attention`` as ``attn_mask``, which rules out the flash kernels on a GPU. Where such a mask depends on sizes
only and equals the lower triangle, the attention gets ``is_causal=True`` instead.
"""

from __future__ import annotations

from torch.fx import GraphModule


def restore_is_causal(gm: GraphModule) -> int:
    return 0

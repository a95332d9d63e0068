"""SLoPe in plain torch, to hold rewritten graphs against: the original model with its linears replaced by modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.graph.record import HeldWeight, record_of
from fxsparse.ops.nm import Pattern, unpack, unpack_column_mask, unpack_mask


class _Product(torch.autograd.Function):
    """y = x W^T with the gradients of SLoPe (arXiv 2405.16325, eq. 4-6)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight * mask, mask, column_mask)
        return x @ (weight * mask).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, pruned, mask, column_mask = ctx.saved_tensors
        grad = grads[0]
        weight_grad = grad.flatten(0, -2).t() @ x.flatten(0, -2) * mask
        return grad @ (pruned * column_mask), weight_grad, None, None


class OracleLinear(nn.Module):
    """A linear, or a Hugging Face ``Conv1D``, with a mask, a column mask and perhaps a branch."""

    def __init__(self, module: nn.Module, mask: Tensor, column_mask: Tensor, transposed: bool):
        super().__init__()
        self.weight, self.bias, self.transposed = module.weight, module.bias, transposed
        self.mask, self.column_mask = mask, column_mask
        self.down: Tensor | None = None
        self.up: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        y = _Product.apply(x, weight, self.mask, self.column_mask)
        if self.bias is not None:
            y = y + self.bias
        if self.down is not None and self.up is not None:
            y = y + x @ self.down.t() @ self.up.t() / self.down.shape[0]
        return y


def masks_of(gm: GraphModule, held: HeldWeight) -> tuple[Tensor, Tensor]:
    """The mask and the column mask, bool ``[out, in]``, that a rewritten graph holds for a weight."""
    pattern = Pattern.parse(held.pattern)
    state = dict(gm.named_buffers())
    if held.storage == "masked":
        mask = state[f"{held.name}_mask"]
        return mask, state.get(f"{held.name}_column_mask", mask)
    indices = state[f"{held.name}_indices"]
    mask = unpack_mask(indices, pattern, held.in_features)
    packed = state.get(f"{held.name}_column_mask")
    return mask, mask if packed is None else unpack_column_mask(packed, mask, pattern)


def oracle_of(model: nn.Module, gm: GraphModule) -> nn.Module:
    """A copy of ``model`` that computes, in plain torch, what the rewritten ``gm`` should, from the same tensors."""
    oracle = copy.deepcopy(model)
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for held in record_of(gm).weights:
        mask, column_mask = masks_of(gm, held)
        path = fx.module_path(held.name)
        module = OracleLinear(oracle.get_submodule(path), mask.clone(), column_mask.clone(), held.transposed)
        if f"{held.name}_down" in used:
            module.down = nn.Parameter(fx.attribute(gm, f"{held.name}_down").detach().clone())
            module.up = nn.Parameter(fx.attribute(gm, f"{held.name}_up").detach().clone())
        oracle.set_submodule(path, module)
    return oracle


def dense_gradient(gm: GraphModule, held: HeldWeight) -> Tensor:
    """The gradient of a held weight in the original's layout, zero where pruned."""
    if held.storage == "masked":
        return fx.attribute(gm, held.name).grad
    values = fx.attribute(gm, f"{held.name}_values")
    grad = unpack(values.grad, fx.attribute(gm, f"{held.name}_indices"), Pattern.parse(held.pattern), held.in_features)
    return grad.t() if held.transposed else grad

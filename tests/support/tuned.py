"""One product of every operator that has several implementations, and a model of two linears."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import Problem

_SIZES = (24, 48, 64)  # rows, out and in


def _dense(op: str, extra: tuple[int, ...], sizes: tuple[int, int, int] = _SIZES) -> Problem:
    return Problem(op, None, torch.float32, *sizes, extra)


def _sparse(op: str, *extra: int) -> Problem:
    return Problem(op, Pattern(2, 4), torch.float32, *_SIZES, extra)


TUNED: dict[str, Problem] = {
    "nm_linear": _sparse("nm_linear"),
    "nm_linear_grad_input": _sparse("nm_linear_grad_input"),
    "nm_linear_grad_values": _sparse("nm_linear_grad_values"),
    "nm_linear_low_rank": _sparse("nm_linear_low_rank", 8),
    "gather_linear": _dense("gather_linear", (96, 64, 1)),
    "gather_linear_grad_input": _dense("gather_linear_grad_input", (48, 96, 16)),
    "gather_linear_grad_weight": _dense("gather_linear_grad_weight", (96, 96, 8)),
    "mux": _dense("mux", (3, 4), (24, 64, 64)),
    "demux_linear": _dense("demux_linear", (3, 16, 4)),
}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())

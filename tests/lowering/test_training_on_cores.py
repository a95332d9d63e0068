"""Training steps on sparse tensor cores, which a CPU plays in plain torch: below autograd, and with nothing kept."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.lowering import candidates, choose
from fxsparse.ops import define
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import SPARSE_TENSOR_CORES, SPARSE_WGMMA, Problem

DOUBLY = "nm-masks{pattern=2:4,keep_first=false,keep_head=false},double-prune"
CORES = {SPARSE_TENSOR_CORES: "sparse_tensor_core_linear", SPARSE_WGMMA: "sparse_wgmma_linear"}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    played = {(name, "cpu") for name in CORES.values()}
    monkeypatch.setattr(define, "_kernels", define._kernels | played)


class Layers(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 3 * width // 2), nn.Linear(3 * width // 2, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def sparse(passes: str = DOUBLY) -> torch.fx.GraphModule:
    return fxsparse.rewrite(Layers().bfloat16(), passes, (torch.randn(6, 32).bfloat16(),))


def options(cores: str, compiler: str = "aot_eager") -> dict[str, Any]:
    return {"compiler": compiler, "lower": {"nm_linear": cores, choose.GRAD_INPUT: cores}, "fallback": False}


def gradients(module: Any, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    module(x).float().square().mean().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def check(module: torch.fx.GraphModule, compiled: Any, x: Tensor) -> Counter[str]:
    exact = gradients(copy.deepcopy(module).double(), x.double())
    gradients(compiled, x)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = gradients(compiled, x)
    for mine, its in zip(found, exact, strict=True):
        assert (mine - its).abs().max() <= 3e-2 * its.abs().max()
    ran = [event.name.partition("::") for event in profile.events()]
    return Counter(name for namespace, _, name in ran if namespace == "fxsparse")


@pytest.mark.parametrize("cores", CORES)
def test_forward_and_gradient_of_the_input_run_there(cores: str) -> None:
    gm = sparse()
    compiled = torch.compile(gm, backend="fxsparse", options=options(cores))
    for rows in (6, 9):
        count = check(gm, compiled, torch.randn(rows, 32).bfloat16())
        assert count == {CORES[cores]: 4, "sparse_transpose": 2, "nm_linear_grad_values": 2}
    with torch.no_grad():
        for parameter in gm.parameters():  # an optimizer step, and another mask in place
            parameter.mul_(-0.5)
        other = sparse()
        for name, buffer in gm.named_buffers():
            buffer.copy_(other.get_buffer(name))
    assert check(gm, compiled, torch.randn(6, 32).bfloat16())["sparse_transpose"] == 2
    assert f'"nm_linear_grad_input": "{cores}"' in fxsparse.explain(compiled)


@pytest.mark.inductor
def test_under_inductor() -> None:
    gm = sparse()
    compiled = torch.compile(gm, backend="fxsparse", options=options(SPARSE_WGMMA, "inductor"))
    count = check(gm, compiled, torch.randn(6, 32).bfloat16())
    assert count["sparse_wgmma_linear"] == 4 and count["sparse_transpose"] == 2


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        (DOUBLY.replace("double-prune", "double-prune{pattern=4:8}"), "keeps more than two of four rows"),
        (DOUBLY.replace(",double-prune", ""), "only its rows are 2:4"),
        (DOUBLY.replace("2:4", "1:4"), "they take 2:4, not 1:4"),
    ],
)
def test_weights_whose_transpose_is_not_two_four_do_not(passes: str, why: str) -> None:
    """More than two of four rows cannot be said in its metadata: gradients would lose weights without a word."""
    gm = sparse(passes)
    compiled = torch.compile(gm, backend="fxsparse", options=options(SPARSE_TENSOR_CORES))
    count = check(gm, compiled, torch.randn(6, 32).bfloat16())
    assert count["sparse_transpose"] == 0 and count["nm_linear_grad_input"] == 2
    assert why in fxsparse.explain(compiled)


def test_nobody_gets_them_who_did_not_ask() -> None:
    gm = sparse()
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    assert not check(gm, compiled, torch.randn(6, 32).bfloat16()).keys() & CORES.values()


@pytest.mark.parametrize("op", ["nm_linear", choose.GRAD_INPUT])
def test_what_measuring_compares_is_right(op: str) -> None:
    problem = Problem(op, Pattern(2, 4), torch.bfloat16, 5, 48, 64)
    several = candidates.candidates_for(problem, "cpu", compile_reference=False)
    for name in CORES:
        (run,) = several.makers[name]().values()
        assert (run() - several.exact).abs().max() <= 2e-2 * several.exact.abs().max()


def bytes_alive() -> int:
    """Of all tensors, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def state_of_a_step(module: nn.Module, compiled: Any) -> int:
    """Bytes of weights, masks, gradients, two moments and whatever else a training step leaves behind."""
    before = bytes_alive() - sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(torch.randn(6, 512).bfloat16()).float().square().mean().backward()
        optimizer.step()
    return bytes_alive() - before


def test_the_state_of_a_step_is_half_of_dense() -> None:
    dense = Layers(512).bfloat16()
    gm = fxsparse.rewrite(copy.deepcopy(dense), DOUBLY, (torch.randn(6, 512).bfloat16(),))
    compiled = torch.compile(gm, backend="fxsparse", options=options(SPARSE_TENSOR_CORES))
    ratio = state_of_a_step(gm, compiled) / state_of_a_step(dense, dense)
    assert 0.5 < ratio < 0.53, ratio

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
from fxsparse.codegen.fused_ops import INSTRUCTIONS
from fxsparse.codegen.metadata import PACK
from fxsparse.lowering import candidates, choose
from fxsparse.ops import define
from fxsparse.ops.nm import Pattern, nm_mask, pack
from fxsparse.ops.operator import SPARSE_TENSOR_CORES, SPARSE_WGMMA, Problem

DOUBLY = "nm-masks{pattern=2:4,keep_first=false,keep_head=false},double-prune"
CORES = {SPARSE_TENSOR_CORES: "sparse_tensor_core_linear", SPARSE_WGMMA: "sparse_wgmma_linear"}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    played = {(name, "cpu") for name in INSTRUCTIONS}
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
    lower = {"nm_linear": cores, choose.GRAD_INPUT: cores}
    return {"compiler": compiler, "lower": lower, "fallback": False, "tune": 0}


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


@pytest.mark.parametrize("op", ["nm_linear", "nm_linear_low_rank", choose.GRAD_INPUT])
def test_what_measuring_compares_is_right(op: str) -> None:
    problem = Problem(op, Pattern(2, 4), torch.bfloat16, 5, 48, 64, (7,) if "low_rank" in op else ())
    several = candidates.candidates_for(problem, "cpu", compile_reference=False)
    for name in CORES:
        (run,) = several.makers[name]().values()
        assert (run() - several.exact).abs().max() <= 2e-2 * several.exact.abs().max()


def bytes_alive() -> int:
    """Of all tensors, each storage once."""
    gc.collect()
    every = (thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))
    tensors = [
        tensor for tensor in every if tensor.device.type == "cpu"
    ]  # shapes alone, which compilers keep, are meta
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


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


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("train", [True, False])
def test_low_rank_branches_run_there(cores: str, train: bool) -> None:
    gm = sparse(DOUBLY + ",low-rank{rank=3,start=0.0}")
    with torch.no_grad():
        for parameter in gm.parameters():  # branches begin at zero
            parameter.copy_(torch.randn_like(parameter) / 4)
    lower = {"nm_linear_low_rank": cores, choose.GRAD_INPUT: cores}
    compiled = torch.compile(gm, backend="fxsparse", options={**options(cores), "lower": lower})
    for rows in (6, 9):
        x = torch.randn(rows, 32).bfloat16()
        if train:
            count = check(gm, compiled, x)
            assert count[f"{CORES[cores]}_low_rank"] == count["sparse_transpose"] == 2
            continue
        with torch.no_grad():
            exact = copy.deepcopy(gm).double()(x.double())
            assert (compiled(x) - exact).abs().max() <= 3e-2 * exact.abs().max()
    assert "pinned by options" in fxsparse.explain(compiled)
    assert f"fxsparse.{CORES[cores]}_low_rank" in "\n".join(map(str, fxsparse.graphs(compiled))) or train


def test_low_rank_operators_equal_the_reference() -> None:
    dense = torch.randn(48, 64).bfloat16()
    mask = nm_mask(dense.abs(), Pattern(2, 4))
    values, indices = pack(dense, mask, Pattern(2, 4))
    x, down, up = torch.randn(2, 3, 64).bfloat16(), torch.randn(5, 64).bfloat16(), torch.randn(48, 5).bfloat16()
    bias, operand = torch.randn(48).bfloat16(), torch.randn(2, 3, 48).bfloat16()
    exact = torch.nn.functional.linear(x.double(), (dense * mask).double(), bias.double())
    for scale, factor in ((None, 1 / 5), (0.5, 0.5)):
        expected = (exact + factor * (x.double() @ down.double().t() @ up.double().t())).relu() + operand.double()
        for name, pack_words in ((name, PACK[INSTRUCTIONS[name]]) for name in CORES.values()):
            op = getattr(torch.ops.fxsparse, f"{name}_low_rank")
            args = (x, values, pack_words(indices), down, up, bias, scale, "relu add", [operand])
            torch.library.opcheck(op, args)
            assert (op(*args) - expected).abs().max() <= 2e-2 * expected.abs().max()

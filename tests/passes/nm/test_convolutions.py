"""Convolutions: listed by nm-masks, and N:M along what a filter reads where that is asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import RewriteError
from fxsparse.graph.record import record_of
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import InsertNMMasks

ON = "nm-masks{convolutions=true,keep_first=false,keep_head=false}"


class Convolutions(nn.Module):
    """Patches, a grouped convolution of their features along a line, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, (2, 4), stride=(2, 4))
        self.line = nn.Conv1d(16, 12, 5, padding=2, groups=2, bias=False)
        self.odd = nn.Conv1d(12, 3, 3)
        self.head = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.patches(x)).flatten(2)
        return self.head(F.gelu(self.odd(F.gelu(self.line(x)))).mean(-1))


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, GraphModule]:
    torch.manual_seed(0)
    model = Convolutions()
    return model, fxsparse.trace(model, (torch.randn(3, 3, 4, 16),))


def details(gm: GraphModule) -> dict[str, str]:
    return {change.site: change.detail for change in record_of(gm).entries[-1].changes}


def pruned(model: nn.Module) -> dict[str, Tensor]:
    """The masks, by name, of every filter flattened."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 2}
    flat = {name: weight.detach().flatten(1) for name, weight in weights.items() if weight[0].numel() % 4 == 0}
    return {name: nm_mask(flat[name].abs(), Pattern(2, 4)).view_as(weights[name]) for name in flat}


def test_they_are_skipped_with_what_to_do(traced: tuple[nn.Module, GraphModule]) -> None:
    gm = fxsparse.rewrite(copy.deepcopy(traced[1]), "nm-masks{keep_head=false}")
    for path in ("patches", "line", "odd"):
        assert details(gm)[path] == "kept dense, it is a convolution (convolutions=True sparsifies it)"


def test_every_filter_is_pruned_along_what_it_reads(traced: tuple[nn.Module, GraphModule]) -> None:
    """Outputs, gradients and a step at another batch size equal plain torch with the masked filters."""
    model, gm = copy.deepcopy(traced)
    sparse = fxsparse.rewrite(gm, ON)
    assert "masked" in details(sparse)["patches"] and "masked" in details(sparse)["line"]
    assert (
        details(sparse)["odd"].startswith("2:4")
        and details(sparse)["head"] == "kept dense, 3 columns, not a multiple of 4"
    )
    masks = pruned(model)
    assert {name for name, buffer in sparse.named_buffers() if name.endswith("_mask")} == {f"{n}_mask" for n in masks}
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            assert 0.45 < mask.float().mean() < 0.55
            oracle.get_parameter(name).mul_(mask)
    for mode in (True, False):
        x = torch.randn(5, 3, 4, 16, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        mine, theirs = sparse.train(mode)(x), oracle.train(mode)(twin)
        torch.testing.assert_close(mine, theirs)
        for output in (mine, theirs):
            output.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
    for name, parameter in oracle.named_parameters():
        grad = parameter.grad if name not in masks else parameter.grad * masks[name]
        torch.testing.assert_close(sparse.get_parameter(name).grad, grad)


def test_what_a_filter_reads_must_be_whole_groups(traced: tuple[nn.Module, GraphModule]) -> None:
    gm = fxsparse.rewrite(copy.deepcopy(traced[1]), "nm-masks{pattern=2:16,convolutions=true,keep_first=false}")
    assert details(gm)["line"] == "kept dense, 40 weights in each filter, not a multiple of 16"
    assert details(gm)["odd"] == "kept dense, 36 weights in each filter, not a multiple of 16"
    assert details(gm)["patches"] == "kept dense, 24 weights in each filter, not a multiple of 16"


def test_options_that_only_linears_have_are_told(traced: tuple[nn.Module, GraphModule]) -> None:
    for options, word in (("transposable=true", "transposable"), ("dynamic=true,storage=masked", "dynamic")):
        gm = fxsparse.rewrite(copy.deepcopy(traced[1]), f"nm-masks{{convolutions=true,keep_head=false,{options}}}")
        assert word in details(gm)["line"] and details(gm)["line"].startswith("kept dense")


def test_globs_name_them(traced: tuple[nn.Module, GraphModule]) -> None:
    masks = InsertNMMasks({"line": "1:4"}, convolutions=True)
    gm = fxsparse.rewrite(copy.deepcopy(traced[1]), [masks])
    assert details(gm)["line"].startswith("1:4") and "no glob" in details(gm)["odd"]
    gm = fxsparse.rewrite(copy.deepcopy(traced[1]), [InsertNMMasks(convolutions=True, exclude=("lin*",))])
    assert "excluded" in details(gm)["line"]


def test_a_second_pass_and_others_say_so(traced: tuple[nn.Module, GraphModule]) -> None:
    once = fxsparse.rewrite(copy.deepcopy(traced[1]), ON)
    assert details(fxsparse.rewrite(copy.deepcopy(once), "nm-masks{keep_head=false}"))["line"] == "is already 2:4"
    for other in ("double-prune", "low-rank{rank=1}"):
        linear = InsertNMMasks({"head": "1:3"}, keep_head=False)
        both = fxsparse.rewrite(copy.deepcopy(once), [linear, other])
        assert "convolution" in details(both)["line"], other


def test_saved_loaded_and_written_dense(traced: tuple[nn.Module, GraphModule], tmp_path: Path) -> None:
    model, gm = copy.deepcopy(traced)
    x = torch.randn(4, 3, 4, 16)
    sparse = fxsparse.rewrite(gm, ON)
    fxsparse.save(sparse, tmp_path / "model.safetensors")
    loaded = fxsparse.load(tmp_path / "model.safetensors", copy.deepcopy(model), (x,))
    torch.testing.assert_close(loaded(x), sparse(x))
    dense = copy.deepcopy(model)
    dense.load_state_dict(fxsparse.dense_state_dict(sparse))
    torch.testing.assert_close(dense(x), sparse(x))
    with pytest.raises(RewriteError, match=r"patches.*no module holds a masked convolution.*dense_state_dict"):
        fxsparse.to_module(sparse, model)


def test_in_one_line(traced: tuple[nn.Module, GraphModule]) -> None:
    model, gm = copy.deepcopy(traced)
    x = torch.randn(4, 3, 4, 16)
    options: dict[str, Any] = {"passes": ON, "compiler": "aot_eager"}
    expected = fxsparse.rewrite(gm, ON)(x)
    torch.testing.assert_close(torch.compile(model, backend="fxsparse", options=options)(x), expected)


class Others(nn.Module):
    """Weights that are read in other ways: of experts in one tensor, on the left, and a filter through views."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.left = nn.Parameter(torch.randn(8, 8))
        self.mixed = nn.Parameter(torch.randn(8, 8))
        self.taps = nn.Conv1d(8, 8, 4, groups=8, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.bmm(x, self.experts.transpose(1, 2)[x.new_zeros(x.shape[0], dtype=torch.long)])
        x = (self.left @ x.transpose(1, 2)) + torch.einsum("oi,bti->bot", self.mixed, x)
        return F.conv1d(x, self.taps.weight.squeeze(1).unsqueeze(1), self.taps.bias, padding=3, groups=8)


def test_no_weight_of_a_product_is_left_out_without_a_word() -> None:
    model = Others()
    gm = fxsparse.trace(model, (torch.randn(3, 5, 8),))
    told = details(fxsparse.rewrite(copy.deepcopy(gm), ON))
    assert told.keys() == {"experts", "left", "mixed", "taps"}
    assert all("matrices of linears" in told[name] for name in ("experts", "left", "mixed"))
    assert told["taps"].startswith("2:4")
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        oracle.taps.weight.mul_(pruned(model)["taps.weight"])
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(fxsparse.rewrite(gm, ON)(x), oracle(x))

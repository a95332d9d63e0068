"""A module is compared with its graph: rounding of a model that makes much of it passes, a true difference does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import fxsparse
from fxsparse.conversion import comparison
from fxsparse.graph.outputs import tolerance


class Reordered(nn.Linear):
    """A linear that adds up in another order, as another kernel does."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input.flip(-1), self.weight.flip(-1), self.bias)


@pytest.fixture(scope="module")
def pair() -> tuple[GraphModule, nn.Module]:
    """A graph, and a module of equal weights whose linears add up in another order; attention magnifies rounding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, use_cache=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter.mul_(300 if "q_proj" in name or "k_proj" in name else 20)
    gm = fxsparse.trace(model, kwargs={"input_ids": torch.randint(64, (4, 16))})
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Reordered
    return gm, other


def test_rounding_is_no_difference(pair: tuple[GraphModule, nn.Module]) -> None:
    gm, other = pair
    in_doubt = comparison._difference(gm, other, tolerance)
    assert in_doubt is not None and in_doubt.is_small, "the model shall be in doubt in single precision"
    assert comparison.difference(gm, other) is None
    assert all(parameter.dtype == torch.float32 for module in pair for parameter in module.parameters())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.5.self_attn.o_proj.weight"])
def test_a_small_true_difference_is_one(pair: tuple[GraphModule, nn.Module], name: str) -> None:
    gm, other = pair
    wrong = copy.deepcopy(other)
    with torch.no_grad():
        wrong.get_parameter(name)[0, 0] *= 1.01
    assert "logits: outputs of up to" in str(comparison.difference(gm, wrong))

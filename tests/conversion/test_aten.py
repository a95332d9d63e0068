"""`fxsparse.to_aten`: a copy of plain ATen that computes the same, with dense weights under the original names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import RewriteError
from fxsparse.modules.held import Held
from fxsparse.ops.operator import operator_name
from tests.support import clients
from tests.support.outputs import outputs
from tests.support.traced import traced

NM = "nm-masks{keep_first=false,keep_head=false}"


class Twice(nn.Module):
    """A linear that is called twice, and one whose weight is an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shared, self.head = nn.Embedding(16, 32), nn.Linear(32, 32), nn.Linear(32, 16, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.table(ids)).relu()))


def operators(model: nn.Module) -> list[str]:
    """The operators of fxsparse that the graphs in ``model`` call."""
    graphs = [module.graph for module in model.modules() if isinstance(module, GraphModule)]
    calls = (operator_name(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function")
    return [name for name in calls if name]


def check(gm: GraphModule, batch: dict[str, Any]) -> GraphModule:
    """The plain copy of ``gm``, which computes the same, bit for bit, and whose state is dense; ``gm`` stays."""
    training, code = gm.training, gm.code
    state = {name: (tensor, tensor.clone()) for name, tensor in gm.state_dict().items()}
    plain: Any = fxsparse.to_aten(gm)
    assert not plain.training and not operators(plain)
    assert gm.training == training and gm.code == code
    assert all(torch.equal(tensor, before) for tensor, before in state.values())
    for ours, theirs in zip(outputs(plain, batch), outputs(gm.eval(), batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return plain


@pytest.mark.parametrize("recipe", ["SR-STE", "double-prune", "gates", "neurons", "mux", "distill"])
def test_every_recipe_becomes_plain(recipe: str) -> None:
    gm = clients.rewritten(recipe)
    assert operators(gm) or recipe in {"gates", "neurons", "distill"}
    plain = check(gm, clients.make_batch())
    if recipe not in {"mux", "gates"}:  # which no dense state holds
        dense = fxsparse.dense_state_dict(gm)
        assert dense.keys() == plain.state_dict().keys()
        assert all(torch.equal(tensor, dense[name]) for name, tensor in plain.state_dict().items())


def test_a_branch_that_has_started_stays_beside_its_weight() -> None:
    gm = clients.rewritten("low-rank")
    clients.by_hand(gm, autocast=False)
    plain = check(gm, clients.make_batch())
    weight = plain.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert (weight.unflatten(-1, (-1, 4)) != 0).sum(-1).max() == 2
    assert "model.layers.0.mlp.up_proj.weight_down" in plain.state_dict()
    waiting = fxsparse.to_aten(clients.rewritten("low-rank"))
    assert not any("weight_down" in name for name in waiting.state_dict())


def test_weights_stored_the_other_way_round_and_shared_ones() -> None:
    family, gm = traced("gpt2")
    gm = fxsparse.rewrite(gm, NM)
    plain = check(gm, family.make_batch(batch=3))
    state = family.model.state_dict()
    assert {name: tensor.shape for name, tensor in plain.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items() if name in plain.state_dict()
    }
    model, ids = Twice(), torch.randint(16, (3, 5))
    for storage in ("compressed", "masked"):
        passes = f"nm-masks{{keep_first=false,keep_head=false,storage={storage}}}"
        gm = fxsparse.rewrite(model, passes, kwargs={"ids": ids})
        plain = fxsparse.to_aten(gm)
        assert not operators(plain) and len(operators(gm)) == 2
        torch.testing.assert_close(plain(ids=ids), gm.eval()(ids=ids), rtol=0, atol=0)
        torch.testing.assert_close(plain.state_dict(), dict(fxsparse.dense_state_dict(gm)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_parameters_are_in_the_order_of_the_model(name: str) -> None:
    """An optimizer's state goes by it, and a reader expects the weight before its bias."""
    family, base = traced(name)
    gm = fxsparse.rewrite(base, NM)
    for model in (gm, fxsparse.to_module(gm, family.model)):
        order = [name for name, _ in fxsparse.to_aten(model).named_parameters()]
        assert len(order) > 20 and order == [name for name, _ in family.model.named_parameters()]


@pytest.mark.parametrize("passes", ["nm-masks,double-prune", "nm-masks{storage=masked},low-rank{rank=2,start=0.5}"])
def test_modules_become_those_of_the_model(passes: str) -> None:
    model, batch = clients.llama(), clients.make_batch()
    gm = fxsparse.rewrite(copy.deepcopy(clients._base()), passes)
    if "low-rank" in passes:
        clients.by_hand(gm, autocast=False)
    module: Any = fxsparse.to_module(gm, model)
    held = sum(isinstance(part, Held) for part in module.modules())
    plain: Any = fxsparse.to_aten(module)
    assert type(plain) is type(model) and not plain.training and held
    assert sum(isinstance(part, Held) for part in plain.modules()) == (held if "low-rank" in passes else 0)
    assert fxsparse.graph.module_form_of(plain) is None and not hasattr(plain.config, "fxsparse")
    torch.testing.assert_close(plain(**batch).logits, module.eval()(**batch).logits, rtol=0, atol=0)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gm

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids).logits

    outer = fxsparse.to_aten(Outer())
    assert not operators(outer) and operators(gm)
    torch.testing.assert_close(outer(batch["input_ids"]), plain(**batch).logits, rtol=0, atol=0)


def test_what_holds_nothing_rewritten_is_told_so() -> None:
    with pytest.raises(RewriteError, match=r"to_aten takes a model that .* this Linear is not one"):
        fxsparse.to_aten(nn.Linear(2, 2))

"""Dropped layers: bit for bit the model built without them, on every family."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.passes import DropLayers, InsertNMMasks, Pipeline
from fxsparse.passes.drop_layers import dropped_positions
from tests.support.dropped import built_without
from tests.support.experts import mixtral
from tests.support.families import draws_alike
from tests.support.traced import traced

SETS: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("bert", {"bert.encoder.layer": (1,)}),
    ("bert", {"bert.encoder.layer": (0, 2)}),
    ("opt", {"model.decoder.layers": (1,)}),
    ("opt", {"model.decoder.layers": (0, 1)}),
    ("gpt2", {"transformer.h": (0,)}),
    ("gpt2", {"transformer.h": (1,)}),
    ("llama", {"model.layers": (1, 2)}),
    ("llama", {"model.layers": (0,)}),
    ("t5", {"encoder.block": (1,)}),
    ("t5", {"encoder.block": (0,), "decoder.block": (1,)}),
    ("t5", {"decoder.block": (0,)}),
    ("vit", {"vit.layers": (0,)}),
    ("qwen2", {"model.layers": (1,)}),
]


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(output)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(("name", "dropped"), SETS, ids=lambda value: str(value))
def test_equals_the_model_built_without_the_layers(name: str, dropped: dict[str, tuple[int, ...]]) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [DropLayers(indices=dropped)])
    assert len(record_of(gm).entries[-1].rewritten) == sum(map(len, dropped.values()))
    reference = built_without(family.model, dropped)
    compiled = torch.compile(gm, backend="aot_eager")
    for training in (True, False) if draws_alike(base) else (False,):
        gm.train(training), reference.train(training)
        batch = family.make_batch(batch=3)
        outputs, gradients = [], []
        for module in (reference, gm, compiled):
            reference.zero_grad(), gm.zero_grad()
            torch.manual_seed(1)
            output = module(**batch)
            output.loss.backward()
            outputs.append(tensors_of(output))
            owner = reference if module is reference else gm
            gradients.append(sorted(p.grad.double().norm().item() for p in owner.parameters() if p.grad is not None))
        assert len(outputs[0]) > 1
        for ours in outputs[1:]:
            assert len(ours) == len(outputs[0])
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, outputs[0], strict=True))
        for ours in gradients[1:]:
            torch.testing.assert_close(ours, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_dropped_mixtral_layer_computes_nothing_more() -> None:
    """Its routing weights are normalised in place, which must not keep the router and the attention before it alive."""
    family = mixtral()
    base = fxsparse.trace(family.model, kwargs=family.make_batch(batch=4))
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,))])
    reference = built_without(family.model, {"model.layers": (1,)})
    assert not [node for node in gm.graph.nodes if fx.stack_path(node).startswith("model.layers.1.")]
    assert not [node for node in gm.graph.nodes if str(node.target).startswith("model.layers.1.")]
    for training in (True, False):
        gm.train(training), reference.train(training)
        batch = family.make_batch(batch=3)
        ours, theirs = gm(**batch), reference(**batch)
        assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize(("name", "dropped"), SETS[::2], ids=lambda value: str(value))
def test_dead_parameters_leave_the_module(name: str, dropped: dict[str, tuple[int, ...]]) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [DropLayers(indices=dropped)])
    reference = built_without(family.model, dropped)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert count(gm) == count(reference) < count(family.model)
    assert record_of(gm).entries[-1].after.parameters == count(reference)
    (before, after) = (record_of(gm).entries[-1].before, record_of(gm).entries[-1].after)
    assert after.forward_flops < before.forward_flops and after.step_flops < before.step_flops
    left = {key for key in gm.state_dict() if any(key.startswith(f"{p}.{i}.") for p, g in dropped.items() for i in g)}
    assert all("relative_attention_bias" in key for key in left)
    assert {block.index for stack in stacks(gm) for block in stack.blocks if stack.path in dropped}.isdisjoint(
        *dropped.values()
    )


@pytest.mark.parametrize(
    ("configuration", "survivors"),
    [
        ("input", [0, 7, 8, 9, 10, 11]),
        ("output", [0, 1, 2, 3, 4, 11]),
        ("middle", [0, 1, 2, 9, 10, 11]),
        ("both", [0, 4, 5, 6, 7, 11]),
        ("max-gap", [0, 2, 4, 7, 9, 11]),
    ],
)
def test_configurations_of_half_of_twelve(configuration: str, survivors: list[int]) -> None:
    gone = dropped_positions(configuration, 12, 6)
    assert [position for position in range(12) if position not in gone] == survivors


@pytest.mark.parametrize("configuration", ["input", "output", "middle", "both", "max-gap"])
def test_every_configuration_drops_what_was_asked_and_keeps_the_ends(configuration: str) -> None:
    for layers in range(2, 40):
        for count in range(layers - 1):
            gone = dropped_positions(configuration, layers, count)
            assert gone == sorted(set(gone)) and len(gone) == count
            assert not {0, layers - 1} & set(gone)


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(layers)))


def kept_of(item: DropLayers, layers: int) -> list[int]:
    gm = fxsparse.rewrite(deep(layers), [item], (torch.randn(3, 6),))
    return sorted({int(re.findall(r"^\d+", name)[0]) for name in gm.state_dict()})


def test_by_fraction_count_and_index() -> None:
    assert kept_of(DropLayers("max-gap", fraction=0.5), 7) == [0, 2, 4, 6]
    assert kept_of(DropLayers("input", count=2), 6) == [0, 3, 4, 5]
    assert kept_of(DropLayers(indices=(0, 5)), 6) == [1, 2, 3, 4]
    assert kept_of(DropLayers(), 6) == kept_of(DropLayers("max-gap", fraction=0.5), 6)


def test_encoder_and_decoder_apart() -> None:
    _, base = traced("t5")
    gm = fxsparse.rewrite(base, [DropLayers(indices={"decoder.*": (1,)})])
    assert [change.site for change in record_of(gm).entries[-1].rewritten] == ["decoder.block.1"]
    assert any(change.detail.startswith("kept, no glob") for change in record_of(gm).entries[-1].skipped)


def test_a_second_drop_names_layers_as_the_first() -> None:
    model = deep(6)
    gm = fxsparse.rewrite(model, [DropLayers(indices=(1, 2)), DropLayers(indices=(4,))], (torch.randn(3, 6),))
    assert {name.partition(".")[0] for name in gm.state_dict()} == {"0", "3", "5"}
    with pytest.raises(RewriteError, match="has no layer 2; its layers are 0, 3, 5: name some of them with indices="):
        fxsparse.rewrite(gm, [DropLayers(indices=(2,))])
    gm = fxsparse.rewrite(gm, [DropLayers(indices=(0, 5))])
    with pytest.raises(RewriteError, match="has no layer 5; its only layer is 3, which must stay: leave this pass out"):
        fxsparse.rewrite(gm, [DropLayers(indices=(5,))])


def test_batch_norms_of_dropped_layers_go_with_them() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.linear(x))

    model = nn.Sequential(*(Layer() for _ in range(4)))
    gm = fxsparse.rewrite(model, [DropLayers(indices=(1, 2))], (torch.randn(5, 6),))
    assert {name.partition(".")[0] for name in gm.state_dict()} == {"0", "3"}
    reference = nn.Sequential(copy.deepcopy(model[0]), copy.deepcopy(model[3]))
    x = torch.randn(7, 6)
    assert torch.equal(gm.train()(x), reference.train()(x))
    assert torch.equal(gm.eval()(x), reference.eval()(x))


def test_the_optimizer_forgets_what_was_dropped_and_keeps_the_rest() -> None:
    family, base = traced("opt")
    extra = nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([{"params": list(base.parameters())}, {"params": [extra], "lr": 1e-4}])
    for _ in range(2):
        (base(**family.make_batch()).loss + extra.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    gm = fxsparse.rewrite(base, "drop-layers{indices=[1]}")
    before = {id(parameter): copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    gone = {id(parameter) for parameter in base.parameters()} - {id(parameter) for parameter in gm.parameters()}
    assert fxsparse.forget_dropped(optimizer, base, gm) == len(gone) == 16
    held: Collection[int] = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in (*gm.parameters(), extra)} == {id(p) for p in optimizer.state}
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[key], before[id(parameter)][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert fxsparse.forget_dropped(optimizer, base, gm) == 0
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
    gm(**family.make_batch()).loss.backward()
    optimizer.step(), schedule.step()


def test_weights_of_a_dropped_layer_are_no_longer_told_of() -> None:
    base = traced("opt")[1]
    whole = fxsparse.rewrite(base, "nm-masks{keep_first=false}")
    gm = fxsparse.rewrite(base, "nm-masks{keep_first=false},drop-layers{indices=[1]}")
    gone = {weight.name for weight in fxsparse.record_of(whole).weights if ".layers.1." in weight.name}
    assert gone and not gone & {weight.name for weight in fxsparse.record_of(gm).weights}
    dense, expected = fxsparse.dense_state_dict(gm), fxsparse.dense_state_dict(whole)
    assert gone & expected.keys() and not gone & dense.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.items())


def test_composes_with_masks_and_saves(tmp_path: Any) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), InsertNMMasks("2:4")]).eval()
    fxsparse.save(gm, tmp_path / "model.safetensors")
    fresh = copy.deepcopy(family.model)
    batch = family.make_batch()
    loaded = fxsparse.load(tmp_path / "model.safetensors", fresh, kwargs=batch).eval()
    assert torch.equal(loaded(**batch).logits, gm(**batch).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"configuration": "every-other"}, "one of max-gap"),
        ({"fraction": 0.5, "count": 1}, "one of fraction"),
        ({"fraction": 1.0}, r"\(0, 1\)"),
        ({"count": 0}, "whole number of at least 1"),
        ({"indices": (-1,)}, r"indices\[0\]=-1 must be a whole number of at least 0"),
        ({"indices": ()}, "not empty"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DropLayers(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": (0, 1, 2)}, "all 3 layers would be dropped"),
        ({"count": 2}, "at most 1 can"),
        ({"indices": (7,)}, "has no layer 7; its layers are 0, 1, 2"),
        ({"indices": {"encoder": (1,)}}, "matches no stack; there are: model.decoder.layers"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    _, base = traced("opt")
    with pytest.raises(RewriteError, match=message):
        fxsparse.rewrite(base, [DropLayers(**options)])


def test_a_model_without_layers_is_refused() -> None:
    _, base = traced("sequential")
    with pytest.raises(RewriteError, match="no stack of layers"):
        fxsparse.rewrite(base, "drop-layers")


def test_hidden_states_that_are_returned_are_refused() -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = deep(4)

        def forward(self, x: Tensor) -> list[Tensor]:
            states = []
            for layer in self.layers:
                states.append(x := layer(x))
            return states

    with pytest.raises(RewriteError, match=r"layers\.1: the model returns what this layer computes"):
        fxsparse.rewrite(All(), "drop-layers{indices=[1]}", (torch.randn(3, 6),))


def test_text_form() -> None:
    item = DropLayers("both", indices={"encoder.*": (1, 2)})
    assert Pipeline.parse(str(Pipeline(item))).passes == (item,)
    assert str(fxsparse.recipe("layerchop")) == "drop-layers{configuration=max-gap,fraction=0.5}"


def test_a_one_line_call_drops_them_too() -> None:
    model, x = deep(4).eval(), torch.randn(3, 6)
    gm = fxsparse.rewrite(copy.deepcopy(model), "drop-layers", (x,))
    compiled = torch.compile(model, backend="fxsparse", options={"passes": "drop-layers", "compiler": "eager"})
    torch.testing.assert_close(compiled(x), gm(x))
    assert not torch.allclose(compiled(x), model(x))
    torch._dynamo.reset()

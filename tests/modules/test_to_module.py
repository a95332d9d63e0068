"""Rewritten graphs turned back into modules: the same outputs and gradients, the same state, or a refusal."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse import graph as fx
from fxsparse import stored
from fxsparse.errors import CheckpointError, OptionError, RewriteError
from fxsparse.modules.held import Held
from fxsparse.modules.linears import CompressedLinear, LowRankLinear, MaskedLinear
from fxsparse.modules.sites import module_sites
from fxsparse.ops.nm import Pattern, satisfies
from fxsparse.passes import DropLayers, GateStructures, InsertNMMasks, Materialize
from fxsparse.passes.structured import hard_concrete
from fxsparse.passes.structured.gates import UNITS
from tests.support.families import CORE_FAMILIES
from tests.support.traced import traced

RECIPES = {
    "compressed": "nm-masks{pattern=2:4}",
    "double-pruned with branches": "nm-masks{pattern=2:4},double-prune,low-rank{rank=4,start=0}",
    "waiting branches": "nm-masks{pattern=1:4},low-rank{rank=4,start=0.5}",
    "masked": "nm-masks{pattern=2:4,storage=masked},double-prune,low-rank{rank=2,start=0}",
    "SR-STE": "nm-masks{pattern=2:4,storage=masked,dynamic=true}",
    "dense with branches": "low-rank{rank=3,start=0,layers=*}",
    "dense with branches, not the head": "low-rank{rank=3,start=0,layers=*.*}",
}


def output(result: Any) -> Tensor:
    """The loss of a model's result, or its one tensor."""
    if isinstance(result, Tensor):
        return result
    loss: Tensor = result[0] if isinstance(result, tuple) else result.loss
    return loss


def randomise_branches(gm: GraphModule) -> None:
    """Branches start at zero, where they would change nothing if they were lost."""
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith("_up"):
                parameter.normal_(std=0.2)


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[int, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    output(model(**batch)).float().pow(2).mean().backward()
    return {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}


def assert_computes_the_same(module: nn.Module, gm: GraphModule, make_batch: Callable[..., dict[str, Any]]) -> None:
    for size in (3, 5):
        batch = make_batch(batch=size)
        ours, theirs = output(module.eval()(**batch)), output(gm.eval()(**batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    batch = make_batch(batch=3)
    theirs, ours = gradients(gm, batch), gradients(module, batch)  # one set of parameters
    assert theirs.keys() == ours.keys() and theirs
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6)


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is that of the embedding."""
    return any(len(names) > 1 for names in fx.parameter_names(model).values())


def assert_refuses_to_merge_the_head(*models: nn.Module) -> None:
    """A branch beside a tied head has no place in the weight that the embedding reads."""
    for model in models:
        with pytest.raises(CheckpointError, match=r"^\S+ has a low-rank branch, .* reads the same weight without it"):
            fxsparse.dense_state_dict(model)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CORE_FAMILIES)
def test_linears_become_modules_with_the_graphs_state(name: str, recipe: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, RECIPES[recipe])
    randomise_branches(gm)
    module = fxsparse.to_module(gm, family.model)
    assert type(module) is type(family.model)
    sites = list(module_sites(module))
    assert sites and {site.form.name for site in sites} <= set(original := family.model.state_dict())
    assert_computes_the_same(module, gm, family.make_batch)
    mine, theirs = module.state_dict(keep_vars=True), gm.state_dict(keep_vars=True)
    tied = {key for key in set(mine) ^ set(theirs) if "branch" not in recipe}
    assert not tied and all(mine[key] is theirs[key] for key in set(mine) & set(theirs))
    assert {id(p) for p in module.parameters()} == {id(p) for p in gm.parameters()}
    if recipe == "dense with branches" and is_tied(family.model):
        assert_refuses_to_merge_the_head(gm, module)
        return
    dense = fxsparse.dense_state_dict(module)
    assert dense.keys() == original.keys()
    for key, tensor in fxsparse.dense_state_dict(gm).items():
        torch.testing.assert_close(dense[key], tensor, rtol=0, atol=0)


def test_training_computes_what_the_graph_does_where_nothing_is_random() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, RECIPES["double-pruned with branches"])
    randomise_branches(gm)
    module = fxsparse.to_module(gm.train(), family.model)
    assert module.training
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    for path, part in gm.named_modules():
        if "dropout" in path:
            part.training = False
    gm.train()
    module.train()
    batch = family.make_batch(batch=3)
    torch.manual_seed(1)
    ours = output(module(**batch))
    torch.manual_seed(1)
    theirs = output(gm(**batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "t5"])
def test_dropped_layers_are_gone_and_the_others_numbered_anew(name: str) -> None:
    family, base = traced(name)
    indices: Any = {"encoder.*": (0,), "decoder.*": (1,)} if name == "t5" else (0,)
    gm = fxsparse.rewrite(base, [DropLayers(indices=indices), InsertNMMasks("2:4")])
    module: Any = fxsparse.to_module(gm, family.model)
    assert_computes_the_same(module, gm, family.make_batch)
    layers = family.model.config.num_hidden_layers - 1
    assert module.config.num_hidden_layers == layers
    numbers = [part.layer_idx for part in module.modules() if getattr(part, "layer_idx", None) is not None]
    assert all(number < layers for number in numbers) and (numbers or name == "bert")
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and name != "t5"]
    assert all(len(part) == layers for part in lists)
    assert family.model.config.num_hidden_layers == layers + 1
    if name == "t5":
        assert module.encoder.config.num_layers == module.decoder.config.num_layers == layers


def pruned(base: GraphModule, share: float = 0.5) -> GraphModule:
    """A traced model without a random half of its heads, channels, hidden dimensions and a few sublayers."""
    gm = fxsparse.rewrite(base, [GateStructures(UNITS, score="random", target=0.0)])
    for name in hard_concrete.gate_names(gm):
        mask = gm.get_buffer(hard_concrete.mask_name(name))
        mask.copy_((torch.rand(len(mask)) < (share if len(mask) > 1 else 0.8)).float())
        if len(mask) > 1:
            mask[torch.randint(len(mask), ())] = 1
    return fxsparse.rewrite(gm, [Materialize()]).eval()


@pytest.mark.parametrize(
    "name, masks", [("llama", True), ("gpt2", False), ("gpt2", True), ("bert", False), ("opt", False), ("t5", True)]
)
def test_materialised_structures_have_their_sizes(name: str, masks: bool) -> None:
    family, base = traced(name)
    gm = pruned(base)
    if masks:
        gm = fxsparse.rewrite(gm, [InsertNMMasks("1:2", exclude=())])
    module = fxsparse.to_module(gm, family.model)
    for size in (3, 5):
        batch = family.make_batch(batch=size)
        torch.testing.assert_close(output(module(**batch)), output(gm(**batch)), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in gm.parameters())
    assert (
        any(
            isinstance(part, CompressedLinear) or type(part).__name__ == "CompressedConv1D" for part in module.modules()
        )
        == masks
    )


def test_a_table_that_no_remaining_layer_reads_stays_the_models() -> None:
    """Without any attention the graph has lost the rotary frequencies, which the model's code computes all the same."""
    family, base = traced("llama")
    gm = fxsparse.rewrite(base, [GateStructures(("attention",), score="random", target=0.0)])
    for name in hard_concrete.gate_names(gm):
        gm.get_buffer(hard_concrete.mask_name(name)).zero_()
    gm = fxsparse.rewrite(gm, "materialize")
    assert "model.rotary_emb.inv_freq" not in dict(gm.named_buffers())
    assert_computes_the_same(fxsparse.to_module(gm, family.model), gm, family.make_batch)


def test_ragged_groups_of_sparse_projections_keep_their_heads() -> None:
    """Groups of grouped queries that lost different numbers of heads, with N:M projections."""
    family, base = traced("llama")
    gm = fxsparse.rewrite(base, [GateStructures(("heads",), score="random", target=0.0)])
    for name in hard_concrete.gate_names(gm):
        gm.get_buffer(hard_concrete.mask_name(name))[0] = 0  # four query heads, two groups
    gm = fxsparse.rewrite(gm, ["materialize", "nm-masks{keep_first=false}"])
    module: Any = fxsparse.to_module(gm, family.model)
    assert module.model.layers[0].self_attn.keys_of_heads.tolist() == [0, 1, 1]
    assert_computes_the_same(module, gm, family.make_batch)


def test_uniform_widths_stand_in_the_configuration() -> None:
    family, base = traced("llama")
    gm = fxsparse.rewrite(base, [GateStructures(("intermediate",), score="random", target=0.0)])
    for name in hard_concrete.gate_names(gm):
        mask = gm.get_buffer(hard_concrete.mask_name(name))
        mask[: len(mask) // 2] = 0
    module: Any = fxsparse.to_module(fxsparse.rewrite(gm, "materialize"), family.model)
    assert module.config.intermediate_size == 32 == module.model.layers[0].mlp.gate_proj.out_features


def test_selected_tensors_are_the_ones_that_train() -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, "select-tensors{tensors=*fc1*}")
    module = fxsparse.to_module(gm, family.model)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        name for name, _ in module.named_parameters() if "fc1" in name
    }
    assert all(p.requires_grad for p in family.model.parameters())


class Shared(nn.Module):
    """One linear at two paths and a tied pair: what is shared before stays shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.tied(torch.tanh(self.again(torch.tanh(self.first(x))))))
        return y


@pytest.mark.parametrize(
    "recipe", ["nm-masks{keep_first=false}", "nm-masks{keep_first=false,storage=masked,dynamic=true}"]
)
def test_shared_modules_and_tied_weights_stay_shared(recipe: str) -> None:
    model = Shared()
    gm = fxsparse.rewrite(model, recipe, (torch.randn(3, 16),))
    module: Any = fxsparse.to_module(gm, model)
    assert module.first is module.again and module.first is not module.tied
    part = "weight_values" if "masked" not in recipe else "weight"
    assert getattr(module.first, part) is getattr(module.tied, part)
    assert_computes_the_same(module, gm, lambda batch: {"x": torch.randn(batch, 16)})


class Sequence(nn.Module):
    """Three blocks in an ``nn.Sequential``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(torch.relu(self.fc1(x)))
        return y


def test_a_sequential_loses_its_dropped_blocks() -> None:
    model = Sequence()
    gm = fxsparse.rewrite(model, "drop-layers{indices=1},nm-masks", (torch.randn(3, 16),))
    module: Any = fxsparse.to_module(gm, model)
    assert len(module.blocks) == 2
    assert_computes_the_same(module, gm, lambda batch: {"x": torch.randn(batch, 16)})


def test_a_linear_alone_and_a_model_on_the_meta_device() -> None:
    model = nn.Linear(16, 8)
    gm = fxsparse.rewrite(model, "nm-masks{keep_first=false,keep_head=false}", (torch.randn(3, 16),))
    module = fxsparse.to_module(gm, model)
    assert isinstance(module, CompressedLinear) and isinstance(module, nn.Linear)
    x = torch.randn(5, 16)
    assert torch.equal(module(x), gm(x))
    with torch.device("meta"):
        empty = nn.Linear(16, 8)
    assert torch.equal(fxsparse.to_module(gm, empty)(x), gm(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x))
        return y


@functools.cache
def encoder() -> tuple[nn.Module, GraphModule]:
    model = Encoder()
    return model, fxsparse.trace(model, (torch.randn(3, 5, 32),))


@pytest.mark.parametrize(
    "passes", ["nm-masks,low-rank{rank=2,start=0}", "nm-masks{storage=masked,exclude=[*out_proj,*linear?]}"]
)
def test_weights_that_a_module_reads_itself_keep_their_form(passes: str) -> None:
    """``nn.MultiheadAttention`` hands its weights to a function; they are computed for it on every read."""
    model, base = encoder()
    x = torch.randn(3, 5, 32)
    gm = fxsparse.rewrite(base, passes)
    randomise_branches(gm)
    module: Any = fxsparse.to_module(gm, model)
    attention = module.encoder.layers[1].self_attn
    assert isinstance(attention, nn.MultiheadAttention) and isinstance(attention, Held)
    assert ("in_proj_weight_values" if "masked" not in passes else "in_proj_weight") in attention._parameters
    assert_computes_the_same(module, gm, lambda batch: {"x": torch.randn(batch, 5, 32)})
    with torch.no_grad():  # where nn.TransformerEncoderLayer takes its fused path
        torch.testing.assert_close(module.eval()(x), gm.eval()(x), rtol=1e-5, atol=1e-5)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize(
    "passes, named", [("nm-masks,double-prune", "double-prune"), ("nm-masks{storage=masked}", "nm-masks")]
)
def test_a_second_pruning_or_a_mask_that_a_reader_would_lose_is_refused(passes: str, named: str) -> None:
    model, base = encoder()
    gm = fxsparse.rewrite(base, passes)
    with pytest.raises(RewriteError, match=rf"{named}: encoder.layers.0.self_attn.*exclude"):
        fxsparse.to_module(gm, model)
    gm = fxsparse.rewrite(base, [InsertNMMasks("2:4", exclude=("*self_attn*",)), "double-prune"])
    assert_computes_the_same(fxsparse.to_module(gm, model), gm, lambda batch: {"x": torch.randn(batch, 5, 32)})


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes, words",
    [
        ("multiplex{n=2}", "multiplex: .*keep the graph form"),
        ("gates", "gates: .*run materialize first"),
        ("drop-dims", "drop-dims: .*run materialize first"),
        ("select-neurons", "select-neurons: .*train the graph form"),
        ("prune-operands{matrix=gradients}", "prune-operands: .*keep the graph form"),
    ],
)
def test_what_modules_cannot_hold_is_refused_with_the_pass(passes: str, words: str) -> None:
    family, base = traced("bert")
    with pytest.raises(RewriteError, match=words):
        fxsparse.to_module(fxsparse.rewrite(base, passes), family.model)


def test_a_model_that_differs_is_refused() -> None:
    family, base = traced("bert")
    gm = fxsparse.rewrite(base, "nm-masks")
    with pytest.raises(RewriteError, match="has none of the graph's parameters"):
        fxsparse.to_module(gm, nn.Linear(4, 4))
    other = copy.deepcopy(family.model)
    other.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.Tanh()
    with pytest.raises(RewriteError, match=r"what the graph does: (loss|logits): outputs of up to .* differ by"):
        fxsparse.to_module(gm, other)
    with pytest.raises(OptionError, match=r"takes a model that fxsparse\.trace"):
        fxsparse.to_module(family.model, family.model)


def test_functions_that_read_graphs_say_what_to_do() -> None:
    family, base = traced("bert")
    module = fxsparse.to_module(fxsparse.rewrite(base, "nm-masks"), family.model)
    with pytest.raises(OptionError, match=r"count_flops takes a graph.*fxsparse.trace\(module"):
        fxsparse.count_flops(module)


# --- what goes with a module ------------------------------------------------------------------------------------------


def test_repr_says_how_a_weight_is_held() -> None:
    family, base = traced("gpt2")
    gm = fxsparse.rewrite(base, "nm-masks,double-prune,low-rank{rank=4,start=0.5}")
    module: Any = fxsparse.to_module(gm, family.model)
    shown = "in_features=64, out_features=32, bias=True, 2:4 compressed, double-pruned backward, rank=4 (not started)"
    assert f"(c_proj): CompressedConv1D({shown})" in str(module.transformer.h[1].mlp)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    for passes, kind in (
        ("nm-masks{keep_head=false,storage=masked,dynamic=true}", MaskedLinear),
        ("low-rank{rank=2,layers=*}", LowRankLinear),
    ):
        module = fxsparse.to_module(fxsparse.rewrite(model, passes, (torch.randn(3, 8),)), model)
        assert isinstance(module[2], kind)
        assert ("2:4 masked, dynamic mask" if kind is MaskedLinear else "rank=2 (not started)") in str(module[2])


def test_weight_is_dense_and_read_only() -> None:
    family, base = traced("llama")
    gm = fxsparse.rewrite(base, "nm-masks{keep_head=false}")
    module: Any = fxsparse.to_module(gm, family.model)
    weight = module.lm_head.weight
    assert weight.shape == family.model.lm_head.weight.shape and weight.dtype == torch.float32
    assert satisfies(weight.detach(), Pattern(2, 4))
    assert torch.equal(weight, fxsparse.dense_state_dict(gm)["lm_head.weight"])
    assert type(weight + 1) is Tensor and type(weight.detach()) is Tensor
    for write in (
        lambda: weight.data.add_(1),
        lambda: weight.copy_(torch.zeros_like(weight)),
        lambda: weight.__setitem__(0, 0),
        lambda: setattr(weight, "data", torch.zeros_like(weight)),
    ):
        with pytest.raises(RewriteError, match=r"lm_head\.weight: .*read-only"):
            write()
    weight.pow(2).sum().backward()
    assert module.lm_head.weight_values.grad is not None


def test_copies_and_files_are_complete(tmp_path: Path) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, "nm-masks,double-prune,low-rank{rank=2,start=0}")
    randomise_branches(gm)
    module = fxsparse.to_module(gm, family.model).eval()
    batch = family.make_batch(batch=2)
    torch.save(module, tmp_path / "module.pt")
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(tmp_path / "module.pt", weights_only=False),
    ):
        assert torch.equal(output(twin(**batch)), output(module(**batch)))
        assert fxsparse.explain(twin) == fxsparse.explain(gm)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_save_writes_what_the_graph_would(name: str, tmp_path: Path) -> None:
    """Also of a model whose layers have other numbers than in the graph, and with a branch beside a tied head, which
    the file keeps apart and no dense weights hold."""
    family, base = traced(name)
    original = copy.deepcopy(family.model)
    drop = DropLayers(indices={"encoder.*": (0,), "decoder.*": (0,)} if name == "t5" else (0,))
    gm = fxsparse.rewrite(base, [drop, "nm-masks", "low-rank{rank=2,start=0,layers=*}"])
    randomise_branches(gm)
    module = fxsparse.to_module(gm, family.model)
    fxsparse.save(module, tmp_path / "model.safetensors")
    fxsparse.save(gm, tmp_path / "graph.safetensors")
    written, wanted = (stored.read(tmp_path / f"{form}.safetensors").tensors for form in ("model", "graph"))
    assert written.keys() == wanted.keys() and all(torch.equal(written[key], wanted[key]) for key in wanted)
    batch = family.make_batch(batch=3)
    loaded = fxsparse.load(tmp_path / "model.safetensors", original, kwargs=family.make_batch(batch=4))
    torch.testing.assert_close(output(loaded.eval()(**batch)), output(module.eval()(**batch)), rtol=1e-5, atol=1e-6)
    assert_refuses_to_merge_the_head(gm, module, loaded)
    gm = fxsparse.rewrite(base, [drop, "nm-masks", "low-rank{rank=2,start=0,layers=*.*}"])
    randomise_branches(gm)
    dense = fxsparse.dense_state_dict(fxsparse.to_module(gm, family.model))
    for key, tensor in fxsparse.dense_state_dict(gm).items():
        assert torch.equal(tensor, dense[key])


def test_casting_keeps_indices_and_masks() -> None:
    family, base = traced("llama")
    gm = fxsparse.rewrite(base, "nm-masks,double-prune")
    module: Any = fxsparse.to_module(gm, copy.deepcopy(family.model)).to(torch.bfloat16)
    batch = family.make_batch(batch=2)
    wanted = copy.deepcopy(family.model).to(torch.bfloat16).eval()
    wanted.load_state_dict({k: v.to(torch.bfloat16) for k, v in fxsparse.dense_state_dict(gm).items()})
    torch.testing.assert_close(module.eval()(**batch).logits, wanted(**batch).logits, rtol=2e-2, atol=2e-2)
    linear = module.model.layers[1].mlp.up_proj
    assert linear.weight_values.dtype == torch.bfloat16 and linear.weight_indices.dtype == torch.uint8


def test_memory_is_that_of_the_compressed_form() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 256, bias=False), nn.ReLU(), nn.Linear(256, 8))
    gm = fxsparse.rewrite(model, "nm-masks", (torch.randn(3, 128),))
    module: Any = fxsparse.to_module(gm, model)
    held = sum(t.nbytes for t in (*module[2].parameters(), *module[2].buffers()))
    assert held == 128 * 256 * 4 // 2 + 128 * 256 // 2 * 2 // 8 and held < model[2].weight.nbytes * 0.6
    assert not any(t.shape == (256, 128) for t in (*module.parameters(), *module.buffers()))
    del gm
    twin = copy.deepcopy(module)
    assert sum(t.nbytes for t in twin.parameters()) == sum(t.nbytes for t in module.parameters())


# --- traced again -----------------------------------------------------------------------------------------------------


def test_a_module_that_is_traced_again_is_known_to_passes_and_checkpoints() -> None:
    family, base = traced("gpt2")
    gm = fxsparse.rewrite(base, [DropLayers(indices=(0,)), "nm-masks,low-rank{rank=2,start=0.5}"])
    module = fxsparse.to_module(gm, family.model)
    again = fxsparse.trace(module, kwargs=family.make_batch(batch=4))
    assert_computes_the_same(module, again, family.make_batch)
    assert fxsparse.record_of(again).text == fxsparse.record_of(gm).text
    assert not any("hooks" in note for note in fxsparse.record_of(again).notes)
    assert fxsparse.count_flops(again).forward == fxsparse.count_flops(gm).forward
    further = fxsparse.rewrite(again, "double-prune")
    assert len(fxsparse.record_of(further).entries[-1].rewritten) == len(list(module_sites(module)))
    twice = fxsparse.to_module(further, module)
    assert all(site["column_mask"] is not None for site in module_sites(twice))
    optimizer = torch.optim.SGD(twice.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(twice, optimizer, total_steps=1)
    output(twice(**family.make_batch(batch=2))).backward()
    optimizer.step()
    schedule.step()
    assert twice.state_dict()["low_rank_started"].all()
    dense = fxsparse.dense_state_dict(twice)
    assert all(not key.endswith(("_values", "_down", "_up", "_started")) for key in dense)
    wanted = fxsparse.dense_state_dict(fxsparse.trace(twice, kwargs=family.make_batch(batch=4)))
    assert dense.keys() == wanted.keys() and all(torch.equal(dense[key], wanted[key]) for key in wanted)


def test_adapters_stay_dense_unless_asked_for() -> None:
    peft = pytest.importorskip("peft")
    family, base = traced("llama")
    module = fxsparse.to_module(fxsparse.rewrite(base, "nm-masks{pattern=2:4}"), family.model)
    module.config.use_cache = False
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=8, target_modules=["up_proj", "down_proj"]))
    gm = fxsparse.trace(adapted, kwargs=family.make_batch(batch=4))
    assert len(fxsparse.record_of(gm).weights) == len(list(module_sites(adapted)))
    with pytest.warns(UserWarning, match="rewrote nothing"):
        again = fxsparse.rewrite(gm, "nm-masks")
    details = {change.site: change.detail for change in fxsparse.record_of(again).entries[-1].changes}
    lora = {site: detail for site, detail in details.items() if "lora_" in site}
    assert len(lora) == 12 and all("part of an adapter, lora_" in detail for detail in lora.values())
    assert any(detail == "is already 2:4" for detail in details.values())
    asked = fxsparse.rewrite(gm, "nm-masks{keep_adapters=false}")
    assert all("lora_" in change.site for change in fxsparse.record_of(asked).entries[-1].rewritten)
    assert len(fxsparse.record_of(asked).entries[-1].rewritten) == 12


class Keeping(nn.Module):
    """Keeps what it computed last, as RecurrentGemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(x).relu())


def test_what_a_model_keeps_of_its_last_call_may_have_a_gradient() -> None:
    model, x = Keeping(), torch.randn(3, 16)
    gm = fxsparse.rewrite(model, "nm-masks{keep_first=false,keep_head=false}", (x,))
    model.last = model(x)
    module = fxsparse.to_module(gm, model)
    torch.testing.assert_close(module(x), gm(x))
    assert module.last is not model.last and not module.last.requires_grad  # type: ignore[union-attr]

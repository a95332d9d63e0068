"""The backend: the bare call computes what eager computes, the one-line call what the masked dense model computes."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fxsparse import graph as fx
from fxsparse.backend.backend import compiled_graphs
from fxsparse.backend.whole_model import forget
from fxsparse.errors import LoweringError, RewriteError
from fxsparse.graph import runtime_state
from fxsparse.graph.derived_buffers import Derived, derive
from fxsparse.graph.record import Change, rewrote
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes.base import Pass
from fxsparse.passes.nm.masks import InsertNMMasks
from fxsparse.passes.pipeline import Pipeline
from tests.support.families import FAMILIES, Family

ALL_24 = "nm-masks{pattern=2:4,keep_first=false,keep_head=false}"


def one_line(passes: Any = ALL_24, **options: Any) -> dict[str, Any]:
    return {"backend": "fxsparse", "options": {"passes": passes, "compiler": "aot_eager", **options}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Broken(nn.Module):
    """Identical layers with a graph break after each: one compiled graph serves several of them."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def masked_copy(model: nn.Module, compiled: Any) -> nn.Module:
    """A dense copy of ``model`` with those weights pruned by magnitude that the graphs' records say are masked."""
    masked = copy.deepcopy(model)
    for graph in compiled_graphs(compiled):
        assert graph.record is not None
        assert not graph.notes
        for held in graph.record.weights:
            prune_(masked.get_parameter(held.name), held.pattern, held.transposed)
    return masked


@torch.no_grad()
def prune_(weight: Tensor, pattern: str = "2:4", transposed: bool = False) -> None:
    dense = weight.t() if transposed else weight
    dense.mul_(nm_mask(dense.abs(), Pattern.parse(pattern)))


def run(model: Any, batch: dict[str, Any], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    out = model(**batch)
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.loss if out.get("loss") is not None else out[0]


# --- the bare call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "bert"])
def test_bare_call_computes_what_eager_computes(name: str) -> None:
    family: Family = FAMILIES[name]()
    compiled = torch.compile(family.model, backend="fxsparse", options={"compiler": "aot_eager"})
    for batch_size in (4, 3):
        batch = family.make_batch(batch_size, 16)
        loss, expected = run(compiled, batch), run(family.model, batch)
        torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(run(compiled, batch), [*family.model.parameters()], allow_unused=True)
    expected_gradients = torch.autograd.grad(run(family.model, batch), [*family.model.parameters()], allow_unused=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)
    for graph in compiled_graphs(compiled):
        assert graph.record is None
        assert graph.choices == []


@pytest.mark.inductor
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_bare_call_under_inductor(mode: str | None) -> None:
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Dropout(0.5), nn.Linear(48, 16)).eval()
    compiled = torch.compile(model, backend="fxsparse", mode=mode)
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.inductor
def test_operators_in_the_graph_are_inlined_on_a_cpu() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 16))
            self.register_buffer("mask", nm_mask(self.weight.detach().abs(), Pattern(2, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.ops.fxsparse.masked_linear(x, self.weight, self.mask, None, None))

    model, x = Masked(), torch.randn(5, 16)
    compiled = torch.compile(model, backend="fxsparse")
    _, code = torch._inductor.utils.run_and_get_code(lambda: compiled(x).sum().backward())
    assert not any("torch.ops.fxsparse" in source for source in code)
    gradient, model.weight.grad = model.weight.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(gradient, model.weight.grad)
    (choice,) = compiled_graphs(compiled)[0].choices
    assert (choice.op, choice.site, choice.implementation) == ("masked_linear", "weight", "reference")


# --- the one-line call ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*rewrote nothing")  # pieces between graph breaks without a linear
@pytest.mark.parametrize(
    ("name", "compiler"),
    [("sequential", "aot_eager"), ("bert", "aot_eager"), ("opt", "eager"), ("gpt2", "eager"), ("llama", "eager")],
)
def test_one_line_call_is_the_masked_model(name: str, compiler: str) -> None:
    family = FAMILIES[name]()
    compiled = torch.compile(family.model, **one_line("nm-masks{pattern=2:4}", compiler=compiler))
    first = family.make_batch(4, 16)
    loss = run(compiled, first)
    if name == "opt" and len(compiled_graphs(compiled)) > 1:
        pytest.skip("the layer drop of this transformers breaks the graph: layers share graphs, which name the first")
    masked = masked_copy(family.model, compiled)
    held = [weight for graph in compiled_graphs(compiled) for weight in graph.record.weights]  # type: ignore[union-attr]
    assert held
    torch.testing.assert_close(loss, run(masked, first))
    other = family.make_batch(3, 16)
    run(compiled, other).backward()
    run(masked, other).backward()
    transposes = {weight.name: weight.transposed for weight in held}
    for path, parameter in family.model.named_parameters():
        expected = masked.get_parameter(path).grad
        if path in transposes:
            assert parameter.grad is not None
            assert expected is not None
            transposed = transposes[path]
            dense = parameter.detach().t() if transposed else parameter.detach()
            mask = nm_mask(dense.abs(), Pattern(2, 4))
            expected = expected * (mask.t() if transposed else mask)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
    if name == "sequential":
        family.model.eval(), masked.eval()
        torch.testing.assert_close(run(compiled, other), run(masked, other))


def test_recipe_masks_forward_and_backward() -> None:
    model, x = (
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)),
        torch.randn(6, 16),
    )
    compiled = torch.compile(model, backend="fxsparse", options={"recipe": "slope", "compiler": "aot_eager"})
    torch.testing.assert_close(compiled(x), masked_copy(model, compiled)(x))
    (graph,) = compiled_graphs(compiled)
    assert [entry.text.partition("{")[0] for entry in graph.record.entries] == ["nm-masks", "double-prune"]  # type: ignore[union-attr]
    assert [(choice.op, choice.site) for choice in graph.choices] == [("masked_linear", "2.weight")]


@pytest.mark.inductor
def test_one_line_call_under_inductor_with_dynamic_shapes() -> None:
    model = Block()
    compiled = torch.compile(model, backend="fxsparse", dynamic=True, options={"passes": ALL_24})
    for batch in (3, 5, 8):
        x = torch.randn(batch, 16)
        out = compiled(x)
        torch.testing.assert_close(out, masked_copy(model, compiled)(x))
        out.sum().backward()
    assert len(compiled_graphs(compiled)) == 1


def test_layers_that_share_a_compiled_graph_get_their_own_masks() -> None:
    model, x = Broken(), torch.randn(5, 16)
    compiled = torch.compile(model, **one_line())
    out = compiled(x)
    masked = copy.deepcopy(model)
    for parameter in masked.parameters():
        if parameter.dim() == 2:
            prune_(parameter)
    assert len(compiled_graphs(compiled)) < len(model.layers)  # or this test shows nothing
    torch.testing.assert_close(out, masked(x))
    out.sum().backward()
    masked(x).sum().backward()
    for ours, theirs in zip(model.layers, masked.layers, strict=True):
        torch.testing.assert_close(ours.norm.weight.grad, theirs.norm.weight.grad)


@pytest.mark.parametrize("glob", ["layers.[0-1].*", "layers.[13].*"])
def test_layers_that_share_a_compiled_graph_but_differ_are_refused(glob: str) -> None:
    passes = InsertNMMasks({glob: "2:4"}, keep_first=False, keep_head=False)
    with pytest.raises(RewriteError, match="layer"):
        torch.compile(Broken(), **one_line(passes))(torch.randn(5, 16))


def test_masks_stay_while_weights_train_and_follow_both_modes() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 16)), torch.randn(64, 16)
    compiled = torch.compile(model, **one_line())
    before = [nm_mask(model[i].weight.detach().abs(), Pattern(2, 4)) for i in (0, 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    model.eval()
    hidden = torch.relu(nn.functional.linear(x, model[0].weight * before[0], model[0].bias))
    torch.testing.assert_close(compiled(x), nn.functional.linear(hidden, model[3].weight * before[1], model[3].bias))
    assert any(
        (mask != nm_mask(model[i].weight.detach().abs(), Pattern(2, 4))).any()
        for mask, i in zip(before, (0, 3), strict=True)
    )


def test_replaced_weights_get_the_masks_of_the_model_and_new_ones_once_it_forgets() -> None:
    model, x = Block(), torch.randn(4, 16)
    compiled = torch.compile(model, **one_line())
    compiled(x)
    masks = {name: model.state_dict()[f"_fxsparse.{name}.weight_mask"].clone() for name in ("up", "down")}
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))  # as load_state_dict(assign=True) does
    expected = masked_copy(model, compiled)
    with torch.no_grad():
        for name, mask in masks.items():
            expected.get_submodule(name).weight.copy_(model.get_submodule(name).weight * mask)
    torch.testing.assert_close(compiled(x), expected(x))
    forget(model)
    torch.testing.assert_close(compiled(x), masked_copy(model, compiled)(x))
    assert not torch.equal(model.state_dict()["_fxsparse.up.weight_mask"], masks["up"])


def test_tied_weights_share_a_mask() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    x = torch.randn(4, 16)
    compiled = torch.compile(model, **one_line())
    torch.testing.assert_close(compiled(x), masked_copy(model, compiled)(x))


def test_names_are_the_models_own_after_graph_breaks_and_in_functions() -> None:
    model, x = Broken(2), torch.randn(4, 16)
    compiled = torch.compile(model, **one_line())
    compiled(x)
    sites = {weight.name for graph in compiled_graphs(compiled) for weight in graph.record.weights}  # type: ignore[union-attr]
    assert sites == {f"layers.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}
    torch._dynamo.reset()
    block = Block()

    @torch.compile(**one_line())
    def step(x: Tensor) -> Tensor:
        return block(x).sum()

    step(x)
    (graph,) = compiled_graphs(step)
    assert {weight.name for weight in graph.record.weights} == {"up.weight", "down.weight"}  # type: ignore[union-attr]


def test_no_parameter_is_kept_alive() -> None:
    model = Broken(2)
    compiled = torch.compile(model, **one_line())
    compiled(torch.randn(4, 16)).sum().backward()
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    assert runtime_state._table
    del model, compiled
    gc.collect()
    assert not [reference for reference in references if reference() is not None]
    assert not runtime_state._table


# --- what the one-line call refuses -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies every linear's result; ``how`` is where the factor lives."""

    name: ClassVar[str] = "test-scale"
    how: str = "derived"

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        for linear in list(fx.linears(graph)):
            name, factor = f"{linear.name}_scale", torch.full((1,), 3.0)
            if self.how == "parameter":
                fx.set_parameter(graph, name, factor)
            else:
                fx.set_buffer(graph, name, factor)
            if self.how == "derived":
                derive(graph, name, Derived(_peak, (linear.name,)))
            elif self.how == "constant":
                derive(graph, name, Derived(_peak, ()))
            after = linear.node.next
            read = fx.insert_attribute(graph, name, before=after)
            with graph.graph.inserting_before(after):
                product = graph.graph.call_function(torch.ops.aten.mul.Tensor, (linear.node, read))
            fx.refresh(graph, product)
            linear.node.replace_all_uses_with(product, lambda user, product=product: user is not product)
            yield rewrote(linear.path, self.how)


def _peak(weight: Tensor) -> Tensor:
    return weight.abs().amax().reshape(1)


def test_any_pass_may_add_derived_state_and_constants() -> None:
    model, x = nn.Linear(8, 8), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, **one_line(Scale()))(x), model(x) * _peak(model.weight))
    torch.testing.assert_close(torch.compile(model, **one_line(Scale("constant")))(x), model(x) * 3)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (Scale("parameter"), "fxsparse.rewrite"),
        (Scale("buffer"), "fxsparse.graph.derived_buffers.derive"),
        ("nm-masks{keep_first=false,keep_head=false},low-rank{rank=2}", "fxsparse.rewrite"),
    ],
)
def test_state_the_optimizer_cannot_have_seen_is_refused(passes: Any, message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        torch.compile(Broken(), **one_line(passes))(torch.randn(3, 16))


def test_a_graph_that_cannot_be_retraced_runs_as_it_was_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no such form")

    monkeypatch.setattr("fxsparse.backend.one_line.retrace", fail)
    model, x = Block(), torch.randn(3, 16)
    compiled = torch.compile(model, **one_line())
    with pytest.warns(UserWarning, match="no such form"):
        torch.testing.assert_close(compiled(x), model(x))
    assert "no such form" in compiled_graphs(compiled)[0].notes[0]
    with pytest.raises(LoweringError, match="no such form"):
        torch.compile(model, **one_line(fallback=False))(x)


# --- which graphs belong to what --------------------------------------------------------------------------------------


def test_graphs_are_found_for_modules_functions_and_methods() -> None:
    x = torch.randn(4, 16)
    how = {"backend": "fxsparse", "options": {"compiler": "eager"}}

    def double(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    function = torch.compile(double, **how)
    function(x)
    assert len(compiled_graphs(function)) == 2
    module = torch.compile(nn.Linear(16, 16), **how)
    assert compiled_graphs(module) == []
    module(x)
    assert len(compiled_graphs(module)) == 1
    in_place = Block()
    in_place.compile(**how)
    in_place(x)
    assert len(compiled_graphs(in_place)) == 1
    torch._dynamo.reset()
    method = Block()
    assert compiled_graphs(torch.compile(method.forward, **how)) == []
    method.forward = torch.compile(method.forward, **how)  # type: ignore[method-assign]
    method(x)
    assert len(compiled_graphs(method.forward)) == 1
    twin = torch.compile(Block(), **how)  # runs the graph of the other instance: Dynamo does not compile again
    twin(x)
    assert compiled_graphs(twin) == compiled_graphs(method.forward)


def test_graphs_of_two_compilations_of_one_module_are_told_apart() -> None:
    model, x = Block(), torch.randn(4, 16)
    plain = torch.compile(model, backend="fxsparse", options={"compiler": "eager"})
    sparse = torch.compile(model, **one_line())
    plain(x), sparse(x)
    assert [graph.record for graph in compiled_graphs(plain)] == [None]
    assert [graph.options.pipeline for graph in compiled_graphs(sparse)] == [Pipeline(ALL_24)]
    for _ in range(2):
        torch._dynamo.reset()
        assert compiled_graphs(plain) == []
        plain(x)
        assert len(compiled_graphs(plain)) == 1


def test_nothing_is_warned_about_in_the_bare_call() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(Block(), backend="fxsparse", options={"compiler": "aot_eager"})(torch.randn(3, 16))


# --- modes and regions ------------------------------------------------------------------------------------------------


def test_autocast_and_no_grad_regions_stay() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = self.down(torch.relu(self.up(x)))
            with torch.no_grad():
                constant = self.down(torch.relu(self.up(x)))
            return low, constant

    model, x = Regions(), torch.randn(4, 16)
    compiled = torch.compile(model, **one_line())
    ours, theirs = compiled(x), masked_copy(model, compiled)(x)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its)
        assert mine.requires_grad is its.requires_grad


def test_checkpointed_regions_are_rewritten_and_stay_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False) * 2

    lowered: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: list[Any], options: Any) -> Any:
        lowered.append(gm)
        return gm.forward

    monkeypatch.setattr("fxsparse.backend.backend._compile", keep)
    model, x = Checkpointed(), torch.randn(4, 16)
    compiled = torch.compile(model, **one_line())
    torch.testing.assert_close(compiled(x), masked_copy(model, compiled)(x))
    marks = {node.name: "recompute" in node.meta for node in lowered[0].graph.nodes if node.op == "call_function"}
    assert [name for name, marked in marks.items() if not marked] == ["mul"]
    assert sum(name.startswith("masked_linear") for name in marks) == 2

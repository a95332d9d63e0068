"""Pipelines: all or nothing, a record of everything, replay, and passes of others."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import PassManager

import fxsparse
from fxsparse import graph as fx
from fxsparse.errors import CheckpointError, RewriteError
from fxsparse.graph.record import Record, record_of
from fxsparse.passes import Change, DoublePruneBackward, InsertNMMasks, Materialize, Pass, Pipeline, rewrote, skipped
from fxsparse.passes.base import pass_classes
from tests.support.families import FAMILIES

aten = torch.ops.aten


@dataclass(frozen=True)
class SquareReLU(Pass):
    """A pass of somebody else's: gelu becomes the square of a relu."""

    name: ClassVar[str] = "test-square-relu"

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        for node in graph.graph.find_nodes(op="call_function", target=aten.gelu.default):
            relu = fx.insert_call(graph, aten.relu.default, (node.args[0],), like=node)
            fx.replace(node, fx.insert_call(graph, aten.mul.Tensor, (relu, relu), like=node))
            yield rewrote(fx.stack_path(relu), "gelu to relu squared")


@dataclass(frozen=True)
class FailsHalfWay(Pass):
    name: ClassVar[str] = "test-fails"

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        for linear in list(fx.linears(graph)):
            fx.replace(linear.node, linear.input)
            fx.delete(graph, linear.name)
            yield rewrote(linear.path, "removed")
            raise ValueError("half way")


@dataclass(frozen=True)
class ScaleLargest(Pass):
    """A pass that finds something out: the linear of the largest weight is scaled, and a replay scales that one."""

    name: ClassVar[str] = "test-scale-largest"
    layer: str | None = None

    def rewrite(self, graph: GraphModule) -> Generator[Change, None, ScaleLargest]:
        linears = {linear.path: linear for linear in fx.linears(graph)}
        sizes = {path: float(graph.get_parameter(linear.name).detach().abs().max()) for path, linear in linears.items()}
        layer = self.layer or max(sizes, key=sizes.__getitem__)
        for path, linear in linears.items():
            if path == layer:
                fx.transform(graph, linear.node, torch.mul, 2.0)
                yield rewrote(path, "scaled")
            else:
                yield skipped(path, "is not the largest")
        return ScaleLargest(layer)


def small() -> tuple[nn.Sequential, tuple[torch.Tensor]]:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    return model, (torch.randn(3, 8),)


def test_passes_of_others_compose_with_ours() -> None:
    model, args = small()
    gm = fxsparse.rewrite(model, [InsertNMMasks("2:4"), SquareReLU()], args)
    assert [len(entry.rewritten) for entry in record_of(gm).entries] == [1, 2]
    masked = copy.deepcopy(model)
    masked.load_state_dict(fxsparse.dense_state_dict(gm))
    x = torch.randn(5, 8)
    expected = masked[4](masked[2](masked[0](x).relu().square()).relu().square())
    torch.testing.assert_close(gm(x), expected)
    assert Pipeline.parse(record_of(gm).text) == Pipeline([InsertNMMasks("2:4"), SquareReLU()])


def test_a_pass_runs_in_a_pass_manager_of_torch() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    result = PassManager(passes=[SquareReLU()])(gm)
    assert result is not None and result.modified
    assert not gm.graph.find_nodes(op="call_function", target=aten.gelu.default)


def test_a_failing_pass_leaves_the_model_as_it_was() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    code, state, expected = (
        gm.code,
        {name: id(tensor) for name, tensor in gm.state_dict(keep_vars=True).items()},
        gm(*args),
    )
    with pytest.raises(RewriteError, match=r"test-fails.*half way") as caught:
        Pipeline([InsertNMMasks(), FailsHalfWay()])(gm)
    assert caught.value.pass_name == "test-fails"
    assert gm.code == code
    assert {name: id(tensor) for name, tensor in gm.state_dict(keep_vars=True).items()} == state
    assert torch.equal(gm(*args), expected)
    assert not record_of(gm).entries


# --- whose mistake it is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeavesBrokenGraph(Pass):
    name: ClassVar[str] = "test-broken"

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        last = graph.graph.output_node().all_input_nodes[0]
        with graph.graph.inserting_before(last):
            early = graph.graph.call_function(aten.relu.default, (last,))
        graph.graph.output_node().replace_input_with(last, early)
        yield rewrote("", "a node before its input")


class MasksOfMine(InsertNMMasks):
    """A subclass without a rewrite of its own: what breaks in it is fxsparse's."""

    name = "test-masks-of-mine"


def state_and_code(gm: GraphModule) -> tuple[str, dict[str, int]]:
    return gm.code, {name: id(tensor) for name, tensor in gm.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("kind", [InsertNMMasks, MasksOfMine], ids=lambda kind: kind.__name__)
def test_a_bug_of_ours_says_so(kind: type[InsertNMMasks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsparse.passes.nm.masks.rewrote", None)
    model, args = small()
    gm = fxsparse.trace(model, args)
    before = state_and_code(gm)
    with pytest.raises(fxsparse.InternalError) as caught:
        Pipeline([SquareReLU(), kind("2:4")])(gm)
    error, text = caught.value, str(caught.value)
    assert not isinstance(error, RewriteError) and isinstance(error, fxsparse.FxsparseError)
    assert error.pass_name == kind.name and isinstance(error.__cause__, TypeError)
    assert re.search(r"masks\.py:\d+, in \w+$", str(error.place)) and str(error.place) in text
    assert error.node == "linear_1" and "at linear_1 (2) with TypeError: 'NoneType' object is not callable" in text
    assert "a bug in fxsparse" in text and "Please report it" in text and "Nothing was changed" in text
    assert all(part in text for part in (fxsparse.__version__, torch.__version__, f"{kind.name}{{pattern=2:4}}"))
    assert state_and_code(gm) == before and not record_of(gm).entries
    twin = pickle.loads(pickle.dumps(copy.copy(error)))
    assert str(twin) == text and twin.node == error.node


def test_a_bug_in_a_pass_of_others_is_theirs() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    line = inspect.getsourcelines(FailsHalfWay)[1] + 9
    with pytest.raises(RewriteError, match=rf"test-fails: failed at .*test_pipeline\.py:{line}, in rewrite") as caught:
        Pipeline([FailsHalfWay()])(gm)
    assert "nothing was changed: ValueError: half way" in str(caught.value) and "report" not in str(caught.value)
    line = inspect.getsourcelines(LeavesBrokenGraph)[1]
    with pytest.raises(RewriteError, match=rf"test-broken: failed at .*:{line}, in LeavesBrokenGraph.*before"):
        Pipeline([LeavesBrokenGraph()])(gm)


def test_a_bug_in_the_callers_own_data_is_theirs() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)

    def batches() -> Iterator[torch.Tensor]:
        yield args[0]
        raise KeyError("no more files")

    with pytest.raises(RewriteError, match=r"nm-masks: failed at .*test_pipeline\.py:\d+, in batches.*no more files"):
        Pipeline([InsertNMMasks("2:4", criterion="wanda", calibration=batches())])(gm)
    wrong = [args[0], {"y": args[0]}]
    with pytest.raises(RewriteError, match=r"nm-masks: calibration batch 1 does not run .*TraceError: .*not know y"):
        Pipeline([InsertNMMasks("2:4", criterion="wanda", calibration=wrong)])(gm)


def test_refusals_stay_refusals() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    with pytest.raises(RewriteError, match="wanda needs calibration") as caught:
        Pipeline([InsertNMMasks("2:4", criterion="wanda")])(gm)
    assert caught.value.__cause__ is None
    with pytest.raises(fxsparse.OptionError):
        Pipeline("nm-masks{pattern=5:4}")


# --- looking on -------------------------------------------------------------------------------------------------------


def test_a_callback_sees_the_model_around_every_pass() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    seen: list[tuple[Pass, GraphModule, GraphModule]] = []
    passes = (InsertNMMasks("2:4"), DoublePruneBackward(), SquareReLU())
    pipeline = Pipeline(passes, callback=lambda *item: seen.append(item))
    result = pipeline(gm)
    assert tuple(item for item, _, _ in seen) == passes
    befores, afters = [before for _, before, _ in seen], [after for *_, after in seen]
    assert befores[0] is gm and all(before is after for before, after in zip(befores[1:], afters[:-1], strict=True))
    x = torch.randn(5, 8)
    outputs = [after(x) for after in afters]
    assert not torch.equal(outputs[0], gm(x)) and torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], result(x)) and not torch.equal(outputs[1], outputs[2])
    assert [len(record_of(after).entries) for after in afters] == [1, 2, 3]
    parameters = dict(result.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in afters[1].named_parameters())
    afters[2].graph.output_node().args = ((None,),)  # what a callback does to its copy is its own matter
    assert torch.equal(outputs[2], result(x))
    assert pipeline == Pipeline(passes) and str(pipeline) == str(Pipeline(passes))


def test_without_a_callback_nothing_more_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    copies: list[GraphModule] = []
    make = fx.copy_sharing_state
    monkeypatch.setattr(fx, "copy_sharing_state", lambda module: copies.append(module) or make(module))
    result = Pipeline("nm-masks,double-prune")(gm)
    assert copies == [gm] and "fxsparse_graphs" not in result.meta


def test_an_error_in_a_callback_leaves_the_model_as_it_was() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    before = state_and_code(gm)

    def stop(item: Pass, *_: GraphModule) -> None:
        if isinstance(item, DoublePruneBackward):
            raise StopHere

    class StopHere(Exception):
        pass

    with pytest.raises(StopHere) as caught:
        Pipeline("nm-masks,double-prune", callback=stop)(gm)
    assert caught.value.__cause__ is None
    assert state_and_code(gm) == before and not record_of(gm).entries


def test_a_rewrite_leaves_the_original_alone_and_shares_what_it_kept() -> None:
    family = FAMILIES["opt"]()
    before = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
    gm = fxsparse.rewrite(family.model, "nm-masks,double-prune", kwargs=family.make_batch())
    assert before.keys() == family.model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in family.model.state_dict().items())
    shared = dict(family.model.named_parameters())
    kept = [name for name, parameter in gm.named_parameters() if parameter is shared.get(name)]
    replaced = {weight.name for weight in record_of(gm).weights}
    assert set(kept) == set(shared) - replaced
    assert not replaced & set(dict(gm.named_parameters())), "replaced weights stayed in the module"


def test_a_copy_trains_without_touching_the_original() -> None:
    """Not through parameters, nor through statistics, casts and states; what was tied remains tied."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(8, 16), nn.BatchNorm1d(16)
            self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.linear(self.norm(self.embedding(ids))))
            return out

    ids, passes = torch.randint(8, (4,)), "nm-masks{keep_first=false}"
    for first in (lambda model: model, lambda model: fxsparse.trace(model, (ids,))):
        model = Tied()
        given = first(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gm = fxsparse.rewrite(given, passes, (ids,), copy=True)
        assert gm.get_parameter("head.weight") is gm.get_parameter("embedding.weight")
        assert len(record_of(gm).entries[0].rewritten) == 1
        optimizer = torch.optim.SGD(gm.parameters(), lr=1.0)
        gm.train()(ids).square().sum().backward()
        optimizer.step()
        gm.to(torch.float64)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        shared = fxsparse.rewrite(given, passes, (ids,))
        assert shared.get_parameter("embedding.weight") is model.embedding.weight


def test_the_order_that_works_is_named() -> None:
    model, args = small()
    with pytest.raises(RewriteError, match="the order that works is nm-masks,double-prune"):
        fxsparse.rewrite(model, "double-prune,nm-masks", args)
    with pytest.raises(RewriteError, match="nm-masks,low-rank"):
        fxsparse.rewrite(model, "low-rank", args)


def test_a_pass_that_does_nothing_warns() -> None:
    model, args = small()
    with pytest.warns(UserWarning, match="nm-masks.*rewrote nothing"):
        fxsparse.rewrite(model, [InsertNMMasks("2:4", exclude="2")], args)


def test_a_pass_twice_is_skipped_with_its_reason() -> None:
    model, args = small()
    with pytest.warns(UserWarning, match="rewrote nothing"):
        gm = fxsparse.rewrite(model, "nm-masks,nm-masks,double-prune,double-prune", args)
    entries = record_of(gm).entries
    assert "2: is already 2:4" in [str(change) for change in entries[1].skipped]
    assert next(str(change) for change in entries[3].skipped) == "2: is already double-pruned"
    assert all(change.detail == DoublePruneBackward.rest for change in entries[3].skipped[1:])


def test_the_record_survives_json() -> None:
    family = FAMILIES["gpt2"]()
    gm = fxsparse.rewrite(
        family.model, "nm-masks{pattern=1:4},double-prune,low-rank{rank=2}", kwargs=family.make_batch()
    )
    record = record_of(gm)
    assert len(record.entries) == 3 and record.weights
    assert Record.from_json(record.to_json()) == record


def test_costs_in_the_record_are_those_of_the_tensors() -> None:
    model, args = small()
    gm = fxsparse.rewrite(model, [InsertNMMasks("2:4"), DoublePruneBackward()], args)
    first, last = record_of(gm).entries[0].before, record_of(gm).entries[-1].after
    sizes = [8 * 16, 16 * 16, 16 * 4]
    assert first.forward_flops == 2 * 3 * sum(sizes)
    assert first.step_flops == 2 * 3 * (3 * sum(sizes) - sizes[0])  # the input needs no gradient
    assert last.forward_flops == 2 * 3 * (sum(sizes) - sizes[1] // 2)
    assert last.step_flops == first.step_flops - 2 * (2 * 3 * sizes[1] // 2)  # forward and grad input
    assert first.parameters == sum(sizes) + 36 and last.parameters == first.parameters - 128
    assert last.parameter_bytes == 4 * last.parameters and last.optimizer_bytes == 8 * last.parameters
    assert first.buffer_bytes == 0 and last.buffer_bytes == 128 // 4 + 128 // 8


def test_replay_gives_the_same_structure() -> None:
    family = FAMILIES["llama"]()
    passes = 'nm-masks{pattern={"*.mlp.*":2:4,"*.self_attn.*":1:4}},double-prune,low-rank{rank=2,start=0.0}'
    gm = fxsparse.rewrite(family.model, passes, kwargs=family.make_batch())
    fresh = FAMILIES["llama"]()
    again = fxsparse.replay(Record.from_json(record_of(gm).to_json()), fresh.model, kwargs=fresh.make_batch())
    assert [(n.op, str(n.target)) for n in again.graph.nodes] == [(n.op, str(n.target)) for n in gm.graph.nodes]
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in gm.state_dict().items()
    }
    assert record_of(again).weights == record_of(gm).weights
    other = FAMILIES["opt"]()
    with pytest.raises((CheckpointError, RewriteError)):
        fxsparse.replay(record_of(gm), other.model, kwargs=other.make_batch())


def largest_at(position: int) -> tuple[nn.Sequential, tuple[torch.Tensor]]:
    model, args = small()
    with torch.no_grad():
        model[position].weight[0, 0] = 10
    return model, args


def test_a_pass_that_finds_something_out_is_recorded_with_it() -> None:
    model, args = largest_at(2)
    gm = fxsparse.rewrite(model, "test-scale-largest", args)
    assert record_of(gm).text == 'test-scale-largest{layer="2"}'
    assert [str(change) for change in record_of(gm).entries[0].rewritten] == ["2: scaled"]
    model, args = largest_at(0)
    again = fxsparse.replay(record_of(gm), model, args)
    x = torch.randn(3, 8)
    torch.testing.assert_close(again(x), model[4](model[3](2 * model[2](model[1](model[0](x))))))
    assert record_of(again).text == record_of(gm).text


def interleaved(item: Pass, *graphs: GraphModule) -> list[Pass | None]:
    """Runs one pass on several graphs at the same time, a change of each in turn; what each run returns."""
    running = dict(enumerate(iter(item.rewrite(graph)) for graph in graphs))
    returned: dict[int, Pass | None] = {}
    while running:
        for number, rewrite in list(running.items()):
            try:
                next(rewrite)
            except StopIteration as end:
                returned[number] = end.value
                del running[number]
    return [returned[number] for number in range(len(graphs))]


def test_two_runs_of_one_pass_at_the_same_time_do_not_know_of_each_other() -> None:
    item = ScaleLargest()
    first, second = (fxsparse.trace(*largest_at(position)) for position in (0, 4))
    assert interleaved(item, first, second) == [ScaleLargest("0"), ScaleLargest("4")]
    family = FAMILIES["opt"]()
    traced = fxsparse.trace(family.model, kwargs=family.make_batch())
    gated = [Pipeline(f"gates{{units=[heads,intermediate],target={t},score=magnitude}}")(traced) for t in (0.3, 0.6)]
    alone = [Pipeline("materialize")(gm) for gm in gated]
    together = [fx.copy_sharing_state(gm) for gm in gated]
    returned = interleaved(Materialize(), *together)
    assert [str(found) for found in returned] == [record_of(gm).entries[-1].text for gm in alone]
    assert returned[0] != returned[1]
    for gm, expected in zip(together, alone, strict=True):
        gm.recompile()
        assert gm.code == expected.code
        batch = family.make_batch(batch=3)
        torch.testing.assert_close(gm.eval()(**batch).logits, expected.eval()(**batch).logits, rtol=0, atol=0)


def test_passes_hold_nothing_but_their_options() -> None:
    for name, cls in pass_classes().items():
        assert all(option.init for option in fields(cls)), name
        item = cls()
        assert hash(item) == hash(cls()) and item == cls(), name


def test_a_rewritten_graph_can_be_rewritten_again() -> None:
    model, args = small()
    once = fxsparse.rewrite(model, [InsertNMMasks({"2": "2:4"}, keep_first=False)], args)
    twice = fxsparse.rewrite(once, [InsertNMMasks({"0": "1:4"}, keep_first=False), DoublePruneBackward()])
    assert [len(entry.rewritten) for entry in record_of(twice).entries] == [1, 1, 2]
    assert len(record_of(once).entries) == 1
    assert {weight.name: weight.pattern for weight in record_of(twice).weights} == {
        "2.weight": "2:4",
        "0.weight": "1:4",
    }


def test_a_running_compile_notices_a_second_rewrite() -> None:
    model, args = small()
    gm = fxsparse.trace(model, args)
    compiled = torch.compile(gm, backend="aot_eager")
    dense = compiled(*args)
    sparse = fxsparse.rewrite(gm, "nm-masks")
    assert not torch.allclose(torch.compile(sparse, backend="aot_eager")(*args), dense)
    assert torch.equal(compiled(*args), dense)

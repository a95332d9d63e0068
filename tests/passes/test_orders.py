"""Orders of passes: the composed model computes what the methods mean together, or the order is refused with one that
works. Models are tiny, without dropout, and traced once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.record import Change, record_of, rewrote
from fxsparse.graph.trainable import trained
from fxsparse.graph.training_form import training_graph
from fxsparse.passes import DistillLayers, Pass
from fxsparse.passes.base import pass_classes
from fxsparse.passes.neurons.gather_units import Site
from fxsparse.passes.order import misplaced, working_order, works
from fxsparse.passes.structured.hard_concrete import Gated, close, gate_names, mask_name
from tests.support import families
from tests.support.orders import batch_of, shape_of, traced

MAKE = ("bert", "opt", "llama")


def _rewritten(name: str, passes: Iterable[Pass | str] | str) -> GraphModule:
    """A rewritten copy with parameters of its own."""
    return fxsparse.rewrite(copy.deepcopy(traced(name)), passes)


def _train(gm: GraphModule, name: str, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
    losses = []
    for step in range(steps):
        batch = batch_of(name, seed=step)
        schedule.observe(batch)
        optimizer.zero_grad()
        loss = gm(**batch).loss
        losses.append(float(loss.detach()))
        loss = loss + fxsparse.sparsity_loss(gm) if hasattr(gm, "sparsity") else loss
        loss.backward()
        optimizer.step()
        schedule.step()
    schedule.remove()
    return losses


def _masks(gm: GraphModule) -> dict[str, list[bool]]:
    return {name: gm.get_buffer(mask_name(name)).bool().tolist() for name in gate_names(gm)}


@torch.no_grad()
def _logits(gm: GraphModule, name: str) -> Tensor:
    gm.eval()
    logits: Tensor = gm(**batch_of(name, seed=9)).logits
    gm.train()
    return logits


# --- sites stay true while the graph changes --------------------------------------------------------------------------

DIMS = "drop-dims{units=[hidden,intermediate,heads],begin=0.0,end=1.0,every=2}"


@pytest.mark.parametrize("passes", ["gates{units=[heads,intermediate],score=magnitude}", "gates", DIMS])
def test_gates_of_dropped_layers_end_with_them(passes: str) -> None:
    """Afterwards the model is the gated one of the layers that are left."""
    gm = _rewritten("opt", [passes, "drop-layers{count=1}"])
    assert len(live.sites(gm, Gated)) == 4
    assert not any("layers.1." in name for name in gate_names(gm))
    _train(gm, "opt")
    expected = _logits(gm, "opt")
    small = fxsparse.rewrite(gm, "materialize")
    assert float((_logits(small, "opt") - expected).abs().max()) < 1e-5


_LAYERS = {"bert": "bert.encoder.layer", "opt": "model.decoder.layers"}
_DOWN = {"bert": "output.dense", "opt": "fc2"}
NEURONS = "select-neurons{omission=0.5,multiple=1}"


@pytest.mark.parametrize("earlier", ["gates", "drop-dims"])
def test_gates_and_selected_neurons_refuse_each_other(earlier: str) -> None:
    for order in ([NEURONS, earlier], [earlier, NEURONS]):
        with pytest.raises(RewriteError, match=f"the order that works is {earlier},materialize,select-neurons"):
            _rewritten("opt", order)


@pytest.mark.parametrize(
    "later",
    [
        "nm-masks",
        *(f'low-rank{{layers=["*{glob}"],start={start}}}' for glob in ("fc2", "q_proj") for start in (0, 0.5)),
    ],
)
def test_what_edits_linears_with_selected_neurons_is_refused(later: str) -> None:
    with pytest.raises(RewriteError, match="an earlier pass: select-neurons: it could no longer leave out"):
        _rewritten("opt", [NEURONS, later])


@pytest.mark.parametrize("start", [0, 0.5])
def test_branches_beside_selected_channels_compute_the_selected_rows_alone(start: float) -> None:
    branch = f'low-rank{{layers=["*fc1"],start={start}}}'
    later, earlier = _rewritten("opt", [NEURONS, branch]), _rewritten("opt", [branch, NEURONS])
    for gm in (later, earlier):
        for name, parameter in gm.named_parameters():
            if name.endswith("_up"):
                torch.nn.init.constant_(parameter, 0.1)
    assert _train(later, "opt") == pytest.approx(_train(earlier, "opt"), abs=1e-6)
    units = {len(part.index) for site in live.sites(later, Site) for part in site.parts if part.name.endswith("_up")}
    assert units == {families.INTERMEDIATE}


def test_neurons_and_masks_on_different_linears_go_together() -> None:
    channels = "select-neurons{omission=0.5,multiple=1,structures=[channels]}"
    masks = 'nm-masks{exclude=["*fc1","*fc2"],keep_first=false}'
    later, earlier = _rewritten("opt", [channels, masks]), _rewritten("opt", [masks, channels])
    assert _train(later, "opt") == pytest.approx(_train(earlier, "opt"), abs=1e-6)


def test_neurons_of_dropped_layers_are_no_longer_selected() -> None:
    later, earlier = (
        _rewritten("opt", order) for order in ([NEURONS, "drop-layers{count=1}"], ["drop-layers{count=1}", NEURONS])
    )
    assert fxsparse.count_flops(training_graph(later)) == fxsparse.count_flops(training_graph(earlier))
    assert _train(later, "opt") == pytest.approx(_train(earlier, "opt"), abs=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_compressed_linears_have_no_neurons_to_select(name: str) -> None:
    """A head that is read through a compressed linear is no head of the next dense one."""
    with pytest.raises(RewriteError, match="no heads and no channels"):
        _rewritten(name, ["nm-masks", NEURONS])


@pytest.mark.parametrize("start", [0, 0.5])
def test_masks_after_a_dense_branch_leave_the_branch_dense(start: float) -> None:
    """As in SLoPe: the weight is N:M, the branch beside it is not."""
    branch = f'low-rank{{layers=["*fc1"],rank=4,start={start}}}'
    later = _rewritten("opt", [branch, "nm-masks{keep_first=false}"])
    earlier = _rewritten("opt", ["nm-masks{keep_first=false}", branch])
    assert {weight.name for weight in record_of(later).weights} == {w.name for w in record_of(earlier).weights}
    assert _train(later, "opt") == pytest.approx(_train(earlier, "opt"), abs=1e-6)
    dense = fxsparse.dense_state_dict(later)
    for name, expected in fxsparse.dense_state_dict(earlier).items():
        torch.testing.assert_close(dense[name], expected)


@pytest.mark.parametrize("name", ["bert", "opt"])
@pytest.mark.parametrize("earlier", [DIMS, "gates{score=magnitude,target=0.01}"])
def test_layers_with_open_gates_exist_for_distillation(name: str, earlier: str) -> None:
    """Where nothing is closed, gates change no loss: hidden states of every layer count."""
    distill = DistillLayers(traced(name), weights=(0.0, 0.0, 1.0))
    gm, plain = _rewritten(name, [earlier, distill]), _rewritten(name, [distill])
    for mask in (gm.get_buffer(mask_name(gate)) for gate in gate_names(gm)):
        mask.fill_(1)
    with torch.no_grad():
        for module in (gm, plain):
            module.get_parameter(f"{_LAYERS[name]}.1.{_DOWN[name]}.weight").mul_(4)
        expected = plain(**batch_of(name)).loss
        assert float(expected) > 1e-3
        assert torch.equal(gm(**batch_of(name)).loss, expected)


@pytest.mark.parametrize("units", ["heads,attention,intermediate,ffn", "hidden,attention,ffn"])
def test_closed_layers_do_not_exist_for_distillation(units: str) -> None:
    """Hidden dimensions of the stream are no part of a layer that could keep it."""
    distill = DistillLayers(traced("opt"), weights=(0.0, 0.0, 1.0))
    gm = _rewritten("opt", [f"gates{{units=[{units}],score=magnitude,target=0.01}}", distill])
    with torch.no_grad():
        gm.get_parameter("model.decoder.embed_tokens.weight").add_(1)
        assert float(gm(**batch_of("opt")).loss) > 0.01
        for gate in gate_names(gm):
            if not gate.endswith("hidden_gate"):
                gm.get_buffer(mask_name(gate)).zero_()
        assert float(gm(**batch_of("opt")).loss) == 0


def test_a_repeated_pass_acts_once() -> None:
    text = "nm-masks{storage=masked,dynamic=true,decay=0.5}"
    with pytest.warns(UserWarning, match="rewrote nothing"):
        twice = _rewritten("opt", [text, text])
    once = _rewritten("opt", [text])
    assert _train(twice, "opt") == _train(once, "opt")


@pytest.mark.parametrize("starts", [(0.25, 0.75), (0.5, 0)])
def test_branches_of_two_passes_start_at_their_own_steps(starts: tuple[float, float]) -> None:
    texts = [
        f'low-rank{{rank=2,start={start},layers=["*{glob}"]}}'
        for start, glob in zip(starts, ("fc1", "fc2"), strict=True)
    ]
    gm = _rewritten("opt", texts)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=4)
    for step in range(5):
        used = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        for start, glob in zip(starts, ("fc1", "fc2"), strict=True):
            parts = [name for name, _ in gm.named_parameters() if f"{glob}.weight_" in name]
            assert len(parts) == 6 and (used.issuperset(parts) if step >= 4 * start else used.isdisjoint(parts))
        replayed = fxsparse.replay(record_of(gm), copy.deepcopy(traced("opt")))
        assert shape_of(replayed) == shape_of(gm)
        gm(**batch_of("opt", seed=step)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_a_branch_waits_for_its_own_pass() -> None:
    """One that starts at once leaves alone what has a branch that starts later."""
    texts = ['low-rank{rank=2,start=0.5,layers=["*.1.fc1"]}', 'low-rank{rank=2,start=0,layers=["*fc1"]}']
    gm = _rewritten("opt", texts)
    used = {str(node.target) for node in gm.graph.find_nodes(op="get_attr") if str(node.target).endswith("_up")}
    assert used == {f"model.decoder.layers.{layer}.fc1.weight_up" for layer in (0, 2)}


def test_branches_have_no_branches() -> None:
    text = 'low-rank{rank=2,start=0,layers=["*fc1"]}'
    with pytest.warns(UserWarning, match="already has a branch"):
        twice = _rewritten("opt", [text, text])
    assert set(twice.state_dict()) == set(_rewritten("opt", [text]).state_dict())


def test_masks_of_two_passes_follow_their_own_options() -> None:
    """Without a gradient of the loss, what is pruned decays at the rate of its pass; masks move when they should."""
    slow = 'nm-masks{storage=masked,dynamic=true,decay=0.5,every=3,exclude=["*fc2"]}'
    fast = "nm-masks{storage=masked,dynamic=true,decay=2.0,every=1}"
    gm = _rewritten("opt", [slow, fast])
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=4)
    for glob, rate in (("fc1", 0.95), ("fc2", 0.8)):
        name = f"model.decoder.layers.1.{glob}.weight"
        weight, mask = gm.get_parameter(name).detach().clone(), gm.get_buffer(f"{name}_mask").clone()
        (gm(**batch_of("opt")).loss * 0).backward()
        optimizer.step()
        torch.testing.assert_close(gm.get_parameter(name).detach(), torch.where(mask, weight, weight * rate))
        optimizer.zero_grad()
    with torch.no_grad():
        for weight in (gm.get_parameter(f"model.decoder.layers.1.{glob}.weight") for glob in ("fc1", "fc2")):
            weight.copy_(torch.randn_like(weight))
    masks = [gm.get_buffer(f"model.decoder.layers.1.{glob}.weight_mask").clone() for glob in ("fc1", "fc2")]
    schedule.step()
    now = [gm.get_buffer(f"model.decoder.layers.1.{glob}.weight_mask") for glob in ("fc1", "fc2")]
    assert torch.equal(masks[0], now[0]) and not torch.equal(masks[1], now[1])


def test_two_double_prunings_follow_their_own_options() -> None:
    texts = [
        'nm-masks{storage=masked,exclude=["*fc2"]}',
        "double-prune{pattern=2:4,every=3}",
        "nm-masks{storage=masked}",
        "double-prune{pattern=1:4,every=1}",
    ]
    gm = _rewritten("opt", texts)
    schedule = fxsparse.Schedule(gm, torch.optim.SGD(gm.parameters(), lr=0.1), total_steps=4)
    names = [f"model.decoder.layers.1.{leaf}.weight" for leaf in ("fc1", "fc2")]
    before = [gm.get_buffer(f"{name}_column_mask").clone() for name in names]
    with torch.no_grad():
        for name in names:
            gm.get_parameter(name).copy_(torch.randn_like(gm.get_parameter(name)))
    schedule.step()
    first, second = (gm.get_buffer(f"{name}_column_mask") for name in names)
    assert torch.equal(first, before[0]) and not torch.equal(second, before[1])
    for mask, kept in ((first, 2), (second, 1)):
        assert int(mask.unflatten(0, (-1, 4)).sum(1).max()) == kept


@pytest.mark.parametrize("choice", ['tensors=["*.0.*"]', "last_layers=1"])
def test_waiting_branches_of_frozen_layers_stay_frozen(choice: str) -> None:
    gm = _rewritten("opt", ["nm-masks,low-rank{rank=2,start=0.5}", f"select-tensors{{{choice}}}"])
    before = {name: parameter.detach().clone() for name, parameter in gm.named_parameters()}
    _train(gm, "opt")
    moved = {name for name, parameter in gm.named_parameters() if not torch.equal(parameter, before[name])}
    layer = ".layers.0." if "tensors" in choice else ".layers.2."
    assert {name for name in moved if name.endswith("_up")} == {
        name for name in before if name.endswith("_up") and layer in name
    }
    assert all(layer in name or "final_layer_norm" in name for name in moved)


@pytest.mark.parametrize("later", ["", "{last_layers=1}"])
def test_waiting_branches_follow_the_last_choice(later: str) -> None:
    choices = "select-tensors{tensors=[*.0.*]}", f"select-tensors{later}"
    gm = _rewritten("opt", ["nm-masks,low-rank{rank=2,start=0.5}", *choices])
    before = {name: parameter.detach().clone() for name, parameter in gm.named_parameters()}
    _train(gm, "opt")
    ups = {name for name in before if name.endswith("_up")}
    moved = {name for name in ups if not torch.equal(gm.get_parameter(name), before[name])}
    assert moved and moved == {name for name in ups if not later or ".layers.2." in name}


def test_the_multiplexer_stays_dense() -> None:
    """Masks mean the model's linears, in either order."""
    later, earlier = _rewritten("opt", ["multiplex", "nm-masks"]), _rewritten("opt", ["nm-masks", "multiplex"])
    names = {weight.name for weight in record_of(later).weights}
    assert names and names == {weight.name for weight in record_of(earlier).weights}
    skipped = [change for change in record_of(later).entries[-1].skipped if change.site.startswith("multiplex.")]
    linears = [change for change in skipped if "of the multiplexer, which a pass added" in change.detail]
    assert linears
    rest = {change.site: change.detail for change in skipped if change not in linears}
    assert rest.keys() == {"multiplex.demux.keys", "multiplex.demux.input"}, "weights that no linear reads"
    assert all("matrices of linears" in reason for reason in rest.values())


@pytest.mark.parametrize("earlier", ["gates", DIMS])
@pytest.mark.parametrize("later", ["select-tensors{last_layers=1}", "select-tensors{rho=0.8}"])
def test_structures_in_training_refuse_frozen_tensors(earlier: str, later: str) -> None:
    """Gates that do not train never close, and frozen weights have no scores."""
    works = f"{earlier.partition('{')[0]},materialize,select-tensors"
    with pytest.raises(RewriteError, match=f"the order that works is {works}"):
        _rewritten("opt", [earlier, later])
    _train(_rewritten("opt", [earlier, "materialize", later]), "opt")


def test_a_later_choice_of_tensors_replaces_the_earlier_one() -> None:
    """Nothing of a budget is left, neither its schedule nor the state that would bring its choice back."""
    last = "select-tensors{last_layers=1}"
    gm, expected = _rewritten("opt", ["select-tensors{rho=0.8,every=1}", last]), _rewritten("opt", [last])
    chosen = set(trained(expected))
    assert set(gm.state_dict()) == set(expected.state_dict())
    assert _train(gm, "opt") == _train(expected, "opt")
    assert set(trained(gm)) == chosen == set(trained(expected))


def test_groups_of_different_sizes_are_left_alone() -> None:
    """Three heads on one key head and four on the other cannot be selected group by group."""
    gm = _rewritten("grouped", ["gates{units=[heads],target=0.01,score=random}"])
    _close_heads(gm, [3])
    gm = fxsparse.rewrite(gm, ["materialize", NEURONS])
    details = [change.detail for change in record_of(gm).entries[-1].skipped]
    assert sum("have different numbers of heads" in detail for detail in details) == 2


def test_a_multiplexed_student_takes_a_multiplexed_teacher_or_logits_alone() -> None:
    """Hidden states of a group and of its members have different batch sizes, which broadcast where there is one."""
    teacher = traced("bert")
    for weights in ((0.0, 0.1, 0.9), (0.0, 0.0, 1.0)):
        with pytest.raises(RewriteError, match="multiplex the other alike, or distil logits alone"):
            _rewritten("bert", ["multiplex", DistillLayers(teacher, weights=weights)])
    multiplexed = DistillLayers(fxsparse.rewrite(teacher, "multiplex"))
    for distill in (multiplexed, DistillLayers(teacher, weights=(0.0, 1.0, 0.0))):
        gm = _rewritten("bert", ["multiplex", distill])
        for batch in (2, 4):
            assert gm(**batch_of("bert", batch=batch)).loss.isfinite()


# --- orders -----------------------------------------------------------------------------------------------------------

WRITTEN = {"low-rank": 'low-rank{layers=["*fc1"]}', "select-tensors": 'select-tensors{tensors=["*bias"]}'}


def _passes(names: Iterable[str]) -> list[Pass | str]:
    def written(name: str) -> Pass | str:
        return DistillLayers(traced("opt")) if name == "distill" else WRITTEN.get(name, name)

    return [written(name) for name in names]


def _shipped() -> list[str]:
    return [name for name, cls in pass_classes().items() if cls.__module__.startswith("fxsparse.passes.")]


def _recommended() -> list[list[str]]:
    """Every order that the refusal of one pass, or of one after another, recommends."""
    orders = set()
    for second in _shipped():
        for done in ([], *([first] for first in _shipped() if works([first]))):
            if misplaced(second, done) is not None and (order := working_order(second, done)):
                orders.add(tuple(order))
    orders |= {("gates", "materialize", "nm-masks"), ("drop-dims", "materialize", "low-rank")}
    return sorted(map(list, orders))


@pytest.mark.parametrize("names", _recommended(), ids=",".join)
def test_recommended_orders_work(names: list[str]) -> None:
    """They are rewritten, train, and evaluate."""
    gm = _rewritten("opt", _passes(names))
    assert all(torch.isfinite(torch.tensor(_train(gm, "opt", steps=2))))
    assert _logits(gm, "opt").isfinite().all()


@pytest.mark.parametrize("later", ["nm-masks", 'low-rank{layers=["*fc1"]}'])
def test_weights_whose_gates_are_not_yet_taken_out_take_no_other_form(later: str) -> None:
    """`materialize` could not cut them, which would be found out after the training."""
    name = later.partition("{")[0]
    for gates in ("gates{score=magnitude}", DIMS):
        order = f"{gates.partition('{')[0]},materialize,{name}"
        with pytest.raises(RewriteError, match=rf"{name}: cannot follow .*; the order that works is {order}"):
            _rewritten("opt", [gates, later])


def test_a_recommended_order_leaves_out_what_another_pass_leaves_nothing_to_do() -> None:
    """Masks on every layer leave no dense heads and channels to choose among; the passes go together apart."""
    passes = ["nm-masks,double-prune,low-rank", NEURONS, "gates"]
    order = "gates,materialize,nm-masks,double-prune,low-rank"
    apart = "select-neurons goes with nm-masks only on different layers"
    with pytest.raises(RewriteError, match=f"the order that works is {order}; {apart}$"):
        _rewritten("opt", passes)
    with pytest.raises(RewriteError, match="keep nm-masks off some of them with exclude="):
        _rewritten("opt", passes[:2])
    gm = _rewritten("opt", ['nm-masks{exclude=["*self_attn*"]}', NEURONS])
    assert any(change.site.endswith("self_attn") for change in record_of(gm).entries[-1].rewritten)


@pytest.mark.parametrize(
    ("family", "gates"),
    [
        ("t5", "gates{target=0.4,score=magnitude}"),
        ("opt", "gates{target=0.4,score=magnitude}"),
        ("opt", "drop-dims{units=[hidden],fraction=0.25,score=magnitude}"),
    ],
    ids=["t5-gates", "opt-gates", "opt-hidden"],
)
def test_structures_that_are_taken_out_twice_are_the_masked_ones(family: str, gates: str) -> None:
    """What the second `materialize` leaves of a mask of heads is chosen from what the first left."""
    masked = _rewritten(family, [gates, "materialize", gates])
    small = fxsparse.rewrite(masked, "materialize")
    torch.testing.assert_close(_logits(small, family), _logits(masked, family), rtol=1e-4, atol=1e-5)


def test_a_recommended_order_holds_passes_that_others_ended() -> None:
    """The one that ended them needs them."""
    assert working_order("gates", ["distill", "end-distill", "select-neurons", "multiplex"]) == [
        *("distill", "end-distill", "gates", "materialize", "select-neurons", "multiplex")
    ]
    assert working_order("gates", ["gates", "materialize", "nm-masks"]) == [
        *("gates", "materialize", "gates", "materialize", "nm-masks")
    ]


def test_multiplexing_says_what_distillation_reads() -> None:
    teacher = traced("opt")
    with pytest.raises(RewriteError, match=r"by distillation;.*: distil logits alone with weights=\(a, b, 0\)"):
        _rewritten("opt", [DistillLayers(teacher), "multiplex"])
    _rewritten("opt", [DistillLayers(teacher, weights=(0.5, 0.5, 0.0)), "multiplex"])


# --- what the orders rest on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.01, 0.1, 0.25, 0.5, 0.8])
def test_gates_close_by_the_smallest_step_above_the_target(target: float) -> None:
    """Heads, and whole MLPs that hold as much as four heads and have the lower scores."""
    gm = _rewritten("opt", "gates{units=[heads,ffn],score=magnitude}")
    scores = {name: torch.full((len(gm.get_buffer(mask_name(name))),), float("heads" in name)) for name in _masks(gm)}
    head = close(gm, 1e-6, scores)
    assert 0.04 < head < 0.05
    assert close(gm, target, scores) == pytest.approx(math.ceil(target / head) * head, abs=1e-6)


def test_heads_of_grouped_queries_are_taken_out_twice() -> None:
    """The keys that the first cut chose for each head are numbered anew by the second."""
    name = "grouped"
    gates = "gates{units=[heads],target=0.25,score=random}"
    gm = _rewritten(name, [gates])
    _close_heads(gm, [3, 7])
    gm = fxsparse.rewrite(gm, ["materialize", gates])
    assert len(live.sites(gm, Gated)) == 2
    for closed in ([0, 1, 2], [0, 4], [1, 3], [3, 4, 5]):
        _close_heads(gm, closed)
        small = fxsparse.rewrite(gm, "materialize")
        assert float((_logits(small, name) - _logits(gm, name)).abs().max()) < 1e-5


@dataclass(frozen=True)
class WatchChannels(Pass):
    """A pass of somebody else's that keeps the mean of what the last linears of MLPs read."""

    name: ClassVar[str] = "test-watch-channels"

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        for linear in [linear for linear in fx.linears(graph) if linear.path.endswith("fc2")]:
            fx.set_buffer(graph, f"{linear.path}.seen", torch.zeros(()))

            def watch(x: Tensor, seen: Tensor) -> Tensor:
                return seen.copy_(x.detach().mean())

            fx.insert_function(graph, watch, linear.input, f"{linear.path}.seen", before=linear.node)
            yield rewrote(linear.path, "watched")


@pytest.mark.parametrize("units", ["intermediate,heads", "ffn,attention"])
def test_gates_are_taken_out_where_they_were_put(units: str) -> None:
    """The sites are those that the gates were put on, also where the graph looks different by now."""
    gm = _rewritten("opt", [f"gates{{units=[{units}],score=magnitude,target=0.4}}", WatchChannels()])
    small = fxsparse.rewrite(gm, "materialize")
    assert any(change.rewritten for change in record_of(small).entries[-1].changes)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gm.parameters())
    assert float((_logits(small, "opt") - _logits(gm, "opt")).abs().max()) < 1e-5


def _close_heads(gm: GraphModule, closed: list[int]) -> None:
    for gate in gate_names(gm):
        gm.get_buffer(mask_name(gate)).fill_(1)[closed] = 0

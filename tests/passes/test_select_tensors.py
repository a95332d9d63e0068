"""Training some tensors: what is frozen costs nothing, and what a schedule chooses is exact, undone and resumed."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse import graph as fx
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.graph.trainable import trainable, trained
from fxsparse.passes import Pipeline, SelectTensors
from fxsparse.passes.select_tensors import _Reselect
from tests.support.families import CORE_FAMILIES
from tests.support.traced import traced

aten = torch.ops.aten


def loss_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output["loss"]


def gradients(gm: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    gm.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss_of(gm(**batch)).backward()
    return {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}


def backward_flops(gm: nn.Module, batch: dict[str, Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = loss_of(gm(**batch))
        forward = counter.get_total_flops()
        loss.backward()
    gm.zero_grad(set_to_none=True)
    return int(counter.get_total_flops() - forward)


def detached(gm: GraphModule) -> set[str]:
    return {
        str(node.args[0].target)  # type: ignore[union-attr]
        for node in gm.graph.nodes
        if node.target is aten.detach.default and getattr(node.args[0], "op", "") == "get_attr"
    }


def step(gm: GraphModule, optimizer: Optimizer, schedule: fxsparse.Schedule, batch: dict[str, Any]) -> float:
    schedule.observe(batch)
    loss = loss_of(gm(**batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    return loss.item()


@pytest.mark.parametrize("name", CORE_FAMILIES)
def test_what_is_trained_gets_the_gradients_of_full_training_and_costs_what_the_graph_says(name: str) -> None:
    family, full = traced(name)
    graph, batch, rng = BackpropGraph(full), family.make_batch(batch=3), random.Random(name)
    expected = gradients(full, batch)
    for count in (1, 3, len(expected) // 2):
        names = set(rng.sample(sorted(expected), count))
        gm = fxsparse.rewrite(full, [SelectTensors(tensors=sorted(names))])  # type: ignore[arg-type]
        assert set(trained(gm)) == names and set(trainable(gm)) == graph.trainable
        assert {key for key, p in gm.named_parameters() if p.requires_grad} == names
        (entry,) = record_of(gm).entries
        assert {change.site for change in entry.rewritten} == graph.trainable - names
        assert {change.site for change in entry.skipped} == names
        found = gradients(gm, batch)
        assert found.keys() == names
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
        assert backward_flops(gm, batch) == graph.cost(names, **batch)
        assert entry.after.step_flops == graph.forward() + graph.cost(names)
        assert entry.after.optimizer_bytes == sum(2 * full.get_parameter(key).nbytes for key in names)
        assert all(p.requires_grad for p in full.parameters()), "the graph it was made from was changed"
        assert detached(gm) and not detached(full)


def test_the_detach_alone_shortens_the_backward() -> None:
    """Whoever sets ``requires_grad`` again afterwards still trains what the graph says."""
    family, full = traced("opt")
    gm = fxsparse.rewrite(full, [SelectTensors(last_layers=1)])
    gm.requires_grad_(True)
    batch = family.make_batch()
    assert gradients(gm, batch).keys() == set(trained(gm))


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_the_compiled_backward_is_shorter(name: str) -> None:
    """Matrix products in AOTAutograd's backward graph: as many as the cost graph has gradients."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    family, full = traced(name)
    batch, counts = family.make_batch(), {}
    for passes in ([], [SelectTensors(last_layers=1)], [SelectTensors(tensors="*.layer*.2.*bias")]):
        gm = fxsparse.rewrite(full, Pipeline(passes)).eval()
        products: list[int] = []

        def backward(graph: GraphModule, _: Any, products: list[int] = products) -> Any:
            targets = {aten.mm.default, aten.bmm.default, aten.addmm.default}
            products.append(sum(node.target in targets for node in graph.graph.nodes))
            return make_boxed_func(graph)

        full.zero_grad(set_to_none=True)
        torch._dynamo.reset()
        forward_as_it_is = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)
        compiled = torch.compile(gm, backend=forward_as_it_is)
        loss_of(compiled(**batch)).backward()
        found = {key: p.grad.clone() for key, p in gm.named_parameters() if p.grad is not None}
        for key, gradient in gradients(gm, batch).items():
            torch.testing.assert_close(found.pop(key), gradient, rtol=1e-4, atol=1e-5)
        assert not found
        (counts[len(counts)],) = products
    assert counts[1] < 0.5 * counts[0] and counts[2] < counts[1], counts


@pytest.mark.filterwarnings("ignore:.*rewrote nothing")
def test_the_one_line_call_freezes_too() -> None:
    family, _ = traced("gpt2")
    batch, model = family.make_batch(), family.model
    biases = 'select-tensors{tensors=["*bias"]}'
    compiled = torch.compile(model, backend="fxsparse", options={"passes": biases, "compiler": "aot_eager"})
    loss_of(compiled(**batch)).backward()
    trained_here = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained_here == {key for key, _ in model.named_parameters() if key.endswith("bias")}
    assert all(p.requires_grad for p in model.parameters())
    for passes in ("select-tensors{rho=0.5}", "select-tensors{last_layers=1}"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"name the tensors, or call fxsparse\.rewrite"):
            torch.compile(model, backend="fxsparse", options={"passes": passes})(**batch)


class Broken(nn.Module):
    """Two linears with a part without parameters between them, each a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        x = x.tanh()
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.filterwarnings("ignore:.*rewrote nothing")
def test_the_one_line_call_works_across_graph_breaks() -> None:
    model = Broken()
    options = {"passes": "select-tensors{tensors=[second.weight]}", "compiler": "aot_eager"}
    torch.compile(model, backend="fxsparse", options=options)(torch.randn(4, 8)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["second.weight"]


# --- naming the tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "block", "outside"),
    [
        ("opt", "model.decoder.layers.2.", {f"model.decoder.final_layer_norm.{kind}" for kind in ("weight", "bias")}),
        ("gpt2", "transformer.h.1.", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("llama", "model.layers.2.", {"model.norm.weight", "lm_head.weight"}),
        ("t5", "decoder.block.1.", {"decoder.final_layer_norm.weight"}),
        ("sequential", "layers.6.", set()),
    ],
)  # fmt: skip
def test_last_layers(family: str, block: str, outside: set[str]) -> None:
    gm = fxsparse.rewrite(traced(family)[1], [SelectTensors(last_layers=1)])
    assert set(trained(gm)) == {name for name in trainable(gm) if name.startswith(block)} | outside


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("opt", {"lm_head.weight"}),
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("t5", {"lm_head.weight"}),
        ("bert", {"bert.embeddings.word_embeddings.weight", "classifier.weight", "classifier.bias"}),
    ],
)  # fmt: skip
def test_ft_top2_trains_the_embedding_and_the_head(family: str, names: set[str]) -> None:
    gm = fxsparse.rewrite(traced(family)[1], fxsparse.recipe("ft-top2"))
    aliases = fx.parameter_names(gm)
    assert {name for key, every in aliases.items() for name in every if every[0] in trained(gm)} >= names
    assert len(trained(gm)) == len({id(gm.get_parameter(name)) for name in names})


def test_ft_top2_needs_an_embedding_or_a_head() -> None:
    _, gm = traced("sequential")
    gm.get_parameter("layers.6.weight").requires_grad_(False)
    with pytest.raises(RewriteError, match="no trainable table that looks inputs up and no trainable head"):
        fxsparse.rewrite(gm, fxsparse.recipe("ft-top2"))


def test_bert_keeps_its_head_with_the_last_layers() -> None:
    gm = fxsparse.rewrite(traced("bert")[1], [SelectTensors(last_layers=2)])
    assert {name.split(".layer.")[-1].split(".")[0] for name in trained(gm)} == {"1", "2", "bert", "classifier"}
    assert not any("embeddings" in name for name in trained(gm))


def test_lora_and_n_m_values() -> None:
    family, full = traced("opt")
    branches = 'low-rank{rank=2,start=0.0,layers=["*.q_proj","*.v_proj"]},select-tensors{tensors=["*_down","*_up"]}'
    gm = fxsparse.rewrite(full, branches)
    assert len(trained(gm)) == 12 and all(name.endswith(("_down", "_up")) for name in trained(gm))
    assert len(gradients(gm, family.make_batch())) == 12
    values = fxsparse.rewrite(full, 'nm-masks,double-prune,select-tensors{tensors=["*fc1.weight_values"]}')
    assert len(trained(values)) == 3 and gradients(values, family.make_batch()).keys() == set(trained(values))
    state = fxsparse.dense_state_dict(values)
    assert state.keys() == family.model.state_dict().keys()


def test_a_tied_tensor_is_frozen_at_every_use() -> None:
    family, full = traced("opt")
    gm = fxsparse.rewrite(full, [SelectTensors(tensors="*layers*")])
    assert gm.get_parameter("lm_head.weight") is gm.get_parameter("model.decoder.embed_tokens.weight")
    assert not gm.get_parameter("lm_head.weight").requires_grad
    gm = fxsparse.rewrite(full, [SelectTensors(tensors="lm_head.weight")])
    assert gradients(gm, family.make_batch()).keys() == {"model.decoder.embed_tokens.weight"}


def test_what_the_caller_froze_stays_frozen() -> None:
    family, full = traced("llama")
    full.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    gm = fxsparse.rewrite(full, "select-tensors{rho=1.0}")
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
    step(gm, optimizer, schedule, family.make_batch())
    assert "model.embed_tokens.weight" not in trainable(gm)
    assert not gm.get_parameter("model.embed_tokens.weight").requires_grad


@pytest.mark.parametrize("later", ["", "{tensors=[*fc2*]}", "{last_layers=1}", "{rho=1.0}"])
@pytest.mark.parametrize("earlier", ["{tensors=[*fc1*]}", "{embeddings_and_head=true}", "{rho=0.6}"])
def test_a_later_choice_takes_the_place_of_an_earlier_one(earlier: str, later: str) -> None:
    family, full = traced("opt")
    full.get_parameter("model.decoder.embed_positions.weight").requires_grad_(False)
    alone = fxsparse.rewrite(copy.deepcopy(full), f"select-tensors{later}")
    gm = fxsparse.rewrite(full, f"select-tensors{earlier}")
    if "rho" in earlier:
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
        step(gm, optimizer, schedule, family.make_batch())
        schedule.remove()
        gm.zero_grad()
    gm = fxsparse.rewrite(gm, f"select-tensors{later}")
    assert set(trained(gm)) == set(trained(alone))
    assert gradients(gm, family.make_batch()).keys() == gradients(alone, family.make_batch()).keys()


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORE_FAMILIES)
def test_the_choice_is_that_of_the_selector_and_within_the_budget(name: str) -> None:
    family, full = traced(name)
    batch, graph = family.make_batch(), BackpropGraph(full)
    for rho in (0.5, 0.7):
        gm = fxsparse.rewrite(full, [SelectTensors(rho=rho)])
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
        importance = fxsparse.tensor_importance(gm, optimizer, batch, rho=rho)
        fxsparse.Schedule(gm, optimizer, total_steps=1).observe(batch)
        assert set(trained(gm)) == graph.select(importance, rho)
        assert graph.cost(trained(gm)) <= graph.budget(rho)
        assert record_of(gm).entries[-1].after.step_flops <= rho * (graph.forward() + graph.full())
        assert backward_flops(gm, batch) == graph.cost(trained(gm), **batch)


def test_a_full_budget_trains_every_tensor_of_positive_importance() -> None:
    family, full = traced("llama")
    batch = family.make_batch()
    gm = fxsparse.rewrite(full, [SelectTensors(rho=1.0)])
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    importance = fxsparse.tensor_importance(gm, optimizer, batch)
    fxsparse.Schedule(gm, optimizer, total_steps=1).observe(batch)
    assert set(trained(gm)) == {name for name, value in importance.items() if value > 0}
    assert "model.embed_tokens.weight" in trained(gm), "the input-most tensor"


@pytest.mark.parametrize(
    ("options", "total", "due"),
    [
        ({}, 6, {1}),
        ({"every": 2}, 6, {1, 3, 5}),
        ({"times": 3}, 6, {1, 3, 5}),
        ({"times": 4}, 10, {1, 4, 6, 9}),
        ({"times": 9}, 3, {1, 2, 3}),
    ],
)
def test_steps_on_which_a_choice_is_due(options: dict[str, int], total: int, due: set[int]) -> None:
    _, gm = traced("sequential")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    event = _Reselect(SelectTensors(rho=0.5, **options), gm, optimizer, total)  # type: ignore[arg-type]
    assert {number for number in range(1, total + 1) if event.is_due(number)} == due


def test_frozen_tensors_keep_their_optimizer_state_and_go_on_from_it() -> None:
    """A stale gradient would be used, weight decay would shrink frozen tensors, moments would fade: none does."""
    family, full = traced("opt")
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.7, every=1)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2, weight_decay=0.5)
    budgets = [1.0, 0.5, 0.45, 1.0, 0.5]
    schedule = fxsparse.Schedule(
        gm, optimizer, total_steps=5, signals={"select-tensors.rho": lambda number: budgets[number - 1]}
    )
    resumed = 0
    for _ in budgets:
        batch = family.make_batch()
        loss_of(gm(**batch)).backward()  # gradients of the last choice, never used: no zero_grad before the next
        schedule.observe(batch)
        names = set(trained(gm))
        before = {name: p.detach().clone() for name, p in gm.named_parameters()}
        states = {name: copy.deepcopy(optimizer.state.get(p, {})) for name, p in gm.named_parameters()}
        for name, p in gm.named_parameters():
            assert p.requires_grad == (name in names)
            assert name in names or p.grad is None
        optimizer.zero_grad()
        loss_of(gm(**batch)).backward()
        optimizer.step()
        schedule.step()
        for name, p in gm.named_parameters():
            state = optimizer.state.get(p, {})
            if name in names:
                assert not torch.equal(p, before[name])
                assert state["step"] == states[name].get("step", 0) + 1
                resumed += bool(states[name]) and states[name]["step"] < schedule.steps_done - 1
            else:
                assert torch.equal(p, before[name])
                assert state.keys() == states[name].keys()
                assert all(torch.equal(state[key], states[name][key]) for key in state)
    assert resumed, "no tensor was frozen and trained again"


def test_rho_follows_a_signal() -> None:
    family, full = traced("opt")
    graph = BackpropGraph(full)
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.9, every=1)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(
        gm, optimizer, total_steps=3, signals={"select-tensors.rho": lambda number: (0.8, 0.4, 0.6)[number - 1]}
    )
    shares = []
    for _ in range(3):
        step(gm, optimizer, schedule, family.make_batch())
        shares.append((graph.forward() + graph.cost(trained(gm))) / (graph.forward() + graph.full()))
    assert 0.6 < shares[0] <= 0.8 and shares[1] <= 0.4 and 0.4 < shares[2] <= 0.6
    with pytest.raises(OptionError, match=r"select-tensors.roh; there are: select-tensors\.rho"):
        fxsparse.Schedule(gm, optimizer, total_steps=3, signals={"select-tensors.roh": lambda _: 0.5})


def test_a_running_compile_takes_a_new_choice_up() -> None:
    family, full = traced("opt")
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.5, every=1)])
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager"})
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    budgets = (1.0, 0.4, 0.8)
    schedule = fxsparse.Schedule(
        gm, optimizer, total_steps=3, signals={"select-tensors.rho": lambda number: budgets[number - 1]}
    )
    seen = []
    for _ in budgets:
        batch = family.make_batch()
        schedule.observe(batch)
        torch.manual_seed(3)
        loss_of(compiled(**batch)).backward()
        found = {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}
        seen.append(found.keys())
        assert found.keys() == set(trained(gm))
        for name, gradient in gradients(gm, batch).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert len(set(map(frozenset, seen))) == 3


def test_training_within_a_budget_learns() -> None:
    family, full = traced("opt")
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.7, times=2)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=3e-2)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=60)
    batch = family.make_batch()
    losses = [step(gm, optimizer, schedule, batch) for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]


def test_after_n_m_masks_and_lazy_branches() -> None:
    family, full = traced("opt")
    gm = fxsparse.rewrite(
        full, "nm-masks,double-prune{every=1},low-rank{rank=2,start=0.5},select-tensors{rho=0.6,times=4}"
    )
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=8)
    chosen: set[str] = set()
    for number in range(1, 9):
        graph = BackpropGraph(fxsparse.graph.trainable.fully_trained(gm), trainable=trainable(gm))
        masks = {name: buffer.clone() for name, buffer in gm.named_buffers() if name.endswith("column_mask")}
        step(gm, optimizer, schedule, family.make_batch())
        waits = number < 4
        assert waits == (not any(name.endswith("_up") for name in trainable(gm)))
        chosen |= set(trained(gm))
        if number in (3, 7):
            assert graph.cost(trained(gm)) <= graph.budget(0.6)
        assert masks.keys() == {name for name, _ in gm.named_buffers() if name.endswith("column_mask")}
        if number == 4:  # the branches joined after the last choice and are trained until the next
            again = fxsparse.replay(record_of(gm), traced("opt")[0].model, kwargs=family.make_batch())
            assert set(trained(again)) == set(trained(gm))
            assert any(name.endswith("_up") for name in trained(gm))
    assert any(name.endswith("_values") for name in chosen)


def test_a_checkpoint_resumes_with_the_same_choice(tmp_path: Any) -> None:
    family, full = traced("opt")
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.5, every=4)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=8)
    batches = [family.make_batch() for _ in range(8)]
    for batch in batches[:2]:
        step(gm, optimizer, schedule, batch)
    fxsparse.save(gm, tmp_path / "model.safetensors")
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    loaded = fxsparse.load(tmp_path / "model.safetensors", traced("opt")[0].model, kwargs=batches[0])
    assert set(trained(loaded)) == set(trained(gm))
    assert str(Pipeline.parse(record_of(gm).text)) == record_of(gm).text
    second = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    second.load_state_dict(saved[0])
    resumed = fxsparse.Schedule(loaded, second, total_steps=8)
    resumed.load_state_dict(saved[1])
    for batch in batches[2:6]:
        for model, optim, plan in ((gm, optimizer, schedule), (loaded, second, resumed)):
            torch.manual_seed(9)
            step(model, optim, plan, batch)
        assert set(trained(loaded)) == set(trained(gm))
    for (name, left), (_, right) in zip(gm.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(left, right), name


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("select-tensors{rho=0.0}", r"rho=0\.0 must be a number in \(0, 1\]"),
        ("select-tensors{rho=1.2}", r"rho=1\.2 must be a number in \(0, 1\]"),
        ("select-tensors{rho=0.3}", r"costs more than 0\.3 .*the least possible is 0\.33"),
        ("select-tensors{every=3}", "need rho"),
        ("select-tensors{rho=0.5,every=3,times=2}", "every or times, not both"),
        ("select-tensors{rho=0.5,times=0}", "times=0"),
        ("select-tensors{last_layers=0}", "last_layers=0"),
        ("select-tensors{tensors=[a],last_layers=1}", "tensors or last_layers, not both"),
        ("select-tensors{embeddings_and_head=true,last_layers=1}", "last_layers or embeddings_and_head, not both"),
        ("select-tensors{rho=0.5,metric=size}", "one of importance, delta, gradient"),
        ("select-tensors{tensors=[lm_head.wait]}", "matches no parameter; did you mean 'lm_head.weight'"),
        ("select-tensors,nm-masks", "the order that works is nm-masks,select-tensors"),
        ("select-tensors,low-rank{layers=[\"*fc1\"]}", "the order that works is low-rank,select-tensors"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*rewrote nothing")
def test_options_that_mean_nothing(text: str, message: str) -> None:
    _, gm = traced("opt")
    with pytest.raises(RewriteError, match=message):
        fxsparse.rewrite(gm, text)


def test_nothing_to_train() -> None:
    _, gm = traced("opt")
    gm.requires_grad_(False)
    with pytest.raises(RewriteError, match="no trainable tensor"):
        fxsparse.rewrite(gm, "select-tensors{rho=0.5}")
    gm.requires_grad_(True)
    gm.get_parameter("lm_head.weight").requires_grad_(False)
    with pytest.raises(RewriteError, match="only frozen or unused"):
        fxsparse.rewrite(gm, "select-tensors{tensors=[lm_head.weight]}")


def test_what_a_choice_needs() -> None:
    family, full = traced("opt")
    batch = family.make_batch()
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.5)])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)
    loss_of(gm(**batch)).backward()
    with pytest.raises(OptionError, match=r"due at optimizer step 1 .*schedule\.observe\(batch\)"):
        optimizer.step()
    with pytest.raises(OptionError, match="is nan"):
        schedule.observe(batch, loss=lambda output: output.loss * float("nan"))
    with pytest.raises(RewriteError, match="no tensor that lowers the loss can be trained"):
        schedule.observe(batch, loss=lambda output: output.loss * 0)
    assert set(trained(gm)) == set(trainable(gm)), "a choice that failed changed something"
    low = fxsparse.Schedule(gm, optimizer, total_steps=2, signals={"select-tensors.rho": lambda _: 0.1})
    with pytest.raises(OptionError, match=r"the least possible is 0\.33"):
        low.observe(batch)

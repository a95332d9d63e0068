"""Steps that compute a choice of heads and channels, against dense steps with the others masked."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

import fxsparse
from fxsparse import graph as fx
from fxsparse.errors import CheckpointError, OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.graph.training_form import FORM_KEY, training_graph
from fxsparse.passes.neurons.choice import choose, kept_units, omission_at
from fxsparse.passes.neurons.select_neurons import SelectNeurons
from fxsparse.passes.pipeline import Pipeline
from tests.support.ranks import on_ranks
from tests.support.traced import traced

TEXT = "select-neurons{omission=0.5,multiple=8}"


def loss_of(outputs: Any) -> Tensor:
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0]


def without_dropout(gm: GraphModule) -> GraphModule:
    """In training mode, but for dropout: it draws for another number of heads and channels."""
    for child in gm.children():
        child.eval()
    return gm


def omitted(gm: GraphModule) -> dict[str, Tensor]:
    """What of every parameter does not take part, bool, from the registered index buffers."""
    buffers = dict(gm.named_buffers())
    masks: dict[str, Tensor] = {}
    graph = training_graph(gm).graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.fxsparse.gather_linear.default):
        _, weight, rows, columns, bias, *_ = node.args
        is_transposed = weight.op != "get_attr"
        name = str((weight.args[0] if is_transposed else weight).target)
        index = buffers[str((rows or columns).target)]
        dim = int((rows is None) != is_transposed)
        mask = torch.ones(gm.get_parameter(name).shape, dtype=torch.bool)
        masks[name] = mask.index_fill(dim, index, False)
        if rows is not None and bias is not None:
            shape = gm.get_parameter(str(bias.target)).shape
            masks[str(bias.target)] = torch.ones(shape, dtype=torch.bool).index_fill(0, index, False)
    return masks


def masked_gradients(model: nn.Module, masks: dict[str, Tensor], batch: dict[str, Any]) -> tuple[Tensor, Any]:
    """Loss and gradients of the dense model with what does not take part set to zero."""
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    held = {name: p.masked_fill(masks[name], 0) if name in masks else p for name, p in parameters.items()}
    result = functional_call(model, held, kwargs=batch)
    loss = result if isinstance(result, Tensor) else loss_of(result)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss, dict(zip(parameters, gradients, strict=True))


class Tiny(nn.Module):
    """One block of grouped attention and a gated MLP, small enough to train hundreds of steps."""

    def __init__(self, heads: int = 4, groups: int = 2, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * groups), nn.Linear(16, 4 * groups, bias=False)
        self.o = nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(x.shape[0], x.shape[1], heads, 4).transpose(1, 2)

        repeat = self.heads // self.groups
        key, value = (split(part(x), self.groups).repeat_interleave(repeat, 1) for part in (self.k, self.v))
        attended = scaled_dot_product_attention(split(self.q(x), self.heads), key, value, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], 16))
        return (x + self.down(self.dropout(nn.functional.silu(self.gate(x)) * self.up(x)))).square().mean()


def tiny(text: str = TEXT, **sizes: Any) -> tuple[nn.Module, GraphModule]:
    model = Tiny(**sizes)
    gm = fxsparse.trace(copy.deepcopy(model), (torch.randn(3, 5, 16),))
    return model, fxsparse.rewrite(gm, text)


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "bert", "opt", "gpt2", "llama", "t5"])
def test_a_step_equals_a_dense_one_with_the_others_masked(name: str) -> None:
    family, gm = traced(name)
    rewritten = without_dropout(fxsparse.rewrite(gm, TEXT))
    changes = record_of(rewritten).entries[-1].changes
    left = [change.detail for change in changes if not change.rewritten]
    assert len(left) < len(changes) and all(why == SelectNeurons.rest or "layer_norm" in why for why in left)
    family.model.eval()
    batch = family.make_batch(batch=3)
    masks = omitted(rewritten)
    assert all(mask.any() and not mask.all() for mask in masks.values())
    loss, gradients = masked_gradients(family.model, masks, batch)
    actual = loss_of(rewritten(**batch))
    torch.testing.assert_close(actual, loss, rtol=1e-5, atol=1e-5)
    actual.backward()
    for parameter_name, parameter in rewritten.named_parameters():
        expected = gradients[parameter_name]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
        if parameter_name in masks:
            assert parameter.grad[masks[parameter_name]].count_nonzero() == 0


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_evaluation_and_omission_0_are_the_dense_model_bit_for_bit(name: str) -> None:
    family, gm = traced(name)
    batch = family.make_batch(batch=3)
    rewritten = fxsparse.rewrite(gm, TEXT)
    with pytest.warns(UserWarning, match="the omission rate is 0"):
        dense = fxsparse.rewrite(gm, "select-neurons{omission=0.0}")
    results = []
    for module in (gm, dense):
        torch.manual_seed(7)
        loss = loss_of(module.train()(**batch))
        parameters = [p for p in module.parameters() if p.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        expected = loss_of(gm.eval()(**batch))
        assert torch.equal(loss_of(rewritten.eval()(**batch)), expected)
        assert not torch.equal(loss_of(without_dropout(rewritten.train())(**batch)), expected)
        assert torch.equal(loss_of(copy.deepcopy(rewritten).eval()(**batch)), expected)


def test_the_record_counts_what_a_step_saves() -> None:
    _, gm = traced("llama")
    entry = record_of(fxsparse.rewrite(gm, TEXT)).entries[-1]
    assert 0.4 < entry.after.step_flops / entry.before.step_flops < 0.65
    assert entry.after.parameters == entry.before.parameters


def test_copies_select_for_themselves() -> None:
    _, gm = tiny()
    twin = copy.deepcopy(gm)
    x = torch.randn(2, 5, 16)
    assert torch.equal(gm(x), twin(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x).item() == pytest.approx(x.square().mean().item()) and gm(x) != twin(x)


def runs_of(gm: GraphModule) -> dict[str, int]:
    """What every gathered weight's kernel is told of its indices, which is checked to be so."""
    runs, buffers = {}, dict(gm.named_buffers())
    for node in training_graph(gm).graph.find_nodes(
        op="call_function", target=torch.ops.fxsparse.gather_linear.default
    ):
        _, weight, rows, columns, _, run = node.args
        index = buffers[str((rows or columns).target)].view(-1, run)
        assert torch.equal(index, index[:, :1] + torch.arange(run)) and not (index[:, 0] % run).any()
        runs[str((weight if weight.op == "get_attr" else weight.args[0]).target)] = run
    return runs


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_channels_in_blocks(name: str) -> None:
    family, gm = traced(name)
    rewritten = without_dropout(fxsparse.rewrite(gm, "select-neurons{omission=0.5,multiple=1,block=8}"))
    runs = runs_of(rewritten)
    assert all(run >= 8 for run in runs.values()) and len(runs) >= 4  # heads are 8 wide
    family.model.eval()
    batch = family.make_batch(batch=3)
    loss, gradients = masked_gradients(family.model, omitted(rewritten), batch)
    actual = loss_of(rewritten(**batch))
    torch.testing.assert_close(actual, loss, rtol=1e-5, atol=1e-5)
    actual.backward()
    for parameter_name, parameter in rewritten.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-4, atol=1e-5)


def test_blocks_through_a_ladder() -> None:
    """Every rung has whole blocks, chosen by the means of their scores; heads stay whole beside them."""
    _, gm = tiny("select-neurons{omission=0.5,multiple=1,block=8,rungs=2,rung_steps=2,choice=top}")
    optimizer = torch.optim.AdamW(gm.parameters(), 0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=8)
    (event,) = schedule.events.values()
    kept, flops = [], []
    for _ in range(6):
        runs = runs_of(gm)
        assert runs["down.weight"] == runs["gate.weight"] == runs["up.weight"] == 8
        if "k.weight" in runs:  # a quarter of two groups of heads is none
            assert runs["k.weight"] == 4 and runs["q.weight"] == 8  # a key head with its two query heads
        kept.append((len(fx.attribute(gm, "down.weight_columns")), "k.weight" in runs))
        flops.append(record_of(gm).entries[-1].after.step_flops)
        gm(torch.randn(3, 5, 16)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if "down.weight" in event.kept and len(kept) > 2:
            scores = event.means["down.weight"].view(-1, 8).mean(1)
            best = scores.topk(len(event.kept["down.weight"]) // 8).indices.sort().values
            assert torch.equal(event.kept["down.weight"][::8] // 8, best)
    assert kept == [(16, True)] * 4 + [(24, False)] * 2 and flops[0] < flops[-1]
    assert gm.meta.get(FORM_KEY) is None


def test_a_width_that_is_no_multiple_of_the_block_stays_dense() -> None:
    _, gm = tiny("select-neurons{omission=0.5,multiple=1,block=12}")
    heads, channels = record_of(gm).entries[-1].changes[:2]
    assert heads.rewritten and not channels.rewritten
    assert "its 32 channels are not a multiple of block=12; choose block=4 or 1" in channels.detail
    assert "down.weight_columns" not in dict(gm.named_buffers())


def test_a_choice_that_is_not_in_blocks_is_refused() -> None:
    """Kernels rely on blocks, so a state of another option must not pass."""
    states = []
    for block in (1, 8):
        _, gm = tiny(f"select-neurons{{omission=0.5,multiple=8,block={block}}}")
        schedule = fxsparse.Schedule(gm, torch.optim.SGD(gm.parameters(), 0.1), total_steps=9)
        states.append(schedule.state_dict())
    schedule.load_state_dict(states[1])
    with pytest.raises(CheckpointError, match="is not in blocks of 8"):
        schedule.load_state_dict(states[0])


class Alternating(nn.Module):
    """Gate and value of a channel are two rows side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 80), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return (x + self.down(both[..., ::2].sigmoid() * both[..., 1::2])).square().mean()


def test_a_step_of_alternating_gates() -> None:
    model = Alternating()
    gm = fxsparse.rewrite(fxsparse.trace(model, (torch.randn(3, 5, 16),)), TEXT)
    masks, x = omitted(gm), torch.randn(2, 5, 16)
    assert set(masks) == {"both.weight", "both.bias", "down.weight"}
    assert runs_of(gm) == {"both.weight": 2, "down.weight": 1}
    in_blocks = fxsparse.rewrite(
        fxsparse.trace(model, (torch.randn(3, 5, 16),)), "select-neurons{omission=0.5,multiple=1,block=8}"
    )
    assert runs_of(in_blocks) == {"both.weight": 16, "down.weight": 8}
    loss, gradients = masked_gradients(model, masks, {"x": x})
    actual = gm(x)
    torch.testing.assert_close(actual, loss)
    actual.backward()
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


# --- the optimizer ----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, 0.1, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.1, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1, initial_accumulator_value=0.3),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_does_not_take_part_is_not_touched(name: str) -> None:
    _, gm = tiny()
    optimizer = OPTIMIZERS[name](gm.parameters())
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10)

    def snapshot() -> dict[tuple[str, str], Tensor]:
        found = {(n, ""): p.detach().clone() for n, p in gm.named_parameters()}
        for n, p in gm.named_parameters():
            for key, state in optimizer.state.get(p, {}).items():
                if isinstance(state, Tensor) and state.shape == p.shape:
                    found[n, key] = state.clone()
        return found

    choices = set()
    for step in range(6):
        masks = omitted(gm)
        choices.add(tuple(str(mask.nonzero().tolist()) for mask in masks.values()))
        before = snapshot()
        for _ in range(2):  # micro-batches
            gm(torch.randn(3, 5, 16)).backward()
        assert {n: m.tolist() for n, m in omitted(gm).items()} == {n: m.tolist() for n, m in masks.items()}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after = snapshot()
        for (parameter, key), tensor in after.items():
            mask = masks.get(parameter, torch.zeros(tensor.shape, dtype=torch.bool))
            if (parameter, key) in before:
                assert torch.equal(tensor[mask], before[parameter, key][mask]), (step, parameter, key)
            elif name != "rprop":
                assert tensor[mask].count_nonzero() == 0, (step, parameter, key)
            if not key:
                assert not torch.equal(tensor[~mask], before[parameter, key][~mask])
    assert len(choices) > 1


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon"])
def test_optimizers_that_mix_elements_are_refused(name: str) -> None:
    _, gm = tiny()
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    matrices = [p for p in gm.parameters() if p.dim() == 2]
    with pytest.raises(RewriteError, match=f"select-neurons: {name} cannot leave"):
        fxsparse.Schedule(gm, getattr(torch.optim, name)(matrices), total_steps=10)


def test_state_of_another_shape_is_refused() -> None:
    class Rows(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["row"] = torch.zeros(len(p), 3)

    _, gm = tiny()
    optimizer = Rows(gm.parameters(), 0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10)
    gm(torch.randn(3, 5, 16)).backward()
    optimizer.step()
    with pytest.raises(RewriteError, match="state 'row' of Rows"):
        schedule.step()


# --- compiling --------------------------------------------------------------------------------------------------------


def test_three_hundred_steps_compile_at_rungs_only() -> None:
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    _, gm = tiny("select-neurons{omission=0.5,rungs=2,rung_steps=50,multiple=4,choice=sampled}")
    optimizer = torch.optim.SGD(gm.parameters(), 0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=300)
    compiled = torch.compile(gm, backend=backend)
    choices, compiles = set(), []
    for _ in range(300):
        choices.add(str({name: mask.flatten().int().tolist() for name, mask in omitted(gm).items()}))
        x, count = torch.randn(3, 5, 16), len(graphs)
        loss = compiled(x)
        if len(graphs) > count:
            compiles.append(schedule.steps_done + 1)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert compiles == [1, 201, 251]
    assert len(choices) > 150
    assert gm.meta.get(FORM_KEY) is None
    with torch.no_grad():  # the last stage is dense
        torch.testing.assert_close(compiled(x), gm.eval()(x))


def test_switching_modes_compiles_each_once() -> None:
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, gm = tiny()
    compiled, x = torch.compile(gm, backend=backend), torch.randn(3, 5, 16)
    for _ in range(4):
        compiled.train()
        assert torch.allclose(compiled(x), gm(x))
        compiled.eval()
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 2


@pytest.mark.inductor
def test_inductor_runs_a_step() -> None:
    torch._dynamo.reset()
    _, gm = tiny()
    x = torch.randn(3, 5, 16)
    twin = copy.deepcopy(gm)
    twin(x).backward()
    torch.compile(gm)(x).backward()
    for (name, parameter), other in zip(gm.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(
        dict(gm.named_buffers())["down.weight_magnitudes"], dict(twin.named_buffers())["down.weight_magnitudes"]
    )


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_counts_are_multiples_and_never_0() -> None:
    assert kept_units(8, 0.99, 1) == 1 and kept_units(256, 0.999, 64) == 64
    assert kept_units(256, 0.5, 64) == 128 and kept_units(256, 0.0, 60) == 256
    assert kept_units(48, 0.5, 64) == 48
    assert all(kept_units(u, r / 10, 4) % 4 == 0 for u in (8, 32, 64) for r in range(10))


def test_the_ladder() -> None:
    rates = [omission_at(step, 0.6, 10, 3, 2) for step in range(1, 13)]
    assert rates == pytest.approx([0.6] * 4 + [0.4] * 2 + [0.2] * 2 + [0.0] * 4)
    assert {omission_at(step, 0.6, 10, 0, 0) for step in range(1, 20)} == {0.6}


def test_choices_follow_their_scores() -> None:
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0])
    assert choose(scores, 2, "top", 0, 1, "a").tolist() == [0, 2]
    unseen = torch.tensor([4.0, torch.nan, 3.0, torch.nan, 5.0])
    assert choose(unseen, 3, "top", 0, 1, "a").tolist() == [1, 3, 4]
    for choice in ("top", "sampled"):
        assert set(choose(unseen, 2, choice, 0, 1, "a").tolist()) == {1, 3}
    blocks = torch.tensor([1.0, 9.0, 6.0, 6.0, torch.nan, torch.nan])
    assert choose(blocks, 4, "top", 0, 1, "a", 2).tolist() == [2, 3, 4, 5]
    draws = [choose(scores, 2, "sampled", 0, step, "a") for step in range(1500)]
    assert torch.equal(draws[3], choose(scores, 2, "sampled", 0, 3, "a"))
    assert len({tuple(draw.tolist()) for draw in draws}) > 4
    counts = torch.bincount(torch.cat(draws), minlength=5)
    assert counts.tolist() == sorted(counts.tolist(), reverse=False)[::-1] or counts.argsort().tolist() == [
        4,
        1,
        3,
        2,
        0,
    ]
    # Of two draws without replacement, the chance that the first is unit i is its share of the scores.
    firsts = torch.cat([choose(scores, 1, "sampled", 0, step, "b") for step in range(2000)])
    share = torch.bincount(firsts, minlength=5) / 2000
    torch.testing.assert_close(share, scores / 10, rtol=0, atol=0.04)


@pytest.mark.parametrize("score", ["magnitude", "weighted"])
def test_moving_means_are_those_of_the_activations(score: str) -> None:
    text = f"select-neurons{{omission=0.5,multiple=8,decay=0.75,score={score},choice=top}}"
    _, gm = tiny(text)
    optimizer = torch.optim.SGD(gm.parameters(), 0.0)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=100)
    (event,) = schedule.events.values()
    means = torch.full((32,), torch.nan)
    for _ in range(5):
        kept = event.kept["down.weight"]
        observed = []
        for _ in range(2):
            x = torch.randn(3, 5, 16)
            hidden = fx.attribute(gm, "down.weight_columns")
            assert torch.equal(hidden, kept)
            gm(x).backward()
            graph = training_graph(gm)
            node = next(n for n in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor))
            values: dict[str, Tensor] = {}

            class Reader(torch.fx.Interpreter):
                def run_node(self, n: torch.fx.Node, values: dict[str, Tensor] = values) -> Any:
                    values[n.name] = super().run_node(n)
                    return values[n.name]

            buffers = {name: buffer.clone() for name, buffer in gm.named_buffers()}
            Reader(graph).run(x)
            for name, buffer in gm.named_buffers():
                buffer.copy_(buffers[name])
            observed.append(values[node.name].detach().abs().mean((0, 1)))
        optimizer.step()
        schedule.step()
        mean = torch.stack(observed).mean(0)
        old = means[kept]
        means[kept] = torch.where(old.isnan(), mean, 0.75 * old + 0.25 * mean)
        torch.testing.assert_close(event.means["down.weight"], means, equal_nan=True)
    assert not means.isnan().any()  # the unseen come first
    norms = fx.attribute(gm, "down.weight").detach().norm(dim=0) if score == "weighted" else 1
    assert torch.equal(event.kept["down.weight"], (means * norms).topk(16).indices.sort().values)


def test_grouped_heads_go_together() -> None:
    _, gm = tiny("select-neurons{omission=0.5,structures=heads}")
    (group,) = fx.attribute(gm, "k.weight_rows").view(1, 4).unbind()
    start = int(group[0]) // 4
    assert group.tolist() == list(range(4 * start, 4 * start + 4))
    assert fx.attribute(gm, "q.weight_rows").tolist() == list(range(8 * start, 8 * start + 8))
    assert "down.weight_columns" not in dict(gm.named_buffers())


def test_rescaling() -> None:
    _, gm = tiny("select-neurons{omission=0.5,multiple=8,rescale=true}")
    model = Tiny()
    model.load_state_dict(gm.state_dict())
    x = torch.randn(3, 5, 16)
    masks = omitted(gm)
    held = {n: p.masked_fill(masks[n], 0) if n in masks else p for n, p in model.named_parameters()}
    for name in ("o.weight", "down.weight"):
        held[name] = held[name] * 2
    torch.testing.assert_close(gm(x), functional_call(model, held, (x,)))


# --- saving -----------------------------------------------------------------------------------------------------------


def steps(gm: GraphModule, optimizer: Any, schedule: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = gm(torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("error:.*rewrote nothing")  # also where the ladder has ended
@pytest.mark.parametrize("options", ["score=magnitude", "score=uniform", "block=4"])
def test_the_dense_model_is_saved_and_training_resumes(tmp_path: Path, options: str) -> None:
    text = f"select-neurons{{omission=0.5,{options},rungs=2,rung_steps=3,multiple=4}}"
    model = Tiny()
    x = torch.randn(3, 5, 16)
    dense = fxsparse.trace(copy.deepcopy(model), (x,))

    def start(gm: GraphModule) -> tuple[Any, ...]:
        optimizer = torch.optim.AdamW(gm.parameters(), 0.01)
        return gm, optimizer, fxsparse.Schedule(gm, optimizer, total_steps=12)

    whole = start(fxsparse.rewrite(copy.deepcopy(dense), text))
    expected = steps(*whole, 0, 12)
    for at in (4, 8, 10):  # before the ladder, on it, and dense
        gm, optimizer, schedule = start(fxsparse.rewrite(copy.deepcopy(dense), text))
        steps(gm, optimizer, schedule, 0, at)
        assert set(gm.state_dict()) == set(model.state_dict()) == set(fxsparse.dense_state_dict(gm))
        fxsparse.save(gm, tmp_path / "model.safetensors")
        torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "rest.pt")
        again = start(fxsparse.load(tmp_path / "model.safetensors", Tiny(), (x,)))
        optimizer_state, schedule_state = torch.load(tmp_path / "rest.pt")
        again[1].load_state_dict(optimizer_state)
        again[2].load_state_dict(schedule_state)
        assert steps(*again, at, 12) == expected[at:]
        for a, b in zip(again[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(a, b)


def test_text_and_replay() -> None:
    item = SelectNeurons(0.4, score="weighted", choice="top", rungs=3, rung_steps=7, block=64, rescale=True)
    assert Pipeline.parse(str(item)).passes == (item,)
    model, gm = tiny()
    again = fxsparse.replay(record_of(gm), model, (torch.randn(3, 5, 16),))
    assert record_of(again).text == record_of(gm).text == TEXT


def test_a_later_edit_of_the_graph_reaches_the_training_form() -> None:
    _, gm = tiny()
    x = torch.randn(3, 5, 16)
    before = gm(x)
    (output,) = gm.graph.output_node().all_input_nodes
    with gm.graph.inserting_after(output):
        doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (output, 2))
    doubled.meta = dict(output.meta)
    output.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    gm.recompile()
    torch.testing.assert_close(gm(x), 2 * before)
    assert gm.meta[FORM_KEY] is not None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"omission": 1.0},
        {"omission": -0.1},
        {"omission": True},
        {"score": "best"},
        {"choice": "all"},
        {"structures": ("rows",)},
        {"rungs": -1},
        {"rung_steps": 4},
        {"multiple": 0},
        {"decay": 1.0},
        {"every": 0},
        {"block": 0},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"select-neurons: {next(iter(options))}"):
        SelectNeurons(**options)


def test_a_ladder_longer_than_the_training() -> None:
    for text, total in (("rungs=4,rung_steps=30", 100), ("rungs=9", 10)):
        _, gm = tiny(f"select-neurons{{omission=0.5,{text}}}")
        optimizer = torch.optim.SGD(gm.parameters(), 0.1)
        with pytest.raises(OptionError, match=rf"ladder of .* longer than the training of {total} steps"):
            fxsparse.Schedule(gm, optimizer, total_steps=total)


def test_a_model_without_structures() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(RewriteError, match="select-neurons: the model has no heads and no channels"):
        fxsparse.rewrite(model, TEXT, (torch.randn(2, 8),))


def test_twice_and_rounding_are_explained() -> None:
    _, gm = tiny()
    with pytest.raises(RewriteError, match="selected already"):
        fxsparse.rewrite(gm, TEXT)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        _, gm = tiny("select-neurons{omission=0.5,structures=channels}")
    change, *_ = record_of(gm).entries[-1].changes
    assert not change.rewritten and "32 of 32 channels take part: rounded to a multiple of 64" in change.detail


def test_a_shared_weight_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
            self.own = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.down(self.up(x).relu())
            return x + self.own(x)

    gm = fxsparse.rewrite(Twice(), TEXT, (torch.randn(3, 8),))
    changes = record_of(gm).entries[-1].changes
    assert [change.rewritten for change in changes[:2]] == [False, True]  # named once, though it runs twice
    assert all(change.detail == SelectNeurons.rest for change in changes[2:])
    assert "up.weight is used more than once" in changes[0].detail


def test_ranks_choose_alike(tmp_path: Path) -> None:
    ours, theirs = on_ranks(tmp_path, _choices_of_a_rank)
    assert len(ours) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(-1), b[key].nan_to_num(-1)) for key in a)


def _choices_of_a_rank(rank: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    _, gm = tiny("select-neurons{omission=0.5,multiple=4,choice=top,decay=0.0}")
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10)
    (event,) = schedule.events.values()
    parallel = nn.parallel.DistributedDataParallel(gm)
    torch.manual_seed(1 + rank)  # other data on every rank
    chosen = []
    for _ in range(6):
        parallel(torch.randn(3, 5, 16) * (1 + rank)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        chosen.append({**event.kept, **{f"{key}.mean": mean for key, mean in event.means.items()}})
        chosen[-1] = {key: value.clone() for key, value in chosen[-1].items()}
    return chosen

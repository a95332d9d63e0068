"""Tracing against the eager model: the same state, the same numbers, the same modes; and refusals that say where."""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse import graph as fx
from fxsparse.errors import InternalError, TraceError
from fxsparse.graph.record import TRACE_KEY
from fxsparse.tracing.trace import trace
from tests.support.families import CORE_FAMILIES, FAMILIES, causal_lm_batch, draws_alike, padding_mask, token_ids
from tests.support.traced import traced

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def seeded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return module(*args, **kwargs)


def assert_same(expected: Any, found: Any) -> None:
    """Equality bit for bit, of the structure and the type of the outputs too."""
    assert type(expected) is type(found)
    leaves, found_leaves = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    assert len(leaves) == len(found_leaves) > 0
    for one, other in zip(leaves, found_leaves, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def gradients(module: nn.Module, output: Any) -> list[Tensor | None]:
    module.zero_grad()
    sum(leaf.float().square().mean() for leaf in pytree.tree_leaves(output)).backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]


def attentions(gm: GraphModule) -> list[tuple[Any, bool]]:
    """Mask and ``is_causal`` of every attention."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        arguments |= node.kwargs
        found.append((arguments.get("attn_mask"), arguments.get("is_causal", False)))
    return found


# --- arguments --------------------------------------------------------------------------------------------------------


class TakesKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        y = self.linear(x + kwargs["shift"])
        return {"y": y, "z": y.relu()} if kwargs.get("both") else {"y": y}


def test_what_forward_takes_as_further_keywords_is_captured_too() -> None:
    model = TakesKeywords()
    gm = trace(model, (torch.randn(4, 8),), {"shift": torch.randn(4, 8), "both": True})
    assert "forward" not in vars(model)
    for rows in (2, 5):
        x, shift = torch.randn(rows, 8), torch.randn(rows, 8)
        assert_same(model(x, shift=shift, both=True), gm(x, both=True, shift=shift))
    with pytest.raises(TraceError, match="both is False, but True was captured"):
        gm(x, shift=shift, both=False)


def test_flags_that_a_hugging_face_model_takes() -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BertForSequenceClassification(config).eval()
    gm = trace(model, kwargs={"input_ids": token_ids(2, 9), "output_hidden_states": True})
    ids = token_ids(3, 9)
    found = gm(input_ids=ids, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    assert_same(model(input_ids=ids, output_hidden_states=True), found)


# --- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_state_is_the_models_own(name: str) -> None:
    family, gm = traced(name)
    assert list(gm.state_dict()) == list(family.model.state_dict())
    ours = dict(gm.named_parameters(remove_duplicate=False))
    theirs = dict(family.model.named_parameters(remove_duplicate=False))
    assert list(ours) == list(theirs) and all(ours[key] is theirs[key] for key in theirs)
    buffers = dict(gm.named_buffers())
    assert all(buffers[key] is buffer for key, buffer in family.model.named_buffers())
    # What the graph reads goes by the first of a tensor's names, once.
    reads = [str(node.target) for node in gm.graph.find_nodes(op="get_attr") if isinstance(node.meta["val"], Tensor)]
    assert len(reads) == len(set(reads))
    assert {read for read in reads if read in theirs} <= dict(family.model.named_parameters()).keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_node_keeps_its_value_and_its_place(name: str) -> None:
    family, gm = traced(name)
    paths = {path for path, _ in family.model.named_modules()}
    for node in gm.graph.nodes:
        assert "val" in node.meta, node
        if node.target in {torch.ops.aten.linear.default, torch.ops.aten.dropout.default, SDPA}:
            assert str(next(reversed(node.meta["nn_module_stack"].values()))[0]) in paths


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_equal_eager_at_other_batch_sizes(name: str, training: bool) -> None:
    family, gm = traced(name)
    if training and not draws_alike(gm):
        pytest.skip("the original draws numbers of its own in training")
    family.model.train(training)
    gm.train(training)
    for batch in (1, 3, 6):
        inputs = family.make_batch(batch=batch)
        assert_same(seeded(family.model, **inputs), seeded(gm, **inputs))


@pytest.mark.parametrize("name", ["bert", "opt", "t5"])
def test_outputs_equal_eager_at_other_lengths(name: str) -> None:
    family = FAMILIES[name]()
    gm = trace(family.model, kwargs=family.make_batch(batch=4, seq=16), dynamic_sequence=True)
    if draws_alike(gm):
        for batch, seq in ((1, 10), (3, 32)):
            inputs = family.make_batch(batch=batch, seq=seq)
            assert_same(seeded(family.model, **inputs), seeded(gm, **inputs))
    family.model.eval()
    gm.eval()
    inputs = family.make_batch(batch=2, seq=24)
    assert_same(seeded(family.model, **inputs), seeded(gm, **inputs))


def test_a_length_that_the_model_fixes_is_noted() -> None:
    family = FAMILIES["vit"]()
    gm = trace(family.model, kwargs=family.make_batch(batch=2), dynamic_sequence=True)
    assert "pixel_values: dimension 1 stays 3" in gm.meta[TRACE_KEY].notes


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_eager(name: str) -> None:
    family, gm = traced(name)
    family.model.train(draws_alike(gm))
    gm.train(draws_alike(gm))
    inputs = family.make_batch(batch=3)
    expected = gradients(family.model, seeded(family.model, **inputs))
    found = gradients(gm, seeded(gm, **inputs))
    assert any(gradient is not None for gradient in expected)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # grouped queries: 3e-8


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in {"llama", "mistral", "qwen2"}])
def test_training_differs_from_evaluation(name: str) -> None:
    """What the tests of the two modes rely on: dropout is on in one and off in the other."""
    family, gm = traced(name)
    inputs = family.make_batch(batch=3)
    outputs = []
    for training in (True, False):
        gm.train(training)
        outputs.append(pytree.tree_leaves(seeded(gm, **inputs))[0])
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("name", [name for name in CORE_FAMILIES if name != "opt"])  # GPT-2 has all that OPT has
def test_compiles_to_one_graph_per_mode(name: str) -> None:
    family, gm = traced(name)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for training in (True, False, True):
        family.model.train(training)
        gm.train(training)
        for batch in (3, 5):
            inputs = family.make_batch(batch=batch)
            assert_same(seeded(family.model, **inputs), seeded(compiled, **inputs))
    has_dropout = any("dropout" in str(node.target) for node in gm.graph.nodes if node.target is not SDPA)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if has_dropout else 1)


@pytest.mark.inductor
def test_compiles_with_inductor() -> None:
    family, gm = traced("sequential")
    compiled = torch.compile(gm, dynamic=True)
    torch._dynamo.utils.counters.clear()
    inputs = family.make_batch(batch=3)
    gm.eval()
    torch.testing.assert_close(compiled(**inputs), family.model.eval()(**inputs))
    gm.train()
    assert not torch.equal(compiled(**inputs)[0], compiled(**inputs)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiles_inside_another_module() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.inner(**inputs)[1] * 2

    family, gm = traced("sequential")
    outer = Outer(gm).eval()
    inputs = family.make_batch(batch=3)
    expected = family.model.eval()(**inputs)[1] * 2
    assert_same(expected, torch.compile(outer, backend="aot_eager", fullgraph=True)(**inputs))


@pytest.mark.parametrize("name", CORE_FAMILIES)
def test_copies_are_independent(name: str) -> None:
    family, gm = traced(name)
    family.model.eval()
    gm.eval()
    twin = copy.deepcopy(gm)
    twin.recompile()
    assert list(twin.state_dict()) == list(gm.state_dict())
    assert not any(
        parameter is original for parameter, original in zip(twin.parameters(), gm.parameters(), strict=True)
    )
    inputs = family.make_batch(batch=3)
    assert_same(family.model(**inputs), twin(**inputs))
    twin.train()
    assert all(module.training for module in twin.modules()) and not any(module.training for module in gm.modules())
    with pytest.raises(TraceError, match="sizes"):
        twin(
            **family.make_batch(batch=3, seq=2 if name == "t5" else 1)
            if name != "sequential"
            else {"x": torch.randn(3, 1, 32), "labels": torch.zeros(3, 1, dtype=torch.long)}
        )


def test_state_dict_pickles_and_loads() -> None:
    family, gm = traced("gpt2")
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    twin = FAMILIES["gpt2"]().model
    assert not twin.load_state_dict(torch.load(file)).missing_keys
    family.model.eval()
    inputs = family.make_batch(batch=2)
    assert_same(family.model(**inputs), twin.eval()(**inputs))


def test_trains() -> None:
    """The graph and the model take the same steps."""
    original, family = FAMILIES["gpt2"](), FAMILIES["gpt2"]()
    gm = trace(family.model, kwargs=family.make_batch(batch=2))
    steps = [family.make_batch(batch=3) for _ in range(3)]
    losses = []
    for module in (original.model, gm):
        module.train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        torch.manual_seed(2)
        for inputs in steps:
            optimizer.zero_grad()
            loss = module(**inputs).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert all(
        torch.allclose(one, other, atol=1e-4)
        for one, other in zip(original.model.parameters(), gm.parameters(), strict=True)
    )


# --- the model is left alone ------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A batch norm and a dropout that stay in evaluation mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.frozen_norm = nn.BatchNorm1d(16).eval()
        self.linear = nn.Linear(16, 16)
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.frozen_norm(self.norm(x)))


def test_model_is_left_as_it_was() -> None:
    family = FAMILIES["bert"]()
    family.model.eval()
    family.model.bert.encoder.layer[1].train()
    flags = [module.training for module in family.model.modules()]
    settings = family.model.config.to_dict()
    state = {key: tensor.clone() for key, tensor in family.model.state_dict().items()}
    inputs = family.make_batch(batch=2)
    random_state = torch.get_rng_state()
    gm = trace(family.model, kwargs=inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in family.model.modules()] == flags
    assert family.model.config.to_dict() == settings  # the first loss would set problem_type
    assert all(torch.equal(tensor, state[key]) for key, tensor in family.model.state_dict().items())
    assert all(parameter.grad is None for parameter in family.model.parameters())
    for path, module in family.model.named_modules():
        assert gm.get_submodule(path).training == module.training


def test_flags_are_those_of_each_module() -> None:
    model = Frozen()
    gm = trace(model, (torch.randn(4, 16),))
    x = torch.randn(5, 16)
    twin = copy.deepcopy(model)
    assert_same(twin(x), gm(x))
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean) and model.norm.num_batches_tracked == 1
    assert torch.equal(model.frozen_norm.running_mean, torch.zeros(16)) and model.frozen_norm.num_batches_tracked == 0
    gm.eval()
    assert_same(twin.eval()(x), gm(x))
    assert model.norm.num_batches_tracked == 1
    assert not gm.linear.weight.requires_grad
    gm.train()  # now the frozen one trains too
    gm(x)
    assert model.norm.num_batches_tracked == 2 and model.frozen_norm.num_batches_tracked == 1


def test_traced_modules_and_compiled_modules() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    gm = trace(torch.compile(model), (torch.randn(2, 16),))
    assert list(gm.state_dict()) == ["0.weight", "0.bias"]
    assert trace(gm, (torch.randn(2, 16),)) is gm


def test_autocast_and_no_grad_around_the_call_are_not_captured() -> None:
    model = nn.Linear(16, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        gm = trace(model, (torch.randn(2, 16),))
    x = torch.randn(3, 16)
    assert gm(x).dtype is torch.float32 and gm(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model(x), gm(x))


def test_model_without_storage() -> None:
    """On the meta device a model of any size can be traced, to know what it would cost."""
    with torch.device("meta"):
        config = transformers.GPTNeoXConfig(num_hidden_layers=2, use_cache=False)
        model = transformers.GPTNeoXForCausalLM(config)
        gm = trace(model, kwargs={"input_ids": torch.zeros(2, 16, dtype=torch.long)})
        assert gm(torch.zeros(3, 16, dtype=torch.long)).logits.shape == (3, 16, config.vocab_size)
    assert attentions(gm) == [(None, True)] * 2


# --- modes ------------------------------------------------------------------------------------------------------------


class EveryFlag(nn.Module):
    """Every operator that has a mode, and what has none: statistics of the batch, a dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.batch_statistics = nn.BatchNorm1d(16, track_running_stats=False)
        self.instance_norm = nn.InstanceNorm1d(16, track_running_stats=True)
        self.stateless_norm = nn.InstanceNorm1d(16)
        self.alpha = nn.AlphaDropout(0.2)
        self.feature = nn.Dropout1d(0.3)
        self.feature_alpha = nn.FeatureAlphaDropout(0.2)
        self.in_place = nn.Dropout(0.1, inplace=True)
        self.rrelu = nn.RReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.rrelu(self.batch_statistics(self.norm(self.linear(x))))
        x = self.in_place(self.alpha(x))
        channels = x[:, :, None] * torch.arange(1.0, 5.0)
        channels = self.stateless_norm(self.instance_norm(self.feature(channels)))
        x = x + self.feature_alpha(channels).sum(-1)
        heads = x.view(-1, 2, 1, 8)
        heads = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2 if self.training else 0.0)
        x = F.dropout(heads.reshape(-1, 16), 0.4, self.training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.dropout(self.linear(x), 0.2, self.training)
        return F.dropout(x.float(), 0.3)


def test_every_flag_switches() -> None:
    model = EveryFlag()
    gm = trace(model, (torch.randn(4, 16),))
    twin = copy.deepcopy(model)
    for training in (True, False, True):
        twin.train(training)
        gm.train(training)
        x = torch.randn(5, 16)
        assert_same(seeded(twin, x), seeded(gm, x))
        for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(ours, theirs), name
    assert model.norm.num_batches_tracked == 2


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class StochasticDepth(nn.Module):
    """Drops examples; of two results, one is the same in both modes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return x, x
        return x / 0.7 * (0.7 + torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype)).floor(), x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.noise = nn.Linear(16, 16), StochasticDepth(), Noise()

    def forward(self, x: Tensor) -> Tensor:
        dropped, whole = self.drop(F.gelu(self.linear(x)))
        return self.noise(F.dropout(x + dropped, 0.1, self.training)) + whole


def test_what_is_random_in_training_alone_follows_the_mode() -> None:
    model = nn.Sequential(Residual(), nn.Dropout(0.5), Residual())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = trace(model, (torch.randn(4, 16),))
    assert gm.meta[TRACE_KEY].notes == ()
    for mode, still in ((True, False), (False, False), (True, True)):
        for module in (model, gm):
            module.train(mode)
            module.get_submodule("2.noise").train(mode and not still)  # it draws last
        x = torch.randn(9, 16, requires_grad=True)
        expected, actual = seeded(model, x), seeded(gm, x)
        assert_same(expected, actual)
        gradients = [torch.autograd.grad(y.sum(), [x, model[0].linear.weight]) for y in (expected, actual)]
        assert all(map(torch.equal, *gradients))
    assert not torch.equal(seeded(gm.train(), x), seeded(gm.eval(), x))


class Widened(nn.Module):
    """Gives another dtype in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, dtype=torch.float64) if self.training else x


def test_random_training_of_another_dtype_is_held_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Widened())
    with pytest.warns(UserWarning, match="Widened is captured as it evaluates, because in training it gives"):
        gm = trace(model, (torch.randn(4, 16),))
    x = torch.randn(3, 16)
    assert_same(model.eval()(x), gm.train()(x))


class NoisyLinear(nn.Module):
    """Random in training, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * self.scale if self.training else x * self.scale


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < 0.5:
            return x
        return self.linear(x)


@pytest.mark.parametrize(("kind", "line"), [(NoisyLinear, "torch.randn_like"), (LayerDrop, "torch.rand([]) < 0.5")])
def test_random_training_is_held_in_evaluation(kind: type[nn.Module], line: str) -> None:
    model = nn.Sequential(kind(), nn.Dropout(0.5), kind())
    with pytest.warns(UserWarning, match=f"{kind.__name__} is captured as it evaluates"):
        gm = trace(model, (torch.randn(4, 16),))
    (note,) = gm.meta[TRACE_KEY].notes
    assert line in note and re.search(rf"{re.escape(__file__)}:\d+, in forward", note)
    x = torch.randn(3, 16)
    assert all(module.training for module in model.modules())
    for training in (True, False):
        model.train(training)
        gm.train(training)
        model[0].eval(), model[2].eval()
        assert_same(seeded(model, x), seeded(gm, x))


class HeldDropout(nn.Module):
    """Layer drop in the module that also drops activations, as BART's encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training)
        for layer in self.layers:
            if not self.training or torch.rand([]) >= 0.0:
                x = layer(x)
        return x


def test_dropout_of_a_held_module_still_trains() -> None:
    model = HeldDropout()
    with pytest.warns(UserWarning, match="HeldDropout is captured as it evaluates"):
        gm = trace(model, (torch.randn(4, 16),))
    x = torch.randn(3, 16)
    torch.manual_seed(1)
    expected = model.layers[1](model.layers[0](F.dropout(x, 0.5, True)))
    assert_same(expected, seeded(gm, x))
    assert_same(model.eval()(x), gm.eval()(x))


class Unread(nn.Module):
    """Computes more than it returns, with a dropout in it, as CANINE's classifier does; and draws for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unread = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        F.dropout(self.unread(y), 0.5, self.training).sum()
        if self.training:
            torch.rand(x.shape[0])
        return y + x


def test_what_nobody_reads_is_not_in_the_graph() -> None:
    model = Unread()
    gm = trace(model, (torch.randn(4, 16),))
    assert [linear.name for linear in fx.linears(gm)] == ["linear.weight"]
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rand.default)
    sparse = fxsparse.rewrite(gm, "nm-masks{keep_first=false,keep_head=false}")
    assert {change.site for change in fxsparse.record_of(sparse).entries[-1].changes} == {"linear"}
    module = fxsparse.to_module(sparse, model).eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(module(x), sparse.eval()(x))


class SameInBothModes(nn.Module):
    """Modes that look different and are not: dead code, a read through a conversion, another memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16))
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.float() * x.float()
            torch.rand([])
        heads = (self.linear(x) * self.scale).view(-1, 4, 2, 8).transpose(1, 2)
        probability = 0.2 if self.training else 0.0
        heads = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=probability)
        return heads.contiguous().view(x.shape[0] // 4, 64)


def test_what_is_the_same_in_both_modes_is_one_graph() -> None:
    model = SameInBothModes()
    gm = trace(model, (torch.randn(8, 16),))
    assert gm.meta[TRACE_KEY].notes == ()
    x = torch.randn(12, 16)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        assert_same(seeded(model, x), seeded(gm, x))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            return x.square().mean()
        return x


def test_another_function_in_training_is_refused_unless_evaluating() -> None:
    model = Auxiliary()
    with pytest.raises(TraceError, match=r"(?s)Auxiliary: training computes something else.*x\.square\(\)"):
        trace(model, (torch.randn(4, 16),))
    model.eval()
    with pytest.warns(UserWarning, match="captured as it evaluates"):
        gm = trace(model, (torch.randn(4, 16),))
    x = torch.randn(3, 16)
    assert_same(model(x), gm(x))


def test_spec_augment_says_how_to_turn_it_off() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(
        **sizes, **convolutions, vocab_size=8, num_conv_pos_embeddings=4, layerdrop=0.0
    )
    with pytest.raises(TraceError, match=r"_mask_hidden_states(?s:.*)apply_spec_augment=False"):
        trace(transformers.Wav2Vec2ForCTC(config), (torch.randn(2, 600),))


class Regions(nn.Module):
    """Code without gradients: on sizes, on a parameter, around a nested region, and one that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            positions = torch.arange(x.shape[0], device=x.device).float()
            scale = self.linear(x).mean(0) * 2
            with torch.autocast("cpu", dtype=torch.bfloat16):
                rounded = self.linear(x)
        with torch.no_grad():
            self.calls.add_(1)
        return self.linear(x) * scale + positions[:, None] + rounded.float()


def test_regions_without_gradients_are_flat() -> None:
    model = Regions()
    gm = trace(model, (torch.randn(4, 16),))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 16, requires_grad=True)
    expected, found = twin(x), gm(x)
    assert_same(expected, found)
    for one, other in zip(gradients(twin, expected), gradients(gm, found), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert model.calls == 1
    _, llama = traced("llama")
    assert not any(
        "wrap_with" in str(node.target) or isinstance(node.meta["val"], nn.Module) for node in llama.graph.nodes
    )


# --- inputs -----------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(
        self, x: Tensor, scale: float | None = None, *, extra: dict[str, list[Tensor]], flag: bool = True
    ) -> Any:
        y = self.linear(x) + extra["biases"][0] * (1 if scale is None else scale)
        return {"y": y, "more": [extra["factor"] * y]} if flag else y


def test_nested_inputs_and_outputs() -> None:
    def make(batch: int, **kwargs: Any) -> dict[str, Any]:
        return {
            "x": torch.randn(batch, 16),
            "extra": {"biases": [torch.randn(batch, 16)], "factor": torch.tensor(2.0)},
        } | kwargs

    model = Nested()
    gm = trace(model, kwargs=make(4, scale=None, flag=True))
    inputs = make(3, scale=None, flag=True)
    assert_same(model(**inputs), gm(**inputs))
    with pytest.raises(TraceError, match="flag is False, but True was captured"):
        gm(**make(3, scale=None, flag=False))
    with pytest.raises(TraceError, match=r"scale is 2\.0, but None was captured"):
        gm(**make(3, scale=2.0, flag=True))
    inputs = make(3)
    assert_same(model(**inputs), gm(**inputs))  # both as by default
    with pytest.raises(TraceError, match=r"captured with .*, and extra is missing \(output y, more depends on it\)"):
        gm(torch.randn(3, 16))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_labels_may_be_left_out(name: str) -> None:
    family, gm = traced(name)
    inputs, unlabelled = family.make_batch(batch=3, seq=8), family.make_batch(batch=5, labels=False)
    for training in (False, True):
        family.model.train(training)
        gm.train(training)
        for call in (inputs, unlabelled, {**unlabelled, "labels": None, "output_hidden_states": None}):
            torch.manual_seed(0)
            expected = family.model(**call)
            torch.manual_seed(0)
            assert_same(expected, gm(**call))
    compiled = torch.compile(gm.eval(), backend="aot_eager")
    for call in (unlabelled, inputs):
        assert_same(gm(**call), compiled(**call))
    rewritten = fxsparse.rewrite(gm, "nm-masks,low-rank{rank=2,start=0.5}").eval()
    before = rewritten(**inputs).logits
    schedule = fxsparse.Schedule(rewritten, torch.optim.SGD(rewritten.parameters(), lr=0.1), total_steps=2)
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(rewritten(**unlabelled).logits, before)
    with torch.no_grad():
        for key, parameter in rewritten.named_parameters():
            if key.endswith("_up"):
                parameter.normal_()
    schedule.step()
    assert torch.equal(rewritten(**unlabelled).logits, rewritten(**inputs).logits), "an edit reaches every form"
    assert not torch.equal(rewritten(**unlabelled).logits, before)
    if name == "bert":
        with pytest.raises(TraceError, match=r"attention_mask is missing \(output loss, logits depends on it\)"):
            gm(input_ids=inputs["input_ids"], labels=inputs["labels"])
    with pytest.raises(TraceError, match=r"does not know output_hidden_states; trace .*'output_hidden_states': \.\.\."):
        gm(**inputs, output_hidden_states=True)


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    family = FAMILIES["llama"]()
    ids = token_ids(4, 16)
    gm = trace(family.model, kwargs={"input_ids": ids, "labels": ids})
    inputs = {"input_ids": token_ids(3, 16), "labels": token_ids(3, 16)}
    assert_same(family.model(**inputs), gm(**inputs))


def test_another_length_is_refused() -> None:
    family, gm = traced("opt")
    with pytest.raises(TraceError, match=r"input_ids has sizes \(3, 1\), but the graph takes \(s\d+, s\d+\)"):
        gm(**causal_lm_batch(3, 1))  # a length of 1 may mean a broadcast
    gm = trace(family.model, kwargs=causal_lm_batch(4, 16), dynamic_sequence=False)
    for length in (1, 8):
        with pytest.raises(TraceError, match=rf"input_ids has sizes \(3, {length}\), but the graph takes \(s\d+, 16\)"):
            gm(**causal_lm_batch(3, length))  # positions would broadcast


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_batch_of_one_is_captured_with_two_rows(name: str) -> None:
    family = FAMILIES[name]()
    gm = trace(family.model, kwargs=family.make_batch(batch=1))
    assert any("one row repeated" in note for note in gm.meta[TRACE_KEY].notes)
    family.model.eval()
    gm.eval()
    for batch in (1, 3):
        inputs = family.make_batch(batch=batch)
        assert_same(family.model(**inputs), gm(**inputs))


class OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[0] * 2 if x.shape[0] == 1 else x * 2


def test_batch_of_one_that_means_something_else_is_refused() -> None:
    with pytest.raises(TraceError, match=r"with one row the model returns sizes \[\(16,\)\]"):
        trace(OneRow(), (torch.randn(1, 16),))
    gm = trace(OneRow(), (torch.randn(1, 16),), dynamic_batch=False, dynamic_sequence=False)
    assert gm(torch.randn(1, 16)).shape == (16,)
    with pytest.raises(TraceError, match=r"the graph takes \(1, 16\)"):
        gm(torch.randn(2, 16))
    with pytest.raises(TraceError, match="one row and others have 4"):
        trace(
            Nested(),
            kwargs={"x": torch.randn(1, 16), "extra": {"biases": [torch.randn(4, 16)], "factor": torch.ones(())}},
        )


def test_an_input_that_is_broadcast_over_the_batch() -> None:
    family = FAMILIES["bert"]()
    positions = torch.arange(16)[None]
    gm = trace(family.model, kwargs=family.make_batch(batch=4, labels=False) | {"position_ids": positions})
    assert "position_ids: dimension 0 stays 1" in gm.meta[TRACE_KEY].notes
    inputs = family.make_batch(batch=3, labels=False) | {"position_ids": positions.flip(1)}
    family.model.eval()
    gm.eval()
    assert_same(family.model(**inputs), gm(**inputs))


class FixedView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).view(4, 16)


class FixedBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 4 else x


@pytest.mark.parametrize(("model", "line"), [(FixedView(), "view(4, 16)"), (FixedBranch(), "if x.shape[0] == 4")])
def test_a_fixed_batch_is_refused_with_its_line(model: nn.Module, line: str) -> None:
    with pytest.raises(TraceError, match=rf"(?s)batch size 4 only.*{re.escape(__file__)}:\d+.*{re.escape(line)}"):
        trace(model, (torch.randn(4, 16),))
    assert torch.equal(
        trace(model, (torch.randn(4, 16),), dynamic_batch=False)(torch.ones(4, 16)), torch.full((4, 16), 2.0)
    )


class SizeBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 3 else x


def test_a_branch_on_the_batch_size_is_kept_as_a_condition() -> None:
    gm = trace(SizeBranch(), (torch.randn(4, 16),))
    assert torch.equal(gm(torch.ones(5, 16)), torch.full((5, 16), 2.0))
    for module in (gm, copy.deepcopy(gm)):
        with pytest.raises(TraceError, match=r"(?s)where s\d+ > 3.*x\.shape\[0\] > 3"):
            module(torch.ones(3, 16))


class DataBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return x


class Misfit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(15, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("model", "reason", "line"),
    [
        (DataBranch(), "Python needs the value of a tensor", "if x.sum() > 0:"),
        (Misfit(), "15", "return self.linear(x)"),
    ],
)
def test_what_cannot_be_captured_says_where(
    model: nn.Module, reason: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TraceError, match=rf"(?s){reason}.*{re.escape(__file__)}:\d+, in forward.*{re.escape(line)}"):
        trace(nn.Sequential(nn.Linear(16, 16), model), (torch.randn(4, 16),))
    assert capsys.readouterr() == ("", "")
    assert all(module.training for module in model.modules())


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async(x.sum() < 1000)
        return x * 2


def test_what_a_model_asserts_of_values_stays() -> None:
    gm = trace(Checked(), (torch.randn(3, 5),))
    gm(torch.ones(2, 5))
    with pytest.raises(RuntimeError):
        gm(torch.ones(2, 5) * 1000)


def test_a_bug_in_tracing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsparse.tracing.trace.inline_no_grad", None)
    with pytest.raises(
        InternalError, match=r"(?s)tracing Linear broke in .*trace\.py:\d+, in _flat_module.*report it"
    ) as error:
        trace(nn.Linear(16, 16), (torch.randn(4, 16),))
    assert isinstance(error.value.__cause__, TypeError) and not isinstance(error.value, TraceError)


class MakesItsMask(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if attention_mask is None and not torch.compiler.is_compiling():
            attention_mask = torch.ones(x.shape[:2])
        return x * attention_mask[:, :, None].pow(scale)


def test_what_a_model_does_only_outside_of_capture_is_refused_with_what_to_do() -> None:
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(TraceError, match=r"(?s)not subscriptable.*mask\[.*no attention_mask there.*: give it"):
        trace(MakesItsMask(), (x,))
    assert torch.equal(trace(MakesItsMask(), (x, mask))(x, mask), x)
    with pytest.raises(TraceError, match=r"(?s)TypeError.*change that line"):
        trace(MakesItsMask(), (x, mask, "2"))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TraceError, match="missing a required argument"):
        trace(nn.Linear(16, 16), kwargs={"y": torch.randn(2, 16)})


# --- attention masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name, build in FAMILIES.items() if name in {"opt", "gpt2", "llama", "qwen2"}]
)
def test_causal_masks_are_restored(name: str) -> None:
    family, gm = traced(name)
    found = attentions(gm)
    assert family.causal and found == [(None, True)] * len(found) and len(found) >= 2
    assert f"causal mask turned into is_causal in {len(found)} attentions" in gm.meta[TRACE_KEY].notes
    assert not any(node.target is torch.ops.aten.le.Tensor for node in gm.graph.nodes)


def test_masks_that_hide_nothing_are_dropped() -> None:
    for name in ("vit", "roberta"):
        _, gm = traced(name)
        assert attentions(gm) == [(None, False)] * len(attentions(gm))


def test_masks_of_values_and_windows_stay() -> None:
    for name in ("bert", "mistral"):
        _, gm = traced(name)
        found = attentions(gm)
        assert len(found) >= 2 and all(mask is not None and not causal for mask, causal in found)
    family = FAMILIES["llama"]()
    inputs = family.make_batch(batch=4) | {"attention_mask": padding_mask(4, 16)}
    gm = trace(family.model, kwargs=inputs)
    assert all(mask is not None and not causal for mask, causal in attentions(gm))
    inputs = family.make_batch(batch=3) | {"attention_mask": padding_mask(3, 16)}
    assert_same(family.model(**inputs), gm(**inputs))


def test_learnt_biases_stay() -> None:
    _, gm = traced("t5")
    kept = [mask for mask, causal in attentions(gm) if mask is not None and not causal]
    assert len(kept) == 4  # self-attention of two layers on both sides; the decoder's view of the encoder is open
    assert len(attentions(gm)) == 6


def test_a_window_as_long_as_the_sequence_is_causal() -> None:
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, use_cache=False,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    gm = trace(model, kwargs=causal_lm_batch(4, 16), dynamic_sequence=False)
    assert attentions(gm) == [(None, True)] * 2
    gm = trace(model, kwargs=causal_lm_batch(4, 12))
    assert attentions(gm) == [(None, True)] * 2
    for length in (3, 16):
        inputs = causal_lm_batch(2, length)
        assert_same(model(**inputs), gm(**inputs))
    with pytest.raises(TraceError, match=r"s\d+ <= 16, the window of its attention; trace with a longer example"):
        gm(**causal_lm_batch(2, 17))
    gm, inputs = trace(model, kwargs=causal_lm_batch(4, 17)), causal_lm_batch(2, 24)
    assert all(mask is not None for mask, _ in attentions(gm))
    assert_same(model(**inputs), gm(**inputs))


def test_a_module_may_convert_itself_to_the_dtype_it_has() -> None:
    """Switch Transformers' router converts its classifier in every forward."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier.to(torch.float32)(x.float())

    model = Router()
    gm = trace(model, (torch.randn(3, 8),))
    assert gm.classifier.weight is model.classifier.weight
    x = torch.randn(5, 8)
    torch.testing.assert_close(gm(x), model(x))
    assert model.classifier.to(torch.float64).weight.dtype == torch.float64, "outside of a capture nothing changes"

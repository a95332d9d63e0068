"""``options={"weights": "compressed"}``: one line saves and computes what `rewrite` and `to_module` do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fxsparse
from fxsparse.backend import compiled_graphs
from fxsparse.errors import OptionError, RewriteError
from tests.backend.test_whole_model import LOW_RANK, Net, Trained, batch, one_line

MASKS = "nm-masks{keep_first=false,keep_head=false}"
SLOPE = f"{LOW_RANK},double-prune"


def compressed(passes: Any = MASKS, **options: Any) -> dict[str, Any]:
    return one_line(passes, weights="compressed", **options)


def in_two_steps(model: nn.Module, passes: str, inputs: dict[str, Any]) -> nn.Module:
    return fxsparse.to_module(fxsparse.rewrite(model, passes, kwargs=inputs), model)


def bytes_of(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def stepped(trained: Trained, inputs: dict[str, Tensor], seed: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step; nothing but the call rewrites a model that was not called before."""
    torch.manual_seed(seed)
    loss = trained.model(**inputs)["loss"]
    loss.backward()
    named = trained.model._orig_mod.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    trained.optimizer.step()
    trained.schedule.step()
    trained.optimizer.zero_grad()
    return loss.item(), gradients


def kept_of(dense: Tensor) -> Tensor:
    """The 2:4 mask of largest magnitudes, in plain torch; no two weights of a group tie."""
    groups = dense.detach().abs().view(dense.shape[0], -1, 4)
    return (groups >= groups.topk(2).values[..., 1:]).view(dense.shape)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_line_trains_as_two_steps_and_frees_the_dense_weights(compiler: str) -> None:
    model = Net()
    inputs = batch()
    module = in_two_steps(copy.deepcopy(model), SLOPE, inputs)
    before = bytes_of(model)
    gone = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    fast = torch.compile(model, fullgraph=True, **compressed(SLOPE, compiler=compiler))
    two_steps = torch.compile(module, backend="fxsparse", options={"compiler": compiler})
    pair = [Trained(fast, 6), Trained(two_steps, 6)]
    for step in range(6):
        inputs = batch(6 if step == 2 else 4)
        (loss, ours), (expected, theirs) = (stepped(each, inputs, step) for each in pair)
        assert loss == expected, step
        assert ours.keys() == theirs.keys() and len(ours) == (10 if step >= 3 else 6)
        assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items()), step
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert bytes_of(model) == bytes_of(module) and bytes_of(model) < before
    moments = [[state["exp_avg"].numel() for state in each.optimizer.state.values()] for each in pair]
    assert sorted(moments[0]) == sorted(moments[1])
    with torch.no_grad():
        outputs = [each.model.eval()(**inputs)["logits"] for each in pair]
    exact = {"rtol": 0, "atol": 0} if compiler == "aot_eager" else {}  # Inductor may vectorise sizes otherwise
    torch.testing.assert_close(outputs[0], outputs[1], **exact)
    graphs = compiled_graphs(fast)
    assert graphs and all(any(c.op.startswith("nm_linear") for c in graph.choices) for graph in graphs)
    assert "nm-masks" in fxsparse.explain(fast) and "2 rewritten" in fxsparse.explain(fast)


class WithConv1D(Net):
    """A linear whose weight is stored ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(32, 16)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Net, WithConv1D])
def test_an_optimizer_that_stepped_before_goes_on(kind: type[Net]) -> None:
    model = kind()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed}], lr=1e-2)
    for _ in range(2):
        model(**batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    dense = {"up": model.up.weight, "down": model.down.weight}
    states = {name: copy.deepcopy(optimizer.state[weight]) for name, weight in dense.items()}
    fast = torch.compile(model, **compressed(SLOPE))
    fxsparse.Schedule(fast, optimizer, total_steps=4)
    fast(**batch())["loss"].backward()
    groups = [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]
    branches = [getattr(model, name).part("weight", part) for name in dense for part in ("down", "up")]
    assert groups[0] == {id(parameter) for parameter in others} and {id(part) for part in branches} <= groups[1]
    for position, (name, weight) in enumerate(dense.items()):
        values = getattr(model, name).weight_values
        assert optimizer.param_groups[1]["params"][position] is values and weight not in optimizer.state
        transposed = isinstance(getattr(model, name), Conv1D)
        rows = weight.t() if transposed else weight
        mask, state = kept_of(rows), optimizer.state[values]
        assert torch.equal(values, rows[mask].view_as(values)) and state["step"] == 2
        for key in ("exp_avg", "exp_avg_sq"):
            moment = states[name][key].t() if transposed else states[name][key]
            assert torch.equal(state[key], moment[mask].view_as(values))
    before = model.up.weight_values.clone()
    optimizer.step()
    assert not torch.equal(before, model.up.weight_values)


def test_state_of_another_shape_starts_anew() -> None:
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters())
    model(**batch())["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    fast = torch.compile(model, **compressed())
    fxsparse.Schedule(fast, optimizer, total_steps=4)
    with pytest.warns(UserWarning, match=r"Adafactor keeps of up\.weight \(2 in all\).*anew"):
        fast(**batch())["loss"].backward()
    optimizer.step()
    assert optimizer.state[model.up.weight_values]["step"] == 1  # type: ignore[index]
    assert optimizer.state[model.up.bias]["step"] == 2


def test_a_schedule_may_come_after_the_first_call() -> None:
    model = Net()
    early = torch.optim.SGD(model.parameters(), lr=1e-2)
    fast = torch.compile(model, **compressed())
    with torch.no_grad():
        fast(**batch())
    fxsparse.Schedule(fast, early, total_steps=4)
    held = {id(parameter) for group in early.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in fast.parameters()}


def test_training_without_a_schedule_is_refused() -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = [id(parameter) for parameter in model.parameters()]
    fast = torch.compile(model, **compressed())
    with pytest.raises(OptionError, match=r"(?s)fxsparse\.Schedule.*no_grad"):
        fast(**batch())
    assert [id(parameter) for parameter in model.parameters()] == weights
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        fast(**batch())
    fast(**batch())["loss"].backward()
    assert model.up.weight_values.grad is not None


class Tied(nn.Module):
    """Two linears of one weight, and a head that is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.second.weight, self.head.weight = self.first.weight, self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(self.embed(ids))))))
        return logits


def test_tied_weights_stay_tied() -> None:
    model, ids = Tied().eval(), torch.randint(24, (4, 6))
    expected = fxsparse.rewrite(copy.deepcopy(model), MASKS, kwargs={"ids": ids})(ids=ids)
    fast = torch.compile(model, **compressed())
    torch.testing.assert_close(fast(ids=ids), expected)
    assert model.first.weight_values is model.second.weight_values
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(fast(ids=ids), expected)
    fxsparse.forget(model)
    assert model.first.weight is model.second.weight and len(list(model.parameters())) == 4
    torch.testing.assert_close(model(ids), expected)


def test_state_copies_and_pickles() -> None:
    model = Net().eval()
    fast, inputs = torch.compile(model, **compressed(SLOPE)), batch()
    expected = fast(**inputs)["logits"]
    torch.testing.assert_close(fast(**inputs)["logits"], expected)
    torch.testing.assert_close(model(**inputs)["logits"], expected)  # the model itself is compressed
    fresh = Net().eval()
    again = torch.compile(fresh, **compressed(SLOPE))
    again(**inputs)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(**inputs)["logits"], expected)
    dense = Net().eval()
    dense.load_state_dict(fxsparse.dense_state_dict(fast))
    torch.testing.assert_close(dense(**inputs)["logits"], expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.up.weight_values.zero_()
        lowered = torch.compile(twin, **compressed(SLOPE))
        assert not torch.allclose(lowered(**inputs)["logits"], expected)
        torch.testing.assert_close(lowered(**inputs)["logits"], twin(**inputs)["logits"])
        fxsparse.forget(twin)
        assert twin.up.weight.shape == (32, 16)
    torch.testing.assert_close(fast(**inputs)["logits"], expected)


def test_forget_makes_weights_dense_as_trained() -> None:
    model = Net()
    names, hooks = list(model.state_dict()), dict(model._forward_pre_hooks)
    order = [name for name, _ in model.named_parameters()]
    model.norm.requires_grad_(False)
    fast = torch.compile(model, **compressed(f"{SLOPE},select-tensors{{tensors=[up.*]}}"))
    trained = Trained(fast, 4)
    for step in range(4):
        trained.step(batch(), step)
    inputs = batch()
    expected = fast.eval()(**inputs)["logits"]
    assert not model.down.weight_values.requires_grad and model.up.form.started
    with pytest.raises(OptionError, match=r"fxsparse\.forget"):
        torch.compile(model, **compressed())(**inputs)
    with pytest.raises(OptionError, match=r"fxsparse\.forget"):
        torch.compile(model, **one_line(MASKS))(**inputs)
    fxsparse.forget(fast)
    assert list(model.state_dict()) == names and [name for name, _ in model.named_parameters()] == order
    assert type(model.up) is nn.Linear and model._forward_pre_hooks == hooks and not hasattr(model, "meta")
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert asked == {name: not name.startswith("norm") for name in asked}
    torch.testing.assert_close(model(**inputs)["logits"], expected)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**inputs)["logits"], expected)
    with pytest.raises(OptionError, match="no one-line call"):
        fxsparse.forget(fast)
    with torch.no_grad():
        fast(**inputs)
    assert model.up.weight_values.shape == (32, 8)  # the next call compresses again


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Layered(nn.Module):
    """Layers that may be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Broken(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        torch._dynamo.graph_break()
        return super().forward(x, labels)


REFUSED = {
    "masked": (Net, "nm-masks{storage=masked}", r"nm-masks: .*storage=.masked"),
    "dynamic": (Net, "nm-masks{storage=masked,dynamic=true}", r"nm-masks: .*dynamic"),
    "without passes": (Net, None, "there are none"),
    "changed sizes": (Layered, f"{MASKS},drop-layers{{indices=[1]}}", r"drop-layers: .*rewrite.*to_module"),
    "gates": (Layered, "gates{units=[intermediate]}", r"gates: .*rewrite.*to_module"),
    "a choice that varies": (Layered, f"{MASKS},select-tensors{{rho=0.5}}", r"select-tensors: .*tensors=.*rewrite"),
    "a part": (Broken, MASKS, r"(?s)part only.*test_compressed_weights\.py:\d+.*fxsparse\.rewrite"),
    "a linear": (lambda: nn.Linear(16, 16), MASKS, "itself is a linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_changes_nothing(case: str) -> None:
    kind, passes, message = REFUSED[case]
    model = kind().eval()
    before, kinds = model.state_dict(keep_vars=True), [type(module) for module in model.modules()]
    with pytest.raises(RewriteError, match=message):
        torch.compile(model, **compressed(passes))(torch.randn(4, 16))
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "meta")


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_wrapped_model_is_refused(one_rank: None) -> None:
    fast = torch.compile(Net().eval(), **compressed())
    with pytest.raises(RewriteError, match=r"DistributedDataParallel.*before it is wrapped"):
        nn.parallel.DistributedDataParallel(fast)(**batch())
    sharded = Net().eval()
    torch.distributed.fsdp.fully_shard(sharded)
    with pytest.raises(RewriteError, match=r"fully_shard.*before it is wrapped"):
        torch.compile(sharded, **compressed())(**batch())
    fast(**batch())
    nn.parallel.DistributedDataParallel(fast)(**batch())["loss"].backward()
    assert fast._orig_mod.up.weight_values.grad is not None


def test_a_masked_model_needs_forget_before() -> None:
    model, inputs = Net().eval(), batch()
    torch.compile(model, **one_line(LOW_RANK))(**inputs)
    with pytest.raises(OptionError, match=r"weights=.dense. before.*fxsparse\.forget"):
        torch.compile(model, **compressed(LOW_RANK))(**inputs)
    fxsparse.forget(model)
    torch.compile(model, **compressed(LOW_RANK))(**inputs)
    assert model.up.weight_values.shape == (32, 8)


def test_llama_generates_and_is_saved(tmp_path: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (2, 8))
    module = in_two_steps(copy.deepcopy(model), MASKS, {"input_ids": ids})
    fast = torch.compile(model, **compressed())
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, module(input_ids=ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight and bytes_of(model) == bytes_of(module)
    words = {"max_new_tokens": 4, "do_sample": False}
    expected = module.generate(ids, **words)
    assert torch.equal(fast.generate(ids, **words), expected)
    fxsparse.save_pretrained(fast, tmp_path)
    assert torch.equal(fxsparse.from_pretrained(tmp_path).generate(ids, **words), expected)
    fxsparse.forget(model)
    assert torch.equal(model.generate(ids, **words), expected) and not hasattr(model.config, "fxsparse")

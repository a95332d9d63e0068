"""The one-line call on whole models: it computes and trains what the two-step form does, and what it adds lasts.

``FXSPARSE_WHOLE_MATRIX=1`` runs every recipe on every family through AOTAutograd, and on two of them through Inductor;
otherwise a few run as graphs.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend.compiled import Origin
from fxsparse.backend.whole_model import with_dense_weights
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.added_state import added_state_of
from fxsparse.passes import AddLowRankBranches, Pipeline
from tests.support.families import FAMILIES

LOW_RANK = "nm-masks{keep_first=false,keep_head=false},low-rank{rank=2,start=0.5}"
RECIPES = ("slope", "slope-low-rank", "greentrainer", "sat", "layerchop", "dimchop", "prumux")
CELLS = list(itertools.product(("bert", "opt", "gpt2", "llama", "t5"), RECIPES))
WHOLE = bool(os.environ.get("FXSPARSE_WHOLE_MATRIX"))
CHOSEN = {
    ("gpt2", "layerchop"): "drop-layers{indices=[1]}",
    ("t5", "layerchop"): "drop-layers{indices=[1]}",
    ("t5", "prumux"): "multiplex{n=2,stack=encoder.block},gates{target=0.6}",
}
"""What these models are told to choose where the recipe as it stands is refused: two layers have none between the first
and the last, and an encoder-decoder has two stacks."""
SAMPLE = [("bert", "prumux", "eager"), ("opt", "sat", "eager"), ("llama", "slope-low-rank", "eager")]
EVERYTHING = [
    *((*cell, "aot_eager") for cell in CELLS),
    *((*cell, "inductor") for cell in CELLS if cell[0] in ("bert", "llama")),
]


class Net(nn.Module):
    """A residual MLP with a running buffer, dropout and an output object."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.norm(x + self.drop(self.down(torch.relu(self.up(x)))))
        return {"logits": y} if labels is None else {"loss": ((y - labels) ** 2).mean(), "logits": y}


def batch(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 16), "labels": torch.randn(rows, 16)}


def one_line(passes: Any, **options: Any) -> dict[str, Any]:
    return {"backend": "fxsparse", "options": {"passes": passes, "compiler": "aot_eager", **options}}


@dataclass
class Trained:
    """A model in training, to be stepped beside another."""

    model: Any
    total_steps: int

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = fxsparse.Schedule(self.model, self.optimizer, total_steps=self.total_steps)

    def step(self, inputs: dict[str, Tensor], seed: int) -> float:
        torch.manual_seed(seed)
        self.schedule.observe(inputs)
        torch.manual_seed(seed)
        outputs = self.model(**inputs)
        loss = outputs["loss"]
        gated = any(name.startswith("gates") for name in self.schedule.events)
        (loss + fxsparse.sparsity_loss(self.model) if gated else loss).backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss)


@pytest.mark.parametrize(("family", "recipe", "compiler"), EVERYTHING if WHOLE else SAMPLE)
def test_one_line_trains_as_two_steps_do(
    family: str, recipe: str, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []  # what each graph belongs to
    add = Origin.add
    monkeypatch.setattr(Origin, "add", lambda origin, *rest: (compiled.append(origin.target), add(origin, *rest)))
    chosen = FAMILIES[family]()
    chosen.model.loss_type = "ForCausalLM" if family == "gpt2" else chosen.model.loss_type  # else its warning breaks it
    twin = copy.deepcopy(chosen.model)
    passes = CHOSEN.get((family, recipe))
    pipeline = with_dense_weights(fxsparse.recipe(recipe) if passes is None else Pipeline.parse(passes))
    asked = {"recipe": recipe} if passes is None else {"passes": passes}
    fast = torch.compile(chosen.model, backend="fxsparse", options={**asked, "compiler": compiler})
    gm = fxsparse.rewrite(twin, pipeline, kwargs=chosen.make_batch(4))
    two_steps = torch.compile(gm, backend="fxsparse", options={"compiler": compiler})
    pair = [Trained(fast, 8), Trained(two_steps, 8)]  # a step for each of the four rungs of sat, twice
    for step in range(6):
        inputs = chosen.make_batch(6 if step == 2 else 4)
        losses = [each.step(inputs, step) for each in pair]
        assert losses[0] == (pytest.approx(losses[1], rel=1e-5) if compiler == "inductor" else losses[1]), step
        if step == 0:
            assert any(entry.rewritten for entry in fxsparse.record_of(fast).entries)
    inputs = chosen.make_batch(4)
    with torch.no_grad():
        evaluated = [each.model.eval()(**inputs)["loss"] for each in pair]
    exact = {"rtol": 0, "atol": 0} if compiler != "inductor" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(evaluated[0], evaluated[1], **exact)
    of_two_steps = sum(target is gm for target in compiled)
    assert len(compiled) == 2 * of_two_steps > 0


def test_what_is_added_lasts_and_is_the_models_own() -> None:
    model = Net()
    fast = torch.compile(model, fullgraph=True, **one_line(LOW_RANK))
    trained, names = Trained(fast, 4), set(model.state_dict())
    for step in range(4):
        trained.step(batch(), step)
    assert model.up.weight.grad is None and trained.schedule.values()["low-rank.started"] == 1
    added = set(model.state_dict()) - names
    assert {f"_fxsparse.{name}.weight_{part}" for name in ("up", "down") for part in ("mask", "up", "down")} <= added
    inputs = batch()
    with torch.no_grad():
        expected = fast.eval()(**inputs)["logits"]
        assert not torch.allclose(expected, model(**inputs)["logits"])  # the model's own forward is as it was
        assert torch.equal(expected, copy.deepcopy(fast)(**inputs)["logits"])
        fresh = Net().eval()
        again = torch.compile(fresh, **one_line(LOW_RANK))
        again(**inputs)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(expected, again(**inputs)["logits"])
        doubles = fast.double()(**{name: tensor.double() for name, tensor in inputs.items()})["logits"]
        assert doubles.dtype == torch.float64 and torch.allclose(doubles.float(), expected, atol=1e-5)


def test_a_copy_is_apart() -> None:
    fast, inputs = torch.compile(Net().eval(), **one_line(LOW_RANK)), batch()
    expected = fast(**inputs)["logits"]
    twin = copy.deepcopy(fast._orig_mod)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.compile(twin, **one_line(LOW_RANK))(**inputs)["logits"].abs().max() == 0
    torch.testing.assert_close(fast(**inputs)["logits"], expected, rtol=0, atol=0)


def test_another_model_of_the_class_is_rewritten_for_itself() -> None:
    first, second, inputs = Net().eval(), Net().eval(), batch()
    outputs = [torch.compile(model, **one_line(LOW_RANK))(**inputs)["logits"] for model in (first, second)]
    for model, output in zip((first, second), outputs, strict=True):
        gm = fxsparse.rewrite(copy.deepcopy(model), with_dense_weights(Pipeline(LOW_RANK)), kwargs=inputs)
        torch.testing.assert_close(output, gm(**inputs)["logits"])


def test_weights_that_are_replaced_are_followed() -> None:
    model, inputs = Net().eval(), batch()
    fast = torch.compile(model, **one_line(LOW_RANK))
    fast(**inputs)
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()}, assign=True)
    gm = added_state_of(model).graph  # type: ignore[union-attr]
    expected = fast(**inputs)["logits"]
    assert gm is not None and gm.get_parameter("up.weight") is model.up.weight
    torch.testing.assert_close(expected, gm(**inputs)["logits"])


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo breaks the graph there, and the call is refused")
def test_buffers_that_forward_assigns_are_kept() -> None:
    class Running(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
            return super().forward(x + self.mean, labels)

    model, twin = Running().eval(), Running().eval()
    twin.load_state_dict(model.state_dict())
    fast = torch.compile(model, **one_line(LOW_RANK))
    for _ in range(3):
        inputs = batch()
        fast(**inputs), twin(**inputs)
        torch.testing.assert_close(model.mean, twin.mean)


def test_parts_of_a_model_say_where_it_breaks() -> None:
    class Broken(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            torch._dynamo.graph_break()
            return super().forward(x, labels)

    with pytest.raises(RewriteError, match=r"(?s)part of the model.*test_whole_model\.py:\d+"):
        torch.compile(Broken(), **one_line(LOW_RANK))(**batch())


def test_other_passes_need_forget() -> None:
    model, inputs = Net().eval(), batch()
    before = model(**inputs)["logits"]
    torch.compile(model, **one_line(f"{LOW_RANK},select-tensors{{tensors=[up.*]}}"))(**inputs)
    assert not model.down.weight.requires_grad and model.up.weight.requires_grad
    with pytest.raises(OptionError, match=r"fxsparse\.forget"):
        torch.compile(model, **one_line(LOW_RANK))(**inputs)
    fxsparse.forget(model)
    assert model.down.weight.requires_grad and not any(name.startswith("_fxsparse") for name in model.state_dict())
    torch.testing.assert_close(model(**inputs)["logits"], before)
    assert fxsparse.record_of(_graph_after(model, inputs)).text.startswith("nm-masks")
    with pytest.raises(OptionError, match="no one-line call"):
        fxsparse.forget(Net())


def _graph_after(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    torch.compile(model, **one_line(LOW_RANK))(**inputs)
    return added_state_of(model).graph  # type: ignore[union-attr]


def test_functions_take_the_compiled_model(tmp_path: Any) -> None:
    fast, inputs = torch.compile(Net().eval(), **one_line(LOW_RANK)), batch()
    with pytest.raises(OptionError, match="first called"):
        fxsparse.Schedule(fast, torch.optim.SGD(fast.parameters()), total_steps=2).step()
    expected = fast(**inputs)["logits"]
    assert "nm-masks" in fxsparse.explain(fast) and "2 rewritten" in fxsparse.explain(fast)
    assert fxsparse.count_flops(fast).forward > 0
    dense = Net().eval()
    dense.load_state_dict(fxsparse.dense_state_dict(fast))
    torch.testing.assert_close(dense(**inputs)["logits"], expected)
    fxsparse.save(fast, tmp_path / "model.safetensors")
    loaded = fxsparse.load(tmp_path / "model.safetensors", Net(), kwargs=inputs).eval()
    torch.testing.assert_close(loaded(**inputs)["logits"], expected)
    module = fxsparse.to_module(fast, Net())
    torch.testing.assert_close(module.eval()(**inputs)["logits"], expected)


def test_training_without_a_schedule_says_so() -> None:
    with pytest.warns(UserWarning, match=r"low-rank.*fxsparse\.Schedule"):
        torch.compile(Net(), **one_line(LOW_RANK))(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(Net().eval(), **one_line(LOW_RANK))(**batch())


def test_a_module_of_torch_itself_is_rewritten() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    x = torch.randn(4, 16)
    gm = fxsparse.rewrite(copy.deepcopy(model), with_dense_weights(Pipeline(LOW_RANK)), args=(x,))
    fast = torch.compile(model, **one_line(LOW_RANK))
    for _ in range(2):  # what is added to it becomes one of its parts
        torch.testing.assert_close(fast(x), gm(x))


def test_recipes_mix_with_passes_and_text() -> None:
    masks = Pipeline("nm-masks{keep_first=false,keep_head=false}")
    fast = torch.compile(Net().eval(), **one_line([masks, "double-prune", AddLowRankBranches(rank=2)]))
    fast(**batch())
    entries = fxsparse.record_of(fast._orig_mod._fxsparse.graph).entries
    assert [entry.text.partition("{")[0] for entry in entries] == ["nm-masks", "double-prune", "low-rank"]


def test_forget_trains_again_what_a_schedule_froze() -> None:
    model = Net()
    fast = torch.compile(model, **one_line("select-tensors{rho=0.5}"))
    trained = Trained(fast, 2)
    trained.step(batch(), 0)
    assert not all(parameter.requires_grad for parameter in model.parameters())
    fxsparse.forget(model)
    assert all(parameter.requires_grad for parameter in model.parameters())

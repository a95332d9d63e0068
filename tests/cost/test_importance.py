"""Importance: its values against a plain computation, and that the probe leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxsparse
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.errors import OptionError
from tests.support.families import CORE_FAMILIES
from tests.support.traced import traced

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=1e-2),
}


def loss_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output["loss"]


def train(model: nn.Module, optimizer: Optimizer, batch: dict[str, Any]) -> None:
    loss_of(model(**batch)).backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """All that a probe could have changed, copied."""
    state = {key: optimizer.state[p] for key, p in enumerate(model.parameters()) if p in optimizer.state}
    groups = [{name: item for name, item in group.items() if name != "params"} for group in optimizer.param_groups]
    return copy.deepcopy(
        [
            [p.detach() for p in model.parameters()],
            [p.grad for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            list(model.buffers()),
            state,
            groups,
            {name: item for name, item in vars(optimizer).items() if isinstance(item, (int, float, bool, str))},
            torch.get_rng_state(),
        ]
    )


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_of_the_probe_stays(name: str, steps: int) -> None:
    family, gm = traced("opt")
    gm.get_submodule("model.decoder.layers.0").register_buffer("count", torch.zeros(3))
    optimizer = OPTIMIZERS[name](gm.parameters())
    for _ in range(steps):
        train(gm, optimizer, family.make_batch())
    loss_of(gm(**family.make_batch())).backward()  # gradients of a micro-batch that wait for their step
    tensors = [id(p.grad) for p in gm.parameters()]
    addresses = [p.data_ptr() for p in gm.parameters()]
    batch = family.make_batch()
    before = everything(gm, optimizer)
    for metric in ("importance", "delta", "gradient"):
        fxsparse.tensor_importance(gm, optimizer, batch, metric=metric)
    assert same(before, everything(gm, optimizer))
    assert tensors == [id(p.grad) for p in gm.parameters()]
    assert addresses == [p.data_ptr() for p in gm.parameters()]


def test_training_goes_on_as_if_nothing_had_been_measured() -> None:
    results = []
    for measured in (False, True):
        family, gm = traced("gpt2")
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(3):
            batch = family.make_batch()
            if measured:
                fxsparse.tensor_importance(gm, optimizer, batch, rho=0.6)
            train(gm, optimizer, batch)
            scheduler.step()
        results.append([p.detach().clone() for p in gm.parameters()])
    assert same(*results)


def test_buffers_that_the_forward_writes_are_left() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(6, 8)
    gm = fxsparse.trace(model, (x,))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    before = everything(gm, optimizer)
    found = fxsparse.tensor_importance(gm, optimizer, x, loss=lambda output: output.square().mean())
    assert same(before, everything(gm, optimizer))
    assert len(found) == 6 and sum(found.values()) > 0
    gm(x)
    assert not same(before[3], everything(gm, optimizer)[3]), "the model writes no buffer"


@pytest.mark.parametrize("name", CORE_FAMILIES)
def test_the_values_are_those_of_a_plain_computation(name: str) -> None:
    """The definition, written out on a copy of the model that is really trained."""
    family, gm = traced(name)
    gm.eval()  # no dropout: the copy draws its own numbers
    for module in gm.modules():
        module.training = False
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2, weight_decay=0.1)
    train(gm, optimizer, family.make_batch())
    batch = family.make_batch(batch=3)
    twin = copy.deepcopy(gm)
    stepped = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    stepped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    old = {name: p.detach().clone() for name, p in twin.named_parameters()}
    loss_of(twin(**batch)).backward()
    first = {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}
    stepped.step()
    stepped.zero_grad()
    loss_of(twin(**batch)).backward()
    moved = {name: p.detach() - old[name] for name, p in twin.named_parameters()}
    expected = {
        "importance": {name: -(moved[name] * p.grad).sum() for name, p in twin.named_parameters() if name in first},
        "delta": {name: moved[name].abs().sum() for name in first},
        "gradient": {name: gradient.abs().sum() for name, gradient in first.items()},
    }
    for metric, values in expected.items():
        found = fxsparse.tensor_importance(gm, optimizer, batch, metric=metric)
        assert found.keys() == values.keys()
        torch.testing.assert_close(
            torch.tensor(list(found.values())), torch.stack([values[name] for name in found]), rtol=1e-3, atol=1e-5
        )


def test_the_sum_of_importances_is_the_decrease_of_the_loss() -> None:
    family, gm = traced("llama")
    gm.requires_grad_(True)
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    batch = family.make_batch()
    found = fxsparse.tensor_importance(gm, optimizer, batch)
    before = loss_of(gm(**batch)).item()
    train(gm, optimizer, batch)
    assert sum(found.values()) == pytest.approx(before - loss_of(gm(**batch)).item(), rel=0.05)


@pytest.mark.parametrize("name", ["opt", "t5", "bert"])
@pytest.mark.parametrize("rho", [0.4, 0.5, 0.8, 1.0])
def test_what_no_selection_can_contain_is_left_out(name: str, rho: float) -> None:
    family, gm = traced(name)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    graph, batch = BackpropGraph(gm), family.make_batch()
    every = fxsparse.tensor_importance(gm, optimizer, batch, metric="gradient")
    within = fxsparse.tensor_importance(gm, optimizer, batch, metric="gradient", rho=rho)
    allowed = {key for key in every if graph.cost([key]) <= graph.budget(rho)}
    assert set(within) == allowed
    assert all(within[key] == pytest.approx(every[key], rel=1e-3, abs=1e-7) for key in within)
    assert graph.select(within, rho) == graph.select({key: every[key] for key in within}, rho)
    assert allowed == set(every) if rho == 1.0 else rho > 0.4 or len(allowed) < len(every)


def test_the_early_stop_saves_memory() -> None:
    """Bytes that autograd keeps for the backward pass, and those of gradients and copies, fall with rho."""
    family, gm = traced("opt")
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    batch, kept = family.make_batch(), {}
    weights = {p.untyped_storage().data_ptr() for p in gm.parameters()}
    for rho in (0.4, 0.7, None):
        saved: list[Tensor] = []  # held to the end: an address that is free again would be taken by another tensor

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = fxsparse.tensor_importance(gm, optimizer, batch, rho=rho)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        of_backward = sum(size for address, size in storages.items() if address not in weights)
        kept[rho] = (of_backward, sum(gm.get_parameter(name).nbytes for name in found))
    assert kept[0.4][0] < 0.6 * kept[None][0] and kept[0.4][0] < kept[0.7][0] < kept[None][0]
    assert kept[0.4][1] < 0.5 * kept[None][1]


def test_tied_tensors_count_once() -> None:
    family, gm = traced("opt")
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    found = fxsparse.tensor_importance(gm, optimizer, family.make_batch())
    assert [key for key in found if "embed_tokens" in key or "lm_head" in key] == ["model.decoder.embed_tokens.weight"]
    alias = fxsparse.tensor_importance(gm, optimizer, family.make_batch(), tensors=["lm_head.weight"])
    assert list(alias) == ["model.decoder.embed_tokens.weight"]


def test_hooks_of_the_optimizer_do_not_run() -> None:
    family, gm = traced("opt")
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    optimizer.register_step_post_hook(lambda *_: seen.append(2))
    fxsparse.tensor_importance(gm, optimizer, family.make_batch())
    assert not seen
    train(gm, optimizer, family.make_batch())
    assert seen == [1, 2]


def test_after_n_m_masks_values_are_measured() -> None:
    family, gm = traced("opt")
    gm = fxsparse.rewrite(gm, "nm-masks,double-prune,low-rank{rank=2}")
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    found = fxsparse.tensor_importance(gm, optimizer, family.make_batch())
    assert "model.decoder.layers.2.fc1.weight_values" in found
    assert not any(name.endswith(("_up", "_down")) for name in found), "branches that wait are not in the graph"


def test_what_is_refused() -> None:
    family, gm = traced("opt")
    optimizer, batch = torch.optim.AdamW(gm.parameters(), lr=1e-3), family.make_batch()
    before = everything(gm, optimizer)
    for options, message in (
        ({"metric": "size"}, "must be one of importance, delta, gradient"),
        ({"tensors": ["lm_head.wieght"]}, "did you mean"),
        ({"rho": 0.2}, r"the least possible is 0\.33"),
        ({"rho": 1.5}, r"\(0, 1\]"),
        ({"loss": lambda output: output.loss * float("nan")}, "is nan"),
    ):
        with pytest.raises(OptionError, match=message):
            fxsparse.tensor_importance(gm, optimizer, batch, **options)  # type: ignore[arg-type]
        assert same(before, everything(gm, optimizer))
    with pytest.raises(OptionError, match=r"0 scalars.*labels"):
        fxsparse.tensor_importance(*_without_loss())
    with pytest.raises(OptionError, match=r"gm\.parameters\(\)"):
        fxsparse.tensor_importance(gm, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), batch)
    gm.requires_grad_(False)
    with pytest.raises(OptionError, match="no trainable tensor"):
        fxsparse.tensor_importance(gm, optimizer, batch)


def _without_loss() -> tuple[Any, Optimizer, Tensor]:
    x = torch.randn(4, 8)
    gm = fxsparse.trace(nn.Linear(8, 8), (x,))
    return gm, torch.optim.SGD(gm.parameters(), lr=0.1), x

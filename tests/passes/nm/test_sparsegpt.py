"""SparseGPT against the method written column by column in numpy, alone and through whole models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.analysis import calibration
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import InsertNMMasks
from fxsparse.passes.nm.sparsegpt import prune
from tests.support.families import FAMILIES
from tests.support.oracle import masks_of


def slowly(weight: np.ndarray, inputs: np.ndarray, n: int, m: int, damping: float = 0.01) -> np.ndarray:
    """A weight ``[out, in]`` pruned for inputs ``[tokens, in]``: every column inverts what is left of the Hessian."""
    weight = weight.astype(np.float64).copy()
    hessian = inputs.astype(np.float64).T @ inputs.astype(np.float64)
    weight[:, np.diag(hessian) == 0] = 0
    hessian += np.eye(len(hessian)) * damping * np.diag(hessian).mean()
    pruned = np.zeros_like(weight, dtype=bool)
    for column in range(weight.shape[1]):
        if column % m == 0:
            group = range(column, column + m)
            saliency = np.stack([weight[:, i] ** 2 / np.linalg.inv(hessian[i:, i:])[0, 0] for i in group], axis=1)
            for row in range(len(weight)):
                for place in np.argsort(saliency[row], kind="stable")[: m - n]:
                    pruned[row, column + place] = True
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in np.flatnonzero(pruned[:, column]):
            weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
            weight[row, column] = 0
    return weight


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs that lie near a subspace of a quarter of their dimensions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features // 4, features, generator=generator)
    noise = torch.randn(tokens, features, generator=generator)
    return torch.randn(tokens, features // 4, generator=generator) @ mix + 0.3 * noise


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 16), ("1:4", 136), ("3:5", 135), ("2:16", 160)])
def test_equals_the_method_column_by_column(pattern: str, columns: int) -> None:
    """More columns than are updated at once, and an m that does not divide that number."""
    weight, inputs = torch.randn(6, columns, dtype=torch.float64), correlated(300, columns).double()
    inputs[:, 5] = 0  # an input that is never there
    n, m = map(int, pattern.split(":"))
    expected = torch.from_numpy(slowly(weight.numpy(), inputs.numpy(), n, m))
    result = prune(weight, inputs.t() @ inputs, Pattern(n, m))
    torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-10)
    assert (result.mask.unflatten(1, (-1, m)).sum(-1) == n).all()
    assert not result.weight[~result.mask].any() and not result.weight[:, 5].any()
    lost = (inputs @ (result.weight - weight).t()).square().sum() / (inputs @ weight.t()).square().sum()
    assert result.error == pytest.approx(float(lost), rel=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_outputs_change_less_than_by_magnitude_and_wanda(pattern: str) -> None:
    weight, inputs = torch.randn(64, 128), correlated(2000, 128)
    nm = Pattern.parse(pattern)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight).t()).square().sum())

    by_magnitude = error(weight * nm_mask(weight.abs(), nm))
    by_wanda = error(weight * nm_mask(weight.abs() * inputs.norm(dim=0), nm))
    result = prune(weight, (inputs.t() @ inputs).double(), nm)
    assert error(result.weight) < 0.5 * min(by_magnitude, by_wanda)
    chosen = error(weight * result.mask)  # the same mask without the update
    assert error(result.weight) < 0.7 * chosen


def test_transposable_masks_hold_both_ways() -> None:
    weight, inputs = torch.randn(16, 32), correlated(200, 32)
    result = prune(weight, (inputs.t() @ inputs).double(), Pattern(2, 4), transposable=True)
    assert (result.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert (result.mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    assert result.error is not None and result.error < 0.5


def oracle(model: nn.Module, names: list[str], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The weights of a model's linears, pruned one after another: each on what a whole run of the model shows it."""
    model = copy.deepcopy(model).eval()
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        inputs: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.detach().t() if transposed else module.weight.detach()
        pruned = torch.from_numpy(slowly(weight.numpy(), torch.cat(inputs).numpy(), 2, 4))
        with torch.no_grad():
            module.weight.copy_(pruned.t() if transposed else pruned)
    return {name: model.get_parameter(name).detach() for name in names}


@pytest.mark.parametrize(("name", "storage"), [("gpt2", "compressed"), ("llama", "masked"), ("bert", "compressed")])
def test_linears_are_calibrated_behind_pruned_ones(name: str, storage: str, tmp_path: Path) -> None:
    family = FAMILIES[name]()
    model = family.model.double()
    batches = [family.make_batch(batch=batch) for batch in (3, 5)]
    before = copy.deepcopy(model.state_dict())
    base = fxsparse.trace(model, kwargs=batches[0])
    masks = InsertNMMasks("2:4", criterion="sparsegpt", storage=storage, calibration=iter(batches))
    gm = fxsparse.rewrite(base, [masks])
    held = record_of(gm).weights
    assert len(held) >= 7
    expected = oracle(model, [weight.name for weight in held], batches)
    dense = fxsparse.dense_state_dict(gm)
    for key, weight in expected.items():
        torch.testing.assert_close(dense[key], weight, rtol=1e-6, atol=1e-8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the original model was written to"
    details = [change.detail for change in record_of(gm).entries[-1].rewritten]
    assert all(f"sparsegpt, {storage}, output error 0." in detail for detail in details)

    fxsparse.save(gm, tmp_path / "pruned.safetensors")
    loaded = fxsparse.load(tmp_path / "pruned.safetensors", copy.deepcopy(model), kwargs=batches[0])
    again = fxsparse.dense_state_dict(loaded)
    assert all(torch.equal(again[key], dense[key]) for key in dense)
    loss = gm.train()(**family.make_batch(batch=2)).loss
    loss.backward()
    grads = [parameter.grad for key, parameter in gm.named_parameters() if any(w.name in key for w in held)]
    assert grads and all(grad is not None and grad.any() for grad in grads)


class Chain(nn.Module):
    def __init__(self, depth: int, width: int = 16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def sparsify(model: nn.Module, batches: Any, **options: Any) -> torch.fx.GraphModule:
    masks = InsertNMMasks(criterion="sparsegpt", keep_first=False, keep_head=False, calibration=batches, **options)
    return fxsparse.rewrite(model, [masks], (batches[0],))


def test_a_shared_weight_is_pruned_once_for_all_its_inputs() -> None:
    model = Chain(3).double()
    model.layers[2].weight = model.layers[0].weight
    batches = [correlated(6, 16, seed).double() for seed in range(4)]
    dense = fxsparse.dense_state_dict(sparsify(model, batches))
    first = torch.cat(batches)
    second = first + model.layers[0](first).tanh()
    third = (second + model.layers[1](second).tanh()).detach()
    shared = slowly(model.layers[0].weight.detach().numpy(), torch.cat([first, third]).numpy(), 2, 4)
    between = slowly(model.layers[1].weight.detach().numpy(), second.detach().numpy(), 2, 4)
    torch.testing.assert_close(dense["layers.0.weight"], torch.from_numpy(shared))
    torch.testing.assert_close(dense["layers.1.weight"], torch.from_numpy(between))
    assert torch.equal(dense["layers.0.weight"], dense["layers.2.weight"])


def test_every_node_runs_at_most_twice_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [correlated(4, 16, seed) for seed in range(3)]
    base = fxsparse.trace(Chain(12), (batches[0],))
    runs: dict[str, int] = {}
    run = calibration._Walk._run

    def counted(self: Any, node: torch.fx.Node, values: Any) -> Any:
        runs[node.name] = runs.get(node.name, 0) + 1
        return run(self, node, values)

    monkeypatch.setattr(calibration._Walk, "_run", counted)
    sparsify(base, batches)
    assert len(runs) > 3 * 12 and len(batches) <= max(runs.values()) <= 2 * len(batches)


def test_a_linear_without_inputs_keeps_its_largest_magnitudes() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu() * (x.sum() > 1e9))

    model = Gated()
    gm = sparsify(model, [torch.randn(4, 8), torch.randn(2, 8)])
    dense, weight = fxsparse.dense_state_dict(gm)["second.weight"], model.second.weight.detach()
    torch.testing.assert_close(dense, weight * nm_mask(weight.abs(), Pattern(2, 4)))
    details = {change.site: change.detail for change in record_of(gm).entries[-1].changes}
    assert details["second"] == "2:4, sparsegpt, compressed, no calibration input reached it"


def test_half_precision_weights_stay_so() -> None:
    model = Chain(2).bfloat16()
    gm = sparsify(model, [correlated(32, 16).bfloat16()])
    (first, _) = record_of(gm).weights
    assert gm.get_parameter("layers.0.weight_values").dtype is torch.bfloat16
    assert (masks_of(gm, first)[0].unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_refusals() -> None:
    x = torch.randn(4, 16)
    base = fxsparse.trace(Chain(2), (x,))
    for batches in (None, []):
        with pytest.raises(RewriteError, match="calibration"):
            fxsparse.rewrite(base, [InsertNMMasks(criterion="sparsegpt", keep_head=False, calibration=batches)])
    with pytest.raises(RewriteError, match=r"calibration batch 1 does not run"):
        sparsify(base, [x, torch.randn(4, 3)])
    with pytest.raises(RewriteError, match=r"calibration batch 1 does not run"):
        sparsify(base, [x, {"y": x}])
    with pytest.raises(RewriteError, match=r"layers.0.*not finite"):
        sparsify(base, [x, x * torch.nan])
    with pytest.raises(OptionError, match="dynamic masks follow magnitudes"):
        InsertNMMasks(criterion="sparsegpt", storage="masked", dynamic=True)
    assert not record_of(base).entries and len(list(base.parameters())) == 4
    compiled = torch.compile(Chain(2), backend="fxsparse", options={"passes": "nm-masks{criterion=sparsegpt}"})
    with pytest.raises(RewriteError, match="sparsegpt needs calibration"):
        compiled(x)
    gm = sparsify(base, [x])
    with pytest.raises(RewriteError, match=r"sparsegpt needs calibration"):
        fxsparse.replay(record_of(gm), Chain(2), (x,))


def test_without_a_linear_to_prune_nothing_changes() -> None:
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    gm = fxsparse.rewrite(model, [InsertNMMasks(criterion="sparsegpt", exclude=("*",), calibration=[x])], (x,))
    assert torch.equal(gm(x), model(x))
    assert not record_of(gm).weights

"""N:M weights of experts against plain torch with each expert's matrix masked along its input."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import RewriteError
from fxsparse.graph.record import record_of
from fxsparse.modules.held import Held
from fxsparse.ops.nm import Pattern, double_prune_mask, nm_mask, unpack_column_mask
from fxsparse.passes import InsertNMMasks
from tests.support.experts import Mixture, gpt_oss, mixtral

ON = "nm-masks{pattern=2:4,keep_first=false,keep_head=false%s}"
FORMS = [(form, transposed) for form in ("grouped", "gathered", "every") for transposed in (False, True)]
_WEIGHTS = ("up_proj", "down_proj")


@functools.cache
def _traced(form: str, transposed: bool, idle: int | None) -> tuple[Mixture, GraphModule]:
    torch.manual_seed(0)
    model = Mixture(form, transposed, idle)
    return model, fxsparse.trace(model, (torch.randn(3, 4, 12),))


def mixture(form: str, transposed: bool = False, idle: int | None = None) -> tuple[Mixture, GraphModule]:
    return copy.deepcopy(_traced(form, transposed, idle))


def masks(model: nn.Module, transposed: bool) -> dict[str, Tensor]:
    """By name, of the weights of experts, in their layout, of the linears too."""
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        swapped = transposed and weight.dim() == 3
        along = (weight.mT if swapped else weight).detach().abs()
        mask = nm_mask(along, Pattern(2, 4))
        found[name] = mask.mT if swapped else mask
    return found


def masked(model: Mixture) -> tuple[Mixture, dict[str, Tensor]]:
    """The oracle: weights zero where pruned, whose gradients count at kept positions."""
    oracle, kept = copy.deepcopy(model), masks(model, model.transposed)
    with torch.no_grad():
        for name, mask in kept.items():
            oracle.get_parameter(name).mul_(mask)
    return oracle, kept


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the gradient of the input; leaves gradients of parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def dense_gradient(sparse: GraphModule, name: str, transposed: bool) -> Tensor:
    """The gradient of a weight's kept values, at their places."""
    weights = dict(sparse.named_parameters())
    if name in weights:
        grad = weights[name].grad
        assert grad is not None
        return grad
    values = weights[f"{name}_values"]
    assert values.grad is not None
    twin = copy.deepcopy(sparse)
    with torch.no_grad():
        twin.get_parameter(f"{name}_values").copy_(values.grad)
    return fxsparse.dense_state_dict(twin)[name]


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize(("form", "transposed"), FORMS)
def test_outputs_and_gradients_are_those_of_masked_experts(form: str, transposed: bool, storage: str) -> None:
    """Each form of the product, at a batch size other than the traced one, with an expert that gets no token."""
    model, gm = mixture(form, transposed, idle=2)
    sparse = fxsparse.rewrite(gm, ON % f",storage={storage}")
    done = {change.site: change.detail for change in record_of(sparse).entries[-1].changes if change.rewritten}
    assert {"up_proj", "down_proj", "enter", "router", "leave"} == done.keys()
    assert "5 experts" in done["up_proj"] and storage in done["up_proj"]
    oracle, kept = masked(model)
    for mode in (True, False):
        x = torch.randn(5, 3, 12)
        for one, other in zip(step(sparse.train(mode), x), step(oracle.train(mode), x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name in _WEIGHTS:
        expected = oracle.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(
            dense_gradient(sparse, name, transposed), expected * kept[name], rtol=1e-4, atol=1e-4
        )
        if form != "every":
            assert not dense_gradient(sparse, name, transposed)[2].any()


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dense_weights_come_back(transposed: bool, storage: str, tmp_path: Path) -> None:
    model, gm = mixture("grouped", transposed)
    sparse = fxsparse.rewrite(gm, ON % f",storage={storage}" + ",double-prune")
    oracle, _ = masked(model)
    assert fxsparse.dense_state_dict(sparse).keys() == model.state_dict().keys()
    for name, weight in fxsparse.dense_state_dict(sparse).items():
        assert torch.equal(weight, oracle.state_dict()[name]) and weight.is_contiguous()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.5)
    fxsparse.save(sparse, tmp_path / "model.safetensors")
    x = torch.randn(2, 5, 12)
    loaded = fxsparse.load(tmp_path / "model.safetensors", model, (torch.randn(3, 4, 12),))
    for one, other in zip(step(loaded, x), step(sparse, x), strict=True):
        torch.testing.assert_close(one, other)
    plain = copy.deepcopy(_traced("grouped", transposed, None)[0])
    plain.load_state_dict(fxsparse.dense_state_dict(sparse))
    torch.testing.assert_close(plain(x), sparse(x))


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_the_input_takes_each_expert_pruned_twice(transposed: bool, storage: str) -> None:
    """Against the formulas: experts' products with a backward pass of their own."""
    model, gm = mixture("grouped", transposed)
    exclude = "enter,router,leave"
    sparse = fxsparse.rewrite(gm, ON % f",storage={storage},exclude=[{exclude}]" + ",double-prune")
    done = {change.site: change.detail for change in record_of(sparse).entries[-1].changes}
    rows = {"up_proj": 24, "down_proj": 16}
    assert {name: done[name] for name in rows} == {n: f"backward 2:4 along {r} rows" for n, r in rows.items()}
    assert all("not n:m" in done[name] for name in ("enter", "router", "leave"))
    x = torch.randn(5, 3, 12)
    y, dx = step(sparse, x)
    oracle, expected = _twice_pruned(model)
    for name in _WEIGHTS:
        stored = sparse.get_buffer(f"{name}_column_mask")
        wanted = expected[name].mT if transposed else expected[name]
        mask = masks(model, transposed)[name]
        mask = mask.mT if transposed else mask
        bits = stored if storage == "masked" else unpack_column_mask(stored, mask, Pattern(2, 4))
        assert torch.equal(bits, wanted)
    there_y, there_dx = step(oracle, x)
    torch.testing.assert_close(y, there_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx, there_dx, rtol=1e-4, atol=1e-5)


class _Twice(torch.autograd.Function):
    """W^R in the forward pass and in dW, W^{R,C} in dx."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, twice: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, twice, expert)
        return torch.einsum("si,sio->so", rows, weight[expert])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, twice, expert = ctx.saved_tensors
        dweight = torch.zeros_like(weight).index_add(0, expert, torch.einsum("si,so->sio", rows, grads[0]))
        return torch.einsum("so,sio->si", grads[0], twice[expert]), dweight, None, None


def _twice_pruned(model: Mixture) -> tuple[nn.Module, dict[str, Tensor]]:
    oracle = copy.deepcopy(model)
    kept, columns = masks(model, model.transposed), {}
    with torch.no_grad():
        for name in _WEIGHTS:
            weight = oracle.get_parameter(name).mul_(kept[name])
            along = weight.mT if model.transposed else weight
            column = double_prune_mask(along, along != 0, Pattern(2, 4))
            columns[name] = column.mT if model.transposed else column

    def grouped(x: Tensor, scores: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, expert = x.repeat_interleave(oracle.top_k, dim=0), chosen.flatten()
        for name, last in zip(_WEIGHTS, (False, True), strict=True):
            weight = oracle._times(oracle.get_parameter(name))
            rows = _Twice.apply(rows, weight, weight.detach() * oracle._times(columns[name]), expert)
            rows = rows if last else rows.relu()
        return (rows.view(*chosen.shape, -1) * weights[..., None]).sum(1)

    oracle._grouped = grouped  # type: ignore[method-assign]
    return oracle, columns


def test_random_masks_differ_between_experts_and_transposable_ones_hold_both_ways() -> None:
    _, gm = mixture("grouped")
    random = fxsparse.rewrite(copy.deepcopy(gm), ON % ",criterion=random,storage=masked").get_buffer("up_proj_mask")
    assert not torch.equal(random[0], random[1])
    mask = fxsparse.rewrite(gm, ON % ",transposable=true,storage=masked,exclude=[enter,leave,router]").get_buffer(
        "up_proj_mask"
    )
    for dim in (-1, -2):
        groups = mask.movedim(dim, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert bool((groups == 2).all())


def test_dynamic_masks_follow_each_expert() -> None:
    model, gm = mixture("grouped", transposed=True)
    sparse = fxsparse.rewrite(gm, ON % ",storage=masked,dynamic=true,decay=0.1")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.5)
    schedule = fxsparse.Schedule(sparse, optimizer, total_steps=2)
    before = sparse.up_proj_mask.clone()
    x = torch.randn(5, 3, 12)
    with torch.no_grad():
        oracle, _ = masked(model)
    step(sparse, x)
    step(oracle, x)
    pruned = ~(before.mT)
    dense, grad = model.up_proj.detach().clone(), oracle.up_proj.grad
    assert grad is not None
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(
        sparse.up_proj.detach(), dense - 0.5 * (grad + 0.1 * dense * pruned), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(sparse.up_proj_mask, nm_mask(sparse.up_proj.detach().mT.abs(), Pattern(2, 4)))
    assert not torch.equal(sparse.up_proj_mask, before)


def _squares_by_expert(model: Mixture, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """For each weight, by expert, the sums of squares of the features of the rows it reads."""
    sums = {"up_proj": [torch.zeros(16) for _ in range(5)], "down_proj": [torch.zeros(24) for _ in range(5)]}
    up = model._times(model.up_proj)
    with torch.no_grad():
        for batch in batches:
            x = model.enter(batch).flatten(0, 1)
            scores = model.router(x)
            if model.idle is not None:
                scores[:, model.idle] -= 1e9
            chosen = scores.topk(model.top_k).indices
            for expert in range(5):
                rows = x if model.form == "every" else x[(chosen == expert).any(1)]
                sums["up_proj"][expert] += rows.square().sum(0)
                sums["down_proj"][expert] += (rows @ up[expert]).relu().square().sum(0)
    return sums


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize(("form", "transposed"), [("grouped", False), ("gathered", True), ("every", False)])
def test_wanda_weighs_by_the_rows_that_each_expert_reads(form: str, transposed: bool, storage: str) -> None:
    """And by magnitude alone where it reads none."""
    model, gm = mixture(form, transposed, idle=None if form == "every" else 3)
    batches = [torch.randn(3, 4, 12), torch.randn(5, 3, 12)]
    options: Any = {"keep_first": False, "keep_head": False, "storage": storage}
    sparse = fxsparse.rewrite(gm, [InsertNMMasks(criterion="wanda", calibration=batches, **options)])
    changes = {change.site: change for change in record_of(sparse).entries[-1].changes}
    dense = fxsparse.dense_state_dict(sparse)
    plain = fxsparse.dense_state_dict(fxsparse.rewrite(mixture(form, transposed)[1], [InsertNMMasks(**options)]))
    for name, sums in _squares_by_expert(model, batches).items():
        assert changes[name].rewritten and "wanda" in changes[name].detail
        weights = model._times(getattr(model, name).detach()).mT
        kept = model._times(dense[name]).mT != 0
        for expert, squares in enumerate(sums):
            norms = squares.sqrt() if bool(squares.any()) else torch.ones(())
            assert torch.equal(kept[expert], nm_mask(weights[expert].abs() * norms, Pattern(2, 4)))
        assert not torch.equal(plain[name], dense[name])


def test_sparsegpt_is_for_linears() -> None:
    criterion: Any = "sparsegpt"
    _, gm = mixture("grouped")
    item = InsertNMMasks(criterion=criterion, keep_first=False, keep_head=False, calibration=[torch.randn(3, 4, 12)])
    sparse = fxsparse.rewrite(gm, [item])
    changes = {change.site: change for change in record_of(sparse).entries[-1].changes}
    assert changes["enter"].rewritten and not changes["up_proj"].rewritten
    assert "it holds the matrices of experts" in changes["up_proj"].detail
    assert criterion in changes["up_proj"].detail


@pytest.mark.parametrize(
    ("options", "reason"),
    [(',exclude=["*_proj"]', "excluded by"), (',pattern={"*_proj":5:16,"*":2:4}', "24 columns, not a multiple of 16")],
)
def test_what_stays_dense_is_listed(options: str, reason: str) -> None:
    _, gm = mixture("grouped")
    text = ON % options if "pattern=" not in options else f"nm-masks{{{options[1:]},keep_first=false}}"
    sparse = fxsparse.rewrite(gm, text)
    details = {change.site: change.detail for change in record_of(sparse).entries[-1].changes}
    assert reason in details["down_proj"] and not details["down_proj"].startswith("2:4")


@pytest.mark.parametrize("options", ["", ",storage=masked", ",storage=masked,dynamic=true"])
@pytest.mark.parametrize(("form", "transposed"), FORMS)
def test_modules_hold_the_weights_of_experts(form: str, transposed: bool, options: str) -> None:
    """Their own code reads the weights as it did: the same outputs, gradients and steps."""
    model, gm = mixture(form, transposed, idle=2)
    sparse = fxsparse.rewrite(gm, ON % options)
    module: Any = fxsparse.to_module(sparse, model)
    assert isinstance(module, Held) and module.forms.keys() == set(_WEIGHTS) and type(module).__name__ == "Mixture"
    assert module.forms["up_proj"].experts == 5 and "5 x 2:4" in repr(module)
    twin = copy.deepcopy(sparse)
    x = torch.randn(5, 3, 12)
    for trained in (module, twin):  # the module shares the parameters of ``sparse``
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.3)
        schedule = fxsparse.Schedule(trained, optimizer, total_steps=2)
        step(trained.train(), x)
        optimizer.step()
        schedule.step()
    for one, other in zip(step(module, x), step(twin, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    dense, expected = fxsparse.dense_state_dict(module), fxsparse.dense_state_dict(twin)
    for name in _WEIGHTS:
        torch.testing.assert_close(dense[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(dense[name], model.state_dict()[name])
        with pytest.raises(RewriteError, match="read-only view"):
            getattr(module, name).mul_(2)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(again(x), module(x))
    traced = fxsparse.rewrite(fxsparse.trace(module, (torch.randn(3, 4, 12),)), [])
    torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)
    assert fxsparse.dense_state_dict(traced).keys() == model.state_dict().keys()
    torch.testing.assert_close(fxsparse.to_aten(module)(x), module(x), rtol=1e-4, atol=1e-5)


def test_what_is_not_there_for_experts_says_so() -> None:
    """Branches, orders of rows, modules of weights that are pruned twice."""
    model, gm = mixture("grouped")
    sparse = fxsparse.rewrite(gm, ON % ",storage=masked" + ",double-prune{permutations=5},low-rank{rank=2}")
    entries = [{change.site: change for change in entry.changes} for entry in record_of(sparse).entries]
    assert "orders of rows are of linears only" in entries[1]["up_proj"].detail
    assert entries[1]["enter"].rewritten and entries[2]["enter"].rewritten
    assert "branches are of linears" in entries[2]["up_proj"].detail
    sparse = fxsparse.rewrite(mixture("grouped")[1], ON % "" + ",double-prune")
    with pytest.raises(RewriteError, match=r"double-prune: .*_proj: .*multiplies by this weight itself.*exclude"):
        fxsparse.to_module(sparse, model)


def test_a_weight_that_something_else_reads_stays_dense() -> None:
    class Shared(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.up_proj.sum()

    torch.manual_seed(0)
    sparse = fxsparse.rewrite(fxsparse.trace(Shared("grouped"), (torch.randn(3, 4, 12),)), ON % "")
    details = {change.site: change.detail for change in record_of(sparse).entries[-1].changes}
    assert "also read by something" in details["up_proj"] and details["down_proj"].startswith("2:4")


@pytest.mark.parametrize("form", ["grouped", "gathered"])
def test_a_pass_in_the_one_line_call(form: str) -> None:
    model, _ = mixture(form)
    oracle, kept = masked(model)
    options = {"passes": ON % "", "compiler": "aot_eager"}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="fxsparse", options=options)
    x = torch.randn(3, 4, 12)
    for one, other in zip(step(fast, x), step(oracle, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name in _WEIGHTS:
        mine, theirs = model.get_parameter(name).grad, oracle.get_parameter(name).grad
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs * kept[name], rtol=1e-4, atol=1e-4)


def test_compiled_graphs_call_the_operators() -> None:
    _, gm = mixture("grouped")
    sparse = fxsparse.rewrite(gm, ON % "" + ",double-prune")
    torch._dynamo.reset()
    fast = torch.compile(sparse, backend="fxsparse", options={"compiler": "aot_eager"})
    x = torch.randn(6, 2, 12)
    for one, other in zip(step(fast, x), step(sparse, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "nm_expert_linear_grad_input" in str(fxsparse.graphs(fast)[-1])


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize("transposed", [False, True])
def test_plain_aten_for_exporters(transposed: bool, storage: str) -> None:
    """Dense weights under the original's names, without a loop over data."""
    model, gm = mixture("grouped", transposed)
    sparse = fxsparse.rewrite(gm, ON % f",storage={storage}" + ",double-prune").eval()
    plain = fxsparse.to_aten(sparse)
    assert not any("fxsparse" in str(node.target) for node in plain.graph.nodes)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in plain.named_parameters()} == shapes
    x = torch.randn(5, 2, 12)
    exported = torch.export.export(plain, (x,)).module()
    for each in (plain, exported):
        torch.testing.assert_close(each(x), sparse(x), rtol=1e-4, atol=1e-5)


# --- models of transformers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[mixtral, gpt_oss], ids=lambda build: build.__name__)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[Any, GraphModule]]:
    build: Callable[[], Any] = request.param
    made = build()
    yield made, fxsparse.trace(made.model, kwargs=made.make_batch(batch=4))


def test_every_weight_of_a_model_with_experts_is_pruned(family: tuple[Any, GraphModule], tmp_path: Path) -> None:
    made, gm = family
    model, batch = copy.deepcopy(made.model), made.make_batch(batch=3)
    sparse = fxsparse.rewrite(gm, ON % "" + ",double-prune")
    for entry in record_of(sparse).entries:
        done = {change.site for change in entry.changes if change.rewritten}
        for layer in range(3):
            assert {f"model.layers.{layer}.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")} <= done
    dense = fxsparse.dense_state_dict(sparse)
    weight = dense["model.layers.1.mlp.experts.gate_up_proj"]
    along = weight.mT if made.model.config.model_type == "gpt_oss" else weight
    assert bool(((along != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all())
    model.load_state_dict(dense)
    torch.testing.assert_close(sparse(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    fxsparse.save_pretrained(sparse, model, tmp_path / "folder")
    again = type(model).from_pretrained(tmp_path / "folder").train()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    torch.testing.assert_close(
        fxsparse.from_pretrained(tmp_path / "folder")(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("first", ["", ON % ",storage=masked" + ","])
def test_experts_are_selected_to_train(first: str) -> None:
    """Chosen weights have the gradients of full training, the others none."""
    model, gm = mixture("grouped", transposed=True)
    chosen = fxsparse.rewrite(gm, first + 'select-tensors{tensors=["down_proj"]}')
    oracle, kept = masked(model) if first else (copy.deepcopy(model), {})
    x = torch.randn(5, 3, 12)
    step(oracle, x)
    y = chosen(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    trained = {name for name, parameter in chosen.named_parameters() if parameter.grad is not None}
    assert trained == {"down_proj"}
    grad, expected = chosen.get_parameter("down_proj").grad, oracle.down_proj.grad
    assert grad is not None and expected is not None
    torch.testing.assert_close(grad, expected * kept.get("down_proj", 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["compressed", "masked"])
def test_models_with_experts_become_modules_and_folders(
    family: tuple[Any, GraphModule], storage: str, tmp_path: Path
) -> None:
    made, gm = family
    batch = made.make_batch(batch=3)
    sparse = fxsparse.rewrite(gm, ON % f",storage={storage}")
    module: Any = fxsparse.to_module(sparse, made.model)
    experts = module.model.layers[1].mlp.experts
    assert isinstance(experts, Held) and experts.forms["gate_up_proj"].storage == storage
    expected = sparse.eval()(**batch).logits
    torch.testing.assert_close(module.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    fxsparse.save_pretrained(module, tmp_path)
    again: Any = fxsparse.from_pretrained(tmp_path)
    assert again.model.layers[1].mlp.experts.forms == experts.forms
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert again.generate(batch["input_ids"][:1, :4], max_new_tokens=2).shape == (1, 6)

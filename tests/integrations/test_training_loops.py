"""Rewritten models in training loops of others: what a library puts on a model stays there and goes on working."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import CheckpointError, FxsparseError, OptionError
from fxsparse.graph.record import record_of
from tests.support.families import FAMILIES
from tests.support.traced import traced


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def rewritten(passes: str, model: nn.Module | None = None) -> GraphModule:
    return fxsparse.rewrite(model or net(), passes, (torch.randn(3, 8),))


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def first_product_dtype(model: nn.Module, *args: Any, **kwargs: Any) -> torch.dtype:
    """The dtype of the first matrix product that runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    dtypes: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in str(func) or "nm_linear" in str(func):
                dtypes.append(next(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(*args, **kwargs)
    return dtypes[0]


# --- forward, wrapped by a library ------------------------------------------------------------------------------------


def test_mixed_precision_of_accelerate_survives_evaluation(accelerator: Any) -> None:
    model, x = net(), torch.randn(4, 8)
    gm = accelerator.prepare(fxsparse.trace(copy.deepcopy(model), (x,)))
    model = accelerator.prepare(model)
    expected = model(x)
    for mode in (True, False, True):
        gm.train(mode)
        assert first_product_dtype(gm, x) is torch.bfloat16
        assert torch.equal(gm(x), expected)
    assert gm(x).dtype is expected.dtype


def test_a_wrapped_forward_follows_the_mode_and_later_changes_of_the_graph(accelerator: Any) -> None:
    family = FAMILIES["llama"]()
    batch = family.make_batch()
    gm = fxsparse.rewrite(family.model, "select-neurons{omission=0.5,multiple=16}", kwargs=batch)
    prepared = accelerator.prepare(gm)
    dense = gm.eval()(**batch).loss
    assert not torch.equal(gm.train()(**batch).loss, dense), "training runs the smaller form"
    assert torch.equal(gm.eval()(**batch).loss, dense), "evaluation the dense one"
    assert prepared is gm

    lazy, x = rewritten("nm-masks,low-rank{rank=2,start=0.5}"), torch.randn(4, 8)
    accelerator.prepare(lazy)
    schedule = fxsparse.Schedule(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1), total_steps=2)
    before = lazy(x)
    nn.init.ones_(lazy.get_parameter("2.weight_up"))
    schedule.step()
    assert not torch.equal(lazy(x), before), "branches have started"


def test_a_wrapped_forward_can_be_unwrapped_and_copied(accelerator: Any) -> None:
    gm, x = rewritten("nm-masks,low-rank{rank=2,start=0.5}"), torch.randn(4, 8)
    names = list(inspect.signature(gm.forward).parameters)
    plain = gm(x)
    prepared = accelerator.prepare(gm)
    twin = copy.deepcopy(prepared)
    assert torch.equal(twin(x), prepared(x)) and not torch.equal(twin(x), plain)
    with torch.no_grad():
        twin.get_parameter("0.bias").add_(1)
    assert not torch.equal(twin(x), prepared(x)), "the copy's forward reads the copy"
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert bare is gm and torch.equal(bare(x), plain)
    assert list(inspect.signature(bare.forward).parameters) == names == ["input"]


# --- state ------------------------------------------------------------------------------------------------------------


def train(gm: GraphModule, optimizer: Any, schedule: fxsparse.Schedule, steps: int) -> None:
    for _ in range(steps):
        torch.manual_seed(schedule.steps_done + 1)
        x = torch.randn(5, 8)
        schedule.observe(x, loss=lambda y: y.square().mean())
        gm(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


RECIPES = {
    "branches": "nm-masks,double-prune{every=2},low-rank{rank=2,start=0.5}",
    "select-tensors": "select-tensors{rho=0.7,every=3}",
    "branches, select-tensors": "nm-masks,low-rank{rank=2,start=0.5},select-tensors{rho=0.9,every=4}",
    "sr-ste": "nm-masks{storage=masked,dynamic=true,every=2}",
}
ORDERS = list(itertools.permutations(("model", "optimizer", "schedule")))


@pytest.mark.parametrize("stop_at", [3, 5])
@pytest.mark.parametrize("recipe", RECIPES)
def test_state_loaded_in_any_order_continues_bit_for_bit(recipe: str, stop_at: int) -> None:
    model = net()

    def start() -> dict[str, Any]:
        gm = rewritten(RECIPES[recipe], copy.deepcopy(model))
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
        return {"model": gm, "optimizer": optimizer, "schedule": fxsparse.Schedule(gm, optimizer, total_steps=8)}

    def run(parts: dict[str, Any], steps: int) -> None:
        train(parts["model"], parts["optimizer"], parts["schedule"], steps)

    whole = start()
    run(whole, stop_at)
    saved = copy.deepcopy({name: part.state_dict() for name, part in whole.items()})
    run(whole, 8 - stop_at)
    expected = whole["model"].state_dict()
    for order in ORDERS:
        parts = start()
        for name in order:
            parts[name].load_state_dict(copy.deepcopy(saved[name]))
        run(parts, 8 - stop_at)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in parts["model"].state_dict().items()), order
        assert record_of(parts["model"]).text == record_of(whole["model"]).text


def started() -> tuple[nn.Module, GraphModule]:
    """A model, and its rewrite whose branches take part."""
    model = net()
    gm = rewritten(RECIPES["branches"], copy.deepcopy(model))
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-1)
    train(gm, optimizer, fxsparse.Schedule(gm, optimizer, total_steps=8), 8)
    return model, gm


def test_started_branches_are_part_of_the_state() -> None:
    model, gm = started()
    fresh, x = rewritten(RECIPES["branches"], model), torch.randn(4, 8)
    average = torch.optim.swa_utils.AveragedModel(fresh)
    fresh.load_state_dict(gm.state_dict())
    assert torch.equal(fresh(x), gm(x)) and record_of(fresh).text == record_of(gm).text
    average.update_parameters(gm)
    assert torch.equal(average(x), gm(x)), "written in place, without load_state_dict"
    merged = net()
    merged.load_state_dict(fxsparse.dense_state_dict(fresh))
    torch.testing.assert_close(merged(x), gm(x))


@pytest.mark.parametrize("start", [0, 0.5])
def test_a_graph_with_state_is_compiled_and_exported_whole(start: float) -> None:
    """What follows the buffers is no part of the graph; a write in place reaches compiled code all the same."""
    passes = f"nm-masks{{keep_first=false,keep_head=false}},low-rank{{rank=2,start={start}}}"
    gm, x = rewritten(passes), torch.randn(5, 8)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gm(x))
    torch.testing.assert_close(torch.compile(Outer(), backend="aot_eager", fullgraph=True)(x), gm(x) * 2)
    torch.testing.assert_close(torch.export.export(Outer(), (x,), strict=True).module()(x), gm(x) * 2)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith("_up"):
                parameter.normal_()
        waiting = compiled(x)
        gm.get_buffer("low_rank_started").fill_(True)
        started = compiled(x)
    torch.testing.assert_close(started, gm(x))
    assert torch.equal(started, waiting) == (start == 0)


def test_an_earlier_state_takes_branches_back() -> None:
    gm, twin = (rewritten(RECIPES["branches"], model) for model in itertools.repeat(net(), 2))
    twin.load_state_dict(gm.state_dict())
    parts = []
    for one in (gm, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        parts.append((one, optimizer, fxsparse.Schedule(one, optimizer, total_steps=8)))
    train(*parts[0], 2)
    saved = copy.deepcopy([part.state_dict() for part in parts[0]])
    train(*parts[0], 4)
    for (one, optimizer, schedule), steps in zip(parts, (6, 6), strict=True):
        for part, state in zip((one, optimizer, schedule), copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        train(one, optimizer, schedule, steps)
    assert all(torch.equal(a, b) for a, b in zip(gm.state_dict().values(), twin.state_dict().values(), strict=True))


def test_checkpoints_of_earlier_versions_load(tmp_path: Path) -> None:
    """Those of version 0.1.0 said no format, and had neither checksums nor flags of the branches that have started."""
    model, gm = started()
    x = torch.randn(4, 8)
    old = {name: tensor for name, tensor in gm.state_dict().items() if name != "low_rank_started"}
    rewritten(RECIPES["branches"], copy.deepcopy(model)).load_state_dict(old)
    fxsparse.save(gm, tmp_path / "new.safetensors")
    record = record_of(gm).to_data()
    del record["format"]
    for costs in (entry[when] for entry in record["entries"] for when in ("before", "after")):
        del costs["nm_step_flops"]
    for weight in record["weights"]:
        del weight["backward"]
    texts = {"format": "pt", "fxsparse": json.dumps(record, indent=1)}
    safetensors.torch.save_file(old, tmp_path / "old.safetensors", texts)
    for name in ("new", "old"):
        loaded = fxsparse.load(tmp_path / f"{name}.safetensors", copy.deepcopy(model), (x,))
        assert torch.equal(loaded(x), gm(x)) and loaded.low_rank_started.all()
        assert record_of(loaded).text == record_of(gm).text


# --- wrapped models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["compile", "ddp", "compile of ddp", "ddp of compile"])
def test_wrapped_models_are_taken(wrapper: str, process_group: None, tmp_path: Path) -> None:
    model, x = net(), torch.randn(4, 8)
    gm = wrapped = rewritten("nm-masks,low-rank{rank=2,start=0.5}", copy.deepcopy(model))
    for name in reversed(wrapper.split(" of ")):
        ddp = torch.nn.parallel.DistributedDataParallel
        wrapped = ddp(wrapped) if name == "ddp" else torch.compile(wrapped, backend="eager")
    fxsparse.save(wrapped, tmp_path / "model.safetensors")
    assert torch.equal(fxsparse.load(tmp_path / "model.safetensors", copy.deepcopy(model), (x,))(x), gm(x))
    dense = fxsparse.dense_state_dict(wrapped)
    assert dense.keys() == model.state_dict().keys()
    assert fxsparse.count_flops(wrapped).step == fxsparse.count_flops(gm).step
    fxsparse.Schedule(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), total_steps=2)
    explained = fxsparse.explain(wrapped)
    assert explained.startswith(fxsparse.explain(gm))
    assert ("no graph was compiled" in explained) == wrapper.startswith("compile")
    assert fxsparse.record_of(wrapped) is fxsparse.record_of(gm)
    assert fxsparse.forget_dropped(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, gm) == 0
    gates = rewritten_encoder("gates{target=0.5}")
    assert torch.equal(fxsparse.sparsity_loss(torch.compile(gates, backend="eager")), fxsparse.sparsity_loss(gates))


def rewritten_encoder(passes: str) -> GraphModule:
    family = FAMILIES["bert"]()
    return fxsparse.rewrite(family.model, passes, kwargs=family.make_batch())


@pytest.mark.parametrize(
    "function", ["save", "dense_state_dict", "count_flops", "sparsity_loss", "Schedule", "record_of"]
)
def test_a_model_that_was_never_rewritten_gets_a_sentence(function: str, tmp_path: Path) -> None:
    model = net()
    more = {"save": (tmp_path / "x",), "Schedule": (torch.optim.SGD(model.parameters(), lr=0.1),)}.get(function, ())
    options = {"total_steps": 2} if function == "Schedule" else {}
    with pytest.raises(FxsparseError, match=rf"fxsparse\.{function} takes a model .*fxsparse\.rewrite\(model, passes"):
        getattr(fxsparse, function)(model, *more, **options)
    assert "neither rewritten nor compiled" in fxsparse.explain(model)


def test_a_module_that_holds_a_rewritten_one_is_told_which_to_pass() -> None:
    with pytest.raises(CheckpointError, match=r"takes the rewritten model itself: pass the 1 of this Sequential"):
        fxsparse.dense_state_dict(nn.Sequential(nn.Tanh(), rewritten("nm-masks")))


def test_checkpointing_that_trainers_switch_on_needs_marked_blocks() -> None:
    _, base = traced("llama")
    with pytest.raises(OptionError, match=r'fxsparse\.rewrite\(gm, "recompute"\)'):
        base.gradient_checkpointing_enable()
    fxsparse.rewrite(base, "recompute").gradient_checkpointing_enable()


def test_sharded_parameters_are_refused_by_name(process_group: None, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    gm = rewritten("nm-masks")
    fully_shard(nn.Sequential(gm), mesh=init_device_mesh("cpu", (1,)))
    for function in (fxsparse.dense_state_dict, lambda gm: fxsparse.save(gm, tmp_path / "x")):
        with pytest.raises(CheckpointError, match=r"0\.weight is sharded \(a DTensor\).*full_state_dict=True"):
            function(gm)


def test_the_optimizer_of_accelerate_drives_a_schedule(accelerator: Any) -> None:
    gm = rewritten("nm-masks{storage=masked,dynamic=true,decay=0.5}")
    optimizer = accelerator.prepare(torch.optim.SGD(gm.parameters(), lr=1.0))
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
    weight, mask = gm.get_parameter("2.weight"), gm.get_buffer("2.weight_mask").clone()
    before = weight.detach().clone()
    (gm(torch.randn(5, 8)) * 0).sum().backward()
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(weight.detach(), before - 0.5 * before * ~mask)


# --- models of transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_decoder_is_rewritten_as_from_pretrained_gives_it(name: str) -> None:
    family = FAMILIES[name]()
    model, batch = family.model, family.make_batch()
    expected = model.eval()(**batch).logits
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        config.use_cache = True
    gm = fxsparse.rewrite(model, "nm-masks", kwargs=batch)
    assert all(config.use_cache is True for config in configs.values()), "restored"
    assert torch.equal(fxsparse.trace(model, kwargs=batch)(**batch).logits, expected)
    assert gm.config.use_cache and gm.config.model_type == model.config.model_type
    assert (gm.device, gm.dtype, gm.main_input_name) == (model.device, model.dtype, model.main_input_name)
    traced = fxsparse.trace(model, kwargs=batch)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert traced.num_parameters(**options) == model.num_parameters(**options)
    with pytest.raises(fxsparse.TraceError):
        fxsparse.trace(model, kwargs={"input_ids": "text"})
    assert all(config.use_cache is True for config in configs.values()), "restored when capture fails"


def test_hooks_that_tracing_loses_are_noted() -> None:
    model = net()
    assert not record_of(fxsparse.trace(model, (torch.randn(3, 8),))).notes
    model[2].register_forward_hook(lambda *_: None)
    assert "hooks of 2 are not called" in fxsparse.explain(fxsparse.trace(model, (torch.randn(3, 8),)))

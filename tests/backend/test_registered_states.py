"""Masks of one-line calls on parts of a model last with the model, and are those of all of its other graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import FxsparseError, OptionError
from tests.support.families import FAMILIES

MASKS = "nm-masks{keep_first=false,keep_head=false}"


class Block(nn.Module):
    """A layer in which Dynamo breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        torch._dynamo.graph_break()
        return torch.tanh(x)


class Blocks(nn.Module):
    """Layers alike; one compiled graph serves the second and the third."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def one_line(model: nn.Module, passes: str = MASKS) -> Any:
    return torch.compile(model, backend="fxsparse", options={"passes": passes, "compiler": "eager"})


def trained(model: nn.Module, compiled: Any, *, steps: int = 6) -> None:
    """Far enough that other masks would be chosen now."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        compiled(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(model: Blocks, x: Tensor) -> Tensor:
    """What the masks in the model's state make of ``x``."""
    state = model.state_dict()
    for name, block in model.blocks.named_children():
        weight, mask = block.linear.weight, state[f"_fxsparse.blocks.{name}.linear.weight_mask"]
        x = torch.tanh(nn.functional.linear(x, weight * expanded(mask, weight), block.linear.bias))
    return x


def expanded(mask: Tensor, weight: Tensor) -> Tensor:
    assert mask.shape == weight.shape
    return mask.to(weight.dtype)


def test_layers_that_share_a_graph_have_masks_of_their_own_in_the_state_of_the_model() -> None:
    model = Blocks()
    compiled = one_line(model)
    trained(model, compiled)
    masks = [model.state_dict()[f"_fxsparse.blocks.{at}.linear.weight_mask"] for at in (1, 2)]
    assert all(mask.float().mean() == 0.5 for mask in masks) and not torch.equal(*masks)
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.allclose(compiled(x), plain(model, x), atol=1e-6)
        assert not torch.allclose(one_line(Blocks().requires_grad_(False))(x), plain(model, x))
    assert not any(name.startswith("_fxsparse") for name, _ in model.named_parameters())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_state_that_is_loaded_brings_its_masks(assign: bool, before: bool) -> None:
    model, x = Blocks(), torch.randn(5, 16)
    trained(model, one_line(model))
    fresh = Blocks()
    again = one_line(fresh)
    again(x)
    if not before:  # compiled code that has run, and code that has not, find what was loaded
        torch._dynamo.reset()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    with torch.no_grad():
        assert torch.allclose(again(x), plain(model, x), atol=1e-6)


def test_copies_and_other_dtypes_keep_the_masks() -> None:
    model, x = Blocks(), torch.randn(5, 16)
    compiled = one_line(model)
    trained(model, compiled)
    expected = plain(model, x).detach()
    other = copy.deepcopy(compiled)
    assert torch.allclose(other(x), expected, atol=1e-6)
    trained(model, compiled)  # what becomes of the original is nothing to the copy
    with torch.no_grad():
        assert torch.allclose(other(x), expected, atol=1e-6)
        doubles = other.double()(x.double())
    assert doubles.dtype is torch.float64 and torch.allclose(doubles.float(), expected, atol=1e-6)


def test_a_compiled_wrapper_registers_with_the_model_it_wraps() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, x = Blocks(), torch.randn(5, 16)
        compiled = one_line(nn.parallel.DistributedDataParallel(model))
        trained(model, compiled)
        with torch.no_grad():
            expected = compiled(x)
            assert torch.allclose(expected, plain(model, x), atol=1e-6)
            torch._dynamo.reset()
            assert torch.allclose(one_line(model)(x), expected, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_forget_takes_the_masks_out_and_other_passes_need_it() -> None:
    model, x = Blocks(), torch.randn(5, 16)
    compiled = one_line(model)
    trained(model, compiled)
    torch._dynamo.reset()
    with pytest.raises(OptionError, match=r"fxsparse\.forget"):
        one_line(model, "nm-masks{pattern=1:4,keep_first=false,keep_head=false}")(x)
    old = model.state_dict()["_fxsparse.blocks.0.linear.weight_mask"].clone()
    fxsparse.forget(model)
    assert not [name for name in model.state_dict() if name.startswith("_fxsparse")]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(x)
    new = model.state_dict()["_fxsparse.blocks.0.linear.weight_mask"]
    assert new.float().mean() == 0.5 and not torch.equal(new, old), "chosen anew, of the weights as they are"


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_call_with_a_cache_runs_the_masks_that_the_model_was_trained_with(scheduled: bool) -> None:
    transformers = pytest.importorskip("transformers")
    family = FAMILIES["llama"]()
    model, batch = family.model, dict(family.make_batch(2)) | {"use_cache": False}
    compiled = torch.compile(model, backend="fxsparse", options={"passes": MASKS, "compiler": "eager"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(compiled, optimizer, total_steps=3) if scheduled else None
    for _ in range(3):
        compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    tokens = {"input_ids": batch["input_ids"]}
    compiled.eval()
    with torch.no_grad():
        expected = compiled(**tokens, use_cache=False).logits
        cache = transformers.DynamicCache(config=model.config)
        cached = compiled(**tokens, use_cache=True, past_key_values=cache).logits
        assert cache.get_seq_length() == tokens["input_ids"].shape[1]
        assert not torch.allclose(expected, model(**tokens, use_cache=False).logits, atol=1e-3)
    torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_before_training_chooses_the_masks_that_training_keeps() -> None:
    family = FAMILIES["llama"]()
    model, batch = family.model, dict(family.make_batch(2)) | {"use_cache": False}
    model.eval().compile(backend="fxsparse", options={"passes": MASKS, "compiler": "eager"})
    model.generate(batch["input_ids"][:1, :4], max_new_tokens=2, do_sample=False)
    before = {name: mask.clone() for name, mask in model.state_dict().items() if name.startswith("_fxsparse")}
    assert before
    with torch.no_grad():  # as a training by others may have left them
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8)
    schedule = fxsparse.Schedule(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=2)
    schedule.observe(batch)
    after = model.state_dict()
    assert schedule.is_bound and all(torch.equal(mask, after[name]) for name, mask in before.items())


class Regressor(nn.Module):
    """One graph, for which passes that need no whole model run on Dynamo's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.down(torch.relu(self.up(x))) * scale}


@pytest.mark.parametrize("build", [Regressor, Blocks])
def test_what_takes_a_model_takes_one_whose_graphs_were_rewritten(build: Any, tmp_path: Any) -> None:
    """The masks are those that the compiled model has, and not those that its weights would give now."""
    model = build()
    fast = one_line(model)
    trained(model, lambda x: logits(fast(x)))
    x = torch.randn(5, 16)
    expected, masks = logits(fast(x)), {name: mask.clone() for name, mask in model._fxsparse.named_buffers()}
    fresh = copy.deepcopy(model)
    fxsparse.forget(fresh)
    chosen_now = fxsparse.rewrite(fresh, MASKS.replace("{", "{storage=masked,"), (x,)).state_dict()
    assert any(not torch.equal(mask, chosen_now[name]) for name, mask in masks.items())

    fxsparse.save(fast, tmp_path / "model.fxsparse")
    loaded = fxsparse.load(tmp_path / "model.fxsparse", build(), (x,))
    torch.testing.assert_close(logits(loaded(x)), expected)
    dense = build()
    dense.load_state_dict(fxsparse.dense_state_dict(fast))
    torch.testing.assert_close(logits(dense(x)), expected)
    torch.testing.assert_close(logits(fxsparse.to_module(fast, model)(x)), expected)
    assert fxsparse.count_flops(fast).forward > 0 and "linear" in str(fxsparse.explain(fast))

    assert model._fxsparse.graph is None  # it runs as it did
    torch.testing.assert_close(logits(fast(x)), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    of_twin = fxsparse.dense_state_dict(torch.compile(twin, backend="fxsparse"))
    assert not next(iter(of_twin.values())).any() and next(iter(fxsparse.dense_state_dict(fast).values())).any()


def logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def test_a_model_that_only_ran_with_a_cache_says_so(tmp_path: Any) -> None:
    family = FAMILIES["llama"]()
    model, tokens = family.model.eval(), family.make_batch(2)["input_ids"][:1, :4]
    fast = torch.compile(model, backend="fxsparse", options={"passes": MASKS, "compiler": "eager"})
    cache = transformers.DynamicCache(config=model.config)
    fast(input_ids=tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(FxsparseError, match=r"only called with a cache.*use_cache=False"):
        fxsparse.save(fast, tmp_path / "model.fxsparse")
    assert not list(tmp_path.iterdir())
    fast(input_ids=tokens, use_cache=False)
    masks = [mask.clone() for mask in model._fxsparse.buffers()]
    assert masks
    fxsparse.save(fast, tmp_path / "model.fxsparse")
    loaded = fxsparse.load(tmp_path / "model.fxsparse", FAMILIES["llama"]().model, kwargs={"input_ids": tokens})
    for name, mask in model._fxsparse.named_buffers():
        assert torch.equal(loaded.get_buffer(name), mask)


@pytest.mark.parametrize("passes", [MASKS, f"{MASKS},low-rank{{rank=2,start=0}}"], ids=["parts", "whole"])
def test_a_compiled_transformers_model_is_written_as_it_computes(passes: str, tmp_path: Any) -> None:
    family = FAMILIES["llama"]()
    model, ids = family.model.eval(), family.make_batch(2)["input_ids"]
    fast = torch.compile(model, backend="fxsparse", options={"passes": passes, "compiler": "eager"})
    with torch.no_grad():
        expected = fast(input_ids=ids, use_cache=False).logits
    fxsparse.save_pretrained(fast, tmp_path / "ours")
    for read in (fxsparse.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        torch.testing.assert_close(read(tmp_path / "ours").eval()(input_ids=ids).logits, expected)

    model.save_pretrained(tmp_path / "trainer")  # dense weights with masks beside them, to go on from
    for read in (fxsparse.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            (FxsparseError, ValueError), match=r"compiled by fxsparse, with passes='nm-masks.*save_pretr"
        ):
            read(tmp_path / "trainer")
    state = safetensors.torch.load_file(tmp_path / "trainer" / "model.safetensors")
    again = FAMILIES["llama"]().model.eval()
    compiled = torch.compile(again, backend="fxsparse", options={"passes": passes, "compiler": "eager"})
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
        again.load_state_dict(state, strict=False)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)

    fxsparse.forget(model)
    model.save_pretrained(tmp_path / "dense")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(read(input_ids=ids).logits, model(input_ids=ids).logits)

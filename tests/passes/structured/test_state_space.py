"""Mamba, which has neither attention nor MLP: hidden dimensions and layers go, and what stays says why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import RewriteError
from fxsparse.graph.record import record_of
from fxsparse.passes.structured.hard_concrete import mask_sparsity

Traced = tuple[Any, GraphModule]


def batch(size: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(64, (size, 6))
    return {"input_ids": tokens, "labels": tokens}


@pytest.fixture(scope="module")
def mamba() -> Traced:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).train()
    return model, fxsparse.trace(model, kwargs=batch(3))


def test_hidden_dimensions_need_no_attention_and_no_mlp(mamba: Traced, tmp_path: Path) -> None:
    """Masked, taken out, saved and read: one model at another batch size."""
    model, gm = mamba
    masked = fxsparse.rewrite(copy.deepcopy(gm), "drop-dims{fraction=0.25,score=magnitude}")
    assert [change.detail for change in record_of(masked).entries[-1].rewritten] == [
        "8 of 32 hidden dimensions dropped"
    ]
    assert mask_sparsity(masked) == pytest.approx(0.25)
    small = fxsparse.rewrite(copy.deepcopy(masked), "materialize")
    widths = {name: tuple(weight.shape) for name, weight in small.named_parameters() if "mixer" in name}
    assert widths["backbone.layers.0.mixer.in_proj.weight"] == (128, 24)
    assert widths["backbone.layers.1.mixer.out_proj.weight"] == (24, 64)
    inputs = batch(5)
    for mode in (True, False):
        torch.testing.assert_close(
            small.train(mode)(**inputs).logits, masked.train(mode)(**inputs).logits, rtol=1e-4, atol=1e-5
        )
    fxsparse.save_pretrained(small, model, tmp_path / "folder")
    for read in (type(model), fxsparse):
        again: Any = read.from_pretrained(tmp_path / "folder")
        torch.testing.assert_close(again.eval()(**inputs).logits, small(**inputs).logits)
    fxsparse.save(small, tmp_path / "small.safetensors")
    loaded = fxsparse.load(tmp_path / "small.safetensors", copy.deepcopy(model), kwargs=batch(3))
    torch.testing.assert_close(loaded.eval()(**inputs).logits, small(**inputs).logits)


@pytest.mark.parametrize(
    "text", ["drop-dims{fraction=0.25,begin=0.0,end=1.0,every=1}", "gates{units=[hidden],target=0.3}"]
)
def test_hidden_dimensions_are_chosen_while_training(mamba: Traced, text: str) -> None:
    gm = fxsparse.rewrite(copy.deepcopy(mamba[1]), text)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=3)
    for _ in range(3):
        loss = gm(**batch(3)).loss
        (loss + fxsparse.sparsity_loss(gm) if text.startswith("gates") else loss).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert mask_sparsity(gm) >= 0.25
    inputs = batch(4)
    small = fxsparse.rewrite(copy.deepcopy(gm), "materialize").eval()
    torch.testing.assert_close(small(**inputs).logits, gm.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_gates_say_what_can_go_instead(mamba: Traced) -> None:
    with pytest.raises(RewriteError, match=r"What goes of any model: hidden dimensions .* and whole layers"):
        fxsparse.rewrite(copy.deepcopy(mamba[1]), "gates")


def test_whole_layers_go(mamba: Traced) -> None:
    model, gm = mamba
    small = fxsparse.rewrite(copy.deepcopy(gm), "drop-layers{indices=[0]}").eval()
    oracle = copy.deepcopy(model).eval()
    del oracle.backbone.layers[0]
    inputs = batch(4)
    torch.testing.assert_close(small(**inputs).logits, oracle(**inputs).logits)

"""Shortened and narrowed Hugging Face models written as checkpoints: they load, compute the same and generate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from traced import traced

import fxsparse
from fxsparse.errors import CheckpointError
from fxsparse.integrations.huggingface import from_pretrained, save_pretrained
from fxsparse.integrations.resizing import resize
from fxsparse.passes import DropLayers, InsertNMMasks

AUTO = {
    "opt": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
GONE: dict[str, Any] = {"opt": (1,), "llama": (0, 1), "gpt2": (0,), "bert": (1,), "t5": {"decoder.*": (0,)}}


def generate(model: Any, **options: Any) -> torch.Tensor:
    prompt = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(3))
    return model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options)


def assert_generates(model: Any) -> None:
    assert torch.equal(generate(model, use_cache=True), generate(model, use_cache=False))


@pytest.mark.parametrize("name", AUTO)
def test_fewer_layers_are_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [DropLayers(indices=GONE[name])]).eval()
    save_pretrained(gm, family.model, tmp_path)
    assert not (tmp_path / "fxsparse.json").exists()
    batch = family.make_batch(batch=3)
    for loaded in (AUTO[name].from_pretrained(tmp_path).eval(), from_pretrained(tmp_path)):
        torch.testing.assert_close(loaded(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-6)
        assert loaded.num_parameters() == sum(parameter.numel() for parameter in gm.parameters())
        if name != "bert":
            assert_generates(loaded)


@pytest.mark.parametrize("name", ["opt", "llama", "bert", "gpt2", "t5"])
def test_one_narrower_feed_forward_width_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    narrow = narrowed(name, widths=(48, 48, 48))
    save_pretrained(traced_of(name, narrow), FAMILIES[name]().model, tmp_path)
    assert not (tmp_path / "fxsparse.json").exists()
    loaded = AUTO[name].from_pretrained(tmp_path).eval()
    batch = FAMILIES[name]().make_batch(batch=3)
    torch.testing.assert_close(loaded(**batch).logits, narrow(**batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "llama", "bert", "gpt2", "t5"])
def test_sizes_of_each_layer_load_with_one_line(name: str, tmp_path: Path) -> None:
    narrow = narrowed(name, widths=(48, 16, 64), heads=name != "t5")
    save_pretrained(traced_of(name, narrow), FAMILIES[name]().model, tmp_path)
    assert (tmp_path / "fxsparse.json").exists()
    loaded = from_pretrained(tmp_path)
    assert loaded.num_parameters() == narrow.num_parameters() < FAMILIES[name]().model.num_parameters()
    batch = FAMILIES[name]().make_batch(batch=3)
    torch.testing.assert_close(loaded(**batch).logits, narrow(**batch).logits, rtol=1e-5, atol=1e-6)
    if name != "bert":
        assert_generates(loaded)


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "bert"])
def test_sublayers_that_are_gone(name: str, tmp_path: Path) -> None:
    sublayers = {
        "opt": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
        "llama": ("model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.1.post_attention_layernorm"),
        "gpt2": ("transformer.h.0.attn", "transformer.h.1.mlp"),
        "bert": ("bert.encoder.layer.1.intermediate", "bert.encoder.layer.1.output"),
    }[name]
    model = copy.deepcopy(FAMILIES[name]().model).eval()
    state = model.state_dict()
    gone = [key for key in state if key.startswith(tuple(f"{path}." for path in sublayers))]
    assert gone
    resize(model, {key: tuple(tensor.shape) for key, tensor in state.items() if key not in gone})
    save_pretrained(traced_of(name, model), FAMILIES[name]().model, tmp_path)
    loaded = from_pretrained(tmp_path)
    batch = FAMILIES[name]().make_batch(batch=3)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    if name != "bert":
        assert_generates(loaded)


UP = ("fc1", "gate_proj", "up_proj", "intermediate.dense", "c_fc", "wi")
DOWN = ("fc2", "down_proj", "layer.{}.output.dense", "mlp.c_proj", "wo")


def narrowed(name: str, widths: tuple[int, ...], heads: bool = False) -> Any:
    """A family's model with feed-forward layers of these widths, and half the heads in its first layer if asked."""
    model = copy.deepcopy(FAMILIES[name]().model).eval()
    state, conv = model.state_dict(), name == "gpt2"
    cut = {}
    for key, tensor in state.items():
        numbers = [int(part) for part in key.split(".") if part.isdigit()]
        stem = key.rpartition(".")[0]
        if numbers and stem.endswith(UP):
            cut[key] = tensor[:, : widths[numbers[0]]] if conv and tensor.dim() == 2 else tensor[: widths[numbers[0]]]
        elif numbers and stem.endswith(tuple(end.format(numbers[0]) for end in DOWN)) and tensor.dim() == 2:
            cut[key] = tensor[: widths[numbers[0]]] if conv else tensor[:, : widths[numbers[0]]]
        elif heads and numbers[:1] == [0] and (part := half_the_heads(stem, tensor)) is not None:
            cut[key] = part
    assert len(cut) > 2
    resize(model, {key: tuple(cut.get(key, tensor).shape) for key, tensor in state.items()})
    model.load_state_dict({**state, **cut})
    return model


def half_the_heads(stem: str, tensor: torch.Tensor) -> torch.Tensor | None:
    if stem.endswith(("q_proj", "k_proj", "v_proj", "self.query", "self.key", "self.value")):
        return tensor[: len(tensor) // 2]
    if stem.endswith(("out_proj", "o_proj", "attention.output.dense")) and tensor.dim() == 2:
        return tensor[:, : tensor.shape[1] // 2]
    if stem.endswith("c_attn"):
        return torch.cat([part[..., : part.shape[-1] // 2] for part in tensor.chunk(3, -1)], -1)
    return tensor[: len(tensor) // 2] if stem.endswith("attn.c_proj") and tensor.dim() == 2 else None


def traced_of(name: str, model: Any) -> Any:
    return fxsparse.trace(model, kwargs=FAMILIES[name]().make_batch(batch=4))


def test_per_layer_settings_follow_their_layers(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, use_sliding_window=True, sliding_window=4, max_window_layers=2,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (3, 12))
    gm = fxsparse.rewrite(model, [DropLayers(indices=(1, 2))], kwargs={"input_ids": ids}).eval()
    save_pretrained(gm, model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(loaded(ids).logits, gm(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert_generates(loaded)


def test_masks_are_written_dense(tmp_path: Path) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), InsertNMMasks("2:4")]).eval()
    save_pretrained(gm, family.model, tmp_path)
    batch = family.make_batch()
    torch.testing.assert_close(
        AUTO["opt"].from_pretrained(tmp_path).eval()(**batch).logits, gm(**batch).logits, rtol=1e-4, atol=1e-5
    )


def test_refusals(tmp_path: Path) -> None:
    family, base = traced("sequential")
    with pytest.raises(CheckpointError, match="no Hugging Face model"):
        save_pretrained(base, family.model, tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(tmp_path)

"""Shortened and pruned Hugging Face models written as checkpoints: they load, compute the same and generate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import CheckpointError
from fxsparse.passes import DropDimensions, DropLayers, GateStructures, InsertNMMasks, Materialize
from fxsparse.passes.structured import hard_concrete
from fxsparse.passes.structured.gates import UNITS
from tests.support.families import Family
from tests.support.traced import traced

AUTO = {
    "opt": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "vit": transformers.AutoModelForImageClassification,
}
GENERATE = ("opt", "llama", "gpt2", "t5")
GONE: dict[str, Any] = {"opt": (1,), "llama": (0, 1), "gpt2": (0,), "bert": (1,), "t5": {"decoder.*": (0,)}}


def gates_of(base: GraphModule, *before: Any) -> GraphModule:
    """A traced model with open gates of every kind."""
    gm = fxsparse.rewrite(base, [*before, GateStructures(UNITS, score="random", target=0.0)])
    assert hard_concrete.mask_sparsity(gm) == 0
    return gm


def pruned(base: GraphModule, masks: Mapping[str, Tensor], *before: Any) -> GraphModule:
    """A traced model without what masks by the name of their gate close; the others stay open."""
    gm = gates_of(base, *before)
    for name, mask in masks.items():
        gm.get_buffer(hard_concrete.mask_name(name)).copy_(mask)
    return fxsparse.rewrite(gm, [Materialize()]).eval()


def random_masks(base: GraphModule, share: float = 0.5) -> dict[str, Tensor]:
    """Fresh masks that keep about a share of every kind of unit, and at least one of each sublayer's."""
    gates, masks = gates_of(base), {}
    for name in hard_concrete.gate_names(gates):
        count = len(gates.get_buffer(hard_concrete.mask_name(name)))
        keep = share if count > 1 else 0.8
        masks[name] = (torch.rand(count) < keep).float()
        if count > 1:
            masks[name][torch.randint(count, ())] = 1
    return masks


def some(count: int, kept: int) -> Tensor:
    return torch.zeros(count).index_fill_(0, torch.randperm(count)[:kept], 1)


def assert_same(loaded: Any, gm: GraphModule, family: Family) -> None:
    for batch in (family.make_batch(batch=3), family.make_batch(batch=5)):
        torch.testing.assert_close(loaded(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-6)
    assert loaded.num_parameters() == sum(parameter.numel() for parameter in gm.parameters())


def assert_generates(model: Any, **options: Any) -> None:
    """Token by token from the cache equals the whole sequence anew for each token."""
    prompt = torch.randint(2, 64, (2, 5))
    runs = [
        model.generate(
            prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=use_cache,
            return_dict_in_generate=True, output_logits=True, **options,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for mine, its in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def is_sized(path: Path) -> bool:
    return "fxsparse" in json.loads((path / "config.json").read_text())


# --- what the architecture can say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GONE)
def test_fewer_layers_are_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [DropLayers(indices=GONE[name])]).eval()
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert not is_sized(tmp_path)
    for loaded in (AUTO[name].from_pretrained(tmp_path).eval(), fxsparse.from_pretrained(tmp_path)):
        assert_same(loaded, gm, family)
        if name in GENERATE:
            assert_generates(loaded)


@pytest.mark.parametrize("name", AUTO)
def test_one_narrower_feed_forward_width_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    names = [name for name in hard_concrete.gate_names(gates_of(base)) if name.endswith("intermediate_gate")]
    gm = pruned(base, {name: some(64, 48) for name in names})
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert not is_sized(tmp_path)
    assert_same(AUTO[name].from_pretrained(tmp_path).eval(), gm, family)


@pytest.mark.parametrize("kept", [(1, 2), (0, 1), (2,)])
def test_fewer_heads_of_their_own_size_are_an_ordinary_checkpoint(kept: tuple[int, ...], tmp_path: Path) -> None:
    """One head of each group, one group of two, one head in all."""
    family, base = traced("llama")
    mask = torch.zeros(4).index_fill_(0, torch.tensor(kept), 1)
    gm = pruned(base, {f"model.layers.{layer}.self_attn.heads_gate": mask for layer in range(3)})
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert not is_sized(tmp_path)
    loaded = AUTO["llama"].from_pretrained(tmp_path).eval()
    assert loaded.config.num_attention_heads == len(kept)
    assert_same(loaded, gm, family)
    assert_generates(loaded)


@pytest.mark.parametrize(
    ("name", "kept", "sized"),
    [("llama", 24, False), ("llama", 21, True)] + [(name, 24, True) for name in ("opt", "gpt2", "bert", "vit", "t5")],
)
def test_fewer_hidden_dimensions(name: str, kept: int, sized: bool, tmp_path: Path) -> None:
    """Ordinary where the size of heads is a setting of its own and the configuration takes the number."""
    family, base = traced(name)
    (gate,) = (name for name in hard_concrete.gate_names(gates_of(base)) if name.endswith("hidden_gate"))
    gm = pruned(base, {gate: some(32, kept)})
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert is_sized(tmp_path) == sized
    loaded = fxsparse.from_pretrained(tmp_path) if sized else AUTO[name].from_pretrained(tmp_path).eval()
    assert_same(loaded, gm, family)
    if name in GENERATE:
        assert_generates(loaded)
    loaded.train()(**family.make_batch(batch=3)).loss.backward()


@pytest.mark.parametrize("name", ["opt", "gpt2", "vit"])
def test_the_same_share_of_everything_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    drop = DropDimensions(fraction=0.5, units=("hidden", "intermediate", "heads"), score="random")
    gm = fxsparse.rewrite(base, [drop, Materialize()]).eval()
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert not is_sized(tmp_path)
    loaded = AUTO[name].from_pretrained(tmp_path).eval()
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads) == (16, 2)
    assert_same(loaded, gm, family)
    if name in GENERATE:
        assert_generates(loaded)


def test_fewer_hidden_dimensions_of_a_t5_that_does_not_scale_its_logits(tmp_path: Path) -> None:
    """T5's factor on them is of the old size; that of version 1.1 has none."""
    family, _ = traced("t5")
    family.model.config.scale_decoder_outputs = False
    base = fxsparse.trace(family.model, kwargs=family.make_batch(batch=4))
    gm = pruned(base, {"encoder.block.hidden_gate": some(32, 23)})
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert not is_sized(tmp_path)
    loaded = AUTO["t5"].from_pretrained(tmp_path).eval()
    assert_same(loaded, gm, family)
    assert_generates(loaded)


def test_an_encoder_shorter_than_its_decoder_generates(tmp_path: Path) -> None:
    family, base = traced("t5")
    gm = fxsparse.rewrite(base, [DropLayers(indices={"encoder.*": (1,)})]).eval()
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    loaded = AUTO["t5"].from_pretrained(tmp_path).eval()
    assert_same(loaded, gm, family)
    assert_generates(loaded)


# --- what only the recorded sizes say ---------------------------------------------------------------------------------

PARTS = {
    "opt": ("model.decoder.layers.{}.self_attn", "model.decoder.layers.{}"),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
    "bert": ("bert.encoder.layer.{}.attention", "bert.encoder.layer.{}"),
    "vit": ("vit.layers.{}.attention", "vit.layers.{}.mlp"),
    "t5": ("decoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.2.DenseReluDense"),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_layer_of_its_own_size(name: str, tmp_path: Path) -> None:
    """The first layer has lost one head and its FFN, the second its attention and half its channels."""
    family, base = traced(name)
    attention, mlp = PARTS[name]
    masks = {
        f"{attention.format(0)}.heads_gate": some(4, 3),
        f"{mlp.format(0)}.ffn_gate": torch.zeros(1),
        f"{attention.format(1)}.attention_gate": torch.zeros(1),
        f"{mlp.format(1)}.intermediate_gate": some(64, 31),
    }
    gm = pruned(base, masks)
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    assert is_sized(tmp_path)
    with pytest.raises((OSError, ValueError), match=r"no file named|fxsparse\.from_pretrained"):
        AUTO[name].from_pretrained(tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    assert_same(loaded, gm, family)
    if name in GENERATE:
        assert_generates(loaded)
    loaded.train()(**family.make_batch(batch=3)).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize("name", PARTS)
def test_random_sizes(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    gm = pruned(base, random_masks(base))
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    assert_same(loaded, gm, family)
    if name in GENERATE:
        assert_generates(loaded)


@pytest.mark.parametrize("name", ["opt", "llama", "bert", "t5"])
def test_fewer_layers_of_their_own_size(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    drop = DropLayers(indices={"decoder.*": (0,)} if name == "t5" else (1,))
    masks = random_masks(fxsparse.rewrite(base, [drop]))
    gm = pruned(base, masks, drop)
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    assert_same(loaded, gm, family)
    if name in GENERATE:
        assert_generates(loaded)


@pytest.mark.parametrize("kept", [(0, 1, 3), (1, 2, 3), (3,)])
def test_groups_of_queries_that_lost_different_numbers(kept: tuple[int, ...], tmp_path: Path) -> None:
    family, base = traced("llama")
    mask = torch.zeros(4).index_fill_(0, torch.tensor(kept), 1)
    gm = pruned(base, {"model.layers.1.self_attn.heads_gate": mask})
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    attention = loaded.get_submodule("model.layers.1.self_attn")
    assert attention.k_proj.out_features == 8 * len({head // 2 for head in kept})
    assert_same(loaded, gm, family)
    assert_generates(loaded)
    assert_generates(loaded, num_beams=2)
    # What attention function runs is still the configuration's to say.
    loaded.set_attn_implementation("eager")
    assert_same(loaded, gm, family)
    assert_generates(loaded)


def test_a_position_bias_outlives_its_attention(tmp_path: Path) -> None:
    family, base = traced("t5")
    gm = pruned(
        base,
        {
            "decoder.block.0.layer.0.SelfAttention.attention_gate": torch.zeros(1),
            "encoder.block.0.layer.0.SelfAttention.attention_gate": torch.zeros(1),
            "decoder.block.1.layer.0.SelfAttention.heads_gate": some(4, 2),
            "decoder.block.0.layer.1.EncDecAttention.heads_gate": some(4, 1),
        },
    )
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    assert_same(loaded, gm, family)
    assert_generates(loaded)
    assert_generates(loaded, num_beams=2)


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_what_was_loaded_is_saved_pruned_and_loaded_again(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    attention, mlp = PARTS[name]
    first = {f"{attention.format(0)}.heads_gate": torch.tensor([1.0, 1, 0, 1]), f"{mlp.format(0)}.ffn_gate": [0.0]}
    gm = pruned(base, {gate: torch.as_tensor(mask) for gate, mask in first.items()})
    fxsparse.save_pretrained(gm, family.model, tmp_path / "first")
    loaded = fxsparse.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    again = fxsparse.from_pretrained(tmp_path / "again")
    assert_same(again, gm, family)
    with torch.no_grad():
        next(loaded.parameters()).mul_(2)
    loaded.save_pretrained(tmp_path / "first")
    newest = next(fxsparse.from_pretrained(tmp_path / "first").parameters())
    torch.testing.assert_close(newest, next(loaded.parameters()))

    second = fxsparse.trace(again.train(), kwargs=family.make_batch(batch=4))
    smaller = pruned(second, {f"{attention.format(1)}.heads_gate": some(4, 2)})
    fxsparse.save_pretrained(smaller, again, tmp_path / "smaller")
    assert_same(fxsparse.from_pretrained(tmp_path / "smaller"), smaller, family)


def _neox() -> Any:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, use_cache=False,
        )
    )  # fmt: skip


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            forced_eos_token_id=None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [_neox, _bart])
def test_fused_projections_and_cross_attention(build: Callable[[], Any], tmp_path: Path) -> None:
    """GPT-NeoX has one projection, and files that name weights as no module does; BART attends to its encoder."""
    model = build().train()
    batch = {"input_ids": torch.randint(2, 64, (4, 12)), "labels": torch.randint(2, 64, (4, 12))}
    base = fxsparse.trace(model, kwargs=batch)
    gm = pruned(base, random_masks(base))
    fxsparse.save_pretrained(gm, model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-6)
    assert_generates(loaded)


def test_ragged_groups_of_an_attention_that_is_not_sdpa(tmp_path: Path) -> None:
    """Gemma 2 caps its scores: what selects keys is read by a product, and its own function runs in the module."""
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).train()
    batch = {"input_ids": torch.randint(2, 64, (4, 12)), "labels": torch.randint(2, 64, (4, 12))}
    gm = pruned(fxsparse.trace(model, kwargs=batch), {"model.layers.1.self_attn.heads_gate": some(4, 3)})
    fxsparse.save_pretrained(gm, model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    assert len(loaded.model.layers[1].self_attn.keys_of_heads) == 3
    torch.testing.assert_close(loaded(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-6)


def test_an_attention_that_knows_only_the_size_of_all_heads(tmp_path: Path) -> None:
    """OpenAI GPT splits by ``split_size`` and ``n_head``."""
    config = transformers.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = transformers.OpenAIGPTLMHeadModel(config).train()
    batch = {"input_ids": torch.randint(2, 64, (4, 12)), "labels": torch.randint(2, 64, (4, 12))}
    gm = pruned(fxsparse.trace(model, kwargs=batch), {"transformer.h.1.attn.heads_gate": some(4, 3)})
    fxsparse.save_pretrained(gm, model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    attention = loaded.transformer.h[1].attn
    assert (attention.n_head, attention.split_size) == (3, 24)
    torch.testing.assert_close(loaded(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-6)


def test_scalars_of_a_model_stay(tmp_path: Path) -> None:
    """CLIP scales its logits by a parameter without dimensions."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    batch = {"input_ids": torch.randint(3, 64, (4, 7)), "pixel_values": torch.randn(4, 3, 16, 16)}
    base = fxsparse.trace(model, kwargs=batch)
    gm = pruned(base, random_masks(base))
    fxsparse.save_pretrained(gm, model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits_per_image, gm(**batch).logits_per_image, rtol=1e-5, atol=1e-6)


# --- settings, types, refusals ----------------------------------------------------------------------------------------


def test_per_layer_settings_follow_their_layers(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, use_sliding_window=True, sliding_window=4, max_window_layers=2,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(0, 64, (3, 12))
    gm = fxsparse.rewrite(model, [DropLayers(indices=(1, 2))], kwargs={"input_ids": ids}).eval()
    fxsparse.save_pretrained(gm, model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(loaded(ids).logits, gm(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert_generates(loaded)


def test_half_precision(tmp_path: Path) -> None:
    family, _ = traced("opt")
    base = fxsparse.trace(family.model.bfloat16(), kwargs=family.make_batch(batch=4))
    gm = pruned(base, random_masks(base))
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    loaded = fxsparse.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    batch = family.make_batch(batch=3)
    torch.testing.assert_close(loaded(**batch).logits, gm(**batch).logits, rtol=0.02, atol=0.02)
    assert {parameter.dtype for parameter in fxsparse.from_pretrained(tmp_path, dtype="float32").parameters()} == {
        torch.float32
    }


def test_masks_are_written_dense(tmp_path: Path) -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, [DropLayers(indices=(1,)), InsertNMMasks("2:4")]).eval()
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    batch = family.make_batch()
    torch.testing.assert_close(
        AUTO["opt"].from_pretrained(tmp_path).eval()(**batch).logits, gm(**batch).logits, rtol=1e-5, atol=1e-5
    )


def test_one_checkpoint_replaces_another(tmp_path: Path) -> None:
    family, base = traced("llama")
    dropped = fxsparse.rewrite(base, [DropLayers(indices=(1,))]).eval()
    ragged = pruned(base, {"model.layers.1.self_attn.heads_gate": some(4, 3)})
    for gm in (dropped, ragged, dropped):
        fxsparse.save_pretrained(gm, family.model, tmp_path)
        assert is_sized(tmp_path) == (gm is ragged)
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        assert_same(fxsparse.from_pretrained(tmp_path), gm, family)


def test_refusals(tmp_path: Path) -> None:
    family, base = traced("sequential")
    with pytest.raises(CheckpointError, match="no Hugging Face model"):
        fxsparse.save_pretrained(base, family.model, tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json does not exist; fxsparse\.save_pretrained would"):
        fxsparse.from_pretrained(tmp_path)
    family, base = traced("opt")
    gates = fxsparse.rewrite(base, [GateStructures(score="random")])
    with pytest.raises(CheckpointError, match=r"gates and masked dimensions .*\"materialize\""):
        fxsparse.save_pretrained(gates, family.model, tmp_path)
    family, base = traced("bert")
    multiplexed = fxsparse.rewrite(base, "multiplex{n=2}")
    with pytest.raises(CheckpointError, match=r"outputs of up to .* differ"):
        fxsparse.save_pretrained(multiplexed, family.model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_lacks_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    family, base = traced("opt")
    gm = pruned(base, {"model.decoder.layers.1.self_attn.heads_gate": some(4, 3)})
    fxsparse.save_pretrained(gm, family.model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    del state["model.decoder.layers.2.fc1.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.fc1\.bias is missing"):
        fxsparse.from_pretrained(tmp_path)

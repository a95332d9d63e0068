"""Model families of transformers, tiny and as ``from_pretrained`` gives them: configuration defaults, cache on.

A family is the name of its class and of its configuration, the settings that make it tiny, and the kind of its batch.
Nothing is downloaded. `tests.support.families` has the few models that every pass is tested on; these are the many that
the first lines of the README must work on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 64
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZES, "intermediate_size": 64, "max_position_embeddings": 64}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    **_SPECIAL,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_PATCHES = {**_VISION, "image_size": 16, "patch_size": 4}
_CLIP = {
    "text_config": {**_WIDE, **_SPECIAL},
    "vision_config": _PATCHES,
    "projection_dim": 32,
}


@dataclass(frozen=True)
class HubFamily:
    """A class of transformers, and how to make a tiny one.

    Attributes:
        architecture: name of the model's class.
        config: name of the configuration's class.
        settings: of the configuration.
        batch: ``tokens``, ``image``, ``image and text``, ``image in text`` or ``speech``.
        labels: ``tokens``, ``class``, ``none``, or ``decoder`` where the decoder's inputs take their place.
        masks: names of padding masks, which keep every token.
    """

    architecture: str
    config: str
    settings: Mapping[str, Any]
    batch: str = "tokens"
    labels: str = "tokens"
    masks: tuple[str, ...] = ()

    def build(self) -> Any:
        """A randomly initialised model in evaluation mode, the same on every call."""
        config = getattr(transformers, self.config)(**self.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(transformers, self.architecture)(config).eval()

    def make_batch(self, batch: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
        """A fresh batch with labels."""
        inputs: dict[str, torch.Tensor] = {}
        if self.batch == "image in text":
            tokens += 16
        if self.batch in {"image", "image and text", "image in text"}:
            inputs["pixel_values"] = torch.randn(batch, 3, 16, 16)
        if self.batch == "speech":
            inputs["input_features"] = torch.randn(batch, 8, 32)
        if self.batch not in {"image", "speech"}:
            inputs["input_ids"] = torch.randint(3, VOCABULARY - 2, (batch, tokens))
        if self.batch == "image in text":
            inputs["input_ids"][:, 1:17] = IMAGE_TOKEN
        if self.labels in {"tokens", "decoder"}:
            name = "labels" if self.labels == "tokens" else "decoder_input_ids"
            inputs[name] = torch.randint(3, VOCABULARY - 2, (batch, tokens))
        if self.labels == "class":
            inputs["labels"] = torch.randint(2, (batch,))
        for name in self.masks:
            inputs[name] = torch.ones(batch, tokens, dtype=torch.long)
        return inputs


IMAGE_TOKEN = VOCABULARY - 1


def _causal(name: str, settings: Mapping[str, Any] = _GROUPED) -> HubFamily:
    return HubFamily(f"{name}ForCausalLM", f"{name}Config", {**settings, **_SPECIAL})


def _masked(name: str, settings: Mapping[str, Any] = _WIDE) -> HubFamily:
    return HubFamily(f"{name}ForMaskedLM", f"{name}Config", settings)


def _seq2seq(
    name: str, settings: Mapping[str, Any], head: str = "ForConditionalGeneration", **options: Any
) -> HubFamily:
    return HubFamily(f"{name}{head}", f"{name}Config", settings, **options)


_MASKS = ("attention_mask", "decoder_attention_mask")
"""Two families make these masks themselves, but not while they are captured."""


HUB: dict[str, HubFamily] = {
    # encoders
    "bert": HubFamily("BertForSequenceClassification", "BertConfig", _WIDE, labels="class"),
    "roberta": _masked("Roberta"),
    "xlm-roberta": _masked("XLMRoberta"),
    "camembert": _masked("Camembert"),
    "electra": _masked("Electra", {**_WIDE, "embedding_size": 32}),
    "albert": _masked("Albert", {**_WIDE, "embedding_size": 16}),
    "distilbert": _masked("DistilBert", {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "deberta": _masked("Deberta", {**_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v2": _masked("DebertaV2", {**_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mobilebert": _masked(
        "MobileBert",
        {
            **_SIZES,
            "intermediate_size": 64,
            "embedding_size": 32,
            "intra_bottleneck_size": 32,
            "num_feedforward_networks": 1,
        },
    ),
    "mpnet": _masked("MPNet"),
    "ernie": _masked("Ernie"),
    "modernbert": _masked("ModernBert", {**_WIDE, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2}),
    # decoders
    "gpt2": HubFamily(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **_SPECIAL},
    ),
    "gptj": _causal(
        "GPTJ", {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    ),
    "gpt-neo": _causal(
        "GPTNeo",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "gpt-neox": _causal("GPTNeoX", _WIDE),
    "gpt-bigcode": _causal(
        "GPTBigCode", {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ),
    "opt": _causal("OPT", {**_SIZES, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "bloom": _causal("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": _causal("Falcon", {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": _causal("Falcon", {**_SIZES, "alibi": True, "multi_query": False}),
    "mpt": _causal("Mpt", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "codegen": _causal(
        "CodeGen", {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    ),
    "xglm": _causal(
        "XGLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "biogpt": _causal("BioGpt", _WIDE),
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "mixtral": _causal("Mixtral", {**_GROUPED, "num_local_experts": 4}),
    "qwen2": _causal("Qwen2"),
    "qwen2-moe": _causal(
        "Qwen2Moe",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3": _causal("Qwen3", {**_GROUPED, "head_dim": 8}),
    "phi": _causal("Phi", _WIDE),
    "phi3": _causal("Phi3"),
    "gemma": _causal("Gemma", {**_GROUPED, "head_dim": 8}),
    "gemma2": _causal("Gemma2", {**_GROUPED, "head_dim": 8}),
    "gemma3": HubFamily("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8, **_SPECIAL}),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "stablelm": _causal("StableLm"),
    "starcoder2": _causal("Starcoder2"),
    "cohere": _causal("Cohere"),
    "granite": _causal("Granite"),
    "smollm3": _causal("SmolLM3"),
    "glm": _causal("Glm", {**_GROUPED, "head_dim": 8}),
    "nemotron": _causal("Nemotron"),
    "persimmon": _causal("Persimmon", _WIDE),
    "helium": _causal("Helium", {**_GROUPED, "head_dim": 8}),
    "mamba": _causal(
        "Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 8}
    ),
    # encoder-decoders
    "t5": _seq2seq("T5", _T5),
    "mt5": _seq2seq("MT5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": _seq2seq("UMT5", _T5),
    "longt5": _seq2seq("LongT5", {**_T5, "encoder_attention_type": "local", "local_radius": 4}, masks=_MASKS),
    "switch-transformers": _seq2seq(
        "SwitchTransformers",
        {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        masks=_MASKS,
    ),
    "bart": _seq2seq("Bart", _BART),
    "mbart": _seq2seq("MBart", _BART),
    "pegasus": _seq2seq("Pegasus", _BART),
    "marian": _seq2seq("Marian", {**_BART, "decoder_vocab_size": 64}, "MTModel"),
    "m2m100": _seq2seq("M2M100", _BART),
    "blenderbot": _seq2seq("Blenderbot", _BART),
    "prophetnet": _seq2seq(
        "ProphetNet",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "num_buckets": 8,
            "relative_max_distance": 16,
            "decoder_start_token_id": 1,
        },
        labels="decoder",
    ),
    # vision, speech, several at once
    "vit": HubFamily("ViTForImageClassification", "ViTConfig", _PATCHES, "image", "class"),
    "deit": HubFamily("DeiTForImageClassification", "DeiTConfig", _PATCHES, "image", "class"),
    "beit": HubFamily("BeitForImageClassification", "BeitConfig", {**_PATCHES, "vocab_size": 64}, "image", "class"),
    "dinov2": HubFamily("Dinov2ForImageClassification", "Dinov2Config", _PATCHES, "image", "class"),
    "swin": HubFamily(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "image",
        "class",
    ),
    "siglip": HubFamily(
        "SiglipForImageClassification",
        "SiglipConfig",
        {"text_config": _WIDE, "vision_config": _PATCHES},
        "image",
        "class",
    ),
    "clip": HubFamily("CLIPModel", "CLIPConfig", _CLIP, "image and text", "none"),
    "llava": HubFamily(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_GROUPED, **_SPECIAL},
            "vision_config": {"model_type": "clip_vision_model", **_PATCHES},
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -1,
        },
        "image in text",
    ),
    "whisper": HubFamily(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64},
        "speech",
    ),
}
"""Every family by its name in the docs."""

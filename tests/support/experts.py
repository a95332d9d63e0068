"""Tiny models with routed experts, whose code writes into temporaries; apart from the zoo of `families`."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.support.families import HEADS, HIDDEN, INTERMEDIATE, VOCABULARY, Family, causal_lm_batch

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
}


def mixtral() -> Family:
    """Normalises the routing weights in place."""
    config = transformers.MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4)
    return _family(transformers.MixtralForCausalLM, config)


def deepseek() -> Family:
    """Assembles queries and keys in place, out of parts with and without positions."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
    config = transformers.DeepseekV3Config(
        **_SIZES, **latent, **experts, num_key_value_heads=4, first_k_dense_replace=1
    )
    return _family(transformers.DeepseekV3ForCausalLM, config)


def _family(build: type[nn.Module], config: transformers.PretrainedConfig) -> Family:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Family(build(config).train(), causal_lm_batch, causal=True)

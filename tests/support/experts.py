"""Tiny models with routed experts, whose code writes into temporaries; apart from the zoo of `families`."""

from __future__ import annotations

import torch
import transformers
import transformers.integrations.moe
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


def gpt_oss() -> Family:
    """Stores the weights of experts ``[experts, in, out]``, gate and up interleaved, with biases."""
    config = transformers.GptOssConfig(**_SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=4)
    return _family(transformers.GptOssForCausalLM, config)


class Mixture(nn.Module):
    """Experts in plain torch, one MLP for each, with ``top_k`` of them for a token.

    Args:
        form: of the products, as `fxsparse.graph.experts` names them; ``every`` gives each expert all tokens.
        transposed: whether weights are stored ``[experts, in, out]``.
        idle: an expert that no token is routed to; None routes to all.
    """

    def __init__(self, form: str, transposed: bool = False, idle: int | None = None, top_k: int = 2):
        super().__init__()
        self.form, self.transposed, self.idle, self.top_k = form, transposed, idle, top_k
        self.enter, self.router, self.leave = nn.Linear(12, 16), nn.Linear(16, 5), nn.Linear(16, 7)
        shapes = ((5, 24, 16), (5, 16, 24))
        up, down = (torch.randn(shape) / 4 for shape in shapes)
        self.up_proj = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).flatten(0, 1)
        scores = self.router(x)
        if self.idle is not None:
            scores = scores - 1e9 * (torch.arange(self.count) == self.idle)
        weights, chosen = scores.softmax(-1).topk(self.top_k)
        mixed = getattr(self, f"_{self.form}")(x, scores.softmax(-1), weights, chosen)
        return self.leave(x + mixed)

    @property
    def count(self) -> int:
        return len(self.up_proj)

    def _times(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight ``[experts, in, out]``."""
        return weight if self.transposed else weight.transpose(-2, -1)

    def _grouped(
        self, x: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        expert, order = chosen.flatten().sort()
        grouped_mm = torch.ops.transformers.grouped_mm_fallback  # torch's own takes bfloat16 only, while it is captured
        offsets = (expert[:, None] == torch.arange(self.count)).sum(0).cumsum(0).to(torch.int32)
        rows = grouped_mm(x[order // self.top_k], self._times(self.up_proj), offsets)
        rows = grouped_mm(rows.relu(), self._times(self.down_proj), offsets)
        return (rows[order.argsort()].view(*chosen.shape, -1) * weights[..., None]).sum(1)

    def _gathered(
        self, x: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        rows, expert = x.repeat_interleave(self.top_k, dim=0), chosen.flatten()
        for weight, last in ((self.up_proj, False), (self.down_proj, True)):
            if self.transposed:
                rows = torch.bmm(rows.unsqueeze(1), weight[expert]).squeeze(1)
            else:
                rows = torch.bmm(weight[expert], rows.unsqueeze(-1)).squeeze(-1)
            rows = rows if last else rows.relu()
        return (rows.view(*chosen.shape, -1) * weights[..., None]).sum(1)

    def _every(
        self, x: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        rows = torch.bmm(x.expand(self.count, *x.shape), self._times(self.up_proj)).relu()
        rows = torch.bmm(rows, self._times(self.down_proj))
        return (rows * scores.t()[..., None]).sum(0)

"""``generate()`` of a Llama whose linears are 2:4, for `benchmarks.cpu` and for a first run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.ops.nm import Pattern, nm_mask

PROMPT = 64
"""Tokens of it."""

Generate = Callable[[], Tensor]


def sparse_llama(dtype: torch.dtype, device: str = "cpu", **sizes: int) -> Any:
    """A frozen Llama with random weights, n:m in every linear but the head.

    Args:
        sizes: of ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for linear in model.model.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.mul_(nm_mask(linear.weight.abs(), Pattern(2, 4)))
    return model


def generators(
    model: Any, backends: Mapping[str, str | None], tokens: int, *, static: bool = False, mode: str | None = None
) -> dict[str, Generate]:
    """What generates ``tokens`` with each backend, None for eager; the weights are shared.

    Args:
        static: whether the cache is static, as CUDA graphs need it.
        mode: of ``torch.compile``.
    """
    torch._dynamo.reset()  # of another model's graphs, with which these would pass its limit and run eagerly
    forward = model.forward
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), device=model.device)
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}

    def generate(backend: str | None) -> Generate:
        run = forward if backend is None else torch.compile(forward, backend=backend, mode=mode)

        def generated() -> Tensor:
            model.forward = run
            result: Tensor = model.generate(
                prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **options
            )
            return result

        return generated

    return {name: generate(backend) for name, backend in backends.items()}

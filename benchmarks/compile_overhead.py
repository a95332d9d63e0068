"""The overhead of the backend on models without sparsity: compile time and run time against Inductor, on CPU or GPU.

    python -m benchmarks.compile_overhead [--model opt|bert|mlp] [--rounds 7] [--device cpu]

Four variants are compiled and timed in training mode (forward and backward):

* `inductor`: the model under ``torch.compile(model)``, the baseline;
* `fxsparse`: the model under ``torch.compile(model, backend="fxsparse")``, the bare call;
* `traced`: ``fxsparse.trace(model)`` under Inductor;
* `rewritten by nothing`: ``fxsparse.rewrite(model, [])`` under Inductor.

The variants take turns, in compiling and in every step, so that a slow minute of the machine slows all of them. Ratios
are medians of the ratios to `inductor` in each turn, with quartiles. Compile caches are off: every compilation is cold.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Times, environment, interleaved
from fxsparse.rewriting import rewrite
from fxsparse.tracing.trace import trace

BASE = "inductor"


def build(name: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and a batch of a millisecond to a second per step, small enough to show the overhead of Python."""
    if name == "mlp":
        layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.GELU())]
        return nn.Sequential(*layers).to(device), {"input": torch.randn(512, 256, device=device)}
    import transformers as hf

    ids = torch.randint(2, 1000, (4, 64), device=device)
    if name == "bert":
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
        model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=1000, **sizes))
    else:
        sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 512}
        config = hf.OPTConfig(vocab_size=1000, word_embed_proj_dim=128, layerdrop=0.0, use_cache=False, **sizes)
        model = hf.OPTForCausalLM(config)
    return model.to(device).train(), {"input_ids": ids, "labels": ids}


def entry(model: nn.Module, batch: dict[str, Any], backend: str, name: str) -> Callable[[], None]:
    """A compiled step, forward and backward, with its own code object, because Dynamo caches by code object."""

    def forward(**batch: Any) -> Any:
        return model(**batch)

    forward.__code__ = forward.__code__.replace(co_name=name.replace(" ", "_"))
    compiled = torch.compile(forward, backend=backend)

    def step() -> None:
        out = compiled(**batch)
        (out if isinstance(out, torch.Tensor) else out.loss).sum().backward()

    return step


def compile_seconds(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of the first call of each step."""
    seconds = {}
    for name, step in steps.items():
        gc.collect()
        begin = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - begin
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("opt", "bert", "mlp"), default="opt")
    parser.add_argument("--rounds", type=int, default=7, help="compilations of every variant")
    parser.add_argument("--steps", type=int, default=200, help="steps of every variant")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch._inductor.config.force_disable_caches = True
    model, batch = build(options.model, options.device)
    arguments = ((batch["input"],), None) if "input" in batch else ((), batch)
    variants = {
        BASE: (model, "inductor"),
        "fxsparse": (model, "fxsparse"),
        "traced": (trace(model, *arguments), "inductor"),
        "rewritten by nothing": (rewrite(model, [], *arguments), "inductor"),
    }
    compiled: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.rounds + 1):
        torch._dynamo.reset()
        steps = {name: entry(each, batch, backend, name) for name, (each, backend) in variants.items()}
        order = list(variants)[turn % len(variants) :] + list(variants)[: turn % len(variants)]  # each is first in turn
        seconds = compile_seconds({name: steps[name] for name in order})
        if turn:  # the first turn includes imports
            for name in variants:
                compiled[name].append(seconds[name])
    running = interleaved(steps, rounds=options.steps)
    print(f"$ python -m benchmarks.compile_overhead {' '.join(sys.argv[1:])}")
    print(environment())
    print(f"{'':22}{'compile s':>10}{'ratio (quartiles)':>24}{'step ms':>10}{'ratio (quartiles)':>24}")
    for name in variants:
        compiling = Times(tuple(compiled[name]))
        ratios = [
            "{:.3f} ({:.3f}, {:.3f})".format(*times.ratio(base))
            for times, base in ((compiling, Times(tuple(compiled[BASE]))), (running[name], running[BASE]))
        ]
        print(f"{name:22}{compiling.median:10.2f}{ratios[0]:>24}{running[name].median * 1e3:10.2f}{ratios[1]:>24}")


if __name__ == "__main__":
    main()

"""What the backend costs where it has nothing to do: compile time and run time against Inductor, on CPU or GPU.

    python benchmarks/compile_overhead.py [--model opt|bert|mlp] [--repeats 7] [--device cpu]

Compiled and timed, all in training mode (forward and backward):

* `inductor`: the model under ``torch.compile(model)``: what everything is compared with;
* `fxsparse`: the model under ``torch.compile(model, backend="fxsparse")``, the bare call;
* `traced`: ``fxsparse.trace(model)`` under Inductor;
* `rewritten by nothing`: ``fxsparse.rewrite(model, [])`` under Inductor.

Variants take turns in every repeat, so that a slow minute of the machine meets all of them. Times are medians over the
repeats, ratios are medians of each repeat's ratio to `inductor`. Compile caches are off: every compilation is cold.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxsparse.rewriting import rewrite
from fxsparse.tracing import trace

BASE = "inductor"


def build(name: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and a batch: about a millisecond to a second of work a step, so that Python's share shows."""
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


def step(model: Callable[..., Any], batch: dict[str, Any], device: str) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    out = model(**batch)
    (out if isinstance(out, torch.Tensor) else out.loss).sum().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    variants: dict[str, tuple[nn.Module, str]], batch: dict[str, Any], repeats: int, steps: int, device: str
) -> Any:
    """Compile and run times in seconds, by variant, one for every repeat."""
    compiling: dict[str, list[float]] = {name: [] for name in variants}
    running: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        compiled = {}
        for name, (model, backend) in variants.items():
            torch._dynamo.reset()
            gc.collect()
            compiled[name] = torch.compile(model, backend=backend)
            seconds = step(compiled[name], batch, device)
            samples = [step(compiled[name], batch, device) for _ in range(steps)]
            if repeat:  # the first round warms Inductor's own imports up
                compiling[name].append(seconds - statistics.median(samples))
                running[name].append(statistics.median(samples))
    return compiling, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("opt", "bert", "mlp"), default="opt")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="steps timed after every compilation")
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
    compiling, running = measure(variants, batch, options.repeats, options.steps, options.device)
    where = platform.processor() or platform.machine()
    if options.device != "cpu":
        where = torch.cuda.get_device_name()
    print(f"$ {' '.join(['python', *sys.argv])}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, {torch.get_num_threads()} threads")
    print(f"{'':22}{'compile s':>11}{'ratio':>8}{'step ms':>11}{'ratio':>8}")
    for name in variants:
        ratios = [
            statistics.median(ours / base for ours, base in zip(times[name], times[BASE], strict=True))
            for times in (compiling, running)
        ]
        compile_s, run_ms = statistics.median(compiling[name]), statistics.median(running[name]) * 1e3
        print(f"{name:22}{compile_s:11.2f}{ratios[0]:8.3f}{run_ms:11.3f}{ratios[1]:8.3f}")


if __name__ == "__main__":
    main()

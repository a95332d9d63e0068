"""The tensor selector against GreenTrainer's dynamic program: time, and importance of the selection.

    python -m benchmarks.selector [--models opt-2.7b flan-t5-xl] [--draws 5] [--repeats 5]

Models are built on the meta device, so nothing is downloaded and a few GB of memory suffice. For every rho and every
random draw of importances, the table has these columns:

| column | meaning |
|---|---|
| seconds, chosen, importance | the selector: median seconds, number of tensors, summed importance |
| published | importance of the dynamic program as published: 1,000 units of FLOPs, costs rounded down |
| of budget | true cost of that selection over the budget |
| ceil, 10^4 | importance of the program with costs rounded up, which keeps the budget: 1,000 and 10,000 units |
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.selector import dp_baseline
from fxsparse.errors import OptionError
from fxsparse.tracing.trace import trace

BATCH, TOKENS, TARGET_TOKENS = 4, 512, 128


def opt_2_7b() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.OPTConfig(
        hidden_size=2560,
        word_embed_proj_dim=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        layerdrop=0.0,
        use_cache=False,
    )
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    return transformers.OPTForCausalLM(config), {"input_ids": ids, "labels": ids}


def flan_t5_xl() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.T5Config(  # type: ignore[call-arg]
        vocab_size=32128,
        d_model=2048,
        d_ff=5120,
        d_kv=64,
        num_heads=32,
        num_layers=24,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        use_cache=False,
    )
    ids, labels = (torch.zeros(BATCH, length, dtype=torch.long) for length in (TOKENS, TARGET_TOKENS))
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": labels}


MODELS = {"opt-2.7b": opt_2_7b, "flan-t5-xl": flan_t5_xl}
DRAWS: dict[str, Callable[[random.Random], float]] = {
    "exponential": lambda rng: rng.expovariate(1),
    "normal": lambda rng: rng.gauss(0, 1),
    "nearly equal": lambda rng: 1 + 1e-3 * rng.random(),
}
HEADER = (
    "model",
    "rho",
    "importances",
    "draw",
    "seconds",
    "chosen",
    "importance",
    "published",
    "of budget",
    "ceil",
    "10^4",
)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def rows(model: str, graph: BackpropGraph, rho: float, draws: int, repeats: int) -> list[tuple[str, ...]]:
    budget = graph.budget(rho)
    table: list[tuple[str, ...]] = []
    for distribution, draw in DRAWS.items():
        for seed in range(draws):
            rng = random.Random(seed)
            importance = {name: draw(rng) for name in sorted(graph.trainable)}
            seconds, chosen = timed(functools.partial(graph.select, importance, rho), repeats)
            instance = graph.instance()
            published = dp_baseline(instance, importance, budget)
            within = [dp_baseline(instance, importance, budget, resolution=n, rounding="ceil") for n in (1_000, 10_000)]
            gathered = [sum(importance[name] for name in names) for names in (chosen, published, *within)]
            if instance.cost(chosen) > budget or max(gathered[2:]) > gathered[0] * (1 + 1e-9):
                raise SystemExit(f"{model}, rho {rho}, {distribution} {seed}: a wrong selection")
            share = instance.cost(published) / budget if budget else 0.0
            table.append(
                (
                    *(model, f"{rho:g}", distribution, str(seed), f"{seconds:.3f}", str(len(chosen))),
                    *(
                        f"{gathered[0]:.2f}",
                        f"{gathered[1]:.2f}",
                        f"{share:.3f}",
                        f"{gathered[2]:.2f}",
                        f"{gathered[3]:.2f}",
                    ),
                )
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rho", nargs="+", type=float, default=[0.36, 0.4, 0.5, 0.7, 1.0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    print(" | ".join(HEADER))
    for model in options.models:
        with torch.device("meta"):
            module, batch = MODELS[model]()
        graph = BackpropGraph(trace(module, kwargs=batch))
        for rho in options.rho:
            try:
                table = rows(model, graph, rho, options.draws, options.repeats)
            except OptionError as error:
                print(f"{model} | {rho:g} | {error}")
                continue
            print("\n".join(" | ".join(row) for row in table), flush=True)


if __name__ == "__main__":
    main()

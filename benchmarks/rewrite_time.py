"""Time of tracing and rewriting by model size: OPT on the meta device, 8 to 64 layers.

python -m benchmarks.rewrite_time [--layers 8 16 32 64] [--hidden 2560]

Seconds are those of the processor. `first` is the first rewrite of a traced graph; later ones of the same graph find
what was probed and traced for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import fxsparse
from benchmarks.timing import environment
from fxsparse.text import table

PIPELINES = ("nm-masks{pattern=2:4},double-prune,low-rank{rank=16,start=0.0}", "gates")


def model_of(layers: int, hidden: int) -> transformers.PreTrainedModel:
    config = transformers.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        word_embed_proj_dim=hidden, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.OPTForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    header = ("layers", "nodes", "trace s", "first s", "rewrite s", "rewrite s / 1000 nodes")
    tables = {passes: [header] for passes in PIPELINES}
    for layers in args.layers:
        ids = torch.zeros(2, 128, dtype=torch.long, device="meta")
        traced, gm = seconds(
            lambda ids=ids, layers=layers: fxsparse.trace(
                model_of(layers, args.hidden), kwargs={"input_ids": ids, "labels": ids}
            )
        )
        nodes = len(gm.graph.nodes)
        for passes, rows in tables.items():
            first, *later = (
                seconds(lambda gm=gm, p=passes: fxsparse.rewrite(gm, p))[0] for _ in range(args.rounds + 1)
            )
            median = statistics.median(later)
            times = (f"{traced:.2f}", f"{first:.2f}", f"{median:.2f}", f"{median / nodes * 1000:.2f}")
            rows.append((str(layers), str(nodes), *times))
    print(f"{environment()}, median of {args.rounds}")
    for passes, rows in tables.items():
        print(passes)
        print("\n".join(table(rows, right=range(6))))


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


if __name__ == "__main__":
    main()

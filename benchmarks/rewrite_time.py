"""Time of tracing and rewriting by model size: OPT on the meta device, 8 to 64 layers.

python -m benchmarks.rewrite_time [--layers 8 16 32 64] [--hidden 2560]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

import fxsparse
from benchmarks.timing import environment
from fxsparse.text import table

PASSES = "nm-masks{pattern=2:4},double-prune,low-rank{rank=16,start=0.0}"


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
    rows = [("layers", "nodes", "trace s", "rewrite s", "rewrite s / 1000 nodes")]
    for layers in args.layers:
        ids = torch.zeros(2, 128, dtype=torch.long, device="meta")
        begin = time.perf_counter()
        gm = fxsparse.trace(model_of(layers, args.hidden), kwargs={"input_ids": ids, "labels": ids})
        traced = time.perf_counter() - begin
        seconds = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            fxsparse.rewrite(gm, PASSES)
            seconds.append(time.perf_counter() - begin)
        nodes, median = len(gm.graph.nodes), statistics.median(seconds)
        rows.append((str(layers), str(nodes), f"{traced:.2f}", f"{median:.2f}", f"{median / nodes * 1000:.2f}"))
    print(f"{environment()}, {PASSES}, median of {args.rounds}")
    print("\n".join(table(rows, right=range(5))))


if __name__ == "__main__":
    main()

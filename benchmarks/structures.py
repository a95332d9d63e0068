"""Time of finding heads and channels: Llama of 7B's size on the meta device, and ones with weights.

python -m benchmarks.structures [--layers 32] [--with-weights 4] [--length 512]

With weights there are as many of the 7B model's layers as memory allows, 0.4 GB each in bfloat16, and a whole smaller
model.

`first` finds them in a graph that was just traced, `apart` does so without taking layers that are alike as one, and
`again` in a copy of a graph that was asked before, as every rewrite makes one. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.fx import GraphModule

import fxsparse
from benchmarks.timing import environment
from fxsparse import graph as fx
from fxsparse.analysis.sections import KEY
from fxsparse.analysis.structures import structures
from fxsparse.text import table


def model_of(
    layers: int, hidden: int, intermediate: int, heads: int, device: str, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


def traced(
    layers: int, sizes: tuple[int, int, int], length: int, device: str, dtype: torch.dtype = torch.float32
) -> GraphModule:
    ids = torch.zeros(2, length, dtype=torch.long, device=device)
    return fxsparse.trace(model_of(layers, *sizes, device, dtype), kwargs={"input_ids": ids, "labels": ids})


class Forgetful(dict[Any, Any]):
    """Answers of which none is found again."""

    def __contains__(self, key: object) -> bool:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--with-weights", type=int, default=4, help="layers of the 7B model with weights")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    models = {
        f"7B, {args.layers} layers, meta": (args.layers, (4096, 11008, 32), "meta", torch.float32),
        f"7B, {args.with_weights} layers, weights": (args.with_weights, (4096, 11008, 32), "cpu", torch.bfloat16),
        "160M, 12 layers, weights": (12, (768, 2048, 12), "cpu", torch.float32),
    }
    torch.set_num_threads(1)
    structures(traced(1, (64, 128, 4), 16, "cpu"))  # what the first call of an operator costs is not of interest
    rows = [
        ("model", "nodes", "found", "first s", "first s / 1000 nodes", "again s", "apart s", "apart s / 1000 nodes")
    ]
    for name, (layers, sizes, device, dtype) in models.items():
        gm = traced(layers, sizes, args.length, device, dtype)
        first, found = seconds(lambda gm=gm: structures(gm))
        copies = [fx.copy_sharing_state(gm) for _ in range(args.rounds)]
        again = statistics.median(seconds(lambda copy=copy: structures(copy))[0] for copy in copies)
        gm.meta[KEY] = Forgetful()
        apart, _ = seconds(lambda gm=gm: structures(gm))
        nodes, sites = len(gm.graph.nodes), len(found.attentions) + len(found.mlps)
        times = (f"{first:.2f}", f"{first / nodes * 1000:.2f}", f"{again:.2f}", f"{apart:.2f}")
        rows.append((name, str(nodes), str(sites), *times, f"{apart / nodes * 1000:.2f}"))
    print(f"{environment()}, length {args.length}, again: median of {args.rounds}")
    print("\n".join(table(rows, right=range(1, 8))))


if __name__ == "__main__":
    main()

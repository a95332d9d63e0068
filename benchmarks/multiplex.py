"""Throughput of a multiplexed encoder, measured and predicted from FLOPs.

    python -m benchmarks.multiplex [--members 1 2 5 10] [--batch 128] [--length 32] [--rounds 5]

A BERT classifier of 6 layers, hidden 512, gets batch * N inputs at a time for every N, so that its core always runs at
the same batch size. Throughput is in inputs per second. ``FLOPs promise`` is the ratio of FLOPs per input, plain over
multiplexed, by ``fxsparse.count_flops``. ``reached`` is the measured speed-up over the promised one; 1 means that mux
and demux take no more time than their FLOPs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch.fx import GraphModule

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.passes.mux.multiplex import Multiplex
from fxsparse.text import table


@dataclass(frozen=True)
class Variant:
    """A multiplexed model: N, inputs in a batch, FLOPs of a batch, and a call."""

    members: int
    inputs: int
    flops: int
    run: Callable[[], object]


def variant(members: int, args: argparse.Namespace) -> Variant:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=8, max_position_embeddings=args.length, num_labels=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval().to(args.device)
    inputs = args.batch * members
    ids = torch.randint(2048, (inputs, args.length), device=args.device)
    passes = [Multiplex(members, mux=args.mux)] if members > 1 else []
    gm: GraphModule = fxsparse.rewrite(model, passes, kwargs={"input_ids": ids[: 2 * members + 2]}).eval()
    flops = fxsparse.count_flops(gm, input_ids=tuple(ids.shape)).forward
    call = torch.compile(gm, backend="fxsparse", dynamic=True) if args.compile else gm

    @torch.no_grad()
    def run() -> object:
        return call(input_ids=ids)

    return Variant(members, inputs, flops, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--batch", type=int, default=128, help="rows of the core; a batch has this times N inputs")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mux", default="gaussian")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="through torch.compile with the fxsparse backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    variants = {f"N={members}": variant(members, args) for members in dict.fromkeys([1, *args.members])}
    times = interleaved({name: item.run for name, item in variants.items()}, rounds=args.rounds, warmup=2)
    plain = variants["N=1"]
    rows = [("", "inputs", "inputs / s", "throughput / plain", "quartiles", "FLOPs promise", "reached")]
    for name, item in variants.items():
        slower, low, high = times[name].ratio(times["N=1"])  # time of a batch over the plain model's
        speedup, promise = item.members / slower, plain.flops * item.members / item.flops
        quartiles = f"{item.members / high:.2f} - {item.members / low:.2f}"
        rate = f"{item.inputs / times[name].median:.0f}"
        rows.append(
            (name, str(item.inputs), rate, f"{speedup:.2f}", quartiles, f"{promise:.2f}", f"{speedup / promise:.2f}")
        )
    print(f"{environment()}, {args.layers} layers, hidden {args.hidden}, {args.length} tokens, {args.mux} mux")
    print("\n".join(table(rows, right=(1, 2, 3, 5, 6))))


if __name__ == "__main__":
    main()

"""A training step with chosen heads and channels (SAT), against a dense step and the saving predicted by FLOPs.

    python -m benchmarks.select_neurons [--omission 0.5 0.333] [--tokens 2048] [--hidden 512] [--rounds 9]
        [--block 64]

The model is a stack of Llama layers without embeddings and head. A step is forward, backward, AdamW and the schedule,
which chooses anew in every step; forward and backward are compiled. ``reached`` is the measured share of the ideal
saving: (1 - time / dense) / (1 - FLOPs / dense). The variants take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.graph.training_form import training_graph
from fxsparse.passes import Pass, SelectNeurons
from fxsparse.text import table


class Layers(nn.Module):
    """The layers of a Llama; returns the mean square of the change of the hidden states."""

    def __init__(self, hidden: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=length, use_cache=False,
        )  # fmt: skip
        self.model = transformers.LlamaModel(config)
        del self.model.embed_tokens

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(inputs_embeds=x).last_hidden_state - x).square().mean()


@dataclass
class Step:
    """A training step of one variant, its FLOPs, and the seconds of its schedule in every step."""

    run: Callable[[], None]
    flops: int
    schedule: list[float] = field(default_factory=list)


def training_step(omission: float, args: argparse.Namespace, x: Tensor) -> Step:
    torch.manual_seed(0)
    model = Layers(args.hidden, args.layers, args.heads, args.length).to(args.device)
    passes: list[Pass] = []
    if omission:
        passes.append(SelectNeurons(omission, score=args.score, multiple=args.multiple, block=args.block))
    gm = fxsparse.rewrite(model, passes, (x,))
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-5, fused=args.fused)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10_000)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})

    def run() -> None:
        compiled(x).backward()
        optimizer.step()
        begin = time.perf_counter()
        schedule.step()
        step.schedule.append(time.perf_counter() - begin)
        optimizer.zero_grad()

    step = Step(run, fxsparse.count_flops(training_graph(gm)).step)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omission", nargs="+", type=float, default=[0.5, 1 / 3])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--multiple", type=int, default=64)
    parser.add_argument("--block", type=int, default=1, help="channels that are chosen together")
    parser.add_argument("--score", default="magnitude", choices=("magnitude", "weighted", "uniform"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args()
    x = torch.randn(args.tokens // args.length, args.length, args.hidden, device=args.device)
    steps = {"dense": training_step(0, args, x)}
    steps |= {f"omission {rate:.3g}": training_step(rate, args, x) for rate in args.omission}
    times = interleaved({name: step.run for name, step in steps.items()}, rounds=args.rounds)
    rows = [
        ("training step", "FLOPs / dense", "time / dense", "quartiles", "reached", "throughput", "median", "schedule")
    ]
    for name, measured in times.items():
        middle, low, high = measured.ratio(times["dense"])
        share = steps[name].flops / steps["dense"].flops
        reached = f"{(1 - middle) / (1 - share):.2f}" if share < 1 else ""
        waiting = statistics.median(steps[name].schedule)
        rows.append(
            (name, f"{share:.3f}", f"{middle:.3f}", f"{low:.3f} - {high:.3f}", reached, f"{1 / middle:.2f}x",
             f"{measured.median:.3f} s", f"{waiting * 1e3:.1f} ms")
        )  # fmt: skip
    print(f"{environment()}, hidden {args.hidden}, {args.layers} layers, {args.tokens} tokens, {args.compiler}")
    print("\n".join(table(rows, right=(1, 2, 4, 5, 6, 7))))


if __name__ == "__main__":
    main()

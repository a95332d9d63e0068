"""A training step of N:M linears against the dense step, under the same backend.

    python -m benchmarks.train_step [--tokens 4096] [--hidden 1024] [--rounds 15]

The model is a transformer's feed-forward block, hidden to 4 x hidden and back. A step is forward, backward and AdamW.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks, Pass
from fxsparse.text import table

EVERY = {"keep_first": False, "keep_head": False}
WAYS: dict[str, list[Pass]] = {
    "dense": [],
    "2:4 compressed": [InsertNMMasks("2:4", **EVERY), DoublePruneBackward()],
    "2:4 masked": [InsertNMMasks("2:4", storage="masked", **EVERY), DoublePruneBackward()],
    "2:8 compressed": [InsertNMMasks("2:8", **EVERY), DoublePruneBackward()],
    "2:4 compressed + rank 16": [
        InsertNMMasks("2:4", **EVERY),
        DoublePruneBackward(),
        AddLowRankBranches(rank=16, start=0.0),
    ],
}


def training_step(passes: list[Pass], x: torch.Tensor, hidden: int) -> Callable[[], None]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)).to(x)
    gm = fxsparse.rewrite(block, passes, (x,))
    compiled = torch.compile(gm, backend="fxsparse")
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-4)

    def step() -> None:
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    x = torch.randn(args.tokens, args.hidden, device=args.device, dtype=getattr(torch, args.dtype))
    steps = {name: training_step(passes, x, args.hidden) for name, passes in WAYS.items()}
    times = interleaved(steps, rounds=args.rounds)
    rows = [("training step", "time / dense", "quartiles")]
    for name, measured in times.items():
        middle, low, high = measured.ratio(times["dense"])
        rows.append((name, f"{middle:.3f}", f"{low:.3f} - {high:.3f}"))
    print(f"{environment()}, {args.dtype}, {args.tokens} tokens, hidden {args.hidden}, {args.rounds} rounds in turn")
    print("\n".join(table(rows, right=(1,))))


if __name__ == "__main__":
    main()

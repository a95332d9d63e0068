"""Half the layers of a 24-layer language model: measured and predicted speed-up (CHOP, arXiv 2305.14864).

    python -m benchmarks.chop                          # a GPT on the CPU
    python -m benchmarks.chop --device cuda --dtype bfloat16 --hidden 1024 --heads 16 --batch 8 --length 1024

The predicted speed-up is the ratio of FLOPs, whole model over shortened model, for the forward pass and for the
training step. The optimizer's work has no FLOPs, so a step here is forward and backward only. ``reached`` is measured /
predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers
from torch.fx import GraphModule

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.cost.flops import costs
from fxsparse.passes import DropLayers
from fxsparse.text import table


def calls(gm: GraphModule, batch: dict[str, torch.Tensor], compiler: str) -> tuple[Callable[[], None], ...]:
    call = torch.compile(gm, backend="fxsparse", options={"compiler": compiler})

    @torch.no_grad()
    def forward() -> None:
        call(**batch)

    def step() -> None:
        call(**batch).loss.backward()
        for parameter in gm.parameters():
            parameter.grad = None

    return forward, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--configuration", default="max-gap")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.length, n_embd=args.hidden, n_layer=args.layers, n_head=args.heads,
        bos_token_id=None, eos_token_id=None, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(args.device, getattr(torch, args.dtype))
    ids = torch.randint(args.vocabulary, (args.batch, args.length), device=args.device)
    batch = {"input_ids": ids, "labels": ids.clone()}
    whole = fxsparse.trace(model, kwargs=batch)
    short = fxsparse.rewrite(whole, [DropLayers(args.configuration, fraction=args.fraction)])
    before, after = costs(whole), costs(short)
    predicted = (before.forward_flops / after.forward_flops, before.step_flops / after.step_flops)
    variants = [calls(gm, batch, args.compiler) for gm in (whole, short)]
    rows = [("", "predicted", "measured", "quartiles", "reached")]
    for kind, (name, expected) in enumerate(zip(("forward", "training step"), predicted, strict=True)):
        times = interleaved({"whole": variants[0][kind], "short": variants[1][kind]}, rounds=args.rounds)
        middle, low, high = times["whole"].ratio(times["short"])
        rows.append((name, f"{expected:.3f}", f"{middle:.3f}", f"{low:.3f} - {high:.3f}", f"{middle / expected:.3f}"))
    parameters = f"{before.parameters / 1e6:.1f} M -> {after.parameters / 1e6:.1f} M parameters"
    print(f"{environment()}, {args.dtype}, {args.compiler}, {args.batch} x {args.length} tokens, {parameters}")
    print("\n".join(table(rows, right=(1, 2, 4))))


if __name__ == "__main__":
    main()

"""Half the layers of a language model: measured speed-up against what the FLOPs ledger predicts.

    python -m benchmarks.chop [--layers 24] [--hidden 512] [--batch 4] [--length 128] [--rounds 9] [--compile]

An OPT drops half its layers (LayerCHOP, max-gap); a training step is forward, backward and AdamW. The prediction is the
ratio of FLOPs before and after, from the record of the rewrite; reached is the measured speed-up over it. CHOP (arXiv
2305.14864) measured 1.84 for a forward pass of a 7B model, whose embeddings and head stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers
from torch.fx import GraphModule

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.passes import DropLayers
from fxsparse.report import table

WHOLE, HALF = "whole", "half the layers"


def language_model(args: argparse.Namespace) -> torch.nn.Module:
    config = transformers.OPTConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, max_position_embeddings=args.length,
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    return model.to(args.device, getattr(torch, args.dtype))


def forward_of(gm: GraphModule, ids: torch.Tensor, compiled: bool) -> Callable[[], object]:
    call = torch.compile(gm, backend="fxsparse") if compiled else gm

    @torch.no_grad()
    def run() -> object:
        return call(input_ids=ids, labels=ids)

    return run


def step_of(gm: GraphModule, ids: torch.Tensor, compiled: bool) -> Callable[[], object]:
    call = torch.compile(gm, backend="fxsparse") if compiled else gm
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-5)

    def run() -> None:
        call(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--configuration", default="max-gap")
    parser.add_argument("--compile", action="store_true", help="through torch.compile with the fxsparse backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    ids = torch.randint(args.vocabulary, (args.batch, args.length), device=args.device)
    whole = fxsparse.rewrite(language_model(args), [], kwargs={"input_ids": ids, "labels": ids})
    # A model of its own: a training step of one rival must not move the other's weights.
    twin = fxsparse.rewrite(language_model(args), [], kwargs={"input_ids": ids, "labels": ids})
    half = fxsparse.rewrite(twin, [DropLayers(args.configuration, fraction=0.5)])
    (entry,) = fxsparse.record_of(half).entries
    predicted = {
        "forward": entry.before.forward_flops / entry.after.forward_flops,
        "training step": entry.before.step_flops / entry.after.step_flops,
    }
    rows = [("", "ms whole", "ms half", "speed-up", "quartiles", "FLOPs", "reached")]
    for name, make in {"forward": forward_of, "training step": step_of}.items():
        rivals = {WHOLE: make(whole, ids, args.compile), HALF: make(half, ids, args.compile)}
        times = interleaved(rivals, rounds=args.rounds)
        middle, low, high = times[WHOLE].ratio(times[HALF])
        milliseconds = [f"{times[rival].median * 1e3:.1f}" for rival in (WHOLE, HALF)]
        reached = f"{middle / predicted[name]:.3f}"
        rows.append(
            (name, *milliseconds, f"{middle:.3f}", f"{low:.3f} - {high:.3f}", f"{predicted[name]:.3f}", reached)
        )
    how = "compiled" if args.compile else "eager"
    print(
        f"{environment()}, {args.dtype}, {how}, {args.layers} layers, hidden {args.hidden}, {tuple(ids.shape)} tokens"
    )
    print("\n".join(table(rows, right=(1, 2, 3, 5, 6))))


if __name__ == "__main__":
    main()

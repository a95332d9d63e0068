"""Inference with frozen N:M weights against the dense model under Inductor, on CPU or GPU.

    python -m benchmarks.inference [--hidden 512] [--layers 4] [--tokens 1024] [--pattern 2:4] [--rounds 15]

* `dense`: the model under ``torch.compile(model)``, the baseline;
* `frozen`: the same model with weights pruned in place, under ``torch.compile(model, backend="fxsparse")``;
* `compressed`: the model rewritten by ``nm-masks``, with frozen parameters, under the same backend;
* `compressed, inlined`: the same with ``options={"lower": {"nm_linear": "reference"}}``: decompressed in every call.

The variants take turns; the table names the implementations that the backend chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers
from torch import nn

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.backend.compiled import compiled_graphs
from fxsparse.ops import nm
from fxsparse.passes import InsertNMMasks
from fxsparse.text import table


def build(args: argparse.Namespace) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, max_position_embeddings=args.length,
        layerdrop=0.0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    return model.eval().requires_grad_(False)


def pruned(model: nn.Module, pattern: nm.Pattern) -> nn.Module:
    """Prunes the weights of all linears except the head, in place."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.mul_(nm.nm_mask(module.weight.abs(), pattern))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    pattern = nm.Pattern.parse(args.pattern)
    batch = torch.randint(512, (args.tokens // args.length, args.length), device=args.device)
    passes = [InsertNMMasks(args.pattern, keep_first=False)]

    def compressed() -> nn.Module:
        return fxsparse.rewrite(build(args), passes, kwargs={"input_ids": batch}).requires_grad_(False)

    inlined = {"lower": {"nm_linear": "reference"}}
    models: dict[str, Callable[..., object]] = {
        "dense": torch.compile(build(args)),
        "frozen": torch.compile(pruned(build(args), pattern), backend="fxsparse"),
        "compressed": torch.compile(compressed(), backend="fxsparse"),
        "compressed, inlined": torch.compile(compressed(), backend="fxsparse", options=inlined),
    }
    with torch.no_grad():
        times = interleaved(
            {name: lambda model=model: model(input_ids=batch) for name, model in models.items()},  # type: ignore[misc]
            rounds=args.rounds,
        )
    rows = [("inference", "time / dense", "quartiles", "runs")]
    for name, measured in times.items():
        middle, low, high = measured.ratio(times["dense"])
        choices = (
            {} if name == "dense" else {c.implementation for g in compiled_graphs(models[name]) for c in g.choices}
        )
        rows.append((name, f"{middle:.3f}", f"{low:.3f} - {high:.3f}", ", ".join(sorted(choices)) or "dense"))
    shape = f"{args.dtype}, OPT of {args.layers} layers, hidden {args.hidden}, {args.tokens} tokens, {args.pattern}"
    print(f"{environment()}, {shape}, {args.rounds} rounds in turn")
    print("\n".join(table(rows, right=(1,))))


if __name__ == "__main__":
    main()

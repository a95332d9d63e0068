"""A training step of the tensors that GreenTrainer chooses within a budget of FLOPs, against a step of all tensors.

    python -m benchmarks.greentrainer_step [--rho 0.4 0.5 0.7] [--tokens 2048] [--rounds 9]

The model is an OPT of about 25 million parameters; a step is forward, backward and AdamW, compiled. The table gives the
ratio of FLOPs, which predicts the ratio of times, and the ratio of times. The variants take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers

import fxsparse
from benchmarks.timing import environment, interleaved
from fxsparse.passes import Pass, SelectTensors
from fxsparse.text import table


def opt(hidden: int, layers: int, vocabulary: int, length: int) -> torch.nn.Module:
    config = transformers.OPTConfig(
        vocab_size=vocabulary, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, max_position_embeddings=length,
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(config)


def training_step(
    rho: float | None, args: argparse.Namespace, batch: dict[str, torch.Tensor]
) -> tuple[Callable[[], None], int]:
    """The step and its FLOPs."""
    passes: list[Pass] = [] if rho is None else [SelectTensors(rho=rho)]
    model = opt(args.hidden, args.layers, args.vocabulary, args.length).to(args.device)
    gm = fxsparse.rewrite(model, passes, kwargs=batch)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-5)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
    schedule.observe(batch)
    schedule.remove()
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})

    def step() -> None:
        compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, fxsparse.count_flops(gm).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", nargs="+", type=float, default=[0.4, 0.5, 0.7])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    ids = torch.randint(args.vocabulary, (args.tokens // args.length, args.length), device=args.device)
    batch = {"input_ids": ids, "labels": ids}
    ways = {"all tensors": None, **{f"rho {rho:g}": rho for rho in args.rho}}
    steps = {name: training_step(rho, args, batch) for name, rho in ways.items()}
    times = interleaved({name: step for name, (step, _) in steps.items()}, rounds=args.rounds)
    rows = [("training step", "FLOPs / all", "time / all", "quartiles", "median")]
    for name, measured in times.items():
        middle, low, high = measured.ratio(times["all tensors"])
        share = steps[name][1] / steps["all tensors"][1]
        rows.append((name, f"{share:.3f}", f"{middle:.3f}", f"{low:.3f} - {high:.3f}", f"{measured.median:.3f} s"))
    parameters = sum(p.numel() for p in opt(args.hidden, args.layers, args.vocabulary, args.length).parameters())
    print(f"{environment()}, {parameters / 1e6:.1f} M parameters, {args.tokens} tokens, {args.compiler}")
    print("\n".join(table(rows, right=(1, 2, 4))))


if __name__ == "__main__":
    main()

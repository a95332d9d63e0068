"""The linears and whole layers of published models, sparse against dense, on a GPU.

    python -m benchmarks.gpu [--output gpu.md] [--minutes 10] [--only linear layer] [--models llama-3-8b]

Linears: every weight shape of OPT-2.7B/13B/66B, Llama-3-8B and Mistral-7B at 1 to 16,384 tokens, 2:4; the forward
product, both gradients and the fused low-rank form, as `fxsparse` dispatches them, beside cuBLAS under Inductor's
max-autotune and torch's own semi-structured path. Layers: one transformer layer of each model, training step and
inference, time and peak memory. Rows are written as they are measured; a run that stops resumes after the last one.

Rivals take turns, operands are random, medians with the 10 % and 90 % quantiles are given. Without a GPU nothing is
measured; ``--device cpu --small`` runs the program on toy shapes, for its own sake.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from benchmarks.timing import environment
from fxsparse import nm
from fxsparse.nm import Pattern
from fxsparse.passes import (
    AddLowRankBranches,
    DoublePruneBackward,
    DropLayers,
    InsertNMMasks,
    Multiplex,
    Pass,
    SelectNeurons,
)

TWO_FOUR = Pattern(2, 4)
TOKENS = (1, 16, 64, 512, 4096, 16384)
RANKS = (1 / 64, 1 / 16)
"""Of the smaller dimension: 1.56 % and 6.25 %."""

HEADER = "| what | model | shape | us (10 % - 90 %) | ratio to dense | peak GiB | runs |"


@dataclass(frozen=True)
class Sizes:
    """What a layer is made of."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    llama: bool


MODELS = {
    "opt-2.7b": Sizes(2560, 10240, 32, 32, False),
    "opt-13b": Sizes(5120, 20480, 40, 40, False),
    "opt-66b": Sizes(9216, 36864, 72, 72, False),
    "llama-3-8b": Sizes(4096, 14336, 32, 8, True),
    "mistral-7b": Sizes(4096, 14336, 32, 8, True),
}
TOY = {"toy-opt": Sizes(64, 128, 4, 4, False), "toy-llama": Sizes(64, 128, 4, 2, True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["linear", "layer"], choices=("linear", "layer"))
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu measures on a GPU and this machine has none: nothing was measured.", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    until = time.monotonic() + 60 * args.minutes
    done = args.output.read_text().splitlines() if args.output.is_file() else []
    known = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in done}
    with args.output.open("a") as file:
        if not done:
            print(f"{environment()}, bfloat16, {args.rounds} rounds in turn\n\n{HEADER}", file=file)
            print("|" + "---|" * (HEADER.count("|") - 1), file=file, flush=True)
        for what, model, shape, rivals in cases(args):
            if (what, model, shape) in known:
                continue
            if time.monotonic() > until:
                print(f"stopped after {args.minutes:g} minutes; the same command goes on", file=sys.stderr)
                return 0
            for line in measured(what, model, shape, rivals(), args):
                print(line, file=file, flush=True)
                print(line, flush=True)
    print(f"written to {args.output}")
    return 0


# --- measuring --------------------------------------------------------------------------------------------------------

Run = Callable[[], object]


def measured(what: str, model: str, shape: str, rivals: dict[str, Run], args: argparse.Namespace) -> Iterator[str]:
    """A row for each rival; the first is what the others are compared with, and the row that marks the case as done
    is written last."""
    times: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name, run in list(rivals.items()):
        try:
            peaks[name] = warm(run, args.device)
            times[name] = []
        except Exception as error:  # a library that does not take the shape
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".replace("|", "/")
            yield f"| {what}, {name} | {model} | {shape} | {reason} | | | |"
    for _ in range(args.rounds):
        for name in times:
            times[name].append(timed(rivals[name], args.device))
    base = next(iter(times))
    for name in reversed(times):
        ratio = statistics.median(its / mine for mine, its in zip(times[name], times[base], strict=True))
        deciles = statistics.quantiles(times[name], n=10)
        label = what if name == base else f"{what}, {name}"
        spread = f"{statistics.median(times[name]):.1f} ({deciles[0]:.1f} - {deciles[-1]:.1f})"
        peak, runs = f"{peaks[name] / 2**30:.2f}", chosen(rivals[name])
        yield f"| {label} | {model} | {shape} | {spread} | {ratio:.2f} | {peak} | {runs} |"


def warm(run: Run, device: str) -> float:
    """Runs three times, which compiles, and measures what is chosen by measuring; returns the peak memory in bytes."""
    for _ in range(3):
        run()
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())


def timed(run: Run, device: str) -> float:
    """Microseconds."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(200_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def chosen(run: Run) -> str:
    """What the backend says it runs."""
    compiled = getattr(run, "compiled", None)
    if compiled is None:
        return ""
    from fxsparse.compiled import compiled_graphs

    found = {choice.implementation for graph in compiled_graphs(compiled) for choice in graph.choices}
    return ", ".join(sorted(found))


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Callable[[], dict[str, Run]]]]:
    models = TOY if args.small else MODELS
    wanted = args.models or list(models)
    if "linear" in args.only:
        for tokens in (4, 64) if args.small else TOKENS:
            seen: set[tuple[int, int]] = set()
            for model in wanted:
                for out_features, in_features in weights(models[model]):
                    if (out_features, in_features) not in seen:
                        seen.add((out_features, in_features))
                        shape = f"{tokens}x{in_features} -> {out_features}"
                        for what, make in linear_cases(tokens, out_features, in_features, args).items():
                            yield what, model, shape, make
    if "layer" in args.only:
        for model in wanted:
            for what, make in layer_cases(models[model], args).items():
                yield what, model, f"{layer_tokens(args)} tokens", make


def weights(sizes: Sizes) -> list[tuple[int, int]]:
    key = sizes.hidden * sizes.key_heads // sizes.heads
    found = [(sizes.hidden, sizes.hidden), (key, sizes.hidden)]
    return list(dict.fromkeys([*found, (sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)]))


class SparseLinear(nn.Module):
    """A linear of a compressed weight, with or without a low-rank branch."""

    def __init__(self, weight: Tensor, rank: int = 0):
        super().__init__()
        mask = nm.nm_mask(weight.abs(), TWO_FOUR)
        values, indices = nm.pack(weight * mask, mask, TWO_FOUR)
        self.values = nn.Parameter(values)
        self.register_buffer("indices", indices)
        kept = nm.double_prune_mask(weight, mask, TWO_FOUR)
        self.register_buffer("column_mask", nm.pack_column_mask(kept, mask, TWO_FOUR))
        self.rank = rank
        if rank:
            self.down = nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight))
            self.up = nn.Parameter(torch.randn(weight.shape[0], rank).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        ops, weight = torch.ops.fxsparse, (self.values, self.indices, self.column_mask)
        if self.rank:
            return ops.nm_linear_low_rank.default(x, *weight, self.down, self.up, None, 2, 4)
        return ops.nm_linear.default(x, *weight, None, 2, 4)


def linear_cases(
    tokens: int, out_features: int, in_features: int, args: argparse.Namespace
) -> dict[str, Callable[[], dict[str, Run]]]:
    @functools.cache
    def operands() -> tuple[Tensor, Tensor, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=args.device).bfloat16()

        return randn(tokens, in_features), randn(tokens, out_features), randn(out_features, in_features)

    def forward() -> dict[str, Run]:
        x, _, weight = operands()
        dense = torch.compile(lambda x: F.linear(x, weight), options={"max_autotune": not args.small})
        sparse = SparseLinear(weight).requires_grad_(False)
        compiled = torch.compile(sparse, backend="fxsparse")
        rivals: dict[str, Run] = {"dense": no_grad(dense, x), "fxsparse": no_grad(compiled, x)}
        if args.device == "cuda":
            pruned = weight * nm.nm_mask(weight.abs(), TWO_FOUR)
            semi = torch.sparse.to_sparse_semi_structured(pruned)
            rivals["torch semi-structured"] = no_grad(lambda x: F.linear(x, semi), x)
        return rivals

    def low_rank(ratio: float) -> dict[str, Run]:
        x, _, weight = operands()
        rank = max(1, round(ratio * min(weight.shape)))
        fused = SparseLinear(weight, rank).requires_grad_(False)
        apart = SparseLinear(weight).requires_grad_(False)
        down, up = fused.down, fused.up

        def unfused(x: Tensor) -> Tensor:
            return apart(x) + F.linear(F.linear(x, down), up) / rank

        return {
            "unfused": no_grad(torch.compile(unfused, backend="fxsparse"), x),
            "fused": no_grad(torch.compile(fused, backend="fxsparse"), x),
        }

    def gradients() -> dict[str, Run]:
        x, dy, weight = operands()
        x = x.clone().requires_grad_()
        dense_weight = weight.clone().requires_grad_()
        dense = torch.compile(lambda x: F.linear(x, dense_weight))
        sparse = SparseLinear(weight)
        compiled = torch.compile(sparse, backend="fxsparse")
        return {
            "dense": training(dense, x, dy, [dense_weight]),
            "fxsparse": training(compiled, x, dy, [sparse.values]),
        }

    found: dict[str, Callable[[], dict[str, Run]]] = {"forward": forward}
    if tokens >= 64:
        found["forward and both gradients"] = gradients
        found |= {f"low-rank {ratio:.2%}": functools.partial(low_rank, ratio) for ratio in RANKS}
    return found


def no_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return function(x)

    run.compiled = function  # type: ignore[attr-defined]
    return run


def training(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, leaves: list[Tensor]) -> Run:
    def run() -> None:
        function(x).backward(dy)
        for leaf in (x, *leaves):
            leaf.grad = None

    run.compiled = function  # type: ignore[attr-defined]
    return run


def layer_tokens(args: argparse.Namespace) -> int:
    return 64 if args.small else 4096


def model_of(sizes: Sizes, layers: int, args: argparse.Namespace) -> nn.Module:
    common = {"vocab_size": 512, "hidden_size": sizes.hidden, "num_hidden_layers": layers, "use_cache": False}
    common |= {"num_attention_heads": sizes.heads, "max_position_embeddings": 2048}
    if sizes.llama:
        config = transformers.LlamaConfig(
            **common, intermediate_size=sizes.intermediate, num_key_value_heads=sizes.key_heads
        )
        model: nn.Module = transformers.LlamaForCausalLM(config)
    else:
        opt = {"ffn_dim": sizes.intermediate, "word_embed_proj_dim": sizes.hidden, "layerdrop": 0.0}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**common, **opt, dropout=0.0))
    return model.to(args.device, torch.bfloat16)


def layer_cases(sizes: Sizes, args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Run]]]:
    ids = torch.randint(2, 512, (4, layer_tokens(args) // 4), device=args.device)
    sparse = [InsertNMMasks("2:4", keep_first=False), DoublePruneBackward()]
    branches = [*sparse, AddLowRankBranches(ratio=RANKS[0], start=0.0)]

    def step(passes: list[Pass], layers: int = 1) -> Run:
        batch = {"input_ids": ids, "labels": ids}
        gm = fxsparse.rewrite(model_of(sizes, layers, args).train(), passes, kwargs=batch)
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-5, fused=args.device == "cuda")
        fxsparse.Schedule(gm, optimizer, total_steps=1000)
        compiled = torch.compile(gm, backend="fxsparse")

        def run() -> None:
            compiled(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        run.compiled = compiled  # type: ignore[attr-defined]
        return run

    def inference(passes: list[Pass], layers: int = 1) -> Run:
        gm = fxsparse.rewrite(model_of(sizes, layers, args).eval(), passes, kwargs={"input_ids": ids})
        compiled = torch.compile(gm.requires_grad_(False), backend="fxsparse")
        return no_grad(lambda x: compiled(input_ids=x).logits, ids)

    return {
        "training step of a layer": lambda: {
            "dense": step([]),
            "2:4": step(sparse),
            "2:4 + low-rank 1.56 %": step(branches),
            "neurons, half omitted": step([SelectNeurons(omission=0.5)]),
        },
        "inference of a layer": lambda: {"dense": inference([]), "2:4": inference(sparse)},
        "training step of 4 layers": lambda: {
            "dense": step([], 4),
            "half the layers": step([DropLayers("max-gap", fraction=0.5)], 4),
        },
        "inference of 4 layers": lambda: {
            "dense": inference([], 4),
            "half the layers": inference([DropLayers("max-gap", fraction=0.5)], 4),
            "2 inputs in one": inference([Multiplex(2)], 4),
        },
    }


if __name__ == "__main__":
    sys.exit(main())

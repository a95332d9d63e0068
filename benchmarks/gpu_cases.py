"""What `benchmarks.gpu` measures: linears and layers of published models, and what they are compared with."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.lowering import measure, timings
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import Problem
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

Run = Callable[[], object]
Rivals = dict[str, Callable[[], Run]]
"""What makes each rival; the first is what the others are compared with."""


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


@dataclass(frozen=True)
class Case:
    """Rivals at one shape; what, model and shape name it in the table."""

    what: str
    model: str
    shape: str
    rivals: Callable[[], Rivals]

    @property
    def name(self) -> tuple[str, str, str]:
        return self.what, self.model, self.shape


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything that is planned, each shape of a weight once."""
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
                            yield Case(what, model, shape, make)
    if "layer" in args.only:
        for model in wanted:
            for what, rivals in layer_cases(models[model], args).items():
                yield Case(what, model, f"{layer_tokens(args)} tokens", functools.partial(dict, rivals))


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
) -> dict[str, Callable[[], Rivals]]:
    ops = torch.ops.fxsparse

    def operands() -> tuple[Tensor, Tensor, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=args.device).bfloat16()

        return randn(tokens, in_features), randn(tokens, out_features), randn(out_features, in_features)

    def fast(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Run]:
        options: dict[str, Any] = {"max_autotune": not args.small}
        return lambda: no_grad(torch.compile(function, options=options, dynamic=False), x)

    def ours(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Run]:
        return lambda: no_grad(torch.compile(function, backend="fxsparse", dynamic=False), x)

    def choose_by_measuring(op: str, *extra: int) -> None:
        problem = Problem(op, TWO_FOUR, torch.bfloat16, tokens, out_features, in_features, extra)
        if args.device == "cuda" and "reference" not in timings.times(problem, "cuda"):
            measure.measure(problem, "cuda")

    def forward() -> Rivals:
        choose_by_measuring("nm_linear")
        x, _, weight = operands()
        sparse = SparseLinear(weight).requires_grad_(False)
        rivals = {"dense": fast(lambda x: F.linear(x, weight), x), "fxsparse": ours(sparse, x)}
        if args.device == "cuda":
            rivals["torch semi-structured"] = lambda: semi_structured(weight, x)
        return rivals

    def grad_input() -> Rivals:
        choose_by_measuring("nm_linear_grad_input")
        _, dy, weight = operands()
        sparse = SparseLinear(weight).requires_grad_(False)
        given = sparse.values, sparse.indices, sparse.column_mask
        return {
            "dense": fast(lambda dy: dy @ weight, dy),
            "fxsparse": ours(lambda dy: ops.nm_linear_grad_input.default(dy, *given, 2, 4), dy),
        }

    def grad_values() -> Rivals:
        choose_by_measuring("nm_linear_grad_values")
        x, dy, weight = operands()
        indices = SparseLinear(weight).indices
        return {
            "dense": fast(lambda dy: dy.t() @ x, dy),
            "fxsparse": ours(lambda dy: ops.nm_linear_grad_values.default(dy, x, indices, 2, 4), dy),
        }

    def low_rank(ratio: float) -> Rivals:
        x, _, weight = operands()
        rank = max(1, round(ratio * min(weight.shape)))
        choose_by_measuring("nm_linear")
        choose_by_measuring("nm_linear_low_rank", rank)
        fused = SparseLinear(weight, rank).requires_grad_(False)
        apart = SparseLinear(weight).requires_grad_(False)
        down, up = fused.down, fused.up

        def unfused(x: Tensor) -> Tensor:
            return apart(x) + F.linear(F.linear(x, down), up) / rank

        return {
            "dense": fast(lambda x: F.linear(x, weight) + F.linear(F.linear(x, down), up) / rank, x),
            "unfused": ours(unfused, x),
            "fused": ours(fused, x),
        }

    found: dict[str, Callable[[], Rivals]] = {"forward": forward}
    if tokens >= 64:
        found |= {"grad input": grad_input, "grad values": grad_values}
        found |= {f"low-rank {ratio:.2%}": functools.partial(low_rank, ratio) for ratio in RANKS}
    return found


def semi_structured(weight: Tensor, x: Tensor) -> Run:
    """torch's own 2:4 linear, which its Inductor does not fuse anything into."""
    pruned = weight * nm.nm_mask(weight.abs(), TWO_FOUR)
    semi = torch.sparse.to_sparse_semi_structured(pruned)
    return no_grad(lambda x: F.linear(x, semi), x)


def no_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        return function(x)

    run.compiled = function  # type: ignore[attr-defined]
    return run


def layer_tokens(args: argparse.Namespace) -> int:
    return 64 if args.small else 4096


def model_of(sizes: Sizes, layers: int, args: argparse.Namespace) -> nn.Module:
    common: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": layers,
        "use_cache": False,
    }
    common |= {"num_attention_heads": sizes.heads, "max_position_embeddings": 2048}
    if sizes.llama:
        config = transformers.LlamaConfig(
            **common, intermediate_size=sizes.intermediate, num_key_value_heads=sizes.key_heads
        )
        model: nn.Module = transformers.LlamaForCausalLM(config)
    else:
        opt: dict[str, Any] = {"ffn_dim": sizes.intermediate, "word_embed_proj_dim": sizes.hidden, "layerdrop": 0.0}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**common, **opt, dropout=0.0))
    return model.to(args.device, torch.bfloat16)


def layer_cases(sizes: Sizes, args: argparse.Namespace) -> dict[str, Rivals]:
    ids = torch.randint(2, 512, (4, layer_tokens(args) // 4), device=args.device)
    sparse = [InsertNMMasks("2:4", keep_first=False), DoublePruneBackward()]
    branches = [*sparse, AddLowRankBranches(ratio=RANKS[0], start=0.0)]

    def choose_by_measuring(gm: nn.Module, passes: list[Pass]) -> None:
        if args.device == "cuda" and any(isinstance(item, InsertNMMasks) for item in passes):
            fxsparse.tune(gm, rows=[layer_tokens(args)], progress=False)

    def step(passes: list[Pass], layers: int = 1) -> Callable[[], Run]:
        def make() -> Run:
            batch = {"input_ids": ids, "labels": ids}
            gm = fxsparse.rewrite(model_of(sizes, layers, args).train(), passes, kwargs=batch)
            optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-5, fused=args.device == "cuda")
            schedule = fxsparse.Schedule(gm, optimizer, total_steps=1000)
            choose_by_measuring(gm, passes)
            compiled = torch.compile(gm, backend="fxsparse", dynamic=False)

            def run() -> None:
                compiled(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            run.compiled, run.schedule = compiled, schedule  # type: ignore[attr-defined]
            run.state = lambda: nbytes(gm, optimizer)  # type: ignore[attr-defined]
            return run

        return make

    def inference(passes: list[Pass], layers: int = 1) -> Callable[[], Run]:
        def make() -> Run:
            gm = fxsparse.rewrite(model_of(sizes, layers, args).eval(), passes, kwargs={"input_ids": ids})
            choose_by_measuring(gm.requires_grad_(False), passes)
            compiled = torch.compile(gm, backend="fxsparse", dynamic=False)
            run = no_grad(lambda x: compiled(input_ids=x).logits, ids)
            run.compiled, run.state = compiled, lambda: nbytes(gm)  # type: ignore[attr-defined]
            return run

        return make

    half = [DropLayers("max-gap", fraction=0.5)]
    return {
        "training step of a layer": {
            "dense": step([]),
            "2:4": step(sparse),
            "2:4 + low-rank 1.56 %": step(branches),
            "neurons, half omitted": step([SelectNeurons(omission=0.5)]),
        },
        "inference of a layer": {"dense": inference([]), "2:4": inference(sparse)},
        "training step of 4 layers": {"dense": step([], 4), "half the layers": step(half, 4)},
        "inference of 4 layers": {
            "dense": inference([], 4),
            "half the layers": inference(half, 4),
            "2 inputs in one": inference([Multiplex(2)], 4),
        },
    }


def nbytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a model's parameters and buffers and of an optimizer's state."""
    states = [] if optimizer is None else [item for state in optimizer.state.values() for item in state.values()]
    return sum(item.nbytes for item in (*model.parameters(), *model.buffers(), *states) if isinstance(item, Tensor))

"""Every kernel against its dense counterpart and against what the device's bytes and FLOPs allow.

    python -m benchmarks.kernels [--output kernels.md] [--rounds 30] [--tune] [--only nm_linear ...]

Each row is one kernel at one shape: the median time with the 10 % and 90 % quantiles, the same for the dense
counterpart in torch, their ratio, and the share of the limit reached. The limit is the larger of two times: of the
bytes that must be read and written once, and of the FLOPs that are not known to be zero, at the rates measured on the
device itself before (a large copy, a large dense product). Rivals take turns; operands are drawn at random and rotate
through enough copies that none is found in the L2 cache. Without a GPU nothing is measured, and it exits with 1.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import device_microseconds, environment
from fxsparse.codegen import autotune
from fxsparse.codegen.kernels.demux_linear import demux_linear
from fxsparse.codegen.kernels.gather_linear import (
    gather_linear,
    gather_linear_grad_input,
    gather_linear_grad_weight,
)
from fxsparse.codegen.kernels.mux import mux as launch_mux
from fxsparse.codegen.kernels.nm_linear import nm_linear, nm_linear_low_rank
from fxsparse.codegen.kernels.nm_linear_grad_input import nm_linear_grad_input
from fxsparse.codegen.kernels.nm_linear_grad_values import nm_linear_grad_values
from fxsparse.codegen.kernels.nm_prune import nm_prune
from fxsparse.codegen.kernels.nm_transpose import nm_transpose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import (
    sparse_tensor_core_linear,
)
from fxsparse.codegen.metadata import MMA_SP, pack_metadata
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern

TOKENS = (1, 16, 64, 512, 4096)
WEIGHTS = ((1024, 1024), (4096, 4096), (11008, 4096))
"""``(out, in)`` of the weights: BERT-large's, and a 7B decoder's."""

Run = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """A kernel at a shape.

    Attributes:
        kernel, shape: for the table.
        sparse, dense: run with the copy of the operands of a number.
        bytes: that have to be moved.
        flops: that have to be computed.
        tune: runs tuning for this case.
    """

    kernel: str
    shape: str
    sparse: Run
    dense: Run
    bytes: int
    flops: int
    tune: Callable[[], object] | None = None


@dataclass(frozen=True)
class Times:
    """Microseconds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("kernels.md"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tune", action="store_true", help="measure tiles for every shape first and remember the best")
    parser.add_argument("--only", nargs="*", default=[], help="kernels whose names begin so")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels measures on a GPU and this machine has none: nothing was measured.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bandwidth, rate = limits(args.rounds)
    lines = [
        f"{environment()}, triton {_triton_version()}, bfloat16, {args.rounds} rounds",
        f"measured limits: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} dense TFLOP/s",
        "",
        "| kernel | shape | us (10 % - 90 %) | dense us (10 % - 90 %) | dense / sparse | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases():
        if args.only and not any(case.kernel.startswith(name) for name in args.only):
            continue
        if args.tune and case.tune is not None:
            case.tune()
        sparse, dense = interleaved(case.sparse, case.dense, args.rounds)
        limit = 1e6 * max(case.bytes / bandwidth, case.flops / rate)
        lines.append(
            f"| {case.kernel} | {case.shape} | {sparse} | {dense} | {dense.median / sparse.median:.2f} "
            f"| {limit / sparse.median:.0%} |"
        )
        print(lines[-1], flush=True)
    args.output.write_text("\n".join(lines) + "\n")
    print(f"written to {args.output}")
    return 0


# --- measuring --------------------------------------------------------------------------------------------------------


def interleaved(first: Run, second: Run, rounds: int) -> tuple[Times, Times]:
    """Times of two rivals that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-5, rounds):
        for run, spent in zip((first, second), times, strict=True):
            microseconds = device_microseconds(functools.partial(run, turn))
            if turn >= 0:
                spent.append(microseconds)
    return summary(times[0]), summary(times[1])


def summary(times: list[float]) -> Times:
    deciles = statistics.quantiles(times, n=10)
    return Times(statistics.median(times), deciles[0], deciles[-1])


def limits(rounds: int) -> tuple[float, float]:
    """Bytes and FLOPs a second of the device, as torch's own copy and product reach them."""
    source = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = [device_microseconds(lambda: target.copy_(source)) for _ in range(rounds)]
    product = [device_microseconds(lambda: a @ b) for _ in range(rounds)]
    moved = 2 * source.numel() * source.element_size()
    return moved / min(copy) * 1e6, 2 * 8192**3 / min(product) * 1e6


def copies(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Operands often enough that together they are four times the L2 cache."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(min(256, 4 * cache // max(1, size))))]


def _triton_version() -> str:
    import triton

    return triton.__version__


# --- cases ------------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    for out_features, in_features in WEIGHTS:
        for tokens in TOKENS:
            for pattern in (Pattern(2, 4), Pattern(2, 8)):
                yield from products(tokens, out_features, in_features, pattern)
            yield from sparse_tensor_cores(tokens, out_features, in_features)
            yield from gather(tokens, out_features, in_features)
        yield prune(out_features, in_features)
    for members in (2, 10):
        yield mux(members)
        yield demux(members)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def compressed(out_features: int, in_features: int, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense, values, indices, column mask."""
    dense = randn(out_features, in_features)
    mask = nm.nm_mask(dense.abs(), pattern)
    dense = dense * mask
    kept = nm.double_prune_mask(dense, mask, pattern)
    return dense, *nm.pack(dense, mask, pattern), nm.pack_column_mask(kept, mask, pattern)


def products(tokens: int, out_features: int, in_features: int, pattern: Pattern) -> Iterator[Case]:
    n, m = pattern.n, pattern.m
    shape = f"{tokens}x{in_features} -> {out_features}, {pattern}"
    rank = 32

    def make() -> tuple[Tensor, ...]:
        weight = compressed(out_features, in_features, pattern)
        branch = randn(rank, in_features), randn(out_features, rank)
        return randn(tokens, in_features), randn(tokens, out_features), *weight, *branch

    sets = copies(make)
    x, dy, _, values, indices, column_mask, down, up = sets[0]
    kept = values.nbytes + indices.nbytes
    flops = 2 * tokens * values.numel()

    def at(run: Callable[..., object]) -> Run:
        return lambda turn: run(*sets[turn % len(sets)])

    key = autotune.key("nm_linear", tokens, out_features, in_features, "bfloat16", n, m)
    plans = autotune.candidates("nm_linear", tokens, tall=out_features > in_features)
    yield Case(
        "nm_linear",
        shape,
        at(lambda x, dy, w, v, i, c, d, u: nm_linear(x, v, i, None, None, n, m)),
        at(lambda x, dy, w, v, i, c, d, u: x @ w.t()),
        x.nbytes + dy.nbytes + kept,
        flops,
        lambda: autotune.measure(key, lambda plan: nm_linear(x, values, indices, None, None, n, m, plan=plan), plans),
    )
    yield Case(
        f"nm_linear_low_rank, rank {rank}",
        shape,
        at(lambda x, dy, w, v, i, c, d, u: nm_linear_low_rank(x, v, i, None, d, u, None, n, m, 1.0)),
        at(lambda x, dy, w, v, i, c, d, u: torch.addmm(x @ w.t(), x @ d.t(), u.t())),
        x.nbytes + dy.nbytes + kept + down.nbytes + up.nbytes,
        flops + 2 * tokens * (down.numel() + up.numel()),
    )
    yield Case(
        "nm_linear_grad_input",
        shape,
        at(lambda x, dy, w, v, i, c, d, u: nm_linear_grad_input(dy, v, i, c, n, m)),
        at(lambda x, dy, w, v, i, c, d, u: dy @ w),
        x.nbytes + dy.nbytes + kept + column_mask.nbytes,
        flops,
    )
    yield Case(
        "nm_linear_grad_values",
        shape,
        at(lambda x, dy, w, v, i, c, d, u: nm_linear_grad_values(dy, x, i, n, m)),
        at(lambda x, dy, w, v, i, c, d, u: dy.t() @ x),
        x.nbytes + dy.nbytes + kept,
        flops,
    )


def sparse_tensor_cores(tokens: int, out_features: int, in_features: int) -> Iterator[Case]:
    shape = f"{tokens}x{in_features} -> {out_features}, 2:4"
    pattern = Pattern(2, 4)

    def make() -> tuple[Tensor, ...]:
        dense, values, indices, column_mask = compressed(out_features, in_features, pattern)
        x, dy = randn(tokens, in_features), randn(tokens, out_features)
        return x, dy, dense, values, pack_metadata(indices), indices, column_mask

    sets = copies(make)
    x, dy, _, values, metadata, *_ = sets[0]
    moved, flops = x.nbytes + dy.nbytes + values.nbytes + metadata.nbytes, 2 * tokens * values.numel()

    def at(run: Callable[..., object]) -> Run:
        return lambda turn: run(*sets[turn % len(sets)])

    yield Case(
        "sparse_tensor_core_linear",
        shape,
        at(lambda x, dy, w, v, e, i, c: sparse_tensor_core_linear(x, v, e, None)),
        at(lambda x, dy, w, v, e, i, c: x @ w.t()),
        moved,
        flops,
    )
    yield Case(
        "sparse_tensor_core_grad_input",
        shape,
        at(
            lambda x, dy, w, v, e, i, c: sparse_tensor_core_linear(dy, *nm_transpose(v, i, c, MMA_SP), None),
        ),
        at(lambda x, dy, w, v, e, i, c: dy @ w),
        moved,
        flops,
    )


def gather(tokens: int, out_features: int, in_features: int) -> Iterator[Case]:
    chosen = torch.randperm(out_features, device="cuda")[: out_features // 2]
    sets = copies(
        lambda: (randn(tokens, in_features), randn(tokens, len(chosen)), randn(out_features, in_features)),
    )
    x, dy, weight = sets[0]
    half = weight.nbytes // 2
    moved, flops = x.nbytes + dy.nbytes + half, 2 * tokens * len(chosen) * in_features

    def at(run: Callable[..., object]) -> Run:
        return lambda turn: run(*sets[turn % len(sets)])

    def scattered(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
        return torch.zeros_like(w).index_copy_(0, chosen, dy.t() @ x)

    products: dict[str, tuple[Callable[..., object], Callable[..., object], int]] = {
        "gather_linear": (
            lambda x, dy, w: gather_linear(x, w, chosen, None, None),
            lambda x, dy, w: F.linear(x, w[chosen]),
            moved,
        ),
        "gather_linear_grad_input": (
            lambda x, dy, w: gather_linear_grad_input(dy, w, chosen, None),
            lambda x, dy, w: dy @ w[chosen],
            moved,
        ),
        "gather_linear_grad_weight": (
            lambda x, dy, w: gather_linear_grad_weight(dy, x, chosen, None, out_features, in_features),
            scattered,
            moved + half,  # the rows that were not chosen are written too
        ),
    }
    shape = f"{tokens}x{in_features} -> half of {out_features}"
    for name, (sparse, dense, size_moved) in products.items():
        yield Case(name, shape, at(sparse), at(dense), size_moved, flops)


def prune(out_features: int, in_features: int) -> Case:
    pattern = Pattern(2, 4)
    sets = copies(lambda: (randn(out_features, in_features),))
    weight = sets[0][0]

    def plain(turn: int) -> object:
        dense = sets[turn % len(sets)][0]
        return nm.pack(dense, nm.nm_mask(dense.abs(), pattern), pattern)

    return Case(
        "nm_prune",
        f"{out_features}x{in_features}, 2:4",
        lambda turn: nm_prune(sets[turn % len(sets)][0], 2, 4),
        plain,
        weight.nbytes + weight.nbytes // 2 + weight.numel() // 8,
        0,
    )


def mux(members: int) -> Case:
    sets = copies(lambda: (randn(32 * members, 128, 768), randn(members, 768)))
    x, keys = sets[0]

    def plain(turn: int) -> object:
        x, keys = sets[turn % len(sets)]
        return (x.view(32, members, 128, 768) * keys[:, None]).mean(1)

    moved = x.nbytes + keys.nbytes + x.nbytes // members
    return Case(
        "mux",
        f"{members} x 32x128x768",
        lambda turn: launch_mux(*sets[turn % len(sets)], members),
        plain,
        moved,
        2 * x.numel(),
    )


def demux(members: int) -> Case:
    sets = copies(lambda: (randn(32, 128, 768), randn(members, 768), randn(768, 1536), randn(768)))
    h, keys, weight, _ = sets[0]

    def plain(turn: int) -> object:
        h, keys, weight, bias = sets[turn % len(sets)]
        pairs = [keys[:, None].expand(32, members, 128, 768), h[:, None].expand(-1, members, -1, -1)]
        return F.gelu(F.linear(torch.cat(pairs, -1), weight, bias))

    moved = h.nbytes * (1 + members) + keys.nbytes + weight.nbytes
    return Case(
        "demux_linear",
        f"{members} x 32x128x768",
        lambda turn: demux_linear(*sets[turn % len(sets)], steps=["gelu"]),
        plain,
        moved,
        2 * h.numel() * 768,
    )


if __name__ == "__main__":
    sys.exit(main())

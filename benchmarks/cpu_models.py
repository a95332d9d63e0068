"""Whole models on a CPU: a SLoPe training step of a transformer block, and ``generate()`` of a Llama of 0.5 B; and what
calls and copies cost.

`benchmarks.cpu` runs these after the products; each case is a few lines of a report. Models take turns: a training step
against the dense block under Inductor, and tokens a second of the pruned Llama against the same weights run dense,
eager and under Inductor. Memory is counted from the tensors that stay between steps or calls.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from benchmarks.generation import generators, sparse_llama
from benchmarks.timing import Times, interleaved
from fxsparse.graph.runtime_state import _table as followed
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import DoublePruneBackward, InsertNMMasks

HIDDEN, TOKENS, HEADS = 1024, 2048, 16
EVERY = {"keep_first": False, "keep_head": False}
Clock = Callable[[], float]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        parts = (part(h).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for part in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def training_steps(rounds: int, clock: Clock) -> Iterator[str]:
    """A step of forward, backward and AdamW; storages and patterns against dense."""
    x = torch.randn(4, TOKENS // 4, HIDDEN)
    masks = {
        "2:4": InsertNMMasks("2:4", **EVERY),
        "2:8": InsertNMMasks("2:8", **EVERY),
        "2:4 masked": InsertNMMasks("2:4", storage="masked", **EVERY),
    }
    torch.manual_seed(0)
    block = Block()
    steps, state = {}, {}
    for name in ("dense", *masks):
        passes = [] if name == "dense" else [masks[name], DoublePruneBackward()]
        gm = fxsparse.rewrite(copy.deepcopy(block), passes, (x,))
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-4)
        compiled = torch.compile(gm, backend="inductor" if name == "dense" else "fxsparse")
        steps[name] = _step(compiled, optimizer, x)
        steps[name]()
        state[name] = _bytes(gm, optimizer)
    times = interleaved(steps, rounds=rounds, clock=clock)
    for name in steps:
        if name != "dense":
            share = state[name] / state["dense"]
            faster = _faster(times, "dense", name)
            yield f"training step, {name}: {faster}, weights and AdamW's state {share:.3f} of dense"


def _step(compiled: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bytes(gm: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of weights, masks and indices, and the optimizer's state, whatever else is kept for them included."""
    tensors = {id(tensor): tensor for tensor in (*gm.parameters(), *gm.buffers())}
    states = [item for entry in optimizer.state.values() for item in entry.values() if isinstance(item, Tensor)]
    return sum(tensor.nbytes for tensor in (*tensors.values(), *states))


def generation(dtype: torch.dtype, rounds: int, clock: Clock, *, tokens: int = 32, layers: int = 24) -> Iterator[str]:
    """Tokens a second of a Llama of 0.5 B parameters whose linears are 2:4, the head dense."""
    model = sparse_llama(
        dtype, hidden_size=1280, intermediate_size=3456, num_hidden_layers=layers, num_attention_heads=20,
        num_key_value_heads=20, vocab_size=32000,
    )  # fmt: skip
    runs = generators(model, {"eager": None, "inductor": "inductor", "fxsparse": "fxsparse"}, tokens)
    times = interleaved(runs, rounds=rounds, warmup=1, clock=clock)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    name = str(dtype).removeprefix("torch.")
    speeds = ", ".join(f"{each} {tokens / taken.median:.1f}" for each, taken in times.items())
    yield f"generate(), {count:.2f} B Llama, {name}: tokens a second {speeds}"
    for other in ("eager", "inductor"):
        yield f"generate(), {name}, against {other}: {_faster(times, other, 'fxsparse')}"
    dense = sum(parameter.nbytes for parameter in model.parameters())
    copies = sum(
        tensor.nbytes
        for entry in followed.values()
        for _, tensors in entry.followed.values()
        for tensor in tensors or ()
    )
    yield f"generate(), {name}: {dense / 2**30:.2f} GiB of weights, {copies / 2**30:.2f} GiB more of compressed ones"


def _faster(times: dict[str, Times], dense: str, ours: str) -> str:
    middle, low, high = times[dense].ratio(times[ours])
    return f"{middle:.2f} ({low:.2f} - {high:.2f}) times as fast"


def gathered_rows(rounds: int, clock: Clock) -> Iterator[str]:
    """What a kernel for ``gather_linear`` could save: the time to copy two thirds of a weight's rows, and to spread a
    gradient of them over the whole weight, over that of the product which they are copied for or come from."""
    for dtype, (shape, tokens) in itertools.product(
        (torch.float32, torch.bfloat16), (((4096, 1024), 256), ((4096, 1024), 2048), ((3072, 768), 1024))
    ):
        weight, x = torch.randn(shape, dtype=dtype), torch.randn(tokens, shape[1], dtype=dtype)
        rows = torch.randperm(shape[0])[: shape[0] * 2 // 3].sort().values
        some, dy = weight[rows], torch.randn(tokens, len(rows), dtype=dtype)
        runs: dict[str, Callable[[], object]] = {
            "copy": lambda: weight.index_select(0, rows),  # noqa: B023
            "product": lambda: F.linear(x, some),  # noqa: B023
            "spread": lambda: torch.zeros_like(weight).index_copy_(0, rows, some),  # noqa: B023
            "gradient": lambda: dy.t() @ x,  # noqa: B023
        }
        times = interleaved(runs, rounds=rounds, clock=clock)
        copied = times["copy"].median / times["product"].median
        spread = times["spread"].median / times["gradient"].median
        name = f"{shape[0]}x{shape[1]}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        yield f"rows of {name}: copied in {copied:.3f} of their product, spread in {spread:.3f} of the gradient's"


def host_costs(calls: int = 500) -> Iterator[str]:
    """Microseconds to call one small linear under Inductor, with a kernel and dense: products of next to no work.

    Called often in one graph, so that entering the graph does not count.
    """
    from fxsparse.backend import extern_kernels
    from fxsparse.codegen.cpu import extern, operators
    from fxsparse.ops import nm

    pattern = Pattern(2, 4)
    weight = torch.randn(32, 32)
    mask = nm_mask(weight.abs(), pattern)
    values, indices = nm.pack(weight, mask, pattern)
    kernel = operators.kernel_of("nm_linear", torch.float32, (2, 4))
    if extern.obstacle() is None:
        extern_kernels.register()  # as the backend does

    def chain(one: Callable[[Tensor], Tensor], count: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for _ in range(count):
                x = one(x)
            return x

        return torch.compile(run, backend="inductor")

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "kernel": lambda x: torch.ops.fxsparse_cpu.linear.default(x, values, indices, None, kernel),
        "aten.linear": lambda x: F.linear(x, weight),
    }
    x, taken = torch.randn(2, 32), {}
    with torch.no_grad():
        runs = {(name, count): chain(one, count) for name, one in ways.items() for count in (1, 41)}
        timed = {key: (lambda run=run: [run(x) for _ in range(calls)]) for key, run in runs.items()}  # type: ignore[misc]
        times = interleaved({str(key): run for key, run in timed.items()}, rounds=9)
    for name in ways:
        more = times[str((name, 41))].median - times[str((name, 1))].median
        taken[name] = more / calls / 40 * 1e6
    yield (
        f"host cost of a linear of 2 x 32 x 32 under Inductor: kernel {taken['kernel']:.1f} us, aten.linear "
        f"{taken['aten.linear']:.1f} us ({taken['kernel'] / taken['aten.linear']:.2f})"
    )

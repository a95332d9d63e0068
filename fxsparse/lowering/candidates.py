"""The implementations of one product, on random operands: what measuring lets meet (`fxsparse.lowering.measure`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxsparse.codegen import autotune as tile_tuning
from fxsparse.codegen import fused_ops as _fused  # noqa: F401  registers operators
from fxsparse.codegen import tiles
from fxsparse.codegen.metadata import pack_metadata
from fxsparse.codegen.operators import launch_of
from fxsparse.lowering.choose import (
    CUSPARSELT,
    DENSE,
    OPERATOR,
    REFERENCE,
    SPARSE_TENSOR_CORES,
    no_cusparselt,
    no_sparse_tensor_cores,
)
from fxsparse.lowering.estimates import Work
from fxsparse.lowering.sites import Site
from fxsparse.ops import nm
from fxsparse.ops.define import DECOMPOSITIONS, has_kernel

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Rivals:
    """What can run a product.

    Attributes:
        makers: by the implementation's name, what makes its runs: one by that name, or variants with what tells them
            apart behind a colon.
        exact: the right result, in a wider type.
        result: takes the product's result out of what the dense baseline gives.
    """

    makers: dict[str, Callable[[], dict[str, Run]]]
    exact: Tensor
    result: Callable[[Tensor], Tensor]


def rivals(work: Work, device: str, *, compile_reference: bool = True, until: float | None = None) -> Rivals:
    """The implementations of a product.

    Args:
        work: the product.
        device: device type.
        compile_reference: also the reference, as Inductor compiles it.
        until: of ``time.monotonic``; then no further tile of a kernel is tried.
    """
    args, baseline, result = operands(work, device)
    operator = getattr(torch.ops.fxsparse, work.op).default
    reference = DECOMPOSITIONS[operator]
    # On many GPUs float64 takes longer than all the rest.
    wide = torch.float32 if work.dtype.itemsize == 2 else torch.float64
    exact = reference(*(arg.to(wide) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args))
    makers: dict[str, Callable[[], dict[str, Run]]] = {}
    if baseline is not None:
        makers[DENSE] = lambda: {DENSE: baseline}
    if compile_reference:
        makers[REFERENCE] = lambda: {REFERENCE: as_inductor_compiles(reference, args)}
    if has_kernel(work.op, device):
        makers[OPERATOR] = lambda: _operator(work, args, until)
    shape, inference = (work.out_features, work.in_features), work.op == "nm_linear"
    site = Site(work.op, device, work.dtype, shape, work.pattern, work.rows, frozen=inference, inference=inference)
    if inference and no_sparse_tensor_cores(site) is None:
        makers[SPARSE_TENSOR_CORES] = lambda: _sparse_tensor_cores(args)
    if inference and no_cusparselt(site) is None:
        makers[CUSPARSELT] = lambda: _library(work, args)
    return Rivals(makers, exact, result)


def operands(work: Work, device: str) -> tuple[tuple[Any, ...], Run | None, Callable[[Tensor], Tensor]]:
    """Random arguments of an operator, what is computed where nothing is sparse if it can be compared with that, and
    what takes the operator's result out of it."""
    generator = torch.Generator(device).manual_seed(0)  # its own: training that waits for this draws as if nothing was

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(work.dtype)

    def some(count: int, size: int) -> Tensor | None:
        chosen = torch.randperm(size, device=device, generator=generator)[:count].sort().values
        return None if count == size else chosen

    op, rows, out, features, further = work.op, work.rows, work.out_features, work.in_features, work.further
    if op.startswith("gather_linear"):
        x, dy, weight = randn(rows, features), randn(rows, out), randn(*further)
        chosen = some(out, further[0]), some(features, further[1])
        by_op: dict[str, tuple[Any, ...]] = {
            "gather_linear": (x, weight, *chosen, None),
            "gather_linear_grad_input": (dy, weight, *chosen),
            "gather_linear_grad_weight": (dy, x, *chosen, *further),
        }
        return by_op[op], None, _whole
    if op == "mux":
        members, length = further
        return (
            (randn(max(1, rows // length) * members, length, features), randn(members, features), members),
            None,
            _whole,
        )
    if op == "demux_linear":
        members, key_dim, length = further
        h, keys = randn(max(1, rows // length), length, features), randn(members, key_dim)
        return (h, keys, randn(out, key_dim + features), None), None, _whole
    assert work.pattern is not None, f"{op} has no pattern"
    x, dy, pattern = randn(rows, features), randn(rows, out), work.pattern
    dense = randn(out, features)
    mask = nm.nm_mask(dense.abs(), pattern)
    dense = dense * mask
    values, indices = nm.pack(dense, mask, pattern)
    n, m = pattern.n, pattern.m
    if op == "nm_linear":
        return (x, values, indices, None, None, n, m), lambda: F.linear(x, dense), _whole
    if op == "nm_linear_low_rank":
        down, up = randn(further[0], features), randn(out, further[0])
        args = (x, values, indices, None, down, up, None, n, m, 1.0)
        return args, lambda: F.linear(x, dense) + F.linear(F.linear(x, down), up), _whole
    if op == "nm_linear_grad_input":
        return (dy, values, indices, None, n, m), lambda: dy @ dense, _whole
    if op == "nm_linear_grad_values":
        return (dy, x, indices, n, m), lambda: dy.t() @ x, lambda grad: nm.gather_kept(grad, indices, pattern)
    raise NotImplementedError(f"{op} has one implementation")


def _whole(result: Tensor) -> Tensor:
    return result


def as_inductor_compiles(function: Callable[..., Tensor], args: tuple[Any, ...]) -> Run:
    """A reference as it runs inside a compiled graph. Works within a compilation too, and past Dynamo, which would give
    up compiling one function for many shapes."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]

    def of_tensors(*given: Tensor) -> Tensor:
        rest = iter(given)
        return function(*(next(rest) if isinstance(arg, Tensor) else arg for arg in args))

    with _outside_of_compilation():
        compiled = torch._inductor.compile(make_fx(of_tensors)(*tensors), [*tensors])

    def run() -> Tensor:
        result = compiled(*tensors)
        return result[0] if isinstance(result, (tuple, list)) else result

    return run


@contextlib.contextmanager
def _outside_of_compilation() -> Iterator[None]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with torch._guards.tracing(None), unset_fake_temporarily(), torch.no_grad():
        yield


def _operator(work: Work, args: tuple[Any, ...], until: float | None) -> dict[str, Run]:
    operator = getattr(torch.ops.fxsparse, work.op).default
    tune_tiles(work, args, until)
    return {OPERATOR: lambda: operator(*args)}


def _sparse_tensor_cores(args: tuple[Any, ...]) -> dict[str, Run]:
    metadata, linear = pack_metadata(args[2]), torch.ops.fxsparse.sparse_tensor_core_linear.default
    return {SPARSE_TENSOR_CORES: lambda: linear(args[0], args[1], metadata, None, "", [])}


def _library(work: Work, args: tuple[Any, ...]) -> dict[str, Run]:
    """cuSPARSELt's algorithms."""
    x, values, indices = args[:3]
    packed = torch._cslt_compress(nm.unpack(values, indices, nm.Pattern(2, 4), work.in_features))
    linear = torch.ops.fxsparse.cusparselt_linear.default

    def run(how: tuple[int, int, int]) -> Run:
        return lambda: linear(x, packed, None, work.out_features, *how)

    found = library_algorithms(packed, work.rows, work.in_features)
    return {f"{CUSPARSELT}:{'/'.join(map(str, how))}": run(how) for how in found}


def library_algorithms(packed: Tensor, rows: int, in_features: int) -> list[tuple[int, int, int]]:
    """What to try as cuSPARSELt's algorithm, number of parts of the depth and way to add them: each algorithm with the
    depth whole, and what the library's own search finds."""
    # Its search changes what its algorithm 0 is for the same sizes from then on, hence other ones.
    other = torch.ones(-(-rows // 16) * 16 + 16, in_features, dtype=packed.dtype, device=packed.device)
    search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
    alg_id, split_k, split_k_mode, count = map(int, search(packed, other.t(), None, None, None, True))
    own = [(number, 1, -1) for number in range(max(1, count))]
    return own if split_k == 1 else [*own, (alg_id, split_k, split_k_mode)]


def tune_tiles(work: Work, args: tuple[Any, ...], until: float | None = None) -> None:
    """Finds the best tile of a product's kernel, so that rivals meet at their best."""
    pattern, rows, out, features = work.pattern, work.rows, work.out_features, work.in_features
    forward, backward = (rows, out, features), (rows, features, out)
    sizes = {
        "nm_linear": ("nm_linear", forward),
        "nm_linear_low_rank": ("nm_linear_low_rank", forward),
        "nm_linear_grad_input": ("nm_linear_grad_input", backward),
        "nm_linear_grad_values": ("nm_linear_grad_values", forward),
        "gather_linear": ("gather_linear", forward),
        "gather_linear_grad_input": ("gather_linear", backward),
        "gather_linear_grad_weight": ("gather_linear_grad_weight", forward),
        "demux_linear": ("demux_linear", forward),
    }
    if not args[0].is_cuda or work.op not in sizes:
        return
    run = launch_of(work.op)
    kernel, size = sizes[work.op]
    dtype = str(work.dtype).removeprefix("torch.")
    tall = out > features and kernel in ("nm_linear", "nm_linear_low_rank")
    plans = tile_tuning.candidates(kernel, rows, dtype, tall=tall)
    if len(plans) > 1:
        key = tile_tuning.key(kernel, *size, dtype, *((pattern.n, pattern.m) if pattern is not None else ()))
        tile_tuning.measure(key, lambda plan: run(*args, plan=plan), _while_there_is_time(plans, until))


def _while_there_is_time(plans: list[tiles.Plan], until: float | None) -> Iterator[tiles.Plan]:
    for count, plan in enumerate(plans):
        if count == 0 or until is None or time.monotonic() < until:
            yield plan

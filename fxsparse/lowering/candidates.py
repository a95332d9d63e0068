"""The implementations of one product, on random operands: what measuring compares (`fxsparse.lowering.measure`).

The operator's record gives the operands, the dense baseline and the reference. A candidate is a function without
arguments that runs the product once; an implementation with variants (cuSPARSELt's algorithms) gives one for each.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxsparse.codegen import autotune as tile_tuning
from fxsparse.codegen import tiles
from fxsparse.codegen.cpu import operators as cpu
from fxsparse.codegen.fused_ops import INSTRUCTIONS, cusparselt_linear, sparse_transpose
from fxsparse.codegen.metadata import PACK
from fxsparse.codegen.operators import launch_of
from fxsparse.lowering import choose
from fxsparse.lowering.fusion import ON_SPARSE_TENSOR_CORES
from fxsparse.lowering.sites import Site
from fxsparse.ops import nm
from fxsparse.ops.define import has_kernel
from fxsparse.ops.operator import (
    CUSPARSELT,
    DENSE,
    OPERATOR,
    OPERATORS,
    REFERENCE,
    SPARSE_TENSOR_CORES,
    SPARSE_WGMMA,
    Operands,
    Problem,
    Random,
    operator_name,
)

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Candidates:
    """What can run a product.

    Attributes:
        makers: by the implementation's name, what makes its runs: one by that name, or variants with what tells them
            apart behind a colon.
        exact: the right result, in a wider type.
        result: takes the product's result out of what a dense product gives.
        dense: the names of those that are one.
    """

    makers: dict[str, Callable[[], dict[str, Run]]]
    exact: Tensor
    result: Callable[[Tensor], Tensor]
    dense: frozenset[str] = frozenset({DENSE})


def candidates_for(
    problem: Problem, device: str, *, compile_reference: bool = True, until: float | None = None
) -> Candidates:
    """The implementations of a product.

    Args:
        problem: the product.
        device: device type.
        compile_reference: also the reference, as Inductor compiles it, or where there is a C++ kernel the least that it
            does: compiling it takes long on a CPU.
        until: of ``time.monotonic``; then no other tile of a kernel is tried.
    """
    operands, reference = random_operands(problem, device), OPERATORS[problem.op].reference
    args, dense = operands.args, operands.dense
    shape, inference = (problem.out_features, problem.in_features), problem.op == "nm_linear"
    site = Site(
        problem.op,
        device,
        problem.dtype,
        shape,
        problem.pattern,
        problem.rows,
        frozen=inference,
        inference=inference,
    )
    is_cpp = choose.is_cpp(site) and choose.no_kernel(site) is None
    makers: dict[str, Callable[[], dict[str, Run]]] = {}
    if dense is not None:
        makers[DENSE] = lambda: {DENSE: dense}
    like_dense = {DENSE}
    if compile_reference and is_cpp and dense is not None:
        makers[REFERENCE] = functools.partial(_least, problem, dense)
        like_dense.add(REFERENCE)
    elif compile_reference:
        makers[REFERENCE] = lambda: {REFERENCE: as_inductor_compiles(reference, args)}
    if is_cpp:
        makers[OPERATOR] = lambda: _cpp(problem, args)
    elif has_kernel(problem.op, device):
        makers[OPERATOR] = lambda: _operator(problem, args, until)
    if choose.no_sparse_tensor_cores(site) is None:
        makers[SPARSE_TENSOR_CORES] = lambda: _on_cores(problem.op, SPARSE_TENSOR_CORES, args)
    if choose.no_sparse_wgmma(site) is None:
        makers[SPARSE_WGMMA] = lambda: _on_cores(problem.op, SPARSE_WGMMA, args)
    if inference and choose.no_cusparselt(site) is None:
        makers[CUSPARSELT] = lambda: _library(problem, args)
    return Candidates(makers, _exact(problem, operands, is_cpp), operands.result, frozenset(like_dense))


def _least(problem: Problem, dense: Run) -> dict[str, Run]:
    """The least that a reference does: a dense product, and one pass over the dense weight that it expands or whose
    gradient it takes values from."""
    weight = torch.ones(problem.out_features, problem.in_features, dtype=problem.dtype)
    expanded = torch.empty_like(weight)

    def run() -> Tensor:
        expanded.copy_(weight)
        return dense()

    return {REFERENCE: run}


def _exact(problem: Problem, operands: Operands, is_cpp: bool) -> Tensor:
    """The right result, in a wider type; on a CPU, where that takes long, in float by a dense product."""
    if is_cpp and operands.dense is not None:
        return operands.result(operands.dense()).float()
    # On many GPUs float64 takes longer than all the rest.
    wide = torch.float32 if problem.dtype.itemsize == 2 else torch.float64
    args = (arg.to(wide) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in operands.args)
    exact: Tensor = OPERATORS[problem.op].reference(*args)
    return exact


def random_operands(problem: Problem, device: str) -> Operands:
    """Random arguments of a product.

    Raises:
        NotImplementedError: its operator has one implementation.
    """
    draw = OPERATORS[problem.op].operands
    if draw is None:
        raise NotImplementedError(f"{problem.op} has one implementation")
    return draw(problem, Random(problem.dtype, device))


def as_inductor_compiles(function: Callable[..., Tensor], args: tuple[Any, ...]) -> Run:
    """A reference as it runs inside a compiled graph. Works within a compilation too, and past Dynamo, which would give
    up compiling one function for many shapes."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]

    def of_tensors(*replaced: Tensor) -> Tensor:
        rest = iter(replaced)
        return function(*(next(rest) if isinstance(arg, Tensor) else arg for arg in args))

    with _outside_of_compilation():
        compiled = torch._inductor.compile(make_fx(of_tensors, tracing_mode="fake")(*tensors), [*tensors])

    def run() -> Tensor:
        result = compiled(*tensors)
        return result[0] if isinstance(result, (tuple, list)) else result

    return run


@contextlib.contextmanager
def _outside_of_compilation() -> Iterator[None]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with torch._guards.tracing(None), unset_fake_temporarily(), torch.no_grad():
        yield


def _operator(problem: Problem, args: tuple[Any, ...], until: float | None) -> dict[str, Run]:
    tune_tiles(problem, args, until)
    return {OPERATOR: lambda: OPERATORS[problem.op](*args)}


def _cpp(problem: Problem, args: tuple[Any, ...]) -> dict[str, Run]:
    """The C++ kernel, called as compiled graphs call it, with each tile that may be the best."""
    names = [argument.name for argument in OPERATORS[problem.op].overload._schema.arguments]
    named, runs = dict(zip(names, args, strict=False)), dict[str, Run]()
    for tile in cpu.tiles(problem.op, problem.dtype, problem.rows):
        call, direct = cpu.direct(
            problem.op, named, cpu.kernel_of(problem.op, problem.dtype, (problem.nm.n, problem.nm.m), tile)
        )
        runs[f"{OPERATOR}:{tile}"] = functools.partial(call, *direct)
    return runs


def _on_cores(op: str, name: str, args: tuple[Any, ...]) -> dict[str, Run]:
    """A product on sparse tensor cores: a linear, or the gradient of an input, which makes its transpose every time."""
    linear = ON_SPARSE_TENSOR_CORES[name, op == "nm_linear_low_rank"]
    instruction = INSTRUCTIONS[operator_name(linear) or ""]
    x, values, indices, column_mask, *rest = args
    if op == choose.GRAD_INPUT:
        return {name: lambda: linear(x, *sparse_transpose(values, indices, column_mask, instruction), None, "", [])}
    metadata = PACK[instruction](indices)
    if op == "nm_linear_low_rank":
        down, up, bias, _, _, scale = rest
        return {name: lambda: linear(x, values, metadata, down, up, bias, scale, "", [])}
    return {name: lambda: linear(x, values, metadata, None, "", [])}


def _library(problem: Problem, args: tuple[Any, ...]) -> dict[str, Run]:
    """cuSPARSELt's algorithms."""
    x, values, indices = args[:3]
    packed = torch._cslt_compress(nm.unpack(values, indices, nm.Pattern(2, 4), problem.in_features))

    def run(how: tuple[int, int, int]) -> Run:
        return lambda: cusparselt_linear(x, packed, None, problem.out_features, *how)

    algorithms = library_algorithms(packed, problem.rows, problem.in_features)
    return {f"{CUSPARSELT}:{'/'.join(map(str, how))}": run(how) for how in algorithms}


def library_algorithms(packed: Tensor, rows: int, in_features: int) -> list[tuple[int, int, int]]:
    """What to try as cuSPARSELt's algorithm, number of parts of the depth and way to add them: each algorithm with the
    depth whole, and what the library's own search finds."""
    # Its search changes what its algorithm 0 is for the same sizes from then on, hence other ones.
    other = torch.ones(-(-rows // 16) * 16 + 16, in_features, dtype=packed.dtype, device=packed.device)
    search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
    alg_id, split_k, split_k_mode, count = map(int, search(packed, other.t(), None, None, None, True))
    whole = [(number, 1, -1) for number in range(max(1, count))]
    return whole if split_k == 1 else [*whole, (alg_id, split_k, split_k_mode)]


def tune_tiles(problem: Problem, args: tuple[Any, ...], until: float | None = None) -> None:
    """Finds the best tile of a product's kernel, so that candidates are compared at their best."""
    shape = OPERATORS[problem.op].tiles
    if shape is None or not args[0].is_cuda:
        return
    run = launch_of(problem.op)
    dtype, pattern = str(problem.dtype).removeprefix("torch."), problem.pattern
    tall = shape.square and problem.out_features > problem.in_features
    hopper = tile_tuning.is_hopper(args[0].device)
    plans = tile_tuning.candidates(shape.kernel, problem.rows, dtype, tall=tall, hopper=hopper)
    if len(plans) > 1:
        n, m = (None, None) if pattern is None else (pattern.n, pattern.m)
        key = tile_tuning.key(shape.kernel, *shape.sizes(problem), dtype, n, m)
        tile_tuning.measure(key, lambda plan: run(*args, plan=plan), _while_there_is_time(plans, until))


def _while_there_is_time(plans: list[tiles.Plan], until: float | None) -> Iterator[tiles.Plan]:
    for count, plan in enumerate(plans):
        if count == 0 or until is None or time.monotonic() < until:
            yield plan

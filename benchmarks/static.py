"""What the kernels of 2:4 linears should give, from their machine code: no GPU is needed.

    python -m benchmarks.static [--output static.md] [--only sparse_wgmma_linear ...] [--capabilities 80 90]

First each shipped kernel as compiled: registers, spills, shared memory and the instructions of its main loop by class.
Then the linears of OPT-13B and Llama-3-8B at 1 to 4096 tokens on an A100, an H100 and an H200: blocks, bytes in flight
on a multiprocessor, what bounds the kernel, and the time of a dense product over its time, as `static_model` predicts.
At last a training step of the linears (`static_step`). No number here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.static_model import MACHINES, Kernel, Prediction, predict
from benchmarks.static_step import LINEARS, on_ampere, on_hopper, table_of_steps
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels.demux_linear import DemuxLinear
from fxsparse.codegen.kernels.gather_linear import GatherLinear
from fxsparse.codegen.kernels.mux import Mux
from fxsparse.codegen.kernels.nm_linear import LARGEST_RANK_INSIDE, NMLinear
from fxsparse.codegen.kernels.nm_linear_grad_input import NMGradInput
from fxsparse.codegen.kernels.nm_linear_grad_values import NMGradValues
from fxsparse.codegen.kernels.nm_prune import NMPrune
from fxsparse.codegen.kernels.nm_transpose import NMTranspose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import SPARSE, SparseTensorCoreLinear
from fxsparse.codegen.kernels.sparse_wgmma_linear import WGMMA, SparseWgmmaLinear
from fxsparse.codegen.metadata import MMA_SP, PACK
from fxsparse.codegen.sass import CLASSES, OTHER
from fxsparse.codegen.spec import Spec
from fxsparse.codegen.tiles import HOPPER, LARGE, SHIPPED, SMALL, regime

TOKENS = (1, 16, 64, 512, 4096)
LARGE_WITH_STEPS = "large with steps"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("static.md"))
    parser.add_argument("--only", nargs="*", default=[], help="kernels whose names begin so")
    parser.add_argument("--capabilities", nargs="*", type=int, default=[80, 90])
    args = parser.parse_args(arguments)
    lines = [title(), ""]
    tables = table_of_kernels(args.only, args.capabilities), table_of_linears(args.capabilities), table_of_steps()
    for line in itertools.chain.from_iterable((*table, "") for table in tables):
        print(line, flush=True)
        lines.append(line)
    args.output.write_text("\n".join(lines) + "\n")
    print(f"written to {args.output}")
    return 0


def title() -> str:
    import triton

    return f"Predicted from machine code, not measured: triton {triton.__version__}, bfloat16, 2:4"


def shipped(capability: int) -> Iterator[Spec]:
    """Kernels of 2:4 linears with their default tiles, as they run on sizes that are multiples of the tiles'."""
    for tile in SHIPPED["nm_linear"].values():
        yield NMLinear("bfloat16", tile, 2, 4, even=True)
    for tile in SHIPPED["nm_linear_grad_input"].values():
        yield NMGradInput("bfloat16", tile, 2, 4, column_mask=True, even=True)
    for tile in (SHIPPED["nm_linear_grad_values"][LARGE], *([HOPPER["nm_linear_grad_values"]] * (capability == 90))):
        yield NMGradValues("bfloat16", tile, 2, 4, even=True)
    for instruction in PACK if capability == 90 else (MMA_SP,):
        yield NMTranspose("bfloat16", SHIPPED["nm_transpose"][LARGE], 2, 4, instruction)
    yield from others()
    for name, shape in SPARSE.items():
        steps = Epilogue(True, ("gelu",)) if name == LARGE_WITH_STEPS else Epilogue()
        yield SparseTensorCoreLinear("bfloat16", *shape, steps)
    if capability == 90:
        for tile in WGMMA.values():
            yield SparseWgmmaLinear("bfloat16", tile, split=tile.rows <= 64)


def others() -> Iterator[Spec]:
    """Kernels of products that the report predicts no times of."""
    for name, tile in SHIPPED["nm_linear_low_rank"].items():
        branch = ("inside", LARGEST_RANK_INSIDE) if name == SMALL else ("after", 32)
        yield NMLinear("bfloat16", tile, 2, 4, True, *branch)
    yield NMPrune("bfloat16", SHIPPED["nm_prune"][LARGE], 2, 4)
    for product, columns in itertools.product(("forward", "grad_input", "grad_weight"), (False, True)):
        kernel = "gather_linear_grad_weight" if product == "grad_weight" else "gather_linear"
        for block in (1, 64):
            tile = SHIPPED[kernel][LARGE]
            yield GatherLinear("bfloat16", tile, product, rows=not columns, columns=columns, block=block)
    yield DemuxLinear("bfloat16", SHIPPED["demux_linear"][LARGE], members=5)
    yield Mux("bfloat16", SHIPPED["mux"][LARGE], members=5)


def table_of_kernels(only: list[str], capabilities: list[int]) -> Iterator[str]:
    classes = [*CLASSES, OTHER]
    yield f"| kernel | tile | sm | registers | spills | shared | loop | {' | '.join(classes)} |"
    yield "|---" * (7 + len(classes)) + "|"
    for capability in capabilities:
        for spec in shipped(capability):
            if only and not any(spec.name.startswith(name) for name in only):
                continue
            kernel = Kernel.of(spec, capability)
            used, found = kernel.resources, kernel.loop.by_class()
            counts = " | ".join(str(found[kind]) for kind in classes)
            yield (
                f"| {spec.name} | {spec.tile} | {capability} | {used.registers} | {used.spills} | {used.shared} "
                f"| {len(kernel.loop.instructions)} | {counts} |"
            )


def table_of_linears(capabilities: list[int]) -> Iterator[str]:
    yield "| device | linear | tokens | kernel | blocks | KB in flight | bound | predicted us | dense / this |"
    yield "|---" * 9 + "|"
    for machine in (machine for machine in MACHINES if machine.capability in capabilities):
        for (name, (columns, depth)), rows in itertools.product(LINEARS.items(), TOKENS):
            for kernel, found in predictions(machine.name, rows, columns, depth):
                yield (
                    f"| {machine.name} | {name} | {rows} | {kernel} | {found.blocks} | {found.in_flight / 1024:.0f} "
                    f"| {found.bound} | {found.microseconds:.1f} | {found.ratio:.2f} |"
                )


def predictions(device: str, rows: int, columns: int, depth: int) -> Iterator[tuple[str, Prediction]]:
    """Of every kernel that runs a linear on a device, with what it runs there by default."""
    machine = next(machine for machine in MACHINES if machine.name == device)
    size, name = (rows, columns, depth), regime(rows)
    plain = NMLinear("bfloat16", SHIPPED["nm_linear"][name], 2, 4, even=True)
    yield "nm_linear", predict(Kernel.of(plain, machine.capability), machine, size)
    yield "sparse_tensor_core_linear", on_ampere(machine, size)
    if machine.capability == 90:
        yield "sparse_wgmma_linear", on_hopper(machine, size)


if __name__ == "__main__":
    sys.exit(main())

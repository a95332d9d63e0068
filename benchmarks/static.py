"""What the kernels of 2:4 linears should give, from their machine code: no GPU is needed.

    python -m benchmarks.static [--output static.md] [--only sparse_wgmma_linear ...] [--capabilities 80 90]

First each shipped kernel as compiled: registers, spills, shared memory and the instructions of its main loop by class.
Then the linears of OPT-13B and Llama-3-8B at 1 to 4096 tokens on an A100, an H100 and an H200: blocks, bytes in flight
on a multiprocessor, what bounds the kernel, and the time of a dense product over its time, as `static_model` predicts.
No number here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.static_model import MACHINES, Kernel, Prediction, predict
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels.nm_linear import NMLinear
from fxsparse.codegen.kernels.nm_linear_grad_input import NMGradInput
from fxsparse.codegen.kernels.nm_linear_grad_values import NMGradValues
from fxsparse.codegen.kernels.sparse_tensor_core_linear import SPARSE, SparseTensorCoreLinear, parts_of
from fxsparse.codegen.kernels.sparse_wgmma_linear import WGMMA, SparseWgmmaLinear, split
from fxsparse.codegen.sass import CLASSES, OTHER
from fxsparse.codegen.spec import Spec
from fxsparse.codegen.tiles import SHIPPED, regime

LINEARS = {
    "OPT-13B q,k,v,o": (5120, 5120),
    "OPT-13B fc1": (20480, 5120),
    "OPT-13B fc2": (5120, 20480),
    "Llama-3-8B q,o": (4096, 4096),
    "Llama-3-8B k,v": (1024, 4096),
    "Llama-3-8B gate,up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
}
TOKENS = (1, 16, 64, 512, 4096)
LARGE_WITH_STEPS = "large with steps"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("static.md"))
    parser.add_argument("--only", nargs="*", default=[], help="kernels whose names begin so")
    parser.add_argument("--capabilities", nargs="*", type=int, default=[80, 90])
    args = parser.parse_args(arguments)
    lines = [title(), ""]
    for line in (*table_of_kernels(args.only, args.capabilities), "", *table_of_linears(args.capabilities)):
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
    for tile in SHIPPED["nm_linear_grad_values"].values():
        yield NMGradValues("bfloat16", tile, 2, 4, even=True)
    for name, shape in SPARSE.items():
        steps = Epilogue(True, ("gelu",)) if name == LARGE_WITH_STEPS else Epilogue()
        yield SparseTensorCoreLinear("bfloat16", *shape, steps)
    if capability == 90:
        for tile in WGMMA.values():
            yield SparseWgmmaLinear("bfloat16", tile, split=tile.rows <= 64)


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
    tile = SPARSE[name][0]
    tiles, steps = -(-rows // tile.rows) * -(-columns // tile.columns), -(-depth // tile.depth)
    parts = parts_of(tiles, steps, machine.multiprocessors)
    cores = SparseTensorCoreLinear("bfloat16", *SPARSE[name], split=parts > 1)
    yield "nm_linear", predict(Kernel.of(plain, machine.capability), machine, size)
    yield "sparse_tensor_core_linear", predict(Kernel.of(cores, machine.capability), machine, size, parts)
    if machine.capability == 90:
        way = split(rows, columns, depth, machine.multiprocessors)
        wgmma = SparseWgmmaLinear("bfloat16", WGMMA[way.rows], split=way.rows <= 64)
        yield "sparse_wgmma_linear", predict(Kernel.of(wgmma, 90), machine, size, parts=way.parts)


if __name__ == "__main__":
    sys.exit(main())

"""Compiles kernels ahead of time for a given GPU, and reads how many registers and how much shared memory they use.

Triton's wheel carries NVIDIA's assembler and its inspection tools, so a machine without a GPU or CUDA suffices.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.spec import Spec

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use, by compute capability (A100 and H100; CUDA programming guide)."""


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a compiled kernel.

    Attributes:
        registers: a thread.
        spills: instructions that move a register that did not fit to or from local memory.
        shared: bytes of shared memory.
    """

    registers: int
    spills: int
    shared: int


def compile_for(spec: Spec, capability: int, *, aligned: bool = True) -> Any:
    """Compiles a spec's kernel.

    Args:
        spec: of the kernel.
        capability: 80 for an A100, 90 for an H100.
        aligned: pointers and sizes are multiples of 16, as Triton finds them to be at most launches.

    Returns:
        Triton's compiled kernel: ``asm["ptx"]``, ``asm["cubin"]``, ``metadata``.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    function = kernel(spec).function
    types = spec.types()
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(types.values())
        if aligned and kind != "fp32" and not kind.startswith("tensordesc")
    }
    options = {"num_warps": spec.tile.warps}
    if spec.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source

        options["num_stages"] = spec.tile.stages
    origin = Source(fn=function, signature=types, constexprs={}, attrs=attributes)
    compiled = triton.compile(origin, target=GPUTarget("cuda", capability, 32), options=options)
    spec.check(compiled.asm["ptx"])
    return compiled


def resources(compiled: Any) -> Resources:
    """Resources of a compiled kernel, read from its binary."""
    usage = _inspect(compiled, "cuobjdump", "--dump-resource-usage")
    sizes = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if sizes is None:
        raise RuntimeError(f"cuobjdump tells no registers: {usage}")
    registers, *local = map(int, sizes.groups())
    # Spills need local memory; where there is none, disassembling would take as long as compiling did.
    assembly = disassemble(compiled) if any(local) else ""
    return Resources(registers, len(re.findall(r"\b(?:LDL|STL)\b", assembly)), compiled.metadata.shared)


def disassemble(compiled: Any) -> str:
    """The machine code of a compiled kernel as text."""
    return _inspect(compiled, "nvdisasm", "-c", "-ndf")


def _inspect(compiled: Any, tool: str, *arguments: str) -> str:
    """What a tool of Triton's wheel says of a compiled kernel's binary."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(path), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

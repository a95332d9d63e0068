"""A training step of a linear with a doubly pruned 2:4 weight, as the model of `static_model` predicts it.

    forward          pack metadata from the indices, product on sparse tensor cores
    gradient of x    make the transpose of W^{R,C}, product on sparse tensor cores
    gradient of W    a dense product of which only kept positions are stored
    Adam             half of the weights, gradients and moments

against three dense products and Adam on all weights. Weights and gradients are bfloat16, moments float32. What is
around linears (attention, norms, the loss) takes as long in both and is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.static_model import MACHINES, Kernel, Machine, Prediction, dense, one_pass, pointwise, predict
from fxsparse.codegen.kernels.nm_linear_grad_values import NMGradValues
from fxsparse.codegen.kernels.nm_transpose import NMTranspose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import SPARSE, SparseTensorCoreLinear, parts_of
from fxsparse.codegen.kernels.sparse_wgmma_linear import WGMMA, SparseWgmmaLinear, split
from fxsparse.codegen.metadata import MMA_SP, WGMMA_SP
from fxsparse.codegen.tiles import HOPPER, LARGE, SHIPPED, regime

LINEARS = {
    "OPT-13B q,k,v,o": (5120, 5120),
    "OPT-13B fc1": (20480, 5120),
    "OPT-13B fc2": (5120, 20480),
    "Llama-3-8B q,o": (4096, 4096),
    "Llama-3-8B k,v": (1024, 4096),
    "Llama-3-8B gate,up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
}
STEP_TOKENS = (4096, 16384)

ADAM = 22.0
"""Bytes a weight that Adam moves: weight, gradient and two moments read, weight and moments written."""
TRANSPOSE = 2.3125
"""Bytes a weight that making the transpose moves: half of the values, a nibble and two bits for four, and all but the
bits again."""


def on_ampere(machine: Machine, size: tuple[int, int, int]) -> Prediction:
    """A product by ``mma.sp``."""
    rows, columns, depth = size
    shape = SPARSE[regime(rows)]
    tiles = -(-rows // shape[0].rows) * -(-columns // shape[0].columns)
    parts = parts_of(tiles, -(-depth // shape[0].depth), machine.multiprocessors)
    spec = SparseTensorCoreLinear("bfloat16", *shape, split=parts > 1)
    return predict(Kernel.of(spec, machine.capability), machine, size, parts)


def on_hopper(machine: Machine, size: tuple[int, int, int]) -> Prediction:
    """A product by ``wgmma.sp``."""
    way = split(*size, machine.multiprocessors)
    spec = SparseWgmmaLinear("bfloat16", WGMMA[way.rows], split=way.rows <= 64)
    return predict(Kernel.of(spec, 90), machine, size, parts=way.parts)


@dataclass(frozen=True)
class Step:
    """Microseconds of the parts of a step.

    Attributes:
        forward, grad_input, grad_values, adam: of the sparse one; the transpose is a part of ``grad_input``.
        transpose: that part.
        dense: of the dense one: forward, gradient of the input and of the weight, Adam.
    """

    forward: float
    grad_input: float
    grad_values: float
    adam: float
    transpose: float
    dense: tuple[float, float, float, float]

    @property
    def products(self) -> float:
        """Time of the dense products over that of the sparse ones."""
        return sum(self.dense[:3]) / (self.forward + self.grad_input + self.grad_values)

    @property
    def ratio(self) -> float:
        """The same of the whole step."""
        return sum(self.dense) / (self.forward + self.grad_input + self.grad_values + self.adam)


def step(machine: Machine, tokens: int, columns: int, depth: int) -> Step:
    """A step of a linear of ``columns`` outputs and ``depth`` inputs."""
    hopper, weights = machine.capability == 90, columns * depth
    product = on_hopper if hopper else on_ampere
    forward, grad_input, grad_values = (tokens, columns, depth), (tokens, depth, columns), (columns, depth, tokens)
    instruction = WGMMA_SP if hopper else MMA_SP
    turning = Kernel.of(NMTranspose("bfloat16", SHIPPED["nm_transpose"][LARGE], 2, 4, instruction), machine.capability)
    transpose = one_pass(turning, machine, columns, depth, TRANSPOSE)
    tile = (HOPPER if hopper else {}).get("nm_linear_grad_values", SHIPPED["nm_linear_grad_values"][LARGE])
    values = Kernel.of(NMGradValues("bfloat16", tile, 2, 4, even=True), machine.capability)
    return Step(
        forward=product(machine, forward).microseconds + pointwise(machine, weights / 4),
        grad_input=product(machine, grad_input).microseconds + transpose,
        grad_values=predict(values, machine, grad_values).microseconds,
        adam=pointwise(machine, weights * ADAM / 2),
        transpose=transpose,
        dense=(
            dense(machine, forward),
            dense(machine, grad_input),
            dense(machine, grad_values),
            pointwise(machine, weights * ADAM),
        ),
    )


def table_of_steps() -> Iterator[str]:
    columns = "forward", "gradient of x", "with a transpose of", "gradient of W", "products", "with Adam"
    yield f"| device | linear | tokens | {' | '.join(columns)} |"
    yield "|---" * (3 + len(columns)) + "|"
    for machine, (name, size), tokens in itertools.product(MACHINES, LINEARS.items(), STEP_TOKENS):
        found = step(machine, tokens, *size)
        forward, grad_input, grad_values, _ = found.dense
        yield (
            f"| {machine.name} | {name} | {tokens} | {forward / found.forward:.2f} "
            f"| {grad_input / found.grad_input:.2f} | {found.transpose:.0f} us | {grad_values / found.grad_values:.2f} "
            f"| {found.products:.2f} | {found.ratio:.2f} |"
        )

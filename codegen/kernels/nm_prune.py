"""Mask search and compression in one pass: the n best of every m weights, as values and packed indices.

A weight is kept if fewer than n of its group come before it: those of a higher score, and those of an equal score at a
lower index. A NaN counts as infinity, as in ``fxsparse.ops.nm.nm_mask``. No operator stands before this kernel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.launching import device_of, dtype_of, rows_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.spec import DTYPES, Argument, NMSpec, Tile
from fxsparse.codegen.template import fill, join, module, optional, planes
from fxsparse.codegen.tiles import LARGE, SHIPPED
from fxsparse.errors import OptionError

SHIPPED["nm_prune"] = {LARGE: Tile(16, 128, 1, warps=4, stages=1)}


@dataclass(frozen=True)
class NMPrune(NMSpec):
    """The kernel; its tile's rows are along N and its columns along K.

    Attributes:
        score: dtype of the scores; or ``"magnitude"``, and there are no scores but the absolute values of the weights.
    """

    score: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score != "magnitude" and self.score not in DTYPES:
            raise OptionError(f"score={self.score!r} is neither magnitude nor one of {', '.join(DTYPES)}")

    @property
    def name(self) -> str:
        return f"nm_prune_{self.n}_{self.m}_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        scores = () if self.score == "magnitude" else (Argument("scores", f"*{DTYPES[self.score]}"),)
        tensors = (
            Argument("weight", self.pointer),
            *scores,
            Argument("values", self.pointer),
            Argument("indices", "*u8"),
        )
        strides = (Argument(f"{tensor.name}_stride", "i32") for tensor in tensors)
        return (*tensors, Argument("N", "i32"), Argument("K", "i32"), *strides)

    def render(self) -> str:
        n, m = self.n, self.m
        with_scores = self.score != "magnitude"
        return module(
            self,
            title=f"values and indices of the best {n} of every {m} weights by {self.score} score, {self.dtype}.",
            text=fill(_TEXT, n=str(n), m=str(m), bits=str(self.index_bits)),
            constants={"N_TILE": self.tile.rows, "K_TILE": self.tile.columns, "GROUPS": self.tile.columns // m},
            functions=[],
            body=fill(
                _BODY,
                n=str(n),
                m=str(m),
                bits=str(self.bits),
                dtype=self.dtype,
                load_scores=optional(with_scores, _LOAD_SCORES),
                score="score" if with_scores else "tl.abs(tile.to(tl.float32))",
                weights=planes(f"tile.to(tl.uint{self.bits}, bitcast=True)", m, "w"),
                scores=planes("score", m, "s"),
                ranks=self._ranks(),
                slots=self._slots(),
                kept=join([f"v{j}" for j in range(n)]),
                word=" | ".join(f"(p{j} << {self.index_bits * j})" if j else "p0" for j in range(n)),
                store_indices=self._store_indices(),
            ),
        )

    def _ranks(self) -> str:
        """Whether fewer than n of its group come before each weight, 0 or 1."""
        terms: list[list[str]] = [[] for _ in range(self.m)]
        lines = []
        for i, j in itertools.combinations(range(self.m), 2):
            lines.append(f"c{i}{j} = (s{i} >= s{j}).to(tl.int32)")
            terms[j].append(f"c{i}{j}")
            terms[i].append(f"(1 - c{i}{j})")
        return "\n".join([*lines, *(f"k{i} = ({' + '.join(terms[i])} < {self.n}).to(tl.int32)" for i in range(self.m))])

    def _slots(self) -> str:
        """Which kept value each weight is, n for none; and the position and value of each kept one."""
        lines = []
        for i in range(self.m):
            before = " + ".join(f"k{earlier}" for earlier in range(i)) or "0"
            lines.append(f"o{i} = tl.where(k{i} != 0, {before}, {self.n})")
        for j in range(self.n):
            lines += [f"p{j} = tl.full((N_TILE, GROUPS), {j}, tl.int32)", f"v{j} = w{j}"]
            for i in range(j + 1, self.m - self.n + j + 1):
                lines += [f"p{j} = tl.where(o{i} == {j}, {i}, p{j})", f"v{j} = tl.where(o{i} == {j}, w{i}, v{j})"]
        return "\n".join(lines)

    def _store_indices(self) -> str:
        bits = self.n * self.index_bits
        count = max(1, 8 // bits)
        if bits == 16:
            lines = ["packed = tl.reshape(tl.join(word & 255, word >> 8), (N_TILE, GROUPS * 2))"]
            tile, first, end = "GROUPS * 2", "group * 2", "groups * 2"
        elif count == 1:
            lines, tile, first, end = ["packed = word"], "GROUPS", "group", "groups"
        else:
            tile, first, end = f"GROUPS // {count}", f"group // {count}", f"(groups + {count - 1}) // {count}"
            terms = " | ".join(f"(b{i} << {bits * i})" if i else "b0" for i in range(count))
            lines = [planes("word", count, "b", f"N_TILE, {tile}"), f"packed = {terms}"]
        lines += [
            f"byte = {first} + tl.arange(0, {tile})",
            "tl.store(",
            "    indices + rows[:, None] * indices_stride + byte[None, :],",
            "    packed.to(tl.uint8),",
            f"    mask=exists & (byte < {end})[None, :],",
            ")",
        ]
        return "\n".join(lines)


_TEXT = """
weight [N, K] and its scores, of which the n highest of a group are kept, the lower index first among equals;
values [N, K / $m * $n] in order; indices [N, bytes], $bits bits a kept value, lowest bits first, zeros at the end.
"""

_LOAD_SCORES = """
score = tl.load(scores + rows[:, None] * scores_stride + columns[None, :], mask=present, other=0.0).to(tl.float32)
"""

_BODY = """
rows = tl.program_id(0).to(tl.int64) * N_TILE + tl.arange(0, N_TILE)
columns = tl.program_id(1) * K_TILE + tl.arange(0, K_TILE)
exists = (rows < N)[:, None]
present = exists & (columns < K)[None, :]
tile = tl.load(weight + rows[:, None] * weight_stride + columns[None, :], mask=present, other=0.0)
$load_scores
score = $score
score = tl.where(score == score, score, float("inf"))
$weights
$scores
$ranks
$slots
group = tl.program_id(1) * GROUPS
groups = K // $m
place = group * $n + tl.arange(0, GROUPS * $n)
kept = tl.reshape($kept, (N_TILE, GROUPS * $n)).to(tl.$dtype, bitcast=True)
tl.store(
    values + rows[:, None] * values_stride + place[None, :], kept, mask=exists & (place < groups * $n)[None, :]
)
valid = (group + tl.arange(0, GROUPS) < groups)[None, :]
word = tl.where(valid, $word, 0)
$store_indices
"""


def nm_prune(
    weight: Tensor, n: int, m: int, scores: Tensor | None = None, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Keeps the n best of every m weights and compresses them, reading the weight once.

    Args:
        weight: ``[out, in]``; ``in`` is a multiple of m.
        n, m: the pattern.
        scores: ``[out, in]``; the weights' magnitudes unless given.
        tile: instead of the tuned or default one.

    Returns:
        values ``[out, in * n / m]`` and indices, uint8, as ``fxsparse.ops.nm.pack`` gives them.

    Raises:
        OptionError: there is no kernel for the pattern or a dtype, or ``in`` is not a multiple of m.
    """
    rows, columns = weight.shape
    if columns % m:
        raise OptionError(f"{columns} columns are not a multiple of {m}, as {n}:{m} needs")
    tile = tile or autotune.plan("nm_prune", rows, rows, columns, weight, n, m).tile
    spec = NMPrune(dtype_of(weight), tile, n, m, "magnitude" if scores is None else dtype_of(scores))
    values = weight.new_empty(rows, columns // m * n)
    row_bytes = -(-values.shape[1] * spec.index_bits // 8)
    indices = torch.empty(rows, row_bytes, dtype=torch.uint8, device=weight.device)
    tensors = [rows_of(weight), *([] if scores is None else [rows_of(scores)]), values, indices]
    if values.numel():
        grid = (-(-rows // tile.rows), -(-columns // tile.columns))
        with device_of(weight):
            kernel(spec).launch(grid, *tensors, rows, columns, *(tensor.stride(0) for tensor in tensors))
    return values, indices

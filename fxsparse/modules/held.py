"""What all modules with a weight in another form share: the form, the tensors that hold it, and its dense values.

The tensors of a weight ``w`` are registered beside it under the names that they have in a rewritten graph, so that
checkpoints and optimizers of the two fit each other:

    compressed   w_values, w_indices        masked   w, w_mask        dense   w
    and, with a second pruning, w_column_mask; with a low-rank branch w_down and w_up
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.ops.nm import Pattern, unpack

PARTS = ("values", "indices", "mask", "column_mask", "down", "up")
"""What stands behind the name of a weight in the names of its tensors."""


@dataclass(frozen=True)
class Form:
    """The form in which a module holds a weight.

    Attributes:
        name: of the weight in the graph that the module was made from; it stays when the module moves.
        storage: ``compressed``, ``masked``, or ``dense``, which has a low-rank branch.
        out_features, in_features: of the weight.
        n, m: of the pattern; 0 where the weight is dense.
        transposed: whether the original is stored ``[in, out]``.
        straight_through: whether pruned weights get a gradient (SR-STE).
        rank: of the low-rank branch; 0 without one.
        started: whether the branch takes part.
        experts: how many matrices the weight holds, one for each expert; 0 if it is no weight of experts.
    """

    name: str
    storage: str
    out_features: int
    in_features: int
    n: int = 0
    m: int = 0
    transposed: bool = False
    straight_through: bool = False
    rank: int = 0
    started: bool = False
    experts: int = 0

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape in front of that of a matrix: ``(experts,)``, or nothing."""
        return (self.experts,) if self.experts else ()

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the original weight."""
        matrix = (self.out_features, self.in_features)
        return (*self.matrices, *(matrix[::-1] if self.transposed else matrix))

    @property
    def pattern(self) -> Pattern:
        """n of every m are kept, along the input dimension; only of a weight that is not dense."""
        return Pattern(self.n, self.m)

    def shapes(self, leaf: str) -> Iterator[tuple[str, tuple[int, ...], torch.dtype | None]]:
        """Name, shape and dtype of every tensor of a weight called ``leaf``; the dtype of parameters is None."""
        rows = (*self.matrices, self.out_features)
        if self.storage == "compressed":
            yield f"{leaf}_values", (*rows, self.pattern.kept(self.in_features)), None
            yield f"{leaf}_indices", (*rows, self.pattern.index_bytes(self.in_features)), torch.uint8
        else:
            yield leaf, self.dense_shape, None
        if self.storage == "masked":
            yield f"{leaf}_mask", (*rows, self.in_features), torch.bool
        if self.rank:
            yield f"{leaf}_down", (self.rank, self.in_features), None
            yield f"{leaf}_up", (self.out_features, self.rank), None

    def column_mask(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the column mask of such a weight."""
        if self.storage == "compressed":
            kept = self.pattern.kept(self.in_features)
            return (self.out_features, -(-kept // 8)), torch.uint8
        return (self.out_features, self.in_features), torch.bool

    def as_data(self) -> dict[str, Any]:
        """The form as plain data; ``Form(**data)`` is its inverse."""
        return asdict(self)


class Held(nn.Module):
    """Base of the modules that hold weights in another form.

    Attributes:
        forms: the form of each weight, by its attribute name, such as ``weight``.
    """

    forms: dict[str, Form]

    def part(self, leaf: str, part: str) -> Tensor | None:
        """The tensor ``<leaf>_<part>``; None if this form has none."""
        name = f"{leaf}_{part}"
        tensor = self._parameters.get(name)
        return self._buffers.get(name) if tensor is None else tensor

    def start(self, leaf: str) -> None:
        """Lets the low-rank branch of a weight take part."""
        self.forms = {**self.forms, leaf: replace(self.forms[leaf], started=True)}

    def dense(self, leaf: str) -> Tensor:
        """The weight as the module applies it, with its branch, in the original's layout; differentiable."""
        form = self.forms[leaf]
        if form.storage == "compressed":
            values, indices = self.part(leaf, "values"), self.part(leaf, "indices")
            assert values is not None and indices is not None
            weight = unpack(values, indices, form.pattern, form.in_features)
        else:
            stored = self._parameters[leaf]
            assert stored is not None
            weight = stored.mT if form.transposed else stored
            mask = self.part(leaf, "mask")
            if mask is not None:
                kept = torch.where(mask, weight, 0)
                weight = weight + (kept - weight).detach() if form.straight_through else kept
        if form.started:
            down, up = self.part(leaf, "down"), self.part(leaf, "up")
            assert down is not None and up is not None
            weight = weight + (up @ down) / form.rank
        return weight.mT if form.transposed else weight


def register(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Registers parameters and buffers by their names."""
    for name, tensor in tensors.items():
        if tensor is None or isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)


def describe(form: Form, *, double_pruned: bool) -> str:
    """A form in words, for ``repr``."""
    matrices = f"{form.experts} x " if form.experts else ""
    words = [f"{matrices}{form.pattern} {form.storage}"] if form.m else []
    if double_pruned:
        words.append("double-pruned backward")
    if form.straight_through:
        words.append("dynamic mask")
    if form.rank:
        words.append(f"rank={form.rank}{'' if form.started else ' (not started)'}")
    return ", ".join(words)

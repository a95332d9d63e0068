"""Which pipelines plain torch is an oracle for, and that oracle: `tests.support.composed` for the models drawn here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.graph.record import record_of
from fxsparse.graph.trainable import trainable, trained
from fxsparse.passes import (
    DistillLayers,
    DoublePruneBackward,
    DropDimensions,
    GateStructures,
    InsertNMMasks,
    Multiplex,
    Pass,
    PruneOperands,
    SelectNeurons,
)
from tests.fuzz.models import Model, Spec, loss_and_logits
from tests.support import composed
from tests.support.composed import Linear, Oracle, Site, norms_of
from tests.support.oracle import masks_of

NAME = "fuzz"
composed.BLOCKS[NAME] = ("blocks",)


def is_covered(spec: Spec, passes: list[Pass]) -> bool:
    """Whether the oracle says what a model becomes."""
    if spec.attention == "mha" or spec.dtype == "bfloat16" or spec.dropout or spec.sharing != "none":
        return False
    if spec.frozen == "all but head" and spec.head_of != "own":  # perhaps nothing trains
        return False
    return all(map(_pass_is_covered, passes))


def _pass_is_covered(item: Pass) -> bool:
    if isinstance(item, (PruneOperands, Multiplex)):
        return False
    if isinstance(item, InsertNMMasks):
        plain = item.criterion == "magnitude" and not item.transposable
        return item.dense_after == 1 and item.criterion != "sparsegpt" and (plain or not item.dynamic)
    if isinstance(item, DoublePruneBackward):
        return item.pattern is None and not item.permutations
    if isinstance(item, (GateStructures, DropDimensions)):
        return "hidden" not in item.units
    if isinstance(item, SelectNeurons):
        return not item.rescale
    if isinstance(item, DistillLayers):
        others = item.attention or item.embedding or item.teacher_layers
        return item.matching == "dynamic" and item.projection == "none" and not others
    return True


class FuzzOracle(Oracle):
    """Takes as facts which masks a random or transposable choice has, which layers are dropped and what is frozen."""

    spec: Spec
    was_trained: dict[str, bool]

    def _nm_masks(self, item: Any, gm: GraphModule) -> None:
        before = {name for name, linear in self.linears.items() if linear.pattern is not None}
        super()._nm_masks(item, gm)
        if item.criterion == "magnitude" and not item.transposable:
            return
        for held in record_of(gm).weights:
            if held.name not in before:
                mask = masks_of(gm, held)[0].to(self.linears[held.name].mask.dtype)
                self.linears[held.name].mask = self.linears[held.name]._spread(mask)

    def _drop_layers(self, item: Any, gm: GraphModule) -> None:
        entry = next(entry for entry in record_of(gm).entries if entry.text == str(item))
        gone = {int(change.site.rpartition(".")[2]) for change in entry.rewritten}
        super()._drop_layers(_Indices(gone), gm)

    def _select_tensors(self, item: Any, gm: GraphModule) -> None:
        self.rho = item.rho is not None
        self.frozen = set(trainable(gm)) - set(trained(gm))  # a branch that has not started is neither

    def _recompute(self, item: Any, gm: GraphModule) -> None:
        """Changes nothing of what is computed."""

    def run(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return loss_and_logits(self.spec, self.model(**batch))

    def _is_frozen(self, name: str) -> bool:
        return super()._is_frozen(name) or not self.was_trained.get(name, True)


class _Indices:
    def __init__(self, indices: set[int]):
        self.indices = indices


def oracle_of(model: Model, sites: Mapping[str, Site], gm: GraphModule) -> FuzzOracle:
    """The composed model that the rewritten ``gm`` stands for."""
    copied = copy.deepcopy(model).train()
    norms = norms_of(copied, sites)
    oracle = FuzzOracle(NAME, copied, dict(sites), originals=dict(copied.named_parameters()), norms=norms)
    oracle.spec = model.spec
    oracle.was_trained = {name: parameter.requires_grad for name, parameter in copied.named_parameters()}
    for path, module in list(copied.named_modules()):
        if isinstance(module, nn.Linear):
            oracle.linears[f"{path}.weight"] = linear = Linear(module.weight, module.bias)
            copied.set_submodule(path, linear)
    oracle.apply(gm)
    return oracle

"""Rewrites of the training-IR graph, one file each."""

from fxsparse.passes.base import Pass
from fxsparse.passes.distill import DistillLayers, EndDistillation
from fxsparse.passes.double_prune import DoublePruneBackward
from fxsparse.passes.drop_dims import DropDimensions
from fxsparse.passes.drop_layers import DropLayers
from fxsparse.passes.event import Event
from fxsparse.passes.gates import GateStructures
from fxsparse.passes.low_rank import AddLowRankBranches
from fxsparse.passes.materialize import Materialize
from fxsparse.passes.multiplex import Multiplex
from fxsparse.passes.nm_masks import InsertNMMasks
from fxsparse.passes.pipeline import Pipeline
from fxsparse.passes.select_neurons import SelectNeurons
from fxsparse.passes.select_tensors import SelectTensors
from fxsparse.record import Change, rewrote, skipped

__all__ = [
    "AddLowRankBranches",
    "Change",
    "DistillLayers",
    "DoublePruneBackward",
    "DropDimensions",
    "DropLayers",
    "EndDistillation",
    "Event",
    "GateStructures",
    "InsertNMMasks",
    "Materialize",
    "Multiplex",
    "Pass",
    "Pipeline",
    "SelectNeurons",
    "SelectTensors",
    "rewrote",
    "skipped",
]

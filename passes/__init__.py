"""Rewrites of the training-IR graph, one file each."""

from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.passes.base import Pass
from fxsparse.passes.distill.distill import DistillLayers, EndDistillation
from fxsparse.passes.drop_layers import DropLayers
from fxsparse.passes.event import Event
from fxsparse.passes.mux.multiplex import Multiplex
from fxsparse.passes.neurons.select_neurons import SelectNeurons
from fxsparse.passes.nm.double_prune import DoublePruneBackward
from fxsparse.passes.nm.low_rank import AddLowRankBranches
from fxsparse.passes.nm.masks import InsertNMMasks
from fxsparse.passes.nm.prune_operands import PruneOperands
from fxsparse.passes.pipeline import Pipeline
from fxsparse.passes.recompute import Recompute
from fxsparse.passes.select_tensors import SelectTensors
from fxsparse.passes.structured.drop_dims import DropDimensions
from fxsparse.passes.structured.gates import GateStructures
from fxsparse.passes.structured.materialize import Materialize

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
    "PruneOperands",
    "Recompute",
    "SelectNeurons",
    "SelectTensors",
    "rewrote",
    "skipped",
]

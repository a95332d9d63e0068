"""Data multiplexing: N inputs share one pass through the core of a network (DataMUX, arXiv 2202.09318; MUX-PLM,
arXiv 2302.12441; ensembles of one input in several slots).

    embeddings -> mux: N rows become one -> repeated core at batch / N -> demux: one row becomes N -> head

Rows g N, ..., g N + N - 1 of a batch form group g. The members of a group influence each other: an output depends on
the other inputs in its group. That costs accuracy, and if a group mixes users, one user's output can carry traces of
another's input; form groups of one user's inputs if that matters. Attention in the core sees every position that any
member's mask shows, so the padding of a short member is attended to at the tokens of a longer one.

A batch that N does not divide is filled up with its own rows from the start, and their outputs are cut off: the same
batch gives the same outputs, independent of earlier calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

import torch
from annotated_types import Interval
from torch.fx import GraphModule

from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.derived_buffers import BORROWED
from fxsparse.graph.record import Change
from fxsparse.options import Glob, Positive, Seed, Share, Weight, Whole, shown
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.passes.mux.rewrite import PATH, Rewrite
from fxsparse.passes.mux.stages import Stages

__all__ = ["DEMUXES", "MUXES", "PATH", "Multiplex"]

Mux = Literal["gaussian", "orthogonal", "binary", "attention", "unit"]
Demux = Literal["keys", "mlp", "prefix", "repeat"]
MUXES, DEMUXES = get_args(Mux), get_args(Demux)
Group = Annotated[int, Interval(ge=1, le=1024)]


@dataclass(frozen=True)
class Multiplex(Pass):
    """Runs the repeated core of a model at batch / n.

    Attributes:
        n: N, members of a group.
        mux: how members are mixed: ``gaussian`` (mean of members times Gaussian keys), ``orthogonal`` (sum of randomly
            rotated members over sqrt(n)), ``binary`` (each member keeps its own n-th of the features), ``attention``
            (MUX-PLM's contextual mixing), ``unit`` (the plain mean).
        demux: how they are told apart: ``keys`` (an MLP of a learned key and the hidden state; RSA), ``mlp`` (an MLP
            for each member), ``prefix`` (as ``keys``, with the outputs at n prefix positions as keys; the last n
            positions of a sequence make room, so pad sequences by n), ``repeat`` (not at all).
        layers: linear layers of ``keys`` and ``prefix``.
        learned: train the mixing keys or rotations; else they stay as drawn.
        norm: length of a Gaussian key; by default sqrt(d). DataMUX's code has 1 and 20.
        ensemble: how many slots each input takes; its outputs are averaged. It divides n.
        stages: training stages ``(until, task, retrieval)``: up to that fraction of the steps the ``loss`` that the
            model returns in training is task * its own + retrieval * the retrieval loss. A warm-up and then DataMUX's
            mixture is ``((0.3, 0, 1), (1, 0.9, 0.1))``. A ``Schedule`` drives them; evaluation has the task loss.
        ignore: token ids that the retrieval loss leaves out, such as padding and special tokens.
        stack: path of the list of blocks that is the core; needed if a model has several.
        seed: of keys and initial weights.

    To tune a multiplexed, pretrained model with another head, call
    ``tuned.load_state_dict(pretrained.state_dict(), strict=False)``: mux, demux and retrieval keep their names.

    A head that reads one position (``[:, 0]``) is given just that position, told apart. Demultiplexing all positions
    costs as much per token as without multiplexing.

    Raises:
        OptionError: an option is out of range.
        RewriteError: the batch size is not free, there is no embedding or no repeated core, the model returns states
            from inside the core, or the core reads a tensor that depends on a member's values and is no attention mask.
    """

    name: ClassVar[str] = "multiplex"
    rest: ClassVar[str] = "runs for every row, it is outside of the layers that are multiplexed"
    cannot_follow: ClassVar[tuple[str, ...]] = ("multiplex", "select-tensors")
    training_only: ClassVar[bool] = True
    no_module: ClassVar[str] = (
        "several inputs share one run through the layers, which no module of the model's class "
        "does; keep the graph form: fxsparse.save and fxsparse.load, torch.compile, torch.export"
    )
    n: Group = 2
    mux: Mux = "gaussian"
    demux: Demux = "keys"
    layers: Annotated[int, Interval(ge=1, le=64)] = 2
    learned: bool = False
    norm: Positive | None = None
    ensemble: Group = 1
    stages: tuple[tuple[Share, Weight, Weight], ...] = ()
    ignore: tuple[Whole, ...] = ()
    stack: Glob | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n % self.ensemble:
            raise OptionError(f"ensemble={self.ensemble} does not divide n={self.n}", pass_name=self.name)
        if self.mux == "attention" and self.demux == "prefix":
            raise OptionError("mux=attention takes demux=keys or demux=mlp, not a prefix", pass_name=self.name)
        ends = [stage[0] for stage in self.stages]
        if ends != sorted(set(ends)) or (ends and ends[-1] != 1):
            raise OptionError(
                f"stages={shown(self.stages)} are (until, task, retrieval) whose ends grow and reach 1",
                pass_name=self.name,
            )

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if graph.meta.get(BORROWED):
            raise RewriteError(
                "mux and demux have parameters that the optimizer of a one-line call has never seen; call "
                "fxsparse.rewrite(model, passes, ...) and compile its result",
                pass_name=self.name,
            )
        if hasattr(graph, PATH):
            raise RewriteError(f"the model already has a module called {PATH}", pass_name=self.name, site=PATH)
        yield from Rewrite(self, graph).run()

    @property
    def needs_schedule(self) -> bool:
        return bool(self.stages)

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.stages:
            yield Stages(self.stages, graph.get_submodule(PATH), total_steps)

"""Training some of a model's tensors: GreenTrainer (arXiv 2309.13192), and simpler choices on the same footing.

    maximise  sum of I_k over S    subject to    forward + cost(S) <= rho * full training step

S is the set of tensors that are trained. The others are read through ``detach`` and require no gradient, so the
compiler drops everything that only their gradients need. I is `fxsparse.tensor_importance`; cost and the exact choice
are those of `fxsparse.BackpropGraph`.

Other published choices are ways to name S:

- ``select-tensors{tensors=["*bias"]}`` is BitFit (arXiv 2106.10199);
- ``select-tensors{embeddings_and_head=true}`` is what GreenTrainer compares with as FT-Top2: the last two layers are
  the embedding and the head there;
- ``select-tensors{last_layers=2}`` trains the last two blocks, FT-Top2 elsewhere (Li and Liang 2021);
- ``low-rank{rank=8,start=0.0,layers=["*.q_proj","*.v_proj"]},select-tensors{tensors=["*_down","*_up"]}`` is LoRA
  (arXiv 2106.09685) on queries and values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.flops import costs
from fxsparse.cost.importance import Metric, tensor_importance
from fxsparse.errors import OptionError, RewriteError, nearest
from fxsparse.graph import live
from fxsparse.graph.derived_buffers import weights_borrowed
from fxsparse.graph.graph_state import end_state, note, register_state
from fxsparse.graph.record import META_KEY, Change, Entry, record_of, rewrote, skipped
from fxsparse.graph.sharded import in_process_group
from fxsparse.graph.trainable import fully_trained, own_parameter, set_trained, trainable, trained
from fxsparse.options import Count, Globs
from fxsparse.passes.base import Pass, parse_passes
from fxsparse.passes.event import Event
from fxsparse.passes.nm.branch import Branch

CHOSEN = "select_tensors_chosen"
"""Name of the buffer that says which tensors a schedule has chosen to train."""


@dataclass(frozen=True)
class SelectTensors(Pass):
    """Trains some tensors and freezes the others.

    Without ``rho`` the named tensors are trained. With it, a ``Schedule`` chooses among them from the batch that
    ``schedule.observe(batch)`` shows: at the first step, and then according to ``every`` or ``times``. Until the first
    choice all of them are trained. Every new choice is a new graph for a running compile.

    A frozen tensor keeps its optimizer state (moments, step count) and is neither updated nor decayed. When it is
    trained again, it starts from that state. A later choice of tensors takes the place of an earlier one.

    Attributes:
        tensors: names or globs of the tensors to train, or to choose from; by default all trainable tensors.
        rho: share of a full training step's FLOPs that a step may cost, forward included, in (0, 1]. A full step trains
            every trainable tensor, independent of ``tensors``.
        last_layers: train only, or choose from, this many last blocks and the tensors used after them.
        embeddings_and_head: train only, or choose from, the tables that look the inputs up (tokens, not positions) and
            the head.
        every: optimizer steps between two choices.
        times: number of choices, evenly over the training; with the number of epochs, one at the start of each.
        metric: the measure to choose by, see `fxsparse.tensor_importance`.
        pointwise: count biases, norms, activations and the like in rho too, see `fxsparse.cost.pointwise`.
        chosen: the names that are trained now; written by the schedule, so that the record describes the current graph.

    The graph module has parameters of its own, which share their memory with the model's, for the tensors whose
    ``requires_grad`` it decides: build the optimizer from the graph module's parameters.

    Raises:
        OptionError: an option is out of range, or rho is below the cost of the forward pass.
        RewriteError: nothing can be trained, or a name or glob matches no trainable tensor.
    """

    name: ClassVar[str] = "select-tensors"
    rest: ClassVar[str] = "takes no gradient"
    # Gates that do not train never close, and dimensions are scored by the gradients of all weights.
    cannot_follow: ClassVar[tuple[str, ...]] = ("gates", "drop-dims")
    ends: ClassVar[tuple[str, ...]] = ("select-tensors",)
    tensors: Globs | None = None
    rho: Annotated[float, Interval(gt=0, le=1)] | None = None
    last_layers: Count | None = None
    embeddings_and_head: bool = False
    every: Count | None = None
    times: Count | None = None
    metric: Metric = "importance"
    pointwise: bool = False
    chosen: Globs | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self._narrowed()) > 1:
            raise OptionError(f"give {' or '.join(self._narrowed())}, not both", pass_name=self.name)
        if self.every is not None and self.times is not None:
            raise OptionError("give every or times, not both", pass_name=self.name)
        if self.rho is None and (self.every or self.times):
            raise OptionError("every and times need rho, the budget to choose within", pass_name=self.name)

    def _narrowed(self) -> list[str]:
        """The options that name some of the tensors."""
        named = {"tensors": self.tensors, "last_layers": self.last_layers}
        return [name for name, given in named.items() if given is not None] + (
            ["embeddings_and_head"] if self.embeddings_and_head else []
        )

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        needs_all = self.rho is not None or self.last_layers is not None or self.embeddings_and_head
        if weights_borrowed(graph) and needs_all:
            raise RewriteError(
                "a one-line call sees no optimizer and no batches to choose by, and perhaps only a part of the layers; "
                "name the tensors, or call fxsparse.rewrite and drive its result with a fxsparse.Schedule",
                pass_name=self.name,
            )
        if weights_borrowed(graph) and not trainable(graph):
            yield skipped("model", "this part of it reads no parameter that requires a gradient")
            return
        names = pool = self._pool(graph)
        if self.rho is not None:
            BackpropGraph(graph, trainable=trainable(graph), pointwise=self.pointwise).budget(self.rho)
        if self.chosen is not None:
            names = self._matching(graph, self.chosen)
        candidates = trainable(graph)
        set_trained(graph, names)
        for name in candidates:
            differs = graph.get_parameter(name).requires_grad != (name in names)  # an earlier choice froze some
            if not weights_borrowed(graph) and (self.rho is not None or differs):
                own_parameter(graph, name, requires_grad=name in (pool if in_process_group() else names))
        self._freeze_waiting(graph, names)
        end_state(graph, CHOSEN)
        if self.rho is not None:
            every = [aliases[0] for aliases in fx.parameter_names(graph).values()]
            register_state(graph, CHOSEN, every, set(every) - set(candidates) | names, _enter)
        if self.rho is not None and self.chosen is None:
            yield rewrote("model", f"a schedule chooses among {len(names)} tensors, all trained until then")
        yield from _changes(candidates, names)

    def _freeze_waiting(self, gm: GraphModule, names: Collection[str]) -> None:
        """Freezes the low-rank branches that start later and are not chosen; a graph that waits does not read them.

        Those that are chosen stay as they are, except that what an earlier choice froze is trained again.
        """
        modules, read = {fx.module_path(name) for name in names}, set(trainable(gm))
        again = any(entry.name == self.name for entry in record_of(gm).entries)
        for branch in live.sites(gm, Branch):
            for name in {branch.down, branch.up} - read:
                named = any(name == glob or fnmatchcase(name, glob) for glob in self.tensors or ())
                chosen = fx.module_path(branch.weight) in modules if self.tensors is None else named
                trains = (chosen or not self._narrowed()) and (again or gm.get_parameter(name).requires_grad)
                if trains != gm.get_parameter(name).requires_grad:
                    own_parameter(gm, name, requires_grad=trains)

    def _pool(self, gm: GraphModule) -> set[str]:
        """The tensors to train, or to choose from."""
        names = set(trainable(gm))
        if not names:
            raise RewriteError(
                "the model has no trainable tensor: no parameter that the graph reads requires a gradient",
                pass_name=self.name,
            )
        if self.last_layers is not None:
            return names & _last_blocks(gm, self.last_layers)
        if self.embeddings_and_head:
            if not names & _embeddings_and_head(gm):
                raise RewriteError(
                    "found no trainable table that looks inputs up and no trainable head; name the tensors to train",
                    pass_name=self.name,
                )
            return names & _embeddings_and_head(gm)
        return names if self.tensors is None else self._matching(gm, self.tensors)

    def _matching(self, gm: GraphModule, globs: Iterable[str]) -> set[str]:
        """The trainable tensors that globs match by any of their names."""
        candidates = set(trainable(gm))
        aliases = {name: names[0] for names in fx.parameter_names(gm).values() for name in names}
        matches = set()
        for glob in globs:
            named = {aliases[name] for name in aliases if name == glob or fnmatchcase(name, glob)}
            # Where the compiler broke the model into graphs, each reads a part of the parameters.
            if not named & candidates and not weights_borrowed(gm):
                why = "names only frozen or unused parameters" if named else "matches no parameter"
                hint = nearest(glob, aliases) if not named else ""
                raise RewriteError(f"{glob!r} {why}; {hint}".rstrip("; "), pass_name=self.name)
            matches |= named & candidates
        return matches

    @property
    def needs_schedule(self) -> bool:
        return self.rho is not None

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if isinstance(graph, GraphModule):
            yield _Reselect(self, graph, optimizer, total_steps)
        elif self.rho is not None:
            raise RewriteError(
                "modules go on training the tensors chosen last, because a new choice reads the costs of the graph; "
                "train the graph form and call fxsparse.to_module afterwards, or name tensors=[...] instead of rho",
                pass_name=self.name,
            )


def _changes(candidates: Iterable[str], names: Collection[str]) -> list[Change]:
    return [skipped(name, "trained") if name in names else rewrote(name, "frozen") for name in candidates]


# --- blocks -----------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"(?:(.*?)\.)?(\d+)\.")


def _last_blocks(gm: GraphModule, count: int) -> set[str]:
    """Names of the parameters of the last ``count`` blocks of the list of blocks that runs last, and of those that are
    first used after them."""
    place = {node: position for position, node in enumerate(gm.graph.nodes)}
    used: dict[str, list[int]] = {}
    aliases = {name: names[0] for names in fx.parameter_names(gm).values() for name in names}
    for read in gm.graph.find_nodes(op="get_attr"):
        if str(read.target) in aliases:
            used.setdefault(aliases[str(read.target)], []).extend(place[user] for user in _users(read))
    blocks: dict[str, dict[int, list[str]]] = {}
    for name in used:
        if match := _BLOCK.match(name):
            blocks.setdefault(match[1] or "", {}).setdefault(int(match[2]), []).append(name)
    lists = {path: numbered for path, numbered in blocks.items() if len(numbered) > 1}
    if not lists:
        raise RewriteError("found no list of blocks; name the tensors to train", pass_name=SelectTensors.name)
    ends = {
        path: max(place for names in numbered.values() for n in names for place in used[n])
        for path, numbered in lists.items()
    }
    last = max(ends, key=ends.__getitem__)
    numbers = sorted(lists[last])[-count:]
    chosen = {name for number in numbers for name in lists[last][number]}
    return chosen | {name for name, places in used.items() if min(places, default=0) > ends[last]}


def _embeddings_and_head(gm: GraphModule) -> set[str]:
    """Names of the parameters of the tables that look inputs up, and of the heads."""
    aliases = {name: names[0] for names in fx.parameter_names(gm).values() for name in names}
    heads = fx.head_linears(gm)
    sources = [source for node in (*fx.input_embeddings(gm), *heads) for source in node.all_input_nodes]
    sources += [linear.weight for linear in fx.linears(gm) if linear.node in heads]  # also where it is transposed first
    reads = [read for read in map(fx.read_of, sources) if read.op == "get_attr"]
    return {aliases[str(read.target)] for read in reads if str(read.target) in aliases}


def _users(read: Node) -> Iterable[Node]:
    """The nodes that use a parameter, seen through detached and transposed reads of it."""
    for user in read.users:
        if fx.FROZEN in user.meta:
            yield from _users(user)
        else:
            yield user


# --- choosing while training ------------------------------------------------------------------------------------------


class _Reselect(Event):
    """Chooses the tensors to train anew on the steps that are due; tensors that join the graph later (low-rank branches
    at their start) are trained until the next choice."""

    varying = ("rho",)

    def __init__(self, owner: SelectTensors, gm: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int):
        self.owner, self.gm, self.optimizer, self.total_steps = owner, gm, optimizer, total_steps
        self.chosen_at = 0
        self.code, self.trained = gm.code, set(trained(gm))

    def is_due(self, step: int) -> bool:
        """Whether optimizer step ``step`` starts with a choice."""
        if self.owner.rho is None:
            return False
        if self.owner.every is not None:
            return (step - 1) % self.owner.every == 0
        times = self.owner.times or 1
        return any(step - 1 == -(-turn * self.total_steps // times) for turn in range(times))

    def observe(self, step: int, batch: Any, loss: Callable[[Any], Any] | None) -> None:
        if not self.is_due(step) or self.chosen_at == step:
            return
        rho = self._rho(step)
        pointwise = self.owner.pointwise
        graph = BackpropGraph(fully_trained(self.gm), trainable=trainable(self.gm), pointwise=pointwise)
        graph.budget(rho)
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        pool = [name for name in self.owner._pool(self.gm) if id(self.gm.get_parameter(name)) in held]
        importance = tensor_importance(
            self.gm,
            self.optimizer,
            batch,
            metric=self.owner.metric,
            tensors=pool,
            rho=rho,
            pointwise=pointwise,
            loss=loss,
            all_ranks=in_process_group(),
        )
        chosen = graph.select(importance, rho) if importance else set()
        if not chosen:
            raise RewriteError(
                f"no tensor that lowers the loss can be trained within rho={rho}; "
                f"the least rho that trains anything is {_least(graph, pool)}",
                pass_name=self.owner.name,
            )
        self._train(chosen)
        self.chosen_at = step

    def _rho(self, step: int) -> float:
        return self.signals["rho"](step) if "rho" in self.signals else self.owner.rho  # type: ignore[return-value]

    def before_step(self, step: int) -> None:
        if self.is_due(step) and self.chosen_at != step:
            raise OptionError(
                f"a choice is due at optimizer step {step} and no batch was shown: call schedule.observe(batch) before "
                "the forward pass of each step",
                pass_name=self.owner.name,
            )

    def after_step(self, step: int) -> None:
        if self.code is not self.gm.code:
            self.code = self.gm.code
            if self.trained != set(trained(self.gm)):
                self._note(trained(self.gm))

    def _train(self, chosen: Collection[str]) -> None:
        _train(self.gm, chosen)
        self._note(chosen)

    def _note(self, chosen: Collection[str]) -> None:
        _record(self.gm, chosen)
        frozen = set(trainable(self.gm)) - set(chosen)
        note(self.gm, CHOSEN, {names[0] for names in fx.parameter_names(self.gm).values()} - frozen)
        self.code, self.trained = self.gm.code, set(chosen)

    def values(self) -> dict[str, float]:
        rho = {} if self.owner.rho is None else {"rho": float(self._rho(max(1, self.chosen_at)))}
        return {**rho, "trained_tensors": float(len(trained(self.gm)))}

    def trained_tensors(self) -> Collection[str]:
        return self.trained

    def state_dict(self) -> dict[str, Any]:
        return {"chosen_at": self.chosen_at, "chosen": sorted(trained(self.gm))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["chosen_at"]:
            self._train(state["chosen"])
        self.chosen_at = state["chosen_at"]


def _train(gm: GraphModule, chosen: Collection[str]) -> None:
    candidates = trainable(gm)
    set_trained(gm, chosen)
    for name in candidates:
        parameter = gm.get_parameter(name)
        # DistributedDataParallel reduces what requires a gradient when it is built; the graph computes none for others.
        parameter.requires_grad_(name in chosen or (in_process_group() and parameter.requires_grad))
        if name not in chosen:
            parameter.grad = None  # an optimizer moves and decays every parameter that has a gradient, even an old one
    gm.recompile()


def _enter(gm: GraphModule, on: frozenset[str]) -> None:
    """Trains the tensors that loaded flags name."""
    chosen = [name for name in trainable(gm) if name in on]
    _train(gm, chosen)
    _record(gm, chosen)


def _record(gm: GraphModule, chosen: Collection[str]) -> None:
    """Notes the choice in the record, so that a replay gives the current graph."""
    changes = tuple(_changes(trainable(gm), chosen))

    def noted(entry: Entry) -> Entry:
        (item,) = parse_passes(entry.text)
        if not isinstance(item, SelectTensors) or item.rho is None:
            return entry
        text = str(replace(item, chosen=tuple(sorted(chosen))))
        return replace(entry, text=text, changes=changes, after=costs(gm))

    record = record_of(gm)
    gm.meta[META_KEY] = replace(record, entries=tuple(map(noted, record.entries)))


def _least(graph: BackpropGraph, names: Iterable[str]) -> float:
    forward, full = graph.forward(), graph.full()
    least = forward + min(graph.cost([name]) for name in names)
    return math.ceil(least / (forward + full) * 10_000) / 10_000

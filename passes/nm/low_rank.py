"""Lazy low-rank branches beside linears (SLoPe, arXiv 2405.16325, section 2.3).

    y = x (W^R)^T + b + (x down^T) up^T / r        down [r, in] ~ N(0, 1), up [out, r] = 0

At insertion a branch changes nothing, because ``up`` is zero. SLoPe trains them in the last 1 % of the steps: the
branches' parameters exist from the start, so that optimizers, DDP and FSDP know them, and the graph uses them from
the step on that a ``Schedule`` reaches. The factor 1/r is that of SLoPe's code.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import Linear, live
from fxsparse.graph.derived_buffers import BORROWED
from fxsparse.graph.graph_state import STATES, note, register_state
from fxsparse.graph.record import Change, record_of, rewrote, skipped, substitute
from fxsparse.modules.sites import STARTED, ModuleSite, module_sites
from fxsparse.options import Globs, Seed, Share
from fxsparse.passes.base import Pass, parse_passes, sites_of_others
from fxsparse.passes.event import Event
from fxsparse.passes.nm.branch import Branch
from fxsparse.passes.nm.convolutions import CONVOLUTION, masked_convolutions
from fxsparse.passes.nm.sparse_linear import SparseLinear, name_in_graph, replace_call, sparse_linears

_WITH_BRANCH: dict[Any, Any] = {
    torch.ops.fxsparse.nm_linear.default: torch.ops.fxsparse.nm_linear_low_rank.default,
    torch.ops.fxsparse.masked_linear.default: torch.ops.fxsparse.masked_linear_low_rank.default,
}


@dataclass(frozen=True)
class AddLowRankBranches(Pass):
    """Adds low-rank branches beside linears.

    Attributes:
        rank: r; by default it follows from the ratio.
        ratio: r over the smaller of the weight's two dimensions, at least 1; SLoPe's are 0.39, 1.56 and 6.25 %.
        start: fraction of the training steps after which the branches take part; 0 is at once, and below 1 they are
            trained in the last of several steps at least.
        layers: globs over the module paths of linears, dense or N:M, that get a branch; by default every N:M linear.
        seed: of ``down``.

    Raises:
        OptionError: an option is out of range.
        RewriteError: there is no N:M linear, or a glob matches no linear.
    """

    name: ClassVar[str] = "low-rank"
    rest: ClassVar[str] = "gets no branch, none was asked for here"
    cannot_follow: ClassVar[tuple[str, ...]] = ("select-tensors", "gates", "drop-dims")
    rank: Annotated[int, Interval(ge=1, le=65_536)] | None = None
    ratio: Annotated[float, Interval(gt=0, le=1)] | None = None
    start: Share = 0.99
    layers: Globs | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.ratio is not None:
            raise OptionError("give rank or ratio, not both", pass_name=self.name)
        if self.rank is None and self.ratio is None:
            object.__setattr__(self, "ratio", 1 / 64)

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if graph.meta.get(BORROWED):
            raise RewriteError(
                "branches are parameters that the optimizer of a one-line call has never seen; call "
                "sparse = fxsparse.rewrite(model, passes, ...), build the optimizer from sparse.parameters(), "
                'and compile with torch.compile(sparse, backend="fxsparse")',
                pass_name=self.name,
            )
        candidates = self._candidates(graph)
        for held in masked_convolutions(graph):
            yield skipped(fx.module_path(held.name), f"{CONVOLUTION}, and branches are of linears")
        for weight in dict.fromkeys(linear.path for linear in sparse_linears(graph) if linear.held.experts):
            yield skipped(weight, "its rows are routed to experts, and branches are of linears")
        present = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
        mine: set[str] = set()
        for linear in candidates:
            if linear.name in mine:
                continue
            if f"{linear.name}_down" in present:
                yield skipped(linear.path, "already has a branch")
                continue
            mine.add(linear.name)
            rank = self.rank or max(1, round((self.ratio or 0) * min(linear.in_features, linear.out_features)))
            self._register(graph, linear, rank)
            when = "from the start" if self.start == 0 else f"from {self.start:.0%} of the steps on"
            yield rewrote(linear.path, f"rank {rank}, {when}")
        if self.start == 0:
            insert_branches(graph, mine)
        waits = {linear.name for linear in waiting_branches(graph)}
        names = sorted(branch.weight for branch in live.sites(graph, Branch))
        register_state(graph, STARTED, names, set(names) - waits, start_branches, _started_earlier)

    def _candidates(self, gm: GraphModule) -> list[Linear | SparseLinear]:
        sparse = [linear for linear in sparse_linears(gm) if not linear.held.experts]
        if self.layers is None:
            if not sparse:
                raise RewriteError(
                    "there is no N:M linear to add a branch to; the order that works is nm-masks,low-rank, "
                    "or name dense linears with layers=[...]",
                    pass_name=self.name,
                )
            return list(sparse)
        of_branches = {name for branch in live.sites(gm, Branch) for name in (branch.down, branch.up)}
        dense = [linear for linear in fx.linears(gm) if linear.name not in of_branches]
        every: list[Linear | SparseLinear] = [*sparse, *dense]
        for glob in self.layers:
            if not any(fnmatchcase(linear.path, glob) for linear in every):
                shown = ", ".join(linear.path for linear in every[:4])
                raise RewriteError(
                    f"the glob {glob!r} matches no linear; there are: {shown or 'none'}", pass_name=self.name
                )
        return [linear for linear in every if any(fnmatchcase(linear.path, glob) for glob in self.layers)]

    def _register(self, gm: GraphModule, linear: Linear | SparseLinear, rank: int) -> None:
        source = fx.attribute(gm, _holder(linear))
        generator = torch.Generator().manual_seed(zlib.crc32(linear.name.encode(), self.seed))
        down = torch.randn(rank, linear.in_features, generator=generator).to(source)
        up = torch.zeros(linear.out_features, rank, dtype=source.dtype, device=source.device)
        fx.set_parameter(gm, f"{linear.name}_down", down)
        fx.set_parameter(gm, f"{linear.name}_up", up)
        live.enter(gm, Branch(linear.name, f"{linear.name}_down", f"{linear.name}_up"))

    @property
    def needs_schedule(self) -> bool:
        return self.start > 0

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        at = round(self.start * total_steps)
        if self.start < 1:  # 0.99 of 40 steps rounds to all of them, and nothing would train the branches
            at = min(at, total_steps - 1)
        yield _Start(graph, optimizer, at, sites_of_others(self, graph))


def _holder(linear: Linear | SparseLinear | ModuleSite) -> str:
    return linear.name if isinstance(linear, Linear) else linear.parameter_name


class _Start(Event):
    """Lets the branches take part once their step is reached. The optimizer knows them from the beginning, so that its
    state has the same parameters at every step; without a gradient it leaves them alone."""

    def __init__(self, gm: nn.Module, optimizer: torch.optim.Optimizer, at: int, others: Collection[str]):
        self.gm, self.optimizer, self.at = gm, optimizer, at
        names = fx.meta_of(gm)[STATES][STARTED].names
        self.weights = frozenset(name for name in names if fx.module_path(name) not in others)
        self._join()

    def before_step(self, step: int) -> None:
        started = fx.meta_of(self.gm)[STATES][STARTED].on
        for weight, _, parts in _branches(self.gm):
            if weight not in started:  # an earlier step may have been loaded into a graph that uses them
                for name in parts:
                    fx.attribute(self.gm, name).grad = None

    def after_step(self, step: int) -> None:
        state = fx.meta_of(self.gm)[STATES][STARTED]
        if step >= self.at and not state.on >= self.weights:
            start_branches(self.gm, state.on | self.weights)
            note(self.gm, STARTED, state.on | self.weights)

    def resume(self, step: int) -> None:
        self.after_step(step)

    def late_parameters(self) -> Iterable[Any]:
        return [fx.attribute(self.gm, name) for _, _, parts in _branches(self.gm) for name in parts]

    def values(self) -> dict[str, float]:
        """The step that waiting branches start at; a graph whose branches take part does not know when they did."""
        started = fx.meta_of(self.gm)[STATES][STARTED].on >= self.weights
        return {"started": 1.0} if started else {"start": float(self.at), "started": 0.0}

    def _join(self) -> None:
        known = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        for _, holder, parts in _branches(self.gm):
            group = known.get(id(fx.attribute(self.gm, holder)))
            if group is None:
                continue  # a frozen weight: its branch is trained only if the caller gave it to the optimizer
            for name in parts:
                parameter = fx.attribute(self.gm, name)
                if id(parameter) not in known:
                    group["params"].append(parameter)


def _branches(gm: nn.Module) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Of every branch: the name of its weight in the graph, the parameter that holds the weight, and its own two."""
    if not isinstance(gm, GraphModule):
        for site in module_sites(gm):
            if site.form.rank:
                yield site.form.name, site.parameter_name, (f"{site.name}_down", f"{site.name}_up")
        return
    present = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    for branch in live.sites(gm, Branch):
        values = f"{branch.weight}_values"
        yield branch.weight, values if values in present else branch.weight, (branch.down, branch.up)


def _started_earlier(state: Mapping[str, Tensor]) -> set[str] | None:
    """The weights whose branches have been trained: ``up`` starts at zero."""
    ups = {name.removesuffix("_up"): tensor for name, tensor in state.items() if name.endswith("_up")}
    ups = {name: tensor for name, tensor in ups.items() if f"{name}_down" in state}
    return {name for name, tensor in ups.items() if bool((tensor != 0).any())} if ups else None


def start_branches(gm: nn.Module, on: frozenset[str]) -> None:
    """Makes the graph use the branches of the weights in ``on``; a replay of the record then gives the same graph."""
    if not insert_branches(gm, on):
        return
    if isinstance(gm, GraphModule):
        gm.recompile()
    waits = {fx.module_path(name_in_graph(linear)) for linear in waiting_branches(gm)}
    for entry in record_of(gm).entries:
        for item in parse_passes(entry.text):
            if isinstance(item, AddLowRankBranches) and not any(change.site in waits for change in entry.rewritten):
                substitute(gm, entry.text, str(replace(item, start=0.0)))


def waiting_branches(gm: nn.Module) -> Iterable[Linear | SparseLinear | ModuleSite]:
    """The linears whose branch exists but takes no part yet."""
    if not isinstance(gm, GraphModule):
        yield from (site for site in module_sites(gm) if site.form.rank and not site.form.started)
        return
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    present = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    linears: list[Linear | SparseLinear] = [*sparse_linears(gm), *fx.linears(gm)]
    for linear in linears:
        if f"{linear.name}_down" in present - used:
            yield linear


def insert_branches(gm: nn.Module, weights: Collection[str]) -> bool:
    """Makes the graph use the waiting branches of ``weights``, by their names in the graph; whether there were any."""
    waiting = [linear for linear in waiting_branches(gm) if name_in_graph(linear) in weights]
    for linear in waiting:
        down, up = f"{linear.name}_down", f"{linear.name}_up"
        if isinstance(linear, ModuleSite):
            linear.module.start(linear.leaf)
        else:
            assert isinstance(gm, GraphModule)
            _insert(gm, linear, down, up)
    return bool(waiting)


def _insert(gm: GraphModule, linear: Linear | SparseLinear, down: str, up: str) -> None:
    if isinstance(linear, Linear):
        fx.transform(gm, linear.node, _beside, linear.input, down, up)
        return
    node = linear.node
    reads = {key: fx.insert_attribute(gm, name, before=node) for key, name in (("down", down), ("up", up))}
    replace_call(gm, node, _WITH_BRANCH[node.target], **reads)


def _beside(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return y + F.linear(F.linear(x, down), up) / down.shape[0]


def merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The dense weight ``[out, in]`` that is equivalent to a weight with its branch."""
    return weight + (up @ down) / down.shape[0]

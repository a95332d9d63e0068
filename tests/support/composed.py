"""Compositions of passes in plain torch: the original model with every linear replaced by one that can be pruned,
gated, sliced, given a branch, or have units left out.

An oracle is built from the record of a rewritten graph: pass after pass, in the order they ran, with the library's
choices (which linears, which gates, which units) taken as facts and everything computed from them computed anew: masks,
column masks, gated activations, losses of distillation, multiplexed groups. It trains beside the graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis.added import acts_on
from fxsparse.analysis.structures import MLP, Attention, structures
from fxsparse.graph import live
from fxsparse.graph.record import record_of
from fxsparse.graph.trainable import trained
from fxsparse.ops.nm import Pattern, unpack
from fxsparse.passes.base import parse_passes
from fxsparse.passes.neurons.gather_units import Site as NeuronSite
from fxsparse.passes.nm.branch import Branch
from tests.support import multiplexed

BLOCKS = {
    "bert": ("bert.encoder.layer",),
    "opt": ("model.decoder.layers",),
    "gpt2": ("transformer.h",),
    "llama": ("model.layers",),
    "grouped": ("model.layers",),
    "t5": ("encoder.block", "decoder.block"),
}
"""The lists of layers of every family."""

Site = Attention | MLP


class EqualDraws(TorchDispatchMode):
    """Every tensor of a shape gets the same numbers, so that gates draw alike in any order, and stochastic depth drops
    the same examples."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.rand_like.default:
            return _spread(0.15, 0.85, args[0].shape)
        if func is torch.ops.aten.rand.default:
            return _spread(0.0, 0.95, args[0])
        return func(*args, **(kwargs or {}))


def _spread(low: float, high: float, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    return torch.linspace(low, high, count).roll(count // 3).view(tuple(shape))


class _Product(torch.autograd.Function):
    """y = x W^T of a pruned weight; its own gradient is dense (straight through) or masked, that of x pruned again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, columns: Tensor, straight: bool) -> Tensor:
        ctx.save_for_backward(x, weight * mask * columns, mask)
        ctx.straight = straight
        return x @ (weight * mask).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, pruned, mask = ctx.saved_tensors
        grad = grads[0]
        weight_grad = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad @ pruned, weight_grad if ctx.straight else weight_grad * mask, None, None, None


class Linear(nn.Module):
    """A linear of the original whose weight is seen as ``[out, in]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False):
        super().__init__()
        self.transposed = transposed
        self.weight, self.bias = weight, bias
        self.mask = torch.ones_like(self.dense.detach())
        self.columns = torch.ones_like(self.mask)
        self.rows_left = torch.arange(self.mask.shape[0])
        self.columns_left = torch.arange(self.mask.shape[1])
        self.pattern: tuple[int, int] | None = None
        self.straight = False
        self.decay, self.every, self.prune_every = 0.0, 0, 0
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        self.starts_after = 0
        self.started = False
        self.input_gates: list[Callable[[Tensor], Tensor]] = []
        self.output_gates: list[Callable[[Tensor], Tensor]] = []

    @property
    def dense(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.input_gates:
            x = gate(x)
        y = _Product.apply(x, self.dense, self.mask, self.columns, self.straight)
        if self.bias is not None:
            y = y + self.bias
        if self.down is not None and self.up is not None and self.started:
            branch = x[..., self.columns_left] @ self.down.t() @ self.up.t() / self.down.shape[0]
            y = y.index_add(-1, self.rows_left, branch)
        for gate in self.output_gates:
            y = gate(y)
        return y

    # --- pruning ---

    def prune(self) -> None:
        """n of every m of what is left of the weight, along its inputs."""
        assert self.pattern is not None
        self.mask = self._spread(largest(self._left(self.dense.detach()), *self.pattern))

    def prune_again(self) -> None:
        """n of every m of the pruned weight, along its outputs."""
        assert self.pattern is not None
        pruned = self._left(self.dense.detach() * self.mask)
        self.columns = self._spread(largest(pruned.t(), *self.pattern).t() * self._left(self.mask))

    def _left(self, weight: Tensor) -> Tensor:
        return weight[self.rows_left][:, self.columns_left]

    def _spread(self, mask: Tensor) -> Tensor:
        whole = torch.zeros_like(self.dense.detach())
        whole[self.rows_left[:, None], self.columns_left] = mask
        return whole

    def slice(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Takes rows and columns away, given those of the original that stay."""
        if rows is not None:
            self.rows_left = self.rows_left[torch.isin(self.rows_left, rows)]
        if columns is not None:
            self.columns_left = self.columns_left[torch.isin(self.columns_left, columns)]
        self.mask = self._spread(self._left(self.mask))

    # --- steps ---

    def after_backward(self) -> None:
        if self.straight and self.weight.grad is not None:
            pruned = 1 - (self.mask.t() if self.transposed else self.mask)
            self.weight.grad += self.decay * pruned * self.weight.detach()

    def after_step(self, step: int) -> None:
        if self.straight and step % self.every == 0:
            self.prune()
        if self.prune_every and step % self.prune_every == 0:
            self.prune_again()
        self.started = self.started or (self.down is not None and step >= self.starts_after)


class _Called(TorchFunctionMode):
    """Lets ``F.linear`` with a weight that belongs to no linear, as routers call it, be a linear of the oracle."""

    def __init__(self, linears: Iterable[Linear]):
        super().__init__()
        self.of_weight = {id(linear.weight): linear for linear in linears}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        linear = self.of_weight.get(id(args[1])) if func is F.linear and len(args) > 1 else None
        if linear is None:
            return func(*args, **(kwargs or {}))
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        y = linear(args[0])
        return y if bias is None else y + bias


def largest(weight: Tensor, n: int, m: int) -> Tensor:
    """1 at the n largest of every m along the last dimension, the first of equal ones; groups of fewer stay."""
    rows, width = weight.shape
    groups = F.pad(weight.abs(), (0, -width % m), value=-1.0).view(rows, -1, m)
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups).scatter_(-1, order[..., :n], 1.0)
    return mask.view(rows, -1)[:, :width]


@dataclass
class Gate:
    """A gate, whose state is copied from the graph before every step."""

    name: str
    trained: bool
    mask: Tensor
    log_alpha: Tensor | None = None

    def read(self, gm: GraphModule) -> None:
        self.mask = gm.get_buffer(f"{self.name}_mask").clone()
        if self.trained:
            self.log_alpha = gm.get_parameter(self.name).detach().clone().requires_grad_()

    def value(self, training: bool) -> Tensor:
        if not (training and self.trained):
            return self.mask
        assert self.log_alpha is not None
        u = torch.rand_like(self.log_alpha)
        s = torch.sigmoid((u.log() - torch.log(1 - u) + self.log_alpha) * 1.5)
        return (s * 1.2 - 0.1).clamp(0, 1)


@dataclass
class Oracle:
    """The composed model.

    Attributes:
        name: of the family.
        model: of the original's class.
        linears: by the names of their weights.
        gates: by name.
        sites: attentions and MLPs of the original, by the weight that reads them.
    """

    name: str
    model: nn.Module
    sites: dict[str, Site]
    linears: dict[str, Linear] = field(default_factory=dict)
    filters: dict[str, Tensor] = field(default_factory=dict)
    """The masks of convolutions' weights, by their names."""
    gates: dict[str, Gate] = field(default_factory=dict)
    layer_gates: dict[str, list[Gate]] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    """What takes part in the step, as factors of what an output linear reads, by the name of its weight."""
    teacher: nn.Module | None = None
    losses: Any = None
    multiplexed: dict[str, nn.Parameter] | None = None
    group: int = 0
    frozen: set[str] = field(default_factory=set)
    rho: bool = False
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    """The model's own parameters by their first names, which layers that move up keep."""
    norms: dict[str, nn.Module] = field(default_factory=dict)
    """The norm behind a sublayer's last linear, by the name of its weight, where there is one."""
    heads_left: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    """By the path of an attention that has lost heads, how many it had and which are left."""
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """The numbers of the layers that are left, by the path of their list."""
    rewritten: set[str] = field(default_factory=set)
    """The sites that the pass being followed rewrote."""

    # --- the passes ---

    def apply(self, gm: GraphModule) -> None:
        """Follows the record of ``gm``."""
        for entry in record_of(gm).entries:
            self.rewritten = {change.site for change in entry.rewritten}
            for item in parse_passes(entry.text):
                getattr(self, "_" + item.name.replace("-", "_"))(item, gm)
        self.read(gm, None)

    def _nm_masks(self, item: Any, gm: GraphModule) -> None:
        for held in record_of(gm).weights:
            if held.name in self.originals and self.originals[held.name].dim() > 2:
                self._prune_filters(held.name, Pattern.parse(held.pattern), held.experts, held.transposed)
                continue
            linear = self.linears[held.name]
            if held.name.rpartition(".")[0] in self.rewritten:
                pattern = Pattern.parse(held.pattern)
                linear.pattern = (pattern.n, pattern.m)
                linear.straight, linear.decay, linear.every = item.dynamic, item.decay, item.every
                linear.prune()

    @torch.no_grad()
    def _prune_filters(self, name: str, pattern: Pattern, experts: int, transposed: bool) -> None:
        """Of a filter along all that it sums over; of experts each along its input."""
        weight = self.originals[name]
        seen = (weight.mT if transposed else weight) if experts else weight.flatten(1)
        mask = largest(seen.flatten(0, -2), pattern.n, pattern.m).view_as(seen)
        mask = self.filters[name] = mask.mT if experts and transposed else mask.view_as(weight)
        weight *= mask
        weight.register_hook(lambda grad: grad * mask)

    def _double_prune(self, item: Any, gm: GraphModule) -> None:
        present = {name for name, _ in gm.named_buffers()}
        if any(f"{name}_column_mask" in present for name in self.filters):
            raise NotImplementedError("the composed model prunes no experts twice")
        for name, linear in self.linears.items():
            if f"{name}_column_mask" in present:
                linear.prune_every = item.every
                linear.prune_again()

    def _low_rank(self, item: Any, gm: GraphModule) -> None:
        for branch in live.sites(gm, Branch):
            linear = self.linears[branch.weight]
            if branch.weight.rpartition(".")[0] in self.rewritten:
                linear.down = nn.Parameter(gm.get_parameter(branch.down).detach().clone())
                linear.up = nn.Parameter(gm.get_parameter(branch.up).detach().clone())
                latest = STEPS - 1 if item.start < 1 else STEPS  # a branch that starts at all is trained
                linear.starts_after, linear.started = min(round(item.start * STEPS), latest), item.start == 0

    def _select_tensors(self, item: Any, gm: GraphModule) -> None:
        self.rho = item.rho is not None
        names = {name for name, _ in gm.named_parameters()}
        self.frozen = set()
        if not self.rho:
            self.frozen = {name for name in names if not any(fnmatchcase(name, glob) for glob in item.tensors)}

    def _select_neurons(self, item: Any, gm: GraphModule) -> None:
        for site in self.sites.values():
            name = site.output.linear.name
            self.linears[name].input_gates.append(lambda x, name=name: self._some(x, name))

    def _some(self, x: Tensor, name: str) -> Tensor:
        return x * self.units[name] if self.model.training and name in self.units else x

    def _drop_layers(self, item: Any, gm: GraphModule) -> None:
        for path in BLOCKS[self.name]:
            layers = self.model.get_submodule(path)
            numbers = self.numbers.get(path, list(range(len(layers))))
            left = [layer for number, layer in zip(numbers, layers, strict=True) if number not in item.indices]
            self.numbers[path] = [number for number in numbers if number not in item.indices]
            names = {f"{path}.{number}." for number in item.indices}
            self.linears = {n: at for n, at in self.linears.items() if not any(n.startswith(gone) for gone in names)}
            self.sites = {n: at for n, at in self.sites.items() if not any(f"{n}.".startswith(gone) for gone in names)}
            self.model.set_submodule(path, nn.ModuleList(left))
            config = getattr(self.model.get_submodule(path.rpartition(".")[0]), "config", None)
            for key, value in list(vars(config).items()) if config is not None else ():
                if isinstance(value, list) and len(value) == len(numbers):  # such as the type of each layer
                    kept = [entry for number, entry in zip(numbers, value, strict=True) if number not in item.indices]
                    setattr(config, key, kept)

    def _gates(self, item: Any, gm: GraphModule, straight: bool = False) -> None:
        present = {name for name, _ in gm.named_buffers()}
        parameters = {name for name, _ in gm.named_parameters()}
        for site in self.sites.values():
            for unit in ("heads", "intermediate", "attention", "ffn"):
                name = f"{site.path}.{unit}_gate"
                if f"{name}_mask" in present:
                    gate = self.gates[name] = Gate(name, name in parameters, torch.ones(()))
                    self.layer_gates.setdefault(site.path, []).append(gate)
                    self._gate(site, gate, unit in ("heads", "intermediate"), straight)

    def _gate(self, site: Site, gate: Gate, units: bool, straight: bool) -> None:
        linear, index = self.linears[site.output.linear.name], site.output.index
        index = index[torch.isin(index, linear.columns_left).all(1)]

        def on_columns(x: Tensor) -> Tensor:
            factors = torch.ones(x.shape[-1]).index_put((index,), gate.value(self.model.training)[:, None])
            return _gated(x, factors, straight)

        def on_result(y: Tensor) -> Tensor:
            return _gated(y, gate.value(self.model.training), straight)

        if units:
            linear.input_gates.append(on_columns)
        else:
            self._on_added(site, on_result)

    def _on_added(self, site: Site, gate: Callable[[Tensor], Tensor]) -> None:
        """Gates what a sublayer adds: its last linear's result, or that of the norm behind it."""
        norm = self.norms.get(site.output.linear.name)
        if norm is None:
            self.linears[site.output.linear.name].output_gates.append(gate)
        elif "norm" not in type(norm).__name__.lower():
            raise NotImplementedError(f"what is added is that of {type(norm).__name__}")
        else:
            norm.register_forward_hook(lambda module, args, y: gate(y))

    def _drop_dims(self, item: Any, gm: GraphModule) -> None:
        self._gates(item, gm, straight=item.score == "platon")

    def _materialize(self, item: Any, gm: GraphModule) -> None:
        self.losses = self.teacher = None
        left = {name: set(_numbers(str(ranges))) for name, ranges in dict(item.kept).items()}
        for key, site in list(self.sites.items()):
            units = {name: left[name] for name in left if name.rpartition(".")[0] == site.path}
            output = self.linears[site.output.linear.name]
            for name, numbers in units.items():
                if name.endswith("heads_gate"):
                    self.heads_left[site.path] = (len(site.output.index), torch.tensor(sorted(numbers)))
                if name.endswith(("heads_gate", "intermediate_gate")):
                    self._slice(site, torch.tensor(sorted(numbers), dtype=torch.long), output)
                elif not numbers:
                    output.output_gates = []
                    self._on_added(site, lambda y: y * 0)
                    del self.sites[key]
        self.gates, self.layer_gates = {}, {}

    def _slice(self, site: Site, units: Tensor, output: Linear) -> None:
        output.input_gates, output.output_gates = [], []
        present = torch.isin(site.output.index, output.columns_left).all(1).nonzero().flatten()
        output.slice(None, site.output.index[present[units]].flatten())
        for rows in site.projections:
            group = len(site.output.index) // len(rows.index)
            chosen = rows.index[torch.unique(present[units] // group)].flatten()
            whole = torch.ones(rows.linear.out_features, dtype=torch.bool)
            whole[rows.index.flatten()] = False
            self.linears[rows.linear.name].slice(torch.cat([whole.nonzero().flatten(), chosen]), None)

    def _distill(self, item: Any, gm: GraphModule) -> None:
        self.losses = item
        self.teacher = TEACHERS[self.name]

    def _end_distill(self, item: Any, gm: GraphModule) -> None:
        self.losses = self.teacher = None

    def _multiplex(self, item: Any, gm: GraphModule) -> None:
        self.group = item.n
        self.multiplexed = {
            name: nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            for name, value in gm.get_submodule("multiplex").named_parameters()
        }

    # --- training ---

    def read(self, gm: GraphModule, schedule: fxsparse.Schedule | None) -> None:
        """The library's choices for the next step."""
        for gate in self.gates.values():
            gate.read(gm)
        if self.rho:
            self.frozen = {name for name, _ in gm.named_parameters()} - set(trained(gm))
        self.units.clear()  # a rung of the ladder may choose among fewer sites
        for event in schedule.events.values() if schedule is not None else ():
            for key, units in getattr(event, "kept", {}).items():
                (site,) = (site for site in live.sites(gm, NeuronSite) if site.key == key)
                linear = self.linears[key]
                self.units[key] = torch.zeros(linear.mask.shape[1])
                self.units[key][linear.columns_left[site.output.of(units)]] = 1

    def of_heads(self, name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
        """Of something that the heads of an attention meet, as a position bias, what belongs to those that are left."""
        if tuple(value.shape) == tuple(shape) or not self.heads_left:
            return value
        path = max(self.heads_left, key=lambda path: _shared(path, name))
        heads, left = self.heads_left[path]
        for axis, (before, now) in enumerate(zip(value.shape, shape, strict=True)):
            if before != now and before % heads == 0:
                each = before // heads
                value = value.index_select(axis, (left[:, None] * each + torch.arange(each)).flatten())
        return value

    def parameters(self) -> dict[str, nn.Parameter]:
        present = {id(parameter) for parameter in self.model.parameters()}
        parameters = {name: value for name, value in self.originals.items() if id(value) in present}
        for name, linear in self.linears.items():
            if linear.down is not None and linear.up is not None and linear.started:
                parameters |= {f"{name}_down": linear.down, f"{name}_up": linear.up}
        if self.multiplexed is not None:
            parameters |= {f"multiplex.{name}": value for name, value in self.multiplexed.items()}
        return parameters

    def backward(self, batch: Mapping[str, Tensor]) -> float:
        """The gradients of a step; the loss."""
        for name, parameter in self.parameters().items():
            parameter.grad = None
            if self.rho or not name.startswith("multiplex."):  # of the multiplexer some are never trained
                parameter.requires_grad_(not self._is_frozen(name))
        loss = self.loss(batch)
        if loss.requires_grad:  # some parameter that is read is trained
            loss.backward()
        for linear in self.linears.values():
            linear.after_backward()
        return float(loss.detach())

    def _is_frozen(self, name: str) -> bool:
        return name in self.frozen or f"{name}_values" in self.frozen

    @torch.no_grad()
    def step(self, number: int, lr: float) -> None:
        for parameter in self.parameters().values():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
        for linear in self.linears.values():
            linear.after_step(number)

    def run(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The task's loss, and logits."""
        if self.multiplexed is None:
            output = self.model(**batch)
            return output.loss, output.logits
        return multiplexed.ORACLES[self.name](self.model, self.multiplexed, self.group, batch)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.losses is None or not self.model.training:
            return self.run(batch)[0]
        with self._states(self.model) as mine:
            loss, logits = self.run(batch)
        assert self.teacher is not None
        with torch.no_grad(), self._states(self.teacher) as theirs:
            expected = self.teacher(**batch).logits
        task, of_logits, of_states = self.losses.weights
        t = self.losses.temperature
        p, q = (torch.log_softmax(x.flatten(0, -2) / t, -1) for x in (expected, logits))
        loss = task * loss + of_logits * t * t * (p.exp() * (p - q)).sum(-1).mean()
        if of_states:
            for path in BLOCKS[self.name]:
                loss = loss + of_states * self._matched(path, mine[path], theirs[path])
        return loss

    @contextmanager
    def _states(self, model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """The hidden states that leave each layer."""
        states: dict[str, list[Tensor]] = {path: [] for path in BLOCKS[self.name]}

        def keep(path: str) -> Callable[..., None]:
            return lambda module, args, output: states[path].append(multiplexed.first(output))

        hooks = [
            layer.register_forward_hook(keep(path))
            for path in BLOCKS[self.name]
            for layer in model.get_submodule(path).children()
        ]
        yield states
        for hook in hooks:
            hook.remove()

    def _matched(self, path: str, mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """CoFi's matching: from the last teacher layer down, the nearest student layer that exists below the last."""
        wanted = min(4, len(theirs))
        theirs = [theirs[(at + 1) * len(theirs) // wanted - 1] for at in range(wanted)]
        exists = [self._exists(layer) for layer in self.model.get_submodule(path).children()]
        if not any(exists):
            return torch.zeros(())
        total, above = torch.zeros(()), len(mine)
        for state in reversed(theirs):
            errors = [F.mse_loss(student, state) for student in mine]
            allowed = [at for at in range(min(above, len(mine))) if exists[at]]
            above = min(allowed, key=lambda at: float(errors[at])) if allowed else above
            total = total + errors[above]
        return total

    def _exists(self, layer: nn.Module) -> bool:
        """A layer exists while one of its sublayers is open; one that is not gated in both kinds always does."""
        within = {id(module) for module in layer.modules()}
        sites = [s for s in self.sites.values() if id(self.linears[s.output.linear.name]) in within]
        gated = {site.path: self.layer_gates[site.path] for site in sites if site.path in self.layer_gates}
        kinds = {isinstance(site, Attention) for site in sites if site.path in gated}
        if kinds != {True, False}:
            return True
        with torch.no_grad():
            values = {path: [gate.value(self.model.training) for gate in gates] for path, gates in gated.items()}
        return any(all(bool((value != 0).any()) for value in gates) for gates in values.values())


def _gated(x: Tensor, factors: Tensor, straight: bool) -> Tensor:
    return x + (x * factors - x).detach() if straight else x * factors


def _numbers(ranges: str) -> Iterator[int]:
    for part in filter(None, ranges.split(",")):
        low, _, high = part.partition("-")
        yield from range(int(low), int(high or low) + 1)


STEPS = 4
"""Optimizer steps of the trainings that are compared."""
TEACHERS: dict[str, nn.Module] = {}
"""A teacher for each family, in plain torch."""


_Composed = TypeVar("_Composed", bound=Oracle)


def sites_of(gm: GraphModule) -> dict[str, Site]:
    """The attentions and MLPs of a graph, by the weight that reads them."""
    every = structures(gm)
    return {site.output.linear.name: site for site in (*every.attentions, *every.mlps)}


def norms_of(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, nn.Module]:
    """The norms of what sublayers add to their streams, by the names of the sublayers' last weights."""
    norms: dict[str, nn.Module] = {}
    for name, site in sites.items():
        node = acts_on(site.output.linear)
        if node is not site.output.linear.node:
            norms[name] = model.get_submodule(fx.stack_path(node))
    return norms


def oracle_of(
    name: str,
    model: nn.Module,
    sites: Mapping[str, Site],
    gm: GraphModule,
    kind: type[_Composed] = Oracle,  # type: ignore[assignment]
) -> _Composed:
    """The composed model that the rewritten ``gm`` stands for.

    Args:
        name: of the family.
        model: the original; it is copied.
        sites: its attentions and MLPs.
        gm: rewritten, not trained yet.
        kind: the class of the oracle.
    """
    model = copy.deepcopy(model).train()
    oracle = kind(name, model, dict(sites), originals=dict(model.named_parameters()), norms=norms_of(model, sites))
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            transposed = not isinstance(module, nn.Linear)
            oracle.linears[f"{path}.weight"] = linear = Linear(module.weight, module.bias, transposed=transposed)
            model.set_submodule(path, linear)
    _follow_calls(oracle)
    oracle.apply(gm)
    return oracle


def _follow_calls(oracle: Oracle) -> None:
    """Adds the matrices that belong to no linear, and lets the model call these where it multiplies by them."""
    tables = {id(module.weight) for module in oracle.model.modules() if isinstance(module, nn.Embedding)}
    known = {id(linear.weight) for linear in oracle.linears.values()} | tables
    called = {
        name: Linear(weight)
        for name, weight in oracle.originals.items()
        if weight.dim() == 2 and id(weight) not in known
    }
    oracle.linears |= called
    forward = oracle.model.forward

    def within(*args: Any, **kwargs: Any) -> Any:
        with _Called(called.values()):
            return forward(*args, **kwargs)

    oracle.model.forward = within


def differences(gm: GraphModule, oracle: Oracle) -> dict[str, float]:
    """The largest difference of every parameter between a trained graph and its oracle."""
    held = {weight.name: weight for weight in record_of(gm).weights}
    parameters = oracle.parameters()
    values = dict(gm.named_parameters())
    off: dict[str, float] = {}
    with torch.no_grad():
        for name, value in values.items():
            if (original := name.removesuffix("_values")) in held and original != name:
                weight = held[original]
                value = unpack(
                    value, gm.get_buffer(f"{original}_indices"), Pattern.parse(weight.pattern), weight.in_features
                )
                if original in oracle.filters:
                    off[name] = _off(value, parameters[original].mT if weight.transposed else parameters[original])
                else:
                    off[name] = _off(value, _left(oracle, original, dense=True, pruned=True))
            elif name in oracle.filters:
                off[name] = _off(value * oracle.filters[name], parameters[name])
            elif name in held and not oracle.linears[name].straight:
                mask = gm.get_buffer(f"{name}_mask")
                mine = (value.t() if held[name].transposed else value) * mask
                off[name] = _off(mine, _left(oracle, name, dense=True, pruned=True))
            elif name in oracle.linears:
                off[name] = _off(value, oracle.of_heads(name, _left(oracle, name), value.shape))
            elif name.removesuffix("bias") + "weight" in oracle.linears:
                rows = oracle.linears[name.removesuffix("bias") + "weight"].rows_left
                off[name] = _off(value, oracle.of_heads(name, parameters[name][rows], value.shape))
            elif name in parameters:
                off[name] = _off(value, oracle.of_heads(name, parameters[name], value.shape))
    return off


def _shared(one: str, other: str) -> int:
    """How many modules two paths begin with together."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    )


def _left(oracle: Oracle, name: str, *, dense: bool = False, pruned: bool = False) -> Tensor:
    linear = oracle.linears[name]
    weight = linear._left(linear.dense * linear.mask if pruned else linear.dense)
    return weight.t() if linear.transposed and not dense else weight


def _off(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return math.inf
    return float((mine - theirs).abs().max()) if mine.numel() else 0.0

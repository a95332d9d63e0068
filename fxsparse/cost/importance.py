"""The importance of a tensor, by which GreenTrainer selects (arXiv 2309.13192, section 3.2): how far training it lowers
the loss.

The optimizer's step dw on all weights is scaled by a factor for each tensor, L(c) = loss at w + c_k dw_k for tensor k.
Taking tensor k out of the step changes the loss at the rate

    I_k = - dL/dc_k at c = 1 = - sum over the elements of tensor k of  dw * dL/dw at w + dw

so the gradients are those after the step, on the same batch, and I_k is the decrease of the loss, to first order, that
is due to tensor k. Learning rate, moments and decay are in it. The authors' code divides all by the largest magnitude
(`scaled` does), which changes no selection, and leaves two extra updates in the optimizer's moments; this one leaves no
trace.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from fxsparse.cost.backprop import BackpropGraph
from fxsparse.errors import OptionError, nearest
from fxsparse.graph import parameter_names, unwrapped
from fxsparse.graph.sharded import cut_like, is_sharded, whole
from fxsparse.graph.trainable import fully_trained, trainable
from fxsparse.options import checked

Metric = Literal["importance", "delta", "gradient"]


def tensor_importance(
    gm: GraphModule,
    optimizer: Optimizer,
    batch: Any,
    *,
    metric: Metric = "importance",
    tensors: Iterable[str] | None = None,
    rho: float | None = None,
    pointwise: bool = False,
    scaled: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
    all_ranks: bool = False,
) -> dict[str, float]:
    """The importance of every tensor that the optimizer trains, measured on one batch.

    Weights, gradients, buffers, the random state and the optimizer (moments, step counts, missing state) are restored
    bit for bit. The measurement runs the graph uncompiled, twice forward and backward with the same dropout, and one
    ``optimizer.step()`` without its hooks. It holds one more copy of the weights and moments it evaluates, and their
    gradients.

    Args:
        gm: a traced or rewritten graph module; tensors that a selection froze are measured too.
        optimizer: the optimizer that trains it.
        batch: the inputs of the graph: a mapping of keyword inputs, a tuple of positional ones, or one tensor.
        metric: ``importance``, in units of the loss; or a metric that the paper compares with: ``delta``, sum of |dw|,
            or ``gradient``, sum of |dL/dw| before the step.
        tensors: names of the tensors to evaluate; by default all.
        rho: leave out tensors that alone cost more than this share of a full step's FLOPs. No selection contains them,
            and neither their gradients nor the activations that only those need are kept. The measured step is then
            one of the other tensors.
        pointwise: count biases, norms, activations and the like in rho too, see `fxsparse.cost.pointwise`.
        scaled: divide by the largest magnitude, so that values lie in [-1, 1] whatever the learning rate.
        loss: computes the scalar loss from the outputs of the graph; by default its ``loss``, or its one scalar.
        all_ranks: measure by the mean gradient of all ranks, each with a batch of its own. Every rank must call, as it
            must if parameters are sharded by ``fully_shard``, which are gathered for it.

    Returns:
        The metric by tensor name, one name for a tied tensor.

    Raises:
        OptionError: nothing to train, an unknown name or metric, rho out of range, no scalar loss, or a result that is
            not finite.
    """
    gm = unwrapped(gm)
    metric = checked("metric", metric, Metric)
    probe = fully_trained(gm)
    names = _evaluated(gm, optimizer, tensors)
    if rho is not None:
        graph = BackpropGraph(probe, trainable=trainable(gm), pointwise=pointwise)
        budget, instance = graph.budget(rho), graph.instance()
        names = [name for name in names if instance.cost([name]) <= budget]
    parameters = [gm.get_parameter(name) for name in names]
    if not parameters:
        return {}
    originals = [parameter.detach().clone() if is_sharded(parameter) else parameter.data for parameter in parameters]
    with _left_as_it_was(gm, optimizer, parameters, originals) as lent:
        gradients = functools.partial(_gradients, probe, parameters, batch, loss, all_ranks)
        values = _measured(metric, lent, parameters, originals, gradients)
    result = dict(zip(names, values, strict=True))
    for name, value in result.items():
        if not math.isfinite(value):
            raise OptionError(f"the {metric} on this batch is {value}; the loss or a gradient overflows", site=name)
    largest = max(map(abs, result.values()))
    return {name: value / largest for name, value in result.items()} if scaled and largest else result


def _measured(
    metric: str,
    optimizer: Optimizer,
    parameters: list[nn.Parameter],
    originals: list[Tensor],
    gradients: Callable[[], list[Tensor]],
) -> list[float]:
    """The metric of each parameter; the optimizer takes its step for ``importance`` and ``delta``."""
    first = gradients()
    if metric == "gradient":
        return [_sum(gradient.abs()) for gradient in first]
    for parameter, gradient in zip(parameters, first, strict=True):
        parameter.grad = gradient
    del first
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    steps = [parameter.detach() - old for parameter, old in zip(parameters, originals, strict=True)]
    if metric == "delta":
        return [_sum(step.abs()) for step in steps]
    return [-_sum(step.float() * dw.float()) for step, dw in zip(steps, gradients(), strict=True)]


def _evaluated(gm: GraphModule, optimizer: Optimizer, tensors: Iterable[str] | None) -> list[str]:
    """The tensors to evaluate, by the name that `trainable` gives them."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = [name for name in trainable(gm) if id(gm.get_parameter(name)) in held]
    if not names:
        raise OptionError(
            "the optimizer holds no trainable tensor of the graph: build it from gm.parameters() after rewriting, and "
            "leave requires_grad on tensors that may be trained"
        )
    if tensors is None:
        return names
    known = {alias: aliases[0] for aliases in parameter_names(gm).values() for alias in aliases}
    chosen = set()
    for name in tensors:
        if name not in known:
            raise OptionError(f"no parameter of that name; {nearest(name, known)}".rstrip("; "), site=name)
        if known[name] not in names:
            raise OptionError("is not trained: it requires no gradient or the optimizer does not hold it", site=name)
        chosen.add(known[name])
    return [name for name in names if name in chosen]


@contextmanager
def _left_as_it_was(
    gm: GraphModule, optimizer: Optimizer, parameters: list[nn.Parameter], values: list[Tensor]
) -> Iterator[Optimizer]:
    """Lends the optimizer and the parameters, which have ``values``, with copies of their state, and restores them."""
    wrapped = getattr(optimizer, "optimizer", None)
    inner: Optimizer = wrapped if isinstance(wrapped, Optimizer) else optimizer
    every = {id(p): p for p in (*gm.parameters(), *(p for group in inner.param_groups for p in group["params"]))}
    evaluated = {id(parameter) for parameter in parameters}
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in every.values()]
    attributes = dict(vars(inner))
    devices = [p.device for p in parameters if p.device.type == "cuda"]
    try:
        with torch.random.fork_rng(sorted({device.index for device in devices})):
            for parameter in every.values():
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in evaluated)
            for parameter in parameters:
                if not is_sharded(parameter):
                    parameter.data = parameter.data.clone()
            inner.state = defaultdict(dict)
            for key, state in attributes["state"].items():
                inner.state[key] = (
                    {name: _copy(item) for name, item in state.items()} if id(key) in evaluated else state
                )
            inner.param_groups = [
                {name: item if name == "params" else _copy(item) for name, item in group.items()}
                for group in attributes["param_groups"]
            ]
            for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                setattr(inner, hooks, OrderedDict())
            yield inner
    finally:
        vars(inner).clear()
        vars(inner).update(attributes)
        for parameter, value in zip(parameters, values, strict=True):
            if is_sharded(parameter):  # has no memory of its own to exchange
                parameter.detach().copy_(value)
            else:
                parameter.data = value
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def _copy(item: Any) -> Any:
    return item.detach().clone() if isinstance(item, Tensor) else copy.deepcopy(item)


def _gradients(
    probe: GraphModule,
    parameters: list[nn.Parameter],
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    all_ranks: bool,
) -> list[Tensor]:
    """The gradients of the loss; zero for a tensor it does not depend on. Leaves the random state as it was."""
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), torch.enable_grad(), _gathered(probe) as leaves:
        output = call(probe, batch)
        scalar = loss(output) if loss is not None else _loss_of(output)
        wanted = [leaves.get(id(parameter), parameter) for parameter in parameters]
        gradients = torch.autograd.grad(scalar, wanted, allow_unused=True)
    dense = [
        torch.zeros_like(leaf) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
        for leaf, gradient in zip(wanted, gradients, strict=True)
    ]
    if all_ranks:
        for gradient in dense:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
    return [cut_like(gradient, parameter) for gradient, parameter in zip(dense, parameters, strict=True)]


@contextmanager
def _gathered(probe: GraphModule) -> Iterator[dict[int, nn.Parameter]]:
    """Whole parameters in the places of sharded ones, for a call of the graph; gives them by the sharded one's id."""
    sharded = {id(parameter): parameter for parameter in probe.parameters() if is_sharded(parameter)}
    leaves = {key: nn.Parameter(whole(p.detach()), requires_grad=p.requires_grad) for key, p in sharded.items()}

    def exchange(by_id: Mapping[int, nn.Parameter]) -> None:
        for module in probe.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = by_id.get(id(parameter), parameter) if parameter is not None else None

    exchange(leaves)
    try:
        yield leaves
    finally:
        exchange({id(leaf): sharded[key] for key, leaf in leaves.items()})


def call(gm: nn.Module, batch: Any) -> Any:
    """``gm`` called with a mapping of keyword inputs, a tuple or list of positional ones, or one tensor."""
    if isinstance(batch, Mapping):
        return gm(**batch)
    return gm(*batch) if isinstance(batch, (tuple, list)) else gm(batch)


def _loss_of(output: Any) -> Tensor:
    leaves = output if isinstance(output, (tuple, list)) else [output]
    if isinstance(output, Mapping):
        leaves = [output["loss"]] if isinstance(output.get("loss"), Tensor) else list(output.values())
    scalars = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 0]
    if len(scalars) != 1 or not scalars[0].requires_grad:
        raise OptionError(
            f"the graph returns {len(scalars)} scalars, and one that depends on the trained tensors is needed: give "
            "the batch its labels, or pass loss=, a function of the graph's outputs"
        )
    return scalars[0]


def _sum(tensor: Tensor) -> float:
    return float(whole(tensor.sum(dtype=torch.float64)))

"""The losses of distillation, and the layers they compare.

    loss = a task + b T^2 KL(softmax(teacher / T) || softmax(student / T)) + c sum over pairs (s, t) of MSE(P h_s, h_t)
           + d sum over pairs (s, t) of MSE(A_s, A_t) + e MSE(P e_s, e_t)

h are the hidden states after a layer, A its attention matrices ``[batch, heads, queries, keys]`` after the softmax and
before dropout, e the hidden states before the first layer, P a projection or nothing.

CoFi (arXiv 2204.00408) pairs dynamically: from the last teacher layer down, each takes the student layer with the
least MSE among those that exist and lie below the one taken before. If there is none, it takes that one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.sizes import expression
from fxsparse.errors import RewriteError
from fxsparse.ops.flops import Operand, Product, Size
from fxsparse.tracing.casting import convert

Projection = tuple[Any, Any]
"""Weight ``[teacher's width, student's width]`` and bias."""


@dataclass(frozen=True)
class Losses:
    """The weights of the losses, and how layers are paired.

    Attributes:
        task, logits, hidden: weights of the model's own loss, the KL divergence and the summed MSE.
        temperature: T.
        dynamic: pair layers by CoFi's matching; else student layer i and the i-th of the teacher's states go together.
        attention, embedding: weights of the summed MSE of attention matrices, and of the MSE of embeddings.
    """

    task: float
    logits: float
    hidden: float
    temperature: float
    dynamic: bool
    attention: float = 0.0
    embedding: float = 0.0


class Held:
    """Keeps a module out of the state of its holder; copies of the holder share the module."""

    def __init__(self, module: nn.Module | None):
        self.module = module
        self._counted: tuple[nn.Module, BackpropGraph] | None = None

    def flops(self, inputs: Sequence[Operand]) -> Size:
        """FLOPs of a call of the module, a graph module, with inputs of these shapes; 0 without a module."""
        if self.module is None:
            return 0
        module = cast(GraphModule, self.module)
        if self._counted is None or self._counted[0] is not module:
            self._counted = (module, BackpropGraph(module))
        graph, reads = self._counted[1], module.graph.find_nodes(op="placeholder")
        shapes = {str(read.target): operand.shape for read, operand in zip(reads, inputs, strict=True)}
        if all(isinstance(size, int) for shape in shapes.values() for size in shape):
            return graph.forward(**shapes)
        theirs = (map(expression, fx.value(read).shape) for read in reads)
        pairs = (
            pair for shape, own in zip(theirs, shapes.values(), strict=True) for pair in zip(shape, own, strict=True)
        )
        return graph.expression().xreplace({size: own for size, own in pairs if not isinstance(size, int)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self


class Distillation(nn.Module):
    """The loss of a student; in evaluation mode it is the task's alone, and the teacher does not run.

    The teacher runs in evaluation mode and without gradients. It is in no ``state_dict`` and no ``parameters()``, and
    follows the student to another device.

    Args:
        losses: their weights.
        teacher: called with its input tensors, returns the logits and three lists with an entry for each stack: hidden
            states, attention matrices of every layer, embeddings; None for a checkpoint that is not restored for
            training.
        projections: for every stack one for all student layers, or one each and then one for embeddings, or none.
    """

    def __init__(self, losses: Losses, teacher: nn.Module | None, projections: Sequence[Sequence[nn.Linear]]):
        super().__init__()
        self.losses, self.held = losses, Held(teacher)
        self.projections = nn.ModuleList(nn.ModuleList(linears) for linears in projections)

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        teacher = self.held.module
        if isinstance(teacher, GraphModule):
            convert(teacher, fn, teacher._apply)
        elif teacher is not None:
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    def forward(
        self,
        loss: Tensor,
        logits: Tensor | None,
        stacks: Sequence[Sequence[Tensor]],
        gates: Sequence[Sequence[Sequence[Sequence[Tensor]]]],
        inputs: Sequence[Tensor],
        attentions: Sequence[Sequence[Sequence[tuple[Any, ...]]]] = (),
        embeddings: Sequence[Tensor] = (),
        projections: Sequence[Sequence[Projection]] = (),
    ) -> Tensor:
        """The loss to train on.

        Args:
            loss: of the task, a scalar.
            logits: ``[..., classes]``.
            stacks: for every stack the stream out of every block, ``[..., dim]``.
            gates: for every stack and block the gates, as `layers_exist` takes them.
            inputs: the input tensors of the teacher.
            attentions: for every stack and block what `matrix_of` takes, for each of its attentions.
            embeddings: for every stack the stream into its first block.
            projections: for every stack those of `projections` as the graph reads them, which may detach them.
        """
        if not self.training:
            return loss
        if self.held.module is None:
            raise RewriteError("the teacher is not part of a checkpoint; give it back with attach_teacher(gm, teacher)")
        with torch.no_grad():
            expected, states, matrices, embedded = self.held.module(*inputs)
        total = self.losses.task * loss
        if logits is not None:
            total = total + self.losses.logits * divergence(logits, expected, self.losses.temperature)
        exist = [layers_exist(closing, loss.device) if any(closing) else None for closing in gates]
        for streams, exists, wanted, project in zip(stacks, exist, states, projections, strict=False):
            total = total + self.losses.hidden * self._hidden(streams, wanted, project, exists)
        for calls, exists, wanted in zip(attentions, exist, matrices, strict=True) if attentions else ():
            total = total + self.losses.attention * attention_loss(calls, wanted, exists)
        for stream, wanted, project in zip(embeddings, embedded, projections, strict=False):
            embedding = F.linear(stream, *project[-1]) if project else stream
            total = total + self.losses.embedding * F.mse_loss(embedding, wanted)
        return total

    def _hidden(
        self,
        streams: Sequence[Tensor],
        wanted: Sequence[Tensor],
        projections: Sequence[Projection],
        exists: Tensor | None,
    ) -> Tensor:
        states = list(streams)
        if projections:
            each = of_layers(projections, len(states))
            states = [F.linear(state, *project) for project, state in zip(each, states, strict=True)]
        return layer_loss(states, wanted, exists) if self.losses.dynamic else paired_loss(states, wanted, exists)

    def flops(
        self,
        out: Operand,
        loss: Operand,
        logits: Operand | None,
        stacks: Sequence[Sequence[Operand]],
        gates: Any,
        inputs: Sequence[Operand],
        attentions: Sequence[Sequence[Sequence[tuple[Any, ...]]]] = (),
        embeddings: Sequence[Operand] = (),
        projections: Sequence[Sequence[Projection]] = (),
    ) -> Sequence[Product]:
        """The products of a training step: the teacher's, which have no gradients, attention matrices, projections."""
        products = [Product(self.held.flops(inputs), {}, "teacher")]
        every = [call for stack in attentions for layer in stack for call in layer]
        calls = [call for call in every if len(call) > 1]  # of a softmax, the matrix is there
        for at, (query, key, *_) in enumerate(calls):
            flops = 2 * query.numel * key.shape[-2]
            products.append(Product(flops, {query: flops, key: flops}, f"attention{at}"))
        projected: list[tuple[Operand, Projection]] = []
        for streams, project in zip(stacks, projections, strict=False):
            projected += zip(streams, of_layers(project, len(streams)), strict=False)
        projected += [
            (stream, project[-1]) for stream, project in zip(embeddings, projections, strict=False) if project
        ]
        for at, (stream, (weight, _)) in enumerate(projected):
            flops = 2 * stream.numel * weight.shape[0]
            products.append(Product(flops, {stream: flops, weight: flops}, f"projection{at}"))
        return [*products, Product(0, dict.fromkeys(products, 0), "loss")]


def of_layers(projections: Sequence[Projection], layers: int) -> Sequence[Projection]:
    """The projection of each of so many layers: one each, or the first for all; none where there are none."""
    return projections[:layers] if len(projections) >= layers else [*projections[:1]] * layers


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits ``[..., classes]``, averaged over all rows (examples, or tokens)."""
    mine = F.log_softmax(student.flatten(0, -2).float() / temperature, -1)
    theirs = F.log_softmax(teacher.flatten(0, -2).float() / temperature, -1)
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2


def matrix_of(operands: Sequence[Any]) -> Tensor:
    """The matrix of an attention: of a fused one from the arguments of `attention_matrix`, else it is there."""
    return operands[0].float() if len(operands) == 1 else attention_matrix(*operands)


def attention_matrix(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The attention that ``scaled_dot_product_attention`` gives its values, ``[..., heads, queries, keys]``.

    Args:
        query: ``[..., heads, queries, dim]``.
        key: ``[..., key heads, keys, dim]``; a key head serves consecutive query heads.
        mask: bool, True where attended, or added; broadcast.
        causal: query i attends keys up to i.
        scale: of the products; by default that of the dimension.

    A query that attends nothing has a row of zeros.
    """
    query, key = query.float(), key.float()
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.ops.aten._safe_softmax(scores, -1)


def attention_loss(
    calls: Sequence[Sequence[tuple[Any, ...]]], wanted: Sequence[Sequence[Tensor]], exists: Tensor | None = None
) -> Tensor:
    """Summed MSE of attention matrices; those of a layer that does not exist count nothing."""
    layers = [
        torch.stack([F.mse_loss(matrix_of(mine), theirs) for mine, theirs in zip(*layer, strict=True)]).sum()
        for layer in zip(calls, wanted, strict=True)
    ]
    errors = torch.stack(layers)
    return (errors if exists is None else errors * exists).sum()


def layers_exist(gates: Sequence[Sequence[Sequence[Tensor]]], device: torch.device) -> Tensor:
    """Which layers do anything, bool ``[layers]``: one exists while any of its sublayers is open.

    Args:
        gates: for every layer, for each of its sublayers, the gates it must pass; a sublayer is open while each of them
            has a value that is not 0. A layer of which not every sublayer is gated has no entries: it exists.
        device: of the result.
    """

    def is_open(sublayer: Sequence[Tensor]) -> Tensor:
        return torch.stack([(gate != 0).any() for gate in sublayer]).all()

    with torch.no_grad():
        always = torch.ones((), dtype=torch.bool, device=device)
        return torch.stack([torch.stack([is_open(s) for s in layer]).any() if layer else always for layer in gates])


def paired_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], exists: Tensor | None = None) -> Tensor:
    """Summed MSE of hidden states that go together; a layer that does not exist counts nothing."""
    errors = torch.stack([F.mse_loss(mine, theirs) for mine, theirs in zip(student, teacher, strict=True)])
    return (errors if exists is None else errors * exists).sum()


def layer_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], exists: Tensor | None = None) -> Tensor:
    """Summed MSE of each teacher state and the student state that `match_layers` gives it; 0 where none exists."""
    with torch.no_grad():
        errors = torch.stack([torch.stack([F.mse_loss(mine, theirs) for mine in student]) for theirs in teacher])
        if exists is None:
            exists = torch.ones(len(student), dtype=torch.bool, device=errors.device)
        chosen = match_layers(errors, exists)
    states = torch.stack(list(student)).index_select(0, chosen)
    # A mean over one teacher state, so the mean over all of them times their number.
    return F.mse_loss(states, torch.stack(list(teacher))) * len(teacher) * exists.any()


def match_layers(errors: Tensor, exists: Tensor) -> Tensor:
    """The student layer for each teacher layer, from the last teacher layer down.

    Args:
        errors: MSE of teacher layer t and student layer s, ``[teacher layers, student layers]``.
        exists: bool ``[student layers]``.

    Returns:
        int64 ``[teacher layers]``, always within range; existing layers if there is one, below each other as long as
        there are enough.
    """
    layers = errors.shape[1]
    place = torch.arange(layers, device=errors.device)
    above = torch.full((), layers, device=errors.device)
    chosen = []
    for row in reversed(errors.unbind()):
        allowed = exists & (place < above)
        nearest = row.masked_fill(~allowed, torch.inf).argmin()
        above = torch.where(allowed.any(), nearest, above)
        chosen.append(above.clamp(max=layers - 1))
    return torch.stack(chosen[::-1])

"""Distilling a student's hidden states and logits from a frozen teacher (CoFi, arXiv 2204.00408; CHOP, 2305.14864).

CHOP's variant has attention matrices and embeddings in its loss as well, with one projection a layer::

    DistillLayers(teacher, matching="plain", weights=(1, 1, 1), projection="per-layer", attention=1, embedding=1)

Its weights are not published, nor whether attention is compared before or after the softmax; here it is after it.

In training the graph's ``loss`` becomes the weighted sum of `losses`; in evaluation it stays the task's loss and the
teacher does not run. A training step stays a single call, compiled or not::

    gm = fxsparse.rewrite(model, [DropLayers("input", fraction=0.5), DistillLayers(teacher)], kwargs=batch)
    gm(**batch).loss.backward()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.blocks import Block, Stack, stacks, stacks_and_unclear
from fxsparse.analysis.inventory import softmaxes
from fxsparse.analysis.products import SDPA
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.derived_buffers import weights_borrowed
from fxsparse.graph.record import Change, record_of, rewrote
from fxsparse.options import FrozenMapping, Glob, Index, Positive, Weight
from fxsparse.passes.base import Pass, parse_passes
from fxsparse.passes.distill.losses import Distillation, Losses, matrix_of
from fxsparse.passes.distill.teacher import frozen_teacher, logits_of, loss_of, tapped
from fxsparse.passes.pipeline import structure_only
from fxsparse.passes.structured.hard_concrete import mask_name
from fxsparse.passes.structured.nodes import GATE_MARK

PATH = "distillation"
"""The module of a student graph that holds the teacher and the projections."""

_ATTENTION_UNITS, _MLP_UNITS = {"heads", "attention"}, {"intermediate", "ffn"}
_Layers = tuple[Index, ...]


@dataclass(frozen=True)
class DistillLayers(Pass):
    """Adds distillation from a teacher to the model's loss in training.

    Attributes:
        teacher: a module that takes the student's inputs, traced or not. It is not trained, and not in the student's
            ``state_dict``; one that shares parameters with the student (the model it was made from) is copied, with a
            warning. ``fxsparse.rewrite(model, ..., copy=True)`` gives the student its own instead.
        matching: ``dynamic`` (CoFi: each teacher layer finds its student layer at every step) or ``plain`` (CHOP: each
            student layer has one teacher layer).
        temperature: T of the logits.
        weights: of the task's loss, of the logits, of the hidden states. CoFi leaves the first out, CHOP does not.
        teacher_layers: numbers, from 0, of the teacher's layers, or a mapping from globs over stack paths to them.
            Dynamic matching takes evenly spaced ones, four unless there are fewer; the plain one needs one for every
            student layer, by default evenly spaced and ending with the last.
        projection: of student states to the teacher's width: ``none``, ``shared`` (one for all layers, CoFi) or
            ``per-layer`` (CHOP). They start as the identity.
        width: the teacher's hidden size, if it differs; only loading a checkpoint without the teacher needs it.
        attention: weight of the attention matrices, of layers that go together (plain matching). They are computed in
            training beside the fused attention, which never has them: one more product and ``[batch, heads, queries,
            keys]`` in memory for each layer and model. CHOP finds that they do not pay.
        embedding: weight of what enters the first layer, through the shared projection or, ``per-layer``, its own.

    Raises:
        OptionError: an option is out of range.
        RewriteError: the model returns no loss, or teacher and student do not fit: another width without a projection,
            other inputs, other stacks or classes.
    """

    name: ClassVar[str] = "distill"
    rest: ClassVar[str] = "no states of it are compared"
    cannot_follow: ClassVar[tuple[str, ...]] = ("distill", "select-tensors")
    training_only: ClassVar[bool] = True
    no_module: ClassVar[str] = "its loss reads a teacher and hidden states; run end-distill first"
    teacher: nn.Module | None = field(default=None, compare=False, repr=False)
    matching: Literal["dynamic", "plain"] = "dynamic"
    temperature: Positive = 2.0
    weights: tuple[Weight, Weight, Weight] = (0.0, 0.1, 0.9)
    teacher_layers: _Layers | Mapping[Glob, _Layers] | None = None
    projection: Literal["none", "shared", "per-layer"] = "none"
    width: Annotated[int, Interval(ge=1, le=2**20)] | None = None
    attention: Weight = 0.0
    embedding: Weight = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any((*self.weights[1:], self.attention, self.embedding)):
            raise OptionError(
                f"weights={self.weights} are those of task, logits and hidden states: one of the last two, or "
                "attention or embedding, must be above 0",
                pass_name=self.name,
            )
        if self.attention and self.matching != "plain":
            raise OptionError(
                'attention matrices belong to layers that go together: use matching="plain"', pass_name=self.name
            )

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if weights_borrowed(graph):
            raise RewriteError(
                "a one-line call has no teacher; call fxsparse.rewrite(model, [DistillLayers(teacher)], ...)",
                pass_name=self.name,
            )
        if self.teacher is None and not structure_only(graph):
            raise RewriteError("needs a teacher: DistillLayers(teacher)", pass_name=self.name)
        loss, logits = loss_of(graph), logits_of(graph) if self.weights[1] else None
        students, unclear = stacks_and_unclear(graph) if self._compares_layers else ([], [])
        if unclear:
            raise unclear[0].refusal(self.name)
        if self._compares_layers and not students:
            raise RewriteError(
                "the model has no stack of layers whose hidden states could be compared; distil its logits alone with "
                "weights=(0, 1, 0)",
                pass_name=self.name,
            )
        if self.weights[1] and logits is None:
            raise RewriteError("the model returns no logits; use weights=(a, 0, c)", pass_name=self.name)
        teacher = None if self.teacher is None else self._frozen(graph, self.teacher, students)
        widths = [self.width] * len(students) if teacher is None else [_width(stack) for stack in teacher.stacks]
        projections = [self._projection(*pair) for pair in zip(students, widths, strict=True)]
        losses = Losses(*self.weights, self.temperature, self.matching == "dynamic", self.attention, self.embedding)
        module = Distillation(losses, None, projections)
        module.train(graph.training)
        module.to(next(graph.parameters()))
        graph.add_submodule(PATH, module)
        streams = [[block.stream_out for block in stack.blocks] for stack in students] if self.weights[2] else []
        gates = [[_gates(graph, block) for block in stack.blocks] for stack in students]
        more = (*self._more(students), _read_projections(graph, projections))
        with graph.graph.inserting_before(graph.graph.output_node()):
            node = graph.graph.call_module(PATH, (loss, logits, streams, gates, _tensor_inputs(graph), *more))
        node.meta["val"] = fx.value(loss)
        graph.graph.output_node().replace_input_with(loss, node)
        yield from self._changes(students)
        if teacher is not None:
            self._attach(graph, node, teacher, students, logits)
        task, of_logits, _ = self.weights
        note = ", the teacher is a copy, for it shares parameters" if teacher is not None and teacher.copied else ""
        yield rewrote("loss", f"task x {task}, logits x {of_logits} at T = {self.temperature}{note}")

    @property
    def _compares_layers(self) -> bool:
        return bool(self.weights[2] or self.attention or self.embedding)

    def _more(self, students: list[Stack]) -> tuple[list[Any], list[Any]]:
        """The arguments of the losses of attention matrices and of embeddings."""
        blocks = [stack.blocks for stack in students] if self.attention else []
        calls = [[[_operands(call) for call in _attentions(block)] for block in row] for row in blocks]
        return calls, [stack.blocks[0].stream_in for stack in students] if self.embedding else []

    def _changes(self, students: list[Stack]) -> Iterable[Change]:
        for stack in students:
            how = f"{self.matching} matching" + ("" if self.projection == "none" else f", {self.projection} projection")
            more = f", attention matrices x {self.attention}" if self.attention else ""
            more += f", embeddings x {self.embedding}" if self.embedding else ""
            yield rewrote(stack.path, f"hidden states of {len(stack.blocks)} layers x {self.weights[2]}, {how}{more}")

    def _projection(self, stack: Stack, width: int | None) -> list[nn.Linear]:
        if self.projection == "none" or not (self.weights[2] or self.embedding):
            return []
        inner, count = _width(stack), 1
        if self.projection == "per-layer":
            count = (len(stack.blocks) if self.weights[2] else 0) + bool(self.embedding)
        linears = [nn.Linear(inner, width or inner) for _ in range(count)]
        for linear in linears:
            nn.init.eye_(linear.weight), nn.init.zeros_(linear.bias)
        return linears

    def _frozen(self, gm: GraphModule, teacher: nn.Module, students: list[Stack]) -> _Teacher:
        """The teacher, with the stacks that go with the student's."""
        graph, copied = frozen_teacher(gm, teacher)
        end_distillation(graph)
        theirs = self._paired(students, stacks(graph) if students else [])
        for mine, other in zip(students, theirs, strict=True):
            self._check_width(mine, other)
        return _Teacher(graph, theirs, copied)

    def _attach(
        self, gm: GraphModule, node: Node, teacher: _Teacher, students: list[Stack], logits: Node | None
    ) -> None:
        """Gives the student's graph its teacher."""
        wanted_logits = self._teacher_logits(teacher.graph, logits) if logits is not None else None
        pairs = list(zip(students, teacher.stacks, strict=True))
        states, matrices = [], []
        for mine, other in pairs:
            blocks = [other.blocks[position] for position in self._layers(mine, other)]
            if self.weights[2]:
                states.append([block.stream_out for block in blocks])
            if self.attention:
                matrices.append([_matrices(teacher.graph, *pair) for pair in zip(mine.blocks, blocks, strict=True)])
        embedded = [other.blocks[0].stream_in for _, other in pairs] if self.embedding else []
        function = tapped(teacher.graph, [wanted_logits, states, matrices, embedded])
        inputs = {str(read.target): read for read in _tensor_inputs(gm)}
        wanted = [str(read.target) for read in function.graph.find_nodes(op="placeholder")]
        if missing := [name for name in wanted if name not in inputs]:
            raise RewriteError(
                f"the teacher reads {', '.join(missing)}, which the student is not given; it takes {', '.join(inputs)}",
                pass_name=self.name,
            )
        node.args = (*node.args[:4], [inputs[name] for name in wanted], *node.args[5:])
        gm.get_submodule(PATH).held.module = function  # type: ignore[union-attr]

    def _paired(self, mine: list[Stack], theirs: list[Stack]) -> list[Stack]:
        if len(mine) == len(theirs):
            return theirs
        by_path = {stack.path: stack for stack in theirs}
        if all(stack.path in by_path for stack in mine):
            return [by_path[stack.path] for stack in mine]
        raise RewriteError(
            f"the teacher's stacks of layers ({', '.join(by_path) or 'none'}) are not the student's "
            f"({', '.join(stack.path for stack in mine)})",
            pass_name=self.name,
        )

    def _check_width(self, mine: Stack, theirs: Stack) -> None:
        ours, other = (fx.value(stack.blocks[0].stream_out).shape for stack in (mine, theirs))
        if self.projection == "none" and ours[-1] != other[-1]:
            raise RewriteError(
                f"its hidden states are {ours[-1]} wide and the teacher's {other[-1]}; "
                "give projection='shared' or projection='per-layer'",
                pass_name=self.name,
                site=mine.path,
            )
        if len(ours) != len(other) or not all(map(_agree, ours[:-1], other[:-1])):
            raise RewriteError(
                f"its hidden states have sizes {tuple(ours)} and the teacher's {tuple(other)}; where one of them is "
                "multiplexed, multiplex the other alike, or distil logits alone with weights=(a, b, 0)",
                pass_name=self.name,
                site=mine.path,
            )

    def _teacher_logits(self, traced: GraphModule, logits: Node) -> Node:
        theirs = logits_of(traced)
        ours, other = fx.value(logits).shape, None if theirs is None else fx.value(theirs).shape
        if theirs is None or other is None or len(ours) != len(other) or ours[-1] != other[-1]:
            raise RewriteError(
                f"the student's logits have sizes {tuple(ours)} and the teacher's {other and tuple(other)}; "
                "distil hidden states alone with weights=(a, 0, c)",
                pass_name=self.name,
            )
        return theirs

    def _layers(self, mine: Stack, theirs: Stack) -> Sequence[int]:
        """Positions of the teacher's layers that are compared."""
        layers = len(theirs.blocks)
        numbers: Any = self.teacher_layers
        if isinstance(numbers, FrozenMapping):
            numbers = next((chosen for glob, chosen in numbers if fnmatchcase(mine.path, glob)), None)
        wanted = len(mine.blocks) if self.matching == "plain" else min(4, layers)
        if numbers is None:
            return [max(0, (position + 1) * layers // wanted - 1) for position in range(wanted)]
        if not numbers or any(not 0 <= number < layers for number in numbers):
            raise RewriteError(
                f"teacher_layers={list(numbers)} must be numbers of the teacher's {layers} layers, from 0",
                pass_name=self.name,
                site=mine.path,
            )
        if self.matching == "plain" and len(numbers) != wanted:
            raise RewriteError(
                f"plain matching needs a teacher layer for each of the {wanted} layers, not {len(numbers)}",
                pass_name=self.name,
                site=mine.path,
            )
        return numbers


@dataclass(frozen=True)
class _Teacher:
    """A frozen graph, its stacks in the order of the student's, and whether its parameters had to be copied."""

    graph: GraphModule
    stacks: list[Stack]
    copied: bool


@dataclass(frozen=True)
class EndDistillation(Pass):
    """Takes the teacher and the projections out of the model again."""

    name: ClassVar[str] = "end-distill"
    must_follow: ClassVar[tuple[str, ...]] = ("distill",)
    ends: ClassVar[tuple[str, ...]] = ("distill",)

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if end_distillation(graph):
            yield rewrote("loss", "the task's own again")


def end_distillation(gm: GraphModule) -> bool:
    """Takes distillation out of a graph, in place; False if there is none."""
    node = _distillation_node(gm)
    if node is None:
        return False
    fx.replace(node, node.args[0])  # type: ignore[arg-type]
    fx.eliminate_dead_code(gm)
    gm.delete_submodule(PATH)
    return True


def attach_teacher(gm: GraphModule, teacher: nn.Module) -> None:
    """Gives the teacher back to a student that was loaded from a checkpoint, in place.

    Raises:
        RewriteError: ``gm`` does not distil, or the teacher does not fit.
    """
    node = _distillation_node(gm)
    texts = [entry.text for entry in record_of(gm).entries if entry.text.partition("{")[0] == DistillLayers.name]
    if node is None or not texts:
        raise RewriteError(
            "this graph does not distil; rewrite it with DistillLayers(teacher)", pass_name=DistillLayers.name
        )
    (item,) = parse_passes(texts[-1])
    assert isinstance(item, DistillLayers)
    students = stacks(gm) if item._compares_layers else []
    logits: Any = node.args[1]
    item._attach(gm, node, item._frozen(gm, teacher, students), students, logits)
    gm.recompile()


def _read_projections(gm: GraphModule, projections: list[list[nn.Linear]]) -> list[list[tuple[Node, Node]]]:
    """The nodes of weight and bias of every projection, read in the graph as all that can be trained."""

    def read(stack: int, at: int, leaf: str) -> Node:
        return fx.insert_attribute(gm, f"{PATH}.projections.{stack}.{at}.{leaf}", before=gm.graph.output_node())

    return [
        [(read(stack, at, "weight"), read(stack, at, "bias")) for at in range(len(linears))]
        for stack, linears in enumerate(projections)
    ]


def _gates(gm: GraphModule, block: Block) -> list[list[Node]]:
    """The gates of each sublayer of a block; no gates if an attention or an MLP of the block has none."""
    sublayers: dict[str, dict[str, Node]] = {}
    units: set[str] = set()
    for node in gm.graph.nodes:
        unit, path, name = node.meta.get(GATE_MARK, ("", "", ""))
        if node in block.nodes and unit in _ATTENTION_UNITS | _MLP_UNITS:
            units.add(unit)
            sublayers.setdefault(path, {})[name] = _gate(gm, name, node)
    both = units & _ATTENTION_UNITS and units & _MLP_UNITS
    return [[*gates.values()] for gates in sublayers.values()] if both else []


def _gate(gm: GraphModule, name: str, product: Node) -> Node:
    """The value of a gate that a marked product multiplies by."""
    if any(known == name for known, _ in gm.named_parameters()):
        return product.args[1]  # type: ignore[return-value]  # drawn anew in training
    return fx.insert_attribute(gm, mask_name(name), before=gm.graph.output_node())


def _attentions(block: Block) -> list[Node]:
    """The attentions of a block, in order of execution: calls of ``scaled_dot_product_attention``, and softmaxes."""
    graph: Any = block.stream_in.graph.owning_module
    calls = [node for node in softmaxes(graph) if node in block.nodes]
    if not calls:
        raise RewriteError(
            "it has no softmax before a product, so no attention matrix that could be compared; leave attention=0",
            pass_name=DistillLayers.name,
            site=block.path,
        )
    return sorted(calls)


def _operands(call: Node) -> tuple[Any, ...]:
    """What `matrix_of` takes for an attention."""
    if call.target is not SDPA:
        return (call,)
    named = fx.arguments(call)
    return tuple(named.get(name) for name in ("query", "key", "attn_mask", "is_causal", "scale"))


def _matrices(teacher: GraphModule, mine: Block, other: Block) -> list[Node]:
    """The nodes of the attention matrices of a teacher's block, inserted, to compare with a student's."""
    ours, theirs = _attentions(mine), _attentions(other)
    sizes = [[_matrix_sizes(call) for call in calls] for calls in (ours, theirs)]
    if len(ours) != len(theirs) or not all(_fit(*pair) for pair in zip(*sizes, strict=True)):
        raise RewriteError(
            f"its attention matrices have sizes {sizes[0]}, those of the teacher's {other.path} {sizes[1]}; they are "
            "compared head by head, so leave attention=0",
            pass_name=DistillLayers.name,
            site=mine.path,
        )
    return [
        fx.insert_function(teacher, _matrix, *_operands(call), before=call if call.target is SDPA else call.next)
        for call in theirs
    ]


def _matrix(*operands: Any) -> Tensor:
    return matrix_of(operands)


def _fit(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    return len(mine) == len(theirs) and all(map(_agree, mine, theirs))


def _matrix_sizes(call: Node) -> tuple[Any, ...]:
    if call.target is not SDPA:
        return tuple(fx.value(call).shape)
    query, key = (fx.value(operand).shape for operand in _operands(call)[:2])
    return (*query[:-1], key[-2])


def _tensor_inputs(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor)]


def _agree(mine: int | SymInt, theirs: int | SymInt) -> bool:
    """Whether two sizes are the same function of the batch size, or of the length, of the graphs they are of."""
    if isinstance(mine, int) or isinstance(theirs, int):
        return mine == theirs or not (isinstance(mine, int) and isinstance(theirs, int))
    ours, other = mine.node.expr, theirs.node.expr
    if len(ours.free_symbols) != 1 or len(other.free_symbols) != 1:
        return True
    (own,), (its,) = ours.free_symbols, other.free_symbols
    return all(ours.subs(own, size) == other.subs(its, size) for size in (5, 24, 49))


def _width(stack: Stack) -> int:
    return int(fx.value(stack.blocks[0].stream_out).shape[-1])


def _distillation_node(gm: GraphModule) -> Node | None:
    return next(iter(gm.graph.find_nodes(op="call_module", target=PATH)), None)

"""A case: a model, a pipeline and one property of what becomes of it.

Whatever is drawn, a pipeline either rewrites the model or refuses in our own words, and the model stays as it was. What
is refused is left out, and the rest of the pipeline goes on. A rewritten model trains beside an oracle in plain torch
where there is one. Besides, one property of `PROPERTIES` is checked, which costs a capture or a compilation:

    twice       one pass after the other gives the graph of all at once
    sizes       rows of a batch do not depend on each other, at other sizes than the traced ones
    saved       saved and loaded it computes the same
    replayed    its record, read from JSON, makes the same of another copy of the model
    dense       its dense weights make the original compute the same
    compiled    aot_eager trains as eager does
    one-line    torch.compile(model, options={"passes": ...}) computes the same
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import CheckpointError, RewriteError, TraceError
from fxsparse.graph.record import Record, record_of
from fxsparse.graph.trainable import trained
from fxsparse.passes import (
    AddLowRankBranches,
    DistillLayers,
    DoublePruneBackward,
    DropDimensions,
    GateStructures,
    InsertNMMasks,
    Multiplex,
    Pass,
    Pipeline,
    PruneOperands,
    SelectTensors,
)
from fxsparse.passes.base import parse_passes
from fxsparse.passes.distill.distill import attach_teacher
from tests.fuzz import models, oracle, pipelines
from tests.fuzz.models import Spec, batch_of, build, loss_and_logits, traced
from tests.support import composed
from tests.support.composed import EqualDraws, differences
from tests.support.orders import _gates_agree, shape_of

STEPS = composed.STEPS
LR = 0.02


@dataclass(frozen=True)
class Case:
    """What is tried; its ``repr`` is what a named test is written with."""

    spec: Spec
    passes: tuple[str, ...]
    prop: str = "none"


PIPELINES = 4
"""What is tried on one model: capturing it costs as much as the rest of a case."""


@st.composite
def cases(draw: Callable[[Any], Any]) -> list[Case]:
    spec, properties = draw(models.specs()), st.sampled_from(sorted(PROPERTIES))
    return [Case(spec, draw(pipelines.pipelines()), draw(properties)) for _ in range(PIPELINES)]


def check(case: Case) -> tuple[str, str]:
    """Runs a case; an AssertionError or any exception that is not a refusal is a bug.

    Returns:
        ``rewritten``, ``rewritten in part`` (by the passes that were not refused), ``refused`` (all of them),
        ``refused later`` (in training or by the property) or ``untraced``; and what it was held against, or the
        refusal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, base = traced(case.spec)
        except TraceError as error:
            return "untraced", _template(error)
        with _unchanged(model, base):
            drawn = case.passes
            while True:
                try:
                    passes = passes_of(case)
                    gm = Pipeline(passes)(base)
                    break
                except RewriteError as error:
                    refusal = _refused(error)
                    case = _without_refused(case, error)
                    if not case.passes:
                        return refusal
        assert Pipeline.parse(str(Pipeline(passes))) == Pipeline(passes), "text both ways"
        _freezes_as_told(base, gm)
        _is_sparse_as_told(gm)
        try:
            _trains(case, passes, gm)
        except RewriteError as error:  # an OptionError, of the schedule
            return "refused later", _template(error)
        try:
            PROPERTIES[case.prop](case, passes)
        except (RewriteError, CheckpointError) as error:
            if case.prop not in _MAY_REFUSE:
                raise
            return "refused later", _template(error)
        done = "rewritten" if case.passes == drawn else "rewritten in part"
        return done, "with an oracle" if oracle.is_covered(case.spec, passes) else "without an oracle"


def passes_of(case: Case) -> list[Pass]:
    """The passes, with the batches and the teacher that text does not carry."""
    made: list[Pass] = []
    for item in parse_passes(",".join(case.passes)):
        if isinstance(item, (InsertNMMasks, GateStructures, DropDimensions)):
            item = replace(item, calibration=[batch_of(case.spec, seed=at) for at in (50, 51)])
        elif isinstance(item, DistillLayers):
            item = replace(item, teacher=_teacher(case.spec))
        made.append(item)
    return made


class _Teacher(torch.nn.Module):
    """The teacher as the oracle calls it."""

    def __init__(self, model: models.Model):
        super().__init__()
        self.model, self.blocks = model, model.blocks

    def forward(self, **batch: Tensor) -> Any:
        loss, logits = loss_and_logits(self.model.spec, self.model(**batch))
        return mock.Mock(loss=loss, logits=logits)


def _teacher(spec: Spec) -> GraphModule:
    model, gm = build(spec, seed=7), copy.deepcopy(traced(spec)[1])
    gm.load_state_dict(model.state_dict())
    composed.TEACHERS[oracle.NAME] = _Teacher(model.eval())
    return gm


# --- whatever happens -------------------------------------------------------------------------------------------------


@contextmanager
def _unchanged(model: models.Model, base: GraphModule) -> Iterator[None]:
    """The model, its graph and the random state are as they were."""
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    graph, drawn, modes = shape_of(base), torch.get_rng_state(), [module.training for module in model.modules()]
    yield
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0] and torch.equal(tensor, tensors[name][1]), f"{name} of the model changed"
    assert flags == [parameter.requires_grad for parameter in model.parameters()], "requires_grad changed"
    assert modes == [module.training for module in model.modules()], "modes changed"
    assert shape_of(base) == graph, "the traced graph changed"
    assert torch.equal(torch.get_rng_state(), drawn), "random numbers were drawn"


def _refused(error: RewriteError) -> tuple[str, str]:
    message = str(error)
    assert 20 < len(message) < 1500, f"a refusal of {len(message)} characters: {message}"
    return "refused", _template(error)


def _without_refused(case: Case, error: RewriteError) -> Case:
    """The case without the last pass of the name that the refusal starts with; without any where it names none."""
    refused = [at for at, text in enumerate(case.passes) if re.match(rf"{text.partition('{')[0]}\b", str(error))]
    return replace(case, passes=case.passes[: refused[-1]] + case.passes[refused[-1] + 1 :] if refused else ())


def _template(error: Exception) -> str:
    """The message without names and numbers, to count alike ones together."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\b\d[\d.,e+-]*\b", "_", str(error).splitlines()[0])
    return re.sub(r"\b[\w*]+(\.[\w*]+)+\b|_\w+_", "_", text)[:200]


def _freezes_as_told(base: GraphModule, gm: GraphModule) -> None:
    """What was trained is trained, but for what the last choice of tensors says it froze."""
    before = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    choices = [entry for entry in record_of(gm).entries if entry.name == SelectTensors.name]
    told = {_weight(change.site) for entry in choices[-1:] for change in entry.rewritten}
    frozen = {name for name, parameter in gm.named_parameters() if not parameter.requires_grad}
    lost = {name for name in frozen if _weight(name) not in before | told and not name.startswith(_ADDED)}
    assert not lost, f"frozen, and nothing says so: {lost}"
    assert not {name for name in trained(gm) if _weight(name) in told}, "trained, and told to be frozen"


def _is_sparse_as_told(gm: GraphModule) -> None:
    """The N:M weights, column masks and branches that passes told of are in the graph that all passes left."""
    record, reads = record_of(gm), {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    is_read = {_weight(name) for name in reads & parameters}
    held = [weight.name for weight in record.weights if weight.name in is_read]
    lost = [name for name in held if not reads & {f"{name}_indices", f"{name}_mask"}]
    assert not lost, f"without a mask: {lost}"
    for kind, part, found in (
        (DoublePruneBackward, "_column_mask", reads),
        (AddLowRankBranches, "_up", parameters),
    ):
        told = {change.site for entry in record.entries if entry.name == kind.name for change in entry.rewritten}
        weights = {site if site in is_read else f"{site}.weight" for site in told} & is_read
        lost = [weight for weight in weights if f"{weight}{part}" not in found]
        assert not lost, f"without {part}, which {kind.name} told of: {lost}"


_ADDED = ("multiplex.", "teacher")


def _weight(name: str) -> str:
    """The weight whose values or branch a parameter holds."""
    return re.sub(r"_(values|down|up)$", "", name)


# --- training ---------------------------------------------------------------------------------------------------------


def _trains(case: Case, passes: list[Pass], gm: GraphModule) -> None:
    """Some optimizer steps and an evaluation, beside the oracle where there is one."""
    model, base = traced(case.spec)
    twin = None
    if oracle.is_covered(case.spec, passes):
        twin = oracle.oracle_of(model, composed.sites_of(base), gm)
    rewritten = copy.deepcopy(gm)
    losses, expected = _train(case, rewritten, twin)
    _is_sparse_as_told(rewritten)
    assert case.spec.norm == "none" or torch.tensor(losses).isfinite().all(), losses
    batch = batch_of(case.spec, rows=2, length=5, seed=9)
    logits = _evaluated(case, rewritten, batch)
    if twin is None:
        return
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), **tolerance, msg=_told("losses"))
    off = {name: value for name, value in differences(rewritten, twin).items() if not value < 3e-5}
    assert not off, f"parameters: {off}"
    twin.read(rewritten, None)
    twin.model.eval()
    with torch.no_grad():
        theirs = twin.run(batch)[1]
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-4, msg=_told("evaluation"))


def _close(case: Case, mine: Tensor, theirs: Tensor, what: str) -> None:
    off = 0.05 if case.spec.dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(mine, theirs, rtol=off, atol=off, msg=_told(what))


def _told(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


def _train(
    case: Case, gm: GraphModule, twin: oracle.FuzzOracle | None, model: Any = None
) -> tuple[list[float], list[float]]:
    """Trains a graph, and its oracle beside it: the losses of both."""
    if not any(parameter.requires_grad for parameter in gm.parameters()):
        return [0.0], [0.0]
    optimizer = torch.optim.SGD(gm.parameters(), lr=LR)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=STEPS)
    model = gm if model is None else model
    losses: list[float] = []
    expected: list[float] = []
    own_loss = (lambda output: loss_and_logits(case.spec, output)[0]) if case.spec.outputs == "logits" else None
    for step in range(1, STEPS + 1):
        batch = batch_of(case.spec, seed=step, rows=4)
        with EqualDraws():
            schedule.observe(batch, loss=own_loss)
        if twin is not None:
            twin.read(gm, schedule)
            with EqualDraws():
                expected.append(twin.backward(batch))
        optimizer.zero_grad()
        torch.manual_seed(step)
        with EqualDraws():
            loss = loss_and_logits(case.spec, model(**batch))[0]
            losses.append(float(loss.detach()))
            if loss.requires_grad:
                loss.backward()
        if twin is not None:
            _gates_agree(gm, twin)
            twin.step(step, LR)
        optimizer.step()
        schedule.step()
    schedule.remove()
    return losses, expected


def _evaluated(case: Case, module: Any, batch: dict[str, Tensor]) -> Tensor:
    training = module.training
    module.eval()
    with torch.no_grad():
        logits = loss_and_logits(case.spec, module(**batch))[1]
    module.train(training)
    return logits


# --- properties -------------------------------------------------------------------------------------------------------


def _rewritten(case: Case, passes: list[Pass]) -> GraphModule:
    """Rewritten, and moved on from its initial values where something starts at zero."""
    gm = Pipeline(passes)(copy.deepcopy(traced(case.spec)[1]))
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith("_up"):
                parameter += torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape).to(parameter.dtype)
    return gm


def _same(case: Case, left: GraphModule, right: GraphModule, what: str) -> None:
    batch = batch_of(case.spec, rows=4, length=5, seed=21)
    for training in (False, True):
        outputs = []
        for module in (left, right):
            torch.manual_seed(3)
            with torch.no_grad():
                outputs.append(loss_and_logits(case.spec, module.train(training)(**batch)))
        for mine, theirs in zip(*outputs, strict=True):
            assert torch.equal(mine, theirs), f"{what}: training={training}, off by {(mine - theirs).abs().max()}"


def _twice(case: Case, passes: list[Pass]) -> None:
    gm, step = Pipeline(passes)(traced(case.spec)[1]), copy.deepcopy(traced(case.spec)[1])
    for item in passes:
        step = Pipeline([item])(step)
    assert shape_of(step) == shape_of(gm), "another graph in steps"
    mine, theirs = gm.state_dict(), step.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert record_of(step).text == record_of(gm).text


def _sizes(case: Case, passes: list[Pass]) -> None:
    if any(isinstance(item, Multiplex) for item in passes):
        return
    gm = _rewritten(case, passes)
    whole = batch_of(case.spec, rows=7, length=4, seed=5)
    for rows in (slice(0, 2), slice(2, 7)):
        part = {name: value[rows] for name, value in whole.items()}
        _close(case, _evaluated(case, gm, part), _evaluated(case, gm, whole)[rows], "other sizes")


def _fresh(case: Case) -> models.Model:
    return build(case.spec, seed=3)


def _saved(case: Case, passes: list[Pass]) -> None:
    gm = _rewritten(case, passes)
    with tempfile.TemporaryDirectory() as folder:
        fxsparse.save(gm, Path(folder) / "model.safetensors")
        loaded = fxsparse.load(Path(folder) / "model.safetensors", _fresh(case), kwargs=batch_of(case.spec))
    if hasattr(gm, "distillation"):
        attach_teacher(loaded, _teacher(case.spec))
    assert record_of(loaded).text == record_of(gm).text
    _same(case, gm, loaded, "loaded")


def _replayed(case: Case, passes: list[Pass]) -> None:
    measured = ("wanda", "sparsegpt", "activation")
    if any(isinstance(item, DistillLayers) or getattr(item, "criterion", getattr(item, "score", "")) in measured
           for item in passes):  # fmt: skip
        return
    gm = Pipeline(passes)(copy.deepcopy(traced(case.spec)[1]))
    record = Record.from_json(record_of(gm).to_json())
    again = fxsparse.replay(record, build(case.spec), kwargs=batch_of(case.spec))
    _same(case, gm, again, "replayed")


def _dense(case: Case, passes: list[Pass]) -> None:
    gm = _rewritten(case, passes)
    dense = fxsparse.dense_state_dict(gm)
    model = _fresh(case)
    if {name: value.shape for name, value in dense.items()} != {n: v.shape for n, v in model.state_dict().items()}:
        return
    model.load_state_dict(dense)
    batch = batch_of(case.spec, seed=8)
    if not any(isinstance(item, (Multiplex, PruneOperands)) for item in passes):
        _close(case, _evaluated(case, model, batch), _evaluated(case, gm, batch), "dense weights")


def _compiled(case: Case, passes: list[Pass]) -> None:
    eager, gm = (Pipeline(passes)(copy.deepcopy(traced(case.spec)[1])) for _ in range(2))
    torch._dynamo.reset()
    losses, _ = _train(case, eager, None)
    compiled, _ = _train(case, gm, None, torch.compile(gm, backend="aot_eager"))
    if not case.spec.dropout:
        _close(case, torch.tensor(compiled), torch.tensor(losses), "compiled")


def _one_line(case: Case, passes: list[Pass]) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(traced(case.spec)[0]).eval()
    options = {"passes": passes, "compiler": "eager", "fallback": False}
    compiled = torch.compile(model, backend="fxsparse", options=options, dynamic=False)
    batch = batch_of(case.spec, seed=8)
    with torch.no_grad():
        logits = loss_and_logits(case.spec, compiled(**batch))[1]
    gm = Pipeline(passes)(copy.deepcopy(traced(case.spec)[1]))
    _close(case, logits, _evaluated(case, gm, batch), "one line")


PROPERTIES: dict[str, Callable[[Case, list[Pass]], None]] = {
    "none": lambda case, passes: None,
    "twice": _twice,
    "sizes": _sizes,
    "saved": _saved,
    "replayed": _replayed,
    "dense": _dense,
    "compiled": _compiled,
    "one-line": _one_line,
}
_MAY_REFUSE = ("dense", "one-line")

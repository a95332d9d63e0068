"""What is tried on a family: one cell of the census.

A cell rewrites the traced model, trains it for two steps beside the oracle that composes the same passes in plain torch
(`tests.support.composed`), evaluates it at another batch size, saves and loads it. Its result is one of `STATES`.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxsparse
from benchmarks.families.tiny import (
    Family,
    build,
    floats,
    mean_squares,
    with_masks,
    without_labels,
)
from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks
from fxsparse.analysis.expert_channels import expert_mlps
from fxsparse.errors import FxsparseError, InternalError, TraceError
from fxsparse.graph.record import record_of
from fxsparse.passes import DistillLayers
from fxsparse.passes.distill.distill import attach_teacher
from tests.support import composed
from tests.support.composed import EqualDraws, Oracle, differences, oracle_of

STATES = {
    "ok": "every site was rewritten, and all numbers are those of the oracle",
    "partial": "the same, and some sites were skipped with their reasons",
    "refused": "refused with a reason before anything happened",
    "wrong": "other numbers than the oracle's",
    "crash": "an exception that is not ours, or the limit of time or memory",
    "silent": "success was reported, and something that counts was neither rewritten nor skipped",
}
"""What a cell can be."""

_KEEP = "keep_first=false,keep_head=false"
PASSES: dict[str, str] = {
    "masks": f"nm-masks{{{_KEEP}}}",
    "masked": f"nm-masks{{storage=masked,convolutions=true,{_KEEP}}}",
    "double-prune": f"nm-masks{{{_KEEP}}},double-prune",
    "low-rank": f"nm-masks{{{_KEEP}}},low-rank{{rank=2,start=0.0}}",
    "tensors": "select-tensors{rho=0.8}",
    "neurons": "select-neurons{omission=0.5,multiple=1}",
    "layers": "drop-layers{indices=[1]}",
    "gates": "gates{target=0.4,score=magnitude}",
    "materialize": "gates{target=0.4,score=magnitude},materialize",
    "dims": "drop-dims{units=[intermediate,heads],begin=0.0,end=1.0,every=1}",
    "hidden": "drop-dims{begin=0.0,end=1.0,every=1}",
    "mux": "multiplex",
    "distill": "distill",
}
"""The passes of a column; ``distill`` stands for one with a teacher."""

STEPS, LR = 2, 0.05
OFF = 5e-5
"""What rounding may change of a parameter in these steps, and of an evaluation after them."""
_SKIPS = {"masks", "masked", "double-prune", "low-rank", "neurons", "gates", "materialize", "dims", "hidden"}
"""Columns in which a site that is not rewritten was skipped; the others' are sites that were not asked for."""


@dataclass(frozen=True)
class Result:
    """A cell; ``detail`` is the reason, or what was left out, and ``counts`` the sites rewritten and looked at."""

    state: str
    detail: str = ""
    counts: tuple[int, int] | None = None
    oracle: bool = False
    seconds: float = 0.0


@dataclass
class Bench:
    """A family at work: its model, traced once."""

    name: str
    trace_seconds: float = field(default=0.0, init=False)
    refusal: TraceError | None = field(default=None, init=False)
    is_fixed: bool = field(default=False, init=False)
    """Whether it works at one batch size only, and was traced so."""

    @cached_property
    def family(self) -> Family:
        return build(self.name)

    @cached_property
    def traced(self) -> GraphModule:
        if self.refusal is not None:
            raise self.refusal
        asked = self.family
        # Some make masks themselves, but not while they are captured; some check labels in Python.
        for way in (lambda family: family, with_masks, without_labels):
            try:
                return self._trace(way(asked))
            except TraceError as error:
                self.refusal = self.refusal or error
        assert self.refusal is not None
        # What the refusal says is done.
        if "set_experts_implementation" in str(self.refusal):
            asked.model.set_experts_implementation("grouped_mm")
            return self._trace(asked)
        if "dynamic_batch=False" in str(self.refusal):
            self.is_fixed = True
            return self._trace(asked)
        raise self.refusal

    def _trace(self, family: Family) -> GraphModule:
        start = time.perf_counter()
        gm = fxsparse.trace(family.model, kwargs=family.batch(), dynamic_batch=not self.is_fixed)
        self.family, self.refusal, self.trace_seconds = family, None, time.perf_counter() - start
        return gm

    @cached_property
    def other_size(self) -> int:
        """A batch size other than the traced one, where the model has it free."""
        notes = self.traced.meta["fxsparse_trace"].notes
        return 3 if self.is_fixed or any("dimension 0 stays" in note for note in notes) else 5

    @cached_property
    def sites(self) -> dict[str, composed.Site]:
        return composed.sites_of(self.traced)

    @cached_property
    def teacher(self) -> GraphModule:
        """The model with other weights, as a graph; the oracle's has them in plain torch."""
        model = _copy(self.family.model)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(7)
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        composed.TEACHERS[self.name] = model.eval()
        gm = copy.deepcopy(self.traced)
        gm.load_state_dict(model.state_dict())
        return gm

    @cached_property
    def with_loss(self) -> Bench:
        """The same with a loss to add to, where the model returns none."""
        output = self.traced(**self.family.batch())
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return self
        other = Bench(self.name)
        other.family = replace(self.family, model=_WithLoss(self.family.model))
        return other

    def passes(self, column: str) -> list[Any]:
        if column == "distill":
            return [DistillLayers(self.teacher, weights=(0.5, 0.2, 0.3))]
        lists = stacks(self.traced)
        if column == "mux" and len(lists) > 1:  # an encoder and a decoder
            return [f"{PASSES[column]}{{stack={lists[0].path}}}"]
        return [PASSES[column]]

    def rewritten(self, column: str) -> GraphModule:
        return fxsparse.rewrite(copy.deepcopy(self.traced), self.passes(column))


class _WithLoss(nn.Module):
    """A model, and the mean square of all that it returns as its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        output = self.model(**batch)
        logits = output.get("logits")
        return {"loss": mean_squares(floats(output)), "logits": floats(output)[-1] if logits is None else logits}


class _Oracle(Oracle):
    """The composed model of any family."""

    family: Family

    def run(self, batch: Any) -> tuple[Tensor, Tensor]:
        output = self.model(**batch)
        logits = output.get("logits") if isinstance(output, dict) else None
        return self.family.loss(output), floats(output)[-1] if logits is None else logits


def cell(bench: Bench, column: str) -> Result:
    """The result of one column on a family."""
    start = time.perf_counter()
    with warnings.catch_warnings(), mock.patch.object(composed, "STEPS", STEPS):
        warnings.simplefilter("ignore")
        try:
            result = COLUMNS[column](bench) if column in COLUMNS else _pass(bench, column)
        except Refused as refusal:
            result = Result("refused", str(refusal))
        except InternalError as error:
            result = Result("crash", f"{type(error).__name__}: {error}")
        except AssertionError as error:
            result = Result("wrong", str(error))
        except Exception as error:
            result = Result(
                "wrong" if isinstance(error, FxsparseError) else "crash", f"{type(error).__name__}: {error}"
            )
    seconds = round(time.perf_counter() - start, 2)
    return Result(result.state, result.detail[:2000], result.counts, result.oracle, seconds)


class Refused(Exception):
    """What the library said before anything happened."""


@contextlib.contextmanager
def _may_refuse() -> Iterator[None]:
    try:
        yield
    except InternalError:
        raise
    except FxsparseError as error:
        raise Refused(str(error)) from error


def _copy(model: Any) -> Any:
    """A copy, also of what a model keeps of its last call (RecurrentGemma), which may have a gradient."""
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept if not value.is_leaf})


# --- tracing ----------------------------------------------------------------------------------------------------------


_EVALUATES = "is captured as it evaluates"


def _trace(bench: Bench) -> Result:
    """Outputs and gradients are the model's, in training and evaluation, at another batch size.

    Where the trace says that it trains a module as it evaluates, they are those of evaluation.
    """
    with _may_refuse():
        gm = copy.deepcopy(bench.traced)
    model = _copy(bench.family.model)
    notes = [note for note in gm.meta["fxsparse_trace"].notes if "dimension 0 stays" in note or _EVALUATES in note]
    notes += ["the model works at one batch size"] * bench.is_fixed
    told = any(_EVALUATES in note for note in notes)
    for mode in (False,) if told else (True, False):
        batch = bench.family.batch(3, bench.other_size)
        with EqualDraws():
            outputs = [module.train(mode)(**batch) for module in (model, gm)]
        _same(*outputs, "training" if mode else "evaluation")
        if mode or told:
            for output in outputs:
                bench.family.loss(output).backward()
            mine, theirs = (dict(module.named_parameters()) for module in (gm, model))
            for name in theirs.keys() & mine.keys():
                _close(mine[name].grad, theirs[name].grad, f"the gradient of {name}")
    return Result("partial" if notes else "ok", "; ".join(notes), oracle=True)


def _same(mine: Any, theirs: Any, where: str, off: float = 2e-5) -> None:
    """``off`` is of the largest number of an output, if that is beyond 1."""
    pairs = list(zip(floats(mine), floats(theirs), strict=True))
    assert pairs, f"{where}: no outputs"
    for one, other in pairs:
        _close(one, other, where, atol=off * max(1.0, float(other.detach().abs().nan_to_num(posinf=0).max())))


def _close(one: Tensor | None, other: Tensor | None, where: str, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    if one is None or other is None:
        present = next((tensor for tensor in (one, other) if tensor is not None), None)
        assert present is None or not present.any(), f"{where}: one is None"
        return
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text: f"{where}: {' '.join(text.split())}")


# --- passes -----------------------------------------------------------------------------------------------------------


def _pass(bench: Bench, column: str) -> Result:
    with _may_refuse():
        bench = bench.with_loss if column == "distill" else bench
        gm = bench.rewritten(column)
    subject = record_of(gm).entries[0 if column == "materialize" else -1]
    done = [change for change in subject.changes if change.rewritten]
    left = [change for change in subject.changes if not change.rewritten]
    lost = _lost(bench.traced, column, gm)
    _survives_saving(bench, column, gm)
    oracle, without = _oracle(bench, column, gm)
    _trains(bench, gm, oracle)
    counts = (len(done), len(done) + len(left)) if column in _SKIPS else (len(done), len(done))
    reasons = sorted({change.detail for change in left}) if column in _SKIPS else []
    if lost or not (done or left):
        return Result("silent", f"neither rewritten nor skipped: {', '.join(lost)}" if lost else "nothing", counts)
    if not done:
        return Result("silent", f"nothing was rewritten, without a refusal: {'; '.join(reasons)}", counts)
    detail = "; ".join([*reasons, *([f"no oracle: {without}"] if without else [])])
    return Result("partial" if reasons else "ok", detail, counts, oracle is not None)


def _oracle(bench: Bench, column: str, gm: GraphModule) -> tuple[_Oracle | None, str]:
    """The composed model, or why there is none."""
    if column in ("mux", "distill", "hidden"):
        return None, ""
    if column in ("gates", "materialize") and expert_mlps(bench.traced)[0]:
        return None, "the composed model has no gates on channels of experts"
    composed.BLOCKS[bench.name] = tuple(stack.path for stack in stacks(bench.traced))
    try:
        oracle = oracle_of(bench.name, bench.family.model, bench.sites, gm, kind=_Oracle)
        oracle.family = bench.family
        uncalled = _uncalled(oracle, bench.family.batch(1)) & {linear.name for linear in fx.linears(bench.traced)}
    except Exception as error:  # a model that reads its linears in another way than calling them
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if uncalled:
        return None, "the model reads the weights of linears without calling them"
    return oracle, ""


def _uncalled(oracle: Oracle, batch: dict[str, Any]) -> set[str]:
    """The names of weights whose module is not called; what the model does with them, its linears do not see."""
    called: set[str] = set()
    hooks = [
        linear.register_forward_hook(lambda *_, name=name: called.add(name)) for name, linear in oracle.linears.items()
    ]
    state = {name: buffer.clone() for name, buffer in oracle.model.named_buffers()}  # of norms over batches
    oracle.run(batch)
    with torch.no_grad():
        for name, buffer in oracle.model.named_buffers():
            buffer.copy_(state[name])
    for hook in hooks:
        hook.remove()
    return oracle.linears.keys() - called


def _trains(bench: Bench, gm: GraphModule, oracle: _Oracle | None) -> None:
    """Two steps, whose losses and parameters are the oracle's, and then an evaluation."""
    optimizer = torch.optim.SGD(gm.parameters(), lr=LR)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=STEPS)
    before = {name: parameter.detach().clone() for name, parameter in gm.named_parameters()}
    size = 4 if bench.other_size == 5 else bench.other_size
    for step in range(1, STEPS + 1):
        batch = bench.family.batch(step, size)
        with EqualDraws():
            schedule.observe(batch, loss=bench.family.loss)
        if oracle is not None:
            oracle.read(gm, schedule)
            with EqualDraws():
                expected = oracle.backward(batch)
        optimizer.zero_grad()
        with EqualDraws():
            loss = bench.family.loss(gm(**batch))
            loss.backward()
        assert loss.isfinite(), f"the loss of step {step} is not finite"
        if oracle is not None:
            _close(loss.detach(), torch.tensor(expected), f"the loss of step {step}", rtol=1e-5)
            oracle.step(step, LR)
        elif step == 1:  # the distance to a teacher may be of any size (CpmAnt)
            optimizer.param_groups[0]["lr"] = LR / max(1.0, float(loss))
        optimizer.step()
        schedule.step()
    schedule.remove()
    moved = sum(not torch.equal(parameter, before[name]) for name, parameter in gm.named_parameters() if name in before)
    assert moved, "no parameter was trained"
    if oracle is not None:
        _compare(bench, gm, oracle)


def _compare(bench: Bench, gm: GraphModule, oracle: _Oracle) -> None:
    found = differences(gm, oracle)
    off = {name: value for name, value in found.items() if not value < OFF}
    assert not off, f"parameters after {STEPS} steps: {dict(list(off.items())[:4])}"
    oracle.read(gm, None)
    oracle.model.eval()
    batch = bench.family.batch(9, bench.other_size)
    with torch.no_grad():
        mine, theirs = gm.eval()(**batch), oracle.model(**batch)
        try:
            _same(mine, theirs, "evaluation", OFF)
        except AssertionError:  # a model may make much of what rounding changed in its parameters
            for parameter in oracle.model.parameters():
                parameter.add_(max(found.values()) * torch.randn_like(parameter))
            pairs = zip(floats(mine), floats(theirs), floats(oracle.model(**batch)), strict=True)
            if any((one - other).abs().max() > 3 * (moved - other).abs().max() for one, other, moved in pairs):
                raise


def _survives_saving(bench: Bench, column: str, gm: GraphModule) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fxsparse.save(gm, path)
        with mock.patch(
            "fxsparse.rewriting.trace", lambda *_, **__: copy.deepcopy(bench.traced)
        ):  # the same every time
            loaded = fxsparse.load(path, bench.family.model, kwargs=bench.family.batch())
    if column == "distill":
        attach_teacher(loaded, bench.teacher)
    for mode in (True, False):
        batch = bench.family.batch(5, 4 if bench.other_size == 5 else bench.other_size)
        with EqualDraws(), torch.no_grad():
            outputs = [copy.deepcopy(module).train(mode)(**batch) for module in (gm, loaded)]
        _same(*outputs, "after loading")


# --- what counts ------------------------------------------------------------------------------------------------------

_PRODUCTS = ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "conv", "grouped_mm")
_SEE_THROUGH = {
    "t",
    "transpose",
    "permute",
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "expand",
    "to",
    "slice",
    "select",
}
_SEE_THROUGH |= {"chunk", "split", "getitem", "contiguous", "_to_copy", "clone", "alias", "unbind", "split_with_sizes"}
_WEIGHTED, _ATTENTIVE = {"masks", "masked"}, {"neurons", "gates"}


def _lost(traced: GraphModule, column: str, gm: GraphModule) -> list[str]:
    """Weights of products, and attentions, that the record of a rewritten graph does not name; counted here anew."""
    sites = {change.site for change in record_of(gm).entries[0].changes}
    if column in _WEIGHTED:
        weights = _weights(traced)
        named = [names for identity, names in fx.parameter_names(traced).items() if identity in weights]
        told = [names for names in named if not any({name, name.rpartition(".")[0]} & sites for name in names)]
        return [names[0] for names in told]
    if column in _ATTENTIVE:
        return [path for path in _attentions(traced) if not any(_related(path, site) for site in sites)]
    return []


def _related(path: str, site: str) -> bool:
    """Whether one is inside the other, but not the sublayer of an MLP's layer."""
    return path == site or path.startswith(f"{site}.") or site.startswith(f"{path}.")


def _operator(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _weights(gm: GraphModule) -> set[int]:
    """The identities of the parameters of two dimensions and more that a product reads."""
    found: set[int] = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and _operator(node).startswith(_PRODUCTS):
            for read in node.all_input_nodes:
                source = _source(gm, read)
                if isinstance(source, torch.nn.Parameter) and source.dim() >= 2:
                    found.add(id(source))
    return found


def _source(gm: GraphModule, node: Node) -> Any:
    """What is read, perhaps through views."""
    while node.op == "call_function" and _operator(node) in _SEE_THROUGH and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return fx.attribute(gm, str(node.target)) if node.op == "get_attr" else None


def _attentions(gm: GraphModule) -> list[str]:
    """The modules in which a softmax over keys is taken, or SDPA called."""
    found: dict[str, None] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not node.meta.get("nn_module_stack"):
            continue
        value = node.meta.get("val")
        scores = "softmax" in _operator(node) and isinstance(value, Tensor) and value.dim() >= 3
        if scores or _operator(node) == "scaled_dot_product_attention":
            found[str(list(node.meta["nn_module_stack"].values())[-1][0])] = None
    return list(found)


# --- saving and compiling ---------------------------------------------------------------------------------------------


def _save(bench: Bench) -> Result:
    """A file that is loaded into a model traced anew."""
    with _may_refuse():
        gm = bench.rewritten("low-rank")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fxsparse.save(gm, path)
        model, sizes = _copy(bench.family.model), {"dynamic_batch": not bench.is_fixed}
        loaded = fxsparse.load(path, model, kwargs=bench.family.batch(), **sizes)
    batch = bench.family.batch(5, bench.other_size)
    with torch.no_grad():
        _same(loaded.eval()(**batch), gm.eval()(**batch), "after loading")
    return Result("ok", oracle=True)


def _folder(column: str, *, as_module: bool = False) -> Callable[[Bench], Result]:
    """`save_pretrained` and `from_pretrained` of what a column leaves, and transformers' own where it can read it."""

    def run(bench: Bench) -> Result:
        with _may_refuse():
            gm = bench.rewritten(column).eval()
        batch = bench.family.batch(5, bench.other_size)
        with tempfile.TemporaryDirectory() as folder:
            with _may_refuse():
                if as_module:
                    fxsparse.save_pretrained(fxsparse.to_module(gm, bench.family.model), folder)
                else:
                    fxsparse.save_pretrained(gm, bench.family.model, folder)
            read = [fxsparse.from_pretrained(folder)]
            if (Path(folder) / "model.safetensors").is_file():
                read.append(type(bench.family.model).from_pretrained(folder))
        with torch.no_grad():
            for model in read:
                _same(model.eval()(**batch), gm(**batch), f"read by {'transformers' if model is not read[0] else 'us'}")
        return Result("ok", oracle=True)

    return run


def _compile(bench: Bench) -> Result:
    """The bare call computes what the model does."""
    try:
        _computes_compiled(bench, backend="fxsparse", options={"compiler": "aot_eager"})
    except Exception as error:
        try:
            _computes_compiled(bench, backend="aot_eager")
        except Exception as own:  # torch alone does not compile the model either; that is a refusal of its
            said = f"{type(own).__name__}: {str(own).splitlines()[0][:200]}"
            raise Refused(f"torch.compile itself does not compute what the model does: {said}") from error
        raise
    return Result("ok", oracle=True)


def _computes_compiled(bench: Bench, **how: Any) -> None:
    """Compiled, a model has its own outputs and gradients."""
    model, batch = bench.family.model, bench.family.batch(2)
    results, gradients = [], []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, **how)):
        torch.manual_seed(0)
        model.zero_grad()
        results.append(run(**batch))
        bench.family.loss(results[-1]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    model.zero_grad()
    _same(*reversed(results), "compiled")
    for name, gradient in gradients[1].items():
        _close(gradient, gradients[0][name], f"the compiled gradient of {name}")


COLUMNS: dict[str, Callable[[Bench], Result]] = {
    "trace": _trace,
    "save": _save,
    "folder: masks": _folder("masks"),
    "folder: layers": _folder("layers"),
    "folder: units": _folder("materialize"),
    "folder: module": _folder("masks", as_module=True),
    "compile": _compile,
}
"""The columns that are not a pass."""

ALL: tuple[str, ...] = ("trace", *PASSES, *(name for name in COLUMNS if name != "trace"))
"""Every column, in the order of the matrix."""

"""Ordered pairs of passes on tiny models: what is tried of each pair, and the result.

A cell of the matrix is a family, and two variants of passes in their order. It is

    =     rewritten, and four training steps, evaluation and every parameter equal those of an oracle in plain torch
    ~     rewritten, without an oracle: the same in one step and in two, and after saving and loading
    R     refused before anything happened, and the order or action that the refusal recommends is rewritten and trains

and anything else is an error. Where the first leaves a plain model, the second on that model, exported, must agree.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.analysis.blocks import stacks
from fxsparse.analysis.structures import MLP, Attention
from fxsparse.errors import RewriteError
from fxsparse.passes import DistillLayers, Pass, Pipeline
from fxsparse.passes.base import parse_passes
from fxsparse.passes.distill.distill import attach_teacher
from tests.support import composed, families, multiplexed
from tests.support.composed import STEPS, EqualDraws, Oracle, differences, oracle_of

FAMILIES = ("bert", "opt", "gpt2", "grouped", "t5")
LR = 0.05

_UNITS = "units=[intermediate,heads]"
_WIDENS = {"bert": "*intermediate.dense", "opt": "*fc1", "gpt2": "*c_fc", "grouped": "*up_proj", "t5": "*wi"}
"""The linears into the channels of an MLP."""


@dataclass(frozen=True)
class Variant:
    """A pass as the matrix tries it.

    Attributes:
        text: the pass; ``distill`` stands for one with a teacher.
        needs: the variant that must have run before.
    """

    text: str
    needs: str | None = None


VARIANTS: dict[str, Variant] = {
    "static": Variant("nm-masks"),
    "sr-ste": Variant("nm-masks{storage=masked,dynamic=true,decay=0.5}"),
    "double-prune": Variant("double-prune{every=1}", "static"),
    "branches": Variant("low-rank{rank=2,start=0.5}", "static"),
    "adapters": Variant('low-rank{rank=2,start=0.0,layers=["WIDENS"]}'),
    "tensors": Variant('select-tensors{tensors=["*.0.*"]}'),
    "rho": Variant("select-tensors{rho=0.8,every=2}"),
    "neurons": Variant("select-neurons{omission=0.5,multiple=1}"),
    "layers": Variant("drop-layers{indices=[1]}"),
    "distill": Variant("distill"),
    "end-distill": Variant("end-distill", "distill"),
    "gates": Variant("gates"),
    "scored gates": Variant("gates{target=0.4,score=magnitude}"),
    "dims": Variant(f"drop-dims{{{_UNITS},begin=0.0,end=1.0,every=2}}"),
    "scored dims": Variant(f"drop-dims{{{_UNITS},score=magnitude}}"),
    "materialize": Variant("materialize", "scored gates"),
    "mux": Variant("multiplex"),
}
"""The seventeen variants."""

RECIPES = {
    "slope": ("static", "double-prune", "branches"),
    "greentrainer": ("rho",),
    "cofi": ("scored gates", "distill", "materialize"),
    "chop": ("layers", "distill", "end-distill"),
    "sat": ("neurons",),
    "prumux": ("mux", "scored gates"),
}
"""What each method does, for orders of whole methods."""


# --- models -----------------------------------------------------------------------------------------------------------


def _grouped() -> families.Family:
    """A Llama with 8 heads on 2 key heads."""
    sizes = families._decoder_sizes() | {"num_attention_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=2)
    return families.Family(families._seeded(transformers.LlamaForCausalLM, config), families.causal_lm_batch)


@functools.cache
def family(name: str) -> families.Family:
    """A model without dropout."""
    made = _grouped() if name == "grouped" else families.FAMILIES[name]()
    for module in made.model.modules():
        for option in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return made


@functools.cache
def traced(name: str) -> GraphModule:
    return fxsparse.trace(family(name).model, kwargs=batch_of(name), dynamic_sequence=False)


@functools.cache
def teacher(name: str) -> GraphModule:
    """The family's model with other weights, as a graph, and in plain torch for the oracle."""
    model = copy.deepcopy(family(name).model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    composed.TEACHERS[name] = model.eval()
    gm = copy.deepcopy(traced(name))
    gm.load_state_dict(model.state_dict())
    return gm


@functools.cache
def sites(name: str) -> dict[str, composed.Site]:
    """The attentions and MLPs of the original."""
    return composed.sites_of(traced(name))


def batch_of(name: str, seed: int = 0, batch: int = 4) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(family(name).make_batch(batch, 8))


# --- passes -----------------------------------------------------------------------------------------------------------


def passes_of(name: str, variants: Sequence[str]) -> list[Pass | str]:
    """The passes of variants, each behind what it needs where that has not run."""
    made: list[Pass | str] = []
    done: list[str] = []
    for variant in variants:
        needs = VARIANTS[variant].needs
        if needs is not None and not _satisfied(needs, done):
            done.append(needs)
        done.append(variant)
    for variant in done:
        text = VARIANTS[variant].text.replace("WIDENS", _WIDENS[name])
        hidden = 0.0 if "mux" in done else 0.3
        made.append(DistillLayers(teacher(name), weights=(0.5, 0.2, hidden)) if text == "distill" else text)
    return made


def _satisfied(needs: str, done: Sequence[str]) -> bool:
    by = {"static": ("static", "sr-ste"), "scored gates": ("gates", "scored gates", "dims", "scored dims")}
    return any(variant in by.get(needs, (needs,)) for variant in done)


def _by_name(name: str, order: Sequence[str], tried: Sequence[Pass | str]) -> list[Pass | str]:
    """The passes of a recommended order, with the options of those that were tried."""
    with_options = {_name(item): item for item in tried}
    plain: dict[str, Pass | str] = {
        "low-rank": passes_of(name, ["adapters"])[0],
        "distill": DistillLayers(teacher(name)),
    }
    return [with_options.get(item, plain.get(item, item)) for item in order]


# --- a cell -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of an order.

    Attributes:
        symbol: ``=``, ``~`` or ``R``.
        reason: of a refusal, without what it recommends.
        order: the recommended order or action, which was rewritten, trained and evaluated.
    """

    symbol: str
    reason: str = ""
    order: str = ""


def cell(
    name: str, variants: Sequence[str], *, backend: str | None = None, exported: bool = True, thorough: bool = True
) -> Result:
    """The result of an order of variants on a family; an AssertionError says what is wrong.

    Args:
        name: of the family.
        variants: in their order.
        backend: also trains the model under ``torch.compile`` with this backend.
        exported: also runs the second on the plain model that the first leaves, traced anew.
        thorough: whether it is also rewritten step by step, and saved and loaded. Otherwise training and evaluation are
            compared with the oracle, and a refusal's advice is followed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried = passes_of(name, variants)
        try:
            gm = fxsparse.rewrite(copy.deepcopy(traced(name)), tried)
        except RewriteError as refusal:
            return _refused(name, tried, str(refusal))
        if thorough:
            _same_in_two_steps(name, tried, gm)
            _survives_saving(name, gm)
        if backend is not None:
            _same_compiled(name, copy.deepcopy(gm), copy.deepcopy(gm), backend)
        if exported and len(variants) == 2 and variants[0] in PLAIN:
            _same_as_exported(name, *variants)
        oracle = _oracle(name, gm)
        _trains(name, gm, oracle)
        _RIGHT.add((name, _text(tried)))
        return Result("~" if oracle is None else "=")


_RIGHT: set[tuple[str, str]] = set()
"""Families and passes that were checked in this process; one order is recommended by several refusals."""


def _text(passes: Sequence[Pass | str]) -> str:
    return ",".join(map(str, passes))


def _oracle(name: str, gm: GraphModule) -> Oracle | None:
    """The composed model; None for multiplexed families whose oracle has not been written."""
    if "multiplex" in fxsparse.record_of(gm).text and name not in multiplexed.ORACLES:
        return None
    return oracle_of(name, family(name).model, sites(name), gm)


def _refused(name: str, tried: Sequence[Pass | str], message: str, depth: int = 0) -> Result:
    """A refusal, whose advice is followed: the order that it recommends must work, or one of the actions it names. A
    further refusal may ask for an option (``stack=`` of a model with several stacks), but recommend no other order."""
    reason, advised = _advice(name, tried, message)
    problems = []
    for text, passes in advised:
        problem = _problem(name, passes, depth) if not depth or "=" in text else "is advised by a second refusal"
        if problem is None:
            return Result("R", reason, text)
        problems.append(f"{text}: {problem}")
    raise AssertionError(f"refused with advice that does not work: {message} -> {'; '.join(problems)}")


def _problem(name: str, passes: Sequence[Pass | str], depth: int) -> str | None:
    """Why passes do not work; None where they are rewritten, train and evaluate, or do with a further option."""
    if (name, _text(passes)) in _RIGHT:
        return None
    try:
        gm = fxsparse.rewrite(copy.deepcopy(traced(name)), passes)
    except RewriteError as refusal:
        if depth == 2:
            return str(refusal)
        try:
            _refused(name, passes, str(refusal), depth + 1)
        except AssertionError as error:
            return str(error)
    else:
        _trains(name, gm, _oracle(name, gm))
    _RIGHT.add((name, _text(passes)))
    return None


Advised = list[tuple[str, list[Pass | str]]]
"""What a refusal says to do, in words, and the passes that it then comes to."""


def _advice(name: str, tried: Sequence[Pass | str], message: str) -> tuple[str, Advised]:
    """The reason of a refusal, and each thing that it says to do."""
    for pattern, follow in _ADVICE.items():
        if match := re.search(pattern, message):
            return message[: match.start()].rstrip("; :"), follow(name, tried, message, match)
    raise AssertionError(f"refused without advice: {message}")


def _in_order(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    return [(match[1], _by_name(name, match[1].split(","), tried))]


def _without_hidden_states(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    numbers = match[1].replace("a", "0.5").replace("b", "0.2")
    weights = tuple(map(float, numbers.split(",")))
    return [(f"weights=({match[1]})", [_with(item, "distill", weights=weights) for item in tried])]


def _one_stack(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    paths = re.findall(r"stack=([\w.]+)", match[0])
    return [(f"stack={path}", [_with(item, "multiplex", stack=path) for item in tried]) for path in paths]


def _another_layer(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    at, number = _refused_at(tried, message), int(match[1].split(", ")[-1])
    return [
        (f"indices=[{number}]", [*tried[:at], _with(tried[at], "drop-layers", indices=(number,)), *tried[at + 1 :]])
    ]


def _apart(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    """Heads are left out, and only what is no part of an attention is pruned; or channels, and what is no part of an
    MLP."""
    found: Advised = []
    for kind, structure in ((Attention, "heads"), (MLP, "channels")):
        chosen = [site for site in sites(name).values() if isinstance(site, kind)]
        used = {part.linear.name for site in chosen for part in (site.output, *site.projections)}
        exclude = tuple(sorted({re.sub(r"\b\d+\b", "*", weight.removesuffix(".weight")) for weight in used}))
        passes = [_with(item, "nm-masks", exclude=exclude) for item in tried]
        found.append((f"exclude= ({structure})", [_with(i, "select-neurons", structures=(structure,)) for i in passes]))
    return found


def _others(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    return [(match[0], [_with(item, "select-neurons", structures=(match[1],)) for item in tried])]


def _one_less(name: str, tried: Sequence[Pass | str], message: str, match: re.Match[str]) -> Advised:
    at = range(len(tried)) if "one" in match[0] else [_refused_at(tried, message)]
    return [(match[0], [item for place, item in enumerate(tried) if place != gone]) for gone in at]


_ADVICE: dict[str, Callable[[str, Sequence[Pass | str], str, re.Match[str]], Advised]] = {
    r"the order that works is ([\w,-]+)": _in_order,
    r"weights=\(((?:0|a), (?:1|b), 0)\)": _without_hidden_states,
    r"choose one with stack=[\w.]+( or stack=[\w.]+)*": _one_stack,
    r"its layers are ([\d, ]+): name some of them with indices=": _another_layer,
    r"keep nm-masks off some of them with exclude=|keep the later pass off": _apart,
    r"choose \w+ with structures=\[(\w+)\]": _others,
    r"leave (one of them|this pass) out": _one_less,
}
"""The advice of refusals, and how it is followed."""


def _name(item: Pass | str) -> str:
    return str(item).partition("{")[0]


def _refused_at(tried: Sequence[Pass | str], message: str) -> int:
    """The position of the pass that refused, the last of its name."""
    return max(at for at, item in enumerate(tried) if _name(item) == message.partition(":")[0])


def _with(item: Pass | str, name: str, **options: Any) -> Pass | str:
    """A pass with other options if it is called ``name``, else as it is."""
    if _name(item) != name:
        return item
    return replace(parse_passes(item)[0] if isinstance(item, str) else item, **options)


def _same_in_two_steps(name: str, tried: Sequence[Pass | str], gm: GraphModule) -> None:
    *earlier, last = tried
    twice = fxsparse.rewrite(_step_by_step(name, earlier), [last])
    assert shape_of(twice) == shape_of(gm), "another graph in two steps"
    mine, theirs = gm.state_dict(), twice.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert str(Pipeline.parse(fxsparse.record_of(gm).text)) == fxsparse.record_of(twice).text


_STEPS: dict[tuple[str, str], GraphModule] = {}
"""Families and passes that ran one by one; cells share the first ones."""


def _step_by_step(name: str, passes: Sequence[Pass | str]) -> GraphModule:
    if not passes:
        return traced(name)
    key = (name, _text(passes))
    if key not in _STEPS:
        _STEPS[key] = fxsparse.rewrite(_step_by_step(name, passes[:-1]), [passes[-1]])
    return _STEPS[key]


PLAIN = ("layers", "materialize", "end-distill")
"""The variants that leave a model of the original's class."""


@functools.cache
def _plain(name: str, first: str) -> tuple[GraphModule, GraphModule]:
    """The graph that a variant leaves, and the plain model that it is exported to, traced anew."""
    gm = fxsparse.rewrite(copy.deepcopy(traced(name)), _before(name, first))
    model = fxsparse.to_module(gm, copy.deepcopy(family(name).model))
    return gm, fxsparse.trace(model, kwargs=batch_of(name), dynamic_sequence=False)


def _before(name: str, first: str) -> list[Pass | str]:
    """The passes of a variant that leaves a plain model. Layers go at the end, so that none gets another number and
    what is drawn by names is drawn alike."""
    if first != "layers":
        return passes_of(name, [first])
    layers = [len(family(name).model.get_submodule(path)) for path in composed.BLOCKS[name]]
    return [f"drop-layers{{indices=[{min(layers) - 1}]}}"]


def _same_as_exported(name: str, first: str, second: str) -> None:
    """The second pass on the graph of the first, and on the plain model that this is exported to."""
    later = _possible(name, first, passes_of(name, [first, second])[len(passes_of(name, [first])) :])
    losses, logits = [], []
    for start in _plain(name, first):
        gm = fxsparse.rewrite(copy.deepcopy(start), later)
        losses.append(torch.tensor(_train(name, gm, None)[0]))
        with torch.no_grad():
            logits.append(gm.eval()(**batch_of(name, seed=9, batch=5)).logits)
    torch.testing.assert_close(*losses, rtol=2e-5, atol=2e-6, msg=lambda m: f"losses of the exported model: {m}")
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5, msg=lambda m: f"evaluation of the exported model: {m}")


def _possible(name: str, first: str, later: list[Pass | str]) -> list[Pass | str]:
    """The passes that mean the same on a plain model: there one layer alone is no stack, and has no hidden states to
    compare. Where it refuses, what it advises."""
    gm, plain = _plain(name, first)
    if {stack.path for stack in stacks(gm)} != {stack.path for stack in stacks(plain)}:
        later = [_with(item, "distill", weights=(0.5, 0.2, 0.0)) for item in later]
    try:
        fxsparse.rewrite(copy.deepcopy(plain), later)
    except RewriteError as refusal:
        ((_, later),) = _advice(name, later, str(refusal))[1]
    return later


def shape_of(gm: GraphModule) -> list[str]:
    """The nodes of a graph, numbered in their order: what it computes, whatever the nodes are called."""
    number = {node: at for at, node in enumerate(gm.graph.nodes)}
    target = {node: node.target if node.op in ("get_attr", "call_module") else "" for node in number}
    text = {node: f"{node.op} {target[node] or getattr(node.target, '__name__', '')}" for node in number}
    return [
        f"{text[node]} {torch.fx.map_arg((node.args, node.kwargs), lambda read: f'%{number[read]}')}" for node in number
    ]


def _survives_saving(name: str, gm: GraphModule) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fxsparse.save(gm, path)
        # Loading traces the original anew, to the same graph at every cell of the matrix.
        with mock.patch("fxsparse.rewriting.trace", lambda *_, **__: copy.deepcopy(traced(name))):
            loaded = fxsparse.load(path, family(name).model, kwargs=batch_of(name))
    if hasattr(gm, "distillation"):
        attach_teacher(loaded, teacher(name))
    batch = batch_of(name, seed=5, batch=6)
    for mode in (True, False):
        with EqualDraws(), torch.no_grad():
            mine, theirs = (module.train(mode)(**batch) for module in (gm, loaded))
        assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.loss, theirs.loss), "lost by saving"
    gm.train()


def _same_compiled(name: str, eager: GraphModule, gm: GraphModule, backend: str) -> None:
    losses, _ = _train(name, eager, None)
    compiled, _ = _train(name, gm, None, torch.compile(gm, backend=backend))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def _trains(name: str, gm: GraphModule, oracle: Oracle | None) -> None:
    losses, expected = _train(name, gm, oracle)
    assert torch.tensor(losses).isfinite().all()
    if oracle is None:
        return
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected), rtol=2e-5, atol=2e-6, msg=lambda m: f"losses: {m}"
    )
    off = differences(gm, oracle)
    assert len(off) > 4 and max(off.values()) < 2e-5, f"parameters: { {n: v for n, v in off.items() if v >= 2e-5} }"
    oracle.read(gm, None)
    gm.eval(), oracle.model.eval()
    batch = batch_of(name, seed=9, batch=5)
    with torch.no_grad():
        logits, theirs = gm(**batch).logits, oracle.run(batch)[1]
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=2e-5, msg=lambda m: f"evaluation: {m}")


def _train(
    name: str, gm: GraphModule, oracle: Oracle | None, model: nn.Module | None = None
) -> tuple[list[float], list[float]]:
    """Trains a graph, and its oracle beside it: the losses of both."""
    optimizer = torch.optim.SGD(gm.parameters(), lr=LR)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=STEPS)
    model = gm if model is None else model
    losses: list[float] = []
    expected: list[float] = []
    for step in range(1, STEPS + 1):
        batch = batch_of(name, seed=step)
        with EqualDraws():
            schedule.observe(batch)
        if oracle is not None:
            oracle.read(gm, schedule)
            with EqualDraws():
                expected.append(oracle.backward(batch))
        optimizer.zero_grad()
        with EqualDraws():
            loss = model(**batch).loss
            losses.append(float(loss.detach()))
            loss.backward()
        if oracle is not None:
            _gates_agree(gm, oracle)
            oracle.step(step, LR)
        optimizer.step()
        schedule.step()
    schedule.remove()
    return losses, expected


def _gates_agree(gm: GraphModule, oracle: Oracle) -> None:
    for gate in oracle.gates.values():
        if gate.trained:
            mine, theirs = gm.get_parameter(gate.name).grad, gate.log_alpha.grad  # type: ignore[union-attr]
            assert mine is not None and theirs is not None, f"{gate.name} has no gradient"
            off = float((mine - theirs).abs().max())
            assert off < 1e-6 + 1e-4 * float(theirs.abs().max()), f"the gradient of {gate.name} is off by {off}"

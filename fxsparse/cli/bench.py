"""``fxsparse bench``: the original model against the rewritten one on this machine, in one run.

The variants take turns in every round, so that a machine that speeds up or slows down affects both alike, and a ratio
is the median of the rounds' ratios. The FLOPs promise is the quotient of FLOPs; what was reached of it is the measured
quotient over it.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.cli.measuring import loss_of
from fxsparse.cli.models import Loaded, read_model
from fxsparse.cli.options import json_option, model_argument, passes_option
from fxsparse.cli.output import show, working
from fxsparse.document import Document, Line, Table
from fxsparse.graph.record import Costs, record_of
from fxsparse.passes import Pipeline
from fxsparse.schedule import Schedule
from fxsparse.text import quantity
from fxsparse.version import __version__

WARMUP = 2
_STEPS = 10_000  # of the training that a timed step is one of: what starts late has not started


@click.command()
@model_argument
@passes_option
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(2))
@click.option("--device", default=None, help="cuda, cuda:1 or cpu; by default a GPU if there is one.")
@click.option("--eager", is_flag=True, help="Compile neither.")
@click.option("--train/--no-train", default=True, show_default=True, help="Time training steps too.")
@json_option
def bench(
    model: str, passes: Pipeline, rounds: int, device: str | None, eager: bool, train: bool, as_json: bool, **sizes: Any
) -> None:
    """Time MODEL against itself rewritten by PASSES: step, inference, memory, and the FLOPs promise beside them.

    The original is compiled by Inductor, the rewritten one by fxsparse, unless --eager.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = _moved(read_model(model, **sizes), place)
    gm = loaded.rewritten(Loaded(copy.deepcopy(loaded.model), loaded.args, loaded.kwargs).traced(), passes)
    costs = record_of(gm).entries[0].before, record_of(gm).entries[-1].after
    original = _Variant(loaded.model, None if eager else "inductor", loaded)
    rewritten = _Variant(gm, None if eager else "fxsparse", loaded)
    timed = {"inference": (original.infer, rewritten.infer)}
    if train:
        timed = {"training step": (original.step, rewritten.step), **timed}
    times = {what: _interleaved(what, *runs, rounds=rounds, device=place) for what, runs in timed.items()}
    memory = [variant.held() for variant in (original, rewritten)]
    show(_document(str(passes), place, eager, times, costs, memory, loaded), as_json)


def _moved(loaded: Loaded, place: torch.device) -> Loaded:
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(place), (loaded.args, loaded.kwargs))
    return Loaded(loaded.model.to(place), args, kwargs, loaded.folder, loaded.weightless)


class _Variant:
    """A model that is timed, with an optimizer and, if it was rewritten, its schedule."""

    def __init__(self, model: nn.Module, backend: str | None, loaded: Loaded):
        self.model, self.loaded = model, loaded
        self.run: Callable[..., Any] = model if backend is None else torch.compile(model, backend=backend)
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: Schedule | None = None
        self.gradients = 0

    def infer(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.run(*self.loaded.args, **self.loaded.kwargs)

    def step(self) -> None:
        self.model.train()
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
            if isinstance(self.model, GraphModule):
                self.schedule = Schedule(self.model, self.optimizer, total_steps=_STEPS)
        if self.schedule is not None:
            self.schedule.observe(self.loaded.kwargs or self.loaded.args)
        loss_of(self.run(*self.loaded.args, **self.loaded.kwargs)).backward()
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()

    def held(self) -> dict[str, int]:
        """Bytes of the state, from the tensors themselves."""
        tensors = list({id(tensor): tensor for tensor in fx.tensors_of(self.model).values()}.values())
        moments = self.optimizer.state.values() if self.optimizer is not None else ()
        state = [tensor for each in moments for tensor in each.values() if isinstance(tensor, Tensor)]
        return {
            "model": sum(tensor.nbytes for tensor in tensors),
            "gradients": self.gradients,
            "optimizer": sum(tensor.nbytes for tensor in state),
        }


@dataclass(frozen=True)
class Times:
    """Seconds of both variants, and the ratios of their turns, rewritten over original.

    Attributes:
        original, rewritten: medians.
        ratio, low, high: the median ratio and its quartiles.
    """

    original: float
    rewritten: float
    ratio: float
    low: float
    high: float


def _interleaved(
    what: str, original: Callable[[], None], rewritten: Callable[[], None], *, rounds: int, device: torch.device
) -> Times:
    seconds: tuple[list[float], list[float]] = ([], [])
    with working(f"timing {what}", rounds + WARMUP) as advance:
        for turn in range(-WARMUP, rounds):
            for run, into in zip((original, rewritten), seconds, strict=True):
                begin = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= 0:
                    into.append(time.perf_counter() - begin)
            advance("compiling" if turn < -1 else f"round {turn + 2}")
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*seconds, strict=True)], n=4)
    return Times(statistics.median(seconds[0]), statistics.median(seconds[1]), middle, low, high)


def _document(
    passes: str,
    device: torch.device,
    eager: bool,
    times: dict[str, Times],
    costs: tuple[Costs, Costs],
    memory: list[dict[str, int]],
    loaded: Loaded,
) -> Document:
    before, after = costs
    promises = {
        "training step": before.step_flops / max(1, after.step_flops),
        "inference": before.forward_flops / max(1, after.forward_flops),
    }
    rows: list[tuple[str, ...]] = [("", "original", "rewritten", "speed-up", "quartiles", "FLOPs promise", "reached")]
    data: dict[str, Any] = {"passes": passes, "machine": _machine(device), "compiled": not eager}
    for what, time_ in times.items():
        speed, promise = 1 / time_.ratio, promises[what]
        milliseconds = (f"{seconds * 1e3:.1f} ms" for seconds in (time_.original, time_.rewritten))
        quartiles = f"{1 / time_.high:.2f} - {1 / time_.low:.2f}"
        rows.append((what, *milliseconds, f"{speed:.2f}", quartiles, f"{promise:.2f}", f"{speed / promise:.2f}"))
        data[what] = {**vars(time_), "speed_up": speed, "flops_promise": promise, "reached": speed / promise}
    held = [("bytes held", "original", "rewritten", "ratio")]
    for name in memory[0]:
        was, now = (bytes_[name] for bytes_ in memory)
        if was or now:
            held.append((name, quantity(was, 1024), quantity(now, 1024), f"{now / was:.2f}" if was else "-"))
    data["bytes"] = {"original": memory[0], "rewritten": memory[1]}
    parts: list[Line | Table] = [
        Line(passes, "title"),
        Line(f"{data['machine']}, {'eager' if eager else 'compiled'}, {_sizes(loaded)}"),
        Table(tuple(rows), header=True, right=(1, 2, 3, 4, 5, 6)),
        Table(tuple(held), header=True, right=(1, 2, 3)),
    ]
    return Document(parts, data)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}, fxsparse {__version__}"


def _sizes(loaded: Loaded) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves((loaded.args, loaded.kwargs)) if isinstance(leaf, Tensor)]
    return " x ".join(map(str, tensors[0].shape)) if tensors else "no tensors"

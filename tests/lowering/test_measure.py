"""Measuring the implementations of operators, and what is measured on a first use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.codegen import autotune as tile_tuning
from fxsparse.codegen import store
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.lowering import candidates, first_use, measure, sites, timings
from fxsparse.lowering.choose import choose, library_algorithm
from fxsparse.lowering.pins import Pins
from fxsparse.lowering.sites import Site
from fxsparse.ops.nm import Pattern
from fxsparse.ops.nm_linear import nm_linear
from fxsparse.ops.operator import Problem, operator_name
from fxsparse.passes import InsertNMMasks
from tests.support.tuned import TUNED, Two

pytestmark = pytest.mark.usefixtures("own_times")


@pytest.mark.usefixtures("plain_reference")
def test_tuning_measures_what_a_model_holds_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxsparse.rewrite(Two(), [InsertNMMasks("2:4", keep_first=False, keep_head=False)], (torch.randn(4, 32),))
    found = fxsparse.tune(gm, rows=[1, 8], progress=False)
    ops = {(item.problem.op, item.problem.rows) for item in found}
    assert ops == {(op, n) for op in ("nm_linear", "nm_linear_grad_input", "nm_linear_grad_values") for n in (1, 8)}
    assert all(item.milliseconds and not item.failed for item in found)
    assert fxsparse.tune(gm, rows=[1, 8], progress=False) == []
    assert len(fxsparse.tune(gm, rows=[8], again=True, progress=False)) == 6
    problem = next(item.problem for item in found if item.problem.op == "nm_linear")
    timings.remember(problem, "cpu", {"dense": 5.0, "reference": 0.001})
    shape = (problem.out_features, problem.in_features)
    site = Site("nm_linear", "cpu", problem.dtype, shape, problem.pattern, problem.rows, True)
    assert choose(replace(site, inference=True)) == (
        "reference",
        "measured 1 us, 0.00 of dense, then dense at 5000.00 of it",
    )


@pytest.mark.usefixtures("plain_reference")
def test_tuning_a_compiled_model_measures_the_rows_it_met() -> None:
    model = Two().requires_grad_(False)
    with torch.no_grad():
        for linear in (model.first, model.second):
            linear.weight.mul_(torch.tensor([1.0, 0, 0, 1]).repeat(linear.in_features // 4))
    compiled = torch.compile(model, backend="fxsparse", options={"compiler": "eager"})
    with torch.no_grad():
        compiled(torch.randn(6, 32))
    found = fxsparse.tune(compiled, progress=False)
    assert {(item.problem.rows, item.problem.out_features) for item in found} == {(6, 48), (6, 32)}
    found = fxsparse.tune(model, rows=[3], progress=False)  # the weights alone say it too
    assert {item.problem.rows for item in found} == {3}


@pytest.mark.usefixtures("plain_reference")
def test_an_implementation_that_is_wrong_or_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("nm_linear", Pattern(2, 4), torch.float32, 5, 16, 32)
    right = candidates.candidates_for

    def with_bad_ones(*args, **kwargs):
        found = right(*args, **kwargs)
        dense = found.makers["dense"]()["dense"]
        found.makers["operator"] = lambda: {"operator": lambda: dense() + 1}
        found.makers["sparse_tensor_cores"] = lambda: torch.ones(2) @ torch.ones(3)
        algorithms = {"cusparselt:1/1/-1": lambda: torch.ones(2) @ torch.ones(3), "cusparselt:2/1/-1": dense}
        found.makers["cusparselt"] = lambda: algorithms
        return found

    monkeypatch.setattr(candidates, "candidates_for", with_bad_ones)
    found = measure.measure(problem, "cpu")
    assert set(found.milliseconds) == {"dense", "reference", "cusparselt:2/1/-1"}
    assert "off by" in found.failed["operator"]
    assert "RuntimeError" in found.failed["sparse_tensor_cores"]
    assert "RuntimeError" in found.failed["cusparselt:1/1/-1"]
    assert set(timings.times(problem, "cpu")) == {"dense", "reference", "cusparselt"}
    found = measure.measure(problem, "cpu", exclude=("operator", "cusparselt"))
    assert set(found.milliseconds) == {"dense", "reference"} and set(found.failed) == {"sparse_tensor_cores"}


def test_products_are_measured_in_order_of_the_time_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three linears take longer than one of twice their size that stands before them; equal ones are measured once."""
    seen: list[tuple[str, int]] = []

    def note(problem: Problem, *args: object, **kwargs: object) -> measure.Measurement:
        seen.append((problem.op, problem.out_features))
        return measure.Measurement(problem, {"dense": 1.0})

    def site(op: str, size: int, rows: int = 64) -> Site:
        return Site(op, "cuda", torch.bfloat16, (size, 512), Pattern(2, 4), rows)

    monkeypatch.setattr(measure, "measure", note)
    every = [site("nm_linear_grad_input", 128), site("nm_linear", 1024), *[site("nm_linear", 512)] * 3]
    first_use.FirstUse(Pins(), 10.0).measure_all([*every, replace(every[0], rows=None)])
    assert seen == [("nm_linear", 512), ("nm_linear", 1024), ("nm_linear_grad_input", 128)]


def test_a_graph_measures_all_of_its_products_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(first_use.FirstUse, "measure_all", lambda self, sites: seen.extend(site.op for site in sites))
    gm = fxsparse.rewrite(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "nm-masks{keep_first=false}", (torch.randn(4, 16),)
    )
    torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager"})(torch.randn(4, 16))
    assert seen == ["nm_linear", "nm_linear_grad_values"]  # the last linear stays dense


def test_hoppers_kernel_is_measured_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def found(problem: Problem, *args, exclude: tuple[str, ...] = (), **kwargs) -> measure.Measurement:
        asked.append(exclude)
        return measure.Measurement(problem, {"dense": 1.0})

    monkeypatch.setattr(first_use.measure, "measure", found)
    site = Site("nm_linear", "cuda", torch.bfloat16, (4096, 4096), Pattern(2, 4), 16, True, True, True)
    first_use.FirstUse(Pins(), 10.0).measure(site)
    assert asked == [("sparse_wgmma",)]


@pytest.mark.usefixtures("plain_reference")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [*TUNED])
def test_products_of_other_types(op: str, dtype: torch.dtype) -> None:
    found = measure.measure(replace(TUNED[op], dtype=dtype), "cpu")
    assert "reference" in found.milliseconds and not found.failed


@pytest.mark.usefixtures("plain_reference")
@pytest.mark.parametrize("op", [*TUNED])
def test_every_product_can_be_measured(op: str) -> None:
    problem = TUNED[op]
    found = measure.measure(problem, "cpu")
    assert "reference" in found.milliseconds and not found.failed
    assert ("dense" in found.milliseconds) == op.startswith("nm_")
    assert set(timings.times(problem, "cpu")) == set(found.milliseconds)
    assert "reference" in str(found)


@pytest.mark.parametrize("op", [*TUNED])
def test_operands_are_those_of_the_product(op: str) -> None:
    """What is measured has the sizes that a call of the operator is looked up by."""
    problem = TUNED[op]
    args = candidates.random_operands(problem, "cpu").args

    class Call(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            return getattr(torch.ops.fxsparse, op).default(
                *(next(rest) if isinstance(arg, Tensor) else arg for arg in args)
            )

    graph = torch.export.export(Call(), tuple(arg for arg in args if isinstance(arg, Tensor))).graph
    (call,) = (node for node in graph.nodes if operator_name(node.target) == op)
    assert sites.site_of(op, call).problem == problem


@pytest.mark.usefixtures("plain_reference")
def test_measuring_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    for problem in TUNED.values():
        measure.measure(problem, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_inductor_makes_of_a_reference_within_a_compilation() -> None:
    """As on a first use, while Dynamo's own compilation of something else is under way."""
    args = candidates.random_operands(TUNED["nm_linear"], "cpu").args
    found: list[Tensor] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]):
        run = candidates.as_inductor_compiles(nm_linear.reference, args)
        found.extend([run(), run()])
        return gm

    x = torch.randn(3, requires_grad=True)
    torch.compile(lambda x: x.sin() * 2, backend=backend)(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())
    for result in found:
        torch.testing.assert_close(result, nm_linear.reference(*args))
    assert len(found) == 2


@pytest.mark.usefixtures("plain_reference")
def test_measuring_where_autocast_or_inference_mode_is_on() -> None:
    for surroundings in (torch.inference_mode(), torch.autocast("cpu"), torch.enable_grad()):
        with surroundings:
            found = measure.measure(TUNED["nm_linear_low_rank"], "cpu")
        assert not found.failed, "fp32 products in bfloat16 would be off"


def test_what_inductor_makes_of_a_reference_in_inference_mode() -> None:
    with torch.inference_mode():
        found = measure.measure(replace(TUNED["nm_linear"], rows=5), "cpu")
    assert set(found.milliseconds) == {"dense", "reference"} and not found.failed


# --- which algorithm of cuSPARSELt, which tile ------------------------------------------------------------------------


def test_the_fastest_algorithm_of_the_library_is_the_one_that_runs() -> None:
    site = Site("nm_linear", "cuda", torch.bfloat16, (512, 512), Pattern(2, 4), 64, True, True, True)
    assert library_algorithm(site) == ()
    times = {"dense": 0.3, "cusparselt:0/1/-1": 0.2, "cusparselt:3/4/1": 0.1, "cusparselt:1/1/-1": 0.4}
    timings.remember(site.problem, "cuda", times)
    assert library_algorithm(site) == (3, 4, 1)
    assert timings.times(site.problem, "cuda") == {"dense": 0.3, "cusparselt": 0.1}
    assert timings.variant(site.problem, "cuda", "dense") is None


@pytest.mark.parametrize("split_k", [1, 4])
def test_all_algorithms_of_the_library_are_tried(split_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    class Library:
        @staticmethod
        def mm_search(packed: Tensor, dense: Tensor, *rest: object) -> tuple[int, ...]:
            asked.append((*packed.shape, *dense.shape))
            return 2, split_k, 1, 3

    monkeypatch.setattr(torch._C, "_cusparselt", Library, raising=False)
    found = candidates.library_algorithms(torch.zeros(64, 72), 33, 128)
    assert found == [(0, 1, -1), (1, 1, -1), (2, 1, -1)] + ([(2, 4, 1)] if split_k > 1 else [])
    assert asked == [(64, 72, 128, 64)]  # not the 48 rows that run: the search changes what they run


def test_a_rank_is_part_of_what_was_measured() -> None:
    problem = TUNED["nm_linear_low_rank"]
    timings.remember(problem, "cuda", {"operator": 0.1, "reference": 0.2})
    assert timings.times(replace(problem, extra=(16,)), "cuda") == {}
    assert timings.times(replace(problem, rows=30), "cuda") == {"operator": 0.1, "reference": 0.2}


def test_a_tile_that_the_device_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.testing

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plans = [Plan(Tile(rows, 64, 32, warps=4)) for rows in (16, 64, 128)]
    milliseconds = {plans[1]: 2.0, plans[2]: 1.0}

    def run(plan: Plan) -> Plan:
        if plan not in milliseconds:
            raise RuntimeError("out of resource: shared memory")
        return plan

    monkeypatch.setattr(triton.testing, "do_bench", lambda call, quantiles: milliseconds[call()])
    assert tile_tuning.measure("product", run, plans) == milliseconds
    assert tile_tuning.tuned("product") == plans[2]
    with pytest.raises(RuntimeError, match="no tile runs other: out of resource"):
        tile_tuning.measure("other", run, plans[:1])


_TILES = """
import sys, torch
torch.cuda.get_device_name = lambda *_: "NVIDIA Test"
from fxsparse.codegen import autotune
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.tiles import Plan
for count in range(20):
    autotune.remember(f"{sys.argv[1]} {count}", Plan(Tile(16, 64, 32, warps=4)))
"""


def test_processes_that_tune_tiles_at_once_lose_nothing() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _TILES]
    writers = [subprocess.Popen([*command, name], env=environment, stderr=subprocess.PIPE) for name in ("a", "b")]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors.decode()
    assert len(json.loads(store.path("cuda").read_text())["tiles"]) == 40


# --- fxsparse.tune ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rich", [True, False])
def test_tuning_stops_in_time_and_refuses_nonsense(rich: bool, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # as where it is not installed
    gm = fxsparse.rewrite(Two(), [InsertNMMasks("2:4", keep_first=False, keep_head=False)], (torch.randn(4, 32),))
    moments = iter([0.0, 1.0, 100.0, 100.0])
    monkeypatch.setattr("fxsparse.backend.tune.time", SimpleNamespace(monotonic=lambda: next(moments)))
    monkeypatch.setattr(measure, "measure", lambda problem, device, until: measure.Measurement(problem, {"dense": 1.0}))
    assert len(fxsparse.tune(gm, rows=[1], seconds=10)) == 1
    said = capsys.readouterr().err
    assert "tuning stopped after 10 s, 5 left" in said
    assert "[1/6] nm_linear 2:4 float32 1x48x32: dense 1000 us (1.00)" in said
    with pytest.raises(fxsparse.OptionError, match="nothing to tune"):
        fxsparse.tune(nn.Linear(8, 8))
    with pytest.raises(fxsparse.OptionError, match=r"rows\[0\]=0 must be a whole number of at least 1"):
        fxsparse.tune(gm, rows=[0])

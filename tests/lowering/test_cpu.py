"""C++ kernels in compiled graphs on a CPU: chosen by times, called by number, explained, and left where there are none.

The weights are large enough for a kernel. Times are remembered by hand; every kernel is built once a process.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.backend.compiled import compiled_graphs
from fxsparse.backend.inductor import InlineReferences
from fxsparse.backend.options import BackendOptions
from fxsparse.codegen import store
from fxsparse.codegen.cpu import build, instruction_sets, launch, loaded
from fxsparse.lowering import measure, timings
from fxsparse.lowering.choose import choose, choose_gradient, cpp_kernel, undecided
from fxsparse.lowering.pins import Pins
from fxsparse.lowering.sites import Site
from fxsparse.ops.nm import Pattern, nm_mask, pack
from fxsparse.ops.operator import Problem
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks

pytestmark = pytest.mark.usefixtures("own_times", "no_measuring")

TWO_FOUR = Pattern(2, 4)
SITE = Site("nm_linear", "cpu", torch.float32, (512, 256), TWO_FOUR, 40)
DENSE = {"dense": 1.0, "reference": 1.0}
EAGER = {"compiler": "aot_eager", "fallback": False}
OPS = ("nm_linear", "nm_linear_low_rank", "nm_linear_grad_input", "nm_linear_grad_values")


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what a test remembers; a test that measures says so."""
    monkeypatch.setattr("fxsparse.backend.options.BackendOptions.tune", 0.0)
    monkeypatch.delenv("FXSPARSE_CPU", raising=False)


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """No kernel is remembered, neither before nor after the test."""
    launch.forget()
    yield
    build._compiler.cache_clear()
    launch.forget()


class Gated(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(256, 512, bias=bias), nn.Linear(256, 512, bias=bias)
        self.down = nn.Linear(512, 256, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    for linear in model.children():
        linear.weight.mul_(nm_mask(linear.weight.abs(), TWO_FOUR))
    return model.requires_grad_(False)


def remember(ratio: float, rows: int, dtype: torch.dtype = torch.float32, extra: tuple[int, ...] = ()) -> None:
    """The kernels take ``ratio`` of dense's time, for the linears of `Gated` alone and in one."""
    for op in OPS:
        for shape in ((512, 256), (256, 512), (1024, 256)):
            problem = Problem(op, TWO_FOUR, dtype, rows, *shape, extra if op == "nm_linear_low_rank" else ())
            timings.remember(problem, "cpu", {**DENSE, "operator": ratio, "compressed": ratio})


def launches(compiled: object) -> dict[str, int]:
    """Launches by operator."""
    counts: dict[str, int] = {}
    for item in fxsparse.kernels(compiled):
        op = item.name.partition("_2_4")[0]
        counts[op] = counts.get(op, 0) + item.count
    return counts


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of the parameters."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


def exact(model: nn.Module, x: Tensor) -> list[Tensor]:
    return run(copy.deepcopy(model).double(), x.double())


def same(results: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(results, expected, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


PASSES = [InsertNMMasks("2:4", keep_first=False, keep_head=False), DoublePruneBackward()]


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_a_kernel_has_to_be_faster_than_dense() -> None:
    assert SITE.problem is not None
    for ratio, wanted in ((0.5, "operator"), (0.99, "reference"), (1.2, "reference")):
        timings.remember(SITE.problem, "cpu", {**DENSE, "operator": ratio})
        implementation, reason = choose(SITE)
        assert implementation == wanted and reason.startswith("measured")
        assert not undecided(SITE)
    frozen = replace(SITE, frozen=True, inference=True)
    assert choose(frozen)[0] == "dense"
    timings.remember(SITE.problem, "cpu", {"reference": 1.5})  # it expands the weight, which a dense one is spared
    assert choose(SITE)[0] == "operator" and choose(frozen)[0] == "dense"
    timings.remember(SITE.problem, "cpu", {"operator": 0.5})
    assert choose(frozen) == ("operator", "measured 500 us, 0.50 of dense, then dense at 2.00 of it")
    timings.remember(SITE.problem, "cpu", {"compressed": 0.5})
    assert choose(replace(frozen, in_memory=True))[0] == "compressed"


def test_a_dense_product_alone_says_nothing_of_a_weight_that_is_expanded() -> None:
    assert SITE.problem is not None
    timings.remember(SITE.problem, "cpu", {"dense": 1.0, "operator": 1.2})
    assert undecided(SITE) and not undecided(replace(SITE, frozen=True, inference=True))


def test_nothing_measured_is_estimated_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert undecided(SITE)
    monkeypatch.setattr(instruction_sets, "chosen", lambda: instruction_sets.ALL[0])
    with monkeypatch.context() as patch:
        patch.setattr("fxsparse.lowering.choose._build", lambda site: None)
        assert choose(SITE)[0] == "operator" and "not measured here" in choose(SITE)[1]
        assert choose(replace(SITE, dtype=torch.bfloat16))[0] == "reference"
    monkeypatch.setattr(instruction_sets, "chosen", lambda: instruction_sets.PORTABLE)
    reason = "inlined as ATen for the compiler to fuse; no times of its kernel are known here"
    assert choose(SITE) == ("reference", reason)


def test_where_there_is_no_kernel_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SITE.problem is not None
    timings.remember(SITE.problem, "cpu", {**DENSE, "operator": 0.1, "compressed": 0.1})
    frozen = replace(SITE, frozen=True, inference=True, in_memory=True)
    for other, said in (
        (replace(SITE, shape=(64, 64)), "64 x 64 is too small"),
        (replace(SITE, dtype=torch.float64), "not for float64"),
        (replace(SITE, pattern=Pattern(2, 16)), "not for 2:16"),
    ):
        implementation, reason = choose(other)
        assert implementation == "reference" and said in reason
        assert not undecided(other)
    monkeypatch.setenv("FXSPARSE_CPU", "none")
    assert choose(SITE)[0] == "reference" and "FXSPARSE_CPU=none" in choose(SITE)[1]
    assert choose(frozen)[0] == "dense" and "FXSPARSE_CPU=none" in choose(frozen)[1]


def test_the_gradient_of_an_input_wants_columns_that_are_pruned_too() -> None:
    site = replace(SITE, op="nm_linear_grad_input")
    assert site.problem is not None
    timings.remember(site.problem, "cpu", {**DENSE, "operator": 0.5})
    assert choose_gradient(site, True, Pins())[0] == "operator"
    implementation, reason = choose_gradient(site, False, Pins())
    assert implementation == "reference" and "double-prune" in reason


@pytest.mark.usefixtures("forgetful")
def test_without_a_compiler_everything_runs_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    remember(0.1, 40)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build._compiler.cache_clear()
    gm, x = fxsparse.rewrite(Gated(), PASSES, (torch.randn(40, 256),)), torch.randn(40, 256)
    compiled = torch.compile(gm, backend="fxsparse", options=EAGER)
    same(run(compiled, x), exact(gm, x))
    assert launches(compiled) == {}
    assert "there is no C++ compiler" in fxsparse.explain(compiled)
    model = prune(Gated())
    compiled = torch.compile(model, backend="fxsparse", options=EAGER)
    same([compiled(x)], [copy.deepcopy(model).double()(x.double())])
    assert {choice.implementation for choice in compiled_graphs(compiled)[0].choices} == {"dense"}
    assert "there is no C++ compiler" in fxsparse.explain(compiled)


@pytest.mark.usefixtures("forgetful")
def test_a_failing_build_is_noted_and_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(0.1, 40)
    monkeypatch.setattr(build, "FLAGS", ("-no-such-flag",))
    tries = []
    library = build.library
    monkeypatch.setattr(build, "library", lambda *args, **kw: tries.append(args[0]) or library(*args, **kw))
    gm, x = fxsparse.rewrite(Gated(), PASSES, (torch.randn(40, 256),)), torch.randn(40, 256)
    compiled = torch.compile(gm, backend="fxsparse", options=EAGER)
    same(run(compiled, x), exact(gm, x))
    assert launches(compiled) == {} and len(tries) == len(set(tries)) == 3
    assert "cannot build nm_linear_2_4_float32" in fxsparse.explain(compiled)


def test_measuring_compares_with_dense_and_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 3)
    for op in OPS:
        extra = (8,) if op == "nm_linear_low_rank" else ()
        problem = Problem(op, TWO_FOUR, torch.float32, 40, 512, 256, extra)
        result = measure.measure(problem, "cpu")
        assert not result.failed and {"dense", "compressed"} <= result.milliseconds.keys()
        assert not undecided(Site(op, "cpu", torch.float32, (512, 256), TWO_FOUR, 40, extra=extra))
        assert timings.times(problem, "cpu")["operator"] == result.milliseconds["compressed"]
        tiles = {name for name in result.milliseconds if name.startswith("operator:")}
        assert len(tiles) == (2 if op in OPS[:2] else 1)
        best = min(tiles, key=result.milliseconds.__getitem__).partition(":")[2]
        site = Site(op, "cpu", torch.float32, (512, 256), TWO_FOUR, 40, extra=extra)
        assert str(loaded.by_id(cpp_kernel(site, "operator")).tile) == best


def test_times_are_of_the_processor_its_instructions_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SITE.problem is not None
    timings.remember(SITE.problem, "cpu", {**DENSE, "operator": 0.5})
    content = json.loads(store.path("cpu").read_text())
    assert instruction_sets.processor() in content["device"] and content["device"].endswith("threads")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert timings.times(SITE.problem, "cpu") == {}
        assert f"{threads + 1} threads" not in content["device"]
    finally:
        torch.set_num_threads(threads)
    assert timings.times(SITE.problem, "cpu")["operator"] == 0.5


# --- compiled graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_rank", [False, True])
def test_training_runs_the_kernels(low_rank: bool) -> None:
    remember(0.5, 40, extra=(4,))
    extra = [AddLowRankBranches(rank=4, start=0.0)] if low_rank else []
    gm = fxsparse.rewrite(Gated(), [*PASSES, *extra], (torch.randn(4, 256),))
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith("up"):  # starts at zero
                parameter.normal_()
    compiled = torch.compile(gm, backend="fxsparse", options=EAGER)
    for _ in range(2):
        x = torch.randn(40, 256)
        same(run(compiled, x), exact(gm, x))
    assert launches(compiled) == {"nm_linear": 6, "nm_linear_grad_input": 6, "nm_linear_grad_values": 6}
    (graph,) = compiled_graphs(compiled)
    assert {choice.implementation for choice in graph.choices} == {"operator"}
    for item in fxsparse.kernels(compiled):
        assert item.file.suffix == ".cpp" and "Made by fxsparse.codegen.cpu" in item.file.read_text()


@pytest.mark.parametrize("slow", OPS[:1] + OPS[2:])
def test_only_what_was_faster_runs_its_kernel(slow: str) -> None:
    remember(0.5, 40)
    for shape in ((512, 256), (256, 512)):
        timings.remember(Problem(slow, TWO_FOUR, torch.float32, 40, *shape), "cpu", {"operator": 2.0})
    gm, x = fxsparse.rewrite(Gated(), PASSES, (torch.randn(4, 256),)), torch.randn(40, 256)
    seen: list[str] = []
    compiled = torch.compile(gm, backend="fxsparse", options=EAGER)
    same(run(compiled, x), exact(gm, x))
    (graph,) = compiled_graphs(compiled)
    for choice in graph.choices:
        assert (choice.implementation == "reference") == (choice.op == slow), choice
        seen.append(choice.op)
    assert slow in seen


def test_training_under_autocast_runs_the_kernels_of_its_type() -> None:
    remember(0.5, 40, torch.bfloat16)
    gm, x = fxsparse.rewrite(Gated(), PASSES, (torch.randn(4, 256),)), torch.randn(40, 256)
    compiled = torch.compile(gm, backend="fxsparse", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(compiled, x)
    same(results, exact(gm, x), 0.05)
    assert launches(compiled) == {"nm_linear": 3, "nm_linear_grad_input": 3, "nm_linear_grad_values": 3}
    assert all("bfloat16" in item.name for item in fxsparse.kernels(compiled))
    assert all(result.dtype == torch.float32 for result in results[1:])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_graph", [False, True])
def test_frozen_weights_run_compressed_and_are_followed(bias: bool, in_graph: bool) -> None:
    remember(0.5, 40)
    for shape in ((512, 256), (1024, 256)):  # together they take as long as one
        for name in ("operator", "compressed"):
            timings.remember(Problem("nm_linear", TWO_FOUR, torch.float32, 40, *shape), "cpu", {name: 0.5})
    model = prune(Gated(bias))
    if in_graph:
        model = fxsparse.rewrite(model, PASSES[:1], (torch.randn(4, 256),)).requires_grad_(False)
    compiled = torch.compile(model, backend="fxsparse", options=EAGER, dynamic=True)

    def check(x: Tensor) -> None:
        with torch.no_grad():
            same([compiled(x)], [copy.deepcopy(model).double()(x.double())])

    for rows in (40, 37, 33):
        check(torch.randn(rows, 256))
    assert launches(compiled) == {"nm_linear": 6}, "the gate and what it gates run as one"
    assert "run as one product" in fxsparse.explain(compiled)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.mul_(-1)
        check(torch.randn(40, 256))
        if not in_graph:
            model.up.weight.add_(1)  # no longer 2:4
            check(torch.randn(40, 256))
            assert "no longer satisfies" in fxsparse.explain(compiled)


def test_linears_on_one_input_run_as_one_whatever_follows() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(256, 512, bias=False), nn.Linear(256, 512, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x).relu() + self.key(x)

    remember(0.5, 40)
    model, x = prune(Projections()), torch.randn(40, 256)
    compiled = torch.compile(model, backend="fxsparse", options=EAGER)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert launches(compiled) == {"nm_linear": 1}


def test_pins() -> None:
    model, x = prune(Gated()), torch.randn(40, 256)
    for pin, count in (("compressed", 2), ("dense", 0), ("reference", 0), ("-compressed", 0)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="fxsparse", options={**EAGER, "lower": {"nm_linear": pin}})
        torch.testing.assert_close(compiled(x), model(x))
        assert sum(launches(compiled).values()) == count, pin
    gm = fxsparse.rewrite(Gated(), PASSES, (x,))
    for pin, count in (("compressed", 9), ("reference", 0)):
        torch._dynamo.reset()
        compiled = torch.compile(gm, backend="fxsparse", options={**EAGER, "lower": {"nm_linear": pin}})
        same(run(compiled, x), exact(gm, x))
        (graph,) = compiled_graphs(compiled)
        assert {choice.implementation for choice in graph.choices} == ({"operator"} if count else {"reference"})


def test_eager_operators_take_kernels_where_these_always_gain() -> None:
    gm, x = fxsparse.rewrite(Gated(), PASSES, (torch.randn(4, 256),)), torch.randn(40, 256)
    before = sum(loaded.launches().values())
    same(run(gm, x), exact(gm, x))
    assert sum(loaded.launches().values()) == before + 9
    small = fxsparse.rewrite(nn.Linear(16, 16), PASSES, (torch.randn(4, 16),))
    run(small, torch.randn(4, 16))
    assert sum(loaded.launches().values()) == before + 9, "small weights are not worth one"


# --- masked storage ---------------------------------------------------------------------------------------------------

MASKED = [InsertNMMasks("2:4", storage="masked", keep_first=False, keep_head=False), DoublePruneBackward()]


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_masked_weight_is_packed_and_its_mask_followed(low_rank: bool) -> None:
    remember(0.5, 40, extra=(4,))
    extra = [AddLowRankBranches(rank=4, start=0.0)] if low_rank else []
    gm = fxsparse.rewrite(Gated(), [*MASKED, *extra], (torch.randn(4, 256),))
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith("up"):  # starts at zero
                parameter.normal_()
    compiled, x = torch.compile(gm, backend="fxsparse", options=EAGER), torch.randn(40, 256)
    same(run(compiled, x), exact(gm, x))
    assert launches(compiled) == {"nm_linear": 3, "nm_linear_grad_input": 3, "nm_linear_grad_values": 3}
    (graph,) = compiled_graphs(compiled)
    assert {(choice.op.partition("_low")[0], choice.implementation) for choice in graph.choices} == {
        ("masked_linear", "compressed")
    }
    assert all("us on the packed weight" in choice.reason for choice in graph.choices)
    with torch.no_grad():
        gm.get_parameter("up.weight").neg_()  # values are read on every call
    same(run(compiled, x), exact(gm, x))
    mask, columns = gm.get_buffer("up.weight_mask"), gm.get_buffer("up.weight_column_mask")
    mask.copy_(mask.roll(4, 1))
    columns.copy_(columns.roll(4, 1))
    same(run(compiled, x), exact(gm, x))
    assert len(compiled_graphs(compiled)) == 1 and not graph.notes
    mask[:, :2] = True  # no longer 2:4: the graph runs as it was
    same(run(compiled, x), exact(gm, x))
    assert "no longer satisfies" in fxsparse.explain(compiled)


@pytest.mark.parametrize("why", ["slow", "pinned", "dynamic", "straight through"])
def test_masks_that_stay(why: str) -> None:
    remember(0.95 if why == "slow" else 0.5, 40)
    passes = [InsertNMMasks("2:4", storage="masked", dynamic=True)] if why == "dynamic" else MASKED
    gm = fxsparse.rewrite(Gated(), passes, (torch.randn(4, 256),))
    wide = copy.deepcopy(gm).double()  # before the edit: an edited graph follows to no other dtype
    for model in (gm, wide) if why == "straight through" else ():
        for node in model.graph.find_nodes(op="call_function", target=torch.ops.fxsparse.masked_linear.default):
            node.args = (*node.args[:5], True)
        model.recompile()
    options = {**EAGER, "lower": {"nm_linear": "reference"}} if why == "pinned" else EAGER
    compiled, x = torch.compile(gm, backend="fxsparse", options=options), torch.randn(40, 256)
    same(run(compiled, x), run(wide, x.double()))
    assert launches(compiled) == {}


def test_masked_training_under_autocast() -> None:
    remember(0.5, 40, torch.bfloat16)
    gm, x = fxsparse.rewrite(Gated(), MASKED, (torch.randn(4, 256),)), torch.randn(40, 256)
    compiled = torch.compile(gm, backend="fxsparse", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(compiled, x)
    same(results, exact(gm, x), 0.05)
    assert sum(launches(compiled).values()) == 9
    assert all(result.dtype == torch.float32 for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [Pattern(1, 2), Pattern(1, 4), TWO_FOUR, Pattern(2, 8), Pattern(4, 8)], ids=str)
def test_values_are_taken_and_spread_in_cpp(pattern: Pattern, dtype: torch.dtype) -> None:
    assert launch.unavailable("nm_linear", torch.float32, 2, 4) is None
    n, m = pattern.n, pattern.m
    for columns in (m, 3 * m, 17 * m):
        weight = torch.randn(5, 2 * columns).to(dtype)[:, :columns]
        mask = nm_mask(weight.float().abs(), pattern)
        values, indices = pack(weight, mask, pattern)
        assert torch.equal(torch.ops.fxsparse_cpu.values(weight, indices, n, m), values)
        assert torch.equal(torch.ops.fxsparse_cpu.spread(values, indices, columns, n, m), weight * mask)
        torch.library.opcheck(torch.ops.fxsparse_cpu.values.default, (weight, indices, n, m))
        torch.library.opcheck(torch.ops.fxsparse_cpu.spread.default, (values, indices, columns, n, m))
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.fxsparse_cpu.values(torch.randn(3, 64), indices, n, m)


# --- Inductor and its caches ------------------------------------------------------------------------------------------

PROGRAM = """
import copy, json, torch
from torch._dynamo.utils import counters
import fxsparse
from fxsparse.passes import DoublePruneBackward, InsertNMMasks
from fxsparse.codegen.cpu import loaded

torch.manual_seed(0)
model = torch.nn.Linear(256, 256)
x = torch.randn(40, 256)
gm = fxsparse.rewrite(model, [InsertNMMasks("2:4", keep_first=False, keep_head=False), DoublePruneBackward()], (x,))
compiled = torch.compile(gm, backend="fxsparse", options={"tune": 0, "fallback": False, "lower": LOWER})
x.requires_grad_()
y = compiled(x)
y.square().sum().backward()
exact = copy.deepcopy(gm).double()  # converted itself, the graph would drop what was compiled of it
z = x.detach().double().requires_grad_()
exact(z).square().sum().backward()
assert (x.grad - z.grad).abs().max() < 1e-4
counts = {}
for item in fxsparse.kernels(compiled):
    counts[item.name.partition("_2_4")[0]] = item.count
cache = counters["aot_autograd"]
print(json.dumps({"launches": counts, "hits": cache["autograd_cache_hit"], "misses": cache["autograd_cache_miss"]}))
"""


@pytest.mark.inductor
def test_code_of_the_compile_caches_finds_its_kernels_in_another_process(tmp_path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def start(instructions: str) -> dict[str, object]:
        program = PROGRAM.replace("LOWER", '{"nm_linear": "compressed"}')
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "FXSPARSE_CPU": instructions},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return result

    every = {"nm_linear": 1, "nm_linear_grad_input": 1, "nm_linear_grad_values": 1}
    fastest = str(instruction_sets.available()[0])
    assert start(fastest) == {"launches": every, "hits": 0, "misses": 1}
    assert start(fastest) == {"launches": every, "hits": 1, "misses": 0}


def test_the_key_of_compile_caches_holds_the_kernels() -> None:
    keys = {
        InlineReferences(BackendOptions(), {"product": implementation}).uuid()
        for implementation in ("reference", "operator:1", "operator:2")
    }
    assert len(keys) == 3

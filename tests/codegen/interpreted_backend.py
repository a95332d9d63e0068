"""The backend with generated kernels behind its operators, in Triton's interpreter.

``test_interpreter.py`` runs this in a process of its own: here the CPU has kernels.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.codegen import fused_ops, operators
from fxsparse.codegen.kernels.nm_linear import nm_linear
from fxsparse.lowering import candidates, choose, timings
from fxsparse.lowering import measure as tuning
from fxsparse.ops.define import declare_kernel, implement
from fxsparse.ops.operator import Problem
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks

for op, kernel in operators.KERNELS.items():
    implement(op, "cpu")(kernel)


@fused_ops.nm_linear_epilogue.register_kernel("cpu")
def _(x, values, indices, bias, n, m, steps, operands):
    return nm_linear(x, values, indices, None, bias, n, m, steps=steps.split(), operands=operands)


declare_kernel("nm_linear_epilogue", "cpu")
declare_kernel("sparse_tensor_core_linear", "cpu")  # which runs plain torch here
declare_kernel("sparse_wgmma_linear", "cpu")


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch):
    """In the interpreter kernels are never the fastest; tests of measuring ask for it."""
    monkeypatch.setattr("fxsparse.backend.options.BackendOptions.tune", 0.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def prune(model: nn.Module) -> None:
    """Makes the weights of a model's linears 2:4."""
    for linear in model.children():
        linear.weight.mul_(fxsparse.ops.nm.nm_mask(linear.weight.abs(), fxsparse.ops.nm.Pattern(2, 4)))


PASSES = [InsertNMMasks("2:4", keep_first=False), DoublePruneBackward()]


def launches(compiled, beginning: str) -> int:
    return sum(item.count for item in fxsparse.kernels(compiled) if item.name.startswith(beginning))


@pytest.mark.parametrize("low_rank", [False, True])
def test_training_launches_generated_kernels(low_rank):
    extra = [AddLowRankBranches(rank=4, start=0.0)] if low_rank else []
    gm = fxsparse.rewrite(Block(), [*PASSES, *extra], (torch.randn(4, 32),))
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    x = torch.randn(5, 32, requires_grad=True)
    compiled(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in gm.parameters())]
    with torch.no_grad():
        for p in (x, *gm.parameters()):
            p.grad = None
    double = copy.deepcopy(gm).double()  # has no kernels
    y = x.detach().double().requires_grad_()
    double(y).square().sum().backward()
    for mine, exact in zip(found, [y.grad, *(p.grad for p in double.parameters())], strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
    for beginning in ("nm_linear_2_4", "nm_linear_grad_input", "nm_linear_grad_values"):
        assert launches(compiled, beginning) == 3, fxsparse.kernels(compiled)
    assert "generated kernel" in fxsparse.explain(compiled)
    for item in fxsparse.kernels(compiled):
        assert "import triton" in item.file.read_text()


def test_inference_takes_over_what_follows():
    gm = fxsparse.rewrite(Block(), PASSES, (torch.randn(4, 32),))
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), copy.deepcopy(gm).double()(x.double()).float(), rtol=1e-4, atol=1e-4)
    sources = [item.file.read_text() for item in fxsparse.kernels(compiled)]
    assert sum(item.count for item in fxsparse.kernels(compiled)) == 3
    assert any("silu" in source for source in sources)
    assert any("bias + add" in source or "add" in source for source in sources)


@pytest.mark.parametrize("cores", ["sparse_tensor_cores", "sparse_wgmma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_tensor_cores_where_pinned_and_possible(dtype, cores):
    gm = fxsparse.rewrite(Block(), PASSES, (torch.randn(4, 32),)).to(dtype)
    options = {"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": cores}}
    compiled = torch.compile(gm, backend="fxsparse", options=options)
    x = torch.randn(3, 32).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(gm).double()(x.double())
        assert (compiled(x) - exact).abs().max() < 0.05
    report = fxsparse.explain(compiled)
    if dtype == torch.bfloat16:
        assert fxsparse.kernels(compiled) == []  # nothing but the cores', which have no kernel here
        assert "pinned by" in report
    else:
        assert f"not {cores} as pinned, because sparse tensor cores take bfloat16" in report
    gm.get_parameter("up.weight_values").data.zero_()  # values are read, not copied
    with torch.no_grad():
        assert (compiled(x) - copy.deepcopy(gm).double()(x.double())).abs().max() < 0.05


@pytest.mark.parametrize("own_keys", [False, True])
def test_multiplexing_launches_generated_kernels(own_keys):
    class Multiplexed(nn.Module):
        def forward(self, x, keys, weight, bias):
            h = torch.ops.fxsparse.mux.default(x, keys, 3)
            own = keys.expand(h.shape[0], *keys.shape).contiguous() if own_keys else keys
            return torch.ops.fxsparse.demux_linear.default(torch.tanh(h), own, weight, bias)

    compiled = torch.compile(Multiplexed(), backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((6, 5, 16), (3, 16), (24, 32), (24,))]
    compiled(*inputs).square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    Multiplexed()(*exact).square().sum().backward()
    for mine, its in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-4, atol=1e-4)
    assert launches(compiled, "mux") == launches(compiled, "demux_linear") == 1


class Projections(nn.Module):
    """Three linears on one input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, size, bias=bias) for size in (48, 32, 40))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return q[..., :32].view(x.shape[0], 2, 16).sum(1) + (k * 2)[..., :16] + v[..., 24:].exp()


@pytest.mark.parametrize("choice", ["compressed", "sparse_tensor_cores", "sparse_wgmma"])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_on_one_input_run_as_one_product(choice, bias):
    model = Projections(bias).bfloat16().requires_grad_(False)
    prune(model)
    options = {"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": choice}}
    compiled = torch.compile(model, backend="fxsparse", options=options)
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        assert (compiled(x) - copy.deepcopy(model).double()(x.double())).abs().max() < 0.1
        assert "run as one product" in fxsparse.explain(compiled)
        assert sum(item.count for item in fxsparse.kernels(compiled)) == (1 if choice == "compressed" else 0)
        model.key.weight.mul_(-1)  # noticed
        assert (compiled(x) - copy.deepcopy(model).double()(x.double())).abs().max() < 0.1
        model.value.weight.add_(1)  # one is no longer 2:4: the dense graph runs
        assert (compiled(x) / copy.deepcopy(model).double()(x.double()) - 1).abs().max() < 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_operators_on_one_input_run_as_one(bias):
    passes = ["nm-masks{pattern=2:4,keep_first=false,keep_head=false}", "double-prune"]
    gm = fxsparse.rewrite(Projections(bias), passes, (torch.randn(3, 32),)).requires_grad_(False)
    options = {"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": "compressed"}}
    compiled = torch.compile(gm, backend="fxsparse", options=options)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), copy.deepcopy(gm).double()(x.double()).float(), rtol=1e-4, atol=1e-4)
        assert "run as one product" in fxsparse.explain(compiled)
        assert sum(item.count for item in fxsparse.kernels(compiled)) == 1
        gm.get_parameter("key.weight_values").mul_(-1)  # noticed
        torch.testing.assert_close(compiled(x), copy.deepcopy(gm).double()(x.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu])
def test_a_linear_and_what_it_gates_run_as_one_product(in_graph, bias, activation):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = (nn.Linear(32, 48, bias=bias) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.up(x), self.gate(x)
            return activation(gate) * up - 1

    model = Gated()
    prune(model)
    if in_graph:
        passes = [InsertNMMasks("2:4", keep_first=False, keep_head=False)]
        model = fxsparse.rewrite(model, passes, (torch.randn(3, 2, 32),))
    model.requires_grad_(False)
    options = {"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": "compressed"}}
    compiled = torch.compile(model, backend="fxsparse", options=options)
    with torch.no_grad():
        for rows in (3, 7):
            x = torch.randn(rows, 2, 32)
            exact = copy.deepcopy(model).double()(x.double()).float()
            torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-4)
        assert "gate" in fxsparse.explain(compiled) and "they run as one product" in fxsparse.explain(compiled)
        (kernel,) = fxsparse.kernels(compiled)
        assert kernel.count == 2 and "gated_" in kernel.file.read_text()
        for name, parameter in model.named_parameters():
            if name.startswith("gate.weight"):
                parameter.mul_(-1)  # noticed
        exact = copy.deepcopy(model).double()(x.double()).float()
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-4)
        if not in_graph:
            model.up.weight.add_(1)  # no longer 2:4: the dense graph runs
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("what", ["another input", "another reader", "both gates", "another width"])
def test_what_gates_something_else_runs_apart(what):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(32, 1 if what == "another width" else 48), nn.Linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.up(x + 1 if what == "another input" else x), self.gate(x)
            if what == "both gates":
                return F.silu(gate) * F.silu(up)
            return F.silu(gate) * up + (up if what == "another reader" else 0)

    model = Other().requires_grad_(False)
    prune(model)
    options = {"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": "compressed"}}
    compiled = torch.compile(model, backend="fxsparse", options=options)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert "gates" not in fxsparse.explain(compiled)


def test_linears_that_were_measured_faster_apart_stay_apart(monkeypatch):
    from fxsparse.lowering import group

    monkeypatch.setattr(
        group, "faster_together", lambda *_: group.FusionDecision(False, "measured 2 us together, 1 us apart")
    )

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(32, 48), nn.Linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ self.key(x).t()

    model = Projections().requires_grad_(False)
    prune(model)
    options = {"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": "compressed"}}
    compiled = torch.compile(model, backend="fxsparse", options=options)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert "run apart, measured 2 us together" in fxsparse.explain(compiled)
    assert sum(item.count for item in fxsparse.kernels(compiled)) == 2


@pytest.mark.parametrize("choice", ["compressed", "sparse_tensor_cores", "sparse_wgmma"])
def test_frozen_weights_run_compressed(choice):
    torch.manual_seed(0)
    model = Block().bfloat16().requires_grad_(False)
    prune(model)
    compiled = torch.compile(
        model, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False, "lower": {"nm_linear": choice}}
    )
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        assert (compiled(x) - copy.deepcopy(model).double()(x.double())).abs().max() < 0.05
        assert fxsparse.explain(compiled).count(choice) >= 1
        model.up.weight.mul_(-1)  # noticed
        assert (compiled(x) - copy.deepcopy(model).double()(x.double())).abs().max() < 0.05
        model.up.weight.add_(1)  # no longer 2:4: the dense graph runs
        assert (compiled(x) - copy.deepcopy(model).double()(x.double())).abs().max() < 0.5


# --- what is measured on its first use --------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_times", "plain_reference")
def test_a_training_graph_measures_its_products_and_their_gradients(monkeypatch):
    found = []
    measure = tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda *args, **kwargs: found.append(args[0]) or measure(*args, **kwargs))
    gm = fxsparse.rewrite(Block(), [*PASSES, AddLowRankBranches(rank=4, start=0.0)], (torch.randn(4, 32),))
    options = {"compiler": "aot_eager", "fallback": False, "tune": 600}
    state = torch.get_rng_state()
    compiled = torch.compile(gm, backend="fxsparse", options=options)
    x = torch.randn(5, 32)
    for _ in range(2):
        torch._dynamo.reset()
        compiled(x).sum().backward()
    torch.set_rng_state(state)
    assert torch.equal(torch.randn(5, 32), x)
    shapes = {(48, 32), (32, 48)}
    ops = ("nm_linear_low_rank", "nm_linear_grad_input", "nm_linear_grad_values")
    wanted = {(op, shape) for op in ops for shape in shapes} - {("nm_linear_grad_input", (48, 32))}  # of the data
    measured = [(problem.op, (problem.out_features, problem.in_features)) for problem in found]
    assert sorted(measured) == sorted(wanted), "once each"
    (graph,) = fxsparse.backend.compiled.compiled_graphs(compiled)
    assert all(choice.reason.startswith("measured") for choice in graph.choices), graph.choices
    for problem in found:
        times = timings.times(problem, "cpu")
        assert {"operator", "reference", "dense"} <= set(times)
        choices = {choice.implementation for choice in graph.choices if choice.problem == problem}
        assert choices == {min(("operator", "reference"), key=times.__getitem__)}


@pytest.mark.usefixtures("own_times", "plain_reference")
@pytest.mark.parametrize("slow", ["nm_linear", "nm_linear_grad_input", "nm_linear_grad_values"])
def test_inductor_inlines_the_references_that_were_faster(slow):
    """What was decided on Dynamo's graph holds in the forward and the backward graph, and where sizes are symbols."""
    gm = fxsparse.rewrite(Block(), PASSES, (torch.randn(4, 32),))
    for op in ("nm_linear", "nm_linear_grad_input", "nm_linear_grad_values"):
        for shape in ((48, 32), (32, 48)):
            problem = Problem(op, fxsparse.ops.nm.Pattern(2, 4), torch.float32, 16, *shape)
            timings.remember(problem, "cpu", {"operator": 2.0 if op == slow else 0.5, "reference": 1.0})
    compiled = torch.compile(gm, backend="fxsparse", options={"fallback": False}, dynamic=True)
    double = copy.deepcopy(gm).double()
    for rows in (11, 14):
        x = torch.randn(rows, 32, requires_grad=True)
        compiled(x).square().sum().backward()
        y = x.detach().double().requires_grad_()
        double(y).square().sum().backward()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-4)
    for op in ("nm_linear_2_4", "nm_linear_grad_input", "nm_linear_grad_values"):
        expected = 0 if op.removesuffix("_2_4") == slow else 6
        assert launches(compiled, op) == expected, fxsparse.kernels(compiled)


@pytest.mark.usefixtures("own_times", "plain_reference")
def test_frozen_weights_are_measured_and_nothing_is_without_time():
    model = Block().requires_grad_(False)
    prune(model)
    for seconds, said in ((0, False), (600, True)):
        options = {"compiler": "aot_eager", "fallback": False, "tune": seconds}
        compiled = torch.compile(model, backend="fxsparse", options=options)
        x = torch.randn(3, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        assert ("measured" in fxsparse.explain(compiled)) == said
        torch._dynamo.reset()


@pytest.mark.usefixtures("own_times", "plain_reference")
def test_what_cannot_be_measured_is_noted_and_compiled(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room\nfor operands")

    monkeypatch.setattr(candidates, "candidates_for", fail)
    gm = fxsparse.rewrite(Block(), PASSES, (torch.randn(4, 32),))
    options = {"compiler": "aot_eager", "fallback": False, "tune": 600}
    compiled = torch.compile(gm, backend="fxsparse", options=options)
    x = torch.randn(3, 32)
    torch.testing.assert_close(compiled(x), gm(x), rtol=1e-4, atol=1e-4)
    assert "nothing could be measured, OutOfMemoryError: no room" in fxsparse.explain(compiled)


@pytest.mark.usefixtures("own_times", "plain_reference")
def test_the_kernels_of_gathering_and_multiplexing_are_measured_too():
    class Both(nn.Module):
        def forward(self, x, keys, weight, both, rows):
            h = torch.ops.fxsparse.mux.default(x, keys, 3)
            part = torch.ops.fxsparse.gather_linear.default(h, weight, rows, None, None)
            return torch.ops.fxsparse.demux_linear.default(part, keys, both, None)

    options = {"compiler": "aot_eager", "fallback": False, "tune": 600}
    compiled = torch.compile(Both(), backend="fxsparse", options=options)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((6, 5, 16), (3, 16), (24, 16), (8, 28))]
    rows = torch.randperm(24)[:12]
    compiled(*inputs, rows).square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    Both()(*exact, rows).square().sum().backward()
    for mine, its in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-4, atol=1e-4)
    (graph,) = fxsparse.backend.compiled.compiled_graphs(compiled)
    gathers = ("gather_linear", "gather_linear_grad_input", "gather_linear_grad_weight")
    assert {choice.op for choice in graph.choices} == {"mux", "demux_linear", *gathers}
    assert all(choice.reason.startswith("measured") for choice in graph.choices), graph.choices


@pytest.mark.usefixtures("own_times", "plain_reference")
@pytest.mark.parametrize("in_graph", [False, True])
def test_the_library_runs_with_the_algorithm_that_was_fastest(in_graph, monkeypatch):
    """With NVIDIA's library played by dense products."""
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(choose, "no_cusparselt", lambda site: None if site.op == "nm_linear" else "not the library's")
    monkeypatch.setattr(candidates, "library_algorithms", lambda *sizes: [(0, 1, -1), (2, 4, 1)])
    calls = []

    @fused_ops.cusparselt_linear.register_kernel("cpu")
    def _(x, packed, bias, out_features, alg_id=0, split_k=1, split_k_mode=-1):
        calls.append((alg_id, split_k, split_k_mode))
        return F.linear(x, packed, bias).contiguous()

    model = nn.Sequential(nn.Linear(32, 48)).requires_grad_(False)
    prune(model)
    if in_graph:
        passes = [InsertNMMasks("2:4", keep_first=False, keep_head=False)]
        model = fxsparse.rewrite(model, passes, (torch.randn(4, 32),)).requires_grad_(False)
    (found,) = fxsparse.tune(model, rows=[3], progress=False)
    assert {"cusparselt:0/1/-1", "cusparselt:2/4/1"} <= set(found.milliseconds)
    timings.remember(found.problem, "cpu", {"cusparselt:2/4/1": 1e-6})
    compiled = torch.compile(model, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = model(x)
        calls.clear()
        torch.testing.assert_close(compiled(x), expected)
    assert calls == [(2, 4, 1)]
    assert "cusparselt" in fxsparse.explain(compiled)

"""Rewritten models in ``torch.export``, AOTInductor and ONNX."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fxsparse
from fxsparse.errors import TraceError
from fxsparse.ops.operator import operator_name
from tests.support.traced import traced

PASSES = "nm-masks{keep_first=false,keep_head=false},double-prune"


class Chain(nn.Module):
    """Three linears, dropout, and two inputs that must not be mixed up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.first(x).relu(), 0.5, self.training)
        return self.third(self.second(hidden).relu()) * scale


class Holder(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.inner(scale=scale, x=x) + 1


@functools.cache
def _rewritten() -> tuple[Chain, GraphModule]:
    model = Chain()
    return model, fxsparse.rewrite(model, PASSES, kwargs=batch())


def rewritten() -> tuple[Chain, GraphModule]:
    return copy.deepcopy(_rewritten())


def batch(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 32), "scale": torch.rand(rows, 32)}


FREE = {"x": {0: Dim.DYNAMIC}, "scale": {0: Dim.DYNAMIC}}


def calls(program: ExportedProgram | GraphModule) -> list[str]:
    """The operators of fxsparse that a program calls."""
    return [
        str(node.target) for node in program.graph.nodes if node.op == "call_function" and operator_name(node.target)
    ]


def same(function: Any, model: nn.Module) -> None:
    for rows in (2, 7):
        inputs = batch(rows)
        torch.testing.assert_close(function(**inputs), model(**inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("form", ["graph", "held", "module", "held module"])
def test_export(form: str, strict: bool) -> None:
    model, gm = rewritten()
    inner = fxsparse.to_module(gm, model) if "module" in form else gm
    exported = (Holder(inner) if "held" in form else inner).eval()
    # In another order than the graph's inputs.
    inputs = dict(reversed(batch().items()))
    program = torch.export.export(exported, (), inputs, dynamic_shapes=FREE, strict=strict)
    assert calls(program) == ["fxsparse.nm_linear.default"] * 3
    same(program.module(), exported)


def test_decompositions_leave_plain_aten() -> None:
    _, gm = rewritten()
    program = torch.export.export(gm.eval(), (), batch(), dynamic_shapes=FREE)
    plain = program.run_decompositions({**torch.export.default_decompositions(), **fxsparse.decompositions()})
    assert calls(program) and not calls(plain)
    same(plain.module(), gm)
    inputs = tuple(batch().values())
    made = make_fx(lambda x, scale: gm(x=x, scale=scale), decomposition_table=fxsparse.decompositions())(*inputs)
    assert not calls(made)
    torch.testing.assert_close(made(*inputs), gm(*inputs), rtol=1e-5, atol=1e-6)


class Labelled(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.inner(x=x, labels=labels)


def test_what_belongs_to_training_is_not_exported() -> None:
    _, gm = traced("sequential")
    gated = fxsparse.rewrite(gm, "gates{target=0.5,units=[intermediate]}").train()
    inputs = {"x": torch.randn(3, 16, 32), "labels": torch.randint(32, (3, 16))}
    for exported in (gated, Labelled(gated)):
        for strict in (False, True):
            with pytest.raises(Exception, match=r"in training, gates computes something else .* call eval\(\) first"):
                torch.export.export(exported, (), inputs, strict=strict)
    program = torch.export.export(gated.eval(), (), inputs)
    torch.testing.assert_close(program.module()(**inputs), gated(**inputs))


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[1] <= 16 else x


def test_an_exported_program_keeps_the_conditions_on_sizes() -> None:
    gm = fxsparse.trace(Bounded(), (torch.randn(2, 5, 8),)).eval()
    free = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    for exported in (gm, nn.Sequential(gm)):
        program = torch.export.export(exported, (torch.randn(3, 6, 8),), dynamic_shapes=free)
        x = torch.randn(2, 16, 8)
        torch.testing.assert_close(program.module()(x), gm(x))
        with pytest.raises(Exception, match="16"):
            program.module()(torch.randn(2, 17, 8))
    with pytest.raises(Exception, match="export with strict=False"):
        torch.export.export(gm, (torch.randn(3, 6, 8),), dynamic_shapes=free, strict=True)
    with pytest.raises(TraceError, match="outside what was captured"):
        torch.export.export(gm, (torch.randn(3, 20, 8),))
    with pytest.raises(TraceError, match="the graph takes"):
        torch.export.export(gm, (torch.randn(3, 6, 1),))


# --- other runtimes ---------------------------------------------------------------------------------------------------


def materialised() -> tuple[GraphModule, dict[str, Tensor]]:
    family, gm = traced("sequential")
    gm = fxsparse.rewrite(gm, "gates{target=0.5,units=[intermediate],score=magnitude},materialize")
    assert gm.get_parameter("layers.0.weight").shape[0] < 64
    return gm, family.make_batch(batch=4)


def with_branches() -> tuple[GraphModule, dict[str, Tensor]]:
    gm = fxsparse.rewrite(Chain(), f"{PASSES},low-rank{{rank=4,start=0.5}}", kwargs=batch())
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)
    for _ in range(2):
        gm(**batch()).sum().backward()
        optimizer.step()
        schedule.step()
    assert torch.ops.fxsparse.nm_linear_low_rank.default in {node.target for node in gm.graph.nodes}
    return gm, batch()


@pytest.mark.parametrize(
    "make", [lambda: (rewritten()[1], batch()), with_branches, materialised], ids=["nm", "low-rank", "materialised"]
)
def test_onnx(make: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    gm, inputs = make()
    gm.eval()
    free = {name: {0: Dim("batch")} for name in inputs}
    path = tmp_path / "model.onnx"
    torch.onnx.export(fxsparse.to_aten(gm), (), path, kwargs=inputs, dynamic_shapes=free, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for rows in (1, 6):
        sample = {name: tensor[:1].repeat(rows, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
        results = session.run(None, {item.name: sample[item.name].numpy() for item in session.get_inputs()})
        expected = gm(**{name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in sample.items()})
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        for result, tensor in zip(results, expected, strict=True):
            wanted = tensor[:rows] if tensor.dim() else tensor
            torch.testing.assert_close(torch.from_numpy(result), wanted.detach(), rtol=1e-4, atol=1e-5)


LOADER = """
import sys
import torch
{imports}
x, scale, expected = torch.load("inputs.pt")
model = {load}
torch.testing.assert_close(model(x=x, scale=scale), expected, rtol=1e-4, atol=1e-5)
assert model(x=x[:3], scale=scale[:3]).shape == (3, 32)
print("fxsparse" in sys.modules)
"""


def in_a_fresh_process(folder: Path, load: str, imports: str = "") -> subprocess.CompletedProcess[str]:
    code = LOADER.format(load=load, imports=imports)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_plain_program_needs_no_fxsparse(tmp_path: Path) -> None:
    _, gm = rewritten()
    inputs = batch()
    torch.save((*inputs.values(), gm.eval()(**inputs).detach()), tmp_path / "inputs.pt")
    program = torch.export.export(fxsparse.to_aten(gm), (), inputs, dynamic_shapes=FREE)
    torch.export.save(program, tmp_path / "model.pt2")
    result = in_a_fresh_process(tmp_path, 'torch.export.load("model.pt2").module()')
    assert result.stdout == "False\n", result.stderr


@pytest.mark.inductor
def test_aot_inductor(tmp_path: Path) -> None:
    _, gm = rewritten()
    inputs = batch()
    torch.save((*inputs.values(), gm.eval()(**inputs).detach()), tmp_path / "inputs.pt")
    program = torch.export.export(gm, (), inputs, dynamic_shapes=FREE)
    assert calls(program)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    load = 'torch._inductor.aoti_load_package("model.pt2")'
    with_operators = in_a_fresh_process(tmp_path, load, "import fxsparse")
    assert with_operators.stdout == "True\n", with_operators.stderr
    without = in_a_fresh_process(tmp_path, load)
    assert without.returncode and "fxsparse::nm_linear" in without.stderr

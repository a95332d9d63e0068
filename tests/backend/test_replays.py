"""Launches replayed from compiled graphs, on a GPU that a CPU plays: every call launches on its own tensors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import linear

from fxsparse.backend import replays
from fxsparse.codegen import autotune
from fxsparse.codegen.kernels.sparse_wgmma_linear import SparseWgmmaLinear, sparse_wgmma_linear
from fxsparse.codegen.loaded import kernels, launched
from fxsparse.codegen.metadata import pack_wgmma_metadata
from fxsparse.codegen.replay import Replay, bind
from fxsparse.codegen.split import workspaces
from fxsparse.ops import define
from fxsparse.ops.nm import Pattern, nm_mask, pack
from tests.support.played_gpu import Played

BOUND = ("nm_linear", (("tensor", 0), ("tensor", 1), ("tensor", 2), None, ("tensor", 3), 2, 4), (0,))
PINNED = {"nm_linear": "compressed"}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *args, **options: played(*args, **options))
    monkeypatch.setattr(define, "_kernels", define._kernels | {("nm_linear", "cpu")})
    monkeypatch.setattr(replays, "DEVICES", {"cpu"})
    bind.cache_clear()
    return played


def weight(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.randn(rows, columns).bfloat16()
    mask = nm_mask(dense.abs(), Pattern(2, 4))
    return dense * mask, *pack(dense, mask, Pattern(2, 4))


def launches() -> int:
    return sum(kernel.launches for kernel in kernels() if kernel.file.name.startswith("nm_linear_2_4"))


def close(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, size in (("first", (48, 64)), ("second", (32, 48))):
            for part, tensor in zip(("dense", "values", "indices"), weight(*size), strict=True):
                self.register_buffer(f"{name}_{part}", tensor)
        self.bias = nn.Parameter(torch.randn(48).bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        op = torch.ops.fxsparse.nm_linear
        hidden = op(x, self.first_values, self.first_indices, None, self.bias, 2, 4)
        return op(hidden.exp().tanh(), self.second_values, self.second_indices, None, None, 2, 4)

    def expected(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.first_dense, self.bias).exp().tanh(), self.second_dense)


@pytest.mark.inductor
@torch.no_grad()
def test_compiled_graphs_replay_on_new_tensors(played: Played) -> None:
    replays.register()
    model = Layers()
    compiled = torch.compile(
        model, backend="fxsparse", dynamic=True, options={"tune": 0, "fallback": False, "lower": PINNED}
    )
    before = launches()
    for turn, rows in enumerate((5, 5, 9, 5, 9)):
        x = torch.randn(2, rows, 64).bfloat16()
        close(compiled(x), model.expected(x))
        assert launches() == before + 2 * (turn + 1)
    assert played.calls == 4  # of two linears, the first with 5 and the first with 9 rows


def test_this_version_of_triton_launches_on_addresses() -> None:
    """A replay hands an integer to a kernel where it expects a tensor: Triton's launcher, in C, takes it as it is."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia"
    text = (folder / "driver.c").read_text() + (folder / "driver.py").read_text().replace("{{", "{").replace("}}", "}")
    (body,) = re.findall(r"\n(?:bool extractPointer|static inline DevicePtrInfo getPointer)\(.*?\n}", text, re.DOTALL)
    takes_integers = re.search(r"if \(PyLong_Check\(obj\)\) {\s*\S+ = PyLong_AsUnsignedLongLong\(obj\);\s*return", body)
    assert takes_integers and takes_integers.start() < body.index("data_ptr_str")
    # and what describes memory to TMA is asked for its address alone
    assert "base.data_ptr()" in text and "base.shape" not in text


def call(replay: Replay, rows: int = 7, offset: int = 0) -> None:
    dense, values, indices = weight(48, 64)
    x = torch.randn(rows * 64 + offset).bfloat16()[offset:].view(rows, 64)
    bias = torch.randn(48).bfloat16()
    close(replay(x, values, indices, bias), linear(x, dense, bias))


def test_what_a_launch_depends_on_is_found_out_again(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = bind(*BOUND)
    call(replay)
    call(replay)
    assert played.calls == 1
    call(replay, offset=1)  # an address that is no multiple of 16
    call(replay, offset=1)
    call(replay, rows=8)
    assert played.calls == 3
    monkeypatch.setattr(autotune, "_latest", -1)  # something was tuned since
    call(replay)
    assert played.calls == 4
    assert bind(*BOUND) is replay and bind("nm_linear", (*BOUND[1][:4], None, 2, 4), (0,)) is not replay


def test_tensors_that_share_memory_are_told_apart(played: Played) -> None:
    """In the first call a bias is a row of x, so that its address does not say which of them a launch took."""
    dense, values, indices = weight(64, 64)
    replay, x = bind(*BOUND), torch.randn(7, 64).bfloat16()
    for bias in (x[0], torch.randn(64).bfloat16(), x[0], torch.randn(64).bfloat16()):
        close(replay(x, values, indices, bias), linear(x, dense, bias))


def test_what_launches_on_memory_of_its_own_runs_as_ever(played: Played) -> None:
    dense, values, indices = weight(48, 64)
    wide = torch.randn(7, 130).bfloat16()[:, 1:129:2]  # copied first
    replay = bind("nm_linear", (*BOUND[1][:4], None, 2, 4), (0,))
    for _ in range(3):
        close(replay(wide, values, indices), linear(wide, dense))
    assert played.calls == 3


def test_descriptors_and_a_depth_in_parts_are_made_anew(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseWgmmaLinear, "check", lambda self, ptx: None)
    replay = Replay(sparse_wgmma_linear, (("tensor", 0), ("tensor", 1), ("tensor", 2), ("tensor", 3)), (0,))
    for turn in range(3):
        dense, values, indices = weight(128, 1024)
        x, bias = torch.randn(5, 1024).bfloat16(), torch.randn(128).bfloat16()
        with launched() as seen, workspaces() as asked:
            close(replay(x, values, pack_wgmma_metadata(indices), bias), linear(x, dense, bias))
        assert len(asked) == 1  # the depth is in parts
        assert (not seen) == (turn > 0)


def microseconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        begin = time.thread_time()
        for _ in range(300):
            run()
        times.append((time.thread_time() - begin) / 300 * 1e6)
    return min(times)


@torch.no_grad()
def test_a_replayed_launch_costs_the_host_little(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """About as little as a dense linear through the dispatcher, where the launch itself costs nothing."""
    _, values, indices = weight(48, 64)
    x, bias = torch.randn(1, 64).bfloat16(), torch.randn(48).bfloat16()
    replay = bind(*BOUND)
    replay(x, values, indices, bias)
    monkeypatch.setattr("tests.support.played_gpu.Compiled.run", lambda self, **named: None)
    weight_ = torch.randn(48, 64).bfloat16()
    dense = microseconds(lambda: torch.ops.aten.linear.default(x, weight_, bias))
    replayed = microseconds(lambda: replay(x, values, indices, bias))
    print(f"{replayed:.1f} us, aten.linear {dense:.1f} us")
    assert replayed < 2.5 * dense

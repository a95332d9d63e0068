"""Choosing implementations: measurements first, then estimates, then rules; pins; weights that are expanded once."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend.compiled import compiled_graphs
from fxsparse.codegen import source, store
from fxsparse.graph.dynamo import state_names
from fxsparse.lowering import estimates, timings
from fxsparse.lowering.after_partition import deviates
from fxsparse.lowering.choose import choose, no_kernel, obstacles, undecided
from fxsparse.lowering.estimates import DEVICES, microseconds
from fxsparse.lowering.lower import Lowered, lower_graph
from fxsparse.lowering.pins import LOWERINGS, Pins
from fxsparse.lowering.sites import Site
from fxsparse.ops.nm import Pattern, unpack
from fxsparse.ops.operator import Problem
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks
from tests.support.tuned import Two

FROZEN = Site("nm_linear", "cuda", torch.bfloat16, (4096, 4096), Pattern(2, 4), 512, True, True, True)
IN_GRAPH = replace(FROZEN, in_memory=False)
TRAINED = replace(IN_GRAPH, frozen=False, inference=False)


pytestmark = pytest.mark.usefixtures("own_times")


# --- rules, estimates, measurements -----------------------------------------------------------------------------------


def test_without_a_measurement_on_an_unknown_device_rules_decide() -> None:
    assert choose(FROZEN)[0] == "compressed"
    assert choose(IN_GRAPH)[0] == choose(TRAINED)[0] == "operator"
    assert choose(replace(FROZEN, device="cpu"))[0] == "dense"
    assert choose(replace(IN_GRAPH, device="cpu"))[0] == "dense"
    assert choose(replace(TRAINED, device="cpu"))[0] == "reference"


@pytest.mark.parametrize("best", ["dense", "compressed", "sparse_tensor_cores"])
def test_what_was_measured_decides_and_is_said(best: str) -> None:
    times = {"dense": 0.2, "compressed": 0.3, "sparse_tensor_cores": 0.4, best: 0.1}
    timings.remember(FROZEN.problem, "cuda", times)
    found, reason = choose(FROZEN)
    assert found == best
    runner_up = sorted(times, key=times.__getitem__)[1]
    assert "measured 100 us" in reason
    assert f"then {runner_up} at" in reason
    if best != "dense":
        assert f"{0.1 / times['dense']:.2f} of dense" in reason
    assert choose(FROZEN, f"-{best}")[0] == runner_up
    assert choose(FROZEN, "compressed")[0] == "compressed"
    other = replace(FROZEN, rows=5000)  # another power of two
    assert "measured" not in choose(other)[1]
    near = replace(FROZEN, rows=300)
    assert choose(near)[0] == best


def test_a_kernel_is_chosen_only_where_it_was_measured_beside_what_is_always_right() -> None:
    timings.remember(TRAINED.problem, "cuda", {"dense": 0.1, "operator": 0.3})
    assert undecided(TRAINED)
    assert "measured" not in choose(TRAINED)[1]  # its reference might be as fast as dense
    timings.remember(TRAINED.problem, "cuda", {"reference": 0.2})
    assert not undecided(TRAINED)
    assert choose(TRAINED) == ("reference", "measured 200 us, 2.00 of dense, then operator at 1.50 of it")
    other = replace(TRAINED, rows=5000)
    timings.remember(other.problem, "cuda", {"dense": 0.1, "reference": 0.2})  # the kernel failed there
    assert choose(other)[0] == "reference"
    without = replace(other, device="cpu", dtype=torch.float64)
    assert not undecided(without), "there is nothing to choose between"
    assert undecided(replace(other, device="cpu")) == (no_kernel(replace(other, device="cpu")) is None)


def test_gradients_of_inputs_and_weights_are_explained_where_they_are_taken() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    passes = [InsertNMMasks("2:4", keep_first=False, keep_head=False), DoublePruneBackward()]
    gm = fxsparse.rewrite(model, passes, (torch.randn(4, 32),))
    options = {"compiler": "aot_eager", "lower": {"nm_linear": "reference"}}
    compiled = torch.compile(gm, backend="fxsparse", options=options)
    compiled(torch.randn(3, 32)).sum().backward()
    with torch.no_grad():
        compiled(torch.randn(3, 32))
    training, inference = compiled_graphs(compiled)
    found = [(choice.op, choice.site.partition(".")[0]) for choice in training.choices]
    assert sorted(found) == [
        ("nm_linear", "0"),
        ("nm_linear", "2"),
        ("nm_linear_grad_input", "2"),
        ("nm_linear_grad_values", "0"),
        ("nm_linear_grad_values", "2"),
    ]
    assert {choice.op for choice in inference.choices} == {"nm_linear"}
    assert all('{"nm_linear": "reference"}' in choice.reason for choice in training.choices)


def test_choices_are_the_same_in_another_process_with_the_same_table(tmp_path: Path) -> None:
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.3, "compressed": 0.1})
    first = choose(FROZEN)
    timings.forget()  # as a new process: from the file
    assert choose(FROZEN) == first
    assert "measured" in first[1]


def test_implementations_that_cannot_run_are_not_chosen_though_they_were_fastest() -> None:
    site = replace(FROZEN, pattern=Pattern(2, 8))
    timings.remember(site.problem, "cuda", {"dense": 0.3, "compressed": 0.2, "sparse_tensor_cores": 0.1})
    assert choose(site)[0] == "compressed"
    assert choose(replace(site, inference=False, frozen=False, in_memory=False))[0] != "dense"


def test_linears_on_one_input_run_together_where_that_was_not_measured_slower() -> None:
    from fxsparse.lowering.group import FusionDecision, faster_together

    apart = [replace(FROZEN, shape=(size, 4096)) for size in (4096, 1024)]
    joint = replace(FROZEN, shape=(5120, 4096), in_memory=False)
    assert faster_together(apart, joint, "compressed") == FusionDecision(True, "not measured")
    for site, time in zip(apart, (0.2, 0.1), strict=True):
        timings.remember(site.problem, "cuda", {"compressed": time, "dense": 1.0})
    assert faster_together(apart, joint, "compressed") == FusionDecision(True, "not measured")
    for time, faster in ((0.25, True), (0.4, False)):
        timings.remember(joint.problem, "cuda", {"compressed": time})
        why = f"measured {time * 1e3:.0f} us together, 300 us apart"
        assert faster_together(apart, joint, "compressed") == FusionDecision(faster, why)


@pytest.mark.parametrize("op", ["gather_linear", "mux", "demux_linear"])
def test_operators_on_dense_weights_are_chosen_and_pinned_too(op: str) -> None:
    site = Site(op, "cuda", torch.bfloat16)
    assert choose(site)[0] == "operator"
    assert choose(replace(site, device="cpu"))[0] == "reference"
    assert "pinned by options" in choose(site, "reference")[1]
    assert choose(site, "-operator")[0] == choose(site, "reference")[0] == "reference"
    found, reason = choose(replace(site, device="cpu"), "operator")
    assert found == "reference"
    assert "not operator as pinned, because there is no kernel for cpu" in reason
    for name in LOWERINGS[op]:
        assert name == "auto" or name in obstacles(site)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_hoppers_instruction_is_for_hopper_alone(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "of nobody")
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.3, "compressed": 0.2, "sparse_wgmma": 0.1})
    hopper = capability == (9, 0)
    assert (choose(FROZEN)[0] == "sparse_wgmma") == hopper
    found, reason = choose(FROZEN, "sparse_wgmma")
    assert (found == "sparse_wgmma") == hopper
    assert hopper or "not sparse_wgmma as pinned, because the device has no wgmma" in reason
    assert choose(replace(FROZEN, rows=1 << 14))[0] != "sparse_wgmma"  # only where it was measured
    assert obstacles(replace(FROZEN, pattern=Pattern(1, 2)))["sparse_wgmma"] is not None
    assert (obstacles(TRAINED)["sparse_wgmma"] is None) == hopper
    assert obstacles(replace(FROZEN, inference=False))["sparse_wgmma"] is not None  # no operator to stand below


def test_pins_that_cannot_be_kept_say_why() -> None:
    found, reason = choose(replace(TRAINED, device="cpu"), "sparse_tensor_cores")
    assert found == "reference"
    assert "not sparse_tensor_cores as pinned, because there are none on cpu" in reason
    assert choose(TRAINED, "dense") == ("reference", choose(TRAINED, "dense")[1])
    assert "its weight is trained" in choose(TRAINED, "dense")[1]
    found, reason = choose(replace(IN_GRAPH, pattern=Pattern(1, 2)), "sparse_tensor_cores")
    assert found == "operator"
    assert "they take 2:4, not 1:2" in reason


@pytest.mark.parametrize("pattern", [Pattern(2, 16), Pattern(2, 32), Pattern(3, 5)], ids=str)
def test_patterns_without_a_kernel_say_what_runs_and_why(pattern: Pattern) -> None:
    why = f"there are kernels for 1:2, 2:4, 1:4, 2:8, 4:8, not for {pattern}"
    shape = (pattern.m * 64, pattern.m * 64)
    trained = replace(TRAINED, pattern=pattern, shape=shape)
    assert choose(trained) == ("reference", f"inlined as ATen for the compiler to fuse; {why}")
    found, reason = choose(trained, "operator")
    assert found == "reference" and f"not operator as pinned, because {why}" in reason
    memory = replace(FROZEN, pattern=pattern, shape=shape)
    assert choose(memory) == ("dense", f"the dense weight is in memory anyway, and {why}")
    assert choose(memory, "compressed")[0] == "compressed"  # its reference, because it was asked for
    assert not undecided(trained) and not undecided(memory)
    assert choose(replace(trained, pattern=Pattern(2, 8)))[0] == "operator"


def test_a_dtype_without_a_kernel_says_so_too() -> None:
    assert "not for float64" in choose(replace(TRAINED, dtype=torch.float64))[1]


# --- the cost model ---------------------------------------------------------------------------------------------------


def order(problem: Problem, device: str, *names: str) -> list[str]:
    on = next(known for known in DEVICES if known.name == device)
    return sorted(names, key=lambda name: microseconds(problem, name, on))


def test_the_cost_model_orders_as_published_measurements_do() -> None:
    """Decoding is bound by memory: what reads fewer bytes wins on every device. Of large products a plain kernel that
    decompresses loses to the dense library, cuSPARSELt wins (1.1-1.3x on H100: pytorch.org/blog/accelerating-neural-
    network-training), and a dense library product beats decompressing before it."""
    decode = Problem("nm_linear", Pattern(2, 4), torch.bfloat16, 1, 11008, 4096)
    large = replace(decode, rows=16384)
    for device in DEVICES:
        assert order(decode, device.name, "dense", "compressed")[0] == "compressed"
        assert order(decode, device.name, "dense", "sparse_tensor_cores")[0] == "sparse_tensor_cores"
        assert order(large, device.name, "compressed", "dense")[0] == "dense"
        assert order(large, device.name, "cusparselt", "dense", "compressed")[0] == "cusparselt"
        assert order(large, device.name, "operator", "reference")[0] == "reference"
        assert order(decode, device.name, "operator", "reference")[0] == "operator"
        for rows in (1, 64, 1024):
            times = [microseconds(replace(decode, rows=rows * more), "dense", device) for more in (1, 2, 4)]
            assert times == sorted(times)
        part = Problem("gather_linear", None, torch.bfloat16, 16, 1024, 4096, (11008, 4096, 64))
        assert order(part, device.name, "operator", "reference")[0] == "operator"  # which copies the rows it reads
        whole = replace(part, rows=16384, out_features=11008)
        assert order(whole, device.name, "operator", "reference")[0] == "reference"  # a library's product
        demux = Problem("demux_linear", None, torch.bfloat16, 64, 768, 768, (10, 768, 1))
        assert order(demux, device.name, "operator", "reference")[0] == "operator"
        mux = Problem("mux", None, torch.bfloat16, 1024, 768, 768, (5, 128))
        assert microseconds(mux, "operator", device) is None
    assert order(large, "NVIDIA A100", "sparse_tensor_cores", "dense")[0] == "sparse_tensor_cores"
    assert order(large, "NVIDIA H100", "sparse_tensor_cores", "dense")[0] == "dense"


SQUARE = Problem("nm_linear", Pattern(2, 4), torch.float16, 4096, 4096, 4096)


@pytest.mark.parametrize(
    ("device", "problem", "milliseconds"),
    [
        # github.com/NVIDIA/CUDALibrarySamples/issues/57
        ("NVIDIA A100", SQUARE, {"dense": 0.607959, "cusparselt": 0.545792}),
        # github.com/NVIDIA/cutlass/issues/408: 302.3 and 484 TFLOP/s
        (
            "NVIDIA A100",
            replace(SQUARE, rows=16384, out_features=16384, in_features=16384),
            {"dense": 29.1, "sparse_tensor_cores": 18.2},
        ),
        # github.com/NVIDIA/cutlass/issues/1335: kernels for Ampere's sparse tensor cores on a later device
        (
            "NVIDIA H100",
            replace(SQUARE, dtype=torch.bfloat16, rows=768),
            {"dense": 0.0457472, "sparse_tensor_cores": 0.0742464},
        ),
    ],
)
def test_the_cost_model_orders_what_others_recorded(
    device: str, problem: Problem, milliseconds: dict[str, float]
) -> None:
    names = sorted(milliseconds, key=milliseconds.__getitem__)
    assert order(problem, device, *names) == names
    on = next(known for known in DEVICES if known.name == device)
    first, second = (microseconds(problem, name, on) for name in names)
    assert second / first == pytest.approx(milliseconds[names[1]] / milliseconds[names[0]], rel=0.35)
    for name, time in milliseconds.items():
        assert 0.5 < microseconds(problem, name, on) / (1e3 * time) < 2


def test_estimates_decide_on_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "device", lambda: DEVICES[0])
    assert choose(replace(FROZEN, rows=1))[0] == "compressed"
    found, reason = choose(replace(FROZEN, rows=16384))
    assert found == "dense"
    assert "not measured" in reason


def test_estimates_leave_dense_where_a_kernel_does_not_occupy_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = next(known for known in DEVICES if known.name == "NVIDIA H100")
    monkeypatch.setattr(estimates, "device", lambda: h100)
    few = replace(FROZEN, rows=64, shape=(4096, 14336))  # 64 x 64 tiles
    assert microseconds(few.problem, "compressed", h100) < microseconds(few.problem, "dense", h100)
    found, reason = choose(few)
    assert found == "dense" and "its 64 programs leave some of 132 multiprocessors idle" in reason
    assert choose(replace(few, shape=(14336, 4096)))[0] == "compressed"
    assert choose(replace(few, inference=False, frozen=False, in_memory=False))[0] == "reference"
    assert choose(few, "compressed")[0] == choose(few, "-dense")[0] == "compressed"  # asked for
    monkeypatch.setattr(estimates, "microseconds", lambda problem, name, on: {"dense": 10.4}.get(name, 10.0))
    found, reason = choose(replace(few, shape=(14336, 4096)))
    assert found == "dense" and "too little to gain" in reason


def test_programs_are_those_of_a_launch() -> None:
    count = estimates.programs
    linear = Problem("nm_linear", Pattern(2, 4), torch.bfloat16, 1, 4096, 14336)
    assert count(linear) == 4096 // 32 and count(replace(linear, rows=200)) == 2 * 4096 // 128
    assert count(replace(linear, op="nm_linear_grad_input", rows=200)) == 2 * 14336 // 128
    grad_values, (*_, h100) = replace(linear, op="nm_linear_grad_values", rows=200), estimates.DEVICES
    assert count(grad_values) == 4096 // 128 * 14336 // 128 == 2 * (count(grad_values, h100) or 0)
    assert count(Problem("mux", None, torch.bfloat16, 1024, 768, 768, (5, 128))) is None


# --- the table on disk ------------------------------------------------------------------------------------------------


def table() -> Path:
    (path,) = (source.cache_dir() / "measured").glob("*.json")
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("NVIDIA Test", "NVIDIA Other"),
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace("0.25", '"fast"'),
        lambda text: text.replace("0.25", "NaN"),
    ],
)
def test_a_damaged_or_foreign_table_is_ignored_with_a_warning(damage) -> None:
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.25})
    path = table()
    path.write_text(damage(path.read_text()))
    timings.forget()
    with pytest.warns(UserWarning, match="ignored"):
        assert timings.times(FROZEN.problem, "cuda") == {}
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.5})  # and replaced by what is measured anew
    timings.forget()
    assert timings.times(FROZEN.problem, "cuda") == {"dense": 0.5}


def test_a_shipped_table_serves_until_something_was_measured_here(monkeypatch, tmp_path: Path) -> None:
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.25, "compressed": 0.5})
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    table().rename(shipped / table().name)
    monkeypatch.setattr(timings, "SHIPPED", shipped)
    timings.forget()
    assert choose(FROZEN)[0] == "dense"
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.2, "compressed": 0.1})
    assert choose(FROZEN)[0] == "compressed"
    timings.forget()
    assert timings.times(FROZEN.problem, "cuda") == {"dense": 0.2, "compressed": 0.1}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Other")  # it is of one device
    timings.forget()
    assert timings.times(FROZEN.problem, "cuda") == {}


def test_shipped_tables_can_be_read() -> None:
    for path in timings.SHIPPED.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["format"] == store.FORMAT
        assert {"device", "torch", "triton", "kernels"} <= set(content)
        assert content["milliseconds"] and all(map(timings._is_row, content["milliseconds"].values()))


def test_a_table_that_cannot_be_written_serves_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(source, "replace", refuse)
    with pytest.warns(UserWarning, match="read-only file system"):
        timings.remember(FROZEN.problem, "cuda", {"dense": 0.25})
    assert timings.times(FROZEN.problem, "cuda") == {"dense": 0.25}


def test_a_lock_that_another_process_holds_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.25})
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    with source.locked(table()), pytest.warns(UserWarning, match="another process held it"):
        timings.remember(FROZEN.problem, "cuda", {"compressed": 0.5})
    assert timings.times(FROZEN.problem, "cuda") == {"dense": 0.25, "compressed": 0.5}


_WRITER = """
import sys, torch
torch.cuda.get_device_name = lambda *_: "NVIDIA Test"
from fxsparse.lowering import timings
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import Problem
for count in range(20):
    problem = Problem("nm_linear", Pattern(2, 4), torch.bfloat16, 1, 64 + count, int(sys.argv[1]))
    timings.remember(problem, "cuda", {"dense": 1.0})
"""


def test_processes_that_write_at_once_lose_nothing() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(width)], env=environment, stderr=subprocess.PIPE)
        for width in (32, 48)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors.decode()
    assert len(json.loads(table().read_text())["milliseconds"]) == 40


def test_compiled_code_is_of_the_choices_it_was_made_by() -> None:
    """The caches' key changes with a choice, and not with times that change none."""
    from fxsparse.backend.inductor import InlineReferences
    from fxsparse.backend.options import BackendOptions

    def uuid(**overrides: str) -> bytes | None:
        return InlineReferences(BackendOptions(), overrides).uuid()

    first, second = uuid(), uuid(product="reference")
    assert uuid() == first != second == uuid(product="reference")
    assert len({first, second, uuid(product="operator"), uuid(other="reference")}) == 4
    timings.remember(FROZEN.problem, "cuda", {"dense": 0.25})
    assert uuid() == first


def test_only_what_fixed_rules_would_not_choose_is_told_to_the_compiler() -> None:
    pins = Pins()
    assert not deviates(TRAINED, "operator", pins)
    assert deviates(TRAINED, "reference", pins)
    pinned = Pins((("nm_linear", "reference"),))
    assert not deviates(TRAINED, "reference", pinned)
    assert not deviates(replace(TRAINED, device="cpu"), "reference", pins)
    assert not deviates(Site("masked_linear", "cpu", torch.float32), "reference", pins)


# --- weights expanded once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_frozen_compressed_weights_are_expanded_once_and_followed(
    pattern: str, low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [InsertNMMasks(pattern, keep_first=False, keep_head=False), DoublePruneBackward()]
    if low_rank:
        passes.append(AddLowRankBranches(rank=3, start=0.0))
    gm = fxsparse.rewrite(Two(), passes, (torch.randn(4, 32),))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.normal_()
    gm.requires_grad_(False).eval()
    expansions: list[Pattern] = []

    def counted(values: Tensor, indices: Tensor, found: Pattern, in_features: int) -> Tensor:
        expansions.append(found)
        return unpack(values, indices, found, in_features)

    monkeypatch.setattr("fxsparse.lowering.weights.unpack", counted)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    with torch.no_grad():
        for rows in (3, 3, 5):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(compiled(x), gm(x))
        assert expansions == [Pattern.parse(pattern)] * 2
        assert "expanded once" in fxsparse.explain(compiled)
        gm.get_parameter("first.weight_values").mul_(2)  # noticed
        torch.testing.assert_close(compiled(x), gm(x))
        assert len(expansions) == 3


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("frozen_dense", [False, True])
def test_a_linear_may_read_another_one_directly(low_rank: bool, frozen_dense: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 48, bias=False))
    options = {"compiler": "aot_eager", "fallback": False}
    if frozen_dense:
        options["lower"] = {"nm_linear": "compressed"}
        for linear in model.requires_grad_(False):
            linear.weight.mul_(torch.tensor([1.0, 0, 0, 1]).repeat(linear.in_features // 4))
    else:
        passes = [InsertNMMasks("2:4", keep_first=False, keep_head=False)]
        passes += [DoublePruneBackward(), AddLowRankBranches(rank=3, start=0.0)] if low_rank else []
        model = fxsparse.rewrite(model, passes, (torch.randn(4, 32),)).requires_grad_(False)
    compiled = torch.compile(model, backend="fxsparse", options=options)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_trained_weights_are_not_expanded() -> None:
    passes = [InsertNMMasks("2:4", keep_first=False, keep_head=False)]
    gm = fxsparse.rewrite(Two(), passes, (torch.randn(4, 32),))
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager"})
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), gm(x))
    assert "expanded once" not in fxsparse.explain(compiled)


def test_a_compressed_copy_that_memory_has_no_room_for_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two().requires_grad_(False)
    for linear in (model.first, model.second):
        linear.weight.mul_(torch.tensor([1.0, 0, 0, 1]).repeat(linear.in_features // 4))
    x = torch.randn(3, 32)
    for room, implementation in ((1 << 30, "compressed"), (100, "dense")):
        monkeypatch.setattr("fxsparse.lowering.memory.available_memory", lambda device, room=room: room)
        options = {"compiler": "aot_eager", "lower": {"nm_linear": "compressed"}}
        compiled = torch.compile(model, backend="fxsparse", options=options)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        (graph,) = compiled_graphs(compiled)
        assert [choice.implementation for choice in graph.choices] == [implementation] * 2
        assert ("no memory for a compressed copy" in fxsparse.explain(compiled)) == (room == 100)
        torch._dynamo.reset()


def test_a_weight_that_memory_has_no_room_for_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsparse.lowering.memory.available_memory", lambda device: 100)
    gm = fxsparse.rewrite(Two(), [InsertNMMasks("2:4", keep_first=False, keep_head=False)], (torch.randn(4, 32),))
    gm.requires_grad_(False)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager"})
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), gm(x))
    assert "no memory to expand" in fxsparse.explain(compiled)


def test_the_expanded_weight_goes_with_the_model() -> None:
    import gc
    import weakref

    gm = fxsparse.rewrite(Two(), [InsertNMMasks("2:4", keep_first=False, keep_head=False)], (torch.randn(4, 32),))
    gm.requires_grad_(False)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "eager"})
    with torch.no_grad():
        compiled(torch.randn(3, 32))
    from fxsparse.graph.runtime_state import _table

    before = len(_table)
    values = weakref.ref(gm.get_parameter("first.weight_values"))
    del gm, compiled
    torch._dynamo.reset()
    gc.collect()
    assert values() is None
    assert len(_table) < before


def test_a_copy_has_its_own_expanded_weights() -> None:
    gm = fxsparse.rewrite(Two(), [InsertNMMasks("2:4", keep_first=False, keep_head=False)], (torch.randn(4, 32),))
    gm.requires_grad_(False)
    other = copy.deepcopy(gm)
    with torch.no_grad():
        other.get_parameter("second.weight_values").neg_()
    x = torch.randn(3, 32)
    with torch.no_grad():
        for module in (gm, other):
            compiled = torch.compile(module, backend="fxsparse", options={"compiler": "aot_eager"})
            torch.testing.assert_close(compiled(x), module(x))


def test_lower_names_are_those_of_the_options() -> None:
    for name in LOWERINGS["nm_linear"]:
        assert name == "auto" or name in {*obstacles(FROZEN), *obstacles(IN_GRAPH)}


# --- what lowering returns --------------------------------------------------------------------------------------------


def test_lowering_returns_a_copy_and_leaves_the_graph_as_it_was() -> None:
    gm = fxsparse.rewrite(Two(), [InsertNMMasks("2:4", keep_first=False, keep_head=False)], (torch.randn(4, 32),))
    gm.requires_grad_(False)
    results: list[Lowered] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        before, names = str(graph.graph), state_names(graph, inputs, gm)
        results.append(lower_graph(graph, inputs, names, Pins(), 0.0))
        results.append(lower_graph(graph, inputs, names, Pins((("nm_linear", "reference"),)), 0.0))
        assert str(graph.graph) == before
        assert results[0].module is not graph and results[1].module is graph
        return graph.forward

    with torch.no_grad():
        torch.compile(gm, backend=backend)(torch.randn(3, 32))
    expanded, inlined = results
    assert [choice.implementation for choice in expanded.choices] == ["dense"] * 2
    assert [slot.names for slot in expanded.slots] == [("first.weight_values_dense",), ("second.weight_values_dense",)]
    assert [choice.implementation for choice in inlined.choices] == ["reference"] * 2
    assert inlined.slots == inlined.notes == () and not inlined.overrides
    with pytest.raises(FrozenInstanceError):
        expanded.notes = ("another",)  # type: ignore[misc]

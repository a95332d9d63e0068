"""The first run on a GPU, rehearsed where there is none: what it plans, its lines, and what it does with what hangs."""

from __future__ import annotations

import argparse
import os
import time

import pytest
import torch

from benchmarks import first_run, gpu, static
from benchmarks.first_run import GENERATE, HEADER, LAYER, PRODUCT, TESTS, Unit, Worker
from benchmarks.static_model import Prediction
from fxsparse.lowering.measure import Measurement

ARGS = argparse.Namespace(device="cpu", small=False, rounds=3, minutes=1.0, first_run=True)
SMALL = argparse.Namespace(**{**vars(ARGS), "small": True})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_plan_is_ten_minutes_with_the_most_telling_first():
    plan = list(first_run.units(ARGS))
    assert len({unit.name for unit in plan}) == len(plan) and 35 <= len(plan) <= 45
    assert plan[0].kind == TESTS and [unit.kind for unit in plan[-3:]] == [LAYER, LAYER, GENERATE]
    problems = [unit.problem for unit in plan if unit.problem is not None]
    assert {(problem.out_features, problem.in_features) for problem in problems} == set(static.LINEARS.values())
    assert [problem.rows for problem in problems[:6]] == [16] * 3 + [4096] * 3
    assert {problem.op for problem in problems} == {
        "nm_linear",
        "nm_linear_grad_input",
        "nm_linear_grad_values",
    }


class Played:
    """A device that answers at once."""

    def __init__(self, args: argparse.Namespace):
        self.ended = False

    def rows(self, unit: Unit, args: argparse.Namespace) -> list[str]:
        done.append(unit.name)
        return [first_run.line(unit, "dense", "1.0", "1.00")]

    def end(self) -> None:
        self.ended = True


done: list[tuple[str, str, str]] = []


def test_one_command_writes_a_table_and_resumes(tmp_path, monkeypatch):
    done.clear()
    monkeypatch.setattr(first_run, "Worker", Played)
    path = tmp_path / "gpu.md"
    command = ["--first-run", "--device", "cpu", "--small", "--output", str(path)]
    assert gpu.main([*command, "--minutes", "-1"]) == 0 and not done
    assert gpu.main(command) == 0
    plan = [unit.name for unit in first_run.units(SMALL)]
    assert done == plan
    title, _, header, rule, *lines = path.read_text().splitlines()
    assert title.startswith("first run, ") and header == HEADER and len(cells(rule)) == len(cells(header))
    assert all(len(cells(line)) == len(cells(header)) for line in lines) and len(lines) == len(plan)
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")  # it was stopped before the last two
    assert gpu.main(command) == 0
    assert done == plan + plan[-2:]


def test_a_product_is_checked_timed_and_compared_with_its_prediction(monkeypatch):
    unit = next(unit for unit in first_run.units(ARGS) if unit.kind == PRODUCT)
    times = {"dense": 0.03, "operator": 0.04, "compressed": 0.04, "cusparselt:1/1/-1": 0.05, "cusparselt:2/1/-1": 0.025}
    times["sparse_wgmma"] = 0.02
    found = Measurement(unit.problem, times, {"sparse_tensor_cores": "its result is off by 1.0e+00"})
    monkeypatch.setattr(first_run.measure, "measure", lambda *args, **kwargs: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H100 80GB HBM3")
    told = [("nm_linear", Prediction(1, 1, "DRAM", 1, 0.9)), ("sparse_wgmma_linear", Prediction(1, 1, "L2", 1, 1.6))]
    monkeypatch.setattr(static, "predictions", lambda *size: iter(told))
    lines = [cells(line)[3:] for line in first_run.rows(unit, ARGS)]
    assert lines == [
        ["sparse_wgmma", "20.0", "1.50", "1.60", ""],
        ["cusparselt", "25.0", "1.20", "", ""],
        ["dense", "30.0", "1.00", "", ""],
        ["compressed", "40.0", "0.75", "0.90", ""],
        ["sparse_tensor_cores", "", "", "", "its result is off by 1.0e+00"],
    ]


@pytest.mark.usefixtures("own_times")
def test_a_product_runs():
    unit = next(unit for unit in first_run.units(SMALL) if unit.kind == PRODUCT)
    (line, *_) = first_run.rows(unit, SMALL)
    assert cells(line)[:4] == ["nm_linear", "toy", "4x64 -> 96", "dense"] and float(cells(line)[4]) > 0


def test_a_model_generates(monkeypatch):
    monkeypatch.setattr(first_run, "TOKENS", 4)
    unit = next(unit for unit in first_run.units(SMALL) if unit.kind == GENERATE)
    lines = first_run.generation(unit, SMALL, {"dense": "eager", "2:4": "eager"})
    assert [cells(line)[3] for line in lines] == ["dense", "2:4"]
    assert all(float(cells(line)[4]) > 0 and float(cells(line)[5]) > 0 for line in lines)


def test_an_error_is_a_line(monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("no | such thing\nand more")

    unit = next(unit for unit in first_run.units(SMALL) if unit.kind == PRODUCT)
    monkeypatch.setattr(first_run.measure, "measure", fail)
    (line,) = first_run.rows(unit, SMALL)
    assert cells(line)[-1] == "ValueError: no / such thing"


def misbehave(connection, args) -> None:
    while True:
        unit = connection.recv()
        if unit.what == "hangs":
            time.sleep(60)
        if unit.what == "dies":
            os._exit(1)
        connection.send([f"did {unit.what} without {getattr(args, 'exclude', ())}"])


def test_what_hangs_or_dies_costs_a_line(monkeypatch):
    monkeypatch.setitem(first_run.LIMITS, PRODUCT, 1.0)
    worker = Worker(SMALL, misbehave, "fork")
    try:
        names = ("works", "hangs", "works", "dies", "works")
        found = [worker.rows(Unit(PRODUCT, name, "toy", "1x1"), SMALL) for name in names]
    finally:
        worker.end()
    assert found[0] == ["did works without ()"]
    assert found[2] == found[4] == ["did works without ('sparse_wgmma',)"]
    assert "no answer in 1 s, ended" in found[1][0]
    assert "its process died" in found[3][0]

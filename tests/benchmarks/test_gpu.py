"""The GPU benchmark as far as it goes without one: what it plans, its table, and how it resumes."""

from __future__ import annotations

import argparse
import time

import pytest
import torch

from benchmarks import gpu, gpu_cases
from benchmarks.gpu_cases import MODELS, TOKENS, Case

ARGS = argparse.Namespace(device="cpu", small=False, only=["linear", "layer"], models=None, rounds=3, minutes=1.0)
SMALL = argparse.Namespace(**{**vars(ARGS), "small": True})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def case(what: str, calls: list[str], **rivals) -> Case:
    def made(name: str):
        def make():
            calls.append(f"{what} {name}")
            return lambda: time.sleep(1e-4)

        return make

    return Case(what, "toy", "4 tokens", lambda: {name: rivals.get(name) or made(name) for name in ("dense", "other")})


def test_the_plan_covers_every_weight_once_at_every_number_of_tokens():
    plan = list(gpu_cases.cases(ARGS))
    assert len({item.name for item in plan}) == len(plan)
    shapes = {shape for sizes in MODELS.values() for shape in gpu_cases.weights(sizes)}
    forward = {item.shape for item in plan if item.what == "forward"}
    assert forward == {f"{tokens}x{columns} -> {rows}" for rows, columns in shapes for tokens in TOKENS}
    assert (14336, 4096) in shapes and (1024, 4096) in shapes  # of Llama: an up projection, a key projection
    large = {item.what for item in plan if item.shape == "4096x5120 -> 20480"}
    assert large == {"forward", "grad input", "grad values", "low-rank 1.56%", "low-rank 6.25%"}
    assert {item.model for item in plan if item.what == "training step of a layer"} == set(MODELS)
    only = argparse.Namespace(**{**vars(ARGS), "only": ["layer"], "models": ["opt-13b"]})
    assert {item.model for item in gpu_cases.cases(only)} == {"opt-13b"}


def test_a_table_resumes_after_the_last_case(tmp_path, capsys):
    path, calls = tmp_path / "gpu.md", []
    plan = [case("first", calls), case("second", calls)]
    assert gpu.fill(path, "here", plan[:1], ARGS) == 0
    assert gpu.fill(path, "here", plan, ARGS) == 0
    assert calls == ["first dense", "first other", "second dense", "second other"]
    title, _, header, rule, *rows = path.read_text().splitlines()
    assert title == "here" and header == gpu.HEADER and rule.count("---") == len(cells(header))
    assert [cells(row)[0] for row in rows] == ["first", "first, other", "second", "second, other"]
    assert all(len(cells(row)) == len(cells(header)) for row in rows)
    assert cells(rows[0])[4] == "1.00"
    assert gpu.fill(path, "another device", plan, ARGS) == 1
    assert "give another --output" in capsys.readouterr().err
    late = argparse.Namespace(**{**vars(ARGS), "minutes": -1.0})
    assert gpu.fill(path, "here", [*plan, case("third", calls)], late) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert "third" not in path.read_text()


@pytest.mark.parametrize("broken", ["dense", "other", "both"])
def test_a_rival_that_fails_is_a_row_that_says_so(tmp_path, broken):
    def fail():
        raise ValueError("no such | shape\nand more")

    calls: list[str] = []
    failing = case("first", calls, **dict.fromkeys(("dense", "other") if broken == "both" else (broken,), fail))
    rows = gpu.rows(failing, ARGS)
    assert [cells(row)[0] for row in rows] == ["first", "first, other"]
    for name, row in zip(("dense", "other"), rows, strict=True):
        assert (cells(row)[3] == "ValueError: no such / shape") == (broken in (name, "both"))
    assert gpu.fill(tmp_path / "gpu.md", "here", [failing], ARGS) == 0
    calls.clear()
    assert gpu.fill(tmp_path / "gpu.md", "here", [failing], ARGS) == 0  # a case that failed is done too
    assert not calls


@pytest.mark.parametrize("what", ["forward", "grad input", "grad values", "low-rank 6.25%"])
def test_rivals_of_a_linear_compute_the_same(what, monkeypatch):
    """Equal up to what pruning takes away, so on weights that are 2:4 to begin with."""
    compiler = torch.compile

    def uncompiled(function, backend="inductor", **_):
        return (
            compiler(function, backend="eager")
            if backend == "inductor"
            else compiler(function, backend=backend, options={"compiler": "eager"})
        )

    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(gpu_cases.nm, "double_prune_mask", lambda weight, mask, pattern: mask)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kw: randn(*shape, **kw) * (torch.arange(shape[-1]) % 4 < 2))
    makers = gpu_cases.linear_cases(64, 48, 32, SMALL)[what]()
    results = {name: make()() for name, make in makers.items()}
    dense = results.pop("dense").double()
    for name, result in results.items():
        expected = dense[:, torch.arange(32) % 4 < 2] if what == "grad values" else dense
        assert (result.double() - expected).abs().max() < 2e-2 * expected.abs().max(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "gpu.md")]) == 1
    assert "nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()

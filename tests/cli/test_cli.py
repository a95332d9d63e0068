"""The command line: results, refusals, exit codes, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxsparse
from fxsparse.errors import InternalError

pytest.importorskip("click")
from fxsparse.cli import app, main, output

MINE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    layers = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    return nn.Sequential(*layers), torch.randn(8, 16)

def nothing():
    return 3

def fails():
    raise KeyError("oh")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(MINE)
    sys.modules.pop("mine", None)
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama") / "tiny"
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(path)
    letters = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    return code, *capsys.readouterr()


def data(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0, out
    return json.loads(out)


# --- results ----------------------------------------------------------------------------------------------------------


def test_every_pass_and_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = data(capsys, "passes")
    names = {item["name"] for item in listed["passes"]}
    assert {getattr(fxsparse.passes, name).name for name in ("InsertNMMasks", "Multiplex", "Materialize")} <= names
    assert set(listed["recipes"]) == {*fxsparse.recipes.RECIPES, *fxsparse.recipes.TAUGHT}
    for item in listed["passes"]:
        assert item["summary"] and all(option["doc"] for option in item["options"]), item
    _, out, _ = run(capsys, "passes", "nm-masks")
    assert "criterion" in out and "magnitude" in out
    assert run(capsys, "passes", "nm-mask")[0] == app.REFUSED


def test_explain_says_what_python_says(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "mine:model", "--passes", "nm-masks")
    assert code == 0 and "rewritten  2  2:4, magnitude, compressed" in out
    explained = data(capsys, "explain", "mine:model", "--passes", "slope")
    assert [item["text"] for item in explained["passes"]] == ["nm-masks{pattern=2:4}", "double-prune"]
    assert [item["site"] for item in explained["passes"][0]["rewritten"]] == ["2"]


def test_a_configuration_needs_no_weights(capsys: pytest.CaptureFixture[str], llama: Path) -> None:
    told = [data(capsys, "explain", str(place), "--passes", "slope") for place in (llama, llama / "config.json")]
    sites = [[change["site"] for change in each["passes"][0]["rewritten"]] for each in told]
    assert len(sites[0]) == 11 and sites[0] == sites[1]
    assert told[0]["passes"][1]["after"] == told[1]["passes"][1]["after"]


def test_a_rewritten_folder_is_read_again(capsys: pytest.CaptureFixture[str], llama: Path) -> None:
    written = data(capsys, "rewrite", str(llama), "--passes", "slope", "--out", "out")
    assert written["form"] == "module" and (Path("out") / "tokenizer.json").exists()
    assert "CompressedLinear" in str(fxsparse.from_pretrained("out"))
    assert run(capsys, "rewrite", str(llama), "--passes", "slope", "--out", "out")[0] == app.USAGE
    written = data(capsys, "rewrite", str(llama), "--passes", "nm-masks", "--out", "out", "--dense", "--force")
    weight = LlamaForCausalLM.from_pretrained("out").model.layers[1].mlp.up_proj.weight
    assert written["form"] == "dense" and (weight.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all()
    data(capsys, "rewrite", "mine:model", "--passes", "nm-masks", "--out", "graph")
    import mine

    assert fxsparse.load("graph/model.safetensors", *mine.model()[:1], (mine.model()[1],))
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(".")) == []


def test_prune_measures_what_it_did(capsys: pytest.CaptureFixture[str], llama: Path) -> None:
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    options = ["--calibration", "text.txt", "--evaluate", "text.txt", "--rows", "4", "--tokens", "32"]
    pruned = data(capsys, "prune", str(llama), "--out", "pruned", *options)
    assert pruned["rewritten"] == 11 and pruned["tokens"] == 128 and pruned["loss"]["before"] > 0
    model = LlamaForCausalLM.from_pretrained("pruned")
    assert (model.model.layers[1].mlp.up_proj.weight == 0).float().mean() >= 0.5
    code, _, err = run(capsys, "prune", str(llama), "--out", "again")
    assert code == app.USAGE and "--calibration" in err


def test_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    written = data(capsys, "report", "mine:model", "--passes", "nm-masks", "--out", "page.html")
    assert written["bytes"] == Path("page.html").stat().st_size and "2:4, magnitude" in Path("page.html").read_text()


def test_bench_puts_the_promise_beside_the_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = data(capsys, "bench", "mine:model", "--passes", "nm-masks", "--eager", "--rounds", "3")
    for what in ("training step", "inference"):
        times = measured[what]
        assert times["original"] > 0 and times["reached"] == pytest.approx(times["speed_up"] / times["flops_promise"])
    rewritten, original = measured["bytes"]["rewritten"], measured["bytes"]["original"]
    assert rewritten["optimizer"] < original["optimizer"] and "CPU" in measured["machine"]


def test_env_and_kernels_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert data(capsys, "env")["torch"] == torch.__version__
    assert data(capsys, "kernels") == {"kernels": []}
    assert "_FXSPARSE_COMPLETE" in run(capsys, "completion", "bash")[1]
    completed = app.group.get_command(None, "explain")  # type: ignore[arg-type]
    option = next(parameter for parameter in completed.params if parameter.name == "passes")
    names = [item.value for item in option.type.shell_complete(None, option, "nm-masks,dou")]
    assert names == ["nm-masks,double-prune"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["explain", "nowhere", "--passes", "slope"], 1, "there is no nowhere"),
        (["explain", "mine:absent", "--passes", "slope"], 1, "mine has no function absent"),
        (["explain", "absent:model", "--passes", "slope"], 1, "cannot be imported"),
        (["explain", "mine:nothing", "--passes", "slope"], 1, "it returned int"),
        (["explain", "mine:model", "--passes", "materialize"], 1, "the order that works is gates,materialize"),
        (["explain", "mine:model", "--passes", "nm-masks{patern=2:4}"], 2, "did you mean 'pattern'"),
        (["explain", "mine:model"], 2, "--passes"),
        (["explian"], 2, "explian"),
        (["rewrite", "mine:model", "--passes", "nm-masks", "--out", "no/where"], 2, "does not exist"),
        (["explain", "mine:fails", "--passes", "nm-masks"], 1, "mine:fails failed: KeyError: 'oh'"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str) -> None:
    got, out, err = run(capsys, *words)
    assert got == code and says in err and "Traceback" not in out + err
    got, out, err = run(capsys, *words, "--json")
    assert got == code and says in json.loads(out)["error"]["message"]
    assert "Traceback" in run(capsys, "--debug", *words)[2]


def test_a_broken_folder_is_named(capsys: pytest.CaptureFixture[str], llama: Path, folder: Path) -> None:
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((llama / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"nothing")
    code, _, err = run(capsys, "rewrite", str(broken), "--passes", "nm-masks", "--out", "out")
    assert code == app.REFUSED and "broken" in err and not Path("out").exists()
    (broken / "config.json").write_text("{")
    assert run(capsys, "explain", str(broken), "--passes", "nm-masks")[0] == app.REFUSED
    (broken / "model.safetensors").unlink()
    (broken / "config.json").write_text((llama / "config.json").read_text())
    code, _, err = run(capsys, "rewrite", str(broken), "--passes", "nm-masks", "--out", "out")
    assert code == app.REFUSED and "holds no weights" in err


def test_a_bug_is_called_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(subject: object) -> None:
        raise KeyError("oh")

    monkeypatch.setattr("fxsparse.cli.rewriting.explain_model", explain)
    code, out, err = run(capsys, "explain", "mine:model", "--passes", "nm-masks")
    assert code == app.BUG and "This is a bug in fxsparse" in err and "--debug" in err and "Traceback" not in out + err


@pytest.mark.parametrize("error", [InternalError("a bug"), KeyboardInterrupt(), OSError("disk full")])
def test_nothing_is_half_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    Path("out").mkdir()
    Path("out/kept").write_text("before")

    def save(gm: object, path: Path) -> None:
        path.write_text("half")
        raise error

    monkeypatch.setattr("fxsparse.cli.rewriting.save", save)
    code, _, err = run(capsys, "rewrite", "mine:model", "--passes", "nm-masks", "--out", "out", "--force")
    assert code == {InternalError: app.BUG, OSError: app.REFUSED}.get(type(error), app.INTERRUPTED)
    assert "Traceback" not in err
    assert [path.name for path in Path("out").iterdir()] == ["kept"]
    assert {path.name for path in Path().iterdir()} <= {"out", "mine.py", "__pycache__", "cache"}


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").touch()
    with output.new_folder(target) as new:
        (new / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(folder: Path, number: int) -> None:
    (folder / "slow.py").write_text(
        "import time, sys\nfrom mine import model as fast\n"
        "def model():\n    print('ready', flush=True)\n    time.sleep(60)\n    return fast()\n"
    )
    command = [sys.executable, "-m", "fxsparse", "report", "slow:model", "--passes", "nm-masks", "--out", "page.html"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(fxsparse.__file__).parents[1]), str(folder)])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == app.INTERRUPTED and "nothing is half written" in err and "Traceback" not in err
    assert list(folder.glob("*page*")) == []

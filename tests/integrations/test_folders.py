"""Folders that `save_pretrained` writes: nothing in them is lost, and nothing is read unchecked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fxsparse
from fxsparse import files, stored
from fxsparse.errors import CheckpointError
from tests.support.traced import traced


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ordinary checkpoint with a layer less, and a compressed one."""
    family, base = traced("opt")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ordinary", "compressed")}
    fxsparse.save_pretrained(fxsparse.rewrite(base, "drop-layers{indices=[1]}"), family.model, folders["ordinary"])
    sparse = fxsparse.to_module(fxsparse.rewrite(base, "nm-masks,low-rank{rank=2}"), family.model)
    fxsparse.save_pretrained(sparse, folders["compressed"])
    return folders


@pytest.fixture
def folder(request: Any, made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[request.param], tmp_path / request.param))


both = pytest.mark.parametrize("folder", ["ordinary", "compressed"], indirect=True)
compressed = pytest.mark.parametrize("folder", ["compressed"], indirect=True)


@both
def test_only_the_weights_of_earlier_saves_go(folder: Path) -> None:
    theirs = folder / "model_of_mine.safetensors"
    save_file({"theirs": torch.ones(2)}, theirs)
    family, base = traced("opt")
    fxsparse.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")  # as anybody would
    shards = list(folder.glob("model-0*"))
    assert len(shards) > 2
    fxsparse.save_pretrained(fxsparse.rewrite(base, "drop-layers{indices=[0]}"), family.model, folder)
    assert load_file(theirs)["theirs"].sum() == 2
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "model_of_mine.safetensors"]
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2


@both
def test_a_failure_leaves_the_folder_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    family, base = traced("opt")
    with pytest.raises(CheckpointError, match=r"is as it was: .*No space left"):
        fxsparse.save_pretrained(fxsparse.rewrite(base, "drop-layers{indices=[0]}"), family.model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@both
def test_a_reader_finishes_a_save_that_was_killed_while_it_moved_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, base = traced("opt")
    monkeypatch.setattr(files, "_move", lambda *args: None)
    fxsparse.save_pretrained(fxsparse.rewrite(base, "drop-layers{indices=[0,1]}"), family.model, folder)
    monkeypatch.undo()
    assert fxsparse.from_pretrained(folder).config.num_hidden_layers == 1
    assert sorted(file.name for file in folder.glob("model*")) == ["model.safetensors"]


def edit(folder: Path, change: Any, sign: bool = True) -> None:
    """Edits config.json, as damage or, with the checksum taken out, on purpose."""
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    change(settings)
    if sign:
        settings.get("fxsparse", {}).pop("checksum", None)
    file.write_text(json.dumps(settings))


@compressed
def test_settings_are_what_was_written_or_edited_on_purpose(folder: Path) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["dropout"] = 0.5

    edit(folder, change, sign=False)
    with pytest.raises(CheckpointError, match="is not what was written: it was damaged, or edited"):
        fxsparse.from_pretrained(folder)
    edit(folder, change)
    model = fxsparse.from_pretrained(folder)
    assert model.config.dropout == 0.5
    model.save_pretrained(folder)  # the module's own, which knows no checksums
    assert fxsparse.from_pretrained(folder).config.dropout == 0.5


def _nested(settings: dict[str, Any]) -> None:
    forms = settings["fxsparse"]["modules"]
    next(iter(forms.values()))["forms"]["weight"]["rank"] = 10**9


HOSTILE: dict[str, tuple[Any, str]] = {
    "no model": (lambda s: s.update(architectures=["AutoTokenizer"]), "is no model class of transformers"),
    "no class": (lambda s: s.update(architectures=[{}]), "is no model class of transformers"),
    "layers": (lambda s: s.update(num_hidden_layers=10**7), "num_hidden_layers = 10000000 is more than"),
    "a rank": (_nested, "transformers cannot build OPTForCausalLM"),
    "sizes": (lambda s: s["fxsparse"].update(sizes={"x": "y"}), r"sizes\['x'\] must be a list"),
    "passes": (lambda s: s["fxsparse"]["record"].update(entries=3), r"record\.entries must be a list"),
    "newer": (lambda s: s["fxsparse"].update(format=7), "is of format 7"),
}


@compressed
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_settings_are_refused(folder: Path, what: str) -> None:
    change, message = HOSTILE[what]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        fxsparse.from_pretrained(folder)


@compressed
def test_hostile_indices_are_refused(folder: Path) -> None:
    """Kernels read where indices say."""
    file = next(folder.glob("model*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in stored.read(file).tensors.items()}
    name = next(name for name in tensors if name.endswith("_indices"))
    tensors[name].zero_()
    stored.write(file, tensors, {})
    with pytest.raises(CheckpointError, match="whose indices do not ascend"):
        fxsparse.from_pretrained(folder)

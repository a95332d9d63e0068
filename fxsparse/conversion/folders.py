"""Folders of transformers checkpoints: written whole beside what is there, and checked before transformers reads them.

config.json                        with the sizes that no setting expresses, and a checksum of all settings
model.safetensors                  weights that transformers reads alone, or
model.fxsparse.safetensors         weights of other shapes or in another form; both with checksums
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse import files, stored, typed
from fxsparse import graph as fx
from fxsparse.conversion.depth import CONFIG_KEY, COUNT_OF_LAYERS
from fxsparse.errors import CheckpointError
from fxsparse.graph.added_state import NAME as ADDED
from fxsparse.graph.added_state import added_state_of
from fxsparse.graph.record import Record, up_to_date
from fxsparse.modules.spec import Spec

VARIANT = "fxsparse"
"""In the names of weight files. Transformers alone finds no file of that name; under the plain name it would initialise
the tensors of other sizes at random."""
_WEIGHTS = "transformers_weights"
"""The setting that names the file of the weights to transformers, which repeats a name it cannot read in its error."""
_READ_WITH = "these weights have other shapes, or are compressed; read this folder with fxsparse.from_pretrained"
_COMPILED = "this model was compiled by fxsparse, with passes={passes!r}, without which it is another one: {instead}"
_INSTEAD = (
    "make it anew, torch.compile it with the same passes, call it once and load these weights into it; or write it by "
    "fxsparse.save_pretrained(compiled, path)"
)
_CHECKSUM = "checksum"
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class Folder:
    """A checkpoint that was checked.

    Attributes:
        path: the folder.
        model_class: the class of transformers that it names.
        description: what its configuration says beyond transformers' settings; None for an ordinary checkpoint.
        variant: in the names of its weight files.
    """

    path: Path
    model_class: Any
    description: dict[str, Any] | None
    variant: str | None

    @property
    def config(self) -> Any:
        """The configuration, with the description as its setting."""
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(f"{self.path / 'config.json'}: transformers cannot read it: {error}") from error
        vars(config).pop(_WEIGHTS, None)
        setattr(config, CONFIG_KEY, self.description)
        return config


@dataclass(frozen=True)
class _Description:
    """The types of a description."""

    sizes: dict[str, list[int]]
    heads: dict[str, dict[str, list[int] | int]]
    modules: dict[str, Spec] | None = None
    flags: list[str] | None = None
    names: dict[str, str] | None = None


def write(model: Any, folder: Path, check_read: Callable[[Path], None], *, plain: bool) -> None:
    """Writes a model of transformers; ``plain`` if transformers alone can read it.

    Args:
        model: is written whole, also what its class leaves out of files because it would compute it anew.
        folder: where.
        check_read: reads the written folder, before it is in its place, and raises a CheckpointError if that gives
            another model.
        plain: see above.

    Raises:
        CheckpointError: that failed; the folder is as it was.
    """
    model._keys_to_ignore_on_save = None
    try:
        with files.unfinished(folder, "fxsparse") as part:
            model.save_pretrained(part, variant=None if plain else VARIANT)
            state = model.state_dict()
            for file in sorted(part.glob("*.safetensors")):
                stored.seal(file, state)
            if not plain:
                _sign(part / "config.json")
            check_read(part)
            files.put_all(part, folder, list(_weight_files(folder)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is as it was: {error}") from error
    except stored.FAILURES as error:
        raise CheckpointError(f"{folder} cannot be written, and is as it was: {error}") from error


def save_readably(model: Any) -> None:
    """Lets the model's own ``save_pretrained``, which trainers call, write what transformers alone does not misread.

    It is an attribute of the instance, because the class is that of the original. Nothing if it has none.
    """
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(model: Any, folder: Any, is_main_process: bool = True, *args: Any, **options: Any) -> None:
    type(model).save_pretrained(model, folder, is_main_process, *args, **options)
    state = added_state_of(model)
    if state is not None and is_main_process and fx.tensors_of(state):
        _set(Path(folder) / "config.json", _WEIGHTS, _COMPILED.format(passes=state.passes, instead=_INSTEAD))
        return
    description = getattr(model.config, CONFIG_KEY, None) or {}
    if is_main_process and any(description.get(part) for part in ("sizes", "heads", "modules")):
        _sign(Path(folder) / "config.json")


def check(path: Path) -> Folder:
    """Checks what a folder says before anything is built of it; finishes a save that was killed while it moved files.

    Raises:
        CheckpointError: it is no checkpoint, or damaged.
    """
    try:
        files.finish(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: a save was killed, and its files cannot be moved into place: {error}"
        ) from error
    file = path / "config.json"
    settings = _json(file)
    model_class = _model_class(file, settings)
    description = settings.get(CONFIG_KEY)
    if description is not None:
        description = _description(file, settings)
    plain = description is None or any((path / name).is_file() for name in _names(None))
    variant = None if plain else VARIANT
    files_of = [path / name for name in _files_of(path, variant) if name.endswith(".safetensors")]
    names = [name for weights in files_of for name in stored.read(weights).tensors]
    if any(name.startswith(f"{ADDED}.") for name in names):
        raise CheckpointError(f"{path}: {settings.get(_WEIGHTS) or _COMPILED.format(passes='...', instead=_INSTEAD)}")
    tensors = len(names)
    for name, number in _counts_of_layers(settings):
        if number > max(tensors, _MOST_LAYERS):
            raise CheckpointError(f"{file}: {name} = {number} is more than the weights can have")
    return Folder(path, model_class, description, variant)


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > typed.LONGEST:
            raise CheckpointError(f"{file} is larger than such a file can be")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; fxsparse.save_pretrained would have written it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    data = typed.loads(text, str(file))
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is damaged: it must be an object")
    return data


def _model_class(file: Path, settings: dict[str, Any]) -> Any:
    import transformers

    named = settings.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    try:
        found = getattr(transformers, name, None)
    except Exception:  # transformers imports its classes when they are read
        found = None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{file}: its architecture {name[:80]!r} is no model class of transformers {transformers.__version__}"
        )
    return found


def _description(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    where = f"{file}: {CONFIG_KEY}"
    description = up_to_date(settings[CONFIG_KEY], where)
    if _CHECKSUM in description and description.pop(_CHECKSUM) != _checksum(settings):
        raise CheckpointError(
            f"{file} is not what was written: it was damaged, or edited; to read an edited one all the same, delete "
            f"{_CHECKSUM!r} from its setting {CONFIG_KEY!r}"
        )
    typed.read(_Description, description, where)
    if description.get("record") is not None:
        Record.from_data(description["record"], f"{where}.record")
    return description


def _set(file: Path, name: str, value: str) -> None:
    _write(file, {**json.loads(file.read_text()), name: value})


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _sign(file: Path) -> None:
    """Lets transformers alone refuse a folder with a message that names `from_pretrained`, and adds the checksum."""
    settings = {**json.loads(file.read_text()), _WEIGHTS: _READ_WITH}
    settings[CONFIG_KEY][_CHECKSUM] = _checksum(settings)
    _write(file, settings)


def _checksum(settings: dict[str, Any]) -> str:
    """Of all settings, the checksum left out."""
    description = {name: item for name, item in settings[CONFIG_KEY].items() if name != _CHECKSUM}
    text = json.dumps({**settings, CONFIG_KEY: description}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- the files of the weights -----------------------------------------------------------------------------------------


def _names(variant: str | None) -> tuple[str, str]:
    """The file of the weights, and the index where they are in several."""
    part = "" if variant is None else f".{variant}"
    return f"model{part}.safetensors", f"model.safetensors.index{part}.json"


def _files_of(folder: Path, variant: str | None) -> list[str]:
    """The names of the files that transformers reads of a variant."""
    single, index = _names(variant)
    if (folder / single).is_file():
        return [single]
    return [index, *_shards(folder / index)] if (folder / index).is_file() else []


def _shards(index: Path) -> list[str]:
    """The files that an index names; CheckpointError if it is damaged."""
    named = _json(index).get("weight_map")
    if not isinstance(named, dict) or not all(map(_is_name, named.values())):
        raise CheckpointError(f"{index} is damaged: weight_map must say the file of each tensor")
    return sorted(set(named.values()))


def _weight_files(folder: Path) -> Iterator[str]:
    """The files of all weights that earlier saves wrote into a folder, by their names and their indices."""
    for single, index in (_names(None), _names(VARIANT)):
        yield from (single, index)
        if (folder / index).is_file():
            with contextlib.suppress(CheckpointError):  # a damaged index names nothing
                yield from _shards(folder / index)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


def _counts_of_layers(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, item in settings.items():
        if isinstance(item, dict) and name != CONFIG_KEY:
            yield from _counts_of_layers(item)
        elif type(item) is int and COUNT_OF_LAYERS.fullmatch(name):
            yield name, item

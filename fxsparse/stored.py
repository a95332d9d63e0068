"""Files of tensors and texts in the format of safetensors, written whole and read only after they were checked.

A checksum for every tensor, over dtype, shape and values, stands in the file's metadata, and beside it one for all of
the metadata. They find damage; whoever writes a file on purpose can write them too, so what a file says is checked as
well wherever it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxsparse import files, typed
from fxsparse.errors import CheckpointError

_TENSORS = "fxsparse_checksums"
_TEXTS = "fxsparse_checksum"
FAILURES = (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError)
"""What damage and full disks raise out of safetensors, torch and Python."""


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        path: the file.
        texts: its metadata, without checksums.
        tensors: by name, as views of the file.
        checked: whether it has checksums, which are then right.
    """

    path: Path
    texts: dict[str, str]
    tensors: dict[str, Tensor]
    checked: bool


def read(path: str | os.PathLike[str]) -> Stored:
    """Reads a file; its tensors take no memory until they are used.

    Raises:
        CheckpointError: it cannot be read, or was damaged; the message names the file and the part.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            if header > min(path.stat().st_size, typed.LONGEST):
                raise CheckpointError(f"{path} cannot be read: its header would have {header:,} bytes")
        with safe_open(os.fspath(path), framework="pt") as opened:
            texts = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return Stored(path, *_checked(path, texts, tensors))
    except FAILURES as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error


def _checked(path: Path, texts: dict[str, str], tensors: dict[str, Tensor]) -> tuple[dict, dict, bool]:
    whole, table = texts.pop(_TEXTS, None), texts.get(_TENSORS)
    if whole is None and table is None:
        return texts, tensors, False
    if whole is None or table is None or whole != _of_texts(texts):
        raise CheckpointError(f"{path} is damaged: its metadata is not what was written")
    sums = typed.loads(texts.pop(_TENSORS), f"{path}: the checksums")
    if sums.keys() != tensors.keys():
        different = ", ".join(sorted(sums.keys() ^ tensors.keys())[:4])
        raise CheckpointError(f"{path} is damaged: it has other tensors than were written ({different})")
    for name, tensor in tensors.items():
        if _of_tensor(tensor) != sums[name]:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written")
    return texts, tensors, True


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Writes tensors and texts with their checksums, reads them back, and puts the file in its place.

    Raises:
        CheckpointError: that failed; what was at ``path`` is still there.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the path of a file in it")
    try:
        with files.unfinished(path.parent, path.name) as folder:
            _write(folder / path.name, tensors, texts)
            files.put(folder / path.name, path)
    except FAILURES as error:
        kept = "; what was there is unchanged" if path.exists() else ""
        raise CheckpointError(f"{path} cannot be written{kept}: {error}") from error


def seal(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Gives checksums to a file of an unfinished folder that a library wrote.

    Args:
        path: the file.
        expected: what tensors must be, those of them that the file has under these names.
    """
    found = read(path)
    for name in found.tensors.keys() & expected.keys():
        if _of_tensor(found.tensors[name]) != _of_tensor(expected[name]):
            raise CheckpointError(f"{path.name}: {name} was written with other values than the model has")
    sealed = path.with_name(f"{path.name}.sealed")
    _write(sealed, found.tensors, found.texts)
    os.replace(sealed, path)


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, those that are one tensor under their first name only.

    Slices of one storage are tensors of their own.
    """
    seen: set[tuple[object, ...]] = set()
    first = {}
    for name, tensor in state.items():
        place = tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)
        key = (place, tensor.dtype, tensor.shape, tensor.stride())
        if key not in seen:
            first[name] = tensor
        seen.add(key)
    return first


def _write(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    alone = _alone(tensors)
    metadata = {"format": "pt", **texts}
    metadata[_TENSORS] = json.dumps({name: _of_tensor(tensor) for name, tensor in alone.items()})
    metadata[_TEXTS] = _of_texts(metadata)
    save_file(alone, path, metadata)
    read(path)


def _alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that share no memory, as the format wants them."""
    alone: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name} has no values: it is on the meta device")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        alone[name] = tensor
    return alone


def _of_tensor(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _of_texts(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(texts.items()))).encode()).hexdigest()[:32]

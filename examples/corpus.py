"""Real text on every machine: the source of the Python standard library, or a file or folder of the user."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train and to validate on, uint8, split by file."""

    train: Tensor
    validation: Tensor


def read_corpus(path: str | None = None, *, seed: int = 0, validation: float = 0.05, limit: int = 12_000_000) -> Corpus:
    """Reads text as bytes.

    Args:
        path: a file or a folder; by default the standard library's source.
        seed: seed of the order of the files.
        validation: fraction of the bytes that is held out, in whole files if there are several.
        limit: the largest number of bytes to read.
    """
    root = Path(path) if path else Path(sysconfig.get_paths()["stdlib"])
    if not root.exists():
        raise SystemExit(f"{root} does not exist")
    files = [root] if root.is_file() else sorted(_files(root, "*" if path else "*.py"))
    random.Random(seed).shuffle(files)
    texts, size = [], 0
    for file in files:
        text = file.read_bytes()[: limit - size]
        texts.append(text)
        size += len(text)
        if size >= limit:
            break
    held_out = int(size * validation)
    if len(texts) == 1:
        return Corpus(_bytes(texts[0][held_out:]), _bytes(texts[0][:held_out]))
    split, length = 0, 0
    while length < held_out:
        length += len(texts[split])
        split += 1
    return Corpus(_bytes(b"".join(texts[split:])), _bytes(b"".join(texts[:split])))


def _files(root: Path, pattern: str) -> Iterator[Path]:
    for file in root.rglob(pattern):
        if file.is_file() and not _LEFT_OUT & set(file.relative_to(root).parts):
            yield file


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def random_windows(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows at random places of a text: token ids ``[batch, length]``, int64."""
    if len(text) <= length:
        raise SystemExit(f"the text has {len(text)} bytes, fewer than one window of {length}; give more data")
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()

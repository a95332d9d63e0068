"""A classification task without a download: which package of the standard library does a snippet of code come from?"""

from __future__ import annotations

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PAD, UNKNOWN, CLS = 0, 1, 2
_TOKEN = re.compile(r"[A-Za-z_]+|[0-9]+|[^\sA-Za-z0-9_]")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
_BLOCK = 20  # consecutive snippets that go to the same split


@dataclass(frozen=True)
class Split:
    """Token ids, int64 ``[snippets, length]``, with ``CLS`` as the first of each, and classes, int64 ``[snippets]``."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Snippets drawn at random, with replacement."""
        rows = torch.randint(len(self), (size,), generator=generator)
        return self.ids[rows], self.labels[rows]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All snippets in order; the last batch may be smaller."""
        yield from zip(self.ids.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True)
class Snippets:
    """The task: snippets for training and for testing, the names of the classes, and the size of the vocabulary."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    vocabulary: int


def read_snippets(*, classes: int = 8, length: int = 32, vocabulary: int = 2048, seed: int = 0) -> Snippets:
    """Cuts the sources of the largest packages into snippets that do not overlap.

    Every fifth block of 20 consecutive snippets is held out for testing, so that both splits see every large file. All
    classes have the same number of snippets. Tokens are words, numbers and signs; the vocabulary holds the most
    frequent ones of the training split.

    Args:
        classes: number of packages.
        length: tokens in a snippet, including the leading ``CLS``.
        vocabulary: number of token ids, including three special ones.
        seed: seed of the choice of snippets in a class that has more than the smallest class.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {folder.name: _tokens(folder) for folder in sorted(root.iterdir()) if _is_package(folder)}
    names = sorted(sorted(texts, key=lambda name: -len(texts[name]))[:classes])
    if len(names) < classes:
        raise SystemExit(f"{root} has only {len(names)} packages with sources, {classes} classes were asked for")
    size = length - 1
    cut = {name: [texts[name][at : at + size] for at in range(0, len(texts[name]) - size + 1, size)] for name in names}
    random_ = random.Random(seed)
    parts: dict[bool, list[list[list[str]]]] = {}
    for held_out in (False, True):
        chosen = [[s for i, s in enumerate(cut[name]) if (i // _BLOCK % 5 == 4) == held_out] for name in names]
        smallest = min(map(len, chosen))
        parts[held_out] = [random_.sample(snippets, smallest) for snippets in chosen]
    counts = Counter(token for snippets in parts[False] for snippet in snippets for token in snippet)
    ids = {token: place for place, (token, _) in enumerate(counts.most_common(vocabulary - 3), 3)}
    return Snippets(_split(parts[False], ids), _split(parts[True], ids), tuple(names), vocabulary)


def _is_package(folder: Path) -> bool:
    return folder.name not in _LEFT_OUT and (folder / "__init__.py").exists()


def _tokens(folder: Path) -> list[str]:
    files = sorted(file for file in folder.rglob("*.py") if not _LEFT_OUT & set(file.relative_to(folder).parts))
    return [token for file in files for token in _TOKEN.findall(file.read_text(errors="replace"))]


def _split(parts: list[list[list[str]]], ids: dict[str, int]) -> Split:
    rows = [[CLS, *(ids.get(token, UNKNOWN) for token in snippet)] for snippets in parts for snippet in snippets]
    labels = [label for label, snippets in enumerate(parts) for _ in snippets]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return Split(torch.tensor(rows)[order], torch.tensor(labels)[order])

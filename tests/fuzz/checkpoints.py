"""Random damage to a file of ``fxsparse.save``: it is refused by a CheckpointError that says where, or nothing is lost.

Damage is to the bytes (flipped, cut, put in, copied elsewhere), or to the record or the tensors behind right checksums,
as somebody would forge them. Bytes that were damaged are never loaded as another model. What is forged may be a record
of another model, which is then loaded; it must not break anything else.
"""

from __future__ import annotations

import copy
import functools
import json
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import fxsparse
from fxsparse import stored
from fxsparse.errors import CheckpointError
from tests.support.families import FAMILIES, Family

PASSES = "nm-masks{keep_first=false,keep_head=false},double-prune,low-rank{rank=2,start=0.0}"
SECONDS, MEGABYTES = 1.0, 200
VALUES = (
    None, True, 3, -1, 0, 2.5, 10**12, 10**400, float("nan"), "", "x", "2:4", "1:8", "a.b", "../x", "\x00", [], [[]],
    {}, {"x": 1}, ["x"], "nm-masks", "low-rank{rank=1000000000}", "no-pass", "gates", "weight", "forward",
    "[" * 2000, "9" * 5000,
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """Places and values as drawn; a place is a share of the length.

    Attributes:
        kind: ``flip``, ``cut``, ``insert``, ``copy`` of bytes; ``record``, ``tensor`` behind right checksums.
        steps: for each damage a place, a number and a value.
    """

    kind: str
    steps: tuple[tuple[float, int, Any], ...]


def damages() -> st.SearchStrategy[Damage]:
    step = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.sampled_from(VALUES))
    kinds = st.sampled_from(["flip", "cut", "insert", "copy", "record", "record", "record", "tensor"])
    return st.builds(Damage, kinds, st.lists(step, min_size=1, max_size=3).map(tuple))


def check(damage: Damage) -> tuple[str, str]:
    whole, state = _saved()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.safetensors"
        path.write_bytes(whole)
        if damage.kind in ("record", "tensor"):
            _forge(path, damage)
        else:
            path.write_bytes(_damaged(whole, damage))
        family = _family()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            loaded = fxsparse.load(path, family.model, kwargs=family.make_batch())
        except CheckpointError as error:
            seconds = time.process_time() - start
            assert str(path) in str(error), f"it does not say where: {error}"
            assert len(str(error)) < 1500, f"a message of {len(str(error))} characters: {str(error)[:200]}"
            # A forged record runs its passes before it turns out not to fit; bytes are refused before anything runs.
            assert damage.kind in ("record", "tensor") or seconds < SECONDS, f"{seconds:.1f} s until: {error}"
            return "refused", damage.kind
        finally:
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            assert more < MEGABYTES, f"{more:.0f} MB"
        found = loaded.state_dict()
        same = found.keys() == state.keys() and all(_same(found[name], state[name]) for name in state)
        assert same or damage.kind in ("record", "tensor"), "damaged bytes were loaded as another model"
        return "loaded", "the same" if same else "another model, forged"


def _damaged(data: bytes, damage: Damage) -> bytes:
    for place, number, _ in damage.steps:
        # Half of the places are in the header, which is short.
        header = 8 + int.from_bytes(data[:8], "little") if len(data) > 8 else 0
        at = int(place * 2 * header) if place < 0.5 and 0 < header < len(data) else int(place * len(data))
        if damage.kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (number or 1)]) + data[at + 1 :]
        elif damage.kind == "cut":
            data = data[:at]
        elif damage.kind == "insert":
            data = data[:at] + bytes([number]) * (1 + number % 7) + data[at:]
        else:
            data = data[:at] + data[: number * 8] + data[at + number * 8 :]
    return data


def _forge(path: Path, damage: Damage) -> None:
    file = stored.read(path)
    tensors = {name: tensor.clone() for name, tensor in file.tensors.items()}
    record = json.loads(file.texts["fxsparse"])
    for place, number, value in damage.steps:
        if damage.kind == "record":
            record = _changed(record, place, number, copy.deepcopy(value))
        elif tensors:
            _change_tensor(tensors, place, number)
    stored.write(path, tensors, {**file.texts, "fxsparse": json.dumps(record)})


def _changed(record: Any, place: float, number: int, value: Any) -> Any:
    """The record with one of its values changed, taken out or put at another place."""
    places: list[tuple[Any, Any]] = []

    def visit(data: Any) -> None:
        for key in data if isinstance(data, dict) else range(len(data)):
            places.append((data, key))
            if isinstance(data[key], (dict, list)):
                visit(data[key])

    if not isinstance(record, (dict, list)) or not record:
        return value
    visit(record)
    data, key = places[int(place * len(places))]
    if number % 4 == 0:
        del data[key]
    elif number % 4 == 1 and isinstance(data, list):
        data.append(data[key])
    elif number % 4 == 2:
        other, name = places[number % len(places)]
        data[key] = json.loads(json.dumps(other[name])) if _has(other, name) else value
    else:
        data[key] = value
    return record


def _has(data: Any, key: Any) -> bool:
    return key in data if isinstance(data, dict) else key < len(data)


def _change_tensor(tensors: dict[str, torch.Tensor], place: float, number: int) -> None:
    name = sorted(tensors)[int(place * len(tensors))]
    tensor = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensors.pop(name),
        lambda: tensors.update({name: tensor.flatten()[:-1].clone()}),
        lambda: tensors.update({name: tensor.unsqueeze(0).clone()}),
        lambda: tensors.update({name: tensor.double() if tensor.is_floating_point() else tensor.int()}),
        lambda: tensors.update({f"{name}.more": tensor.clone()}),
        lambda: tensors.update({name: (tensor + 100).to(tensor.dtype)}),
        lambda: tensors.update({name: torch.full_like(tensor, -1) if tensor.dtype != torch.uint8 else tensor | 255}),
    ]
    changes[number % len(changes)]()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@functools.cache
def _saved() -> tuple[bytes, dict[str, torch.Tensor]]:
    family = _family()
    gm = fxsparse.rewrite(family.model, PASSES, kwargs=family.make_batch())
    with tempfile.TemporaryDirectory() as folder:
        fxsparse.save(gm, Path(folder) / "whole.safetensors")
        return (Path(folder) / "whole.safetensors").read_bytes(), gm.state_dict()


def _family() -> Family:
    return FAMILIES["sequential"]()

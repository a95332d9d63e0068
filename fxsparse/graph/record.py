"""The record of a graph module: the passes that ran, their changes and reasons, and the costs before and after each.

    Record
      entries: Entry, one for each pass      its text, the costs around it, its time
        changes: Change, one for each site   rewritten or skipped, and the reason
      weights: HeldWeight                    the form in which a weight of the original model is held now

The record is stored in ``gm.meta["fxsparse"]``. It is plain data: it serialises to JSON, and its passes can be replayed
on the original model.

What it is written as has a number, `FORMAT`. A record of an earlier format is brought up to date by `_MIGRATIONS`, step
by step; a later one is refused; fields that this version does not know are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxsparse import typed
from fxsparse.errors import CheckpointError
from fxsparse.graph.state import meta_of, tensors_of
from fxsparse.version import __version__

FORMAT = 2
"""Of what is written: 1, of version 0.1.0, said no number and had no checksums."""
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: lambda data: data}
"""From a format to the next; what later formats added has defaults."""
Further = tuple[tuple[str, str], ...]
"""Fields that another version wrote: name and JSON."""

META_KEY = "fxsparse"
TRACE_KEY = "fxsparse_trace"
NAMES_KEY = "fxsparse_names"
"""In the meta of a module form: the graph's name of each tensor that has another one in the module."""


@dataclass(frozen=True)
class Change:
    """The result of a pass at one site.

    Attributes:
        site: module path or parameter name.
        rewritten: whether the pass changed the site.
        detail: the change, or the reason for leaving the site unchanged.
        further: fields that another version wrote.
    """

    site: str
    rewritten: bool
    detail: str
    further: Further = ()

    def __str__(self) -> str:
        return f"{self.site}: {self.detail}"


def rewrote(site: str, detail: str) -> Change:
    """A changed site."""
    return Change(site, True, detail)


def skipped(site: str, reason: str) -> Change:
    """An unchanged site."""
    return Change(site, False, reason)


@dataclass(frozen=True)
class Costs:
    """The costs of a model at its traced sizes.

    Attributes:
        forward_flops: FLOPs of the forward pass.
        step_flops: FLOPs of the forward and the backward pass.
        parameters: number of parameter elements.
        parameter_bytes: bytes of the parameters.
        buffer_bytes: bytes of the buffers (masks, indices).
        optimizer_bytes: bytes of two moments for every trainable parameter, as in torch's AdamW.
        nm_step_flops: FLOPs of the forward and the backward pass on hardware that skips what is pruned n:m along the
            dimension it sums over (`fxsparse.cost.nm_hardware`); None in records of earlier versions.
        further: fields that another version wrote.
    """

    forward_flops: int
    step_flops: int
    parameters: int
    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    nm_step_flops: int | None = None
    further: Further = ()


@dataclass(frozen=True)
class Entry:
    """One pass of a record.

    Attributes:
        text: the pass and its options, readable by ``Pipeline.parse``.
        changes: one for every site that the pass considered.
        before, after: the model's costs before and after the pass.
        milliseconds: the run time of the pass.
        further: fields that another version wrote.
    """

    text: str
    changes: tuple[Change, ...]
    before: Costs
    after: Costs
    milliseconds: float
    further: Further = ()

    @property
    def name(self) -> str:
        """The pass, without its options."""
        return self.text.partition("{")[0]

    @property
    def rewritten(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.rewritten)

    @property
    def skipped(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if not change.rewritten)


@dataclass(frozen=True)
class HeldWeight:
    """The form in which a weight of the original model is held after a rewrite.

    Attributes:
        name: the original full name, such as ``model.layers.0.fc1.weight``.
        storage: ``compressed`` (values and indices) or ``masked`` (dense weight and mask).
        pattern: ``n:m`` along the input dimension.
        transposed: whether the original is stored ``[in, out]``, or ``[experts, in, out]``.
        in_features: length of the input dimension.
        names: all names of the original, ``name`` included; several if it was tied.
        backward: ``n:m`` along the output dimension, of the weight in the gradient of the input; empty if not n:m.
        experts: how many matrices the weight holds, one for each expert; 0 if it is no weight of experts.
        further: fields that another version wrote.
    """

    name: str
    storage: str
    pattern: str
    transposed: bool
    in_features: int
    names: tuple[str, ...]
    backward: str = ""
    experts: int = 0
    further: Further = ()


@dataclass(frozen=True)
class Record:
    """All changes to a model, in order.

    Attributes:
        entries: the passes.
        weights: the current form of every replaced weight.
        notes: changes that tracing had to make.
        version: the version of fxsparse that wrote the record.
        further: fields that another version wrote.
    """

    entries: tuple[Entry, ...] = ()
    weights: tuple[HeldWeight, ...] = ()
    notes: tuple[str, ...] = ()
    version: str = ""
    further: Further = ()

    @property
    def text(self) -> str:
        """The passes as one pipeline, readable by ``Pipeline.parse``."""
        return ",".join(entry.text for entry in self.entries)

    def to_data(self) -> dict[str, Any]:
        """The record as plain data, which `from_data` reads."""
        return {"format": FORMAT, **typed.write(self)}

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(self.to_data(), indent=1)

    @classmethod
    def from_data(cls, data: Any, where: str = "the record") -> Record:
        """Reads what `to_data` gave, also in an earlier version.

        Raises:
            CheckpointError: it is damaged, or of a later format; ``where`` says what was read.
        """
        return typed.read(cls, up_to_date(data, where), where)

    @classmethod
    def from_json(cls, text: str, where: str = "the record") -> Record:
        """Reads a record written by `to_json`; raises as `from_data`."""
        return cls.from_data(typed.loads(text, where), where)


def up_to_date(data: Any, where: str) -> dict[str, Any]:
    """What a file says in this version's format, whose number is left out.

    Raises:
        CheckpointError: it is of a later format, or of none.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is damaged: it must be an object")
    number = data.get("format", 1)
    if type(number) is not int or number < 1:
        raise CheckpointError(f"{where}.format must be a positive whole number")
    if number > FORMAT:
        version = data.get("version")
        wanted = version if isinstance(version, str) and len(version) < 30 else "a later version"
        raise CheckpointError(
            f"{where} is of format {number}, and fxsparse {__version__} reads formats up to {FORMAT}: install fxsparse "
            f"{wanted}{' or later' if wanted == version else ''}"
        )
    data = {name: item for name, item in data.items() if name != "format"}
    for step in range(number, FORMAT):
        data = _MIGRATIONS[step](data)
    return data


def record_of(gm: nn.Module) -> Record:
    """The record of a graph module, or of its module form, in whatever wraps it; without passes if none ran yet."""
    if not isinstance(vars(gm).get("meta"), dict):
        from fxsparse.graph.wrapped import rewritten_of

        gm = rewritten_of(gm, "fxsparse.record_of")
    meta = meta_of(gm)
    record = meta.get(META_KEY)
    if isinstance(record, Record):
        return record
    return Record(notes=tuple(getattr(meta.get(TRACE_KEY), "notes", ())), version=__version__)


def hold(gm: nn.Module, weights: Iterable[HeldWeight]) -> None:
    """Notes the form of replaced weights in the record; a later note on the same weight replaces the earlier one."""
    record = record_of(gm)
    held = {weight.name: weight for weight in record.weights}
    held.update((weight.name, weight) for weight in weights)
    meta_of(gm)[META_KEY] = replace(record, weights=tuple(held.values()))


def forget_absent(gm: nn.Module) -> None:
    """Takes weights out of the record that the graph module no longer has, because their layer was dropped."""
    record, present = record_of(gm), tensors_of(gm).keys()
    left = tuple(weight for weight in record.weights if not present.isdisjoint((weight.name, f"{weight.name}_values")))
    if left != record.weights:
        meta_of(gm)[META_KEY] = replace(record, weights=left)


def append(gm: nn.Module, entry: Entry) -> None:
    """Adds a pass to the record."""
    record = record_of(gm)
    meta_of(gm)[META_KEY] = replace(record, entries=(*record.entries, entry))


def substitute(gm: nn.Module, old: str, new: str) -> None:
    """Replaces the text of a pass in the record, when a change during training has made it wrong for a replay."""
    record = record_of(gm)
    entries = tuple(replace(entry, text=new) if entry.text == old else entry for entry in record.entries)
    meta_of(gm)[META_KEY] = replace(record, entries=entries)
